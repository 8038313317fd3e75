"""Clotho, AudioCaps or a folder of one's own -> clips -> waveforms -> batches (report, section 3).

    python -m dualenc.data check FOLDER    # what is there, and what is wrong with it

Whatever is drawn here (the order of an epoch, a crop) is seeded from (seed, epoch, index): workers,
processes and resumed runs see the same batches.

n samples at 32 kHz; B pairs of a batch, B_r of a process's share, C clips, S segments, L tokens.
"""

import collections
import csv
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from dualenc.audio import crop, to_segments
from dualenc.decoding import (
    SAMPLE_RATE, Waveforms, all_channels, decode_once, load_audio, sounds_below,
)
from dualenc.errors import InputError, Parser, printable, run_command
from dualenc.text import tokenize

# --- What lies where ---

SPLITS = {"train": "development", "val": "validation", "test": "evaluation"}  # and Clotho's names
PLACES = {  # of a csv file and its sounds, below the data folder or one of the roots in it
    "clotho": (("CLOTHO_v2.1", "clotho_v2.1", "clotho", "Clotho", "."), (
        ("clotho_captions_{name}.csv", "{name}"),  # what the archives unpack to
        ("clotho_csv_files/clotho_captions_{name}.csv", "clotho_audio_files/{name}"),
        ("csv_files/{split}.csv", "waveforms/{split}"),
    )),
    "audiocaps": (("AUDIOCAPS", "audiocaps", "AudioCaps", "."), (
        ("csv_files_v1/{split}.csv", "audio_32000Hz/{split}"),  # aac-datasets
        ("{split}.csv", "audio_32000Hz/{split}"),
        ("csv_files_v1/{split}.csv", "{split}"),
        ("{split}.csv", "{split}"),
        ("csv_files_v2/{split}.csv", "audio_32000Hz/{split}"),  # AudioCaps 2.0
    )),
}
# What AudioCaps' sound files are called, before the suffix; the first is aac-datasets'.
NAMINGS = (
    "{youtube_id}_{start_time}", "{youtube_id}_{start_time}_{end_time}", "Y{youtube_id}",
    "{youtube_id}", "{audiocap_id}",
)
HELD_OUT_SHARE, HELD_OUT_CLIPS = 0.1, 10  # of a folder a tenth, but at least ten


class Clip(NamedTuple):
    """One sound file and its captions; the name is the csv's, byte for byte."""

    name: str
    path: Path
    captions: tuple[str, ...]


@dataclasses.dataclass
class Split:
    """One split of a data set, as found on disk.

    Its name is "clotho/development", "audiocaps/train", or "FOLDER@DIGEST/all", "/train", "/val": a
    folder is known by its clips' names and captions, wherever it lies.
    """

    name: str
    source: Path  # the csv file
    clips: list[Clip]  # those whose file is there, in the csv's order
    missing: list[str]  # names of files that the csv lists and the disk lacks
    waveforms: Sequence[np.ndarray] = ()  # (n,) int16 of each clip, after decode_splits()

    @property
    def captions(self) -> list[str]:
        return [caption for clip in self.clips for caption in clip.captions]

    @property
    def clip_of_caption(self) -> list[int]:
        return [i for i, clip in enumerate(self.clips) for _ in clip.captions]

    @property
    def identity(self) -> str:  # whatever a folder is called
        digest = digest_of([[clip.name, clip.captions] for clip in self.clips])
        return f"{self.name.rpartition('@')[2]} ({len(self.clips)} clips, digest {digest})"

    def __str__(self) -> str:
        hours = sum(map(len, self.waveforms)) / SAMPLE_RATE / 3600
        parts = [f"{len(self.clips):,} clips", f"{len(self.captions):,} captions"]
        parts += [f"{hours:.2f} h"] * bool(self.waveforms)
        parts += [f"{len(self.missing):,} more are not on disk"] * bool(self.missing)
        return f"{self.name}: {', '.join(parts)} ({self.source})"


def digest_of(values) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


def training_splits(
    datasets: Sequence[str], validation: str | None, data_dir: Path
) -> tuple[list[Split], Split]:
    """What is trained on, AudioCaps' splits merged (section 3), and what chooses the best epoch.

    That is Clotho's validation split, or, with folders alone, what is held out of the first one.
    """
    if validation is None:
        validation = "clotho" if PLACES.keys() & set(datasets) else datasets[0]
    of_folder = {name: ["train" if name == validation else "all"] for name in datasets}
    parts = of_folder | {"clotho": ["train"], "audiocaps": SPLITS}
    splits = [read_split(name, part, data_dir) for name in datasets for part in parts[name]]
    held_out, names = read_split(validation, "val", data_dir), [split.name for split in splits]
    if len(set(names)) < len(names) or was_seen(held_out, names):
        raise InputError(f"--datasets {' '.join(datasets)}: the same twice, or {held_out.name}, "
                         "which validates, is trained on")
    return splits, held_out


def was_seen(split: Split, trained_on: Sequence[str]) -> bool:
    """Whether a model that was trained on these splits has seen this one, or a part of it."""
    own, part = split.name.rpartition("@")[2].split("/")
    others = [name.rpartition("@")[2].split("/") for name in trained_on]
    return any(own == o and (part == p or "all" in (part, p)) for o, p in others)


def read_split(dataset: str, part: str, data_dir: Path) -> Split:
    """Read the part "train", "val" or "test" of "clotho" or "audiocaps"; of a folder also "all".

    It is an InputError where there is none, a csv row is unusable, or no sound of it is on disk.
    """
    if dataset in PLACES:
        table, folder = _places(dataset, part, data_dir)[0]
        if not (table.is_file() and folder.is_dir()):
            raise InputError(f"{data_dir}: no {dataset} here: looked for {table}, for example, and "
                             f"its sounds in {folder}; --data-dir names another folder")
        rows = _audiocaps_rows(table, folder) if dataset == "audiocaps" else _rows(table)
        name = f"{dataset}/{SPLITS[part] if dataset == 'clotho' else part}"
    else:
        folder, table = Path(dataset), Path(dataset, "captions.csv")
        if not table.is_file():
            raise InputError(f"{folder}: no data set: give clotho, audiocaps, or a folder of sounds"
                             " with a captions.csv of file_name,caption or file_name,caption_1,...")
        rows = _rows(table)
        name = f"{folder.resolve().name}@{digest_of(sorted(rows.items()))}/{part}"
        rows = _part_of_folder(rows, part, folder)
    # A name may be written as on Windows (sub\a.wav), or in another Unicode form than the disk's.
    sounds = sounds_below(folder)
    there = {normalize("NFC", os.path.relpath(path, folder)): path for path in sounds}
    paths = {n: there.get(normalize("NFC", n.replace("\\", "/")), folder / n) for n in rows}
    clips = [Clip(n, path, tuple(rows[n])) for n, path in paths.items() if path.exists()]
    missing = [n for n, path in paths.items() if not path.exists()]
    if not clips:
        raise InputError(f"{table}: none of its {len(missing):,} sounds is in {folder}: looked for "
                         f"{missing[0]}, for example; there is {next(iter(there), 'none at all')}")
    return Split(name, table, clips, missing)


def split_of_sounds(folder: Path) -> Split:
    """All sounds below a folder, without captions; an InputError where there is none."""
    clips = [Clip(os.path.relpath(path, folder), path, ()) for path in sounds_below(folder)]
    if not clips:
        raise InputError(f"{folder}: no sound file in it")
    return Split(f"{folder.name}@/all", folder, clips, [])


def _places(dataset: str, part: str, data_dir: Path) -> list[tuple[Path, Path]]:
    """Where a split may lie: csv file and folder of sounds; the first, where they are there."""
    (roots, places), name = PLACES[dataset], SPLITS.get(part, part)
    found = [
        tuple(data_dir / root / path.format(split=part, name=name) for path in place)
        for root in roots for place in places
    ]
    return sorted(found, key=lambda place: (not place[0].is_file(), not place[1].is_dir()))


def read_csv(table: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a comma-separated csv file in UTF-8 with these columns; else an InputError."""
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = [(reader.line_num, row) for row in reader]
            names = reader.fieldnames or []
        fault = "has other columns"
    except (UnicodeDecodeError, csv.Error) as error:
        rows, names, fault = [], [], f"cannot be read ({error})"
    if not set(columns) <= set(names):
        with open(table, "rb") as file:
            first = printable(file.readline(200).decode(errors="replace").strip())
        raise InputError(f"{table}: a comma-separated csv in UTF-8 with the columns "
                         f"{','.join(columns)} is needed; it {fault}; its first line is {first!r}")
    faults = [f"line {line}" for line, row in rows if None in row or None in row.values()]
    if faults or not rows:
        what = f"{table}: rows with fewer or more fields than its first line"
        raise InputError.of(what, faults or ["there are none"])
    return [row for _, row in rows]


def _rows(table: Path) -> dict[str, list[str]]:
    """{file name: its captions}: all in one row of the csv, or one in each of several rows."""
    found: dict[str, list[str]] = {}
    for row in read_csv(table, ["file_name"]):
        captions = [v for k, v in row.items() if k == "caption" or k.startswith("caption_")]
        found.setdefault(row["file_name"], []).extend(filter(str.strip, captions))
    if faults := [name for name, captions in found.items() if not captions]:
        raise InputError.of(f"{table}: no caption (columns caption, or caption_1, ...) of", faults)
    return found


def _audiocaps_rows(table: Path, folder: Path) -> dict[str, list[str]]:
    """As _rows; a clip's file has the first of the namings by which there is one."""
    on_disk = {path.stem: os.path.relpath(path, folder) for path in sounds_below(folder)}
    captions, stems = collections.defaultdict(list), collections.defaultdict(list)
    for row in read_csv(table, ["audiocap_id", "youtube_id", "start_time", "caption"]):
        row["end_time"] = int(float(row["start_time"])) + 10
        clip = row["youtube_id"], row["start_time"]
        captions[clip].append(row["caption"])
        stems[clip].append([naming.format(**row) for naming in NAMINGS])
    found = {}
    for clip, names in stems.items():
        # Five rows of one clip have five audiocap_ids: any of them may be the file's.
        tried = [stem for same_naming in zip(*names, strict=True) for stem in same_naming]
        stem = next((stem for stem in tried if stem in on_disk), None)
        found[on_disk.get(stem, f"{tried[0]}.wav")] = captions[clip]
    return found


def _part_of_folder(rows: dict[str, list[str]], part: str, folder: Path) -> dict[str, list[str]]:
    """What is trained on or held out: the same choice for every seed."""
    if part == "all":
        return rows
    if part == "test" or len(rows) < 2:
        raise InputError(f"{folder}: a folder has no test split (give --split val, or all), and "
                         "nothing is held out of a single clip")
    count = max(round(HELD_OUT_SHARE * len(rows)), min(HELD_OUT_CLIPS, len(rows) // 2))
    held = set(np.random.default_rng(0).permutation(len(rows))[:count].tolist())
    return {name: rows[name] for i, name in enumerate(rows) if (i in held) == (part == "val")}


# --- Clips -> waveforms, decoded once ---

def decode_splits(splits: Sequence[Split], cache_dir: Path) -> None:
    """Give splits their waveforms; what is new or has changed is decoded into cache_dir first."""
    paths = [clip.path for split in splits for clip in split.clips]
    cache_files = decode_once(paths, cache_dir)
    for split in splits:
        split.waveforms = Waveforms(cache_files[clip.path] for clip in split.clips)


# --- Waveforms -> batches (sections 3 and 4) ---

@dataclasses.dataclass
class Batch:
    """One process's share of a batch: only segments that hold sound, neighbours' clips once."""

    segments: Tensor  # (S, 320000) int16
    counts: Tensor  # (C,) segments of each clip, summing to S
    clip_rows: Tensor  # (B_r,) each pair's clip among the C
    tokens: Tensor  # (B_r, L)
    clip_ids: Tensor  # (B,) of the whole batch: equal where two pairs show the same clip
    pair_ids: Tensor  # (B,)

    def inputs(self, device: torch.device) -> list[Tensor]:
        """What the model encodes, on its device."""
        tensors = self.segments, self.counts, self.clip_rows, self.tokens
        return [tensor.to(device, non_blocking=True) for tensor in tensors]

    def pin_memory(self) -> "Batch":
        return Batch(*(tensor.pin_memory() for tensor in vars(self).values()))

    def pieces(self, pairs: int) -> Iterator["Batch"]:
        """Pieces of so many pairs; a clip whose pairs are cut apart is in both pieces."""
        ends = [0, *self.counts.cumsum(0).tolist()]
        for start in range(0, len(self.tokens), pairs):
            rows = self.clip_rows[start : start + pairs]
            first, last = int(rows[0]), int(rows[-1]) + 1
            yield dataclasses.replace(
                self, segments=self.segments[ends[first] : ends[last]],
                counts=self.counts[first:last], clip_rows=rows - first,
                tokens=self.tokens[start : start + pairs],
            )


class PairBatches(torch.utils.data.Dataset):
    """Item i is this process's share of the run's i-th batch; the length is an epoch's steps.

    An epoch shows every (clip, caption) pair once, in a new order in which captions_per_clip
    captions of one clip stand together; neighbours share one crop of their clip, which is encoded
    once for all of them. What is left at an epoch's end and fills no batch is dropped, as in the
    baseline: every batch has the same number of negatives.
    """

    def __init__(
        self, splits: Sequence[Split], tokenizer: Tokenizer, batch_size: int,
        captions_per_clip: int = 1, seed: int = 0, rank: int = 0, world: int = 1,
    ):
        self.sounds = [(split, i) for split in splits for i in range(len(split.clips))]
        self.captions = [caption for split in splits for caption in split.captions]
        counts = [len(clip.captions) for split in splits for clip in split.clips]
        self.clip_of_pair = np.repeat(np.arange(len(counts)), counts)
        self.pairs_of_clip = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
        self.tokenizer, self.seed, self.captions_per_clip = tokenizer, seed, captions_per_clip
        self.batch_size, self.share, self.rank = batch_size, batch_size // world, rank
        self._order: tuple = (None,)  # an epoch, and what order() said of it
        if len(self.captions) < batch_size or batch_size % world:
            raise InputError(f"--batch-size {batch_size}: at most the {len(self.captions):,} pairs "
                             f"that there are, and a multiple of the processes ({world})")

    def __len__(self) -> int:
        return len(self.captions) // self.batch_size

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of an epoch in order (P,), and for each the first of its neighbours (P,)."""
        if self._order[0] != epoch:
            rng, k = np.random.default_rng([self.seed, epoch]), self.captions_per_clip
            units = []
            for pairs in map(rng.permutation, self.pairs_of_clip):
                units += [pairs[i : i + k] for i in range(0, len(pairs), k)]
            units = [units[i] for i in rng.permutation(len(units))]
            leaders = np.repeat([unit[0] for unit in units], list(map(len, units)))
            self._order = epoch, (np.concatenate(units), leaders)
        return self._order[1]

    def __getitem__(self, step: int) -> Batch:
        epoch, index = divmod(step, len(self))
        pairs, leaders = (
            ids[index * self.batch_size :][: self.batch_size] for ids in self.order(epoch)
        )
        own, leaders = (ids[self.rank * self.share :][: self.share] for ids in (pairs, leaders))
        new = np.append(True, leaders[1:] != leaders[:-1])
        segments, counts = to_segments([self._crop(int(pair), epoch) for pair in leaders[new]])
        return Batch(
            segments=segments, counts=counts,
            clip_rows=torch.from_numpy(np.cumsum(new) - 1),
            tokens=tokenize(self.tokenizer, [self.captions[pair] for pair in own]),
            clip_ids=torch.from_numpy(self.clip_of_pair[pairs]),
            pair_ids=torch.from_numpy(pairs),
        )

    def _crop(self, pair: int, epoch: int) -> np.ndarray:
        split, i = self.sounds[self.clip_of_pair[pair]]
        return crop(split.waveforms[i], np.random.default_rng([self.seed, epoch, pair]))


# --- python -m dualenc.data check FOLDER ---

SILENT_PEAK = 1e-4  # -80 dB


def faults_of(clip: Clip) -> list[str]:
    """What is wrong with a sound."""
    faults: list[str] = []
    try:
        waveform = load_audio(clip.path, faults=faults)
    except InputError as error:
        return [str(error).removeprefix(f"{clip.path}: ")]
    if np.abs(waveform).max() < SILENT_PEAK:
        loud = any(np.abs(block).max() > SILENT_PEAK for block in all_channels(clip.path, []))
        faults.append("channels cancel: their mean is silence" if loud else "silent")
    return faults


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("what", choices=("check",))
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    found = [(name, part) for name in PLACES for part in SPLITS
             if _places(name, part, folder)[0][0].is_file()]
    if (folder / "captions.csv").is_file():
        found = [(str(folder), "all")]
    sounds_below(folder)  # or there is no such folder
    total = 0
    for dataset, part in found or [(None, "all")]:
        try:
            split = read_split(dataset, part, folder) if dataset else split_of_sounds(folder)
            print(split)
            faults = [f"{printable(name)}: missing" for name in split.missing]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                bar = tqdm(split.clips, f"reading {split.name}", leave=False, disable=None)
                for clip, those in zip(bar, pool.map(faults_of, split.clips), strict=True):
                    faults += [f"{printable(clip.name)}: {fault}" for fault in those]
        except InputError as error:  # of one csv: the others are read all the same
            faults = [str(error)]
        print(*(f"  {fault}\n" for fault in faults), sep="", end="")
        total += len(faults)
    print(f"{total:,} faults" if total != 1 else "1 fault")
    return 1 if total else 0


if __name__ == "__main__":
    run_command(main)
