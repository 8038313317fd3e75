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

from dualenc import search
from dualenc.audio import SAMPLE_RATE
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
