"""Rankings and curves -> one HTML page to look at and listen to.

    python evaluate.py --split test --html page.html
    python -m dualenc.page curves runs/a runs/b --out curves.svg    # or .png

Shapes: N clips, Q queries, D embedding values.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dualenc import figures, run
from dualenc.audio import MAX_SEGMENTS, SEGMENT_SECONDS
from dualenc.document import Sounds, write_document
from dualenc.layouts import Split
from dualenc.metrics import METRICS, ranks
from dualenc.options import Parser

QUERIES_PER_GROUP = 20
TOP = 10  # clips shown of each query's ranking
SAMPLE_CLIPS = 40  # in the similarity matrices
SAMPLE_GROUPS = 6

Rows = dict[str, dict[str, float]]  # the table: {row: {column: fraction}}


def write_evaluation(
    path: Path,
    title: str,
    split: Split,
    audio: Tensor,
    text: Tensor,
    rows: Rows,
    intervals: dict[str, dict[str, tuple[float, float]]] | None = None,
    report: Rows | None = None,
    annotations: tuple[Sequence[int], Sequence[Sequence[int]]] | None = None,
    runs: Sequence[Path] = (),
) -> None:
    """Write the page of one checkpoint on one split.

    Args:
        path: where the page is to lie.
        title: what was evaluated on what.
        audio, text: (N, D) and (Q, D) embeddings of the split's clips and captions, unit norm.
        rows: the results; intervals: (low, high) of those that have one, alike.
        report: the report's rows, to compare with.
        annotations: rows of split.captions, and all clips relevant to each.
        runs: folders of the runs whose curves are shown.
    """
    queries = Queries(split, audio, text, annotations)
    sounds = Sounds(path)
    body = "\n".join([
        '<a class="skip" href="#listen">Skip to the queries</a>',
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{len(split.clips):,} clips; each of their {len(split.captions):,} '
        "captions is a query.</p>",
        "<h2>Results</h2>", _table(rows, intervals or {}, report or {}),
        "<h2>Learning curves</h2>", _curves(runs),
        "<h2>Where the right clip ranks</h2>", queries.figures(),
        "<h2>Similarities</h2>", _similarities(split, audio, text),
        '<h2 id="listen">Queries to listen to</h2>', queries.section(sounds),
    ])
    write_document(path, title, body, sounds)


def _table(rows: Rows, intervals: dict, report: Rows) -> str:
    """All rows in percent; a confidence interval stands below its figure."""
    columns = list(dict.fromkeys([*METRICS, *(name for row in report.values() for name in row)]))

    def line(kind: str, name: str, row: dict[str, float]) -> str:
        bounds = intervals.get(name, {})
        cells = [f"{100 * row[c]:.2f}" if c in row else "–" for c in columns]
        below = [
            f"<small>{100 * bounds[c][0]:.2f} to {100 * bounds[c][1]:.2f}</small>"
            if c in bounds else ""
            for c in columns
        ]
        cells = "".join(f"<td>{a}{b}</td>" for a, b in zip(cells, below, strict=True))
        return f'<tr class="{kind}"><th scope="row">{escape(name)}</th>{cells}</tr>'

    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    lines = [line("own", name, row) for name, row in rows.items()]
    lines += [line("report", f"report: {name}", row) for name, row in report.items()]
    note = "In percent" + ("; below a figure its 95 % confidence interval." if intervals else ".")
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Results">\n<table>\n'
        f"<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines)
        + f'</tbody>\n</table>\n</div>\n<p class="quiet">{note}</p>'
    )


def _figures(found: dict[str, str]) -> str:
    """{caption: <svg>} -> figures side by side, or one below the other on a phone."""
    parts = []
    for caption, svg in found.items():
        named = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
        parts.append(f"<figure>{named}<figcaption>{escape(caption)}</figcaption></figure>")
    return '<div class="figures">\n' + "\n".join(parts) + "\n</div>"


def runs_behind(checkpoint: Path) -> list[Path]:
    """The folders of the run that wrote a checkpoint and of its teachers, if their logs exist."""
    folder = checkpoint.parent
    if not (folder / "log.jsonl").is_file():
        return []
    teachers = figures.read_log(folder).settings.get("teachers", [])
    folders = dict.fromkeys([folder, *(Path(path).parent for path, _ in teachers)])
    return [folder for folder in folders if (folder / "log.jsonl").is_file()]


def _curves(runs: Sequence[Path]) -> str:
    if not runs:
        return "<p>There is no log.jsonl beside the checkpoint.</p>"
    logs = [figures.read_log(run) for run in runs]
    names = ", ".join(escape(log.name) for log in logs)
    return f'<p class="quiet">Runs: {names}</p>\n{_figures(figures.curves(logs))}'


def _similarities(split: Split, audio: Tensor, text: Tensor) -> str:
    """Cosines among a sample of clips, and between them and their first captions, grouped."""
    n = len(split.clips)
    sample = np.sort(np.random.default_rng(0).permutation(n)[:SAMPLE_CLIPS])
    first = np.searchsorted(split.clip_of_caption, sample)  # captions stand clip by clip
    sounds, captions = audio[sample].numpy(), text[first].numpy()
    groups = figures.group(sounds @ sounds.T, SAMPLE_GROUPS)
    draw = figures.similarity_matrix
    items = []
    for i, group in enumerate(groups):
        clips = [split.clips[sample[j]] for j in group]
        lines = "".join(
            f'<li>{escape(clip.name)} <span class="caption">{escape(clip.captions[0])}</span></li>'
            for clip in clips
        )
        items.append(f"<li>Group {figures.group_letter(i)}<ul>{lines}</ul></li>")
    return (
        f'<p class="quiet">{len(sample)} clips drawn at random, grouped by how alike they sound to '
        "the model. In the second matrix a bright diagonal means that captions find their own "
        "clips, a bright block that they find its like.</p>"
        + _figures({
            "Sounds with sounds": draw(sounds @ sounds.T, groups, ("clip", "clip"), "clips"),
            "Captions with sounds": draw(captions @ sounds.T, groups, ("caption", "clip"), "pairs"),
        })
        + f"<details><summary>The clips of each group</summary><ul>{''.join(items)}</ul></details>"
    )


class Queries:
    """Every caption of a split as a query: how its right clip ranks, and what ranks before it."""

    def __init__(self, split: Split, audio: Tensor, text: Tensor, annotations: tuple | None):
        self.split, self.audio, self.text = split, audio, text
        self.captions, self.clip = split.captions, split.clip_of_caption
        self.rank = torch.cat(ranks(text, audio, [[clip] for clip in self.clip])).numpy()
        self.relevant = dict(zip(*annotations, strict=True)) if annotations else {}

    def figures(self) -> str:
        n, share = len(self.audio), np.mean(self.rank <= TOP)
        median = np.median(self.rank)
        return _figures({
            f"Rank of the right clip among {n:,}; the median is {median:g}":
                figures.rank_histogram(self.rank, n),
            f"Recall: {100 * share:.1f} % of the right clips are among the first {TOP}":
                figures.recall_curve(self.rank, n),
        })

    def groups(self) -> dict[str, np.ndarray]:
        """The queries shown, by how well they were answered: {title: rows}."""
        own = (self.text * self.audio[self.clip]).sum(dim=1).numpy()
        order = np.lexsort((-own, self.rank))  # of equal ranks the higher cosine is the better
        count = min(QUERIES_PER_GROUP, len(order))
        middle = (len(order) - count) // 2
        return {
            "Best": order[:count],
            "Median": order[middle : middle + count],
            "Worst": order[::-1][:count],
            "Random": np.random.default_rng(0).permutation(len(order))[:count],
        }

    def section(self, sounds: Sounds) -> str:
        groups = self.groups()
        shown = sum(map(len, groups.values()))
        parts = [
            '<div class="filter"><label for="filter">Filter by word</label>'
            '<input id="filter" type="search" autocomplete="off">'
            f'<output id="shown" for="filter" aria-live="polite">{shown} of {shown} queries shown'
            "</output></div>"
        ]
        for title, rows in groups.items():
            cards = "\n".join(self._card(int(row), sounds) for row in rows)
            parts.append(f'<section class="group">\n<h3>{title}</h3>\n{cards}\n</section>')
        return "\n".join(parts)

    def _card(self, row: int, sounds: Sounds) -> str:
        right, rank = self.clip[row], int(self.rank[row])
        scores = self.audio @ self.text[row]
        first = scores.sort(descending=True, stable=True).indices[:TOP].tolist()
        ranked = list(enumerate(first, start=1))
        if right not in first:
            ranked.append((rank, right))
        items = "\n".join(
            self._clip(clip, place, float(scores[clip]), row, sounds) for place, clip in ranked
        )
        return (
            f'<details class="query"><summary>{escape(self.captions[row])} '
            f'<span class="rank">rank {rank:,}</span></summary>\n'
            f'<ol class="clips">\n{items}\n</ol></details>'
        )

    def _clip(self, clip: int, place: int, score: float, row: int, sounds: Sounds) -> str:
        found = self.split.clips[clip]
        mark = ""
        if clip == self.clip[row]:
            mark = "✓ the right clip"
        elif clip in self.relevant.get(row, ()):
            mark = "✓ relevant, too"
        seconds = MAX_SEGMENTS * SEGMENT_SECONDS  # what the model heard of it
        kind = ' class="relevant"' if mark else ""
        return (
            f'<li value="{place}"{kind}><span class="file">{escape(found.name)}</span> '
            f'<span class="mark">{mark}</span>\n'
            f"{sounds.player(found.path, f'rank {place}: {found.name}', seconds=seconds)}\n"
            f'<p class="caption">score {score:.3f}; {escape(found.captions[0])}</p></li>'
        )


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("what", choices=("curves",), help="the learning curves of runs")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--out", type=Path, default=Path("curves.svg"), metavar="FILE",
        help=".svg or .png (default curves.svg)",
    )
    args = parser.parse_args()
    figures.write_curves(args.runs, args.out)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
