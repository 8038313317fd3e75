"""Splits on disk -> decoded audio, once -> pairs -> packed batches (report, sections 3 and 4).

Everything that is drawn here (the order of an epoch, a clip's captions, a crop) is seeded from
(seed, epoch, index): workers, processes and resumed runs see the same batches.

Shapes: N clips of a split, S segments of a batch's clips, C clips and B_r pairs of this process's
part of a batch, B pairs of the whole batch, L tokens.
"""

import contextlib
import ctypes
import dataclasses
import glob
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from dualenc import InputError, replacing, run
from dualenc.audio import SAMPLE_RATE, SEGMENT_SAMPLES, crop, cut, decode_blocks, to_int16
from dualenc.layouts import Split
from dualenc.text import tokenize

CACHE_FORMAT = 2
MAX_INDEX_BYTES = 2**28  # over a million clips; json takes some ten times the memory
MIN_PROGRESS_CLIPS = 50  # fewer are decoded before a progress bar would be read
NO_SEGMENTS = np.zeros((0, SEGMENT_SAMPLES), np.int16)  # of a process that has no pairs to embed


# --- Decoded audio, cached once per split ---


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
    index_path = folder / f"{split.file_stem}.json"
    samples_path = _samples_path(index_path, stamps)
    old = _read_index(index_path)
    if old is not None and [row[:3] for row in old] == stamps and all(row[3] for row in old):
        return AudioCache(samples_path, [row[3] for row in old])

    files, faults = [], []
    with replacing(samples_path) as temporary:
        decoding = _decoded(split, stamps, old, index_path, processes)
        with open(temporary, "wb") as file, decoding as waveforms:
            for stamp, waveform in zip(stamps, waveforms, strict=True):
                if isinstance(waveform, str):
                    faults.append(waveform)
                    files.append([*stamp, 0])
                else:
                    file.write(waveform)
                    files.append([*stamp, len(waveform)])
    with replacing(index_path) as temporary:
        temporary.write_text(json.dumps({"format": CACHE_FORMAT, "files": files}))
    for stale in folder.glob(f"{glob.escape(split.file_stem)}.*.int16"):
        if stale != samples_path:  # who has it open goes on reading it
            stale.unlink(missing_ok=True)
    if faults:  # what could be decoded is kept for the next time
        raise InputError.of(f"{split.name}: sound files that cannot be used", faults)
    return AudioCache(samples_path, [row[3] for row in files])


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


@contextlib.contextmanager
def _decoded(
    split: Split, stamps: list, old: list | None, index_path: Path, processes: int | None
) -> Iterator[Iterator[np.ndarray | str]]:
    """Each clip in turn, (n,) int16 or why it cannot be used; unchanged ones from the old cache."""
    known: dict[str, tuple[list, int]] = {}
    if old is not None:
        samples_path = _samples_path(index_path, [row[:3] for row in old])
        cache = AudioCache(samples_path, [row[3] for row in old])
        known = {row[0]: (row[:3], i) for i, row in enumerate(old) if row[3]}
    reusable = [known[s[0]][1] if known.get(s[0], (0,))[0] == s else None for s in stamps]
    paths = [c.path for c, place in zip(split.clips, reusable, strict=True) if place is None]
    workers = max(1, min(processes or os.cpu_count() or 1, len(paths)))
    context = multiprocessing.get_context("fork")
    bar = tqdm(
        reusable, f"decoding {split.name}", unit="clip", leave=False,
        disable=None if len(paths) >= MIN_PROGRESS_CLIPS else True,
    )
    with context.Pool(workers, _prepare_worker) as pool:
        fresh = pool.imap(_decode, paths)
        yield (next(fresh) if place is None else cache[place] for place in bar)


def _prepare_worker() -> None:
    torch.set_num_threads(1)  # one core each
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent_death_signal = 1  # PR_SET_PDEATHSIG: no orphans where the parent is killed
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


def _decode(path: Path) -> np.ndarray | str:
    try:
        return np.concatenate([to_int16(block) for block in decode_blocks(path)])
    except InputError as error:
        return str(error)


# --- Pairs -> packed batches ---


@dataclasses.dataclass
class Batch:
    """One process's part of a batch: only segments that hold sound, and each clip once per unit.

    Attributes:
        segments: (S, 320000) int16.
        counts: (C,) segments of each clip, summing to S.
        clip_of_pair: (B_r,) the row among the C clips of each pair's clip.
        tokens: (B_r, L) int64.
        clip_ids, pair_ids: (B,) of the whole batch: equal clip_ids are the same clip.
        sizes: pairs of each process, summing to B.
    """

    segments: Tensor
    counts: Tensor
    clip_of_pair: Tensor
    tokens: Tensor
    clip_ids: Tensor
    pair_ids: Tensor
    sizes: list[int]

    def _with_tensors(self, change) -> "Batch":
        values = vars(self).items()
        return Batch(**{k: change(v) if isinstance(v, Tensor) else v for k, v in values})

    def pin_memory(self) -> "Batch":
        return self._with_tensors(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pieces(self, pairs: int | None) -> list["Batch"]:
        """Cut this process's part into batches of at most so many pairs, or one clip's.

        Each keeps whole clips; clip_ids, pair_ids and sizes stay the whole batch's. None makes one
        piece; without pairs there is none.
        """
        pairs = pairs or len(self.tokens)
        captions = torch.bincount(self.clip_of_pair, minlength=len(self.counts)).tolist()
        segments = self.counts.tolist()
        bounds, filled = [0], 0
        for clip, count in enumerate(captions):
            if filled and filled + count > pairs:
                bounds.append(clip)
                filled = 0
            filled += count
        bounds.append(len(captions))
        starts = np.concatenate([[0], np.cumsum(segments)])
        rows = np.concatenate([[0], np.cumsum(captions)])
        return [
            dataclasses.replace(
                self,
                segments=self.segments[starts[a] : starts[b]],
                counts=self.counts[a:b],
                clip_of_pair=self.clip_of_pair[rows[a] : rows[b]] - a,
                tokens=self.tokens[rows[a] : rows[b]],
            )
            for a, b in zip(bounds, bounds[1:], strict=False)
            if b > a
        ]


class PairBatches(torch.utils.data.Dataset):
    """Item i is this process's part of the run's i-th batch.

    An epoch shows every (clip, caption) pair once, in a new order. Captions are drawn in units of
    captions_per_clip captions of one clip, which is encoded once for all of them.

    Args:
        splits: what is trained on, with the cache of each.
        batch_size: pairs of a whole batch; the last batch of an epoch may hold fewer.
        processes: (rank, world size).
    """

    def __init__(
        self,
        splits: Sequence[tuple[Split, AudioCache]],
        tokenizer: Tokenizer,
        batch_size: int,
        captions_per_clip: int = 1,
        seed: int = 0,
        processes: tuple[int, int] = (0, 1),
    ):
        self.clips = [(cache, i) for _, cache in splits for i in range(len(cache))]
        self.captions = [caption for split, _ in splits for caption in split.captions]
        counts = [len(clip.captions) for split, _ in splits for clip in split.clips]
        self.clip_of_pair = np.repeat(np.arange(len(counts)), counts)
        self.tokenizer, self.seed, self.processes = tokenizer, seed, processes
        self.captions_per_clip = captions_per_clip
        self.units_per_batch = max(1, batch_size // captions_per_clip)
        self.pairs_per_batch = self.units_per_batch * captions_per_clip  # at most
        n_units = sum(-(-count // captions_per_clip) for count in counts)
        self.steps_per_epoch = -(-n_units // self.units_per_batch)
        self._plan: tuple[int, list[np.ndarray]] = (-1, [])  # the last epoch asked for

    def units(self, epoch: int) -> list[np.ndarray]:
        """The epoch's units in order: each the pair ids of up to k captions of one clip."""
        if self._plan[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            shuffled = rng.permutation(len(self.clip_of_pair))
            by_clip = shuffled[np.argsort(self.clip_of_pair[shuffled], kind="stable")]
            clips = self.clip_of_pair[by_clip]
            starts = np.searchsorted(clips, clips)  # where each one's clip begins
            place = np.arange(len(clips)) - starts
            cuts = np.flatnonzero(place % self.captions_per_clip == 0)
            units = np.split(by_clip, cuts[1:])
            self._plan = epoch, [units[i] for i in rng.permutation(len(units))]
        return self._plan[1]

    def __getitem__(self, step: int) -> Batch:
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.units_per_batch
        whole = self.units(epoch)[start : start + self.units_per_batch]
        rank, world = self.processes
        share = [whole[i] for i in np.array_split(np.arange(len(whole)), world)[rank]]
        parts = np.array_split([len(unit) for unit in whole], world)
        segments = [cut(self._crop(unit, epoch)) for unit in share]
        pair_ids = torch.from_numpy(np.concatenate(whole))
        return Batch(
            segments=torch.from_numpy(np.concatenate([NO_SEGMENTS, *segments])),
            counts=torch.tensor([len(s) for s in segments], dtype=torch.int64),
            clip_of_pair=torch.from_numpy(
                np.repeat(np.arange(len(share)), [len(unit) for unit in share])
            ),
            tokens=tokenize(self.tokenizer, [self.captions[p] for unit in share for p in unit]),
            clip_ids=torch.from_numpy(self.clip_of_pair[pair_ids.numpy()]),
            pair_ids=pair_ids,
            sizes=[int(part.sum()) for part in parts],
        )

    def _crop(self, unit: np.ndarray, epoch: int) -> np.ndarray:
        cache, i = self.clips[self.clip_of_pair[unit[0]]]
        return crop(cache[i], np.random.default_rng([self.seed, epoch, int(unit[0])]))


if __name__ == "__main__":
    from dualenc.check import main  # here only, since it knows nothing of batches

    run(main)
