"""A page to type into, on this machine only: a text field, the sounds found, and players.

The server answers two addresses, and no others:

    /?q=SENTENCE&by=file    the page, with the matches of a sentence if there is one
    /sound/NUMBER           the file of that number in the index, or a range of its bytes

No path that a browser sends is ever looked up on disk, and a request under another host name than
this machine's own is refused, so that no web page elsewhere can read what is here.
"""

import mimetypes
import os
import re
import sys
import threading
import urllib.parse
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dualenc import InputError
from dualenc.document import audio, document, match_list, start_at
from dualenc.index import Match, SoundIndex

ADDRESS = "127.0.0.1"
TITLE = "Search sounds"
MAX_SENTENCE = 1000  # characters; only 32 tokens of them count
CHUNK_BYTES = 2**16
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; media-src 'self'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def serve(server: "Server") -> int:
    """Serve until Ctrl-C."""
    with server:
        print(f"http://{ADDRESS}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


class Server(ThreadingHTTPServer):
    """Answers for one index, which may be given to it after it has taken its port.

    Raises:
        InputError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, index: SoundIndex | None, port: int = 0):
        self.index = index
        self.searching = threading.Lock()  # the model is used by one thread at a time
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as error:
            raise InputError(f"--port {port}: {error.strerror}; name another") from error
        self.hosts = {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}

    def handle_error(self, request, client_address) -> None:
        """Say what went wrong, but not that a browser has broken off: browsers do."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def page(self, sentence: str, by: str) -> str:
        options = "".join(
            f'<option value="{value}"{" selected" if value == by else ""}>{label}</option>'
            for value, label in [("file", "whole files"), ("segment", "best moments")]
        )
        body = (
            f"<h1>{TITLE}</h1>\n"
            '<form action="/" role="search"><label for="q">A sound of</label>'
            f'<input id="q" name="q" type="search" value="{escape(sentence)}" required '
            f'placeholder="a dog barks, then a car passes" maxlength="{MAX_SENTENCE}"'
            f'{"" if sentence else " autofocus"}>'
            f'<label for="by">scored by</label><select id="by" name="by">{options}</select>'
            f'<button>Search</button></form>\n<p class="quiet">{len(self.index):,} files in '
            f"{escape(str(self.index.root))}</p>\n"
        )
        if not sentence:
            return document(TITLE, body)
        with self.searching:
            matches = self.index.search(sentence, by=by)
        found = match_list(matches, self.index.root, player)
        return document(f"{sentence} – {TITLE}", f"{body}<h2>Best matches</h2>\n{found}")


def player(match: Match, label: str) -> str:
    return audio(label, f'src="/sound/{match.number}{start_at(match.start)}"')


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "dualenc", ""
    timeout = 60  # seconds that a silent connection is kept
    server: Server

    def do_GET(self) -> None:
        try:
            self._answer()
        except (BrokenPipeError, ConnectionResetError):  # players break off what they do not need
            self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *arguments) -> None:
        """Nothing: the terminal is for what the user has to know."""

    def _answer(self) -> None:
        try:
            url = urllib.parse.urlsplit(self.path)
        except ValueError:  # such as an open bracket where a host would stand
            return self._refuse(HTTPStatus.BAD_REQUEST)
        sound = re.fullmatch(r"/sound/(\d{1,12})", url.path)
        if self.headers.get("Host") not in self.server.hosts:
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
        elif url.path == "/":
            self._send_page(urllib.parse.parse_qs(url.query))
        elif sound and int(sound[1]) < len(self.server.index):
            self._send_sound(int(sound[1]))
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def _send_page(self, query: dict[str, list[str]]) -> None:
        sentence, by = query.get("q", [""])[0].strip(), query.get("by", ["file"])[0]
        if len(sentence) > MAX_SENTENCE or by not in ("file", "segment"):
            return self._refuse(HTTPStatus.BAD_REQUEST)
        page = self.server.page(sentence, by).encode("utf-8", errors="backslashreplace")
        self._head(HTTPStatus.OK, "text/html; charset=utf-8", len(page))
        if self.command == "GET":
            self.wfile.write(page)

    def _refuse(self, status: HTTPStatus) -> None:
        text = f"{status.value} {status.phrase}\n".encode()
        self._head(status, "text/plain; charset=utf-8", len(text))
        if self.command == "GET":
            self.wfile.write(text)

    def _head(self, status: HTTPStatus, kind: str, length: int, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        for name, value in (HEADERS | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def _send_sound(self, number: int) -> None:
        try:
            path = self.server.index.path(number)
            file = open(path, "rb")
        except (InputError, OSError):
            return self._refuse(HTTPStatus.NOT_FOUND)  # removed since it was indexed
        with file:
            size = os.fstat(file.fileno()).st_size
            asked = byte_range(self.headers.get("Range", ""), size)
            span = range(size) if asked is None else asked
            if asked is not None and not asked:
                return self._head(
                    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "text/plain", 0,
                    Content_Range=f"bytes */{size}",
                )
            kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
            status, headers = HTTPStatus.OK, {"Accept_Ranges": "bytes"}
            if asked is not None:
                status = HTTPStatus.PARTIAL_CONTENT
                headers["Content_Range"] = f"bytes {span.start}-{span.stop - 1}/{size}"
            self._head(status, kind, len(span), **headers)
            if self.command == "GET":
                self._copy(file, span)

    def _copy(self, file, span: range) -> None:
        file.seek(span.start)
        left = len(span)
        while left and (data := file.read(min(left, CHUNK_BYTES))):
            self.wfile.write(data)
            left -= len(data)
        if left:  # the file has shrunk: what was promised cannot be kept
            self.close_connection = True


def byte_range(header: str, size: int) -> range | None:
    """The bytes that a Range header asks for; None where it is none that is understood.

    An empty range cannot be satisfied.
    """
    asked = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", header)
    if not asked or asked[1] == asked[2] == "":
        return None
    if asked[1] == "":  # the last so many
        return range(max(0, size - int(asked[2])), size)
    last = int(asked[2]) if asked[2] else size - 1
    return range(int(asked[1]), min(last + 1, size))
