"""One self-contained HTML document: its style, its script, and the sounds that it plays.

It needs no network and no other file, but for sounds beyond a size limit, which it links by
relative path. Whatever comes from outside (captions, file names) is escaped.
"""

import base64
import io
import json
import math
import os
import urllib.parse
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np
import soundfile

from dualenc import InputError, replacing
from dualenc.audio import SAMPLE_RATE
from dualenc.decoding import decode
from dualenc.index import Match

EMBEDDED_BYTES = 25 * 2**20  # of sounds in one document; in base64 they take a third more
MP3_BYTES_PER_SECOND = 6000  # of 32 kHz mono: what is estimated before a sound is decoded


class Players:
    """The players of one document, and the sounds that it holds for them.

    Args:
        page: where the document will lie; sounds that it does not hold are linked from there.
        room: bytes of sound that it may hold.
    """

    def __init__(self, page: Path, room: int = EMBEDDED_BYTES):
        self.folder, self.room = os.path.abspath(page.parent), room
        self.embedded: list[str] = []  # base64
        self._number: dict[Path, int | None] = {}

    def player(self, path: Path, label: str, start: float = 0, seconds: int | None = None) -> str:
        """An <audio> of a file that starts at a second; of long files perhaps only the beginning.

        Args:
            seconds: how much of the file is wanted; None wants all of it.
        """
        if path not in self._number:
            self._number[path] = self._embed(path, seconds)
        number, begin = self._number[path], start_at(start)
        if number is not None:
            return audio(label, f'data-sound="{number}" data-from="{begin}"')
        relative = os.fsencode(os.path.relpath(path, self.folder))
        return audio(label, f'src="{urllib.parse.quote(relative)}{begin}"')

    def _embed(self, path: Path, seconds: int | None) -> int | None:
        """The sound's number among those embedded; None where there is no room left, or no sound.

        A file may be gone, or damaged, since it was indexed.
        """
        try:
            duration = soundfile.info(os.fsencode(path)).duration
            if min(duration, seconds or duration) * MP3_BYTES_PER_SECOND > self.room:
                return None
            data = _mp3(decode(path, seconds and seconds * SAMPLE_RATE))
        except (soundfile.LibsndfileError, InputError):
            return None
        if len(data) > self.room:
            return None
        self.room -= len(data)
        self.embedded.append(base64.b64encode(data).decode())
        return len(self.embedded) - 1


def _mp3(waveform: np.ndarray) -> bytes:
    """What every browser plays."""
    file = io.BytesIO()
    soundfile.write(file, waveform, SAMPLE_RATE, format="MP3", compression_level=0.5)
    return file.getvalue()


def audio(label: str, source: str) -> str:
    """A player; source is the attributes that say what it plays."""
    return f'<audio controls preload="none" aria-label="{escape(label)}" {source}></audio>'


def start_at(seconds: float) -> str:
    """A media fragment (W3C): where in a file the player starts."""
    return f"#t={seconds:g}" if seconds else ""


def clock(seconds: float) -> str:
    """Seconds, rounded up, as 0:20 or 1:02:20."""
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def percent(share: float) -> str:
    """A share from 0 to 1, rounded down: only all of it is 100 %."""
    return f"{int(1000 * share) / 10:.1f} %"


def match_list(matches: Sequence[Match], root: Path, player: Callable[[Match, str], str]) -> str:
    """The matches of one query as a list with players, which player(match, label) makes."""
    items = []
    for match in matches:
        name = os.path.relpath(match.path, root)
        where = f"{clock(match.start)} to {clock(match.end)}"
        items.append(
            f'<li><span class="file">{escape(name)}</span>, <span class="where">{where}</span>\n'
            f"{player(match, f'{name} from {clock(match.start)}')}\n"
            f'<p class="caption">score {match.score:.3f}, above {percent(match.above)} of the '
            "index</p></li>"
        )
    return '<ol class="clips">\n' + "\n".join(items) + "\n</ol>"


def document(title: str, body: str, players: Players | None = None) -> str:
    """A whole HTML document; with players it holds their sounds, and the script."""
    here = Path(__file__)
    script = ""
    if players is not None:
        script = (
            f'<script type="application/json" id="sounds">{json.dumps(players.embedded)}</script>\n'
            f"<script>\n{here.with_suffix('.js').read_text()}</script>\n"
        )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{here.with_suffix(".css").read_text()}</style>
</head>
<body>
<main>
{body}
</main>
{script}</body>
</html>
"""


def write_document(path: Path, title: str, body: str, players: Players) -> None:
    with replacing(path) as temporary:
        # A file's name may hold bytes that are not UTF-8: they are shown as escapes.
        text = document(title, body, players)
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
