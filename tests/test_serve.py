"""The search server, byte by byte: what it gives out, and that it gives out nothing else."""

import http.client
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from dualenc import InputError
from dualenc.index import SoundIndex
from dualenc.model import DualEncoder
from dualenc.serve import MAX_SENTENCE, Server, byte_range


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    (folder / "secret.txt").write_text("secret")
    for i, name in enumerate(["a.wav", "b & <i>.wav"]):
        soundfile.write(folder / name, np.sin(np.arange(32_000) * 0.01 * (i + 1)), 32_000)
    torch.manual_seed(0)
    model = DualEncoder.create("tiny", "random", ["a dog barks"])
    index = SoundIndex.build(model, sorted(folder.glob("*.wav")))
    with Server(index) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server
        server.shutdown()


def ask(server, path, method="GET", host=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    host = host or f"127.0.0.1:{server.server_port}"
    connection.request(method, path, headers={"Host": host} | headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def test_it_listens_on_this_machine_only(server):
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(InputError, match=f"--port {server.server_port}: .*name another"):
        Server(server.index, server.server_port)


def test_the_page_lists_the_matches(server):
    status, headers, body = ask(server, "/?q=a+dog+%3Cb%3E&by=segment")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    text = body.decode()
    assert 'value="a dog &lt;b&gt;"' in text and "b &amp; &lt;i&gt;.wav" in text
    for match in server.index.search("a dog <b>", by="segment"):
        assert f'src="/sound/{match.number}"' in text and f"score {match.score:.3f}" in text
    assert "<audio" not in ask(server, "/")[2].decode()


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [("bytes=0-", 0, None), ("bytes=100-199", 100, 200), ("bytes=-50", -50, None),
     ("bytes=64000-99999999", 64_000, None)],
)
def test_a_range_of_a_sound(server, asked, start, stop):
    whole = server.index.path(0).read_bytes()
    status, headers, body = ask(server, "/sound/0", Range=asked)
    assert (status, body) == (206, whole[start:stop])
    first = start % len(whole)
    assert headers["Content-Range"] == f"bytes {first}-{first + len(body) - 1}/{len(whole)}"


def test_a_whole_sound(server):
    whole = server.index.path(1).read_bytes()
    for headers in ({}, {"Range": "bytes=0-1,5-9"}, {"Range": "lines=1-2"}, {"Range": "bytes=-"}):
        status, answer, body = ask(server, "/sound/1", **headers)
        assert (status, body) == (200, whole)
        assert answer["Accept-Ranges"] == "bytes" and "wav" in answer["Content-Type"]
    status, answer, body = ask(server, "/sound/1", method="HEAD")
    assert (status, body, answer["Content-Length"]) == (200, b"", str(len(whole)))


def test_a_range_beyond_the_end_by_hand(server):
    size = server.index.path(0).stat().st_size
    status, headers, _ = ask(server, "/sound/0", Range=f"bytes={size}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{size}")
    assert byte_range("bytes=5-", 5) == range(0)
    assert byte_range("bytes=-9", 5) == range(5)
    assert byte_range("bytes=2-3", 5) == range(2, 4)


@pytest.mark.parametrize(
    "path",
    ["/sound/2", "/sound/-1", "/sound/0/../../secret.txt", "/sound/0x0", "/sound/", "/secret.txt",
     "/../secret.txt", "/%2e%2e/secret.txt", "/sound/..%2fsecret.txt", "//etc/passwd",
     "/sound/99999999999999999999", "/index.json", "/sound/0%00"],
)
def test_it_serves_nothing_else(server, path):
    status, _, body = ask(server, path)
    assert status == 404 and b"secret" not in body


def test_what_is_no_address_is_a_bad_request(server):
    assert ask(server, "http://[")[0] == 400


def test_only_a_browser_that_breaks_off_is_passed_over(server, capsys):
    for error, said in ((ConnectionResetError(), False), (RuntimeError("odd"), True)):
        try:
            raise error
        except (ConnectionError, RuntimeError):
            server.handle_error(None, ("127.0.0.1", 1))
        assert ("odd" in capsys.readouterr().err) == said


def test_a_page_elsewhere_cannot_ask(server):
    # DNS rebinding: a foreign name that has come to mean this machine.
    for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1"):
        assert ask(server, "/?q=a", host=host)[0] == 421
    assert ask(server, "/", host=f"localhost:{server.server_port}")[0] == 200
    assert ask(server, "/", method="POST")[0] == 501
    assert ask(server, "/?q=" + "a" * (MAX_SENTENCE + 1))[0] == 400
    assert ask(server, "/?q=a&by=magic")[0] == 400


def test_a_forged_index_leads_nowhere(server):
    index = SoundIndex(server.index.model, server.index.root)
    for name in ("names", "files", "embeddings", "segments"):
        setattr(index, name, getattr(server.index, name).copy())
    forged = os.fsencode("../../../../../../../../../etc/passwd.wav")
    index.names = np.frombuffer(forged + b"/etc/passwd.wav", np.uint8)
    index.files["name_end"] = [len(forged), len(index.names)]
    with pytest.raises(InputError, match="names a file outside of"):
        index.path(0)
    index.root = Path("/etc")  # a forged root, and a name below it
    index.names = np.frombuffer(b"passwdshadow", np.uint8)
    index.files["name_end"] = [6, 12]
    with pytest.raises(InputError, match="passwd: the index names what is no sound file"):
        index.path(0)
    with Server(index) as other:
        threading.Thread(target=other.serve_forever).start()
        assert [ask(other, f"/sound/{i}")[0] for i in (0, 1)] == [404, 404]
        other.shutdown()
