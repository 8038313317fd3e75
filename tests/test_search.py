"""Search: exact, in an index that survives what happens to a library of sounds; its command."""

import csv
import io
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CAPTIONS, noise, touch, write_csv, write_wav

from dualenc import DualEncoder, audio, decoding, search
from dualenc.errors import InputError
from dualenc.search import INDEX_NAME, Content, SoundIndex


@pytest.fixture
def sounds(tmp_path):
    """Write a folder of three sounds, one of them in a folder below."""
    for seed, name in enumerate(["a.wav", "b.wav", "deep/c.wav"]):
        write_wav(tmp_path / "sounds" / name, noise(1 + seed, seed))
    return tmp_path / "sounds"


@pytest.fixture
def decoded(monkeypatch):
    """Return the names of the files that were decoded so far."""
    names = []
    stream_audio = decoding.stream_audio

    def stream_and_note(path, faults=None):
        names.append(os.path.basename(path))
        return stream_audio(path, faults)

    monkeypatch.setattr(decoding, "stream_audio", stream_and_note)
    return names


@pytest.fixture(scope="module")
def other_model():
    torch.manual_seed(1)
    return DualEncoder.create("tiny", "random", CAPTIONS)


def build(model, sounds, **options):
    return SoundIndex.build(model, sounds, sounds / INDEX_NAME, **options)


def part_files(sounds):
    return sorted((sounds / INDEX_NAME).glob("*/*.part"))


def size_of_index(sounds):
    return sum(path.stat().st_size for path in part_files(sounds))


def vector_of(index, name):
    """Return the vector of a file of one segment, (D,)."""
    return index.vectors()[index.names.index(name)]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def projected(model, path):
    """Project a file's segments by a second route, (s, D)."""
    segments, _ = audio.to_segments([decoding.load_audio(path)])
    return model.project_segments(segments).detach()


# --- What is embedded ---

@pytest.mark.parametrize(
    ("seconds", "segments"),
    [(0.05, 1), (10, 1), (10.05, 1), (10.15, 2), (31, 4)],
)
def test_every_segment_of_a_file_is_embedded(tiny_model, tmp_path, seconds, segments):
    path = write_wav(tmp_path / "a.wav", noise(seconds, 1))
    vectors = SoundIndex.build(tiny_model, tmp_path).vectors()
    assert vectors.shape == (segments, tiny_model.config.embedding)
    assert_close(vectors, F.normalize(projected(tiny_model, path), dim=1))


def test_a_files_score_is_the_cosine_with_its_embedding(tiny_model, tmp_path):
    path = write_wav(tmp_path / "a.wav", noise(25, 1) * np.linspace(0.01, 1, 800_000))
    query = tiny_model.embed_text("rain")[0]
    score = SoundIndex.build(tiny_model, tmp_path).scores(query)
    assert_close(score, tiny_model.embed_audio(path) @ query)


def test_files_embedded_together_are_embedded_as_alone(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "EMBED_SEGMENTS", 3)
    paths = [
        write_wav(tmp_path / f"{i}.wav", noise(seconds, i))
        for i, seconds in enumerate([1, 21, 11, 2, 35, 3, 1, 12])
    ]
    index = SoundIndex.build(tiny_model, tmp_path)
    alone = [F.normalize(projected(tiny_model, path), dim=1) for path in paths]
    assert_close(index.vectors(), torch.cat(alone))
    assert index.owner.tolist() == [0, 1, 1, 1, 2, 2, 3, 4, 4, 4, 4, 5, 6, 7, 7]


def test_a_list_of_files_can_be_searched(tiny_model, sounds):
    paths = [sounds / "deep" / "c.wav", sounds / "a.wav"]
    matches = SoundIndex.build(tiny_model, paths).search("rain")
    assert {match.path for match in matches} == set(paths)


def test_a_file_that_is_listed_twice_is_searched_once(tiny_model, sounds):
    paths = [sounds / "a.wav", sounds / "b.wav"]
    twice = SoundIndex.build(tiny_model, [paths[0], sounds / "deep" / ".." / "a.wav", paths[1]])
    assert_close(twice.vectors(), SoundIndex.build(tiny_model, paths).vectors())
    assert len(twice.search("rain")) == 2


def test_the_last_segment_ends_with_the_file(tiny_model, tmp_path):
    write_wav(tmp_path / "a.wav", noise(12.5, 1))
    index = SoundIndex.build(tiny_model, tmp_path)
    (match,) = index.nearest(index.vectors()[1], by="segment")
    assert match.start == 10
    assert match.end == 12.5
    assert match.seconds == 12.5


def test_the_length_of_a_file_counts_what_no_segment_holds(tiny_model, tmp_path):
    write_wav(tmp_path / "a.wav", noise(10.05, 1))
    (match,) = SoundIndex.build(tiny_model, tmp_path).search("rain")
    assert (match.end, match.seconds) == (10, 10.05)


def test_a_model_in_training_stays_so(other_model, sounds):
    other_model.train()
    index = SoundIndex.build(other_model, sounds)
    assert other_model.training
    assert_close(index.vectors(), SoundIndex.build(other_model.eval(), sounds).vectors())


# --- Exact search ---

def index_of(model, segments, counts):
    """Make an index of segments (S, D) of any norm, of which counts belong to a file each.

    As after many saves, they lie in three parts, and in another order than that of the files.
    """
    segments = torch.as_tensor(segments)
    scaled = torch.cat([of_file / of_file.sum(dim=0).norm() for of_file in segments.split(counts)])
    order = torch.randperm(len(scaled), generator=torch.Generator().manual_seed(0))
    contents = {f"{i:03}": Content(10.0 * count, count, "") for i, count in enumerate(counts)}
    parts = scaled[order].tensor_split(3)
    return SoundIndex(model, Path("/"), contents, parts, order.argsort())


@pytest.fixture(scope="module")
def random_index(tiny_model):
    """Draw 150 files of one to four segments of unequal norms, and a query; make their index."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 5, 150).tolist()
    width = tiny_model.config.embedding
    segments = rng.standard_normal((sum(counts), width)) * rng.uniform(0.1, 2, (sum(counts), 1))
    query = rng.standard_normal(width)
    query /= np.linalg.norm(query)
    index = index_of(tiny_model, segments.astype(np.float32), counts)
    return index, np.split(segments, np.cumsum(counts)[:-1]), query


def cosines(segments, query):
    """Compute the cosine of each segment with the query: (s, D), (D,) -> (s,)."""
    return segments @ query / np.linalg.norm(segments, axis=1)


def cosine_of_mean(segments, query):
    (cosine,) = cosines(segments.mean(axis=0, keepdims=True), query)
    return cosine


def best_cosine(segments, query):
    return cosines(segments, query).max()


@pytest.mark.parametrize(("by", "score"), [("file", cosine_of_mean), ("segment", best_cosine)])
def test_the_best_are_those_of_a_sort_of_all_cosines(random_index, by, score):
    index, files, query = random_index
    scores = np.array([score(segments, query) for segments in files])
    order = np.argsort(-scores)[:10]
    matches = index.nearest(torch.tensor(query, dtype=torch.float32), 10, by)
    assert [int(match.path.name) for match in matches] == order.tolist()
    assert [match.score for match in matches] == pytest.approx(scores[order], abs=1e-5)


@pytest.mark.parametrize(("by", "score"), [("file", cosine_of_mean), ("segment", best_cosine)])
def test_a_match_is_above_the_share_of_files_that_score_lower(random_index, by, score):
    index, files, query = random_index
    scores = np.array([score(segments, query) for segments in files])
    matches = index.nearest(torch.tensor(query, dtype=torch.float32), 150, by)
    lower = [np.mean(scores < scores[int(match.path.name)]) for match in matches]
    assert [match.above for match in matches] == pytest.approx(lower)


@pytest.mark.parametrize("by", ["file", "segment"])
def test_the_segment_shown_is_the_best_one_not_the_loudest(random_index, by):
    index, files, query = random_index
    best = {}
    loudest = {}
    for i, segments in enumerate(files):
        best[i] = 10 * int(np.argmax(cosines(segments, query)))
        loudest[i] = 10 * int(np.argmax(segments @ query))
    assert best != loudest
    matches = index.nearest(torch.tensor(query, dtype=torch.float32), 150, by)
    assert {int(match.path.name): match.start for match in matches} == best


def nearest_of_ties(model, k):
    """Search five files: the second is best, and the four others are alike."""
    segments = torch.zeros(5, model.config.embedding)
    segments[[0, 2, 3, 4], 1] = 1
    segments[1, 0] = 1
    query = torch.zeros(model.config.embedding)
    query[:2] = torch.tensor([0.8, 0.6])
    return index_of(model, segments, [1] * 5).nearest(query, k)


@pytest.mark.parametrize(("k", "order"), [(9, [1, 0, 2, 3, 4]), (2, [1, 0])])
def test_ties_keep_the_order_of_names(tiny_model, k, order):
    assert [int(match.path.name) for match in nearest_of_ties(tiny_model, k)] == order


@pytest.mark.parametrize(("k", "above"), [(9, [0.8, 0, 0, 0, 0]), (2, [0.8, 0])])
def test_ties_are_not_above_each_other_however_many_are_shown(tiny_model, k, above):
    assert [match.above for match in nearest_of_ties(tiny_model, k)] == pytest.approx(above)


@pytest.mark.parametrize(("k", "by"), [(0, "file"), (1, "clip")])
def test_an_unknown_way_to_search_is_refused(random_index, k, by):
    index, _, query = random_index
    with pytest.raises(InputError, match=f"k={k}, by={by}"):
        index.nearest(torch.from_numpy(query), k, by)


def test_vectors_and_owners_are_what_a_search_library_needs(random_index):
    index, files, _ = random_index
    expected = np.concatenate(files)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(index.vectors(), expected, atol=1e-6)
    counts = [len(segments) for segments in files]
    assert index.owner.tolist() == np.repeat(np.arange(150), counts).tolist()


def test_a_sound_like_another_is_found_wherever_that_lies(tiny_model, sounds, tmp_path):
    write_wav(sounds / "b.wav", noise(25, 1) * np.linspace(0.01, 1, 800_000))
    elsewhere = shutil.copy(sounds / "b.wav", tmp_path / "elsewhere.wav")
    match = SoundIndex.build(tiny_model, sounds).search_like(elsewhere)[0]
    assert match.path == sounds / "b.wav"
    assert match.score == pytest.approx(1, abs=1e-5)


def test_a_curly_apostrophe_is_a_straight_one():
    assert search.in_words("a dog’s bark") == "a dog's bark"


# --- A library that changes ---

def test_what_is_unchanged_is_not_even_opened(tiny_model, sounds, decoded, monkeypatch):
    first = build(tiny_model, sounds)
    decoded.clear()
    monkeypatch.setattr(search, "digest_of_file", None)  # Calling it would fail.
    second = build(tiny_model, sounds)
    assert decoded == []
    assert second.names == ["a.wav", "b.wav", "deep/c.wav"]
    assert_close(second.vectors(), first.vectors())


def test_only_new_and_changed_sounds_are_embedded(tiny_model, sounds, decoded):
    build(tiny_model, sounds)
    decoded.clear()
    os.utime(write_wav(sounds / "b.wav", noise(2, 50)), (1, 1))  # Older is a change, too.
    write_wav(sounds / "new.wav", noise(1, 51))
    index = build(tiny_model, sounds)
    assert sorted(decoded) == ["b.wav", "new.wav"]
    assert_close(index.vectors(), SoundIndex.build(tiny_model, sounds).vectors())


def test_a_touched_file_is_known_by_its_content(tiny_model, sounds, decoded):
    build(tiny_model, sounds)
    decoded.clear()
    os.utime(sounds / "a.wav", (1, 1))
    assert build(tiny_model, sounds).names == ["a.wav", "b.wav", "deep/c.wav"]
    assert decoded == []


def test_a_touched_file_is_hashed_once(tiny_model, sounds, monkeypatch):
    build(tiny_model, sounds)
    os.utime(sounds / "a.wav", (1, 1))
    build(tiny_model, sounds)
    monkeypatch.setattr(search, "digest_of_file", None)  # Calling it would fail.
    build(tiny_model, sounds)


@pytest.mark.parametrize("new_name", ["z.wav", "deep/b.wav", "b.wav"])
def test_a_moved_file_takes_its_embedding_along_even_to_the_place_of_another(
    tiny_model, sounds, decoded, new_name
):
    before = build(tiny_model, sounds)
    decoded.clear()
    (sounds / "a.wav").rename(sounds / new_name)
    after = build(tiny_model, sounds)
    assert decoded == []
    assert after.missing == []
    assert_close(vector_of(after, new_name), vector_of(before, "a.wav"))
    assert build(tiny_model, sounds).missing == []


def test_a_copy_is_not_embedded_again(tiny_model, sounds, decoded):
    build(tiny_model, sounds)
    decoded.clear()
    shutil.copy(sounds / "b.wav", sounds / "copy.wav")
    index = build(tiny_model, sounds)
    assert decoded == []
    assert_close(vector_of(index, "copy.wav"), vector_of(index, "b.wav"))


def test_a_copy_that_goes_away_is_missing_not_moved(tiny_model, sounds):
    shutil.copy(sounds / "b.wav", sounds / "copy.wav")
    build(tiny_model, sounds)
    (sounds / "copy.wav").unlink()
    assert build(tiny_model, sounds).missing == ["copy.wav"]


def test_what_is_not_there_is_not_searched_but_kept(tiny_model, sounds, tmp_path, decoded):
    # It may lie on a drive that is not mounted.
    before = build(tiny_model, sounds)
    (sounds / "deep").rename(tmp_path / "unmounted")
    while_away = build(tiny_model, sounds)
    assert while_away.names == ["a.wav", "b.wav"]
    assert while_away.missing == ["deep/c.wav"]
    assert all(match.path.exists() for match in while_away.search("rain"))

    decoded.clear()
    (tmp_path / "unmounted").rename(sounds / "deep")
    after = build(tiny_model, sounds)
    assert decoded == []
    assert after.missing == []
    assert_close(after.vectors(), before.vectors())


def test_a_link_whose_target_is_away_is_missing(tiny_model, sounds, tmp_path, decoded):
    target = write_wav(tmp_path / "target.wav", noise(1, 5))
    (sounds / "link.wav").symlink_to(target)
    build(tiny_model, sounds)
    target.rename(tmp_path / "away.wav")
    index = build(tiny_model, sounds)
    assert index.missing == ["link.wav"]
    assert index.faults == {}
    decoded.clear()
    (tmp_path / "away.wav").rename(target)
    assert "link.wav" in build(tiny_model, sounds).names
    assert decoded == []


def test_a_link_that_never_led_anywhere_is_a_fault(tiny_model, sounds):
    (sounds / "link.wav").symlink_to(sounds / "nowhere")
    assert "No such file" in build(tiny_model, sounds).faults["link.wav"]


def test_a_library_of_which_nothing_is_there_says_so(tiny_model, sounds, tmp_path):
    SoundIndex.build(tiny_model, sounds, tmp_path / "index")
    shutil.rmtree(sounds)
    sounds.mkdir()
    with pytest.raises(InputError, match="3 files of the index, not there now"):
        SoundIndex.build(tiny_model, sounds, tmp_path / "index")


def test_prune_drops_what_is_not_there(tiny_model, sounds, tmp_path, decoded):
    build(tiny_model, sounds)
    before = size_of_index(sounds)
    (sounds / "deep").rename(tmp_path / "deep")
    assert build(tiny_model, sounds, prune=True).missing == ["deep/c.wav"]
    assert build(tiny_model, sounds).missing == []
    assert len(part_files(sounds)) == 1
    assert size_of_index(sounds) < before

    decoded.clear()
    (tmp_path / "deep").rename(sounds / "deep")
    build(tiny_model, sounds)
    assert decoded == ["c.wav"]


def test_prune_keeps_all_that_is_there(tiny_model, sounds, decoded):
    before = build(tiny_model, sounds)
    build(tiny_model, sounds, prune=True)
    (sounds / "a.wav").unlink()
    build(tiny_model, sounds, prune=True)
    decoded.clear()
    after = build(tiny_model, sounds)
    assert decoded == []
    assert_close(after.vectors(), before.vectors()[1:])


# --- Files that cannot be read ---

def test_what_is_no_sound_is_reported_and_remembered(tiny_model, sounds, decoded):
    name = os.fsdecode(b"bad \xff\n.wav")  # not UTF-8
    (sounds / name).write_bytes(b"no sound")
    assert "cannot be read as a sound" in build(tiny_model, sounds).faults[name]
    decoded.clear()
    index = build(tiny_model, sounds)
    assert decoded == []
    assert "cannot be read as a sound" in index.faults[name]
    assert index.names == ["a.wav", "b.wav", "deep/c.wav"]


def test_a_file_that_was_repaired_is_searched(tiny_model, sounds):
    (sounds / "bad.wav").write_bytes(b"no sound")
    build(tiny_model, sounds)
    write_wav(sounds / "bad.wav", noise(1, 5))
    index = build(tiny_model, sounds)
    assert "bad.wav" in index.names
    assert index.faults == {}


def test_a_truncated_file_is_searched_and_reported(tiny_model, sounds):
    path = write_wav(sounds / "cut.wav", noise(3))
    path.write_bytes(path.read_bytes()[:64_044])
    for _ in range(2):
        index = build(tiny_model, sounds)
        assert "1.0 s of 3.0 s" in index.faults["cut.wav"]
        assert "cut.wav" in index.names


def test_a_pipe_is_a_fault_and_is_not_waited_for(tiny_model, sounds):
    os.mkfifo(sounds / "pipe.wav")
    assert build(tiny_model, sounds).faults == {"pipe.wav": "is not a file"}


def test_a_file_that_cannot_be_read_now_keeps_its_embedding(tiny_model, sounds, monkeypatch):
    before = build(tiny_model, sounds)
    write_wav(sounds / "a.wav", noise(2, 50))
    with monkeypatch.context() as patch:
        patch.setattr(search, "digest_of_file", refused)
        index = build(tiny_model, sounds)
    assert index.faults == {"a.wav": "cannot be read now (Permission denied)"}
    assert_close(index.vectors(), before.vectors())
    index = build(tiny_model, sounds)
    assert index.faults == {}
    assert_close(index.vectors(), SoundIndex.build(tiny_model, sounds).vectors())


def refused(path, stopping):
    raise PermissionError(13, "Permission denied", path)


def test_a_fault_of_the_disk_is_not_taken_for_one_of_the_sound(tiny_model, sounds, monkeypatch):
    stream_audio = decoding.stream_audio

    def fails_on_a(path, faults=None):
        if path.endswith("a.wav"):
            raise InputError(f"{path}: cannot be read (Input/output error)") from OSError(5, "x")
        return stream_audio(path, faults)

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "stream_audio", fails_on_a)
        index = build(tiny_model, sounds)
    assert "Input/output error" in index.faults["a.wav"]
    assert index.names == ["b.wav", "deep/c.wav"]
    assert build(tiny_model, sounds).names == ["a.wav", "b.wav", "deep/c.wav"]


def test_a_file_that_goes_before_it_is_decoded_is_read_again(tiny_model, sounds, monkeypatch):
    digest_of_file = search.digest_of_file

    def hash_and_move(path, stopping):
        digest = digest_of_file(path, stopping)
        if path.endswith("a.wav"):
            os.rename(path, sounds / "moved.wav")
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(search, "digest_of_file", hash_and_move)
        index = build(tiny_model, sounds)
    assert index.faults["a.wav"] == "cannot be read now (No such file or directory)"
    assert "moved.wav" in build(tiny_model, sounds).names


def test_a_file_that_changes_while_it_is_read_is_read_again(tiny_model, sounds, monkeypatch):
    stream_audio = decoding.stream_audio

    def stream_and_replace(path, faults=None):
        yield from stream_audio(path, faults)
        if path.endswith("a.wav"):
            write_wav(sounds / "a.wav", noise(2, 50))

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "stream_audio", stream_and_replace)
        assert "changed while" in build(tiny_model, sounds).faults["a.wav"]
    index = build(tiny_model, sounds)
    assert_close(index.vectors(), SoundIndex.build(tiny_model, sounds).vectors())


# --- The index folder ---

def test_library_and_index_may_be_moved_together(tiny_model, sounds, tmp_path, monkeypatch):
    build(tiny_model, sounds)
    moved = sounds.rename(tmp_path / "moved")
    monkeypatch.setattr(search, "digest_of_file", None)  # Calling it would fail.
    index = build(tiny_model, moved)
    assert index.names == ["a.wav", "b.wav", "deep/c.wav"]
    assert index.search("rain")[0].path.exists()


def test_a_library_may_be_renamed_while_its_index_lies_elsewhere(
    tiny_model, sounds, tmp_path, decoded
):
    SoundIndex.build(tiny_model, sounds, tmp_path / "index")
    decoded.clear()
    moved = sounds.rename(tmp_path / "moved")
    index = SoundIndex.build(tiny_model, moved, tmp_path / "index")
    assert decoded == []
    assert index.names == ["a.wav", "b.wav", "deep/c.wav"]


def test_a_library_is_known_by_whatever_link_it_is_reached(
    tiny_model, sounds, tmp_path, decoded
):
    SoundIndex.build(tiny_model, sounds, tmp_path / "index")
    (tmp_path / "link").symlink_to(sounds)
    decoded.clear()
    os.utime(sounds / "a.wav", (1, 1))
    index = SoundIndex.build(tiny_model, tmp_path / "link", tmp_path / "index")
    assert decoded == []
    assert index.search("rain")[0].path.parent.is_relative_to(tmp_path / "link")
    stored = search.StoredIndex(tmp_path / "index", tiny_model)
    assert len(stored.files) == 3


def test_two_libraries_in_one_index_folder_keep_apart(tiny_model, sounds, tmp_path, decoded):
    for seed, name in enumerate(["a.wav", "b.wav"]):  # The files of both have the same names.
        write_wav(tmp_path / "others" / name, noise(1, 10 + seed))
    first = SoundIndex.build(tiny_model, sounds, tmp_path / "index")
    second = SoundIndex.build(tiny_model, tmp_path / "others", tmp_path / "index", prune=True)
    assert second.missing == []
    decoded.clear()
    again = SoundIndex.build(tiny_model, sounds, tmp_path / "index")
    assert decoded == []
    assert_close(again.vectors(), first.vectors())


def test_a_folder_below_is_searched_in_the_same_index(tiny_model, sounds, tmp_path, decoded):
    SoundIndex.build(tiny_model, sounds, tmp_path / "index")
    decoded.clear()
    index = SoundIndex.build(tiny_model, sounds / "deep", tmp_path / "index")
    assert decoded == []
    assert index.names == ["c.wav"]


def test_each_model_has_its_own_embeddings(tiny_model, other_model, sounds, decoded):
    build(tiny_model, sounds)
    other = build(other_model, sounds)
    assert_close(other.vectors(), SoundIndex.build(other_model, sounds).vectors())
    decoded.clear()
    build(tiny_model, sounds)
    assert decoded == []


def test_a_save_writes_what_is_new_since_the_last_one(tiny_model, sounds):
    for seed in range(20):
        write_wav(sounds / f"{seed}.wav", noise(1, 100 + seed))
    build(tiny_model, sounds)
    before = size_of_index(sounds)
    write_wav(sounds / "new.wav", noise(1, 200))
    build(tiny_model, sounds)
    assert len(part_files(sounds)) == 2
    assert size_of_index(sounds) - before < before / 4


def test_embeddings_are_saved_while_others_are_made(tiny_model, sounds, monkeypatch):
    monkeypatch.setattr(search, "SAVE_SECONDS", -1)
    monkeypatch.setattr(search, "EMBED_SEGMENTS", 1)
    build(tiny_model, sounds)
    assert len(part_files(sounds)) == 3


def test_many_parts_become_one(tiny_model, sounds, monkeypatch, decoded):
    monkeypatch.setattr(search, "MAX_PARTS", 3)
    parts = []
    for seed in range(4):
        write_wav(sounds / f"{seed}.wav", noise(1, 100 + seed))
        index = build(tiny_model, sounds)
        parts.append(len(part_files(sounds)))
    assert parts == [1, 2, 3, 1]
    decoded.clear()
    merged = build(tiny_model, sounds)
    assert decoded == []
    assert_close(merged.vectors(), index.vectors())
    assert_close(merged.vectors(), SoundIndex.build(tiny_model, sounds).vectors())


def test_merging_keeps_what_is_not_there_now(tiny_model, sounds, tmp_path, monkeypatch, decoded):
    build(tiny_model, sounds)
    (sounds / "deep").rename(tmp_path / "deep")
    monkeypatch.setattr(search, "MAX_PARTS", 1)
    write_wav(sounds / "new.wav", noise(1, 5))
    build(tiny_model, sounds)
    assert len(part_files(sounds)) == 1
    assert build(tiny_model, sounds).missing == ["deep/c.wav"]
    (tmp_path / "deep").rename(sounds / "deep")
    decoded.clear()
    build(tiny_model, sounds)
    assert decoded == []


def test_the_later_part_counts_where_the_clock_was_put_back(tiny_model, sounds, monkeypatch):
    build(tiny_model, sounds)
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    write_wav(sounds / "a.wav", noise(2, 50))
    build(tiny_model, sounds)
    monkeypatch.setattr(search, "digest_of_file", None)  # Calling it would fail.
    build(tiny_model, sounds)


@pytest.mark.parametrize("kept", [0, 1000, -1000, -4])
def test_a_damaged_part_is_passed_over_and_its_files_are_embedded_again(
    tiny_model, sounds, decoded, capsys, kept
):
    build(tiny_model, sounds)
    write_wav(sounds / "new.wav", noise(1, 5))
    before = build(tiny_model, sounds)
    _, damaged = part_files(sounds)
    damaged.write_bytes(damaged.read_bytes()[:kept])
    decoded.clear()
    after = build(tiny_model, sounds)
    assert decoded == ["new.wav"]
    assert f"{damaged}: cannot be read (" in capsys.readouterr().err
    assert_close(after.vectors(), before.vectors())


def test_a_file_whose_content_was_in_a_damaged_part_is_embedded_again(
    tiny_model, sounds, decoded
):
    build(tiny_model, sounds)
    os.utime(sounds / "a.wav", (1, 1))
    build(tiny_model, sounds)  # A second part knows the file, by a content of the first.
    part_files(sounds)[0].write_bytes(b"")
    decoded.clear()
    assert build(tiny_model, sounds).names == ["a.wav", "b.wav", "deep/c.wav"]
    assert sorted(decoded) == ["a.wav", "b.wav", "c.wav"]


def test_an_index_of_an_earlier_version_is_made_anew(tiny_model, sounds, capsys):
    old_index = sounds / INDEX_NAME / "index"
    old_index.parent.mkdir()
    header = json.dumps([["index 2", "0", ".."], {"a.wav": [[1, 2], 1.0, 1, ""]}])
    torch.save([header, torch.zeros(1, tiny_model.config.embedding)], old_index)
    assert build(tiny_model, sounds).names == ["a.wav", "b.wav", "deep/c.wav"]
    assert f"{old_index}: is of an earlier version" in capsys.readouterr().err
    build(tiny_model, sounds)
    assert capsys.readouterr().err == ""


def test_an_index_that_cannot_be_written_is_refused_before_the_first_file(
    tiny_model, sounds, tmp_path, decoded
):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: the index cannot be written.*--index FOLDER"):
        SoundIndex.build(tiny_model, sounds, tmp_path / "file")
    assert decoded == []


def test_an_index_that_cannot_be_written_can_be_searched(tiny_model, sounds, monkeypatch):
    build(tiny_model, sounds)
    monkeypatch.setattr(search, "save_atomically", None)  # Calling it would fail.
    monkeypatch.setattr(search.tempfile, "TemporaryFile", None)
    assert build(tiny_model, sounds).search("rain")


def test_two_searches_at_once_both_keep_what_they_embed(tiny_model, sounds, decoded):
    # Each began before the other saved.
    first = search.StoredIndex(sounds / INDEX_NAME, tiny_model)
    second = search.StoredIndex(sounds / INDEX_NAME, tiny_model)
    for stored, name in ((first, "a.wav"), (second, "b.wav"), (first, "b.wav")):
        stored.check_writable()
        search.embed_changed(tiny_model, stored, [os.path.realpath(sounds / name)])
    decoded.clear()
    index = build(tiny_model, sounds)
    assert decoded == ["c.wav"]
    assert_close(index.vectors(), SoundIndex.build(tiny_model, sounds).vectors())


def test_two_searches_at_once_write_unfinished_vectors_under_names_of_their_own(
    tiny_model, tmp_path, monkeypatch
):
    stored = search.StoredIndex(tmp_path, tiny_model)
    stored.check_writable()
    replace = os.replace
    temporary_names = set()

    def note_and_replace(temporary, path):
        temporary_names.add(os.path.basename(temporary))
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", note_and_replace)
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        stored.save_unfinished([search.Unfinished("digest", [torch.zeros(1024)])])
    assert len(temporary_names) == 2


def test_a_part_that_another_search_has_just_merged_is_no_fault(tiny_model, sounds, monkeypatch):
    build(tiny_model, sounds)
    write_wav(sounds / "new.wav", noise(1, 5))
    build(tiny_model, sounds)
    read_part = search.read_part
    read = []

    def prune_before_the_second(part_file):
        read.append(part_file)
        if len(read) == 2:
            (sounds / "b.wav").unlink()
            build(tiny_model, sounds, prune=True)
        return read_part(part_file)

    monkeypatch.setattr(search, "read_part", prune_before_the_second)
    stored = search.StoredIndex(sounds / INDEX_NAME, tiny_model)
    assert {os.path.basename(path) for path in stored.files} == {"a.wav", "c.wav", "new.wav"}
    assert sum(map(len, stored.parts)) == 3


# --- Reading ahead in threads ---

@pytest.fixture
def interrupt_at(monkeypatch):
    """Have the n-th call of project interrupted, or none; a list counts the segments of the others.

    Segments are embedded one at a time.
    """
    monkeypatch.setattr(search, "EMBED_SEGMENTS", 1)
    project = search.project
    embedded = []

    def interrupt_at(call):
        embedded.clear()

        def project_or_interrupt(model, segments):
            if len(embedded) + 1 == call:
                raise KeyboardInterrupt
            embedded.extend(segments)
            return project(model, segments)

        monkeypatch.setattr(search, "project", project_or_interrupt)
        return embedded

    return interrupt_at


def test_an_interruption_keeps_what_was_embedded(tiny_model, sounds, interrupt_at):
    interrupt_at(3)
    with pytest.raises(KeyboardInterrupt):
        build(tiny_model, sounds)
    embedded = interrupt_at(None)
    build(tiny_model, sounds)
    assert len(embedded) == 1


def test_an_interruption_ends_all_threads(tiny_model, sounds, interrupt_at):
    threads = threading.active_count()
    interrupt_at(3)
    with pytest.raises(KeyboardInterrupt):
        build(tiny_model, sounds)
    assert all_end(threads)


@pytest.fixture
def long_sounds(tmp_path):
    """Write a folder of one sound of seven segments, the last one short."""
    write_wav(tmp_path / "long" / "recording.wav", noise(65, 1))
    return tmp_path / "long"


def unfinished_files(sounds):
    return list((sounds / INDEX_NAME).glob("*/*.unfinished"))


def test_a_recording_whose_embedding_was_interrupted_is_resumed(
    tiny_model, long_sounds, interrupt_at
):
    interrupt_at(5)
    with pytest.raises(KeyboardInterrupt):
        build(tiny_model, long_sounds)
    embedded = interrupt_at(None)
    index = build(tiny_model, long_sounds)
    assert len(embedded) == 3
    assert torch.equal(index.vectors(), SoundIndex.build(tiny_model, long_sounds).vectors())
    assert unfinished_files(long_sounds) == []


def test_a_recording_that_changed_after_an_interruption_is_embedded_anew(
    tiny_model, long_sounds, interrupt_at
):
    interrupt_at(5)
    with pytest.raises(KeyboardInterrupt):
        build(tiny_model, long_sounds)
    interrupt_at(None)
    write_wav(long_sounds / "recording.wav", noise(65, 2))
    index = build(tiny_model, long_sounds)
    assert torch.equal(index.vectors(), SoundIndex.build(tiny_model, long_sounds).vectors())


def test_prune_drops_what_an_interruption_left_of_a_recording_that_is_gone(
    tiny_model, long_sounds, interrupt_at
):
    write_wav(long_sounds / "another.wav", noise(1, 3))
    interrupt_at(5)
    with pytest.raises(KeyboardInterrupt):
        build(tiny_model, long_sounds)
    interrupt_at(None)
    (long_sounds / "recording.wav").unlink()
    build(tiny_model, long_sounds)
    assert len(unfinished_files(long_sounds)) == 1
    build(tiny_model, long_sounds, prune=True)
    assert unfinished_files(long_sounds) == []


def test_a_recording_is_saved_while_it_is_embedded(
    tiny_model, long_sounds, interrupt_at, monkeypatch
):
    # Where the power fails, nothing is saved at the end.
    monkeypatch.setattr(search, "SAVE_SECONDS", 0)
    save_unfinished = search.StoredIndex.save_unfinished
    saved = []

    def save_and_note(stored, files):
        save_unfinished(stored, files)
        for path in unfinished_files(long_sounds):
            saved.append(len(torch.load(path)))

    monkeypatch.setattr(search.StoredIndex, "save_unfinished", save_and_note)
    interrupt_at(None)
    build(tiny_model, long_sounds)
    assert saved == [1, 2, 3, 4, 5, 6, 7]


def test_equal_recordings_leave_nothing_unfinished(tiny_model, tmp_path):
    # The second is read while the first is saved.
    stored = search.StoredIndex(tmp_path, tiny_model)
    stored.check_writable()
    file = search.File(size=1, modified=1, digest="digest")
    segments = torch.zeros(1, tiny_model.config.embedding)
    stored.add(search.Reading("/first", file, Content(10.0, 1, "")), segments)
    stored.save()
    stored.save_unfinished([search.Unfinished("digest", [segments[0]])])
    stored.add(search.Reading("/second", file, None), segments[:0])
    stored.save()
    assert list(tmp_path.rglob("*.unfinished")) == []


def test_known_files_do_not_wait_for_the_block_of_a_new_one(tiny_model):
    taken = []

    def pieces():
        yield search.Block("/new", "digest", np.zeros(320_000, np.int16), None)
        for i in range(100):
            taken.append(i)
            yield search.Reading(f"/known {i}", search.File(1, 1, "known"), None)

    finished = search.embed(tiny_model, pieces(), unfinished={})
    assert len(next(finished)) == search.EMBED_SEGMENTS
    assert len(taken) == search.EMBED_SEGMENTS


def test_a_damaged_file_of_unfinished_vectors_is_reported_and_passed_over(
    tiny_model, long_sounds, interrupt_at, capsys
):
    interrupt_at(5)
    with pytest.raises(KeyboardInterrupt):
        build(tiny_model, long_sounds)
    (damaged,) = unfinished_files(long_sounds)
    damaged.write_bytes(damaged.read_bytes()[:100])
    embedded = interrupt_at(None)
    assert build(tiny_model, long_sounds).names == ["recording.wav"]
    assert len(embedded) == 7
    assert f"{damaged}: cannot be read (" in capsys.readouterr().err


def all_end(threads: int) -> bool:
    """Tell whether no more threads than that are left; those that are just ending have 2 s."""
    until = time.monotonic() + 2
    while threading.active_count() > threads and time.monotonic() < until:
        time.sleep(0.01)
    return threading.active_count() <= threads


def test_threads_read_ahead_no_further_than_the_queue_holds():
    taken = []

    def blocks():
        for i in range(1000):
            taken.append(i)
            yield i

    items = search.in_threads([blocks()], 5, threading.Event())
    next(items)
    time.sleep(0.2)
    # One was taken from the queue, five wait, one is being put.
    assert len(taken) <= 7
    items.close()


def test_items_of_one_iterator_stay_in_order_and_all_come():
    iterators = [iter(range(1000 * i, 1000 * i + 50)) for i in range(20)]
    items = list(search.in_threads(iterators, 3, threading.Event()))
    assert len(items) == 20 * 50
    for i in range(20):
        of_one_iterator = [item for item in items if item // 1000 == i]
        assert of_one_iterator == list(range(1000 * i, 1000 * i + 50))


def test_an_error_in_a_thread_is_raised_and_ends_the_others():
    def fails():
        yield 1
        raise MemoryError

    endless = iter(int, 1)
    threads = threading.active_count()
    with pytest.raises(MemoryError):
        list(search.in_threads([fails(), endless], 3, threading.Event()))
    assert all_end(threads)


def test_hashing_a_large_file_can_be_stopped(sounds):
    stopping = threading.Event()
    stopping.set()
    with pytest.raises(InterruptedError):
        search.digest_of_file(sounds / "a.wav", stopping)


# --- The command ---

@pytest.fixture
def command(monkeypatch, tmp_path, tiny_model):
    """Return a function that runs the command with the tiny model."""
    torch.save(tiny_model.checkpoint(), tmp_path / "best.pt")

    def call(*arguments):
        options = ["--checkpoint", str(tmp_path / "best.pt"), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["search", *options, *map(str, arguments)])
        search.main()

    return call


def test_matches_are_shown_in_a_table(command, sounds, capsys):
    command("--audio", sounds, "--", "-a dog barks")
    table = capsys.readouterr().out
    numbers = re.findall(r"^ +(\d)\. +-?0\.\d{3} +([\d.]+)%", table, re.M)
    assert numbers == [("1", "66.7"), ("2", "33.3"), ("3", "0.0")]
    assert re.findall(r"0:00 to 0:02  (.*)", table) == ["b.wav"]


def test_the_number_of_files_and_the_index_folder_are_reported(command, sounds, capsys):
    command("rain", "--audio", sounds)
    assert capsys.readouterr().err == f"3 files; index in {sounds / INDEX_NAME}\n"


def test_faults_are_counted_and_listed(command, sounds, capsys):
    (sounds / "bad\x1b.wav").write_bytes(b"x")
    command("--audio", sounds, "--list-faults")
    out, err = capsys.readouterr()
    assert "; 1 could not be read, or not to the end (--list-faults);" in err
    assert re.match(r"bad\\x1b.wav: cannot be read as a sound \(.*\)\n$", out)


def test_what_is_not_there_is_counted_and_listed_by_folder(command, sounds, tmp_path, capsys):
    for seed, name in enumerate(["drive/x.wav", "drive/sub/y.wav", "deep/d.wav"]):
        write_wav(sounds / name, noise(1, 20 + seed))
    command("rain", "--audio", sounds)
    (sounds / "drive").rename(tmp_path / "drive")
    (sounds / "deep" / "d.wav").unlink()
    capsys.readouterr()
    command("--audio", sounds, "--list-faults")
    out, err = capsys.readouterr()
    assert "3 files; 3 files not there now, kept in the index (--prune drops them);" in err
    assert out.splitlines() == [
        "deep/d.wav: is not there now (1 file)", "drive/: is not there now (2 files)"
    ]


def test_what_is_passed_over_is_counted(command, sounds, capsys, monkeypatch):
    touch(sounds / "cover.jpg", sounds / "notes.txt")
    scandir = os.scandir

    def refuse_deep(folder):
        if str(folder).endswith("deep"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse_deep)
    command("rain", "--audio", sounds)
    passed_over = "2 files of other kinds, 1 folder that may not be entered"
    assert f"2 files; passed over: {passed_over}; index in" in capsys.readouterr().err


def test_prune_says_how_many_it_drops(command, sounds, capsys):
    command("rain", "--audio", sounds)
    (sounds / "a.wav").unlink()
    capsys.readouterr()
    command("rain", "--audio", sounds, "--prune")
    assert "2 files; 1 file not there, dropped from the index;" in capsys.readouterr().err


def test_a_sound_is_the_query_and_json_the_answer(command, sounds, capsys):
    like = sounds / "b.wav"
    command("--like", like, "--audio", sounds, "--json", "--by", "segment", "--top", 2)
    answer = json.loads(capsys.readouterr().out)
    assert answer["query"] == str(like)
    assert len(answer["matches"]) == 2
    assert answer["matches"][0] == {
        "path": str(like),
        "score": pytest.approx(1, abs=1e-4),
        "above": pytest.approx(2 / 3),
        "start": 0,
        "end": 2,
        "seconds": 2,
    }


@pytest.mark.parametrize("by", ["file", "segment"])
@pytest.mark.parametrize("query", [["rain"], ["--like", "b.wav"]])
def test_files_are_scored_and_as_many_are_shown_as_the_options_say(
    command, sounds, tiny_model, monkeypatch, capsys, query, by
):
    for seed in (7, 8):
        write_wav(sounds / f"long {seed}.wav", noise(25, seed) * np.linspace(0.01, 1, 800_000))
    monkeypatch.chdir(sounds)
    command(*query, "--audio", ".", "--json", "--by", by, "--top", 4)
    matches = json.loads(capsys.readouterr().out)["matches"]
    index = SoundIndex.build(tiny_model, sounds)
    search_for = index.search_like if query[0] == "--like" else index.search
    expected = search_for(query[-1], 4, by)
    assert [match["score"] for match in matches] == pytest.approx(
        [match.score for match in expected], abs=1e-5
    )


def test_sounds_are_embedded_in_the_precision_given(command, sounds, monkeypatch):
    precisions = []
    project = search.project

    def project_and_note(model, segments):
        precisions.append(model.precision)
        return project(model, segments)

    monkeypatch.setattr(search, "project", project_and_note)
    command("rain", "--audio", sounds, "--precision", "bf16")
    assert set(precisions) == {torch.bfloat16}


def test_without_checkpoint_the_newest_run_searches(
    sounds, tmp_path, tiny_model, monkeypatch, capsys
):
    (tmp_path / "runs/a").mkdir(parents=True)
    torch.save(tiny_model.checkpoint(), tmp_path / "runs/a/best.pt")
    monkeypatch.chdir(tmp_path)
    arguments = ["rain", "--audio", str(sounds), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["search", *arguments])
    search.main()
    assert "b.wav" in capsys.readouterr().out


def test_sentences_are_read_line_by_line(command, sounds, capsys, monkeypatch):
    typed = io.BytesIO(b"rain\r\n ?! \nrain\n  rain\xff falls ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, encoding="utf-8", newline=""))
    command("--audio", sounds, "--json")
    out, err = capsys.readouterr()
    queries = [json.loads(line)["query"] for line in out.splitlines()]
    assert queries == ["rain", "rain", "rain\ufffd falls"]
    assert "'?!': no word is left" in err


def test_who_types_gets_a_prompt_and_a_history(monkeypatch, capsys):
    prompts = []

    def typed(prompt):
        prompts.append(prompt)
        if len(prompts) == 3:
            raise EOFError
        return "rain"

    terminal = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.delitem(sys.modules, "readline", raising=False)
    assert list(search.typed_sentences()) == ["rain", "rain"]
    assert prompts == ["> "] * 3
    assert "readline" in sys.modules


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a dog", "--audio", "nowhere"], "nowhere: no such folder of sounds"),
        (["?! ", "--audio", "sounds"], "no word is left"),
        (["-bark", "--audio", "sounds"], "begins with a dash goes after --"),
        (["a dog", "--serve", "--audio", "sounds"], "not allowed with"),
        (["a dog", "--audio", "sounds", "--top", "0"], "--top: 0: a whole number above 0"),
        (["a dog", "--audio", "empty"], "no sound file that can be read: none"),
        (["a dog", "--audio", "bad"], "no sound file that can be read: x.wav: .*as a sound"),
        (["a dog", "--audio", "sounds", "--index", "file"], "cannot be written.*--index FOLDER"),
        (["--like", "file", "--audio", "sounds"], "file: cannot be read as a sound"),
        (["--serve", "--audio", "sounds", "--port", "{taken}"], "--port.*name another"),
        (["--queries", "q.csv", "--audio", "sounds"], "--queries and --submission go together"),
        (["dog", "--submission", "a.csv", "--audio", "sounds"], "and --submission go together"),
        (["--queries", "q.csv", "--submission", "no/a.csv", "--audio", "sounds"],
         "no/a.csv: cannot be written"),
        (["--queries", "other.csv", "--submission", "a.csv", "--audio", "sounds"],
         "other.csv: .*columns? caption"),
        (["--queries", "empty.csv", "--submission", "a.csv", "--audio", "sounds"],
         "empty.csv: '\\?': no word is left"),
    ],
)
def test_bad_input_is_one_line(command, sounds, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("file", "empty/file", "bad/x.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no sound")
    write_csv(tmp_path / "q.csv", ["caption"], [["rain"]])
    write_csv(tmp_path / "other.csv", ["query"], [["rain"]])
    write_csv(tmp_path / "empty.csv", ["caption"], [["rain"], ["?"]])
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=message) as error:
            command(*(argument.format(taken=port) for argument in arguments))
    assert "\n" not in str(error.value)
    assert not (sounds / INDEX_NAME).exists()  # Before anything is embedded.


# --- The submission ---

def read_submission(path):
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    return header, [row[0] for row in rows], np.array([row[1:] for row in rows], float)


def test_a_submission_has_a_row_for_each_query_and_a_column_for_each_file(
    command, sounds, tmp_path, tiny_model, capsys
):
    queries = ["rain", "a, dog", "rain", "birds sing", "a, dog", "dog"]
    table = write_csv(tmp_path / "q.csv", ["caption"], [[query] for query in queries])
    command("--queries", table, "--audio", sounds, "--submission", tmp_path / "out.csv")
    header, rows, scores = read_submission(tmp_path / "out.csv")
    assert header == ["index", "a.wav", "b.wav", "deep/c.wav"]
    assert rows == ["rain", "a, dog", "birds sing", "dog"]
    audio_embeddings = tiny_model.embed_audio(sounds / name for name in header[1:])
    expected = tiny_model.embed_text(rows) @ audio_embeddings.T
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert "4 queries, 3 files" in capsys.readouterr().out


def test_a_submission_has_only_what_is_in_the_folder(command, sounds, tmp_path):
    table = write_csv(tmp_path / "q.csv", ["caption"], [["rain"]])
    command("rain", "--audio", sounds)
    (sounds / "a.wav").unlink()
    command("--queries", table, "--audio", sounds, "--submission", tmp_path / "out.csv")
    header, _, _ = read_submission(tmp_path / "out.csv")
    assert header == ["index", "b.wav", "deep/c.wav"]


def test_a_submission_without_one_of_the_files_is_not_written(command, sounds, tmp_path):
    table = write_csv(tmp_path / "q.csv", ["caption"], [["rain"]])
    path = write_wav(sounds / "cut.wav", noise(3))
    path.write_bytes(path.read_bytes()[:64_044])
    with pytest.raises(InputError, match=r"cut.wav: .*1.0 s of 3.0 s"):
        command("--queries", table, "--audio", sounds, "--submission", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
