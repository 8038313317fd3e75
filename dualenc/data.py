"""Splits and their decoded audio -> pairs -> packed batches (report, sections 3 and 4).

Splits are read in layouts.py; their audio is decoded, once, in cache.py.

Everything that is drawn here (the order of an epoch, a clip's captions, a crop) is seeded from
(seed, epoch, index): workers, processes and resumed runs see the same batches.

Shapes: S segments of a batch's clips, C clips and B_r pairs of this process's part of a batch, B
pairs of the whole batch, L tokens.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from dualenc import run
from dualenc.audio import SEGMENT_SAMPLES, crop, cut
from dualenc.cache import AudioCache
from dualenc.layouts import Split
from dualenc.text import tokenize

NO_SEGMENTS = np.zeros((0, SEGMENT_SAMPLES), np.int16)  # of a process that has no pairs to embed


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
