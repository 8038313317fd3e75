"""An evaluation -> a page to look at and listen to; the logs of runs -> learning curves.

A page is one file that holds its style, script, pictures and sounds, and needs no network. Whatever
comes from outside (captions, names, paths) is escaped. matplotlib, which takes a second to import,
is imported where a picture is drawn.
"""

import base64
import contextlib
import dataclasses
import functools
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

import numpy as np
from torch import Tensor

from dualenc.decoding import BLOCK_SECONDS, encode_mp3, load_audio, stream_audio
from dualenc.errors import InputError, printable, replacing
from dualenc.metrics import ranks

QUERIES_PER_GROUP = 20
TOP = 10  # clips shown of each query's ranking
LISTEN_SECONDS = 30  # of a clip, as they are embedded
POLICY = "default-src 'none'; style-src 'unsafe-inline'; media-src data:; img-src data:"
EMBEDDED_BYTES = 25 * 2**20  # of mp3 in one page; in base64 they take a third more
LOG = "log.jsonl"
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "dualenc",  # text stays text; the same bytes every time
    "axes.facecolor": "none", "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.4,
    "legend.fontsize": "small", "text.parse_math": False,  # a $ in a run's name is a $
}
PANELS = {  # what each draws of a log, and how: intervals, and the means of epochs that stand out
    "training loss": {"interval": "-", "loss": ".-", "contrastive": "--", "distillation": ":"},
    "learning rate": {"lr": "-"},
    "validation mAP@10, %": {"mAP@10": ".-"},
}
RANK_BINS = (1, 2, 6, 11, 21, 51, 101, 201, 501, 1001, 2001, 5001)  # where each begins


@dataclasses.dataclass
class Evaluation:
    """One model on one split: what its page shows. N clips, Q captions, each of them a query."""

    title: str
    about: str
    columns: Sequence[str]  # of the table
    lines: Sequence[tuple[str, Sequence[str]]]  # (label, cells); "  label" belongs to the one above
    run_folders: Sequence[Path]  # their learning curves are drawn if they hold a log
    clip_names: Sequence[str]  # (N,)
    clip_paths: Sequence[Path]  # (N,)
    captions: Sequence[str]  # (Q,)
    clip_of_caption: Sequence[int]  # (Q,)
    text: Tensor  # (Q, D) unit norm
    audio: Tensor  # (N, D) unit norm
    annotations: dict[int, Sequence[int]]  # {caption: its relevant clips}, the new annotations
    # What the evaluation is of, shown as a list in this order: {"checkpoint": "runs/a/best.pt",
    # "split": ..., "clips": ..., "queries": ..., "annotations": ..., "date": ..., settings}.
    facts: dict[str, str] = dataclasses.field(default_factory=dict)


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write the page of one model on one split."""
    title, about, columns = evaluation.title, evaluation.about, evaluation.columns
    lines, runs, names = evaluation.lines, evaluation.run_folders, evaluation.clip_names
    paths, captions, text = evaluation.clip_paths, evaluation.captions, evaluation.text
    clip_of_caption, audio = evaluation.clip_of_caption, evaluation.audio
    relevant = evaluation.annotations
    right = [int(clip) for clip in clip_of_caption]
    rank = np.concatenate(ranks(text, audio, [[clip] for clip in right]))  # (Q,), from 1
    first = dict(zip(reversed(right), reversed(captions), strict=True))  # each clip's first caption
    held: list[bytes] = []  # the sounds in the page, mp3
    source = functools.cache(lambda clip: _source(paths[clip], path.parent, held))

    def item(row: int, place: int, clip: int, score: float) -> str:
        mark = "✓ relevant, too" if clip in relevant.get(row, ()) else ""
        mark = "✓ the right clip" if clip == right[row] else mark
        sound = source(clip) and player(f"rank {place}: {names[clip]}", source(clip))
        return (
            f'<li value="{place}"{" class=relevant" if mark else ""}><span class="file">'
            f'{escape(names[clip])}</span> <span class="mark">{mark}</span>\n{sound}'
            f'<p class="quiet">score {score:.3f}; {escape(first.get(clip, ""))}</p></li>\n'
        )

    def query(row: int) -> str:
        scores = audio @ text[row]
        shown = list(enumerate(scores.argsort(descending=True, stable=True)[:TOP].tolist(), 1))
        if rank[row] > TOP:
            shown.append((rank[row], right[row]))
        items = "".join(item(row, place, clip, float(scores[clip])) for place, clip in shown)
        return (
            f'<details class="query"><summary>{escape(captions[row])} <span class="quiet">rank '
            f'{rank[row]:,}</span></summary>\n<ol class="clips">\n{items}</ol></details>\n'
        )

    own = (text * audio[right]).sum(dim=1).numpy()
    order = np.lexsort((-own, rank))  # of equal ranks the higher score is the better
    logged = [run for run in runs if (run / LOG).is_file()]
    body = "\n".join([
        f'<a class="skip" href="#filter">Skip to the queries</a>\n<h1>{escape(title)}</h1>',
        f'<p class="quiet">{escape(about)}</p>', _facts(evaluation.facts),
        "<h2>Results</h2>", _table(columns, lines),
        "<h2>Learning curves</h2>",
        _pictures(_curves(logged)) if logged else "<p>There is no log of a run.</p>",
        "<h2>Where the right clip ranks</h2>", _pictures(_rankings(rank, len(audio))),
        '<h2>Queries to listen to</h2>\n<div class="fields"><label for="filter">Filter by word'
        '</label><input id="filter" type="search"><output id="shown" aria-live="polite"></output>'
        "</div>", _groups(order, query),
    ])
    with replacing(path) as temporary:
        # A file's name may hold bytes that are not UTF-8: they are shown as escapes.
        temporary.write_text(document(title, body, held), "utf-8", "backslashreplace")


def _facts(facts: dict[str, str]) -> str:
    """Return what the evaluation is of as a list of definitions; nothing without facts."""
    if not facts:
        return ""
    items = ""
    for name, value in facts.items():
        items += f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n"
    return f'<dl class="facts">\n{items}</dl>'


def _table(columns: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    def row(label: str, cells: Sequence[str], tag: str = "td") -> str:
        below = " class=below" if label.startswith("  ") else ""
        texts = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
        return f"<tr{below}><th>{escape(label)}</th>{texts}</tr>\n"

    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Results"><table>\n<thead>'
        f'{row("", columns, "th")}</thead>\n<tbody>{"".join(row(*line) for line in lines)}</tbody>'
        "</table></div>"
    )


def _groups(order: np.ndarray, query: Callable[[int], str]) -> str:
    """(Q,) queries, the best answered first -> those that are shown, each by query(row)."""
    shuffled = np.random.default_rng(0).permutation(order)
    found = ""
    for name, rows in {"Best": order, "Worst": order[::-1], "Random": shuffled}.items():
        cards = "".join(map(query, rows[:QUERIES_PER_GROUP].tolist()))
        found += f'<section class="group">\n<h3>{name}</h3>\n{cards}</section>\n'
    return found


def _source(path: Path, folder: Path, held: list[bytes]) -> str:
    """What a player plays: a sound added to `held`, or a link when that is full; "" without any."""
    if sum(map(len, held)) >= EMBEDDED_BYTES:
        relative = quote(os.fsencode(os.path.relpath(path, folder)))
        return f'src="{relative}"' if os.path.isfile(path) else ""
    try:
        held.append(encode_mp3(load_audio(path, LISTEN_SECONDS)))
    except InputError:
        return ""
    return f'data-sound="{len(held) - 1}"'


def document(title: str, body: str, sounds: Sequence[bytes] | None = None) -> str:
    """A whole HTML document; with a list of sounds (mp3) it holds them, and page.js."""
    here, script = Path(__file__), ""
    if sounds is not None:
        held = json.dumps([base64.b64encode(mp3).decode() for mp3 in sounds])
        script = f'<script type="application/json" id="sounds">{held}</script>\n'
        script += f"<script>\n{here.with_suffix('.js').read_text('utf-8')}</script>\n"
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n'
        f"<style>\n{here.with_suffix('.css').read_text('utf-8')}</style>\n"
        f"<main>\n{body}\n</main>\n{script}"
    )


def player(label: str, sound: bytes | str) -> str:
    """An <audio> of an mp3 that it holds itself, or of what an attribute names."""
    if isinstance(sound, bytes):
        sound = f'src="data:audio/mpeg;base64,{base64.b64encode(sound).decode()}"'
    return f'<audio controls preload="none" aria-label="{escape(label)}" {sound}></audio>\n'


def clock(seconds: float) -> str:
    """Seconds as 0:20 or 1:02:20, with a tenth where one is left: 0:07.3."""
    minutes, tenths = divmod(round(10 * seconds), 600)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    return f"{text}:{tenths / 10:04.1f}".removesuffix(".0")


def _svg(paints: dict[str, Callable], paper: str = "none") -> str:
    """Pictures side by side; 4.4 inches are as wide as a phone shows with text that can be read."""
    from matplotlib import figure, rc_context

    file, hidden = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context(STYLE):
        picture = figure.Figure((4.4 * len(paints), 3), facecolor=paper, layout="constrained")
        panels = picture.subplots(1, len(paints), squeeze=False)[0]
        for axes, (title, paint) in zip(panels, paints.items(), strict=True):
            axes.set_title(title)
            paint(axes)
        picture.savefig(file, format="svg", metadata=hidden)
    return file.getvalue()


def _pictures(paints: dict[str, Callable]) -> str:
    """Pictures for a page, in the colour of its text."""
    figures = ""
    for caption, paint in paints.items():
        svg = _svg({"": paint}).replace("#000000", "currentColor")
        prefix = re.sub(r"\W+", "-", caption)  # keeps its ids apart from other pictures'
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", svg[svg.index("<svg") + 4 :])
        figures += f'<figure><svg role="img" aria-label="{escape(caption)}"{svg}'
        figures += f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    return f'<div class="figures">\n{figures}</div>'


def _rankings(rank: np.ndarray, n_clips: int) -> dict[str, Callable]:
    """(Q,) rank of each query's right clip among n_clips, from 1: a histogram, and R@k over k."""
    edges = [edge for edge in RANK_BINS if edge <= n_clips] + [n_clips + 1]
    spans = zip(edges[:-1], edges[1:], strict=True)
    bins = [f"{low:,} to {end - 1:,}" if end - low > 1 else f"{low}" for low, end in spans]

    def histogram(axes) -> None:
        bars = axes.barh(bins, np.histogram(rank, edges)[0])
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize="small")
        axes.set(xmargin=0.12, xlabel="queries", ylabel="rank of the right clip")
        axes.invert_yaxis()

    def recall(axes) -> None:
        k = np.arange(1, n_clips + 1)
        axes.plot(k, 100 * np.searchsorted(np.sort(rank), k, side="right") / len(rank))
        axes.plot(k, 100 * k / n_clips, "--", color="gray")
        axes.set(xscale="log", xlabel="k", ylabel="R@k, %", ylim=(0, 102))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.minorticks_off()

    return {
        f"Rank of the right clip among {n_clips:,}; the median is {np.median(rank):g}": histogram,
        "Recall: right clips that are among the first k (dashed: by chance)": recall,
    }


def _read_log(run: Path) -> dict[str, list[tuple[float, float]]]:
    """{what PANELS draws: its (step, value)} of a run; InputError where its log cannot be read."""
    points: dict[str, list] = {}
    try:
        # The first line is the settings; after the last newline a line may still be being written.
        for line in (run / LOG).read_text("utf-8").split("\n")[1:-1]:
            row = json.loads(line)
            if "validation" in row:
                values = {name: row[name] for name in PANELS["training loss"] if name in row}
                values["mAP@10"] = 100 * row["validation"]["mAP@10"]
            else:
                values = {"interval": row["loss"], "lr": row["lr"]}
            for name, value in values.items():
                points.setdefault(name, []).append((float(row["step"]), float(value)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run / LOG}: cannot be read as a run's log ({error!r})") from error
    return points


def _curves(runs: Sequence[Path]) -> dict[str, Callable]:
    """The learning curves of runs, each run in a colour."""
    logs = {run: _read_log(run) for run in runs}

    def paint(axes, lines: dict[str, str]) -> None:
        for i, (run, log) in enumerate(logs.items()):
            for name in [name for name in lines if name in log]:
                style = {"color": f"C{i}", "alpha": 0.35 if name == "interval" else 1}
                style["label"] = name if len(lines) > 1 else printable(run.resolve().name)
                axes.plot(*np.transpose(log[name]), lines[name], **style)
        legend = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))  # one a label
        if len(legend) > 1:
            axes.legend(legend.values(), legend)
        axes.set(xlabel="step", ylim=(None if "loss" in lines else 0, None))

    return {title: functools.partial(paint, lines=lines) for title, lines in PANELS.items()}


def write_curves(run_folders: Sequence[Path], path: Path) -> None:
    """Draw the learning curves of runs into one SVG file; InputError where that cannot be done."""
    with replacing(path) as temporary:
        temporary.write_text(_svg(_curves(run_folders), paper="white"), "utf-8")


# --- The local page ---

def answer(index, k: int, by: str, sentence: str) -> str:
    """A page with a text field, and the sounds found; each carries the 10 s that match."""
    body = (
        '<h1>Search sounds</h1>\n<form role="search"><label for="q">A sound of</label>'
        f'<input id="q" name="q" type="search" value="{escape(sentence)}" required>'
        f'<button>Search</button></form>\n<p class="quiet">{len(index.names):,} files in '
        f'{escape(str(index.root))}</p>\n<ol class="clips">\n'
    )
    try:
        for match in index.search(sentence, k, by) if sentence else ():
            blocks = stream_audio(match.path)  # of 10 s each
            mp3 = encode_mp3(next(islice(blocks, match.start // BLOCK_SECONDS, None)))
            title = f"{os.path.relpath(match.path, index.root)}, {match.where()}"
            body += (
                f"<li>{escape(title)}\n{player(title, mp3)}"
                f'<p class="quiet">{match.score:.3f}, above {match.above:.1%} of all</p></li>\n'
            )
    except InputError as error:  # no word, or a file that was removed since
        body += f"<li>{escape(str(error))}</li>"
    return document(f"{sentence} – Search sounds".lstrip(" –"), body + "</ol>")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        url, port, found = urlsplit(self.path), self.server.server_port, ""
        hosts = f"127.0.0.1:{port}", f"localhost:{port}"  # or any web page could ask (rebinding)
        if url.path == "/" and self.headers.get("Host") in hosts:
            sentence = dict(parse_qsl(url.query)).get("q", "")
            found = self.server.answer(sentence.strip()[:1000])
        with contextlib.suppress(ConnectionError):  # the browser may have broken off
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Security-Policy", POLICY)
            self.end_headers()
            self.wfile.write(found.encode(errors="backslashreplace"))

    def log_message(self, *arguments) -> None:
        """Nothing: the terminal is for what the user has to know."""


def search_server(port: int) -> ThreadingHTTPServer:
    """A server on this machine alone; an InputError where the port cannot be had."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise InputError(f"--port {port}: {error}; name another") from error


def serve(server: ThreadingHTTPServer, index, top: int, by: str) -> None:
    """Answer queries to an index until Ctrl-C."""
    server.answer = lambda sentence: answer(index, top, by, sentence)
    print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
