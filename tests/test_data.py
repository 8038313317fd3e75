"""Data sets on disk -> splits -> batches, and the message where something does not fit.

In many tests a clip's sound is one constant value, its level, and its captions name the level: then
every batch tells by itself whether sounds, captions and ids belong together.
"""

import os
import sys
import tracemalloc
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import (
    CAPTIONS, noise, touch, write_annotations, write_csv, write_folder, write_wav,
)

from dualenc import data
from dualenc.audio import SEGMENT_SAMPLES
from dualenc.data import PairBatches, decode_splits, read_split, training_splits, was_seen
from dualenc.decoding import INT16_SCALE, SAMPLE_RATE
from dualenc.errors import InputError
from dualenc.text import normalise, train_bpe

CLOTHO_COLUMNS = ["file_name", "caption_1", "caption_2", "caption_3", "caption_4", "caption_5"]
AUDIOCAPS_COLUMNS = ["audiocap_id", "youtube_id", "start_time", "caption"]


def write_level(path: Path, level: int) -> None:
    """Write a tenth of a second whose every int16 sample is the level."""
    write_wav(path, np.full(SAMPLE_RATE // 10, level / INT16_SCALE))


def captions_of_level(level: int, count: int) -> list[str]:
    return [f"level {level} caption {number}" for number in range(count)]


def write_levels(folder: Path, levels: range) -> Path:
    """Write a folder with a captions.csv: a clip of each level, with two captions."""
    rows = []
    for level in levels:
        write_level(folder / f"{level}.wav", level)
        rows.append([f"{level}.wav", *captions_of_level(level, 2)])
    write_csv(folder / "captions.csv", ["file_name", "caption_1", "caption_2"], rows)
    return folder


def read_decoded(folder: Path) -> data.Split:
    split = read_split(str(folder), "all", folder)
    decode_splits([split], folder / "cache")
    return split


# --- Clotho and AudioCaps: what lies where ---


@pytest.mark.parametrize(
    ("root", "table", "folder"),
    [
        (".", "clotho_captions_evaluation.csv", "evaluation"),
        (
            "CLOTHO_v2.1",
            "clotho_csv_files/clotho_captions_evaluation.csv",
            "clotho_audio_files/evaluation",
        ),
        ("clotho", "csv_files/test.csv", "waveforms/test"),
    ],
)
def test_clotho_is_found_in_each_layout(tmp_path, root, table, folder):
    rows = [[" a b.wav", *"12345"], ["c.wav", *"67890"]]
    write_csv(tmp_path / root / table, CLOTHO_COLUMNS, rows)
    touch(tmp_path / root / folder / " a b.wav", tmp_path / root / folder / "c.wav")
    split = read_split("clotho", "test", tmp_path)
    assert split.name == "clotho/evaluation"
    assert split.source == tmp_path / root / table
    assert [clip.path.parent for clip in split.clips] == [tmp_path / root / folder] * 2
    assert [clip.captions for clip in split.clips] == [tuple("12345"), tuple("67890")]


@pytest.mark.parametrize(
    ("table", "folder", "stem"),
    [
        ("AUDIOCAPS/csv_files_v1/test.csv", "AUDIOCAPS/audio_32000Hz/test", "xyz_30"),
        ("audiocaps/test.csv", "audiocaps/test", "xyz_30_40"),
        ("AUDIOCAPS/csv_files_v2/test.csv", "AUDIOCAPS/audio_32000Hz/test", "Yxyz"),
        ("AudioCaps/test.csv", "AudioCaps/audio_32000Hz/test", "xyz"),
        ("csv_files_v1/test.csv", "test", "72"),  # the number of one of its captions
    ],
)
def test_audiocaps_is_found_in_each_layout_and_naming(tmp_path, table, folder, stem):
    rows = [["71", "xyz", "30", "a dog"], ["72", "xyz", "30", "it barks"]]
    write_csv(tmp_path / table, AUDIOCAPS_COLUMNS, [*rows, ["73", "no", "0", "rain"]])
    touch(tmp_path / folder / f"{stem}.mp3")
    split = read_split("audiocaps", "test", tmp_path)
    assert split.name == "audiocaps/test"
    assert [clip.path.name for clip in split.clips] == [f"{stem}.mp3"]
    assert [clip.captions for clip in split.clips] == [("a dog", "it barks")]
    assert split.missing == ["no_0.wav"]


def test_two_excerpts_of_one_video_are_two_clips(tmp_path):
    rows = [["1", "xyz", "30", "a dog"], ["2", "xyz", "130", "rain"], ["3", "xyz", "30", "barks"]]
    write_csv(tmp_path / "AUDIOCAPS/train.csv", AUDIOCAPS_COLUMNS, rows)
    folder = tmp_path / "AUDIOCAPS/train"
    touch(folder / "xyz_30.wav", folder / "xyz_130.wav", folder / "xyz.wav")
    split = read_split("audiocaps", "train", tmp_path)
    captions = {clip.path.name: clip.captions for clip in split.clips}
    assert captions == {"xyz_30.wav": ("a dog", "barks"), "xyz_130.wav": ("rain",)}


def test_captions_stay_with_their_clips_where_the_first_file_is_missing(tmp_path):
    rows = [["gone.wav", *"abcde"], ["1.wav", *"12345"], ["2.wav", *"67890"]]
    write_csv(tmp_path / "clotho_captions_validation.csv", CLOTHO_COLUMNS, rows)
    touch(tmp_path / "validation/1.wav", tmp_path / "validation/2.wav")
    split = read_split("clotho", "val", tmp_path)
    assert split.missing == ["gone.wav"]
    assert [clip.name for clip in split.clips] == ["1.wav", "2.wav"]
    assert split.captions == list("1234567890")
    assert split.clip_of_caption == [0] * 5 + [1] * 5
    assert "2 clips, 10 captions, 1 more not on disk" in str(split)


def test_clotho_has_no_split_of_all_clips(tmp_path):
    with pytest.raises(InputError, match="--split all: clotho has train, val and test"):
        read_split("clotho", "all", tmp_path)


def test_a_data_set_that_is_not_there_is_reported_with_an_example(tmp_path):
    with pytest.raises(InputError, match=r"no clotho here: looked for .*clotho_captions_eval"):
        read_split("clotho", "test", tmp_path)


def test_sounds_that_are_not_there_are_reported_with_one_that_is(tmp_path):
    write_csv(tmp_path / "captions.csv", ["file_name", "caption"], [["gone.wav", "rain"]])
    touch(tmp_path / "there.wav")
    with pytest.raises(InputError, match=r"looked for gone\.wav.*there is there\.wav"):
        read_split(str(tmp_path), "all", tmp_path)


# --- Folders of one's own ---


def test_captions_of_a_folder_may_be_in_several_columns_and_rows(tmp_path):
    rows = [["a.wav", "one", ""], ["b.wav", "two", "three"], ["a.wav", " four", " "]]
    write_csv(tmp_path / "captions.csv", ["file_name", "caption_1", "caption_2"], rows)
    touch(tmp_path / "a.wav", tmp_path / "b.wav")
    split = read_split(str(tmp_path), "all", tmp_path)
    assert [clip.captions for clip in split.clips] == [("one", " four"), ("two", "three")]


def test_a_name_may_be_written_as_on_windows_or_in_another_unicode_form(tmp_path):
    decomposed = unicodedata.normalize("NFD", "Tür.wav")
    rows = [["sub\\b.wav", "rain"], [decomposed, "a door"]]
    write_csv(tmp_path / "captions.csv", ["file_name", "caption"], rows)
    composed = unicodedata.normalize("NFC", "Tür.wav")
    touch(tmp_path / "sub" / "b.wav", tmp_path / composed)
    split = read_split(str(tmp_path), "all", tmp_path)
    assert [clip.path for clip in split.clips] == [tmp_path / "sub/b.wav", tmp_path / composed]
    assert [clip.name for clip in split.clips] == ["sub\\b.wav", decomposed]  # the csv's bytes


@pytest.mark.parametrize(("clips", "held"), [(2, 1), (12, 6), (19, 9), (20, 10), (300, 30)])
def test_a_tenth_of_a_folder_is_held_out_but_at_least_ten_clips_or_half(tmp_path, clips, held):
    rows = [[f"{i}.wav", f"caption {i}"] for i in range(clips)]
    write_csv(tmp_path / "captions.csv", ["file_name", "caption"], rows)
    touch(*(tmp_path / f"{i}.wav" for i in range(clips)))
    (train,), validation = training_splits([str(tmp_path)], None, tmp_path)
    held_out = {clip.name for clip in validation.clips}
    assert len(held_out) == held
    assert {clip.name for clip in train.clips} == {row[0] for row in rows} - held_out


def test_a_clip_that_goes_missing_moves_no_other_between_training_and_validation(tmp_path):
    folder = write_folder(tmp_path / "mine", 12)
    (train,), validation = training_splits([str(folder)], None, tmp_path)
    train_names = [clip.name for clip in train.clips]
    validation_names = [clip.name for clip in validation.clips]
    os.remove(folder / train_names.pop(0))
    (train,), validation = training_splits([str(folder)], None, tmp_path)
    assert [clip.name for clip in train.clips] == train_names
    assert [clip.name for clip in validation.clips] == validation_names


def test_the_order_of_a_csvs_rows_does_not_choose_what_is_held_out(tmp_path):
    rows = [[f"{i}.wav", f"caption {i}"] for i in range(30)]
    touch(*(tmp_path / name for name, _ in rows))
    held_out = []
    for rows_in_some_order in (rows, rows[::-1]):
        write_csv(tmp_path / "captions.csv", ["file_name", "caption"], rows_in_some_order)
        held_out.append({clip.name for clip in read_split(str(tmp_path), "val", tmp_path).clips})
    assert held_out[0] == held_out[1]


def test_a_folder_has_no_test_split(tmp_path):
    folder = write_folder(tmp_path / "mine", 3)
    with pytest.raises(InputError, match="no test split"):
        read_split(str(folder), "test", tmp_path)


def test_a_folder_is_known_by_its_contents_wherever_it_lies(tmp_path):
    folder = write_folder(tmp_path / "mine", 3)
    before = read_split(str(folder), "train", tmp_path)
    folder.rename(tmp_path / "elsewhere")
    after = read_split(str(tmp_path / "elsewhere"), "train", tmp_path)
    assert after.identity == before.identity
    assert was_seen(after, [before.name])


# --- Csv files ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"file_name;caption\na.wav;rain\n", r"its first line is 'file_name;caption'"),
        (b"\xff\xfef\x00i\x00\n", r"UTF-8.*first line is"),
        (b"file_name,caption\na.wav,\xe9t\xe9\n", r"UTF-8.*can't decode"),
        (b"file_name,caption\na.wav,rain\nb.wav\n", r"first line: line 3"),
        (b"file_name,caption\na.wav,rain, then wind\n", r"first line: line 2"),
        (b"file_name,caption\n", r"has no rows"),
        (b"file_name,caption\na.wav,\n", r"without a caption.*a\.wav"),
        (b"file\x1b[2Jname\n", r"first line is 'file\\x1b\[2Jname'|\\\\x1b"),
    ],
)
def test_a_csv_that_cannot_be_used_is_named_with_its_fault(tmp_path, text, message):
    (tmp_path / "captions.csv").write_bytes(text)
    with pytest.raises(InputError, match=message) as error:
        read_split(str(tmp_path), "all", tmp_path)
    assert str(tmp_path / "captions.csv") in str(error.value)
    assert "\x1b" not in str(error.value)  # which would clear the terminal


def test_an_empty_row_as_excel_leaves_it_is_none(tmp_path):
    byte_order_mark = b"\xef\xbb\xbf"
    table = byte_order_mark + b"file_name,caption\r\na.wav,rain\r\n,\r\n,\r\n"
    (tmp_path / "captions.csv").write_bytes(table)
    touch(tmp_path / "a.wav")
    split = read_split(str(tmp_path), "all", tmp_path)
    assert [clip.captions for clip in split.clips] == [("rain",)]
    assert split.missing == []


@pytest.mark.parametrize("second_line", ["and a cat meows", "and a cat, and a goose, and a cow"])
def test_audiocaps_rows_that_were_broken_in_two_are_refused_with_the_remedy(
    tmp_path, second_line
):
    table = tmp_path / "AUDIOCAPS/csv_files_v2/train.csv"
    write_csv(table, AUDIOCAPS_COLUMNS, [["1", "xyz", "30", "a dog barks"]])
    with open(table, "a") as file:
        file.write(f"{second_line}\n")
    touch(tmp_path / "AUDIOCAPS/audio_32000Hz/train/xyz_30.wav")
    with pytest.raises(InputError, match=r"dataset2\.0/train\.csv.*fetch it again"):
        read_split("audiocaps", "train", tmp_path)


# --- What is trained on, and what validates ---


def write_clotho_and_audiocaps(data_dir: Path) -> None:
    """Write every split of both; each begins with a file that the csv lists and the disk lacks.

    Clotho's clips have five captions; AudioCaps' have one for training, five in val and test.
    """
    level = 200
    for part, name in (("train", "development"), ("val", "validation"), ("test", "evaluation")):
        rows = [["gone.wav", *captions_of_level(1, 5)]]
        for _ in range(3):
            level += 1
            rows.append([f"{level}.wav", *captions_of_level(level, 5)])
            write_level(data_dir / name / f"{level}.wav", level)
        write_csv(data_dir / f"clotho_captions_{name}.csv", CLOTHO_COLUMNS, rows)

        rows = [["1", "gone", "0", "level 1 caption 0"]]
        for _ in range(4):
            level += 1
            captions = captions_of_level(level, 1 if part == "train" else 5)
            rows += [["1", f"v{level}", "30", caption] for caption in captions]
            write_level(data_dir / f"AUDIOCAPS/{part}/v{level}_30.wav", level)
        write_csv(data_dir / f"AUDIOCAPS/{part}.csv", AUDIOCAPS_COLUMNS, rows)


def dataset_and_part(split: data.Split) -> tuple[str, str]:
    """Return a folder's name and its part, which stand around the digest in a split's name."""
    folder, _, digest_and_part = split.name.partition("@")
    return folder, digest_and_part.rpartition("/")[2]


def test_audiocaps_splits_are_merged_for_training_and_clotho_validates(tmp_path):
    write_clotho_and_audiocaps(tmp_path)
    splits, validation = training_splits(["clotho", "audiocaps"], None, tmp_path)
    names = [split.name for split in splits]
    assert names == ["clotho/development", "audiocaps/train", "audiocaps/val", "audiocaps/test"]
    assert validation.name == "clotho/validation"


def test_the_first_folder_validates_and_the_others_are_trained_on_whole(tmp_path):
    first = write_folder(tmp_path / "first", 4)
    second = write_folder(tmp_path / "second", 6)
    splits, validation = training_splits([str(first), str(second)], None, tmp_path)
    assert [len(split.clips) for split in splits] == [2, 6]
    assert dataset_and_part(validation) == ("first", "val")


def test_a_folder_can_validate_what_is_trained_on_clotho(tmp_path):
    write_clotho_and_audiocaps(tmp_path)
    folder = str(write_folder(tmp_path / "mine", 4))
    splits, validation = training_splits(["clotho"], folder, tmp_path)
    assert [split.name for split in splits] == ["clotho/development"]
    assert dataset_and_part(validation) == ("mine", "val")


def test_a_folder_that_validates_may_be_spelled_otherwise(tmp_path):
    folder = write_folder(tmp_path / "mine", 4)
    (train,), validation = training_splits([f"{folder}/"], str(folder), tmp_path)
    assert dataset_and_part(train) == ("mine", "train")
    assert dataset_and_part(validation) == ("mine", "val")


def test_clotho_validates_what_is_trained_on_audiocaps_alone(tmp_path):
    write_clotho_and_audiocaps(tmp_path)
    _, validation = training_splits(["audiocaps"], None, tmp_path)
    assert validation.name == "clotho/validation"


def test_a_split_with_another_caption_has_another_identity(tmp_path):
    write_clotho_and_audiocaps(tmp_path)
    before = read_split("clotho", "val", tmp_path).identity
    table = tmp_path / "clotho_captions_validation.csv"
    table.write_text(table.read_text().replace("level 208 caption 0", "rain"))
    assert read_split("clotho", "val", tmp_path).identity != before


def test_a_split_of_which_a_sound_is_gone_has_another_identity(tmp_path):
    write_clotho_and_audiocaps(tmp_path)
    before = read_split("clotho", "val", tmp_path).identity
    os.remove(tmp_path / "validation/208.wav")
    assert read_split("clotho", "val", tmp_path).identity != before


def test_nothing_is_trained_on_twice(tmp_path):
    write_clotho_and_audiocaps(tmp_path)
    with pytest.raises(InputError, match="--datasets clotho clotho: names the same .* twice"):
        training_splits(["clotho", "clotho"], None, tmp_path)


def test_nothing_that_is_trained_on_validates(tmp_path):
    write_clotho_and_audiocaps(tmp_path)
    with pytest.raises(InputError, match="audiocaps/val would be trained on and validate as well"):
        training_splits(["audiocaps"], "audiocaps", tmp_path)


@pytest.mark.parametrize(
    ("part", "trained_part", "seen"),
    [
        ("val", "val", True),
        ("val", "train", False),
        ("val", "all", True),
        ("train", "all", True),
        ("all", "train", True),
        ("all", "val", True),
    ],
)
def test_a_part_of_a_folder_was_seen_if_it_shares_clips_with_training(
    tmp_path, part, trained_part, seen
):
    folder = write_folder(tmp_path / "mine", 4)
    split = read_split(str(folder), part, tmp_path)
    trained_on = read_split(str(folder), trained_part, tmp_path).name
    assert was_seen(split, ["clotho/development", trained_on]) == seen


def test_a_published_split_was_seen_if_it_was_trained_on_itself(tmp_path):
    write_clotho_and_audiocaps(tmp_path)
    split = read_split("audiocaps", "test", tmp_path)
    folder = read_split(str(write_folder(tmp_path / "mine", 4)), "all", tmp_path)
    assert was_seen(split, ["audiocaps/train", "audiocaps/test"])
    assert not was_seen(split, ["clotho/test", "audiocaps/train", folder.name])


# --- Waveforms, decoded once ---


def test_every_split_gets_the_waveforms_of_its_clips(tmp_path):
    folder = write_levels(tmp_path / "mine", range(100, 105))
    splits = [read_split(str(folder), part, tmp_path) for part in ("train", "val", "all")]
    decode_splits(splits, tmp_path / "cache")
    for split in splits:
        levels = [waveform[0] for waveform in split.waveforms]
        assert [f"{level}.wav" for level in levels] == [clip.name for clip in split.clips]


# --- python -m dualenc.data check FOLDER ---


@pytest.fixture
def check(monkeypatch, capsys):
    """Return a function that checks a folder, and returns the exit status and the lines printed."""

    def check_folder(folder: Path) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["data.py", "check", str(folder)])
        status = data.main()
        return status, capsys.readouterr().out.splitlines()

    return check_folder


def test_check_says_what_is_wrong_with_each_sound(tmp_path, check):
    folder = write_folder(tmp_path / "mine", 6)
    (folder / "0.wav").write_bytes(b"no sound")
    whole = (folder / "1.wav").read_bytes()
    (folder / "1.wav").write_bytes(whole[: len(whole) // 2])
    write_wav(folder / "2.wav", np.full(32_000, 1 / INT16_SCALE))
    write_wav(folder / "3.wav", np.stack([noise(1.0), -noise(1.0)], axis=1))
    os.remove(folder / "5.wav")
    status, (headline, *faults, advice, count) = check(folder)
    assert status == 1
    assert "5 clips, 10 captions (" in headline
    beginnings = [
        "  missing: 5.wav",
        "  cannot be read: 0.wav: cannot be read as a sound",
        "  not whole: 1.wav: is cut off: 0.5 s of 1.0 s",
        "  silent: 2.wav",
        "  silent as one channel, since its channels cancel: 3.wav",
    ]
    for fault, beginning in zip(faults, beginnings, strict=True):
        assert fault.startswith(beginning)
    assert "removed or renamed is passed over as missing" in advice
    assert count == "5 faults"


def test_check_finds_nothing_wrong_with_sound_at_either_end_of_a_long_file(tmp_path, check):
    silence = np.full(22 * SAMPLE_RATE, 1 / INT16_SCALE)
    soft = 0.01 * noise(1.0)
    write_wav(tmp_path / "early.wav", np.append(soft, silence))
    write_wav(tmp_path / "late.wav", np.append(silence, soft))
    status, lines = check(tmp_path)
    assert status == 0
    assert lines[1:] == ["0 faults"]


def test_check_holds_blocks_of_a_recording_and_not_all_of_it(tmp_path, check):
    write_wav(tmp_path / "long.wav", noise(300.0))
    tracemalloc.start()
    status, _ = check(tmp_path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert status == 0
    assert peak_bytes < 15e6  # The waveform as float32 is 38 MB, a block of 10 s is 1.3 MB.


def test_check_lists_twenty_faults_of_a_kind_and_counts_the_others(tmp_path, check):
    rows = [[f"{i}.wav", "rain"] for i in range(1, 1031)]
    write_csv(tmp_path / "captions.csv", ["file_name", "caption"], rows)
    write_wav(tmp_path / "1.wav", noise(1.0))
    status, lines = check(tmp_path)
    assert status == 1
    listed = [f"    {i}.wav" for i in range(2, 22)]
    assert lines[1:] == ["  missing (1,029):", *listed, "    and 1,009 more", "1,029 faults"]


def test_check_counts_faults_of_all_kinds(tmp_path, check):
    rows = [[f"{i}.wav", "rain"] for i in range(1, 31)]
    write_csv(tmp_path / "captions.csv", ["file_name", "caption"], rows)
    for i in range(1, 26):
        touch(tmp_path / f"{i}.wav")  # An empty file is no sound.
    status, lines = check(tmp_path)
    assert status == 1
    assert "25 clips, 25 captions (" in lines[0]
    assert lines[1] == "  missing (5):"
    assert lines[7] == "  cannot be read (25):"
    assert lines[-1] == "30 faults"


def test_check_goes_on_after_a_split_without_sounds(tmp_path, check):
    for name in ("development", "evaluation"):
        table = f"file_name,caption_1\n{name}.wav,a dog\n"
        (tmp_path / f"clotho_captions_{name}.csv").write_text(table)
    write_wav(tmp_path / "evaluation/evaluation.wav", noise(1.0))
    status, lines = check(tmp_path)
    assert status == 1
    assert "no clotho here: looked for" in lines[0]
    assert lines[1].startswith("clotho/evaluation: 1 clip, 1 caption (")
    assert lines[-1] == "1 fault"


def test_check_reads_sounds_without_captions_and_escapes_their_names(tmp_path, check):
    write_wav(tmp_path / "whole.wav", noise(1.0))
    (tmp_path / "a\n.wav").write_bytes(b"no sound")
    status, lines = check(tmp_path)
    assert status == 1
    assert lines[1].startswith("  cannot be read: a\\n.wav: cannot be read")


def test_check_refuses_a_folder_that_is_not_there(tmp_path, check):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        check(tmp_path / "nowhere")


@pytest.fixture
def clotho_test(tmp_path) -> Path:
    """Write a data folder with Clotho's test split alone: two clips."""
    rows = [["1.wav", *captions_of_level(1, 5)], ["2.wav", *captions_of_level(2, 5)]]
    write_csv(tmp_path / "clotho_captions_evaluation.csv", CLOTHO_COLUMNS, rows)
    write_wav(tmp_path / "evaluation/1.wav", noise(1.0))
    write_wav(tmp_path / "evaluation/2.wav", noise(1.0))
    return tmp_path


def test_check_finds_nothing_wrong_with_right_annotations(clotho_test, check):
    rows = [["level 1 caption 0", "['1.wav', '2.wav']"], ["level 2 caption 4", "2.wav"]]
    write_annotations(clotho_test / "metadata_eval.csv", rows)
    status, lines = check(clotho_test)
    assert status == 0
    assert lines[1:] == [f"{clotho_test}/metadata_eval.csv: 2 rows", "0 faults"]


def test_check_names_annotations_of_other_captions_and_clips(clotho_test, check):
    rows = [["Level 1 caption 0", "['1.wav']"], ["level 2 caption 0", "['2.wav', '3.wav']"]]
    write_annotations(clotho_test / "metadata_eval.csv", rows)
    status, lines = check(clotho_test)
    assert status == 1
    assert lines[2] == "  queries that are no captions of clotho/evaluation: Level 1 caption 0"
    assert lines[3] == "  names that are no clips of clotho/evaluation: 3.wav"
    assert lines[4:] == ["2 faults"]


def test_check_asks_for_no_captions_of_clips_that_are_missing(clotho_test, check):
    write_annotations(clotho_test / "metadata_eval.csv", [["level 2 caption 0", "['2.wav']"]])
    os.remove(clotho_test / "evaluation/2.wav")
    _, lines = check(clotho_test)
    assert lines[1:] == ["  missing: 2.wav", f"{clotho_test}/metadata_eval.csv: 1 row", "1 fault"]


def test_check_refuses_annotations_with_other_columns(clotho_test, check):
    write_csv(clotho_test / "metadata_eval.csv", ["caption", "file_name"], [["rain", "1.wav"]])
    status, lines = check(clotho_test)
    assert status == 1
    assert "metadata_eval.csv: a comma-separated csv" in lines[1]
    assert "query,audio_filenames" in lines[1]


def test_check_says_that_there_are_no_annotations(clotho_test, check):
    status, lines = check(clotho_test)
    assert status == 0
    assert "metadata_eval.csv: is not there" in lines[1]


# --- Batches: which pair is where ---


@pytest.fixture(scope="module")
def splits_of_three_data_sets(tmp_path_factory) -> list[data.Split]:
    """Return Clotho, AudioCaps' three splits and a folder: 5, 1, 5, 5 and 2 captions a clip.

    Each of the 20 clips has a level of its own.
    """
    data_dir = tmp_path_factory.mktemp("data")
    write_clotho_and_audiocaps(data_dir)
    folder = write_levels(data_dir / "mine", range(100, 105))
    splits, _ = training_splits(["clotho", "audiocaps", str(folder)], None, data_dir)
    decode_splits(splits, data_dir / "cache")
    assert len(set(all_levels(splits))) == 20
    return splits


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> data.Split:
    """Write eight clips of noise, of one to three segments and one longer; four captions each."""
    folder = write_folder(tmp_path_factory.mktemp("noise"), clips=8, captions=4)
    for i, seconds in enumerate([0.2, 12.0, 25.0, 3.0, 40.0, 10.02, 18.0, 29.0]):
        write_wav(folder / f"{i}.wav", noise(seconds, seed=i))
    return read_decoded(folder)


def all_captions(splits: list[data.Split]) -> list[str]:
    captions = []
    for split in splits:
        captions += split.captions
    return captions


def all_levels(splits: list[data.Split]) -> list[int]:
    levels = []
    for split in splits:
        levels += [int(waveform[0]) for waveform in split.waveforms]
    return levels


def sounds_of_pairs(batch: data.Batch) -> list[np.ndarray]:
    """Return the segments of each pair's clip, in the order of the pairs."""
    segments_of_clip = batch.segments.split(batch.counts.tolist())
    return [segments_of_clip[row].numpy() for row in batch.clip_rows]


def pairs_of_epoch(batches: PairBatches, epoch: int) -> list[int]:
    pairs = []
    for step in range(len(batches)):
        pairs += batches[epoch * len(batches) + step].pair_ids.tolist()
    return pairs


def run_lengths(values: list[int]) -> list[int]:
    """Count how often each value is repeated in a row: [5, 5, 2] -> [2, 1]."""
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    return np.diff(starts, append=len(values)).tolist()


class Pair(NamedTuple):
    """A pair as a batch holds it."""

    level: int  # the sound's
    caption: str  # spelt by the tokens
    clip_id: int
    pair_id: int


@pytest.fixture(scope="module", params=[1, 2, 5], ids="{} captions a clip".format)
def pairs_of_two_epochs(request, splits_of_three_data_sets) -> list[Pair]:
    tokenizer = train_bpe(all_captions(splits_of_three_data_sets), 1000)
    batches = PairBatches(splits_of_three_data_sets, tokenizer, 7, request.param)
    pairs = []
    for step in range(2 * len(batches)):
        batch = batches[step]
        for i, sound in enumerate(sounds_of_pairs(batch)):
            level = int(sound[0, 0])
            caption = tokenizer.decode(batch.tokens[i].tolist())
            pairs.append(Pair(level, caption, int(batch.clip_ids[i]), int(batch.pair_ids[i])))
    return pairs


def test_a_pairs_caption_is_one_of_its_clips(pairs_of_two_epochs):
    for pair in pairs_of_two_epochs:
        assert pair.caption.startswith(f"level {pair.level} ")


def test_clip_ids_count_the_clips_of_all_splits(pairs_of_two_epochs, splits_of_three_data_sets):
    levels = all_levels(splits_of_three_data_sets)
    for pair in pairs_of_two_epochs:
        assert levels[pair.clip_id] == pair.level


def test_pair_ids_count_the_captions_of_all_splits(pairs_of_two_epochs, splits_of_three_data_sets):
    captions = all_captions(splits_of_three_data_sets)
    for pair in pairs_of_two_epochs:
        assert normalise(captions[pair.pair_id]) == pair.caption


@pytest.mark.parametrize("captions_per_clip", [1, 2, 3])
def test_an_epoch_shows_every_pair_once(split, captions_per_clip):
    batches = PairBatches([split], train_bpe(CAPTIONS, 1000), 8, captions_per_clip)
    assert sorted(pairs_of_epoch(batches, 0)) == list(range(32))
    assert sorted(pairs_of_epoch(batches, 1)) == list(range(32))


def test_the_pairs_that_fill_no_batch_are_dropped(split):
    batches = PairBatches([split], train_bpe(CAPTIONS, 1000), 6)
    assert len(batches) == 5
    pairs = pairs_of_epoch(batches, 0)
    assert len(pairs) == 30
    assert len(set(pairs)) == 30


def test_each_epoch_drops_other_pairs(split):
    batches = PairBatches([split], train_bpe(CAPTIONS, 1000), 6)
    assert set(pairs_of_epoch(batches, 0)) != set(pairs_of_epoch(batches, 1))


def test_seeds_and_epochs_have_orders_of_their_own(split):
    orders = set()
    for seed in (0, 1, 2):
        batches = PairBatches([split], train_bpe(CAPTIONS, 1000), 8, seed=seed)
        for epoch in (0, 1, 2):
            orders.add(tuple(pairs_of_epoch(batches, epoch)))
    assert len(orders) == 9  # a seed that is a sum would make two alike


def test_clips_come_in_another_order_in_each_epoch(split):
    batches = PairBatches([split], train_bpe(CAPTIONS, 1000), 8, captions_per_clip=4)
    first = [pair // 4 for pair in pairs_of_epoch(batches, 0)]
    second = [pair // 4 for pair in pairs_of_epoch(batches, 1)]
    assert first != sorted(first)
    assert second != sorted(second)
    assert first != second


@pytest.mark.parametrize("captions_per_clip", [2, 4])
def test_captions_of_a_clip_stand_together(split, captions_per_clip):
    batches = PairBatches([split], train_bpe(CAPTIONS, 1000), 8, captions_per_clip)
    for step in range(len(batches)):
        for length in run_lengths(batches[step].clip_ids.tolist()):
            assert length % captions_per_clip == 0


def test_a_clip_whose_captions_stand_together_is_encoded_once(split):
    batches = PairBatches([split], train_bpe(CAPTIONS, 1000), 8, captions_per_clip=4)
    for step in range(len(batches)):
        assert len(batches[step].counts) == 2


def test_captions_that_stand_together_are_drawn_anew_in_each_epoch(split):
    def couples_of_epoch(epoch):
        couples = np.reshape(pairs_of_epoch(batches, epoch), (-1, 2))
        return {tuple(sorted(couple)) for couple in couples.tolist()}

    batches = PairBatches([split], train_bpe(CAPTIONS, 1000), 8, captions_per_clip=2)
    assert couples_of_epoch(0) != couples_of_epoch(1)


@pytest.mark.parametrize(("size", "world"), [(33, 1), (6, 4)])
def test_a_batch_that_cannot_be_made_is_an_error(split, size, world):
    with pytest.raises(InputError, match=f"{size}: .*32 pairs.* of the processes .{world}.$"):
        PairBatches([split], None, size, world=world)


# --- Batches: shares, pieces, crops ---


@pytest.mark.parametrize("captions_per_clip", [1, 2])
def test_the_shares_of_two_processes_are_the_halves_of_one_batch(split, captions_per_clip):
    tokenizer = train_bpe(split.captions, 1000)
    whole = PairBatches([split], tokenizer, 12, captions_per_clip)[3]
    sounds = []
    captions = []
    for rank in (0, 1):
        batches = PairBatches([split], tokenizer, 12, captions_per_clip, rank=rank, world=2)
        share = batches[3]
        assert share.clip_ids.tolist() == whole.clip_ids.tolist()
        assert share.pair_ids.tolist() == whole.pair_ids.tolist()
        assert len(share.tokens) == 6
        sounds += sounds_of_pairs(share)
        captions += [tokenizer.decode(tokens) for tokens in share.tokens.tolist()]
    assert captions == [tokenizer.decode(tokens) for tokens in whole.tokens.tolist()]
    for sound, expected in zip(sounds, sounds_of_pairs(whole), strict=True):
        np.testing.assert_array_equal(sound, expected)


@pytest.mark.parametrize("pairs", [1, 5, 12])
def test_pieces_are_the_parts_of_one_batch(split, pairs):
    whole = PairBatches([split], train_bpe(split.captions, 1000), 12, captions_per_clip=2)[3]
    pieces = list(whole.pieces(pairs))
    sounds = []
    tokens = []
    for piece in pieces:
        assert len(piece.segments) == piece.counts.sum()
        sounds += sounds_of_pairs(piece)
        tokens += piece.tokens.tolist()
    assert max(len(piece.tokens) for piece in pieces) == pairs
    assert tokens == whole.tokens.tolist()
    for sound, expected in zip(sounds, sounds_of_pairs(whole), strict=True):
        np.testing.assert_array_equal(sound, expected)


def test_every_tensor_of_a_batch_is_pinned(split, monkeypatch):
    batch = PairBatches([split], train_bpe(CAPTIONS, 1000), 8)[0]
    # A stand-in, since pinned memory needs a GPU.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: -tensor)
    for name, pinned in vars(batch.pin_memory()).items():
        assert torch.equal(pinned, -getattr(batch, name)), name


@pytest.fixture(scope="module")
def two_ramps(tmp_path_factory) -> data.Split:
    """Write two clips of 40 s that rise all the time: a sample tells where a crop begins."""
    folder = tmp_path_factory.mktemp("ramps")
    ramp = np.linspace(-0.9, 0.9, 40 * SAMPLE_RATE)
    rows = []
    for name in ("a.wav", "b.wav"):
        write_wav(folder / name, ramp)
        rows.append([name, "one", "two"])
    write_csv(folder / "captions.csv", ["file_name", "caption_1", "caption_2"], rows)
    return read_decoded(folder)


def test_neighbours_share_a_crop_of_30_s(two_ramps):
    batches = PairBatches([two_ramps], train_bpe(CAPTIONS, 1000), 2, captions_per_clip=2)
    assert batches[0].segments.shape == (3, SEGMENT_SAMPLES)
    assert batches[0].clip_rows.tolist() == [0, 0]


def test_all_pairs_of_a_clip_share_its_crop_in_an_epoch(two_ramps):
    batches = PairBatches([two_ramps], train_bpe(CAPTIONS, 1000), 1)
    starts = defaultdict(set)
    for step in range(len(batches)):
        batch = batches[step]
        starts[int(batch.clip_ids[0])].add(int(batch.segments[0, 0]))
    assert [len(starts_of_clip) for starts_of_clip in starts.values()] == [1, 1]


def test_clips_seeds_and_epochs_have_crops_of_their_own(two_ramps):
    starts = set()
    for seed in (0, 1, 2):
        batches = PairBatches([two_ramps, two_ramps], train_bpe(CAPTIONS, 1000), 2, 2, seed=seed)
        for step in range(3 * len(batches)):
            starts.add(int(batches[step].segments[0, 0]))
    assert len(starts) == 3 * 3 * 4  # a seed that is a sum would make some alike
