"""Embeddings of a split -> figures with their intervals, and comparisons between models.

It computes; tables.py formats, and evaluate.py decides what is asked and prints.

Shapes: N clips and Q captions of a split, D embedding values (of all members of an ensemble).
"""

import ast
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualenc import InputError
from dualenc.csvfiles import read_csv
from dualenc.layouts import Split
from dualenc.metrics import METRICS, bootstrap, interval, query_metrics, ranks

TEXT_TO_AUDIO, AUDIO_TO_TEXT = "text to audio", "audio to text"
NEW_ANNOTATIONS = "text to audio, new annotations"
Figures = dict[str, dict[str, float]]  # {row: {metric: value}}


# --- Relevance ---


class Annotations(NamedTuple):
    """The new annotations: rows of a split's captions, and for each all clips relevant to it."""

    queries: list[int]
    relevant: list[list[int]]


def read_annotations(path: Path, split: Split) -> Annotations:
    """Read a csv with the columns query and audio_filenames (a Python list of names).

    Where clips of the split are not on disk, they are left out here, too, and so are their queries.

    Raises:
        InputError: a query or a file name is not the split's, or a list is not one.
    """
    rows_of: dict[str, int] = {}
    for row, caption in enumerate(split.captions):
        rows_of.setdefault(caption, row)
    clip_of = {clip.name: i for i, clip in enumerate(split.clips)}
    known = clip_of.keys() | set(split.missing)
    found, faults = Annotations([], []), []
    for query, names in read_csv(path, ["query", "audio_filenames"]):
        files = _parse_list(names)
        unknown = [name for name in files or () if name not in known]
        if files is None:
            faults.append(f"query {query!r}: {names!r} is not a list of file names")
        elif unknown:
            faults.append(f"query {query!r}: {unknown[0]!r} is no clip of {split.name}")
        elif query not in rows_of and not split.missing:
            faults.append(f"query {query!r} is no caption of {split.name}")
        elif query in rows_of and (clips := {clip_of[name] for name in files if name in clip_of}):
            found.queries.append(rows_of[query])
            found.relevant.append(sorted(clips))
    if faults:
        raise InputError.of(str(path), faults)
    if not found.queries:
        raise InputError(f"{path}: no query of it is a caption of a clip on disk")
    return found


def _parse_list(text: str) -> list[str] | None:
    """A Python list literal of strings, never evaluated; None where it is something else."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    right = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
    return value if right else None


# --- Figures of one model ---


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table, query by query.

    Attributes:
        ranks: of each query, the ranks of its relevant candidates, ascending from 1.
        clip_of_query: the clip that each query is resampled with.
    """

    ranks: list[Tensor]
    clip_of_query: list[int]

    @functools.cached_property
    def values(self) -> dict[str, Tensor]:
        """Each query's metrics: {metric: (number of queries,)}."""
        return query_metrics(self.ranks)

    @functools.cached_property
    def means(self) -> dict[str, float]:
        return {metric: value.mean().item() for metric, value in self.values.items()}

    @functools.cached_property
    def draws(self) -> dict[str, np.ndarray]:
        """The means in 1,000 resamples of the clips; two models' are paired."""
        return bootstrap(self.values, self.clip_of_query)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One model, or an ensemble, on one split.

    Attributes:
        name: its checkpoint's path, or several.
        audio, text: (N, D) and (Q, D), in the order of split.clips and split.captions.
        annotations: the new ones, where there are any.
        seen: whether the split was trained on.
        rows: {"text to audio": Row, ...}
    """

    name: str
    split: Split
    audio: Tensor
    text: Tensor
    annotations: Annotations | None
    seen: bool
    rows: dict[str, Row]

    @functools.cached_property
    def results(self) -> Figures:
        return {name: row.means for name, row in self.rows.items()}

    @functools.cached_property
    def intervals(self) -> dict[str, dict[str, tuple[float, float]]]:
        """The 95 % confidence interval of each of results."""
        return {
            name: {metric: interval(means) for metric, means in row.draws.items()}
            for name, row in self.rows.items()
        }


def joined(members: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(audio, text) of each member of an ensemble -> of the whole, of unit norm again.

    Embeddings side by side, divided by the root of their number, have the mean of the members'
    similarities as their product. Widths may differ.
    """
    audio, text = (torch.cat(side, dim=1) for side in zip(*members, strict=True))
    return audio / len(members) ** 0.5, text / len(members) ** 0.5


def evaluate(
    name: str,
    split: Split,
    audio: Tensor,
    text: Tensor,
    annotations: Annotations | None = None,
    seen: bool = False,
) -> Evaluation:
    """Rank in both directions, and by the new annotations where there are any."""
    captions_of_clip = [[] for _ in split.clips]
    for caption, clip in enumerate(split.clip_of_caption):
        captions_of_clip[clip].append(caption)
    own_clip = [[clip] for clip in split.clip_of_caption]
    rows = {
        TEXT_TO_AUDIO: Row(ranks(text, audio, own_clip), split.clip_of_caption),
        AUDIO_TO_TEXT: Row(ranks(audio, text, captions_of_clip), list(range(len(audio)))),
    }
    if annotations is not None:
        queries, relevant = annotations
        clips = [split.clip_of_caption[query] for query in queries]
        rows[NEW_ANNOTATIONS] = Row(ranks(text[queries], audio, relevant), clips)
    return Evaluation(name, split, audio, text, annotations, seen, rows)


# --- Several models ---


class Difference(NamedTuple):
    """Of a metric's means: second minus first, its interval, and how often it is above zero."""

    mean: float
    interval: tuple[float, float]
    above_zero: float


def difference(first: Evaluation, second: Evaluation) -> dict[str, dict[str, Difference]]:
    """The paired bootstrap over the same queries: {row: {metric: Difference}}."""
    found = {}
    for name, row in first.rows.items():
        other = second.rows[name]
        draws = {metric: other.draws[metric] - row.draws[metric] for metric in METRICS}
        found[name] = {
            metric: Difference(
                other.means[metric] - row.means[metric],
                interval(draws[metric]),
                float((draws[metric] > 0).mean()),
            )
            for metric in METRICS
        }
    return found


def spread(runs: Sequence[Evaluation]) -> tuple[Figures, Figures]:
    """Mean, and standard deviation (of the sample, n - 1), of each metric over runs."""
    means, deviations = {}, {}
    for name in runs[0].rows:
        values = {metric: [run.results[name][metric] for run in runs] for metric in METRICS}
        means[name] = {metric: float(np.mean(v)) for metric, v in values.items()}
        deviations[name] = {metric: float(np.std(v, ddof=1)) for metric, v in values.items()}
    return means, deviations
