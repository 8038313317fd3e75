"""Learning curves and evaluation results -> matplotlib figures, as SVG or PNG.

matplotlib is imported where a figure is made: it takes a second, and training should start before.
Shapes: N clips, Q queries, D embedding values.
"""

import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dualenc import InputError, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Readable on white and on black; on a page the ink becomes the colour of its text.
COLOURS = ("#3987c9", "#d9782d", "#449a52", "#b565a7", "#a18a2e", "#d0545a", "#35a0a0")
INK = "#63676b"
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "dualenc",  # text stays text; the same bytes every time
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "axes.facecolor": "none",
    "xtick.color": INK, "ytick.color": INK, "grid.color": INK, "grid.alpha": 0.25,
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": "medium", "axes.titlelocation": "left", "legend.frameon": False,
    "text.parse_math": False,  # a $ in a run's name is a $
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
PANEL = (4.4, 3.0)  # inches: as wide as a phone shows with text that can be read
RANK_BINS = (1, 2, 6, 11, 21, 51, 101, 201, 501, 1001, 2001, 5001)  # where each begins
LARGEST = 1e300  # of a log's numbers: what matplotlib can scale
RECALL_TICKS = (1, 5, 10, 50, 100, 500, 1000, 5000)


@contextlib.contextmanager
def _drawing(width: float, height: float) -> Iterator["Figure"]:
    """An empty figure (inches), drawn and to be saved in this style."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def _svg(figure: "Figure", prefix: str) -> str:
    """An <svg> element for a page; the prefix keeps its ids apart from other figures'."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=NO_METADATA)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", svg)


# --- Learning curves ---


@dataclasses.dataclass(frozen=True)
class Log:
    """What a run's log.jsonl says.

    Attributes:
        name: the run's folder.
        settings: its first line.
        steps: a dictionary per step interval: step, lr, loss.
        epochs: a dictionary per epoch: step, loss, validation.
    """

    name: str
    settings: dict
    steps: list[dict]
    epochs: list[dict]


def read_log(path: Path) -> Log:
    """A run's log, from its folder or the file itself.

    Raises:
        InputError: there is none, or a line of it is not of a log.
    """
    path = path / "log.jsonl" if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no log of a run can be read here ({error})") from error
    rows = []
    lines.pop()  # a line is complete with its newline: the last one may still be being written
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_checked(json.loads(line), is_first=number == 1))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is not of a run's log") from error
    if not rows:
        raise InputError(f"{path}: is empty; a run's log is needed")
    return Log(
        str(path.parent), rows[0],
        [row for row in rows[1:] if "lr" in row], [row for row in rows[1:] if "validation" in row],
    )


def _checked(row: dict, is_first: bool) -> dict:
    """A line of a log, whatever JSON it is.

    Raises:
        ValueError, KeyError, TypeError: it lacks what is read of it, or has it of another kind.
    """
    if is_first:
        right = isinstance(row, dict) and all(isinstance(t, str) for t in row.get("teachers", []))
    else:
        numbers = [row["step"], row["loss"], row.get("lr", 0)]
        numbers.append(row["validation"]["mAP@10"] if "validation" in row else 0)
        right = all(isinstance(n, int | float) and abs(n) < LARGEST for n in numbers)
    if not right:
        raise ValueError
    return row


CURVES = ("training loss", "learning rate", "validation mAP@10, %")


def _plot(axes: "Axes", log: Log, quantity: str, colour: str) -> None:
    steps, epochs = ([row["step"] for row in rows] for rows in (log.steps, log.epochs))
    if quantity == "learning rate":
        axes.plot(steps, [row["lr"] for row in log.steps], color=colour, label=log.name)
    elif quantity == "training loss":
        # The last interval of an epoch is short, and its last batch small: its loss is lower.
        axes.plot(steps, [row["loss"] for row in log.steps], color=colour, alpha=0.35, linewidth=1)
        means = [row["loss"] for row in log.epochs]
        axes.plot(epochs, means, color=colour, marker=".", label=log.name)
    else:
        values = [100 * row["validation"]["mAP@10"] for row in log.epochs]
        axes.plot(epochs, values, color=colour, marker=".", label=log.name)


def _panel(axes: "Axes", logs: Sequence[Log], quantity: str) -> None:
    for i, log in enumerate(logs):
        _plot(axes, log, quantity, COLOURS[i % len(COLOURS)])
    axes.set_xlabel("step")
    if quantity != "training loss":
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])


def curves(logs: Sequence[Log]) -> dict[str, str]:
    """Loss, learning rate and validation mAP@10 over the steps: {what it shows: an <svg>}."""
    found = {}
    for i, quantity in enumerate(CURVES):
        with _drawing(*PANEL) as figure:
            axes = figure.add_subplot()
            _panel(axes, logs, quantity)
            if len(logs) > 1:
                axes.legend(fontsize="small")
            found[quantity] = _svg(figure, f"curve{i}")
    return found


def write_curves(runs: Sequence[Path], out: Path) -> None:
    """Draw the curves of any runs into one file, SVG or PNG by its suffix.

    Raises:
        InputError: a run has no log, or the file cannot be written.
    """
    kind = out.suffix.lower()[1:]
    if kind not in ("svg", "png"):
        raise InputError(f"{out}: its name must end in .svg or .png")
    logs = [read_log(run) for run in runs]
    with _drawing(3 * PANEL[0], PANEL[1] + 0.25 * len(logs)) as figure, replacing(out) as temporary:
        for place, quantity in enumerate(CURVES, start=1):
            axes = figure.add_subplot(1, 3, place)
            axes.set_title(quantity)
            _panel(axes, logs, quantity)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left")
        metadata = NO_METADATA if kind == "svg" else None
        figure.savefig(temporary, format=kind, facecolor="white", dpi=150, metadata=metadata)


# --- Evaluation ---


def rank_histogram(ranks: np.ndarray, n_clips: int) -> str:
    """(Q,) rank of each query's right clip among n_clips, from 1: how many fall where."""
    edges = [edge for edge in RANK_BINS if edge <= n_clips] + [n_clips + 1]
    counts, _ = np.histogram(ranks, edges)
    labels = [
        f"{low}" if high == low + 1 else f"{low:,} to {high - 1:,}"
        for low, high in zip(edges, edges[1:], strict=False)
    ]
    with _drawing(*PANEL) as figure:
        axes = figure.add_subplot()
        bars = axes.barh(labels, 100 * counts / len(ranks), color=COLOURS[0])
        axes.bar_label(bars, [f"{count:,}" for count in counts], padding=3, fontsize="small")
        axes.margins(x=0.12)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="queries, %", ylabel="rank of the right clip")
        return _svg(figure, "ranks")


def recall_curve(ranks: np.ndarray, n_clips: int) -> str:
    """(Q,) ranks -> the share of queries whose right clip is within the first k, over all k."""
    k = np.arange(1, n_clips + 1)
    recall = np.searchsorted(np.sort(ranks), k, side="right") / len(ranks)
    with _drawing(*PANEL) as figure:
        axes = figure.add_subplot()
        axes.plot(k, 100 * recall, color=COLOURS[0], label="this model")
        axes.plot(k, 100 * k / n_clips, color=INK, linestyle="--", label="chance")
        axes.set(xscale="log", xlabel="k", ylabel="R@k, %", ylim=(0, 102))
        ticks = [k for k in RECALL_TICKS if k <= n_clips]
        axes.set_xticks(ticks, [f"{k:,}" for k in ticks])
        axes.set_xticks([], minor=True)
        axes.legend(loc="upper left")
        return _svg(figure, "recall")


def similarity_matrix(
    similarities: np.ndarray, groups: Sequence[Sequence[int]], labels: tuple[str, str], name: str
) -> str:
    """(n, n) cosines as colours, rows and columns in the order of the groups, named A, B, ..."""
    order = [i for group in groups for i in group]
    ends = np.cumsum([len(group) for group in groups])
    centres = ends - np.array([len(group) for group in groups]) / 2 - 0.5
    letters = [group_letter(i) for i in range(len(groups))]
    with _drawing(PANEL[0], PANEL[0] - 0.6) as figure:
        axes = figure.add_subplot()
        image = axes.imshow(similarities[np.ix_(order, order)], cmap="viridis")
        for end in ends[:-1] - 0.5:
            axes.axhline(end, color="white", linewidth=0.8)
            axes.axvline(end, color="white", linewidth=0.8)
        axes.grid(visible=False)
        axes.set_xticks(centres, letters)
        axes.set_yticks(centres, letters)
        axes.tick_params(length=0)
        axes.set(ylabel=labels[0], xlabel=labels[1])
        figure.colorbar(image, label="cosine", format="{x:.2f}").outline.set_visible(False)
        return _svg(figure, name)


def group_letter(i: int) -> str:
    return chr(ord("A") + i)


def group(similarities: np.ndarray, count: int) -> list[list[int]]:
    """(n, n) symmetric -> n rows in so many groups, by merging what is most alike on average."""
    groups = [[i] for i in range(len(similarities))]
    while len(groups) > count:
        means = np.array([
            [similarities[np.ix_(a, b)].mean() if a is not b else -np.inf for b in groups]
            for a in groups
        ])
        first, second = sorted(np.unravel_index(means.argmax(), means.shape))
        groups[first] += groups.pop(second)
    return sorted(groups, key=len, reverse=True)
