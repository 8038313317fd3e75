"""The evaluation page and the curves: what they show against what was put in, and in a browser."""

import json
import re
import shutil
import subprocess
from html import escape
from types import SimpleNamespace
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch

from dualenc import page
from dualenc.decoding import encode_mp3
from dualenc.errors import InputError


def write_run(folder, epochs=3):
    rows = [{"settings": {}}]
    for epoch in range(1, epochs + 1):
        row = {"step": 10 * epoch, "epoch": epoch, "loss": 4 / epoch, "distillation": 1}
        rows += [row | {"lr": 1e-3 / epoch}, row | {"validation": {"mAP@10": 0.1 * epoch}}]
    folder.mkdir(parents=True)
    lines = [*map(json.dumps, rows), '{"step": 40, "lo']  # the last is still being written
    (folder / "log.jsonl").write_text("\n".join(lines))
    return folder


def test_curves_go_through_the_logs_values(tmp_path):
    runs = [write_run(tmp_path / name, epochs) for name, epochs in [("a$b$", 3), ("c<d>", 5)]]
    page.write_curves(runs, tmp_path / "c.svg")
    svg = (tmp_path / "c.svg").read_text()
    assert "a$b$" in svg and "c&lt;d&gt;" in svg and "distillation" in svg
    paths = re.findall(r'<path d="([^"]*)"[^>]*stroke: #1f77b4', svg)
    lines = [np.array(re.findall(r"[-\d.]+", path), float).reshape(-1, 2) for path in paths]
    (rising,) = (line for line in lines if len(line) == 3 and line[-1, 1] < line[0, 1])
    np.testing.assert_allclose(rising[1] - rising[0], rising[2] - rising[1], rtol=1e-4)  # even
    page.write_curves([write_run(tmp_path / "new", epochs=0)], tmp_path / "new.svg")


def test_a_log_that_cannot_be_read_is_one_line(tmp_path):
    for text in ("{}\nx\n", '{}\n{"step": 3}\n', "{}\n5\n", None):
        log = tmp_path / "log.jsonl"
        log.write_text(text) if text else log.unlink()
        with pytest.raises(InputError, match="log.jsonl: cannot be read as a run's log"):
            page.write_curves([tmp_path], tmp_path / "c.svg")
    assert list(tmp_path.iterdir()) == []


N_CLIPS = 30
EVIL = 'a" onerror="x <script>document.title = 1<!-- #%41\udcff'  # and a byte that is not UTF-8
RELEVANT = {0: [0, 5, 6], 7: [3, 9]}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """A page of 30 clips with two captions each; EVIL is the first, the last file is gone."""
    folder = tmp_path_factory.mktemp("page")
    names = [EVIL, *(f"clip {i}.mp3" for i in range(1, N_CLIPS))]
    paths = [folder / name for name in names]
    for i, path in enumerate(paths[:-1]):
        path.write_bytes(encode_mp3(np.sin(np.arange(48_000) * 0.01 * (i + 1))))  # 1.5 s
    captions = [f"<img src=x> {word} {i}" for i in range(N_CLIPS) for word in ("rain", "bell")]
    clip, unit = np.repeat(np.arange(N_CLIPS), 2), torch.nn.functional.normalize
    torch.manual_seed(0)
    audio = unit(torch.randn(N_CLIPS, 8), dim=1)
    text = unit(audio[clip] + torch.randn(2 * N_CLIPS, 8), dim=1)
    lines = [("Clotho & <b>", ["31.95", "27.57"]), ("  interval", ["30.00..33.00", "<"])]
    page.write_evaluation(folder / "page.html", page.Evaluation(
        "A <b>page</b>", "R@k: <any>", ["mAP", "mAP@10"], lines,
        [write_run(folder / "<i>"), folder], names, paths, captions, clip, text, audio, RELEVANT,
    ))
    return SimpleNamespace(**locals(), html=(folder / "page.html").read_text(encoding="utf-8"))


def test_the_page_shows_what_a_plain_sort_finds(evaluation):
    cards = re.findall(r'<details class="query">.*?</details>', evaluation.html, re.DOTALL)
    names = [escape(name.replace("\udcff", "\\udcff")) for name in evaluation.names]
    captions, ranks = list(map(escape, evaluation.captions)), []
    for card in cards:
        caption, rank = re.search(r"<summary>(.*) <span.*>rank (\d+)<", card).groups()
        row, rank = captions.index(caption), int(rank)
        scores, right = evaluation.audio @ evaluation.text[row], evaluation.clip[row]
        order = np.argsort(-scores.numpy(), kind="stable").tolist()
        expected = list(enumerate(order[:10], start=1)) + ([(rank, right)] if rank > 10 else [])
        marks = dict.fromkeys(RELEVANT.get(row, []), "✓ relevant, too")
        marks[right] = "✓ the right clip"
        shown = re.findall(r'<li value="(\d+)".*"file">(.*)</span> <.*"mark">(.*)</span>', card)
        assert shown == [(str(n), names[clip], marks.get(clip, "")) for n, clip in expected]
        assert rank == order.index(right) + 1
        assert card.count("<audio") == len(shown) - card.count(f">{names[-1]}<")
        ranks.append(rank)
    assert len(ranks) == 60 and ranks[:20] == sorted(ranks[:20]) and ranks[20] == max(ranks)
    sounds = json.loads(re.search(r'id="sounds">(.*)</script>', evaluation.html)[1])
    assert len(sounds) == N_CLIPS - 1  # each once, but for the file that is gone


def test_sounds_beyond_the_limit_are_linked(evaluation, monkeypatch):
    monkeypatch.setattr(page, "EMBEDDED_BYTES", 1)
    held, folder = [], evaluation.folder / "other"
    assert page._source(evaluation.paths[1], folder, held) == 'data-sound="0"'
    assert page._source(evaluation.paths[0], folder, held).startswith('src="../a%22%20onerror')
    assert page._source(evaluation.paths[-1], folder, held) == "" and len(held) == 1


def test_the_histogram_counts_every_query():
    svg = page._pictures(page._rankings(np.array([1, 1, 3, 5, 11, 30]), 30))
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"1", "2 to 5", "6 to 10", "11 to 20", "21 to 30"} <= set(labels)
    assert ["2", "2", "0", "1", "1"] in [labels[i : i + 5] for i in range(len(labels))]


def test_times_by_hand():
    shown = [page.clock(seconds) for seconds in (0, 20, 5.001, 7.28, 59.96, 3740)]
    assert shown == ["0:00", "0:20", "0:05", "0:07.3", "1:00", "1:02:20"]


class Browser:
    """A session with headless Chromium (W3C WebDriver; `goog` is Chromium's own)."""

    FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync " \
        "--disable-background-networking --disable-component-update " \
        "--autoplay-policy=no-user-gesture-required --user-data-dir="

    def __init__(self, port, profile):
        self.address = f"http://127.0.0.1:{port}/session"
        options = {"binary": shutil.which("chromium"), "args": f"{self.FLAGS}{profile}".split()}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.address += "/" + self.call("", capabilities={"alwaysMatch": wanted})["sessionId"]

    def call(self, path, method="POST", **body):
        request = Request(self.address + path, json.dumps(body).encode(), method=method)
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def script(self, code):
        """What the body of an async function returns."""
        return self.call("/execute/sync", script=f"return (async () => {{ {code} }})()", args=[])

    def type(self, selector, text):
        (element,) = self.call("/element", using="css selector", value=selector).values()
        self.call(f"/element/{element}/value", text=text)

    def devtools(self, command, **parameters):
        self.call("/goog/cdp/execute", cmd=command, params=parameters)

    def errors(self):
        return [e["message"] for e in self.call("/se/log", type="browser") if e["level"] != "INFO"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Debian's chromium and chromium-driver")
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        ready = next(line for line in driver.stdout if "successfully" in line)
        browser = Browser(re.search(r"port (\d+)", ready)[1], tmp_path_factory.mktemp("profile"))
        yield browser
        browser.call("", "DELETE")
    finally:
        driver.terminate()
        driver.wait()


def test_the_page_in_a_browser(evaluation, browser):
    phone = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.devtools("Emulation.setDeviceMetricsOverride", **phone)
    browser.call("/url", url=(evaluation.folder / "page.html").as_uri())
    # Nothing from outside becomes markup, or is fetched; controls have names, no id is there twice.
    assert browser.script("""
        const named = [...document.querySelectorAll("audio, figure svg, input, [tabindex]")];
        const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
        return document.title == "A <b>page</b>" && !document.querySelector("img, i, b, [onerror]")
            && !performance.getEntriesByType("resource").length && ids.length == new Set(ids).size
            && named.every((element) => element.ariaLabel || element.labels.length);
    """)
    # The filter shows the queries that hold every word, and the groups that hold such queries.
    count = "return document.querySelectorAll('.query:not([hidden])').length + shown.textContent"
    assert browser.script(count) == "6060 of 60 queries shown"
    browser.type("#filter", "7 BELL")
    assert re.match(r"([1-9])\1 of 60", browser.script(count))  # bell 7, bell 17 and bell 27
    browser.type("#filter", " nonsense")
    assert browser.script("return document.querySelectorAll('.group:not([hidden])').length") == 0
    assert browser.script("""  // sounds play, one at a time
        filter.value = ""; show();
        const query = document.querySelector(".query");
        await new Promise((done) => { query.ontoggle = done; query.open = true; });
        const [first, second] = query.querySelectorAll("audio");
        await first.play(); await second.play();
        await new Promise((done) => { second.ontimeupdate = done; });
        return first.paused && Math.abs(second.duration - 1.5) < 0.2;
    """)
    assert browser.script("return document.documentElement.scrollWidth") <= 390  # the phone's
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    browser.devtools("Emulation.setEmulatedMedia", features=[dark])
    assert "rgb(20, 24, 28)" in browser.script("return getComputedStyle(document.body).background")
    assert browser.errors() == []
