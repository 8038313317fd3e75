"""A session with headless Chromium, for pages that are tried as people use them."""

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-sync", "--disable-background-networking", "--disable-component-update",
    "--autoplay-policy=no-user-gesture-required",
)
PHONE = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}


class Browser:
    """A session of chromedriver (W3C WebDriver; what is named goog is Chromium's own)."""

    def __init__(self, port: str, profile: Path):
        self.address = f"http://127.0.0.1:{port}/session"
        options = {
            "binary": shutil.which("chromium"),
            "args": [*FLAGS, f"--user-data-dir={profile}"],
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.call("", capabilities={"alwaysMatch": wanted})
        self.address += "/" + session["sessionId"]

    def call(self, path: str, method: str = "POST", **body):
        request = Request(self.address + path, json.dumps(body).encode(), method=method)
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self.call("/url", url=url)

    def script(self, code: str):
        """Run the body of an async function in the page; returns what it returns."""
        return self.call("/execute/sync", script=f"return (async () => {{ {code} }})()", args=[])

    def type(self, selector: str, text: str) -> None:
        (element,) = self.call("/element", using="css selector", value=selector).values()
        self.call(f"/element/{element}/value", text=text)

    def devtools(self, command: str, **parameters) -> None:
        self.call("/goog/cdp/execute", cmd=command, params=parameters)

    def be_a_phone(self) -> None:
        self.devtools("Emulation.setDeviceMetricsOverride", **PHONE)

    def be_dark(self) -> None:
        dark = {"name": "prefers-color-scheme", "value": "dark"}
        self.devtools("Emulation.setEmulatedMedia", features=[dark])

    def errors(self) -> list[str]:
        """Return what the pages wrote to the console since the last call, but for notes."""
        lines = self.call("/se/log", type="browser")
        return [line["message"] for line in lines if line["level"] != "INFO"]


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Start Chromium; the test is skipped where it is not installed."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Debian's chromium and chromium-driver")
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        ready = next(line for line in driver.stdout if "successfully" in line)
        browser = Browser(re.search(r"port (\d+)", ready)[1], profile)
        yield browser
        browser.call("", "DELETE")
    finally:
        driver.terminate()
        driver.wait()
