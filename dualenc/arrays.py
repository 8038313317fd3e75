"""A folder of named arrays that is replaced as a whole, and read memory-mapped.

    index.json     what the caller says of the arrays; written last, it names their generation
    NAME.GEN.npy   one file per array

Nothing in the folder is executed when it is read (no pickle). Who opens it while it is written
finds the old arrays or the new ones, never some of each.
"""

import fcntl
import json
import os
from pathlib import Path

import numpy as np

from dualenc import InputError, remove_unfinished, replacing

HEADER = "index.json"


def make_writable(folder: Path) -> None:
    """Make the folder, or say that it cannot be written before hours go into what it is to hold."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        open(folder / "lock", "a").close()
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}); name another folder with --index"
        ) from error


def write_arrays(folder: Path, header: dict, arrays: dict[str, np.ndarray]) -> None:
    """Replace what the folder holds.

    Raises:
        InputError: it cannot be written; what was there is kept.
    """
    make_writable(folder)
    generation = os.urandom(4).hex()
    paths = {name: folder / f"{name}.{generation}.npy" for name in arrays}
    with open(folder / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # else two writers would remove each other's arrays
        for name, path in paths.items():
            remove_unfinished(folder, f"{name}.*.npy")
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.save(file, arrays[name], allow_pickle=False)
        with replacing(folder / HEADER) as temporary:
            temporary.write_text(json.dumps(header | {"generation": generation}) + "\n")
        # Programs that have the old arrays mapped go on reading them.
        for name, path in paths.items():
            for stale in set(folder.glob(f"{name}.*.npy")) - {path}:
                stale.unlink(missing_ok=True)


def read_arrays(folder: Path, format: str, names: tuple[str, ...]) -> tuple[dict, list[np.ndarray]]:
    """The header, and the arrays, memory-mapped.

    Raises:
        ValueError: the header is not one of this format, or an array is damaged.
        OSError: a file is not there or cannot be read.
    """
    header = json.loads((folder / HEADER).read_text())
    if not isinstance(header, dict) or header.get("format") != format:
        raise ValueError(f"{HEADER} is not of the format {format!r}")
    generation = str(header.get("generation"))
    if not generation.isalnum():
        raise ValueError(f"{generation!r} is no generation")
    # Copy-on-write: nobody writes, but torch takes no read-only memory.
    arrays = [
        np.load(folder / f"{name}.{generation}.npy", mmap_mode="c", allow_pickle=False)
        for name in names
    ]
    return header, [array.view(np.ndarray) for array in arrays]
