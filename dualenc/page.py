"""Pages and pictures: an evaluation to look at and listen to, learning curves, a search page.

A page is one file that holds its style, script, pictures and sounds, and needs no network. Whatever
comes from outside (captions, names, paths) is escaped. matplotlib takes a second to import, so it
is imported where a picture is drawn.

N clips    Q captions, each of them a query    D embedding values
"""

import base64
import contextlib
import functools
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, quote, urlsplit

import numpy as np
from torch import Tensor
from tqdm import tqdm

from dualenc.decoding import encode_mp3, load_audio, load_excerpt
from dualenc.errors import InputError, counted, printable, replacing
from dualenc.metrics import ranks

QUERIES_PER_GROUP = 20
CLIPS_PER_QUERY = 10  # the first clips of a query's ranking are shown
LISTEN_SECONDS = 30  # the part of a clip that is embedded, and can be listened to
PAGE_MP3_BYTES = 25 * 2**20  # mp3 that one page holds; base64 makes it a third larger
RIGHT = "✓ the right clip"
RELEVANT = "✓ relevant, too"


# --- A document ---

def document(title: str, body: str, script: str = "") -> str:
    """Return a whole HTML document with page.css; body and script are HTML."""
    style = Path(__file__).with_suffix(".css").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>\n{style}</style>\n"
        f"<main>\n{body}\n</main>\n"
        f"{script}"
    )


def player(label: str, source: str) -> str:
    """Return an <audio> element, which loads enough of its sound to show its length.

    Args:
        label: what a screen reader calls the player.
        source: the attribute that names the sound: src="ADDRESS", or what Sounds.source returns,
            which page.js turns into a src when the query is opened.
    """
    return f'<audio controls preload="metadata" aria-label="{escape(label)}" {source}></audio>\n'


def clock(seconds: float) -> str:
    """Write seconds as 0:20 or 1:02:20, with a tenth where one is left: 0:07.3."""
    minutes, tenths = divmod(round(10 * seconds), 600)
    hours, minutes = divmod(minutes, 60)
    text = f"{minutes}"
    if hours > 0:
        text = f"{hours}:{minutes:02}"
    return f"{text}:{tenths / 10:04.1f}".removesuffix(".0")


# --- An evaluation ---

@dataclass
class Evaluation:
    """One model on one split, as its page shows it."""

    title: str
    notes: Sequence[str]  # lines below the title
    columns: Sequence[str]  # headings of the table
    # (label, cells) of each line; a line whose label is indented belongs to the one above.
    lines: Sequence[tuple[str, Sequence[str]]]
    run_folders: Sequence[Path]  # their learning curves are drawn if they hold a log
    clip_names: Sequence[str]  # (N,)
    clip_paths: Sequence[Path]  # (N,)
    captions: Sequence[str]  # (Q,)
    clip_of_caption: Sequence[int]  # (Q,)
    text: Tensor  # (Q, D) unit norm
    audio: Tensor  # (N, D) unit norm
    annotations: dict[int, Sequence[int]]  # DCASE 2025's: {caption: all its relevant clips}
    # What was evaluated and how, shown as a list in this order: {"checkpoint": "runs/a/best.pt",
    # "split": ..., "clips": ..., "queries": ..., "annotations": ..., "date": ..., settings}.
    facts: dict[str, str] = field(default_factory=dict)


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write the page of one model on one split, with a progress bar.

    A clip that cannot be read is shown without a player.

    Raises InputError where a run's log cannot be read, and where the page cannot be written.
    """
    rank = ranks_of_right_clips(evaluation)  # (Q,)
    sounds = Sounds(path.parent)
    notes = escape("\n".join(evaluation.notes))
    body = "\n".join([
        '<a class="skip" href="#filter">Skip to the queries</a>',
        f"<h1>{escape(evaluation.title)}</h1>",
        f'<p class="quiet">{notes}</p>',
        facts_list(evaluation.facts),
        "<h2>Results</h2>",
        results_table(evaluation.columns, evaluation.lines),
        "<h2>Learning curves</h2>",
        curves_of_runs(evaluation.run_folders),
        "<h2>Where the right clip ranks</h2>",
        figures_for_page(ranking_panels(rank, len(evaluation.audio))),
        "<h2>Queries to listen to</h2>",
        query_groups(evaluation, rank, sounds),
    ])
    with replacing(path) as temporary:
        # A file's name may hold bytes that are not UTF-8: they are shown as escapes.
        html = document(evaluation.title, body, sounds.script())
        temporary.write_text(html, "utf-8", "backslashreplace")


def ranks_of_right_clips(evaluation: Evaluation) -> np.ndarray:
    """Return each query's rank of the clip that its caption was written for: (Q,), from 1."""
    right_clips = [[int(clip)] for clip in evaluation.clip_of_caption]
    return np.concatenate(ranks(evaluation.text, evaluation.audio, right_clips))


def facts_list(facts: dict[str, str]) -> str:
    """Return the facts of an evaluation as a list of definitions; nothing if there are none."""
    if not facts:
        return ""
    items = ""
    for name, value in facts.items():
        items += f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n"
    return f'<dl class="facts">\n{items}</dl>'


def results_table(columns: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return the table of results; it scrolls by itself where it is wider than the screen."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    rows = ""
    for label, cells in lines:
        attribute = ""
        if label.startswith("  "):
            attribute = ' class="below"'
        data = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows += f"<tr{attribute}><th>{escape(label)}</th>{data}</tr>\n"
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Results"><table>\n'
        f"<thead><tr><th></th>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>"
    )


def query_groups(evaluation: Evaluation, rank: np.ndarray, sounds: "Sounds") -> str:
    """Return the queries that were answered best, those answered worst, and some drawn at random.

    rank: (Q,), each query's rank of its right clip.
    """
    right_clip_audio = evaluation.audio[list(evaluation.clip_of_caption)]  # (Q, D)
    right_clip_score = (evaluation.text * right_clip_audio).sum(dim=1).numpy()  # (Q,)
    # The lowest rank is best, and of equal ranks the higher score.
    best_first = np.lexsort((-right_clip_score, rank))
    shuffled = np.random.default_rng(0).permutation(best_first)
    groups = {
        "Best": best_first[:QUERIES_PER_GROUP],
        "Worst": best_first[::-1][:QUERIES_PER_GROUP],
        "Random": shuffled[:QUERIES_PER_GROUP],
    }
    n_shown = sum(len(queries) for queries in groups.values())
    sections = ""
    bar = tqdm(total=n_shown, desc="writing the page", unit="query", leave=False, disable=None)
    with bar:
        for name, queries in groups.items():
            cards = ""
            for query in queries.tolist():
                cards += query_card(evaluation, query, int(rank[query]), sounds)
                bar.update()
            sections += f'<section class="group">\n<h3>{name}</h3>\n{cards}</section>\n'
    return (
        f'<p class="quiet">This page shows some of {len(rank):,} queries: the best answered, the '
        f"worst answered and some at random, at most {QUERIES_PER_GROUP} each. The filter looks "
        'through these only.</p>\n<div class="fields">'
        '<label for="filter">Filter by word</label><input id="filter" type="search">'
        f'<output id="shown" aria-live="polite"></output></div>\n{sections}'
    )


def query_card(evaluation: Evaluation, query: int, rank: int, sounds: "Sounds") -> str:
    """Return one query with the first clips of its ranking and, at its rank, the right clip."""
    scores = evaluation.audio @ evaluation.text[query]  # (N,)
    ranking = scores.argsort(descending=True, stable=True).tolist()
    shown = list(enumerate(ranking[:CLIPS_PER_QUERY], start=1))
    if rank > CLIPS_PER_QUERY:
        shown.append((rank, int(evaluation.clip_of_caption[query])))
    items = ""
    for clip_rank, clip in shown:
        items += clip_item(evaluation, query, clip_rank, clip, float(scores[clip]), sounds)
    caption = escape(evaluation.captions[query])
    return (
        f'<details class="query"><summary>{caption} <span class="quiet">rank {rank:,}</span>'
        f'</summary>\n<ol class="clips">\n{items}</ol></details>\n'
    )


def clip_item(
    evaluation: Evaluation, query: int, clip_rank: int, clip: int, score: float, sounds: "Sounds"
) -> str:
    """Return one clip of a query's ranking: name, player, score, and the clip's first caption."""
    mark = ""
    if clip == evaluation.clip_of_caption[query]:
        mark = RIGHT
    elif clip in evaluation.annotations.get(query, ()):
        mark = RELEVANT
    attribute = ""
    if mark:
        attribute = ' class="relevant"'
    name = evaluation.clip_names[clip]
    source = sounds.source(evaluation.clip_paths[clip])
    sound = '<p class="quiet">This sound cannot be played: its file is gone or damaged.</p>\n'
    if source:
        sound = player(f"rank {clip_rank}: {name}", source)
    first_caption = evaluation.captions[list(evaluation.clip_of_caption).index(clip)]
    return (
        f'<li value="{clip_rank}"{attribute}><span class="file">{escape(name)}</span> '
        f'<span class="mark">{mark}</span>\n{sound}'
        f'<p class="quiet">score {score:.3f}; {escape(first_caption)}</p></li>\n'
    )


class Sounds:
    """The sounds of a page in `folder`: each is held once, however many players play it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.held: list[bytes] = []  # mp3
        self.sources: dict[Path, str] = {}

    def source(self, path: Path) -> str:
        """Return an attribute for player; "" where the file cannot be read.

        It is data-sound="NUMBER", or once the page holds PAGE_MP3_BYTES, data-link="ADDRESS".
        """
        if path not in self.sources:
            if sum(len(mp3) for mp3 in self.held) < PAGE_MP3_BYTES:
                self.sources[path] = self._hold(path)
            else:
                self.sources[path] = self._link(path)
        return self.sources[path]

    def _hold(self, path: Path) -> str:
        try:
            self.held.append(encode_mp3(load_audio(path, LISTEN_SECONDS)))
        except InputError:
            return ""
        return f'data-sound="{len(self.held) - 1}"'

    def _link(self, path: Path) -> str:
        if not path.is_file():
            return ""
        relative = os.path.relpath(path, self.folder)
        return f'data-link="{quote(os.fsencode(relative))}"'

    def script(self) -> str:
        """Return the sounds as base64 in JSON, and page.js, which hands them to the players."""
        held = json.dumps([base64.b64encode(mp3).decode() for mp3 in self.held])
        script = Path(__file__).with_suffix(".js").read_text("utf-8")
        return (
            f'<script type="application/json" id="sounds">{held}</script>\n'
            f"<script>\n{script}</script>\n"
        )


# --- Pictures ---

Panel = Callable  # paints the axes that it is given
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "dualenc",  # the same picture is the same bytes
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.4,
    "legend.fontsize": "small",
    "text.parse_math": False,  # a $ in a run's name is a $
}
PANEL_INCHES = (4.4, 3)  # a phone shows this width with text that can be read
RANK_BINS = (1, 2, 6, 11, 21, 51, 101, 201, 501, 1001, 2001, 5001)  # the first rank of each


def draw_svg(panels: dict[str, Panel], paper: str = "none") -> str:
    """Draw {title: panel} side by side; returns an SVG."""
    from matplotlib import figure, rc_context

    width, height = PANEL_INCHES
    file = io.StringIO()
    with rc_context(STYLE):
        picture = figure.Figure((width * len(panels), height), facecolor=paper)
        picture.set_layout_engine("constrained")
        all_axes = picture.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, paint) in zip(all_axes, panels.items(), strict=True):
            axes.set_title(title)
            paint(axes)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        picture.savefig(file, format="svg", metadata=no_metadata)
    return file.getvalue()


def figures_for_page(panels: dict[str, Panel]) -> str:
    """Return a <figure> for each {caption: panel}, in the colour of the page's text."""
    figures = ""
    for caption, paint in panels.items():
        svg = draw_svg({"": paint}).replace("#000000", "currentColor")
        svg = svg[svg.index("<svg") + len("<svg") :]
        # Every picture numbers its parts alike; a prefix keeps their ids apart in one page.
        prefix = re.sub(r"\W+", "-", caption)
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", svg)
        label = escape(caption)
        figures += (
            f'<figure><svg role="img" aria-label="{label}"{svg}'
            f"<figcaption>{label}</figcaption></figure>\n"
        )
    return f'<div class="figures">\n{figures}</div>'


def ranking_panels(rank: np.ndarray, n_clips: int) -> dict[str, Panel]:
    """Return two panels of the right clips' ranks: a histogram, and R@k over k.

    rank: (Q,), each query's rank of its right clip among n_clips, from 1.
    """
    edges = [first for first in RANK_BINS if first <= n_clips]
    edges.append(n_clips + 1)
    labels = []
    for first, next_first in itertools.pairwise(edges):
        last = next_first - 1
        if first == last:
            labels.append(f"{first:,}")
        else:
            labels.append(f"{first:,} to {last:,}")

    def histogram(axes) -> None:
        counts, _ = np.histogram(rank, edges)
        bars = axes.barh(labels, counts)
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize="small")
        axes.set(xmargin=0.12, xlabel="queries", ylabel="rank of the right clip")
        axes.invert_yaxis()

    def recall(axes) -> None:
        k = np.arange(1, n_clips + 1)
        within_k = np.searchsorted(np.sort(rank), k, side="right")
        axes.plot(k, 100 * within_k / len(rank))
        axes.plot(k, 100 * k / n_clips, "--", color="gray")
        axes.set(xscale="log", xlabel="k", ylabel="R@k, %", ylim=(0, 102))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.minorticks_off()

    return {
        f"Rank of the right clip among {n_clips:,}; the median is {np.median(rank):g}": histogram,
        "Recall: right clips that are among the first k (dashed: by chance)": recall,
    }


# --- Learning curves ---

LOG_NAME = "log.jsonl"
LOSSES = ("loss", "contrastive", "distillation")
LINE_STYLES = {  # {a panel's title: {curve: how it is drawn}}
    # "interval" is the mean loss of the last --log-every steps.
    "training loss": {"interval": "-", "loss": ".-", "contrastive": "--", "distillation": ":"},
    "learning rate": {"lr": "-"},
    "validation mAP@10, %": {"mAP@10": ".-"},
}


class Log(NamedTuple):
    """The curves of a run's log, and what they are called."""

    run_name: str
    interval: str  # the legend of the curve "interval": "mean of the last 10 steps"
    curves: dict[str, list[tuple[int, float]]]  # {curve: [(step, value)]}


def read_log(run_folder: Path) -> Log:
    """Read the log of a run; InputError where it cannot be read as one."""
    path = run_folder / LOG_NAME
    curves: dict[str, list] = {}
    try:
        # After the last newline a line may still be being written.
        first_line, *lines = path.read_text("utf-8").split("\n")[:-1]
        log_every = json.loads(first_line).get("settings", {}).get("log_every")
        for line in lines:
            row = json.loads(line)
            if "validation" in row:
                values = {name: row[name] for name in LOSSES if name in row}
                values["mAP@10"] = 100 * row["validation"]["mAP@10"]
            else:
                values = {"interval": row["loss"], "lr": row["lr"]}
            for name, value in values.items():
                point = (int(row["step"]), float(value))
                curves.setdefault(name, []).append(point)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read as a run's log ({error!r})") from error
    interval = "mean of the last steps"
    if log_every is not None:
        interval = f"mean of the last {counted(log_every, 'step')}"
    return Log(printable(run_folder.resolve().name), interval, curves)


def curve_panels(run_folders: Sequence[Path]) -> dict[str, Panel]:
    """Return the panels of LINE_STYLES, in which each run has a colour."""
    logs = [read_log(folder) for folder in run_folders]
    panels = {}
    for title, styles in LINE_STYLES.items():
        panels[title] = functools.partial(paint_curves, logs=logs, styles=styles)
    return panels


def paint_curves(axes, logs: Sequence[Log], styles: dict[str, str]) -> None:
    """Draw the curves that `styles` names, for each run.

    Where `styles` names several curves, the legend tells these apart; else it tells runs apart.
    """
    legend = {}
    for index, log in enumerate(logs):
        for name, style in styles.items():
            if name not in log.curves:
                continue
            steps, values = np.transpose(log.curves[name])
            (line,) = axes.plot(steps, values, style, color=f"C{index}")
            if len(styles) == 1:
                label = log.run_name
            elif name == "interval":
                label = log.interval
                line.set_alpha(0.5)  # The means of epochs stand out.
            elif name == "loss":
                label = "mean of the epoch"
            else:
                label = f"{name} part"
            legend.setdefault(label, line)
    if len(legend) > 1:
        axes.legend(legend.values(), legend)
    axes.set_xlabel("step")
    if "loss" not in styles:
        axes.set_ylim(bottom=0)


def curves_of_runs(run_folders: Sequence[Path]) -> str:
    """Return the learning curves of all folders that hold a run's log, as HTML."""
    logged = [folder for folder in run_folders if (folder / LOG_NAME).is_file()]
    if not logged:
        return "<p>There is no log of a run beside the checkpoint.</p>"
    return figures_for_page(curve_panels(logged))


def write_curves(run_folders: Sequence[Path], path: Path) -> None:
    """Draw the learning curves of one or several runs into one SVG file, a colour for each run.

    Raises InputError where a log cannot be read, and where the file cannot be written.
    """
    svg = draw_svg(curve_panels(run_folders), paper="white")
    with replacing(path) as temporary:
        temporary.write_text(svg, "utf-8")


# --- The search page, served on this machine ---

# Nothing is fetched and no script runs, whatever a file's name or a query may hold.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; media-src data:; img-src data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)
MAX_QUERY_CHARACTERS = 1000
SCORES = {
    "file": "The score is the cosine of the sentence and the whole file.",
    "segment": "The score is the cosine of the sentence and the file's best 10 s.",
}


def search_page(index, top: int, by: str, sentence: str) -> str:
    """Return the search page: a text field, and below it the files that match the sentence best.

    Args:
        index: has names (N,), root, and search(sentence, k, by) -> matches (search.SoundIndex).
        top: how many files are shown.
        by: "file" or "segment", what a file's score is.
        sentence: what is searched for; "" shows the field alone.
    """
    title = "Search sounds"
    results = ""
    if sentence:
        title = f"{sentence} – {title}"
        results = search_results(index, top, by, sentence)
    file_count = counted(len(index.names), "file")
    return document(title, (
        "<h1>Search sounds</h1>\n"
        '<form role="search"><label for="q">A sound of</label>'
        f'<input id="q" name="q" type="search" value="{escape(sentence)}" '
        f'maxlength="{MAX_QUERY_CHARACTERS}" required autofocus>'
        "<button>Search</button></form>\n"
        f'<p class="quiet">{file_count} in {escape(str(index.root))}</p>\n{results}'
    ))


def search_results(index, top: int, by: str, sentence: str) -> str:
    """Return the files that match best, or the reason why the sentence cannot be searched for."""
    try:
        matches = index.search(sentence, top, by)
    except InputError as error:
        return f'<p class="fault">{escape(str(error))}</p>'
    items = "".join(match_item(match, index.root) for match in matches)
    return (
        f'<p class="quiet">{SCORES[by]} “Above 90 %” says that 90 % of the files in the folder '
        "score lower. A player plays the part of its file that matches best, at most 10 s. A click "
        f'on a path selects it.</p>\n<ol class="clips">\n{items}</ol>'
    )


def match_item(match, root: Path) -> str:
    """Return one result: the file, a player and a download of its best part, and its full path.

    Where the file cannot be played any more, since it was removed or changed, the reason stands in
    place of the player.
    """
    name = os.path.relpath(match.path, root)
    part = f"{clock(match.start)} to {clock(match.end)}"
    label = f"{name}, {part}"
    download = ""
    try:
        mp3 = best_part(match)
    except InputError as error:
        sound = f'<p class="fault">{escape(str(error))}</p>\n'
    else:
        address = "data:audio/mpeg;base64," + base64.b64encode(mp3).decode()
        file_name = f"{match.path.stem} {clock(match.start).replace(':', '.')}.mp3"
        sound = player(label, f'src="{address}"')
        download = (
            f' · <a download="{escape(file_name)}" aria-label="download {escape(label)}" '
            f'href="{address}">download</a>'
        )
    return (
        f'<li><span class="file">{escape(name)}</span> '
        f'<span class="quiet">{part} of {clock(match.seconds)}</span>\n{sound}'
        f'<p class="quiet">score {match.score:.3f}, above {100 * match.above:.1f} %{download}</p>\n'
        f'<p class="quiet"><code>{escape(str(match.path))}</code></p></li>\n'
    )


def best_part(match) -> bytes:
    """Return the part of a file that matches best, as mp3; InputError where it is not there."""
    seconds = match.end - match.start
    return encode_mp3(load_excerpt(match.path, match.start, seconds, match.seconds))


class Handler(BaseHTTPRequestHandler):
    """The server's side of a request: it answers "/?q=SENTENCE" with the search page."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        host = self.headers.get("Host", "")
        # Any web page can make its own name mean this machine (DNS rebinding) and then read what
        # is served under it. Any port is accepted, since people forward them.
        if LOCAL_HOST.fullmatch(host) is None:
            reason = (
                f"This page answers at localhost, 127.0.0.1 and [::1] only, not at {host!r}, so "
                "that no other web page can read it. From another machine, forward a port: "
                f"ssh -L {self.server.server_port}:localhost:{self.server.server_port} HOST"
            )
            self.reply(HTTPStatus.FORBIDDEN, refusal(reason))
        elif url.path != "/":
            self.reply(HTTPStatus.NOT_FOUND, refusal(f"There is no page {url.path}; search at /."))
        else:
            sentence = parse_qs(url.query).get("q", [""])[0]
            sentence = sentence.strip()[:MAX_QUERY_CHARACTERS]
            self.reply(HTTPStatus.OK, self.server.page_for(sentence))

    def reply(self, status: HTTPStatus, page: str) -> None:
        with contextlib.suppress(ConnectionError):  # The browser may have left.
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Security-Policy", POLICY)
            self.end_headers()
            self.wfile.write(page.encode(errors="backslashreplace"))

    def log_message(self, *arguments) -> None:
        """Print nothing: the terminal is for what the user has to know."""


def refusal(reason: str) -> str:
    """Return a page that says why nothing is shown."""
    return document("Search sounds", f"<h1>Search sounds</h1>\n<p>{escape(reason)}</p>")


def search_server(port: int) -> ThreadingHTTPServer:
    """Return a server for this machine alone; InputError where the port cannot be had."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise InputError(f"--port {port}: {error}; name another") from error


def serve(server: ThreadingHTTPServer, index, top: int, by: str) -> None:
    """Say where the search page is, and serve it until Ctrl-C; arguments as in search_page."""
    server.page_for = functools.partial(search_page, index, top, by)
    print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
