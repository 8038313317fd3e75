"""Figures -> text to read and numbers for JSON: of one model, of two, of runs; and Table 1.

A line is (label, {column: cell}); a label without cells is a heading.
"""

from collections.abc import Sequence

from dualenc.evaluation import NEW_ANNOTATIONS, TEXT_TO_AUDIO, Evaluation, difference, spread
from dualenc.layouts import CLOTHO_TEST_CLIPS, Split
from dualenc.metrics import METRICS

Line = tuple[str, dict[str, str]]


def table(lines: Sequence[Line], columns: Sequence[str] = METRICS) -> str:
    """Lines under one another, cells right-aligned; what a line lacks is a dash, if it has any."""
    label_width = max(len(label) for label, _ in lines)
    width = 2 + max(len(cell) for cell in [*columns, *(c for _, x in lines for c in x.values())])
    text = [" " * label_width + "".join(f"{column:>{width}}" for column in columns)]
    for label, cells in lines:
        row = "".join(f"{cells.get(column, '-'):>{width}}" for column in columns) if cells else ""
        text.append(f"{label:{label_width}}{row}".rstrip())
    return "\n".join(text)


def percent(values: dict[str, float], sign: str = "") -> dict[str, str]:
    return {metric: f"{100 * value:{sign}.2f}" for metric, value in values.items()}


def spans(intervals: dict[str, tuple[float, float]], sign: str = "") -> dict[str, str]:
    return {
        metric: f"{100 * low:{sign}.2f}..{100 * high:{sign}.2f}"
        for metric, (low, high) in intervals.items()
    }


def coverage(split: Split) -> str:
    """How many of a split's clips were found; empty where it is all of them."""
    if not split.missing:
        return ""
    found, total = len(split.clips), len(split.clips) + len(split.missing)
    whose = "the report" if split.name.startswith("clotho/") else "published figures"
    return f"{found:,} of {total:,} clips found: not comparable with {whose}"


def of_one(evaluation: Evaluation) -> tuple[str, dict]:
    """One model: every figure, its interval, and how many queries it is the mean of."""
    lines: list[Line] = []
    for name, values in evaluation.results.items():
        lines.append((name + seen_mark(evaluation), percent(values)))
        queries = len(evaluation.rows[name].ranks)
        label = f"  95 % interval, {queries:,} queries"
        lines.append((label, spans(evaluation.intervals[name])))
    return table(lines), plain(evaluation)


def of_comparison(first: Evaluation, second: Evaluation) -> tuple[str, dict]:
    """Two models, and by how much the second leads."""
    found = difference(first, second)
    lines: list[Line] = []
    for name, metrics in found.items():
        lines.append((name, {}))
        for each in (first, second):
            lines.append((f"  {each.name}{seen_mark(each)}", percent(each.results[name])))
            lines.append(("    95 % interval", spans(each.intervals[name])))
        lines += [
            ("  second - first", percent({m: d.mean for m, d in metrics.items()}, "+")),
            ("    95 % interval", spans({m: d.interval for m, d in metrics.items()}, "+")),
            ("    above zero in", {m: f"{100 * d.above_zero:.1f} %" for m, d in metrics.items()}),
        ]
    numbers = {
        name: {metric: d._asdict() for metric, d in metrics.items()}
        for name, metrics in found.items()
    }
    return table(lines), {"models": [plain(first), plain(second)], "difference": numbers}


def of_runs(runs: Sequence[Evaluation]) -> tuple[str, dict]:
    """Several runs, their mean and standard deviation."""
    means, deviations = spread(runs)
    lines: list[Line] = []
    for name in means:
        lines.append((name, {}))
        for each in runs:
            lines.append((f"  {each.name}{seen_mark(each)}", percent(each.results[name])))
            lines.append(("    95 % interval", spans(each.intervals[name])))
        lines.append((f"  mean of {len(runs)} runs", percent(means[name])))
        lines.append(("  standard deviation", percent(deviations[name])))
    models = [plain(each) for each in runs]
    return table(lines), {"models": models, "mean": means, "standard deviation": deviations}


def plain(evaluation: Evaluation) -> dict:
    """The numbers of one model, for JSON."""
    names = ("name", "seen", "results", "intervals")
    queries = {name: len(row.ranks) for name, row in evaluation.rows.items()}
    return {name: getattr(evaluation, name) for name in names} | {"queries": queries}


def seen_mark(evaluation: Evaluation) -> str:
    return " (seen)" if evaluation.seen else ""


# --- The report's Table 1 ---

# Percent: new annotations mAP; mAP@10, R@1, R@5, R@10 with one relevant clip. The official baseline
# published row 1's first figure as mAP@10, row 3's as mAP@16.
REPORT_TABLE = {
    "Clotho, contrastive": ("new mAP@10", 31.95, 27.57, 16.95, 42.73, 58.04),
    "Clotho, distilled": ("new mAP@10", 32.54, 28.20, 16.44, 43.89, 58.89),
    "Clotho + AudioCaps, contrastive": ("new mAP@16", 35.21, 30.97, 19.56, 46.45, 59.48),
    "Clotho + AudioCaps, distilled": ("new mAP@10", 37.21, 32.75, 19.80, 47.45, 60.48),
}
REPORT_METRICS = ("mAP@10", "R@1", "R@5", "R@10")
REPORT_COLUMNS = ("new mAP@10", "new mAP@16", *REPORT_METRICS)
REPORT_FOOTNOTE = (
    "new: by the new annotations. The report calls that column mAP@10 in every row, but row 3 has\n"
    "the official baseline's mAP@16 (row 1 its mAP@10); which rows 2 and 4 have is not said."
)


def is_reports_split(split: Split) -> bool:
    """Whether figures on it may stand beside the report's: all of Clotho v2.1's test split."""
    whole = len(split.clips) == CLOTHO_TEST_CLIPS and not split.missing
    return split.name == "clotho/evaluation" and whole


def report_lines(evaluations: Sequence[Evaluation]) -> list[Line]:
    """The report's four rows and, above them, ours with their intervals."""
    lines: list[Line] = []
    for each in evaluations:
        values, intervals = (_reports_columns(x) for x in (each.results, each.intervals))
        lines.append((each.name + seen_mark(each), percent(values)))
        lines.append(("  95 % interval", spans(intervals)))
    for name, (column, *figures) in REPORT_TABLE.items():
        cells = {column: f"{figures[0]:.2f}"}
        cells |= {m: f"{v:.2f}" for m, v in zip(REPORT_METRICS, figures[1:], strict=True)}
        lines.append((f"report: {name}", cells))
    return lines


def _reports_columns(rows: dict[str, dict]) -> dict:
    """Of the results or intervals of all rows those that the report has, by its columns."""
    new = rows.get(NEW_ANNOTATIONS, {})
    columns = {metric: rows[TEXT_TO_AUDIO][metric] for metric in REPORT_METRICS}
    return columns | {f"new {metric}": new[metric] for metric in ("mAP@10", "mAP@16") if new}


def report_table(evaluations: Sequence[Evaluation]) -> str:
    return f"{table(report_lines(evaluations), REPORT_COLUMNS)}\n{REPORT_FOOTNOTE}"
