"""The pages: what they show and play against what was put in, and in a browser."""

import base64
import contextlib
import http.client
import json
import re
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from browser import Browser, open_browser
from conftest import noise, write_wav
from matplotlib.figure import Figure

from dualenc import page, search
from dualenc.decoding import SAMPLE_RATE, encode_mp3, load_audio
from dualenc.errors import InputError

# It would end an attribute, a tag, a comment and a script, and a byte of it is not UTF-8.
HOSTILE = "a\" onerror=\"x '<i> <script>document.title = 1<!-- #%41\udcff"
HOSTILE_SHOWN = HOSTILE.replace("\udcff", "\\udcff")


class Element(NamedTuple):
    """An element of a page: its tag, attributes and text, without that of elements in it."""

    tag: str
    attributes: dict[str, str]
    text: list[str]


class Elements(HTMLParser):
    """All elements of a page, as a second reader of HTML finds them."""

    VOID = {"meta", "link", "input", "path", "use", "br"}

    def __init__(self, html: str):
        super().__init__()
        self.all: list[Element] = []
        self.open: list[Element] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        element = Element(tag, dict(attributes), [])
        self.all.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop().tag == tag

    def handle_data(self, data):
        if self.open:
            self.open[-1].text.append(data)

    def of(self, tag: str, **attributes: str) -> list[Element]:
        """Return the elements of a tag and of the attributes that are given."""
        of_tag = [element for element in self.all if element.tag == tag]
        return [e for e in of_tag if attributes.items() <= e.attributes.items()]

    def texts(self, tag: str, **attributes: str) -> list[str]:
        return ["".join(element.text).strip() for element in self.of(tag, **attributes)]


# --- Learning curves ---

def write_run(folder: Path, losses: list[float], settings: dict | None = None) -> Path:
    """Write the log of a run with a loss for each epoch of 10 steps; mAP@10 is 1 / loss."""
    rows = [{"settings": settings or {}}]
    for epoch, loss in enumerate(losses, start=1):
        row = {"step": 10 * epoch, "epoch": epoch}
        parts = {"contrastive": loss - 1, "distillation": 1}
        rows.append(row | parts | {"loss": loss / 2, "lr": 1e-3 / epoch})
        rows.append(row | parts | {"loss": loss, "validation": {"mAP@10": 1 / loss}})
    lines = [json.dumps(row) for row in rows]
    lines.append('{"step": 40, "lo')  # a line that is still being written
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("\n".join(lines))
    return folder


def painted(panel) -> SimpleNamespace:
    """Paint one panel, and return the points and colour of each line, and the legend's words."""
    axes = Figure().subplots()
    panel(axes)
    words = []
    if axes.get_legend():
        words = [text.get_text() for text in axes.get_legend().get_texts()]
    points = [line.get_xydata().tolist() for line in axes.lines]
    colors = [line.get_color() for line in axes.lines]
    return SimpleNamespace(points=points, colors=colors, legend=words)


def test_curves_go_through_the_logs_values(tmp_path):
    panels = page.curve_panels([write_run(tmp_path / "run", [4, 2.5])])
    losses = painted(panels["training loss"])
    interval, mean, contrastive, distillation = losses.points
    assert interval == [[10, 2], [20, 1.25]]
    assert mean == [[10, 4], [20, 2.5]]
    assert contrastive == [[10, 3], [20, 1.5]]
    assert distillation == [[10, 1], [20, 1]]
    assert painted(panels["learning rate"]).points == [[[10, 1e-3], [20, 5e-4]]]
    assert painted(panels["validation mAP@10, %"]).points == [[[10, 25], [20, 40]]]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"log_every": 7}, "mean of the last 7 steps"), ({}, "mean of the last steps")],
)
def test_the_legend_says_what_a_point_of_each_curve_is(tmp_path, settings, words):
    panels = page.curve_panels([write_run(tmp_path / "run", [4, 2], settings)])
    legend = painted(panels["training loss"]).legend
    assert legend == [words, "mean of the epoch", "contrastive part", "distillation part"]


def test_several_runs_are_drawn_beside_each_other(tmp_path):
    runs = [write_run(tmp_path / "a", [4, 2]), write_run(tmp_path / "b", [5, 4])]
    drawn = painted(page.curve_panels(runs)["validation mAP@10, %"])
    assert drawn.points == [[[10, 25], [20, 50]], [[10, 20], [20, 25]]]
    assert drawn.colors == ["C0", "C1"]
    assert drawn.legend == ["a", "b"]


def test_write_curves_writes_a_picture_with_the_names_of_runs(tmp_path):
    runs = [write_run(tmp_path / name, [4, 2]) for name in ("a$b$", "c<d>")]
    page.write_curves(runs, tmp_path / "curves.svg")
    svg = (tmp_path / "curves.svg").read_text()
    assert "a$b$" in svg
    assert "c&lt;d&gt;" in svg
    assert "validation mAP@10, %" in svg


def test_a_run_without_steps_is_drawn_empty(tmp_path):
    panels = page.curve_panels([write_run(tmp_path / "new", [])])
    assert [painted(panel).points for panel in panels.values()] == [[], [], []]


@pytest.mark.parametrize("text", ["{}\nx\n", '{}\n{"step": 3}\n', "{}\n5\n", "[]\n", "", None])
def test_a_log_that_cannot_be_read_is_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(InputError, match="log.jsonl: cannot be read as a run's log") as error:
        page.write_curves([tmp_path], tmp_path / "curves.svg")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "curves.svg").exists()


# --- The evaluation page ---

N_CLIPS = 30
N_CAPTIONS = 2 * N_CLIPS
TONE_HZ = 60  # clip i is a tone of (i + 1) times this


def tone(clip: int) -> np.ndarray:
    seconds = np.arange(1.5 * SAMPLE_RATE) / SAMPLE_RATE
    return 0.5 * np.sin(2 * np.pi * TONE_HZ * (clip + 1) * seconds)


def clip_of_tone(mp3: bytes, scratch: Path) -> int:
    """Return which clip an mp3 is, by its strongest frequency."""
    scratch.write_bytes(mp3)
    waveform = load_audio(scratch)
    spectrum = np.abs(np.fft.rfft(waveform))
    frequency = spectrum.argmax() * SAMPLE_RATE / len(waveform)
    return round(frequency / TONE_HZ) - 1


def right_ranks(evaluation: page.Evaluation) -> list[tuple[int, float]]:
    """Return (rank, score) of each query's right clip, counted one clip at a time."""
    ranks = []
    scores = evaluation.text @ evaluation.audio.T
    for row, right in enumerate(evaluation.clip_of_caption):
        better = sum(1 for score in scores[row] if score > scores[row, right])
        ranks.append((better + 1, float(scores[row, right])))
    return ranks


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> SimpleNamespace:
    """Write a page of 30 tones, two captions each; the first name is hostile, the last one gone."""
    folder = tmp_path_factory.mktemp("page")
    names = [HOSTILE, *(f"clip {i}.mp3" for i in range(1, N_CLIPS))]
    paths = [folder / name for name in names]
    for clip, path in enumerate(paths[:-1]):
        path.write_bytes(encode_mp3(tone(clip)))
    captions = []
    for i in range(N_CLIPS):
        captions += [f"<img src=x> rain {i}", f"<img src=x> Bell {i}"]
    generator = torch.Generator().manual_seed(0)
    clip_of_caption = np.repeat(np.arange(N_CLIPS), 2)
    audio = torch.randn(N_CLIPS, 8, generator=generator)
    text = audio[clip_of_caption] + 2 * torch.randn(N_CAPTIONS, 8, generator=generator)
    evaluation = page.Evaluation(
        title="A <b>page</b>",
        notes=["R@k: <any>"],
        columns=["mAP", "mAP@10"],
        lines=[("Clotho & <b>", ["31.95", "27.57"]), ("  interval", ["30.00..33.00", "<"])],
        run_folders=[write_run(folder / "<i>", [4, 2]), folder],
        clip_names=names,
        clip_paths=paths,
        captions=captions,
        clip_of_caption=clip_of_caption,
        text=torch.nn.functional.normalize(text, dim=1),
        audio=torch.nn.functional.normalize(audio, dim=1),
        annotations={row: [row % 7, row % 11] for row in range(0, N_CAPTIONS, 2)},
        facts={"checkpoint": "runs/<b>/best.pt", "split": "clotho/evaluation"},
    )
    page.write_evaluation(folder / "page.html", evaluation)
    html = (folder / "page.html").read_text(encoding="utf-8")
    return SimpleNamespace(folder=folder, evaluation=evaluation, html=html)


class Item(NamedTuple):
    """One clip of a query's card."""

    rank: int
    name: str
    mark: str
    sound: str  # the number of its sound, "" without a player
    score: str
    caption: str


class Card(NamedTuple):
    """One query."""

    caption: str
    rank: int
    items: list[Item]


def cards_of(html: str) -> list[Card]:
    """Return the queries of a page in their order."""
    cards = []
    for text in re.findall(r'<details class="query">.*?</details>', html, re.DOTALL):
        elements = Elements(text)
        (caption,) = elements.texts("summary")
        (rank,) = re.findall(r"rank ([\d,]+)</span></summary>", text)
        items = []
        for item_text in re.findall(r"<li .*?</li>", text, re.DOTALL):
            item = Elements(item_text)
            sound = ""
            if item.of("audio"):
                sound = item.of("audio")[0].attributes["data-sound"]
            score, _, first_caption = item.texts("p")[-1].partition("; ")
            items.append(Item(
                int(item.of("li")[0].attributes["value"]),
                item.texts("span", **{"class": "file"})[0],
                item.texts("span", **{"class": "mark"})[0],
                sound, score, first_caption,
            ))
        cards.append(Card(caption, int(rank), items))
    return cards


class SortedQuery(NamedTuple):
    """One query by a second route, a plain sort."""

    row: int  # the caption's
    right: int  # the clip that its caption was written for
    scores: list[float]  # all clips'
    ranking: list[int]  # all clips, best first


def sorted_query(evaluation: page.Evaluation, card: Card) -> SortedQuery:
    row = evaluation.captions.index(card.caption)
    scores = (evaluation.audio @ evaluation.text[row]).tolist()
    ranking = np.argsort(scores, kind="stable")[::-1].tolist()
    return SortedQuery(row, int(evaluation.clip_of_caption[row]), scores, ranking)


def items_with_queries(written) -> Iterator[tuple[Item, SortedQuery, int]]:
    """Yield each clip of each card, with its query and its index by a plain sort."""
    for card in cards_of(written.html):
        query = sorted_query(written.evaluation, card)
        for item in card.items:
            yield item, query, query.ranking[item.rank - 1]


def test_a_card_shows_the_rank_of_the_right_clip(written):
    for card in cards_of(written.html):
        query = sorted_query(written.evaluation, card)
        assert card.rank == query.ranking.index(query.right) + 1


def test_a_card_shows_the_first_ten_clips_and_the_right_one(written):
    for card in cards_of(written.html):
        expected_ranks = list(range(1, 11))
        if card.rank > 10:
            expected_ranks.append(card.rank)
        assert [item.rank for item in card.items] == expected_ranks


def test_the_clips_of_a_card_are_in_the_order_of_a_plain_sort(written):
    names = [name.replace("\udcff", "\\udcff") for name in written.evaluation.clip_names]
    for item, _, clip in items_with_queries(written):
        assert item.name == names[clip]


def test_a_clip_of_a_card_has_its_score(written):
    for item, query, clip in items_with_queries(written):
        assert item.score == f"score {query.scores[clip]:.3f}"


def test_a_clip_of_a_card_has_its_first_caption(written):
    for item, _, clip in items_with_queries(written):
        assert item.caption == f"<img src=x> rain {clip}"


def test_the_clips_that_are_relevant_are_marked(written):
    expected_marks = Counter()
    for item, query, clip in items_with_queries(written):
        mark = ""
        if clip == query.right:
            mark = "✓ the right clip"
        elif clip in written.evaluation.annotations.get(query.row, []):
            mark = "✓ relevant, too"
        assert item.mark == mark
        expected_marks[mark] += 1
    assert expected_marks["✓ relevant, too"] > 10


def shown_rows(written) -> list[int]:
    return [written.evaluation.captions.index(card.caption) for card in cards_of(written.html)]


@pytest.fixture(scope="module")
def best_first(written) -> list[int]:
    """Sort the queries by the rank of their right clip, and by its score where ranks are equal."""
    rank_and_loss = [(rank, -score) for rank, score in right_ranks(written.evaluation)]
    return sorted(range(N_CAPTIONS), key=rank_and_loss.__getitem__)


def test_the_best_and_the_worst_queries_are_shown(written, best_first):
    assert shown_rows(written)[:20] == best_first[:20]
    assert shown_rows(written)[20:40] == best_first[::-1][:20]


def test_twenty_more_queries_are_shown_at_random(written, best_first):
    places = [best_first.index(row) for row in shown_rows(written)[40:]]
    assert len(set(places)) == 20
    assert max(places) - min(places) > 20
    assert places != sorted(places)


def test_the_page_draws_the_curves_of_all_runs(tmp_path):
    runs = [write_run(tmp_path / "one", [4, 2]), write_run(tmp_path / "two", [3])]
    html = page.curves_of_runs(runs)
    assert ">one<" in html
    assert ">two<" in html


def test_what_is_embedded_of_a_clip_can_be_listened_to(tmp_path):
    sounds = page.Sounds(tmp_path)
    sounds.source(write_wav(tmp_path / "long.wav", noise(41)))
    (tmp_path / "held.mp3").write_bytes(sounds.held[0])
    assert len(load_audio(tmp_path / "held.mp3")) / SAMPLE_RATE == pytest.approx(30, abs=0.2)


def test_the_page_says_how_many_queries_there_are(written):
    assert "This page shows some of 60 queries" in written.html


@pytest.fixture(scope="module")
def held_clips(written) -> list[int]:
    """Listen to the sounds that the page holds: the number of each one's clip."""
    held = json.loads(re.search(r'id="sounds">(.*)</script>', written.html)[1])
    scratch = written.folder / "held.mp3"
    return [clip_of_tone(base64.b64decode(mp3), scratch) for mp3 in held]


def test_a_player_plays_the_clip_that_its_line_names(written, held_clips):
    for item, _, clip in items_with_queries(written):
        if item.sound:
            assert held_clips[int(item.sound)] == clip


def test_each_sound_that_can_be_read_is_held_once(held_clips):
    assert sorted(held_clips) == list(range(N_CLIPS - 1))


def test_a_sound_that_cannot_be_read_is_reported_in_place_of_its_player(written):
    for line in re.findall(r"<li .*?</li>", written.html, re.DOTALL):
        is_gone = "clip 29.mp3" in line
        assert ("<audio" not in line) == is_gone
        assert ("This sound cannot be played" in line) == is_gone


def test_sounds_beyond_the_limit_are_links_to_their_files(written, monkeypatch):
    monkeypatch.setattr(page, "PAGE_MP3_BYTES", 1)
    hostile, first, *_, gone = written.evaluation.clip_paths
    sounds = page.Sounds(written.folder / "other")
    assert sounds.source(first) == 'data-sound="0"'  # It is begun below the limit.
    assert sounds.source(hostile).startswith('data-link="../a%22%20onerror')
    assert sounds.source(gone) == ""
    assert len(sounds.held) == 1


def test_a_sound_that_is_held_stays_so_beyond_the_limit(written, monkeypatch):
    monkeypatch.setattr(page, "PAGE_MP3_BYTES", 1)
    path = written.evaluation.clip_paths[1]
    sounds = page.Sounds(written.folder)
    sounds.source(path)
    assert sounds.source(path) == 'data-sound="0"'


def test_the_page_has_its_title_as_its_heading(written):
    elements = Elements(written.html)
    assert elements.texts("title") == ["A <b>page</b>"]
    assert elements.texts("h1") == ["A <b>page</b>"]


def test_the_page_lists_the_facts_in_their_order(written):
    elements = Elements(written.html)
    assert elements.texts("dt") == ["checkpoint", "split"]
    assert elements.texts("dd") == ["runs/<b>/best.pt", "clotho/evaluation"]


def test_the_table_has_every_column_and_line(written):
    elements = Elements(written.html)
    assert elements.texts("th") == ["", "mAP", "mAP@10", "Clotho & <b>", "interval"]
    assert elements.texts("td") == ["31.95", "27.57", "30.00..33.00", "<"]


def assert_nothing_is_markup(html: str, *own_tags: str) -> None:
    """Hold a page's elements against those that the program itself writes."""
    elements = Elements(html)
    tags = {element.tag for element in elements.all}
    assert tags <= {"html", "meta", "link", "title", "style", "main", "h1", "p", *own_tags}
    for element in elements.all:
        assert "onerror" not in element.attributes
        for value in element.attributes.values():
            assert not (value or "").startswith(("http:", "https:", "//"))


def test_nothing_from_outside_becomes_markup(written):
    html = re.sub(r"<svg.*?</svg>", "", written.html, flags=re.DOTALL)
    tags = "a h2 h3 dl dt dd div table thead tbody tr th td figure figcaption section details"
    tags += " summary ol li span audio label input output script"
    assert_nothing_is_markup(html, *tags.split())
    assert html.count("<script") == 2


def test_a_player_is_labelled_with_the_clips_name(written):
    labels = [audio.attributes["aria-label"] for audio in Elements(written.html).of("audio")]
    assert any(label.endswith(HOSTILE_SHOWN) for label in labels)


# The right clips' ranks in six queries among 30 clips.
RANKS = np.array([1, 1, 3, 5, 11, 30])


def test_the_histogram_counts_every_query():
    histogram, _ = page.ranking_panels(RANKS, 30).values()
    axes = Figure().subplots()
    histogram(axes)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    counts = [bar.get_width() for bar in axes.patches]
    assert labels == ["1", "2 to 5", "6 to 10", "11 to 20", "21 to 30"]
    assert counts == [2, 2, 0, 1, 1]


def test_the_curve_of_recall_counts_the_queries_up_to_each_rank():
    _, recall = page.ranking_panels(RANKS, 30).values()
    measured, _ = painted(recall).points
    # By hand: 2 of 6 are first, 4 of 6 within 5, 5 of 6 within 11, all within 30.
    expected = {1: 2, 4: 3, 5: 4, 10: 4, 11: 5, 29: 5, 30: 6}
    for k, hits in expected.items():
        assert measured[k - 1] == pytest.approx([k, 100 * hits / 6])


def test_the_recall_of_chance_is_drawn_beside_that_of_the_model():
    _, recall = page.ranking_panels(RANKS, 30).values()
    _, chance = painted(recall).points
    assert chance == [pytest.approx([k, 100 * k / 30]) for k in range(1, 31)]


def test_pictures_are_drawn_with_their_captions():
    html = page.figures_for_page(page.ranking_panels(np.array([1, 1, 2, 3]), 3))
    assert html.count("<svg") == 2
    captions = Elements(re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL)).texts("figcaption")
    assert captions[0] == "Rank of the right clip among 3; the median is 1.5"


def test_a_time_is_written_as_a_player_shows_it():
    shown = [page.clock(seconds) for seconds in (0, 20, 5.001, 7.28, 59.96, 3740)]
    assert shown == ["0:00", "0:20", "0:05", "0:07.3", "1:00", "1:02:20"]


# --- The search page ---

def shown_text(html: str) -> str:
    """Return a page as it is sent: bytes that are not UTF-8 are escapes."""
    return html.encode(errors="backslashreplace").decode()


LEVELS = [0.01, 0.1, 0.03, 0.06]  # each 10 s of the long file are noise of another level


class Match(NamedTuple):
    """The fields of a search.Match that the page uses."""

    path: Path
    score: float
    above: float
    start: int
    end: float
    seconds: float


class KnownIndex:
    """An index of known matches, which notes what it is asked."""

    def __init__(self, root: Path, matches: list[Match]):
        self.root = root
        self.matches = matches
        self.names = [str(match.path) for match in matches]
        self.asked = []

    def search(self, sentence: str, k: int, by: str) -> list[Match]:
        self.asked.append((sentence, k, by))
        if sentence == "!":
            raise InputError("'!': no <word> is left")
        return self.matches


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """Write a long file, whose 10 s differ in level, and a short one with a hostile name."""
    root = tmp_path_factory.mktemp("library")
    long = noise(35, 5) / 0.1 * np.repeat(LEVELS, 10 * SAMPLE_RATE)[: 35 * SAMPLE_RATE]
    write_wav(root / "deep" / "long.wav", long)
    write_wav(root / f"{HOSTILE}.wav", noise(2))
    return root


def index_of(library: Path) -> KnownIndex:
    matches = [
        Match(library / "deep" / "long.wav", 0.5, 0.75, 10, 20, 35),
        Match(library / f"{HOSTILE}.wav", 0.25, 0.5, 0, 2, 2),
        Match(library / "deep" / "long.wav", 0.125, 0.25, 30, 35, 35),
        Match(library / "deep" / "long.wav", -0.1, 0, 20, 30, 35),
    ]
    return KnownIndex(library, matches)


@pytest.fixture
def index(library) -> KnownIndex:
    return index_of(library)


@pytest.fixture
def short(index) -> KnownIndex:
    """Make an index of one short match, which is quickly encoded."""
    index.matches = index.matches[1:2]
    return index


@pytest.fixture(scope="module")
def searched(library) -> str:
    """Search, and return the page of all four matches as the browser reads it."""
    return shown_text(page.search_page(index_of(library), 4, "file", f"{HOSTILE} {HOSTILE}"))


def results_of(html: str) -> list[Elements]:
    return [Elements(item) for item in re.findall(r"<li>.*?</li>", html, re.DOTALL)]


def played(result: Elements, scratch: Path) -> np.ndarray:
    """Return the waveform that a result's player plays."""
    (audio,) = result.of("audio")
    scheme, _, mp3 = audio.attributes["src"].partition(",")
    assert scheme == "data:audio/mpeg;base64"
    scratch.write_bytes(base64.b64decode(mp3))
    return load_audio(scratch)


def test_results_show_the_file_and_the_part_that_matches(searched):
    assert [result.texts("span") for result in results_of(searched)] == [
        ["deep/long.wav", "0:10 to 0:20 of 0:35"],
        [f"{HOSTILE_SHOWN}.wav", "0:00 to 0:02 of 0:02"],
        ["deep/long.wav", "0:30 to 0:35 of 0:35"],
        ["deep/long.wav", "0:20 to 0:30 of 0:35"],
    ]


def test_results_show_the_full_path(searched, library):
    paths = []
    for result in results_of(searched):
        paths += result.texts("code")
    long = str(library / "deep" / "long.wav")
    assert paths == [long, f"{library}/{HOSTILE_SHOWN}.wav", long, long]


def test_results_show_the_score_and_the_share_below_it(searched):
    first, *_, last = results_of(searched)
    assert first.texts("p")[0].startswith("score 0.500, above 75.0 %")
    assert last.texts("p")[0].startswith("score -0.100, above 0.0 %")


def test_a_player_plays_the_part_that_matches(searched, tmp_path):
    waveforms = [played(result, tmp_path / "x.mp3") for result in results_of(searched)]
    seconds = [len(waveform) / SAMPLE_RATE for waveform in waveforms]
    assert seconds == pytest.approx([10, 2, 5, 10], abs=0.2)
    # The mp3 leaves out the highest frequencies, so levels are compared with each other.
    levels = np.array([waveform.std() for waveform in waveforms])
    expected = np.array([LEVELS[1], 0.1, LEVELS[3], LEVELS[2]])
    assert levels / levels[0] == pytest.approx(expected / expected[0], rel=0.05)


def test_a_link_downloads_what_is_played(searched):
    for result in results_of(searched):
        (link,) = result.of("a")
        (audio,) = result.of("audio")
        assert link.attributes["href"] == audio.attributes["src"]


def test_a_download_is_named_by_its_file_and_its_start(searched):
    first, second, *_ = results_of(searched)
    assert first.of("a")[0].attributes["download"] == "long 0.10.mp3"
    assert second.of("a")[0].attributes["download"] == f"{HOSTILE_SHOWN} 0.00.mp3"


def cut_short(path: Path) -> None:
    write_wav(path, noise(4))


def replace(path: Path) -> None:
    path.write_text("no sound")


@pytest.mark.parametrize("change", [Path.unlink, cut_short, replace])
def test_a_file_that_changed_costs_its_own_line_only(short, tmp_path, change):
    other = Match(write_wav(tmp_path / "other.wav", noise(35)), 0.5, 0.75, 10, 20, 35)
    change(other.path)
    short.matches = [other, *short.matches]
    first, second = results_of(page.search_page(short, 4, "file", "rain"))
    (fault,) = first.texts("p", **{"class": "fault"})
    assert str(tmp_path / "other.wav") in fault
    assert first.of("audio") == []
    assert first.of("a") == []
    assert len(second.of("audio")) == 1


def test_nothing_of_a_search_becomes_markup(searched):
    tags = "form label input button ol li span audio code a"
    assert_nothing_is_markup(searched, *tags.split())


def test_the_sentence_stays_in_the_field(searched):
    (field,) = Elements(searched).of("input")
    assert field.attributes["value"] == f"{HOSTILE_SHOWN} {HOSTILE_SHOWN}"


def test_the_player_of_a_result_is_labelled_with_file_and_part(searched):
    labels = [audio.attributes["aria-label"] for audio in Elements(searched).of("audio")]
    assert labels[1] == f"{HOSTILE_SHOWN}.wav, 0:00 to 0:02"


def test_what_cannot_be_searched_for_is_reported(index):
    html = page.search_page(index, 4, "file", "!")
    assert Elements(html).texts("p", **{"class": "fault"}) == ["'!': no <word> is left"]


def test_before_a_search_there_is_the_field_alone(index):
    html = page.search_page(index, 4, "file", "")
    assert index.asked == []
    assert "<ol" not in html


@pytest.mark.parametrize(("names", "files"), [(["a", "b", "c", "d"], "4 files"), (["a"], "1 file")])
def test_the_page_tells_how_many_files_are_searched_and_where(index, names, files):
    index.names = names
    assert f"{files} in {index.root}" in page.search_page(index, 4, "file", "")


@pytest.mark.parametrize(
    ("by", "whole"), [("file", "the whole file."), ("segment", "the file's best 10 s.")]
)
def test_the_page_explains_score_and_above(short, by, whole):
    html = page.search_page(short, 4, by, "rain")
    assert f"The score is the cosine of the sentence and {whole}" in html
    assert "“Above 90 %” says that 90 % of the files in the folder score lower" in html


@contextlib.contextmanager
def serving(index, top: int = 4, by: str = "file") -> Iterator:
    """Serve the search page of an index from a thread."""
    server = page.search_server(0)
    thread = threading.Thread(target=page.serve, args=(server, index, top, by))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    html: str


def ask(server, path: str, host: str | None = None) -> Reply:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    headers = {}
    if host is not None:
        headers["Host"] = host
    connection.request("GET", path, headers=headers)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return Reply(reply.status, dict(reply.headers), text)


def test_the_server_answers_a_sentence_with_its_page(short, capsys):
    with serving(short, 3, "segment") as server:
        reply = ask(server, "/?q=++rain+%26+bells+")
    assert reply.status == 200
    assert short.asked == [("rain & bells", 3, "segment")]
    assert reply.html == shown_text(page.search_page(short, 3, "segment", "rain & bells"))
    assert f"http://127.0.0.1:{server.server_port}/" in capsys.readouterr().out


def test_the_policy_lets_nothing_in(index):
    with serving(index) as server:
        policy = ask(server, "/").headers["Content-Security-Policy"]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["media-src"] == "data:"
    assert "script-src" not in rules


LOCAL = ["localhost", "127.0.0.1:1", "[::1]:8765", "LocalHost:80"]
FOREIGN = ["evil.example:80", "localhost.evil.example", "127.0.0.11", "[::1].evil.example", ""]


@pytest.mark.parametrize("host", LOCAL)
def test_names_of_this_machine_are_answered(index, host):
    index.matches = []
    with serving(index) as server:
        reply = ask(server, "/?q=rain", host)
    assert reply.status == 200
    assert index.asked == [("rain", 4, "file")]


@pytest.mark.parametrize("host", FOREIGN)
def test_other_names_are_refused(index, host):
    with serving(index) as server:
        reply = ask(server, "/?q=rain", host)
    assert reply.status == 403
    assert "so that no other web page can read it" in reply.html
    assert index.asked == []


def test_a_sentence_of_any_length_is_searched_for_by_its_beginning(short):
    with serving(short) as server:
        ask(server, f"/?q={2000 * 'x'}")
    assert short.asked[0][0] == 1000 * "x"


def test_the_server_listens_to_this_machine_alone():
    with page.search_server(0) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_another_path_is_not_found(index):
    with serving(index) as server:
        reply = ask(server, "/etc/passwd?q=rain")
    assert reply.status == 404
    assert "There is no page /etc/passwd" in reply.html
    assert index.asked == []


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {taken}: .*; name another"):
            page.search_server(taken)


def test_a_port_that_there_cannot_be_is_refused():
    with pytest.raises(InputError, match="--port 70000: .*; name another"):
        page.search_server(70_000)


def test_the_search_command_serves_the_page(tiny_model, tmp_path, monkeypatch, capsys):
    torch.save(tiny_model.checkpoint(), tmp_path / "best.pt")
    sounds = tmp_path / "sounds"
    for seed in range(3):
        write_wav(sounds / f"{seed}.wav", noise(1, seed))
    html = []

    def ask_once(server):
        thread = threading.Thread(target=serve_forever, args=(server,))
        thread.start()
        html.append(ask(server, "/?q=a+dog+barks").html)
        server.shutdown()
        thread.join()
        raise KeyboardInterrupt  # Ctrl-C raises it; it ends the server without a traceback.

    serve_forever = page.ThreadingHTTPServer.serve_forever
    monkeypatch.setattr(page.ThreadingHTTPServer, "serve_forever", ask_once)
    options = ["--checkpoint", str(tmp_path / "best.pt"), "--device", "cpu", "--top", "2"]
    options += ["--serve", "--port", "0", "--audio", str(sounds)]
    monkeypatch.setattr(sys, "argv", ["search", *options])
    search.main()
    index = search.SoundIndex.build(tiny_model, sounds)
    paths = [str(match.path) for match in index.search("a dog barks", 2)]
    assert [result.texts("code")[0] for result in results_of(html[0])] == paths
    assert "http://127.0.0.1:" in capsys.readouterr().out


# --- In a browser ---

COUNT_VISIBLE_QUERIES = "return document.querySelectorAll('.query:not([hidden])').length"
COUNT_VISIBLE_GROUPS = "return document.querySelectorAll('.group:not([hidden])').length"
ENTER = "\ue007"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def opened(written, browser) -> Browser:
    """Open the evaluation page on a phone."""
    browser.be_a_phone()
    browser.open((written.folder / "page.html").as_uri())
    return browser


@pytest.fixture(scope="module")
def evaluation_on_a_phone(written, browser) -> SimpleNamespace:
    """Open the evaluation page on a phone, and look at it once."""
    browser.be_a_phone()
    browser.errors()  # Those of pages that were open before do not count.
    browser.open((written.folder / "page.html").as_uri())
    return SimpleNamespace(
        title=browser.script("return document.title"),
        fetched=browser.script("return performance.getEntriesByType('resource').length"),
        markup=browser.script("""
            return document.querySelectorAll("main img, main i, main b").length;
        """),
        nameless_controls=browser.script("""
            const controls = [...document.querySelectorAll("audio, figure svg, input, [tabindex]")];
            const hasName = (control) => control.ariaLabel || control.labels.length;
            return controls.filter((control) => !hasName(control)).length;
        """),
        repeated_ids=browser.script("""
            const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
            return ids.length - new Set(ids).size;
        """),
        visible_queries=browser.script(COUNT_VISIBLE_QUERIES),
        shown=browser.script("return shown.textContent"),
        width=browser.script("return document.documentElement.scrollWidth"),
        errors=browser.errors(),
    )


def test_the_page_opens_without_an_error(evaluation_on_a_phone):
    assert evaluation_on_a_phone.title == "A <b>page</b>"
    assert evaluation_on_a_phone.errors == []


def test_the_page_fetches_nothing(evaluation_on_a_phone):
    assert evaluation_on_a_phone.fetched == 0


def test_a_browser_takes_nothing_from_outside_for_markup(evaluation_on_a_phone):
    assert evaluation_on_a_phone.markup == 0


def test_every_control_has_a_name_for_screen_readers(evaluation_on_a_phone):
    assert evaluation_on_a_phone.nameless_controls == 0


def test_no_id_stands_twice_in_the_page(evaluation_on_a_phone):
    assert evaluation_on_a_phone.repeated_ids == 0


def test_a_phone_needs_no_scrolling_to_the_side(evaluation_on_a_phone):
    assert evaluation_on_a_phone.width <= 390


def test_without_a_filter_all_queries_are_shown(evaluation_on_a_phone):
    assert evaluation_on_a_phone.visible_queries == 60
    assert evaluation_on_a_phone.shown == "60 of 60 queries shown"


def test_the_filter_shows_the_queries_that_hold_every_word(opened, written):
    opened.type("#filter", "7 BELL")
    captions = [card.caption for card in cards_of(written.html)]
    expected = sum("7" in caption and "Bell" in caption for caption in captions)
    assert expected > 0
    assert opened.script(COUNT_VISIBLE_QUERIES) == expected
    assert opened.script("return shown.textContent") == f"{expected} of 60 queries shown"


def test_a_group_of_which_no_query_is_shown_is_hidden(opened):
    opened.type("#filter", "nonsense")
    assert opened.script(COUNT_VISIBLE_GROUPS) == 0


def test_sounds_play_one_at_a_time_and_show_their_length(opened):
    assert opened.script("""
        const query = document.querySelector(".query");
        await new Promise((done) => { query.ontoggle = done; query.open = true; });
        const [first, second] = query.querySelectorAll("audio[src]");
        if (!second.duration) {
            await new Promise((done) => { second.onloadedmetadata = done; });
        }
        const length = second.duration;
        await first.play();
        await second.play();
        await new Promise((done) => { second.ontimeupdate = done; });
        return first.paused && !second.paused && Math.abs(length - 1.5) < 0.2;
    """)


def test_a_player_gets_the_sound_of_its_number(opened):
    assert opened.script("""
        const query = document.querySelector(".query");
        await new Promise((done) => { query.ontoggle = done; query.open = true; });
        const wrong = [];
        for (const player of query.querySelectorAll("audio")) {
            const mp3 = await (await fetch(player.src)).arrayBuffer();
            const bytes = [...new Uint8Array(mp3)].map((byte) => String.fromCharCode(byte));
            if (btoa(bytes.join("")) !== sounds[player.dataset.sound]) wrong.push(player);
        }
        return wrong.length;
    """) == 0


def test_a_sound_that_the_page_does_not_hold_plays_from_its_file(written, browser, monkeypatch):
    monkeypatch.setattr(page, "PAGE_MP3_BYTES", 0)
    page.write_evaluation(written.folder / "linked.html", written.evaluation)
    browser.open((written.folder / "linked.html").as_uri())
    assert browser.script("return document.querySelectorAll('audio[src]').length") == 0
    assert browser.script("""
        document.querySelector(".query").open = true;
        const player = document.querySelector(".query audio");
        await new Promise((done) => { player.onloadedmetadata = done; });
        return Math.abs(player.duration - 1.5) < 0.2;
    """)


def test_the_page_is_dark_where_the_system_is(opened):
    background = "return getComputedStyle(document.body).backgroundColor"
    assert opened.script(background) == "rgb(255, 255, 255)"
    opened.be_dark()
    assert opened.script(background) == "rgb(20, 24, 28)"


def test_the_cursor_is_in_the_field_before_and_after_a_search(short, browser):
    with serving(short) as server:
        browser.open(f"http://localhost:{server.server_port}/")
        assert browser.script("return document.activeElement.id") == "q"
        browser.type("#q", "rain" + ENTER)
        assert browser.script("return document.activeElement.value") == "rain"


@pytest.fixture(scope="module")
def search_on_a_phone(library, browser) -> SimpleNamespace:
    """Open the page of a search with one short match on a phone, and look at it once."""
    index = index_of(library)
    index.matches = index.matches[1:2]
    browser.be_a_phone()
    browser.errors()  # Those of pages that were open before do not count.
    with serving(index) as server:
        browser.open(f"http://localhost:{server.server_port}/?q=rain")
        return SimpleNamespace(
            seconds=browser.script("""
                const player = document.querySelector("audio");
                if (!player.duration) {
                    await new Promise((done) => { player.onloadedmetadata = done; });
                }
                return player.duration;
            """),
            plays=browser.script("""
                const player = document.querySelector("audio");
                await player.play();
                await new Promise((done) => { player.ontimeupdate = done; });
                return player.currentTime > 0;
            """),
            width=browser.script("return document.documentElement.scrollWidth"),
            errors=browser.errors(),
        )


def test_the_search_page_opens_without_an_error(search_on_a_phone):
    assert search_on_a_phone.errors == []


def test_the_player_of_a_result_shows_its_length(search_on_a_phone):
    assert search_on_a_phone.seconds == pytest.approx(2, abs=0.2)


def test_the_player_of_a_result_plays(search_on_a_phone):
    assert search_on_a_phone.plays


def test_on_a_phone_results_need_no_scrolling_to_the_side(search_on_a_phone):
    assert search_on_a_phone.width <= 390
