"""Where people's data already lies: every layout that is read, and the check of what is there."""

import csv
import os
import shutil

import numpy as np
import pytest
import soundfile

from dualenc import InputError, check
from dualenc.decoding import decode
from dualenc.layouts import AUDIOCAPS_NAMINGS, read_split, splits_in


def write_csv(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


# --- Layouts ---


def test_clotho_as_csv_files_and_waveforms(miniature, tmp_path):
    source = miniature / "CLOTHO_v2.1"
    for ours, theirs in (("train", "development"), ("val", "validation"), ("test", "evaluation")):
        shutil.copytree(source / "clotho_audio_files" / theirs, tmp_path / "waveforms" / ours)
        (tmp_path / "csv_files").mkdir(exist_ok=True)
        table = source / f"clotho_csv_files/clotho_captions_{theirs}.csv"
        shutil.copy(table, tmp_path / f"csv_files/{ours}.csv")
        found, same = (read_split("clotho", ours, folder) for folder in (tmp_path, miniature))
        assert found.layout == "csv_files and waveforms" and found.name == same.name
        assert [(c.name, c.captions) for c in found.clips] == [
            (c.name, c.captions) for c in same.clips
        ]


def test_two_layouts_of_one_csv_are_named_and_a_link_is_not_a_second_one(miniature, tmp_path):
    shutil.copytree(miniature / "AUDIOCAPS", tmp_path / "AUDIOCAPS")
    (tmp_path / "audiocaps").symlink_to("AUDIOCAPS")
    read_split("audiocaps", "val", tmp_path)
    shutil.copytree(tmp_path / "AUDIOCAPS/audio_32000Hz/val", tmp_path / "AUDIOCAPS/val")
    with pytest.raises(InputError, match="(?s)aac-datasets.* and .*flat with csv_files_v1.*keep"):
        read_split("audiocaps", "val", tmp_path)


def test_a_csv_without_its_sounds_is_named(miniature, tmp_path):
    shutil.copytree(miniature / "CLOTHO_v2.1/clotho_csv_files", tmp_path / "clotho_csv_files")
    with pytest.raises(InputError, match="clotho_captions_validation.csv is there, but not"):
        read_split("clotho", "val", tmp_path)


AUDIOCAPS_ROWS = (  # five rows in the order of the real tables: the rows of one clip lie apart
    ["audiocap_id", "youtube_id", "start_time", "caption"],
    ["7", "-abcdefghi_", "30", "first"],
    ["8", "Y_bcdefghij", "0", "second"],
    ["9", "-abcdefghi_", "30", "third"],
)


@pytest.mark.parametrize("table", ["csv_files_v1/test.csv", "test.csv"])
@pytest.mark.parametrize("sounds", ["audio_32000Hz/test", "test"])
@pytest.mark.parametrize(
    ("naming", "names"),
    [
        (0, ["-abcdefghi__30.wav", "Y_bcdefghij_0.flac"]),
        (1, ["Y-abcdefghi_.mp3", "YY_bcdefghij.wav"]),
        (2, ["-abcdefghi_.wav", "Y_bcdefghij.WAV"]),
        (3, ["9.wav", "8.wav"]),
    ],
)
def test_audiocaps_in_every_layout_and_naming(table, sounds, naming, names, tmp_path):
    write_csv(tmp_path / "AudioCaps" / table, *AUDIOCAPS_ROWS)
    touch(tmp_path / "AudioCaps" / sounds, *names, "notes.txt")
    split = read_split("audiocaps", "test", tmp_path)
    assert [(clip.name, clip.captions) for clip in split.clips] == [
        (names[0], ("first", "third")), (names[1], ("second",)),
    ]
    assert (AUDIOCAPS_NAMINGS[naming] in split.layout) == (naming > 0)
    (tmp_path / "AudioCaps" / sounds / names[1]).unlink()
    assert len(read_split("audiocaps", "test", tmp_path).missing) == 1


def test_audiocaps_files_in_two_ways_are_an_error(tmp_path):
    write_csv(tmp_path / "test.csv", *AUDIOCAPS_ROWS)
    touch(tmp_path / "test", "-abcdefghi__30.wav", "8.wav")
    with pytest.raises(InputError, match="more than one way: -abcdefghi__30.wav .* and 8.wav"):
        read_split("audiocaps", "test", tmp_path)
    (tmp_path / "test/8.wav").rename(tmp_path / "test/-abcdefghi__30.mp3")
    with pytest.raises(InputError, match="keep one of them"):
        read_split("audiocaps", "test", tmp_path)


def test_names_are_kept_byte_for_byte(tmp_path):
    names = ["a, b.wav", 'the "big" one.wav', "rain .wav", "it&#39;s.wav", " lead.wav", "Bä.wav"]
    captions = ["one, two", 'says "hi"', " padded ", "it&#39;s", "x", "y"]
    header = ["file_name", *(f"caption_{i}" for i in range(1, 6))]
    rows = [[name, *[caption] * 5] for name, caption in zip(names, captions, strict=True)]
    write_csv(tmp_path / "clotho_captions_evaluation.csv", header, *rows)
    touch(tmp_path / "evaluation", *names)
    split = read_split("clotho", "test", tmp_path)
    assert [clip.name for clip in split.clips] == names
    assert [clip.captions[4] for clip in split.clips] == captions


# --- python -m dualenc.data check ---


def test_splits_in_finds_what_is_there(miniature, tmp_path):
    every = [(d, s) for d in ("clotho", "audiocaps") for s in ("train", "val", "test")]
    assert splits_in(miniature) == every
    assert splits_in(tmp_path) == []
    with pytest.raises(InputError, match="no data set here"):
        check.main(["check", str(tmp_path)])


def test_check_of_sound_data_finds_nothing(miniature, capsys):
    assert check.main(["check", str(miniature)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "0 faults" and len(lines) == 7
    clips = read_split("clotho", "train", miniature).clips
    infos = [soundfile.info(clip.path) for clip in clips]
    hours = sum(info.duration for info in infos) / 3600
    assert lines[0] == (
        f"clotho/development: 10 clips, 50 captions, {hours:.2f} h, 10 at "
        f"{infos[0].samplerate:,} Hz (aac-datasets layout)"
    )


def test_check_finds_every_planted_fault(miniature, tmp_path, capsys):
    shutil.copytree(miniature, tmp_path, dirs_exist_ok=True)
    paths = [clip.path for clip in read_split("clotho", "train", tmp_path).clips]
    test, audiocaps = (
        read_split(dataset, "test", tmp_path).clips[0] for dataset in ("clotho", "audiocaps")
    )
    noise = np.random.default_rng(0).normal(0, 0.1, 44_100)
    paths[0].unlink()
    paths[1].write_bytes(b"")
    paths[2].write_bytes(b"<html>404</html>" * 100)
    soundfile.write(paths[3], np.zeros(44_100), 44_100)
    soundfile.write(paths[4], np.full(44_100, 0.25), 44_100)  # no sound in a constant, either
    soundfile.write(paths[5], noise[:0], 44_100)
    soundfile.write(paths[6], noise[:4_410], 44_100)
    soundfile.write(paths[7], np.where(noise > 0.3, np.nan, noise), 44_100, "FLOAT")
    shutil.copy(paths[8], test.path)  # a training clip in the test split
    first, rate = soundfile.read(paths[9])
    soundfile.write(audiocaps.path, first, rate, format="FLAC")  # the same in another format
    assert check.main(["check", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines if line.startswith("  ")] == [
        f"{paths[0].name}: missing",
        f"{paths[1].name}: unreadable: is empty",
        f"{paths[2].name}: unreadable: cannot be decoded (Format not recognised.)",
        f"{paths[3].name}: silent",
        f"{paths[4].name}: silent",
        f"{paths[5].name}: unreadable: holds no samples",
        f"{paths[6].name}: too short: 0.100 s",
        f"{paths[7].name}: unreadable: holds NaN, infinite or unscaled samples",
        f"{test.name}: duplicated: the same sound as clotho/development: {paths[8].name}",
        f"{audiocaps.name}: duplicated: the same sound as clotho/development: {paths[9].name}",
    ]
    assert lines[-1] == "10 faults"


def test_check_refuses_what_training_refuses(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 44_100)
    cut, loud, slow, pipe = (tmp_path / f"{name}.wav" for name in ("cut", "loud", "slow", "pipe"))
    soundfile.write(cut, noise, 44_100)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    soundfile.write(loud, noise * 1e5, 44_100, "FLOAT")
    soundfile.write(slow, noise, 500)
    os.mkfifo(pipe)
    for path in (cut, loud, slow, pipe, tmp_path / "gone.wav"):
        with pytest.raises(InputError) as error:
            decode(path)
        assert check.examine(path).fault.removeprefix("unreadable: ") in str(error.value)
    assert "is cut off" in check.examine(cut).fault
    odd = tmp_path / os.fsdecode(b"\xff.wav")
    soundfile.write(os.fsencode(odd), noise, 44_100, format="WAV")
    assert check.examine(odd).fault is None


def test_check_goes_on_after_a_split_that_cannot_be_read(tmp_path, capsys):
    write_csv(tmp_path / "captions.csv", ["file_name", "caption"], ["a.wav", "hum"])
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(32_000) / 20), 32_000)
    write_csv(tmp_path / "test.csv", AUDIOCAPS_ROWS[0], ["7", "-abcdefghi_", "30", ""])
    touch(tmp_path / "test")
    assert check.main(["check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "cannot be read: " in out and "line 2 has no word in caption" in out
    assert "1 clips, 1 captions" in out and out.endswith("\n1 fault\n")


def test_check_escapes_what_a_csv_holds(tmp_path, capsys):
    rows = ["a.wav", "hum"], ["\x1b[31mred\n.wav", "hum"]
    write_csv(tmp_path / "captions.csv", ["file_name", "caption"], *rows)
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(32_000) / 20), 32_000)
    assert check.main(["check", str(tmp_path)]) == 1
    assert "\n  \\x1b[31mred\\n.wav: missing\n" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["check"], ["look", "."]])
def test_check_says_in_one_line_what_is_missing(argv, capsys):
    with pytest.raises(InputError, match="FOLDER|'look'") as error:
        check.main(argv)
    assert "\n" not in str(error.value) and capsys.readouterr().err == ""
