"""Search: the index against plain products, what is new and changed, the command."""

import io
import json
import os
import re
import socket
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CAPTIONS, noise, write_wav

from dualenc import DualEncoder, audio, decoding, search
from dualenc.errors import InputError
from dualenc.search import File, SoundIndex


@pytest.fixture
def folder(tmp_path):
    """Three sounds, one of them in a folder below."""
    for seed, name in enumerate(["a.wav", "b.wav", "deep/c.wav"]):
        write_wav(tmp_path / "sounds" / name, noise(1 + seed, seed))
    return tmp_path / "sounds"


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_all_of_a_file_is_embedded_as_by_the_model(tiny_model, tmp_path):
    ends = {"a.wav": 0.05, "b.wav": 12.5, "c.wav": 30.0, "d.wav": 31.0}
    for seed, (name, seconds) in enumerate(ends.items()):
        write_wav(tmp_path / name, noise(30.05 if seconds == 30 else seconds, seed))
    index = SoundIndex.build(tiny_model, tmp_path)
    assert index.names == list(ends)
    parts = index.shares.split([1, 2, 3, 4])
    for (name, end), shares in zip(ends.items(), parts, strict=True):
        segments = audio.to_segments([decoding.load_audio(tmp_path / name)])[0]
        own = tiny_model.project_segments(segments).detach()
        close(F.normalize(shares, dim=1), F.normalize(own, dim=1))
        close(shares.sum(dim=0), F.normalize(own.mean(dim=0), dim=0))
        assert index.files[name].seconds == pytest.approx(end)
    close(parts[1].sum(dim=0), tiny_model.embed_audio(tmp_path / "b.wav")[0])
    tail = index.nearest(F.normalize(parts[1][1], dim=0), by="segment")[0]
    assert (tail.path.name, tail.start, tail.end) == ("b.wav", 10, 12.5)
    (match,) = SoundIndex.build(tiny_model, [tmp_path / "a.wav"]).search("rain")  # no folder
    assert match.path == tmp_path / "a.wav" and match.above == 0


def with_segments(model, root, segments, counts):
    """An index of (S, D) segments of any norm; count of them belong to a file each."""
    shares = [own / own.sum(dim=0).norm() for own in torch.as_tensor(segments).split(counts)]
    files = {f"{i:03}": File([], 10.0 * n, n, "") for i, n in enumerate(counts)}
    return SoundIndex(model, root, files, torch.cat(shares))


@pytest.mark.parametrize("by", ["file", "segment"])
def test_equals_sorting_every_score(tiny_model, tmp_path, by):
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 5, 150).tolist()
    width = tiny_model.config.embedding
    segments = rng.standard_normal((sum(counts), width)).astype(np.float32)
    index = with_segments(tiny_model, tmp_path, segments, counts)
    query = rng.standard_normal(width).astype(np.float32)
    query /= np.linalg.norm(query)
    parts = np.split(segments.astype(float), np.cumsum(counts)[:-1])
    cosines = [part @ query / np.linalg.norm(part, axis=1) for part in parts]
    whole = [part.mean(axis=0) @ query / np.linalg.norm(part.mean(axis=0)) for part in parts]
    scores = np.array([own.max() for own in cosines] if by == "segment" else whole)
    order = np.argsort(-scores)[:10]
    found = index.nearest(torch.from_numpy(query), 10, by)
    assert [int(match.path.name) for match in found] == order.tolist()
    for match, i in zip(found, order, strict=True):
        assert match.score == pytest.approx(scores[i], abs=1e-5)
        assert match.above == pytest.approx(np.mean(scores < scores[i]))
        assert match.start == 10 * np.argmax(cosines[i]) and match.end == match.start + 10


def test_equal_scores_keep_the_order_of_files_and_count_as_not_lower(tiny_model, tmp_path):
    segments = torch.zeros(5, tiny_model.config.embedding)
    segments[[0, 2, 3, 4], 1] = 1  # four files alike
    segments[1, 0] = 1  # the best
    index = with_segments(tiny_model, tmp_path, segments, [1] * 5)
    query = torch.zeros(tiny_model.config.embedding)
    query[:2] = torch.tensor([0.8, 0.6])
    for k, order in ((9, [1, 0, 2, 3, 4]), (2, [1, 0])):
        found = index.nearest(query, k)
        assert [int(match.path.name) for match in found] == order
        # By hand: 4 of 5 are below the best, none below the others, however many are shown.
        assert [match.above for match in found] == pytest.approx([0.8, 0, 0, 0, 0][:k])
    with pytest.raises(InputError, match="k=0"):
        index.nearest(query, 0)


def test_only_new_and_changed_files_are_embedded(tiny_model, folder, tmp_path, monkeypatch):
    read, stream_audio, interruptions = [], decoding.stream_audio, [KeyboardInterrupt]

    def stream(path, faults):
        read.append(path.name)
        if path.name == "cut.wav" and interruptions:
            raise interruptions.pop()
        return stream_audio(path, faults)

    def update():
        read.clear()
        return SoundIndex.build(tiny_model, folder, tmp_path / "index")

    monkeypatch.setattr(decoding, "stream_audio", stream)
    monkeypatch.setattr(search, "SAVE_SECONDS", -1)  # due after every file
    bad = folder / os.fsdecode(b"bad \xff\n.wav")  # no UTF-8
    bad.write_bytes(b"no sound")
    whole = write_wav(folder / "cut.wav", noise(3))
    whole.write_bytes(whole.read_bytes()[:64_044])
    (folder / "gone.wav").symlink_to(folder / "nowhere")
    with pytest.raises(KeyboardInterrupt):
        update()
    assert read == ["a.wav", "b.wav", bad.name, "cut.wav"]
    update()  # goes on
    assert read == ["cut.wav", "c.wav", "gone.wav"]
    index = update()
    assert read == []  # what could not be read is remembered, too
    assert "cannot be read as a sound" in index.files[bad.name].fault
    assert "no such file" in index.files["gone.wav"].fault
    assert "cut off: 1.0 s of 3.0 s" in index.files["cut.wav"].fault
    assert index.names == ["a.wav", "b.wav", "cut.wav", "deep/c.wav"]

    os.utime(write_wav(folder / "b.wav", noise(2, 50)), (1, 1))  # older is a change, too
    (folder / "a.wav").unlink()
    write_wav(bad, noise(2, 51))
    index = update()
    assert sorted(read) == ["b.wav", bad.name]
    plain = SoundIndex.build(tiny_model, folder)
    for other in (plain, SoundIndex.load(tmp_path / "index", tiny_model, folder)):
        assert other.names == index.names == ["b.wav", bad.name, "cut.wav", "deep/c.wav"]
        close(other.shares, index.shares)
    assert all(match.path.exists() for match in index.search("rain"))
    bad.unlink()
    assert update().names == ["b.wav", "cut.wav", "deep/c.wav"] and read == []


def test_an_index_of_another_model_or_folder_is_refused(tiny_model, folder, tmp_path):
    SoundIndex.build(tiny_model, folder, folder / search.INDEX_NAME)
    moved = folder.rename(tmp_path / "it's moved")  # with the index in it
    index = moved / search.INDEX_NAME
    assert len(SoundIndex.load(index, tiny_model, moved).names) == 3
    other = DualEncoder.create("tiny", "random", CAPTIONS)
    for model, root in ((other, moved), (tiny_model, tmp_path)):
        with pytest.raises(InputError, match="of another checkpoint or folder.*rm -r '"):
            SoundIndex.load(index, model, root)
    (index / "index").write_bytes((index / "index").read_bytes()[:-4000])
    with pytest.raises(InputError, match="or damaged"):
        SoundIndex.build(tiny_model, moved, index)


@pytest.fixture
def command(monkeypatch, tmp_path, tiny_model):
    torch.save(tiny_model.checkpoint(), tmp_path / "best.pt")

    def call(*arguments):
        options = ["--checkpoint", str(tmp_path / "best.pt"), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["search", *options, *map(str, arguments)])
        search.main()

    return call


def test_the_command(command, folder, tmp_path, capsys, monkeypatch):
    write_wav(tmp_path / "elsewhere" / "d.wav", noise(1, 8))
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "deep" / "up").symlink_to(folder)  # each folder is searched once
    (folder / "bad\x1b.wav").write_bytes(b"x")
    command("--audio", folder, "--", "-a dog barks")
    out, err = capsys.readouterr()
    assert re.findall(r"^ +(\d)\. +-?0\.\d{3} +([\d.]+)%", out, re.M) == [
        ("1", "75.0"), ("2", "50.0"), ("3", "25.0"), ("4", "0.0")
    ]
    assert re.findall(r"0:00 to 0:02  (.*)", out) == ["b.wav"] and "link/d.wav" in out
    assert "4 files; index in" in err and "1 could not be read" in err and "--list-faults" in err

    command("--audio", folder, "--list-faults")
    assert re.match(r"bad\\x1b.wav: cannot be read as a sound \(.*\)\n$", capsys.readouterr().out)

    like = folder / "b.wav"
    command("--like", like, "--audio", folder, "--json", "--by", "segment", "--top", 2)
    found = json.loads(capsys.readouterr().out)
    assert found["query"] == str(like) and len(found["matches"]) == 2
    best = found["matches"][0]
    assert best["path"] == str(like) and best["score"] == pytest.approx(1, abs=1e-4)
    assert (best["start"], best["end"]) == (0, 2)

    typed = io.BytesIO(b"rain\r\n ?! \nrain\n  rain\xff falls ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, encoding="utf-8", newline=""))
    command("--audio", folder, "--json")
    out, err = capsys.readouterr()
    first, second, third = map(json.loads, out.splitlines())
    assert first == second and first["query"] == "rain" and third["query"] == "rain\ufffd falls"
    assert "'?!': no word is left" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a dog", "--audio", "nowhere"], "nowhere: no such folder of sounds"),
        (["?! ", "--audio", "sounds"], "no word is left"),
        (["-bark", "--audio", "sounds"], "begins with a dash goes after --"),
        (["a dog", "--serve", "--audio", "sounds"], "not allowed with"),
        (["a dog", "--audio", "empty"], "no sound file that can be read: none"),
        (["a dog", "--audio", "bad"], "no sound file that can be read: x.wav: .*as a sound"),
        (["a dog", "--audio", "sounds", "--index", "file"], "cannot be written"),
        (["--like", "file", "--audio", "sounds"], "file: cannot be read as a sound"),
        (["--serve", "--audio", "sounds", "--port", "{taken}"], "--port.*name another"),
    ],
)
def test_bad_input_is_one_line(command, folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("file", "empty/file", "bad/x.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no sound")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=message) as error:
            command(*(argument.format(taken=port) for argument in arguments))
    assert "\n" not in str(error.value)
    assert not (folder / search.INDEX_NAME).exists()  # before the folder is embedded
