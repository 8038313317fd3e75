"""Files that are replaced as a whole, and what is left of those that were not."""

import os
import stat

import numpy as np
import pytest

from dualenc import InputError, replacing
from dualenc.arrays import write_arrays


def test_a_file_that_is_being_written_is_left_alone_and_an_unfinished_one_removed(tmp_path):
    path, left = tmp_path / "a[1].pt", tmp_path / ".a[1].pt.0123.4567.tmp"
    left.touch()
    with replacing(path) as first:
        first.write_text("first")
        assert not left.exists()
        with replacing(path) as second:  # another process's: only the name tells it apart
            second.write_text("second")
        assert path.read_text() == "second" and first.exists()
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["a[1].pt"]


def test_a_temporary_file_that_is_taken_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    from dualenc import fcntl

    def taken(file, operation):
        if operation == fcntl.LOCK_EX:
            monkeypatch.undo()
            os.unlink(file.name)

    monkeypatch.setattr(fcntl, "flock", taken)
    with replacing(tmp_path / "a") as temporary:
        assert temporary.exists()
        temporary.write_text("whole")
    assert (tmp_path / "a").read_text() == "whole"


def test_the_file_and_then_its_folder_are_synced(tmp_path, monkeypatch):
    synced = []

    def note(descriptor):
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), (tmp_path / "a").exists()))

    monkeypatch.setattr(os, "fsync", note)
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("whole")
    assert synced == [(False, False), (True, True)]


def test_a_failure_keeps_what_was_there(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(InputError, match="a: cannot be written .* what was there is kept"):
        with replacing(tmp_path / "a") as temporary:
            temporary.write_text("part")
            raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_unfinished_arrays_of_any_generation_are_removed(tmp_path):
    left = [tmp_path / f".{name}.89ab.npy.0123.4567.tmp" for name in ("embeddings", "others")]
    for path in left:
        path.touch()
    write_arrays(tmp_path, {"format": "x"}, {"embeddings": np.zeros(3)})
    assert [path.exists() for path in left] == [False, True]
