"""Sound files of a split -> decoded audio on disk, once: in later runs nothing is decoded again.

Shapes: n samples of a clip, or of a block of it.
"""

import contextlib
import ctypes
import glob
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from dualenc import InputError, remove_unfinished, replacing
from dualenc.audio import SAMPLE_RATE
from dualenc.decoding import decode_blocks, to_int16
from dualenc.layouts import Split

CACHE_FORMAT = 2
MAX_INDEX_BYTES = 2**28  # over a million clips; json takes some ten times the memory
MIN_PROGRESS_CLIPS = 50  # fewer are decoded before a progress bar would be read


class AudioCache(Sequence):
    """The decoded sounds of one split: item i is clip i, (n,) int16 at 32 kHz, memory-mapped.

    On disk: an index (json) that holds, clip by clip, the sound file's name, size, modification
    time and number of samples; and one file of samples, whose name is a digest of the former three.
    The index is written last, so that the samples it speaks of are complete.
    """

    def __init__(self, samples_path: Path, lengths: Sequence[int]):
        self.samples = np.memmap(samples_path, np.int16, "r")
        self.bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.samples[self.bounds[i] : self.bounds[i + 1]]

    @property
    def name(self) -> str:
        """Of the samples' file: another one where any sound file's size or time has changed."""
        return Path(self.samples.filename).name

    @property
    def seconds(self) -> float:
        return float(self.bounds[-1]) / SAMPLE_RATE


def open_cache(split: Split, folder: Path, processes: int | None = None) -> AudioCache:
    """The split's cache, built or brought up to date where files are new or changed.

    Args:
        split: whose clips are wanted.
        folder: where caches lie.
        processes: how many decode at once; None takes all cores.

    Raises:
        InputError: lists every file that cannot be used, or the cache cannot be written.
    """
    stamps = _stamps(split)
    remove_unfinished(folder, f"{glob.escape(split.file_stem)}.*")
    index_path = folder / f"{split.file_stem}.json"
    samples_path = _samples_path(index_path, stamps)
    old = _read_index(index_path)
    if old is not None and [row[:3] for row in old] == stamps and all(row[3] for row in old):
        return AudioCache(samples_path, [row[3] for row in old])

    with replacing(samples_path) as temporary:
        decoding = contextlib.closing(_decoded(split, stamps, old, index_path, processes))
        with open(temporary, "wb") as file, decoding as sounds:
            lengths, faults = _write(sounds, file)
    with replacing(index_path) as temporary:
        files = [[*stamp, length] for stamp, length in zip(stamps, lengths, strict=True)]
        temporary.write_text(json.dumps({"format": CACHE_FORMAT, "files": files}))
    for stale in folder.glob(f"{glob.escape(split.file_stem)}.*.int16"):
        if stale != samples_path:  # who has it open goes on reading it
            stale.unlink(missing_ok=True)
    if faults:  # what could be decoded is kept for the next time
        raise InputError.of(
            f"{split.name}: sound files that cannot be used", faults,
            more="; `python -m dualenc.data check FOLDER` lists all",
        )
    return AudioCache(samples_path, lengths)


def _stamps(split: Split) -> list[list]:
    """For each clip what tells whether its file has changed: [name, bytes, nanoseconds]."""
    stats = [clip.path.stat() for clip in split.clips]
    return [
        [clip.name, stat.st_size, stat.st_mtime_ns]
        for clip, stat in zip(split.clips, stats, strict=True)
    ]


def _samples_path(index_path: Path, stamps: list[list]) -> Path:
    digest = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]
    return index_path.with_suffix(f".{digest}.int16")


def _read_index(path: Path) -> list[list] | None:
    """The rows of a complete cache's index: [name, bytes, nanoseconds, samples].

    A file that could not be used has no samples. None where there is no index, or another version
    or something else wrote it: it is made anew.
    """
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            return None
        index = json.loads(path.read_text())
        rows = index["files"]
        total = 2 * sum(samples for *_, samples in rows)  # bytes
        complete = _samples_path(path, [row[:3] for row in rows]).stat().st_size == total
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    right = all(
        len(row) == 4 and isinstance(row[0], str) and type(row[3]) is int and row[3] >= 0
        for row in rows
    )
    return rows if right and total and complete and index["format"] == CACHE_FORMAT else None


def _write(
    sounds: Iterable[Iterable[np.ndarray | str]], file: BinaryIO
) -> tuple[list[int], list[str]]:
    """Write what _decoded yields; returns each clip's samples, and why those of none have none."""
    lengths, faults = [], []
    for blocks in sounds:
        start = file.tell()
        for block in blocks:
            if isinstance(block, str):
                faults.append(block)
                file.seek(start)
            else:
                file.write(block)
        lengths.append((file.tell() - start) // 2)
    file.truncate()  # what there was of the last one, if it cannot be used
    return lengths, faults


def _decoded(
    split: Split, stamps: list, old: list | None, index_path: Path, processes: int | None
) -> Iterator[Iterable[np.ndarray | str]]:
    """Each clip in turn: (n,) int16 block by block, from the old cache where its file is unchanged.

    In place of a block may stand, last, why the file cannot be used.
    """
    known: dict[str, tuple[list, int]] = {}
    if old is not None:
        samples_path = _samples_path(index_path, [row[:3] for row in old])
        cache = AudioCache(samples_path, [row[3] for row in old])
        known = {row[0]: (row[:3], i) for i, row in enumerate(old) if row[3]}
    reusable = [known[s[0]][1] if known.get(s[0], (0,))[0] == s else None for s in stamps]
    paths = [c.path for c, place in zip(split.clips, reusable, strict=True) if place is None]
    bar = tqdm(
        reusable, f"decoding {split.name}", unit="clip", leave=False,
        disable=None if len(paths) >= MIN_PROGRESS_CLIPS else True,
    )
    with contextlib.closing(_fresh(paths, processes or os.cpu_count() or 1)) as fresh:
        yield from (next(fresh) if place is None else [cache[place]] for place in bar)


def _fresh(paths: Sequence[Path], processes: int) -> Iterator[Iterator[np.ndarray | str]]:
    """Decode files in many processes: of each in turn what _send sends.

    Of n processes the first has files 0, n, 2n, ... and a pipe of its own. It waits until a block
    is taken before it decodes the next: memory holds one for each. If it is killed, its pipe ends.
    """
    context = multiprocessing.get_context("fork")
    count = min(processes, len(paths))
    readers, workers = [], []
    try:
        for i in range(count):
            reader, writer = context.Pipe(duplex=False)
            workers.append(context.Process(target=_send, args=(paths[i::count], writer)))
            workers[i].start()
            writer.close()  # here: the process alone holds it
            readers.append(reader)
        for i in range(len(paths)):
            yield _received(readers[i % count])
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _received(reader: Connection) -> Iterator[np.ndarray | str]:
    """What _send sends of one file.

    Raises:
        InputError: the process that sends was killed.
    """
    try:
        while (message := reader.recv()) is not None:
            yield message
    except (EOFError, OSError) as error:
        raise InputError(
            "a process that decodes sound files was killed, probably for lack of memory; the same "
            "command tries again"
        ) from error


def _send(paths: Sequence[Path], writer: Connection) -> None:
    """Decode files in turn; send each one's blocks, or why it cannot be used, and None last."""
    torch.set_num_threads(1)  # one core each
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, and in silence
    parent_death_signal = 1  # PR_SET_PDEATHSIG: no orphans where the parent is killed
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
    for path in paths:
        try:
            for block in decode_blocks(path):
                writer.send(to_int16(block))
        except InputError as error:
            writer.send(str(error))
        writer.send(None)
