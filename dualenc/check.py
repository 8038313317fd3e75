"""What a folder of data holds, and what is wrong with it: every sound file is read whole.

    python -m dualenc.data check FOLDER

FOLDER holds Clotho, AudioCaps or both, or is a plain folder with a captions.csv. The exit status is
1 where anything is wrong.
"""

import collections
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from dualenc import InputError, printable
from dualenc.decoding import MAX_LEVEL, check_header, unreadable
from dualenc.layouts import Split, read_split, splits_in
from dualenc.options import Parser

SHORT_SECONDS = 0.2  # one column of PaSST's patches spans 0.16 s
SILENT_PEAK = 1e-4  # of full scale, -80 dB: three steps of a 16-bit file
BLOCK_FRAMES = 2**20  # read at a time


@dataclasses.dataclass(frozen=True)
class Sound:
    """One sound file. Its digest is of the decoded samples: copies in another format are found."""

    fault: str | None
    seconds: float = 0.0
    rate: int = 0  # Hz
    digest: str = ""


def examine(path: Path) -> Sound:
    """Read a sound file from end to end and say what, if anything, is wrong with it.

    What decoding.decode_blocks refuses is a fault here, too.
    """
    digest, frames, low, high = hashlib.sha256(), 0, np.inf, -np.inf
    try:
        if not path.is_file():  # to open a pipe would be to wait for it
            raise FileNotFoundError
        with soundfile.SoundFile(os.fsencode(path)) as file:
            check_header(file)
            rate = file.samplerate
            while len(block := file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)):
                if not np.abs(block).max() <= MAX_LEVEL:  # NaN is not, either
                    raise ValueError("holds NaN, infinite or unscaled samples")
                digest.update(block)
                frames += len(block)
                low, high = min(low, block.min()), max(high, block.max())
            if frames < file.frames:
                raise ValueError(f"ends after {frames} of {file.frames} samples")
    except (soundfile.LibsndfileError, OSError, ValueError, TypeError) as error:
        return Sound(f"unreadable: {unreadable(path, error)}")
    seconds = frames / rate
    if (high - low) / 2 < SILENT_PEAK:
        fault = "silent"
    elif seconds < SHORT_SECONDS:
        fault = f"too short: {seconds:.3f} s"
    else:
        fault = None
    return Sound(fault, seconds, rate, digest.hexdigest())


def splits_of(folder: Path) -> Iterator[Split | InputError]:
    """Every split found in a folder, or why it cannot be read.

    Raises:
        InputError: there is no data set.
    """
    wanted = [(dataset, split, folder) for dataset, split in splits_in(folder)]
    if (folder / "captions.csv").is_file():
        wanted.append((str(folder), "train", folder))
    if not wanted:
        raise InputError(
            f"{folder}: no data set here: neither Clotho nor AudioCaps in a layout that is read "
            "(README lists them), nor a captions.csv"
        )
    for dataset, split, data_dir in wanted:
        try:
            yield read_split(dataset, split, data_dir)
        except InputError as error:
            yield error


def check_split(split: Split, first_with: dict[str, str]) -> tuple[str, list[str]]:
    """A line on what a split holds, and its faults.

    Args:
        first_with: {digest: the first clip with this sound}, over all splits so far; added to.
    """
    paths = [clip.path for clip in split.clips]
    with ThreadPool(os.cpu_count()) as pool:
        found = pool.imap(examine, paths, chunksize=4)
        label = f"reading {split.name}"
        sounds = list(tqdm(found, label, len(paths), unit="clip", leave=False, disable=None))
    faults = [f"{name}: missing" for name in split.missing]
    for clip, sound in zip(split.clips, sounds, strict=True):
        if sound.fault:
            faults.append(f"{clip.name}: {sound.fault}")
            continue  # all silent files sound the same
        first = first_with.setdefault(sound.digest, f"{split.name}: {clip.name}")
        if first != f"{split.name}: {clip.name}":
            faults.append(f"{clip.name}: duplicated: the same sound as {first}")
    rates = collections.Counter(sound.rate for sound in sounds if sound.rate)
    line = (
        f"{split.name}: {len(split.clips):,} clips, {len(split.captions):,} captions, "
        f"{sum(sound.seconds for sound in sounds) / 3600:.2f} h, "
        + " and ".join(f"{count:,} at {rate:,} Hz" for rate, count in sorted(rates.items()))
        + f" ({split.layout} layout)"
    )
    return line, faults


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("what", choices=("check",))
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    total, first_with = 0, {}
    for split in splits_of(folder):
        if isinstance(split, InputError):
            line, faults = f"cannot be read: {split}", []
            total += 1
        else:
            line, faults = check_split(split, first_with)
        print(line)
        for fault in faults:
            print(f"  {printable(fault)}")
        total += len(faults)
    print(f"{total:,} faults" if total != 1 else "1 fault")
    return 1 if total else 0
