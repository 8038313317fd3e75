"""What lies on disk -> splits -> waveforms -> batches, and what is said where it does not fit."""

import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import CAPTIONS, noise, write_csv, write_folder, write_wav

from dualenc import data, decoding
from dualenc.audio import SEGMENT_SAMPLES
from dualenc.data import PairBatches, decode_splits, read_split, training_splits, was_seen
from dualenc.decoding import load_audio, to_int16
from dualenc.errors import InputError
from dualenc.text import train_bpe

CLOTHO = ["file_name", *(f"caption_{i}" for i in range(1, 6))]
AUDIOCAPS = ["audiocap_id", "youtube_id", "start_time", "caption"]


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


# --- Layouts ---


@pytest.mark.parametrize("root", ["CLOTHO_v2.1", "clotho", "."])
@pytest.mark.parametrize(("table", "folder"), [
    ("clotho_csv_files/clotho_captions_evaluation.csv", "clotho_audio_files/evaluation"),
    ("clotho_captions_evaluation.csv", "evaluation"),
    ("csv_files/test.csv", "waveforms/test"),
])
def test_clotho(tmp_path, root, table, folder):
    rows = [["a b.wav", *"12345"], ["c.wav", *"67890"], ["gone.wav", *"abcde"]]
    write_csv(tmp_path / root / table, CLOTHO, rows)
    touch(*(tmp_path / root / folder / name for name in ("a b.wav", "c.wav")))
    split = read_split("clotho", "test", tmp_path)
    assert split.name == "clotho/evaluation" and split.missing == ["gone.wav"]
    assert [clip.captions for clip in split.clips] == [tuple("12345"), tuple("67890")]
    assert split.clip_of_caption == [0] * 5 + [1] * 5 and "1 more are not on disk" in str(split)


@pytest.mark.parametrize(("table", "folder"), [
    ("AUDIOCAPS/csv_files_v1/test.csv", "AUDIOCAPS/audio_32000Hz/test"),
    ("audiocaps/test.csv", "audiocaps/test"),
    ("AUDIOCAPS/csv_files_v2/test.csv", "AUDIOCAPS/audio_32000Hz/test"),  # AudioCaps 2.0 alone
])
@pytest.mark.parametrize("name", ["xyz_30", "xyz_30_40", "Yxyz", "xyz", "72"])
def test_audiocaps(tmp_path, table, folder, name):
    rows = [["71", "xyz", "30", "a dog"], ["72", "xyz", "30", "it barks"]]
    write_csv(tmp_path / table, AUDIOCAPS, [*rows, ["73", "no", "0", "rain"]])
    touch(tmp_path / folder / f"{name}.mp3")
    split = read_split("audiocaps", "test", tmp_path)
    (clip,) = split.clips
    assert clip.path.name == f"{name}.mp3" and clip.captions == ("a dog", "it barks")
    assert len(split.missing) == 1 and table in str(split)


def test_stage_1_merges_audiocaps_and_clotho_validates(tmp_path):
    for part in ("train", "val", "test"):
        write_csv(tmp_path / f"AUDIOCAPS/{part}.csv", AUDIOCAPS, [["1", part, "0", "a dog"]])
        touch(tmp_path / f"AUDIOCAPS/{part}/{part}_0.wav")
        name = data.SPLITS[part]
        write_csv(tmp_path / f"clotho_captions_{name}.csv", CLOTHO, [["a.wav", *"12345"]])
        touch(tmp_path / name / "a.wav")
    splits, held_out = training_splits(["clotho", "audiocaps"], None, tmp_path)
    names = ["clotho/development", "audiocaps/train", "audiocaps/val", "audiocaps/test"]
    assert [split.name for split in splits] == names and held_out.name == "clotho/validation"
    for datasets, validation in ((["clotho", "clotho"], None), (["audiocaps"], "audiocaps")):
        with pytest.raises(InputError, match="--datasets"):
            training_splits(datasets, validation, tmp_path)


# --- Folders of one's own ---


@pytest.mark.parametrize(("clips", "held"), [(2, 1), (12, 6), (19, 9), (20, 10), (300, 30)])
def test_what_is_held_out_of_a_folder(tmp_path, clips, held):
    write_csv(tmp_path / "captions.csv", ["file_name", "caption"], [[f"{i}.wav", f"c{i}"]
                                                                    for i in range(clips)])
    touch(*(tmp_path / f"{i}.wav" for i in range(clips)))
    (train,), val = training_splits([str(tmp_path)], None, tmp_path)
    assert len(val.clips) == held and len(train.clips) == clips - held
    assert not {clip.name for clip in val.clips} & {clip.name for clip in train.clips}


def test_a_folder_is_known_by_its_contents(tmp_path):
    folder = write_folder(tmp_path / "mine", 3)
    parts = "all", "train", "val"
    whole, train, val = (read_split(str(folder), part, tmp_path) for part in parts)
    folder.rename(tmp_path / "elsewhere")
    moved = [read_split(str(tmp_path / "elsewhere"), part, tmp_path) for part in parts]
    assert [split.identity for split in moved] == [s.identity for s in (whole, train, val)]
    assert was_seen(moved[2], [whole.name]) and was_seen(moved[0], [train.name])
    assert not was_seen(moved[2], [train.name, "clotho/development"])
    with pytest.raises(InputError, match="no test split"):
        read_split(str(tmp_path / "elsewhere"), "test", tmp_path)


def test_captions_of_a_folder(tmp_path):
    rows = [["a.wav", "one", ""], ["sub\\b.wav", "two", "three"], ["a.wav", "four", " "],
            [unicodedata.normalize("NFD", "Tür.wav"), "five", ""]]
    write_csv(tmp_path / "captions.csv", ["file_name", "caption_1", "caption_2"], rows)
    touch(tmp_path / "a.wav", tmp_path / "sub" / "b.wav",
          tmp_path / unicodedata.normalize("NFC", "Tür.wav"))
    split = read_split(str(tmp_path), "all", tmp_path)
    assert [clip.captions for clip in split.clips] == [("one", "four"), ("two", "three"), ("five",)]


@pytest.mark.parametrize(("text", "says"), [
    (b"file_name;caption\na.wav;rain\n", r"its first line is 'file_name;caption'"),
    (b"\xff\xfef\x00i\x00\n", r"UTF-8.*first line is"),
    (b"file_name,caption\na.wav,\xe9t\xe9\n", r"UTF-8.*can't decode"),
    (b"file_name,caption\na.wav,rain\nb.wav\n", r"first line: line 3"),
    (b"file_name,caption\n", r"there are none"),
    (b"file_name,caption\na.wav,\n", r"no caption.*a\.wav"),
    (b"file\x1b[2Jname\n", r"first line is 'file\\x1b\[2Jname'|\\\\x1b"),
])
def test_faults_of_a_csv(tmp_path, text, says):
    (tmp_path / "captions.csv").write_bytes(text)
    with pytest.raises(InputError, match=says) as error:
        read_split(str(tmp_path), "all", tmp_path)
    assert "\x1b" not in str(error.value)


def test_sounds_that_are_not_there(tmp_path):
    write_csv(tmp_path / "captions.csv", ["file_name", "caption"], [["gone.wav", "rain"]])
    touch(tmp_path / "there.wav")
    with pytest.raises(InputError, match=r"looked for gone\.wav.*there is there\.wav"):
        read_split(str(tmp_path), "all", tmp_path)
    with pytest.raises(InputError, match=r"no clotho here: looked for .*clotho_captions_eval"):
        read_split("clotho", "test", tmp_path)


# --- Waveforms ---


def test_a_sound_is_decoded_once_and_again_when_it_changes(tmp_path, monkeypatch):
    folder, decoded = write_folder(tmp_path / "mine", 3), []

    def load(path, **options):
        decoded.append(path)
        return load_audio(path, **options)

    monkeypatch.setattr(decoding, "load_audio", load)
    split = read_split(str(folder), "all", tmp_path)
    for _ in range(2):
        decode_splits([split, split], tmp_path / "cache")
    assert len(decoded) == 3 and split.waveforms[1].dtype == np.int16
    np.testing.assert_array_equal(split.waveforms[1], to_int16(load_audio(folder / "1.wav")))
    write_wav(folder / "1.wav", noise(2.0))
    decode_splits([split], tmp_path / "cache")
    assert len(decoded) == 4 and len(split.waveforms[1]) == 64_000


def test_all_sounds_that_cannot_be_used_are_listed(tmp_path):
    folder = write_folder(tmp_path / "mine", 4)
    (folder / "0.wav").write_bytes(b"no sound")
    whole = (folder / "2.wav").read_bytes()
    (folder / "2.wav").write_bytes(whole[: len(whole) // 3])  # cut off, and its header says so
    with pytest.raises(InputError) as error:
        decode_splits([read_split(str(folder), "all", tmp_path)], tmp_path / "cache")
    assert "(2):" in str(error.value) and "0.wav: cannot be read" in str(error.value)
    assert "2.wav: is cut off: 0.3 s of 1.0 s" in str(error.value)


def test_check(tmp_path, monkeypatch, capsys):
    folder = write_folder(tmp_path / "mine", 6)
    (folder / "0.wav").write_bytes(b"no sound")
    whole = (folder / "1.wav").read_bytes()
    (folder / "1.wav").write_bytes(whole[: len(whole) // 2])
    write_wav(folder / "2.wav", np.zeros(32_000))
    write_wav(folder / "3.wav", np.stack([noise(1.0), -noise(1.0)], axis=1))
    os.remove(folder / "5.wav")
    monkeypatch.setattr(sys, "argv", ["data.py", "check", str(folder)])
    assert data.main() == 1
    out = capsys.readouterr().out
    for fault in ("5.wav: missing", "0.wav: cannot be read", "1.wav: is cut off", "2.wav: silent",
                  "3.wav: channels cancel", "5 faults"):
        assert fault in out


def test_check_goes_on_where_sounds_are_missing(tmp_path, monkeypatch, capsys):
    for name in ("development", "evaluation"):
        table = f"file_name,caption_1\n{name}.wav,a dog\n"
        (tmp_path / f"clotho_captions_{name}.csv").write_text(table)
    (tmp_path / "evaluation").mkdir()
    write_wav(tmp_path / "evaluation" / "evaluation.wav", noise(1.0))
    monkeypatch.setattr(sys, "argv", ["data.py", "check", str(tmp_path)])
    assert data.main() == 1
    fault, found, last = capsys.readouterr().out.splitlines()
    assert "no clotho here" in fault and "clotho/evaluation: 1 clips" in found and last == "1 fault"


def test_check_reads_sounds_without_captions(tmp_path, monkeypatch, capsys):
    write_wav(tmp_path / "whole.wav", noise(1.0))
    (tmp_path / "a\n.wav").write_bytes(b"no sound")
    monkeypatch.setattr(sys, "argv", ["data.py", "check", str(tmp_path)])
    assert data.main() == 1
    assert "a\\n.wav: cannot be read" in capsys.readouterr().out


# --- Batches ---


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("mine"), clips=7, captions=3)
    found = read_split(str(folder), "all", folder)
    decode_splits([found], folder / "cache")
    return found


@pytest.mark.parametrize("k", [1, 2, 3])
def test_an_epoch_shows_every_pair_once_and_drops_the_rest(split, k):
    batches = PairBatches([split], train_bpe(CAPTIONS, 1000), 4, k, seed=1)
    assert len(batches) == 5  # of 21 pairs
    orders = [batches.order(epoch)[0].tolist() for epoch in (0, 1)]
    assert sorted(orders[0]) == list(range(21)) == sorted(orders[1]) and orders[0] != orders[1]
    assert orders[0] != PairBatches([split], None, 4, k, seed=2).order(0)[0].tolist()
    pairs, leaders = batches.order(0)
    assert np.bincount(leaders).max() == k  # so many captions stand together
    for start in np.flatnonzero(np.append(True, leaders[1:] != leaders[:-1])):
        assert pairs[start] == leaders[start]
    shown = [batches[step].pair_ids.tolist() for step in range(5)]
    assert sum(shown, []) == orders[0][:20]


def test_shares_are_the_parts_of_one_batch(split):
    tokenizer = train_bpe(split.captions, 1000)
    whole = PairBatches([split], tokenizer, 6, 2)[3]
    parts = [PairBatches([split], tokenizer, 6, 2, rank=rank, world=2)[3] for rank in (0, 1)]
    for part in parts:
        assert part.pair_ids.tolist() == whole.pair_ids.tolist() and len(part.tokens) == 3
    rows = [p.segments[p.clip_rows] for p in parts]  # clips of one segment
    np.testing.assert_array_equal(np.concatenate(rows), whole.segments[whole.clip_rows])
    pieces = list(whole.pieces(4))
    rows = [p.segments[p.clip_rows] for p in pieces]
    np.testing.assert_array_equal(np.concatenate(rows), whole.segments[whole.clip_rows])
    assert [len(piece.tokens) for piece in pieces] == [4, 2]


def test_long_clips_are_cropped_anew_in_each_epoch(tmp_path):
    ramp = np.linspace(-0.9, 0.9, 40 * 32_000, dtype=np.float32)
    write_wav(tmp_path / "a.wav", ramp)
    header = ["file_name", "caption_1", "caption_2"]
    write_csv(tmp_path / "captions.csv", header, [["a.wav", *"xy"]])
    split = read_split(str(tmp_path), "all", tmp_path)
    decode_splits([split], tmp_path / "cache")
    batches = PairBatches([split], train_bpe(CAPTIONS, 1000), 2, captions_per_clip=2)
    starts = [int(batches[step].segments[0, 0]) for step in range(4)]
    assert len(set(starts)) == 4 and starts[0] == int(batches[0].segments[0, 0])
    assert batches[0].segments.shape == (3, SEGMENT_SAMPLES)


@pytest.mark.parametrize(("size", "world"), [(22, 1), (6, 4)])
def test_a_batch_that_cannot_be_made(split, size, world):
    with pytest.raises(InputError, match=f"{size}: .*21 pairs.* of the processes .{world}.$"):
        PairBatches([split], None, size, world=world)
