"""From folders on disk to batches."""

import csv
import fcntl
import os
import shutil
import time
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from dualenc import InputError
from dualenc.audio import cut
from dualenc.cache import open_cache
from dualenc.data import PairBatches
from dualenc.decoding import decode, decode_blocks, to_int16
from dualenc.layouts import Clip, Split, hold_out, read_split, training_splits
from dualenc.sounds import embed_files


def rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- Layouts ---


def test_clotho_as_aac_datasets_writes_it(miniature):
    split = read_split("clotho", "train", miniature)
    table = rows(miniature / "CLOTHO_v2.1/clotho_csv_files/clotho_captions_development.csv")
    assert split.name == "clotho/development" and split.layout == "aac-datasets"
    assert [clip.name for clip in split.clips] == [row["file_name"] for row in table]
    for clip, row in zip(split.clips, table, strict=True):
        assert list(clip.captions) == [row[f"caption_{i}"] for i in range(1, 6)]
        assert clip.path.is_file()
    assert split.clip_of_caption == [i for i in range(10) for _ in range(5)]


def test_flat_layouts_read_the_same(miniature, tmp_path):
    clotho, audiocaps = miniature / "CLOTHO_v2.1", miniature / "AUDIOCAPS"
    for split in ("development", "validation"):
        shutil.copytree(clotho / "clotho_audio_files" / split, tmp_path / split)
        shutil.copy(clotho / f"clotho_csv_files/clotho_captions_{split}.csv", tmp_path)
    shutil.copytree(audiocaps / "audio_32000Hz/val", tmp_path / "audiocaps/val")
    shutil.copy(audiocaps / "csv_files_v1/val.csv", tmp_path / "audiocaps")
    for dataset, split in (("clotho", "train"), ("clotho", "val"), ("audiocaps", "val")):
        flat, nested = read_split(dataset, split, tmp_path), read_split(dataset, split, miniature)
        assert flat.layout == "flat"
        assert [(c.name, c.captions) for c in flat.clips] == [
            (c.name, c.captions) for c in nested.clips
        ]


def test_two_layouts_at_once_are_an_error_that_names_both(miniature, tmp_path):
    shutil.copytree(miniature / "CLOTHO_v2.1", tmp_path / "CLOTHO_v2.1")
    shutil.copytree(miniature / "CLOTHO_v2.1", tmp_path / "clotho")
    with pytest.raises(InputError, match="CLOTHO_v2.1/.* and .*/clotho/.*keep one"):
        read_split("clotho", "train", tmp_path)


def test_audiocaps_rows_of_one_clip_belong_together_and_missing_clips_are_counted(
    miniature, tmp_path
):
    shutil.copytree(miniature / "AUDIOCAPS", tmp_path / "AUDIOCAPS")
    table = rows(tmp_path / "AUDIOCAPS/csv_files_v1/test.csv")
    wanted = {}
    for row in table:
        wanted.setdefault(f"{row['youtube_id']}_{row['start_time']}", []).append(row["caption"])
    split = read_split("audiocaps", "test", tmp_path)
    assert {clip.path.stem: list(clip.captions) for clip in split.clips} == wanted
    split.clips[0].path.unlink()
    found = read_split("audiocaps", "test", tmp_path)
    assert len(found.clips) == 1 and found.missing == [split.clips[0].path.stem]


def test_stage_1_merges_audiocaps_three_splits(miniature):
    names = [split.name for split in training_splits("audiocaps", miniature)]
    assert names == ["audiocaps/train", "audiocaps/val", "audiocaps/test"]
    assert [s.name for s in training_splits("clotho", miniature)] == ["clotho/development"]


def test_a_folder_with_captions_csv(tmp_path):
    for name in ("a.wav", "sub/b.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, np.ones(100), 32_000)
    (tmp_path / "captions.csv").write_text(
        "file_name,caption\na.wav,one\nsub/b.wav,\"two, three\"\na.wav,four\n"
    )
    split = read_split(str(tmp_path), "train", tmp_path)
    assert [(c.name, c.captions) for c in split.clips] == [
        ("a.wav", ("one", "four")), ("sub/b.wav", ("two, three",)),
    ]
    (tmp_path / "captions.csv").write_text("file_name,caption_1,caption_2\na.wav,one,two\n")
    assert read_split(str(tmp_path), "train", tmp_path).captions == ["one", "two"]


def test_hold_out_keeps_every_clip_once(miniature):
    split = read_split("clotho", "train", miniature)
    train, held = hold_out(split, share=0.3)
    assert len(held.clips) == 3 and len(train.clips) == 7
    assert {c.name for c in train.clips + held.clips} == {c.name for c in split.clips}
    assert train.file_stem != held.file_stem


# --- Cache ---


@pytest.fixture
def clotho(miniature, tmp_path):
    shutil.copytree(miniature / "CLOTHO_v2.1", tmp_path / "data/CLOTHO_v2.1")
    return read_split("clotho", "val", tmp_path / "data")


def test_the_cache_holds_what_decoding_gives(clotho, tmp_path):
    for processes in (1, 2):
        cache = open_cache(clotho, tmp_path / f"cache{processes}", processes)
        assert len(cache) == len(clotho.clips)
        for clip, waveform in zip(clotho.clips, cache, strict=True):
            np.testing.assert_array_equal(waveform, to_int16(decode(clip.path)))


def test_the_cache_is_built_once_and_again_only_for_changed_files(clotho, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    open_cache(clotho, folder)
    first = sorted(path.name for path in folder.iterdir())
    decoded = tmp_path / "decoded.txt"

    def counting(path):
        with open(decoded, "a") as file:  # workers are other processes
            file.write(f"{path.name}\n")
        return decode_blocks(path)

    monkeypatch.setattr("dualenc.cache.decode_blocks", counting)
    open_cache(clotho, folder)
    assert not decoded.exists() and sorted(p.name for p in folder.iterdir()) == first

    changed = clotho.clips[2].path
    soundfile.write(changed, np.full(8000, 0.25), 16_000)
    cache = open_cache(clotho, folder)
    assert decoded.read_text().splitlines() == [changed.name]
    assert len(cache[2]) == 16_000 and len(list(folder.iterdir())) == 2
    for clip, waveform in zip(clotho.clips, cache, strict=True):
        np.testing.assert_array_equal(waveform, to_int16(decode(clip.path)))


def test_unusable_files_are_listed_together_and_the_others_stay_decoded(clotho, tmp_path):
    good = [to_int16(decode(clip.path)) for clip in clotho.clips]
    for i, content in ((0, b""), (3, b"not a sound")):
        clotho.clips[i].path.write_bytes(content)
    with pytest.raises(InputError) as error:
        open_cache(clotho, tmp_path / "cache")
    message = str(error.value)
    assert clotho.clips[0].name in message and clotho.clips[3].name in message and "(2)" in message
    assert len(list((tmp_path / "cache").iterdir())) == 2  # samples of the others, and their index
    for i in (0, 3):
        soundfile.write(clotho.clips[i].path, good[i], 32_000)
    cache = open_cache(clotho, tmp_path / "cache")
    assert [len(waveform) for waveform in cache] == [len(waveform) for waveform in good]
    np.testing.assert_array_equal(cache[3], good[3])
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_damaged_cache_is_built_again(clotho, tmp_path):
    folder = tmp_path / "cache"
    open_cache(clotho, folder)
    samples = next(folder.glob("*.int16"))
    os.truncate(samples, 100)
    cache = open_cache(clotho, folder)
    np.testing.assert_array_equal(cache[0], to_int16(decode(clotho.clips[0].path)))


def test_a_decoding_process_that_is_killed_ends_the_build_with_one_line(
    clotho, tmp_path, monkeypatch
):
    def killed(path):
        if path == clotho.clips[2].path:
            os.kill(os.getpid(), 9)
        return decode_blocks(path)

    monkeypatch.setattr("dualenc.cache.decode_blocks", killed)
    with pytest.raises(InputError, match="^a process that decodes .* the same command tries again"):
        open_cache(clotho, tmp_path / "cache", processes=2)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("i", [1, 3])
def test_of_a_file_that_is_faulty_further_on_nothing_is_kept(clotho, tmp_path, i):
    samples = np.zeros(16_000 * 70, np.float32)
    samples[-1] = np.nan
    soundfile.write(clotho.clips[i].path, samples, 16_000, format="WAV", subtype="FLOAT")
    with pytest.raises(InputError, match="holds NaN"):
        open_cache(clotho, tmp_path / "cache")
    soundfile.write(clotho.clips[i].path, samples[:8_000], 16_000, format="WAV")
    cache = open_cache(clotho, tmp_path / "cache")
    for clip, waveform in zip(clotho.clips, cache, strict=True):
        np.testing.assert_array_equal(waveform, to_int16(decode(clip.path)))
    assert cache.samples.nbytes == 2 * sum(map(len, cache))


def test_others_wait_for_a_file_that_takes_long(miniature, tmp_path, monkeypatch):
    split = read_split("clotho", "train", miniature)
    first, begun = split.clips[0].path, tmp_path / "begun"
    begun.mkdir()

    def slow(path):
        if path == first:
            time.sleep(0.5)
            (tmp_path / "count").write_text(str(len(list(begun.iterdir()))))
        (begun / path.name).touch()
        return decode_blocks(path)

    monkeypatch.setattr("dualenc.cache.decode_blocks", slow)
    assert len(open_cache(split, tmp_path / "cache", processes=2)) == 10
    assert 0 < int((tmp_path / "count").read_text()) <= 1


def test_what_a_killed_build_left_is_removed_unless_it_is_still_being_written(clotho, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    left, busy, other = (
        folder / f".{name}.0123.int16.4567.tmp"
        for name in ("clotho-validation", "clotho-validation.89ab", "clotho-evaluation")
    )
    for path in (left, busy, other):
        path.write_bytes(bytes(8))
    with open(busy, "rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        open_cache(clotho, folder)
        assert not left.exists() and busy.exists() and other.exists()
    open_cache(clotho, folder)  # also where there is nothing to build
    assert not busy.exists() and other.exists()


@pytest.mark.parametrize("level", [1e-4, 0.1, 3.0])
def test_a_file_its_cache_and_the_search_embed_alike(level, write_sound, tiny, tmp_path):
    samples = level * np.random.default_rng(0).standard_normal(44_100 * 12)
    path = write_sound("a.wav", samples, 44_100, subtype="FLOAT")
    (cached,) = open_cache(Split("a", [Clip("a.wav", path, ("a",))], [], "folder"), tmp_path)
    assert torch.equal(tiny.embed_audio([path]), tiny.embed_audio([cached]))
    (found,) = embed_files(tiny, [path])
    wanted = torch.nn.functional.normalize(tiny.embed_segments([cut(cached)]), dim=1)
    assert torch.equal(torch.from_numpy(found.segments), wanted)


# --- Batches ---


@pytest.fixture(scope="module")
def pairs(miniature, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    splits = [read_split("clotho", "train", miniature), *training_splits("audiocaps", miniature)]
    return [(split, open_cache(split, folder)) for split in splits]


@pytest.fixture(scope="module")
def tokenizer(pairs):
    from dualenc.text import train_tokenizer

    return train_tokenizer([c for split, _ in pairs for c in split.captions], 400)


def whole_epoch(batches, epoch):
    n = batches.steps_per_epoch
    return [batches[step] for step in range(epoch * n, (epoch + 1) * n)]


@pytest.mark.parametrize("per_clip", [1, 2, 5])
def test_an_epoch_shows_every_pair_once_in_a_new_order(pairs, tokenizer, per_clip):
    batches = PairBatches(pairs, tokenizer, 16, per_clip, seed=3)
    total = sum(len(split.captions) for split, _ in pairs)
    orders = []
    for epoch in (0, 1):
        found = torch.cat([batch.pair_ids for batch in whole_epoch(batches, epoch)])
        assert sorted(found.tolist()) == list(range(total))
        orders.append(found.tolist())
    assert orders[0] != orders[1]


def test_captions_are_drawn_together_and_their_clip_encoded_once(pairs, tokenizer):
    batches = PairBatches(pairs, tokenizer, 16, captions_per_clip=5, seed=0)
    for batch in whole_epoch(batches, 0):
        clips = batch.clip_ids.tolist()
        assert len(batch.counts) == len(set(clips)) <= 3
        own = [clips[batch.clip_of_pair.tolist().index(i)] for i in range(len(batch.counts))]
        assert [own[i] for i in batch.clip_of_pair] == clips


def test_a_batch_holds_its_pairs_clips_and_captions(pairs, tokenizer):
    from dualenc.text import tokenize

    clips = [(clip, cache[i]) for split, cache in pairs for i, clip in enumerate(split.clips)]
    captions = [caption for clip, _ in clips for caption in clip.captions]
    batch = PairBatches(pairs, tokenizer, 16, seed=1)[2]
    segments = [cut(clips[c][1]) for c in batch.clip_ids.tolist()]
    assert batch.counts.tolist() == [len(s) for s in segments]
    np.testing.assert_array_equal(batch.segments.numpy(), np.concatenate(segments))
    wanted = [captions[p] for p in batch.pair_ids.tolist()]
    assert torch.equal(batch.tokens, tokenize(tokenizer, wanted))


def test_workers_and_resumed_runs_see_the_same_batches(pairs, tokenizer):
    batches = PairBatches(pairs, tokenizer, 16, seed=5)
    wanted = [batches[step] for step in range(3, 8)]
    fresh = PairBatches(pairs, tokenizer, 16, seed=5)
    loader = DataLoader(fresh, batch_size=None, sampler=range(3, 8), num_workers=2)
    for ours, theirs in zip(wanted, loader, strict=True):
        for name, value in vars(ours).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(getattr(theirs, name)))


@pytest.mark.parametrize("per_clip", [1, 3])
def test_processes_share_the_batch_of_one(pairs, tokenizer, per_clip):
    alone = PairBatches(pairs, tokenizer, 16, per_clip, seed=2)
    step = alone.steps_per_epoch - 1  # the last batch is short
    whole = alone[step]
    shares = [PairBatches(pairs, tokenizer, 16, per_clip, 2, (rank, 3))[step] for rank in range(3)]
    assert torch.equal(torch.cat([s.segments for s in shares]), whole.segments)
    assert [len(s.tokens) for s in shares] == shares[0].sizes == shares[2].sizes
    for share in shares:
        assert torch.equal(share.clip_ids, whole.clip_ids)
        assert torch.equal(share.pair_ids, whole.pair_ids)


@pytest.mark.parametrize("per_clip", [1, 3])
@pytest.mark.parametrize("most", [1, 4, 7, 100])
def test_pieces_join_to_the_batch(pairs, tokenizer, per_clip, most):
    batch = PairBatches(pairs, tokenizer, 16, per_clip, seed=2)[0]
    pieces = batch.pieces(most)
    assert torch.equal(torch.cat([p.segments for p in pieces]), batch.segments)
    assert torch.equal(torch.cat([p.tokens for p in pieces]), batch.tokens)
    assert all(len(p.tokens) <= max(most, per_clip) for p in pieces)
    offsets = np.cumsum([0] + [len(p.counts) for p in pieces])
    joined = [p.clip_of_pair + int(o) for p, o in zip(pieces, offsets[:-1], strict=True)]
    assert torch.equal(torch.cat(joined), batch.clip_of_pair)


def test_long_clips_are_cropped_differently_each_epoch(tokenizer):
    long = np.arange(1_000_000, dtype=np.int32).astype(np.int16)
    split = Split("long", [Clip("a", None, ("one",))], [], "folder")
    batches = PairBatches([(split, [long])], tokenizer, 2, seed=0)
    first_samples = [int(batches[epoch].segments[0, 0]) for epoch in range(8)]
    assert Counter(first_samples).most_common(1)[0][1] < 4
    assert first_samples == [int(batches[epoch].segments[0, 0]) for epoch in range(8)]
