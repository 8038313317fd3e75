"""Embeddings and relevance -> mAP@k and R@k (report, section 6 and Table 1).

Q queries, N candidates, D embedding values, P (query, relevant candidate) pairs. Metrics are
fractions from 0 to 1.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dualenc.errors import InputError

MAP_CUTOFFS = (10, 16)
RECALL_CUTOFFS = (1, 5, 10)
METRICS = tuple(f"mAP@{k}" for k in MAP_CUTOFFS) + tuple(f"R@{k}" for k in RECALL_CUTOFFS)
BLOCK_BYTES = 16 * 2**20  # of similarities at a time; the whole matrix is never held


def retrieval_metrics(
    text: Tensor, audio: Tensor, relevant: Sequence[Sequence[int]]
) -> dict[str, float]:
    """{"mAP@10", "mAP@16", "R@1", "R@5", "R@10"} of queries (Q, D) that rank candidates (N, D).

    `relevant` holds, for each query, the indices of all its relevant candidates, at least one.
    """
    values = query_metrics(ranks(text, audio, relevant))
    return {name: value.mean().item() for name, value in values.items()}


def ranks(text: Tensor, audio: Tensor, relevant: Sequence[Sequence[int]]) -> list[Tensor]:
    """For each query the ranks by cosine (from 1, ascending) of its relevant candidates.

    Of equal cosines the lower index ranks first. As nothing is above NaN, it would always rank
    first: an embedding that is not finite is an InputError, and so is a query for which nothing is
    relevant, or the same twice.
    """
    if not all(0 < len(set(found)) == len(found) for found in relevant):
        raise InputError("relevant: each query needs one candidate or more, and none twice")
    text, audio = text.float(), audio.float()
    if not (text.isfinite().all() and audio.isfinite().all()):
        raise InputError("embeddings are not finite numbers: the model has diverged or is damaged")
    counts = torch.tensor([len(found) for found in relevant])
    query = torch.repeat_interleave(torch.arange(len(counts)), counts)  # (P,)
    candidate = np.concatenate([*relevant, []]).astype(int)[:, None]  # (P, 1)
    block = torch.empty(max(1, BLOCK_BYTES // (4 * len(audio))), len(audio))  # used again and again
    rank = torch.empty_like(query)
    for pairs in torch.arange(len(query)).split(len(block)):
        similarity = torch.mm(text[query[pairs]], audio.T, out=block[: len(pairs)]).numpy()
        its = candidate[pairs.numpy()]
        own = np.take_along_axis(similarity, its, axis=1)
        before = (similarity > own) | (similarity == own) & (np.arange(len(audio)) < its)
        # NumPy counts true values several times faster than torch sums them.
        rank[pairs] = torch.from_numpy(1 + np.count_nonzero(before, axis=1))
    ascending = (query * (len(audio) + 1) + rank).argsort()  # query by query
    return list(rank[ascending].split(counts.tolist()))


def query_metrics(ranks: Sequence[Tensor]) -> dict[str, Tensor]:
    """The metrics of each query by itself: {name: (Q,) float64}.

    Average precision at k is the sum, over the relevant candidates ranked within k, of (their place
    among the relevant) / rank, divided by the number of all relevant candidates, not by the smaller
    of it and k. R@k is 1 where any relevant candidate ranks within k.
    """
    never = torch.iinfo(torch.int64).max
    padded = pad_sequence(list(ranks), batch_first=True, padding_value=never)
    counts = torch.tensor([len(found) for found in ranks], dtype=torch.float64)
    precision = torch.arange(1, padded.shape[1] + 1, dtype=torch.float64) / padded
    values = {f"mAP@{k}": (precision * (padded <= k)).sum(dim=1) / counts for k in MAP_CUTOFFS}
    best = padded[:, 0]
    return values | {f"R@{k}": (best <= k).double() for k in RECALL_CUTOFFS}


def bootstrap(
    values: dict[str, Tensor], clip_of_query: Sequence[int], draws: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Each metric's mean in resamples of the clips, drawn with replacement: {name: (draws,)}.

    A clip's captions are drawn together, since they are not independent of each other. The same
    clip_of_query (Q,) and seed draw the same clips: the difference of two models' results is the
    paired bootstrap.
    """
    clips, clip = np.unique(np.asarray(clip_of_query), return_inverse=True)
    n = len(clips)
    # A resampled mean needs only how often each clip is drawn, and each clip's sums.
    drawn = np.random.default_rng(seed).integers(n, size=(draws, n))
    drawn += n * np.arange(draws)[:, None]
    times = np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n).astype(np.float64)
    queries = times @ np.bincount(clip, minlength=n)
    return {
        name: times @ np.bincount(clip, value.numpy(), minlength=n) / queries
        for name, value in values.items()
    }


def interval(means: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap means: their percentile interval."""
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return low, high
