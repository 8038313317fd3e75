"""The pages in a real browser: headless Chromium, spoken to over the WebDriver protocol.

They are opened, read, typed into and played; any error in the browser's console fails the test.
"""

import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.request

import numpy as np
import pytest
import soundfile
import torch

from dualenc.audio import SAMPLE_RATE
from dualenc.document import Players, write_document
from dualenc.evaluation import evaluate
from dualenc.index import SoundIndex
from dualenc.layouts import Clip, Split
from dualenc.model import DualEncoder
from dualenc.page import write_evaluation
from dualenc.serve import Server

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
)
TAB, ENTER = "\ue004", "\ue007"  # WebDriver's
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("needs Debian's chromium and chromium-driver", allow_module_level=True)


class Browser:
    """One WebDriver session (W3C WebDriver; `goog/` is Chromium's own)."""

    def __init__(self, port, profile):
        self.address = f"http://127.0.0.1:{port}/session"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.call("", {"capabilities": {"alwaysMatch": wanted}})
        self.address += f"/{session['sessionId']}"

    def call(self, path, body=None, method="POST"):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url):
        self.call("/url", {"url": url})

    def script(self, code, *arguments):
        return self.call("/execute/sync", {"script": code, "args": arguments})

    def type(self, selector, text):
        found = self.call("/element", {"using": "css selector", "value": selector})
        (element,) = found.values()
        self.call(f"/element/{element}/value", {"text": text})

    def devtools(self, command, **parameters):
        return self.call("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def errors(self):
        log = self.call("/se/log", {"type": "browser"})
        return [entry["message"] for entry in log if entry["level"] in ("SEVERE", "WARNING")]

    def wait(self, code, seconds=10):
        """The first true value of an expression."""
        end = time.monotonic() + seconds
        while not (value := self.script(f"return {code}")):
            assert time.monotonic() < end, f"{code} stayed {value!r}; console: {self.errors()}"
            time.sleep(0.05)
        return value


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(200):  # 20 s
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        browser = Browser(port, tmp_path_factory.mktemp("profile"))
        yield browser
        browser.call("", method="DELETE")
    finally:
        driver.terminate()
        driver.wait()


def write_tone(path, seconds, step=0.05):
    waveform = 0.3 * np.sin(np.arange(round(seconds * SAMPLE_RATE)) * step)
    soundfile.write(path, waveform, SAMPLE_RATE, format="WAV")


EVIL = 'a" onerror="x <script>document.title = 1<!-- #%41.wav'


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Ten clips with two captions each: every group of the page shows all 20 queries."""
    folder = tmp_path_factory.mktemp("clips")
    clips = []
    for i, name in enumerate([EVIL, *(f"clip {i}.wav" for i in range(1, 10))]):
        write_tone(folder / name, 1.5, 0.02 * (i + 1))
        word = "<img src=x> thunder" if i == 0 else "rain"
        clips.append(Clip(name, folder / name, (f"{word} number {i}", f"{word} again, {i}")))
    return Split("evil & co/test", clips, [], "folder")


@pytest.fixture(scope="module")
def page(split, tmp_path_factory):
    unit = torch.nn.functional.normalize
    torch.manual_seed(0)
    audio = unit(torch.randn(10, 16), dim=1)
    text = unit(audio[split.clip_of_caption] + 0.3 * torch.randn(20, 16), dim=1)
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_evaluation(path, evaluate("A <b>page</b>", split, audio, text))
    return path


def play(browser, player):
    browser.script(f"{player}.play()")
    return browser.wait(f"{player}.currentTime")


PHONE = {"width": 360, "height": 700, "deviceScaleFactor": 2, "mobile": True}
SHOWN = "[...document.querySelectorAll('.query')].filter(query => query.offsetParent).length"


def test_the_evaluation_page_filters_and_plays(browser, page):
    browser.open(page.as_uri())
    count = "document.getElementById('shown').textContent"
    assert browser.wait(count) == "80 of 80 queries shown"
    assert browser.wait(SHOWN) == 80
    browser.type("#filter", "AGAIN thunder")
    assert browser.wait(count) == "4 of 80 queries shown"  # one query, in each of the four groups
    assert browser.wait(SHOWN) == 4
    browser.type("#filter", " nonsense")
    assert browser.wait(count) == "0 of 80 queries shown"
    assert browser.script("return [...document.querySelectorAll('.group')].every(g => g.hidden)")
    browser.script("const f = document.querySelector('#filter'); f.value = ''; "
                   "f.dispatchEvent(new Event('input')); document.querySelector('.query').open = 1")
    players = browser.wait("document.querySelectorAll('.query[open] audio').length")
    assert players == 10
    first, second = (f"document.querySelectorAll('.query[open] audio')[{i}]" for i in (0, 1))
    play(browser, first)
    assert browser.script(f"return {first}.duration") == pytest.approx(1.5, abs=0.2)
    play(browser, second)
    assert browser.script(f"return {first}.paused"), "one sound at a time"
    assert browser.errors() == []


def test_nothing_from_outside_becomes_markup_or_is_fetched(browser, page):
    browser.open(page.as_uri())
    assert browser.wait("document.title") == "A <b>page</b> on evil & co/test"
    count = "return arguments[0].map(tag => document.querySelectorAll(tag).length)"
    assert browser.script(count, ["script", "img", "b", "[onerror]"]) == [2, 0, 0, 0]
    # Its two scripts, the sounds' data and what plays them, are its own.
    names = browser.script("return [...document.querySelectorAll('.file')].map(e => e.textContent)")
    assert EVIL in names
    fetched = browser.script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in fetched if not name.startswith(("blob:", "data:"))] == []
    assert browser.errors() == []


def test_sounds_beyond_the_limit_are_linked(browser, split, tmp_path):
    clip = split.clips[0]
    path = tmp_path / "page.html"
    sounds = Players(path, room=100)
    write_document(path, "x", sounds.player(clip.path, "x"), sounds)
    assert sounds.embedded == []
    browser.open(path.as_uri())
    player = "document.querySelector('audio')"
    assert not browser.script(f"return {player}.getAttribute('src')").startswith("/")
    play(browser, player)
    assert browser.errors() == []


def test_the_page_can_be_read_on_a_phone_in_the_dark_and_without_a_mouse(browser, page):
    try:
        browser.devtools("Emulation.setDeviceMetricsOverride", **PHONE)
        browser.open(page.as_uri())
        # The groups' clips, and one query.
        browser.script("[...document.querySelectorAll('details')].slice(0, 2).map(d => d.open = 1)")
        assert browser.script("return document.documentElement.scrollWidth") <= 360
        paper = "return getComputedStyle(document.body).backgroundColor"
        colours = []
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            browser.devtools("Emulation.setEmulatedMedia", features=[feature])
            colours.append(browser.script(paper))
        assert colours == ["rgb(255, 255, 255)", "rgb(20, 24, 28)"]
        browser.type("body", TAB)
        assert browser.script("return document.activeElement.textContent") == "Skip to the queries"
        levels = browser.script(
            "return [...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])"
        )
        assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
        unnamed = (
            "return [...document.querySelectorAll('audio, figure svg, input, [tabindex]')]"
            ".filter(e => !e.ariaLabel && !(e.labels && e.labels.length)).length"
        )
        assert browser.script(unnamed) == 0
        twins = "const ids = [...document.querySelectorAll('[id]')].map(e => e.id); " \
                "return ids.length - new Set(ids).size"
        assert browser.script(twins) == 0
    finally:
        browser.devtools("Emulation.clearDeviceMetricsOverride")
        browser.devtools("Emulation.setEmulatedMedia", features=[])


LONG = f'{"long" * 20} "1" <b>.wav'


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    write_tone(folder / LONG, 35)
    write_tone(folder / "short.wav", 2)
    torch.manual_seed(0)
    model = DualEncoder.create("tiny", "random", ["a dog barks"])
    index = SoundIndex.build(model, sorted(folder.iterdir()))
    index.segments[2] = index.model.embed_text(["a dog barks"])[0]  # 0:20 to 0:30 matches best
    with Server(index) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server
        server.shutdown()


def test_the_search_page_plays_from_the_matching_segment(browser, server):
    browser.open(f"http://127.0.0.1:{server.server_port}/")
    assert browser.script("return document.activeElement.id") == "q"
    browser.script("document.getElementById('by').value = 'segment'")
    browser.type("#q", "a dog barks" + ENTER)
    first = browser.wait("document.querySelector('li')?.textContent")
    assert f"{LONG}, 0:20 to 0:30" in first and "above 50.0 % of the index" in first
    assert browser.script("return document.getElementById('q').value") == "a dog barks"
    assert browser.script("return document.getElementById('by').value") == "segment"
    player = "document.querySelector('audio')"
    assert play(browser, player) >= 20
    assert browser.script(f"return {player}.duration") == pytest.approx(35)
    browser.devtools("Emulation.setDeviceMetricsOverride", **PHONE)
    assert browser.script("return document.documentElement.scrollWidth") <= 360
    browser.devtools("Emulation.clearDeviceMetricsOverride")
    assert browser.errors() == []
