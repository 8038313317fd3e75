"""Embeddings and relevance -> mAP@k and R@k (report, section 6 and Table 1).

Knows only arrays. Q queries, N candidates, D embedding values, P = all (query, relevant candidate)
pairs. Metrics are fractions from 0 to 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dualenc import InputError

MAP_CUTOFFS = (10, 16)
RECALL_CUTOFFS = (1, 5, 10)
METRICS = tuple(f"mAP@{k}" for k in MAP_CUTOFFS) + tuple(f"R@{k}" for k in RECALL_CUTOFFS)
BLOCK_BYTES = 64 * 2**20  # of similarities at a time; the whole matrix is never held


def retrieval_metrics(
    text: Tensor, audio: Tensor, relevant: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Rank all candidates for every query by cosine and average the metrics over the queries.

    Args:
        text: (Q, D) query embeddings of unit norm.
        audio: (N, D) candidate embeddings of unit norm.
        relevant: for each query, the indices of all its relevant candidates, at least one.

    Returns:
        {"mAP@10", "mAP@16", "R@1", "R@5", "R@10"}
    """
    values = query_metrics(ranks(text, audio, relevant))
    return {name: value.mean().item() for name, value in values.items()}


def ranks(text: Tensor, audio: Tensor, relevant: Sequence[Sequence[int]]) -> list[Tensor]:
    """For each query the ranks (from 1, ascending) of its relevant candidates.

    Of equal similarities the candidate with the lower index ranks first.

    Raises:
        InputError: an embedding is not finite; as nothing is above NaN, it would always rank first.
    """
    text, audio = text.float(), audio.float()
    if not (text.isfinite().all() and audio.isfinite().all()):
        raise InputError("embeddings are not finite numbers: the model has diverged or is damaged")
    if not all(len(set(found)) == len(found) > 0 for found in relevant):
        raise ValueError("every query needs at least one relevant candidate, each once")
    counts = torch.tensor([len(found) for found in relevant])
    query = torch.repeat_interleave(torch.arange(len(counts)), counts)  # (P,)
    candidate = torch.tensor([index for found in relevant for index in found])  # (P,)
    rows = max(1, BLOCK_BYTES // (4 * len(audio)))
    found = torch.cat(
        [
            _ranks_of_pairs(text[q], audio, c)
            for q, c in zip(query.split(rows), candidate.split(rows), strict=True)
        ]
    )
    return [part.sort().values for part in found.split(counts.tolist())]


def _ranks_of_pairs(text: Tensor, audio: Tensor, candidate: Tensor) -> Tensor:
    similarity = text @ audio.T  # (rows, N)
    own = similarity.gather(1, candidate[:, None])
    before = torch.arange(len(audio)) < candidate[:, None]
    return 1 + ((similarity > own) | ((similarity == own) & before)).sum(dim=1)


def query_metrics(ranks: Sequence[Tensor]) -> dict[str, Tensor]:
    """The metrics of each query by itself: {name: (Q,) float64}.

    Average precision at k is the sum, over the relevant candidates ranked within k, of (their place
    among the relevant) / rank, divided by the number of all relevant candidates, not by the smaller
    of it and k. R@k is 1 where any relevant candidate ranks within k.
    """
    width = max(map(len, ranks))
    padded = torch.full((len(ranks), width), torch.iinfo(torch.int64).max)
    for row, found in zip(padded, ranks, strict=True):
        row[: len(found)] = found
    counts = torch.tensor([len(found) for found in ranks], dtype=torch.float64)
    precision = torch.arange(1, width + 1, dtype=torch.float64) / padded
    values = {f"mAP@{k}": (precision * (padded <= k)).sum(dim=1) / counts for k in MAP_CUTOFFS}
    best = padded[:, 0]
    return values | {f"R@{k}": (best <= k).double() for k in RECALL_CUTOFFS}
