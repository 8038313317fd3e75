"""Rankings and curves -> one HTML page to look at and listen to.

    python evaluate.py --split test --html page.html
    python -m dualenc.page curves runs/a runs/b --out curves.svg    # or .png
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch

from dualenc import figures, run
from dualenc.audio import MAX_SEGMENTS, SEGMENT_SECONDS
from dualenc.document import Players, write_document
from dualenc.evaluation import TEXT_TO_AUDIO, Evaluation
from dualenc.metrics import METRICS
from dualenc.options import Parser
from dualenc.tables import (
    REPORT_COLUMNS,
    REPORT_FOOTNOTE,
    Line,
    coverage,
    is_reports_split,
    percent,
    report_lines,
    seen_mark,
    spans,
)

QUERIES_PER_GROUP = 20
TOP = 10  # clips shown of each query's ranking
SAMPLE_CLIPS = 40  # in the similarity matrices
SAMPLE_GROUPS = 6


def write_evaluation(path: Path, evaluation: Evaluation, runs: Sequence[Path] = ()) -> None:
    """Write the page of one model on one split.

    Args:
        path: where the page is to lie.
        runs: folders of the runs whose learning curves are shown.
    """
    split, players = evaluation.split, Players(path)
    queries = Queries(evaluation)
    title = f"{evaluation.name}{seen_mark(evaluation)} on {split.name}"
    body = "\n".join([
        '<a class="skip" href="#listen">Skip to the queries</a>',
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{len(split.clips):,} clips; each of their {len(split.captions):,} '
        f"captions is a query. {coverage(split)}</p>",
        "<h2>Results</h2>", _results(evaluation),
        "<h2>Learning curves</h2>", _curves(runs),
        "<h2>Where the right clip ranks</h2>", queries.figures(),
        "<h2>Similarities</h2>", _similarities(evaluation),
        '<h2 id="listen">Queries to listen to</h2>', queries.section(players),
    ])
    write_document(path, title, body, players)


def _results(evaluation: Evaluation) -> str:
    """Every figure above its interval; on the report's own split, its table, too."""
    parts = []
    for name, values in evaluation.results.items():
        below = spans(evaluation.intervals[name])
        cells = {m: f"{v}<small>{below[m]}</small>" for m, v in percent(values).items()}
        parts.append((name, cells))
    found = _table("In percent, with 95 % confidence intervals", parts, METRICS)
    if is_reports_split(evaluation.split):
        lines = report_lines([evaluation])
        found += _table("Beside the report's Table 1", lines, REPORT_COLUMNS)
        found += f'<p class="quiet">{escape(REPORT_FOOTNOTE)}</p>'
    return found


def _table(title: str, lines: Sequence[Line], columns: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(f"<td>{cells.get(column, '–')}</td>" for column in columns) + "</tr>"
        for label, cells in lines
    )
    return (
        f"<h3>{escape(title)}</h3>\n"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">\n'
        f"<table>\n<thead><tr><td></td>{head}</tr></thead>\n"
        f'<tbody>\n{rows}\n</tbody>\n</table>\n</div>\n'
    )


def _figures(found: dict[str, str]) -> str:
    """{caption: <svg>} -> figures side by side, or one below the other on a phone."""
    parts = []
    for caption, svg in found.items():
        named = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
        parts.append(f"<figure>{named}<figcaption>{escape(caption)}</figcaption></figure>")
    return '<div class="figures">\n' + "\n".join(parts) + "\n</div>"


def runs_behind(checkpoints: Sequence[Path]) -> list[Path]:
    """The folders of the runs that wrote them, and of these runs' teachers, if logs are there."""
    folders: dict[Path, None] = {}
    for folder in (checkpoint.parent for checkpoint in checkpoints):
        if _has_log(folder):
            teachers = figures.read_log(folder).settings.get("teachers", [])
            folders |= dict.fromkeys([folder, *(Path(teacher).parent for teacher in teachers)])
    return list(filter(_has_log, folders))


def _has_log(folder: Path) -> bool:
    return (folder / "log.jsonl").is_file()


def _curves(runs: Sequence[Path]) -> str:
    if not runs:
        return "<p>There is no log.jsonl beside the checkpoint.</p>"
    logs = [figures.read_log(run) for run in runs]
    names = ", ".join(escape(log.name) for log in logs)
    return f'<p class="quiet">Runs: {names}</p>\n{_figures(figures.curves(logs))}'


def _similarities(evaluation: Evaluation) -> str:
    """Cosines among a sample of clips, and between them and their first captions, grouped."""
    split = evaluation.split
    sample = np.sort(np.random.default_rng(0).permutation(len(split.clips))[:SAMPLE_CLIPS])
    first = np.searchsorted(split.clip_of_caption, sample)  # captions stand clip by clip
    sounds, captions = evaluation.audio[sample].numpy(), evaluation.text[first].numpy()
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

    def __init__(self, evaluation: Evaluation):
        self.split, self.audio, self.text = evaluation.split, evaluation.audio, evaluation.text
        self.captions, self.clip = self.split.captions, self.split.clip_of_caption
        self.rank = torch.cat(evaluation.rows[TEXT_TO_AUDIO].ranks).numpy()
        annotations = evaluation.annotations
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

    def section(self, players: Players) -> str:
        groups = self.groups()
        shown = sum(map(len, groups.values()))
        parts = [
            '<div class="filter"><label for="filter">Filter by word</label>'
            '<input id="filter" type="search" autocomplete="off">'
            f'<output id="shown" for="filter" aria-live="polite">{shown} of {shown} queries shown'
            "</output></div>"
        ]
        for title, rows in groups.items():
            cards = "\n".join(self._card(int(row), players) for row in rows)
            parts.append(f'<section class="group">\n<h3>{title}</h3>\n{cards}\n</section>')
        return "\n".join(parts)

    def _card(self, row: int, players: Players) -> str:
        right, rank = self.clip[row], int(self.rank[row])
        scores = self.audio @ self.text[row]
        first = scores.sort(descending=True, stable=True).indices[:TOP].tolist()
        ranked = list(enumerate(first, start=1))
        if right not in first:
            ranked.append((rank, right))
        items = "\n".join(
            self._clip(clip, place, float(scores[clip]), row, players) for place, clip in ranked
        )
        return (
            f'<details class="query"><summary>{escape(self.captions[row])} '
            f'<span class="rank">rank {rank:,}</span></summary>\n'
            f'<ol class="clips">\n{items}\n</ol></details>'
        )

    def _clip(self, clip: int, place: int, score: float, row: int, players: Players) -> str:
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
            f"{players.player(found.path, f'rank {place}: {found.name}', seconds=seconds)}\n"
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
