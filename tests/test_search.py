"""The index against embed_audio and a plain sort; updating, damage, other checkpoints; commands."""

import io
import json
import os
import re
import socket
import sys

import numpy as np
import pytest
import soundfile
import torch

from dualenc import InputError, search, sounds
from dualenc.audio import SAMPLE_RATE, SEGMENT_SAMPLES, cut
from dualenc.decoding import decode
from dualenc.index import SoundIndex
from dualenc.model import DualEncoder

CAPTIONS = ["a dog barks", "rain falls on a roof", "a car passes"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DualEncoder.create("tiny", "random", CAPTIONS)


def write(path, seconds, seed=0, rate=SAMPLE_RATE):
    rng = np.random.default_rng(seed)
    tone = np.sin(np.arange(round(seconds * rate)) * rng.uniform(0.01, 1))
    path = os.fsencode(path)
    soundfile.write(path, 0.5 * tone * rng.uniform(0.2, 1), rate, format="WAV", subtype="PCM_16")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "sounds"
    (folder / "deep").mkdir(parents=True)
    for i, name in enumerate(["a.wav", "b.wav", "deep/c.wav"]):
        write(folder / name, 1 + i, seed=i)
    return folder


def build(model, folder):
    return SoundIndex.build(model, sounds.sounds_below(folder)[0], folder)


def names(index):
    return [os.path.relpath(index.path(i), index.root) for i in range(len(index))]


# --- Embedding ---


def test_a_clip_embeds_as_embed_audio_does(model, folder):
    write(folder / "long.wav", 25.5, seed=9, rate=22_050)
    index = build(model, folder)
    expected = model.embed_audio([index.path(i) for i in range(len(index))])
    assert names(index) == ["a.wav", "b.wav", "deep/c.wav", "long.wav"]
    assert index.embeddings.dtype == np.float32
    np.testing.assert_allclose(index.embeddings, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("seconds", "segments", "end"), [(65.0, 7, 65.0), (30.05, 3, 30.0), (0.05, 1, 0.05)]
)
def test_all_of_a_file_is_covered(model, tmp_path, seconds, segments, end):
    write(tmp_path / "file.wav", seconds)
    index = build(model, tmp_path)
    whole = cut(decode(tmp_path / "file.wav"))
    assert len(index.segments) == len(whole) == segments
    own = model.embed_segments([whole])
    unit = torch.nn.functional.normalize
    np.testing.assert_allclose(index.segments, unit(own, dim=1), atol=1e-5)
    np.testing.assert_allclose(index.embeddings[0], unit(own.mean(0), dim=0), atol=1e-5)
    assert index.files["samples"][0] == round(end * SAMPLE_RATE)


def test_files_that_cannot_be_read_are_left_out_and_named(model, folder):
    (folder / "bad.wav").write_bytes(b"RIFF but not really")
    # Fails only in its second block, after segments of it were already embedded.
    samples = np.zeros(40 * SAMPLE_RATE, np.float32)
    samples[-5] = np.nan
    soundfile.write(folder / "nan.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    index = build(model, folder)
    assert names(index) == ["a.wav", "b.wav", "deep/c.wav"]
    assert len(index.faults) == 2
    assert "bad.wav" in index.faults[0] and "nan.wav" in index.faults[1]
    np.testing.assert_allclose(index.embeddings, model.embed_audio(
        [folder / "a.wav", folder / "b.wav", folder / "deep/c.wav"]), atol=1e-5)


def test_only_sounds_in_view_are_found(folder):
    (folder / ".hidden").mkdir()
    write(folder / ".hidden" / "x.wav", 1)
    write(folder / "._b.wav", 1)
    (folder / "notes.txt").write_text("x")
    found, others, faults = sounds.sounds_below(folder)
    assert [p.name for p in found] == ["a.wav", "b.wav", "c.wav"]
    assert others == {".txt": 1} and faults == []


# --- Searching ---


def with_vectors(model, segments, counts):
    """An index of given (S, D) segment vectors; a file's embedding is their normalised mean."""
    rows, start = [], 0
    for i, count in enumerate(counts):
        own = segments[start : start + count]
        mean = own.mean(0) / np.linalg.norm(own.mean(0))
        sound = sounds.Embedded(count * SEGMENT_SAMPLES, mean, own)
        rows.append((b"%03d.wav" % i, (0, 0), sound))
        start += count
    return SoundIndex(model, "/sounds", rows)


def random_units(rng, n, width):
    vectors = rng.standard_normal((n, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("by", ["file", "segment"])
def test_equals_sorting_every_score(model, by):
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 5, 150)
    width = model.config.embedding
    index = with_vectors(model, random_units(rng, counts.sum(), width), counts)
    queries = torch.from_numpy(random_units(rng, 70, width))  # more than one block of them
    found = index.nearest(queries, 10, by)
    starts = np.concatenate([[0], np.cumsum(counts)])
    for query, matches in zip(queries.numpy(), found, strict=True):
        own = [index.segments[a:b] @ query for a, b in zip(starts, starts[1:], strict=False)]
        scores = [s.max() for s in own] if by == "segment" else index.embeddings @ query
        order = np.argsort(-np.array(scores), kind="stable")[:10]
        assert [m.number for m in matches] == order.tolist()
        for match in matches:
            assert match.score == pytest.approx(scores[match.number], abs=1e-6)
            lower = np.mean([score < match.score - 1e-7 for score in scores])
            assert match.above == pytest.approx(lower)
            assert match.start == 10 * np.argmax(own[match.number])
            assert match.end == match.start + 10


def test_equal_scores_keep_the_order_of_files_and_count_as_not_lower(model):
    vectors = np.zeros((5, model.config.embedding), np.float32)
    vectors[[0, 2, 3, 4], 1] = 1  # four files alike
    vectors[1, 0] = 1  # the best
    index = with_vectors(model, vectors, [1] * 5)
    query = torch.zeros(1, model.config.embedding)
    query[0, 0], query[0, 1] = 0.8, 0.6
    (found,) = index.nearest(query, 5)
    assert [m.number for m in found] == [1, 0, 2, 3, 4]
    # By hand: 4 of 5 are below the best, none below the others, however many of them are shown.
    assert [m.above for m in found] == pytest.approx([0.8, 0, 0, 0, 0])
    assert [m.above for m in index.nearest(query, 2)[0]] == pytest.approx([0.8, 0])


def test_shares_are_exact(model):
    vectors = np.zeros((10, model.config.embedding), np.float32)
    vectors[:, 0] = np.linspace(1, 0.1, 10)
    vectors[:, 1] = np.sqrt(1 - vectors[:, 0] ** 2)
    query = torch.eye(model.config.embedding)[:1]
    (found,) = with_vectors(model, vectors, [1] * 10).nearest(query)
    assert [m.above for m in found] == [k / 10 for k in range(9, -1, -1)]


def test_an_index_of_nothing(model, folder, tmp_path):
    (folder / "notes.txt").write_text("x")
    (tmp_path / "bad.wav").write_bytes(b"x")
    empty = SoundIndex.build(model, [folder / "notes.txt", tmp_path / "bad.wav"])
    assert len(empty) == 0 and len(empty.faults) == 2
    assert empty.search("rain") == []
    empty.save(tmp_path / "index")
    with pytest.raises(InputError, match="not an index"):
        SoundIndex.load(tmp_path / "index", model)


def test_where_nothing_is_new_nothing_is_written(model, folder, tmp_path, monkeypatch):
    index = build(model, folder)
    (folder / "bad.wav").write_bytes(b"x")
    again = index.updated(sounds.sounds_below(folder)[0], tmp_path / "index")
    assert again is index and len(index.faults) == 1
    assert not (tmp_path / "index").exists()


def test_a_sound_finds_itself_where_it_lies_in_a_long_file(model, tmp_path):
    rng = np.random.default_rng(1)
    long = 0.1 * rng.standard_normal(45 * SAMPLE_RATE)
    long[20 * SAMPLE_RATE : 30 * SAMPLE_RATE] = np.sin(np.arange(SEGMENT_SAMPLES) * 0.05)
    soundfile.write(tmp_path / "long.wav", long, SAMPLE_RATE)
    write(tmp_path / "other.wav", 12, seed=5)
    query = tmp_path / "query.flac"
    soundfile.write(query, long[20 * SAMPLE_RATE : 30 * SAMPLE_RATE], SAMPLE_RATE)
    index = SoundIndex.build(model, [tmp_path / "long.wav", tmp_path / "other.wav"])
    best = index.search_like(query, by="segment")[0]
    assert (best.path.name, best.start, best.end) == ("long.wav", 20, 30)
    assert best.score == pytest.approx(1, abs=1e-3)
    tail = index.nearest(torch.from_numpy(index.segments[4:5]), by="segment")[0][0]
    assert (tail.start, tail.end) == (40, 45)  # the last segment ends with the file


# --- On disk ---


def test_what_is_loaded_is_what_was_saved(model, folder, tmp_path):
    write(folder / os.fsdecode(b"not utf-8 \xff\n.wav"), 1, seed=7)
    index = build(model, folder)
    index.save(tmp_path / "index")
    loaded = SoundIndex.load(tmp_path / "index", model)
    for name in ("embeddings", "segments", "files", "names"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(index, name))
    assert type(loaded.embeddings) is np.ndarray and not loaded.embeddings.flags.owndata
    assert loaded.root == folder
    assert loaded.search("a dog barks") == index.search("a dog barks")
    assert any(b"\xff\n" in os.fsencode(m.path) for m in loaded.search("rain"))
    assert all(m.path.exists() for m in loaded.search("rain"))


def test_a_folder_and_its_index_move_together(model, folder):
    build(model, folder).save(folder / ".dualenc-index")
    moved = folder.rename(folder.with_name("moved"))
    index = SoundIndex.load(moved / ".dualenc-index", model)
    assert index.path(0) == moved / "a.wav"


def test_only_new_and_changed_files_are_embedded(model, folder, tmp_path, monkeypatch):
    read = []
    decode_blocks = sounds.decode_blocks
    monkeypatch.setattr(
        sounds, "decode_blocks", lambda path: read.append(path.name) or decode_blocks(path)
    )
    monkeypatch.setattr("dualenc.index.begins", lambda path: True)  # it reads the first file, too
    place = tmp_path / "index"

    def update():
        read.clear()
        old = SoundIndex.load(place, model) if place.exists() else SoundIndex(model, folder)
        return old.updated(sounds.sounds_below(folder)[0], place)

    update()
    assert read == ["a.wav", "b.wav", "c.wav"]
    before = sorted(os.listdir(place))
    update()
    assert read == [] and sorted(os.listdir(place)) == before

    write(folder / "b.wav", 2, seed=50)
    os.utime(folder / "b.wav", (1, 1))  # an older time is a change, too
    (folder / "a.wav").unlink()
    write(folder / "new.wav", 2, seed=51)
    index = update()
    assert read == ["b.wav", "new.wav"]
    assert names(index) == ["b.wav", "deep/c.wav", "new.wav"]
    assert len(list(place.glob("*.npy"))) == 4  # the old generation is gone
    for other in (build(model, folder), SoundIndex.load(place, model)):
        np.testing.assert_allclose(index.embeddings, other.embeddings, atol=1e-6)
        assert names(index) == names(other)


def test_an_interrupted_update_keeps_what_was_saved(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("dualenc.index.SAVE_SECONDS", -1)  # due after the first file
    monkeypatch.setattr(sounds, "CHUNK_FILES", 1)
    decode_blocks = sounds.decode_blocks

    def interrupted(path):
        if path.name == "c.wav":
            raise KeyboardInterrupt
        return decode_blocks(path)

    monkeypatch.setattr(sounds, "decode_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SoundIndex(model, folder).updated(sounds.sounds_below(folder)[0], tmp_path / "index")
    saved = SoundIndex.load(tmp_path / "index", model)
    assert names(saved)[0] == "a.wav" and len(saved) < 3
    monkeypatch.undo()
    index = saved.updated(sounds.sounds_below(folder)[0], tmp_path / "index")
    np.testing.assert_allclose(index.embeddings, build(model, folder).embeddings, atol=1e-6)


def test_another_checkpoint_is_refused(model, folder, tmp_path):
    build(model, folder).save(tmp_path)
    torch.manual_seed(1)
    other = DualEncoder.create("tiny", "random", CAPTIONS)
    with pytest.raises(InputError, match="another checkpoint made this index.*built anew"):
        SoundIndex.load(tmp_path, other)
    model.save(tmp_path / "same.pt")
    assert len(SoundIndex.load(tmp_path, DualEncoder.load(tmp_path / "same.pt"))) == 3


def truncate(path):
    path.write_bytes(path.read_bytes()[:-4])


def pickled(path):
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def shorter(path):
    np.save(path, np.load(path)[:-1])


def backwards(path):
    files = np.load(path)
    files["segment_end"] = files["segment_end"][::-1]
    np.save(path, files)


@pytest.mark.parametrize(
    ("array", "damage"),
    [("embeddings", truncate), ("segments", pickled), ("embeddings", shorter), ("names", shorter),
     ("files", backwards), ("files", pickled)],
)
def test_a_damaged_index_is_refused_in_one_line(model, folder, tmp_path, array, damage):
    build(model, folder).save(tmp_path)
    damage(next(tmp_path.glob(f"{array}.*.npy")))
    with pytest.raises(InputError, match="is damaged or not an index.*built anew"):
        SoundIndex.load(tmp_path, model)


def test_a_header_cannot_lead_elsewhere(model, folder, tmp_path):
    build(model, folder).save(tmp_path)
    header = json.loads((tmp_path / "index.json").read_text())
    header["generation"] = "../" + header["generation"]
    (tmp_path / "index.json").write_text(json.dumps(header))
    with pytest.raises(InputError, match="is no generation"):
        SoundIndex.load(tmp_path, model)
    (tmp_path / "index.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="is damaged or not an index"):
        SoundIndex.load(tmp_path, model)
    with pytest.raises(InputError, match="holds no index"):
        SoundIndex.load(tmp_path / "nowhere", model)


# --- The command ---


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "best.pt"
    model.save(path)
    return path


@pytest.fixture
def command(monkeypatch, checkpoint):
    def call(*arguments):
        arguments = [*map(str, arguments), "--checkpoint", str(checkpoint), "--precision", "fp32"]
        monkeypatch.setattr(sys, "argv", ["search", *arguments])
        assert search.main() == 0

    return call


def test_the_table(command, folder, capsys, model):
    write(folder / "long.wav", 70, seed=3)
    (folder / "bad\x1b.wav").write_bytes(b"x")
    (folder / "talk.m4a").write_bytes(b"x")
    command("a dog barks", "--audio", folder, "--top", 3)
    out, err = capsys.readouterr()
    matches = SoundIndex.load(folder / search.INDEX_NAME, model).search("a dog barks", 3)
    lines = out.splitlines()
    assert len(lines) == 4
    for rank, (line, match) in enumerate(zip(lines[1:], matches, strict=True), start=1):
        assert line.split()[:3] == [f"{rank}.", f"{match.score:.3f}", f"{100 - 25 * rank:.1f}"]
        assert line.endswith(f"  {os.path.relpath(match.path, folder)}")
    assert "passed over: 1 .m4a" in err
    assert "left out:" in err and "bad\\x1b.wav" in err and "\x1b" not in err
    assert "index: 4 files" in err


def test_json_for_other_programs(command, folder, capsys):
    command("--like", folder / "b.wav", "--audio", folder, "--json", "--by", "segment")
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["query"] == str(folder / "b.wav")
    best = found["matches"][0]
    assert best["path"] == str(folder / "b.wav") and best["score"] == pytest.approx(1, abs=1e-4)
    assert (best["start"], best["end"]) == (0, 2)


def test_a_page_with_players(command, folder, tmp_path):
    write(folder / "long <i>.wav", 25, seed=3)
    out = tmp_path / "found.html"
    command("--like", folder / "long <i>.wav", "--audio", folder, "--html", out, "--top", 2)
    html = out.read_text()
    assert html.count("<audio") == 2 and "long &lt;i&gt;.wav" in html
    starts = re.findall(r'data-sound="\d" data-from="(.*?)"', html)
    assert len(starts) == 2 and starts[0] in ("", "#t=10", "#t=20") and starts[1] == ""


def test_sentence_after_sentence_without_audio(command, folder, tmp_path, capsys, monkeypatch):
    index = tmp_path / "index"
    command("a car", "--audio", folder, "--index", index)
    assert not (folder / search.INDEX_NAME).exists()
    capsys.readouterr()
    typed = io.BytesIO(b"a dog barks\n  \nrain\xff falls\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, encoding="utf-8"))
    command("--index", index, "--json")
    answered = [json.loads(line)["query"] for line in capsys.readouterr().out.splitlines()]
    assert answered == ["a dog barks", "rain\ufffd falls"]
    command(os.fsdecode(b"rain\xff"), "--index", index, "--json")
    assert json.loads(capsys.readouterr().out)["query"] == "rain?"


def test_another_tokenizer(command, folder, model, tmp_path, capsys):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(model.tokenizer.to_str())
    command("rain", "--audio", folder, "--json", "--tokenizer", tokenizer)
    assert len(json.loads(capsys.readouterr().out)["matches"]) == 3
    with pytest.raises(InputError, match="gone.json"):
        command("rain", "--audio", folder, "--tokenizer", tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a dog"], "--audio FOLDER, the sounds to search, is missing"),
        (["a dog", "--audio", "nowhere"], "nowhere: no such folder of sounds"),
        ([" ", "--audio", "."], "the sentence is empty"),
        (["a dog", "--like", "x.wav", "--audio", "."], "two queries"),
        (["--serve", "--json", "--audio", "."], "--serve takes no query"),
        (["--html", "x.html", "--audio", "."], "--html needs a sentence or --like"),
        (["a dog", "--audio", "empty"], "no sound file below it that can be read"),
        (["a dog", "--audio", "sounds", "--index", "of-other"], "is the index of .*empty"),
        (["a dog", "--audio", "sounds", "--index", "file/index"], "cannot be written.*--index"),
        (["--like", "file", "--audio", "sounds"], "file: cannot be decoded"),
        (["--like", "gone.wav", "--audio", "sounds"], "--like gone.wav: no such file"),
        (["a dog", "--audio", "sounds", "--html", "file/x.html"], "x.html: .*file is no folder"),
        (["a dog", "--audio", "sounds", "--html", "empty"], "empty: is a folder"),
        (["a dog", "--audio", "sounds", "--top", "0"], "argument --top"),
        (["a dog", "--audio", "sounds", "--by", "word"], "argument --by"),
        (["a dog", "--audio", "sounds", "--device", "gpu"], "--device gpu"),
        (["--serve", "--audio", "sounds", "--port", "70000"], "argument --port"),
    ],
)
def test_bad_input_is_one_line(command, folder, tmp_path, monkeypatch, model, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not a sound")
    index = build(model, folder)
    index.root = tmp_path / "empty"
    index.save(tmp_path / "of-other")
    with pytest.raises(InputError, match=message) as error:
        command(*arguments)
    assert "\n" not in str(error.value)
    assert not (folder / search.INDEX_NAME).exists()  # before the folder is embedded


def test_a_port_that_is_taken_is_told_before_the_folder_is_embedded(command, folder):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: .*name another"):
            command("--serve", "--port", port, "--audio", folder)
    assert not (folder / search.INDEX_NAME).exists()
