"""Embeddings and relevance -> mAP@k and R@k (report, section 6 and Table 1).

Q queries; N candidates; D embedding values; T targets, the relevant candidates of all queries, one
query after the other; R, the largest number of relevant candidates of any query; C clips from which
a bootstrap draws. Metrics are fractions from 0 to 1.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dualenc.errors import InputError

MAP_CUTOFFS = (10, 16)
RECALL_CUTOFFS = (1, 5, 10)
METRICS = ("mAP@10", "mAP@16", "R@1", "R@5", "R@10")
BLOCK_BYTES = 16 * 2**20  # memory for similarities
RESAMPLES = 1000  # draws of the clips in a bootstrap
INTERVAL_PERCENTILES = (2.5, 97.5)  # the middle 95 %


def retrieval_metrics(
    text: Tensor, audio: Tensor, relevant: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Return {"mAP@10", "mAP@16", "R@1", "R@5", "R@10"}, each the mean over all queries.

    Args:
        text: the queries' embeddings (Q, D), of unit norm.
        audio: the candidates' embeddings (N, D), of unit norm.
        relevant: for each query the indices of all candidates that are relevant to it, at least
            one.

    Raises InputError as ranks() does.
    """
    values = query_metrics(ranks(text, audio, relevant))
    return {name: value.mean().item() for name, value in values.items()}


def ranks(text: Tensor, audio: Tensor, relevant: Sequence[Sequence[int]]) -> list[Tensor]:
    """Rank all candidates (N, D) for each query (Q, D); return the ranks of its relevant ones.

    The ranks of a query's relevant candidates count from 1 and ascend. Candidates are ranked by
    cosine; where cosines are equal, the lower index ranks first.

    Raises InputError where a query has no relevant candidate, or has one twice, and where an
    embedding is not finite: no similarity is greater than NaN, so a relevant candidate whose
    similarity is NaN would always rank first.
    """
    for candidates in relevant:
        if len(candidates) == 0 or len(set(candidates)) < len(candidates):
            raise InputError("relevant: each query needs one candidate or more, and none twice")
    text = text.float()
    audio = audio.float()
    if not (text.isfinite().all() and audio.isfinite().all()):
        raise InputError("embeddings are not finite numbers: the model has diverged or is damaged")

    targets_per_query = [len(candidates) for candidates in relevant]
    query = torch.arange(len(relevant)).repeat_interleave(torch.tensor(targets_per_query))  # (T,)
    target = torch.tensor(list(itertools.chain.from_iterable(relevant)))  # (T,)
    candidate = torch.arange(len(audio))  # (N,)
    rank = torch.empty_like(query)  # (T,)

    # The (T, N) matrix of all similarities is never held whole. Its blocks share their memory:
    # new memory for each block would take 10 % more time.
    rows_per_block = max(1, BLOCK_BYTES // (4 * len(audio)))
    block = torch.empty(rows_per_block, len(audio))
    for rows in torch.arange(len(target)).split(rows_per_block):
        similarity = torch.mm(text[query[rows]], audio.T, out=block[: len(rows)])  # (rows, N)
        target_similarity = similarity.gather(1, target[rows, None])  # (rows, 1)
        is_before = similarity > target_similarity
        is_tie = similarity == target_similarity
        is_before |= is_tie & (candidate < target[rows, None])
        # NumPy counts true values several times faster than torch sums them.
        rank[rows] = 1 + torch.from_numpy(np.count_nonzero(is_before.numpy(), axis=1))
    ascending = np.lexsort((rank, query))  # by query, and for each query by rank
    return list(rank[ascending].split(targets_per_query))


def query_metrics(relevant_ranks: Sequence[Tensor]) -> dict[str, Tensor]:
    """Compute the metrics of each query by itself: {name: (Q,) float64}.

    `relevant_ranks` is what ranks() returns: for each query the ranks of all its relevant
    candidates, ascending from 1.

    For average precision at k (AP@k), each relevant candidate that ranks within k gives (its rank
    among the relevant) / (its rank). AP@k is the sum of these, divided by the number of all
    relevant candidates, not by the smaller of that number and k. Its mean over all queries is
    mAP@k. R@k is 1 where any relevant candidate ranks within k.

    An example: three candidates are relevant, and they rank 1st, 3rd and 12th.

        AP@10 = (1/1 + 2/3) / 3        = 0.556
        AP@16 = (1/1 + 2/3 + 3/12) / 3 = 0.639
        R@1 = R@5 = R@10               = 1
    """
    # Padding has a rank beyond every cutoff.
    padding = torch.iinfo(torch.int64).max
    rank = pad_sequence(
        list(relevant_ranks), batch_first=True, padding_value=padding
    )  # (Q, R)
    rank_among_relevant = torch.arange(1, rank.shape[1] + 1, dtype=torch.float64)  # (R,)
    precision = rank_among_relevant / rank  # (Q, R)
    counts = [len(ranks_of_query) for ranks_of_query in relevant_ranks]
    relevant_count = torch.tensor(counts)  # (Q,)

    values = {}
    for k in MAP_CUTOFFS:
        precision_within = torch.where(rank <= k, precision, 0.0)
        values[f"mAP@{k}"] = precision_within.sum(dim=1) / relevant_count
    best_rank = rank[:, 0]
    for k in RECALL_CUTOFFS:
        values[f"R@{k}"] = (best_rank <= k).double()
    return values


def bootstrap(
    values: dict[str, Tensor], clip_of_query: Sequence[int], draws: int = RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return each metric's means in resamples of the clips: {name: (draws,)}.

    `values` holds the metrics of each query, {name: (Q,)}. The clips of a resample are drawn with
    replacement, each with all of its queries, since these are not independent of each other. The
    same clip_of_query (Q,) and seed draw the same clips, so two models' means may be subtracted
    draw by draw (the paired bootstrap).
    """
    # clips (C,) are those that have queries; clip_index (Q,) is each query's row among them.
    clips, clip_index = np.unique(clip_of_query, return_inverse=True)
    drawn = np.random.default_rng(seed).integers(len(clips), size=(draws, len(clips)))

    # A resample's mean needs only how often each clip was drawn, and each clip's sum of values.
    counts = [np.bincount(clips_drawn, minlength=len(clips)) for clips_drawn in drawn]
    times_drawn = np.array(counts, dtype=np.float64)  # (draws, C)
    queries_drawn = times_drawn @ np.bincount(clip_index)  # (draws,)
    means = {}
    for name, value in values.items():
        sum_of_clip = np.bincount(clip_index, weights=value.numpy())  # (C,)
        means[name] = times_drawn @ sum_of_clip / queries_drawn
    return means


def interval(means: np.ndarray) -> tuple[float, float]:
    """Return the bounds of the middle 95 % of a bootstrap's means: the percentile interval."""
    low, high = np.percentile(means, INTERVAL_PERCENTILES)
    return float(low), float(high)
