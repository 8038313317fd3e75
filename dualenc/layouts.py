"""Where clips and captions lie on disk: Clotho v2.1, AudioCaps, and any folder with captions.csv.

What is read here is files' names and csv rows; no sound is opened.
"""

import csv
import dataclasses
import hashlib
import json
import os
import string
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from dualenc import InputError
from dualenc.audio import AUDIO_SUFFIXES

SPLITS = ("train", "val", "test")
CLOTHO_NAMES = {"train": "development", "val": "validation", "test": "evaluation"}
CLOTHO_TEST_CLIPS = 1045  # of Clotho v2.1's evaluation split, which the report calls test
# Layouts: (csv file, folder of sounds), below the data folder or one of the roots in it.
CLOTHO_ROOTS = ("CLOTHO_v2.1", "clotho_v2.1", "clotho", "Clotho", ".")
CLOTHO_LAYOUTS = {
    "aac-datasets": ("clotho_csv_files/clotho_captions_{0}.csv", "clotho_audio_files/{0}"),
    "flat": ("clotho_captions_{0}.csv", "{0}"),
}
AUDIOCAPS_ROOTS = ("AUDIOCAPS", "audiocaps", "AudioCaps", ".")
AUDIOCAPS_LAYOUTS = {
    "aac-datasets": ("csv_files_v1/{0}.csv", "audio_32000Hz/{0}"),
    "flat": ("{0}.csv", "{0}"),
}
ANNOTATIONS = "metadata_eval.csv"  # the new annotations of DCASE 2025
BLANK = string.whitespace + string.punctuation  # nothing of it is left when captions are normalised


@dataclasses.dataclass(frozen=True)
class Clip:
    """One sound file and its captions; the name is the csv's, byte for byte."""

    name: str
    path: Path
    captions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a data set, as found on disk.

    Attributes:
        name: "clotho/development", "audiocaps/train", or a folder's path.
        clips: those whose file is there, in the csv's order.
        missing: names of files that the csv lists and the disk lacks.
        layout: how it was recognised.
    """

    name: str
    clips: list[Clip]
    missing: list[str]
    layout: str

    @property
    def captions(self) -> list[str]:
        """All captions, clip by clip."""
        return [caption for clip in self.clips for caption in clip.captions]

    @property
    def clip_of_caption(self) -> list[int]:
        """For each of captions, the index of its clip."""
        return [i for i, clip in enumerate(self.clips) for _ in clip.captions]

    @property
    def digest(self) -> str:
        """Of the clips' names and captions: equal where they are."""
        clips = [[clip.name, clip.captions] for clip in self.clips]
        return hashlib.sha256(json.dumps([self.name, clips]).encode()).hexdigest()[:16]

    @property
    def file_stem(self) -> str:
        """A file name for what is derived from this split; no two splits share it."""
        if self.layout == "folder":
            digest = hashlib.sha256(os.fsencode(self.name)).hexdigest()[:8]
            return f"folder-{Path(self.name).name}-{digest}"
        return self.name.replace("/", "-")


def training_splits(dataset: str, data_dir: Path) -> list[Split]:
    """What stage 1 trains on (section 3): AudioCaps' three splits are merged, as in the report."""
    splits = SPLITS if dataset == "audiocaps" else ("train",)
    return [read_split(dataset, split, data_dir) for split in splits]


def read_split(dataset: str, split: str, data_dir: Path) -> Split:
    """Read one split of "clotho", "audiocaps", or a folder with a captions.csv.

    Raises:
        InputError: no layout fits, a csv row is unusable, or no clip of it is on disk.
    """
    if dataset == "clotho":
        found = _read_clotho(split, data_dir)
    elif dataset == "audiocaps":
        found = _read_audiocaps(split, data_dir)
    else:
        found = _read_folder(Path(dataset))
    if not found.clips:
        example = f", such as {found.missing[0]}" if found.missing else ""
        raise InputError(
            f"{found.name}: none of the {len(found.missing)} sound files in its csv is on disk"
            f"{example}"
        )
    return found


def hold_out(split: Split, share: float = 0.1) -> tuple[Split, Split]:
    """A folder's clips -> (to train on, to validate on): the same choice for every seed."""
    order = np.random.default_rng(0).permutation(len(split.clips))
    held = set(order[: max(1, round(share * len(order)))].tolist())
    if len(held) == len(order):
        raise InputError(f"{split.name}: one clip cannot be trained and validated on; add more")
    parts = [[c for i, c in enumerate(split.clips) if (i in held) == wanted] for wanted in (0, 1)]
    names = split.name, f"{split.name}#held-out"
    return tuple(
        dataclasses.replace(split, name=name, clips=clips)
        for name, clips in zip(names, parts, strict=True)
    )


def _find_layout(
    dataset: str, data_dir: Path, roots: Sequence[str], layouts: dict, name: str
) -> tuple[str, Path, Path]:
    """The one layout that is there: (its name, csv file, folder of sounds)."""
    matches = {}
    for root in roots:
        for layout, (table, sounds) in layouts.items():
            pair = (data_dir / root / table.format(name), data_dir / root / sounds.format(name))
            if pair[0].is_file() and pair[1].is_dir():
                matches[pair[0].resolve()] = (layout, *pair)
    if not matches:
        table, sounds = (part.format(name) for part in layouts["aac-datasets"])
        raise InputError(
            f"{data_dir}: no {dataset} here: {roots[0]}/{table} and the folder {roots[0]}/{sounds} "
            "are looked for (README says where to get it; --data-dir names another folder)"
        )
    if len(matches) > 1:
        both = " and ".join(str(table) for _, table, _ in matches.values())
        raise InputError(f"{data_dir}: {dataset} is here more than once: {both}; keep one")
    return next(iter(matches.values()))


def _read_clotho(split: str, data_dir: Path) -> Split:
    name = CLOTHO_NAMES[split]
    layout, table, folder = _find_layout("clotho", data_dir, CLOTHO_ROOTS, CLOTHO_LAYOUTS, name)
    columns = ["file_name", *(f"caption_{i}" for i in range(1, 6))]
    rows = [(row[0], row[1:]) for row in read_csv(table, columns)]
    clips, missing = _existing(rows, folder, table)
    return Split(f"clotho/{name}", clips, missing, layout)


def _read_audiocaps(split: str, data_dir: Path) -> Split:
    layout, table, folder = _find_layout(
        "audiocaps", data_dir, AUDIOCAPS_ROOTS, AUDIOCAPS_LAYOUTS, split
    )
    captions: dict[str, list[str]] = {}  # rows of one clip are not adjacent
    for youtube_id, start, caption in read_csv(table, ["youtube_id", "start_time", "caption"]):
        captions.setdefault(f"{youtube_id}_{start}", []).append(caption)
    on_disk = {
        path.stem: path.name for path in folder.iterdir() if path.suffix.lower() in AUDIO_SUFFIXES
    }
    rows = [(on_disk.get(stem, stem), found) for stem, found in captions.items()]
    clips, missing = _existing(rows, folder, table)
    return Split(f"audiocaps/{split}", clips, missing, layout)


def _read_folder(folder: Path) -> Split:
    table = folder / "captions.csv"
    if not table.is_file():
        raise InputError(
            f"{folder}: not a data set: give clotho, audiocaps, or a folder that holds sounds and "
            "a captions.csv with the columns file_name,caption or file_name,caption_1,caption_2,..."
        )
    header, _ = _read_rows(table)
    columns = [name for name in header if name == "caption" or name.startswith("caption_")]
    captions: dict[str, list[str]] = {}  # one row per caption, or all in one row
    for name, *found in read_csv(table, ["file_name", *(columns or ["caption"])]):
        captions.setdefault(name, []).extend(found)
    clips, missing = _existing(list(captions.items()), folder, table)
    return Split(str(folder.resolve()), clips, missing, "folder")


def _existing(
    rows: list[tuple[str, list[str]]], folder: Path, table: Path
) -> tuple[list[Clip], list[str]]:
    """Rows (file name, captions) -> clips on disk, and the names of the others."""
    faults = [
        f"file name {name!r} leaves its folder"
        for name, _ in rows
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
    ]
    seen: set[str] = set()
    faults += [f"{name} stands in two rows" for name, _ in rows if name in seen or seen.add(name)]
    if faults:
        raise InputError.of(str(table), faults)
    clips, missing = [], []
    for name, captions in rows:
        # What is there and is no file is found out, with all other faults, when it is decoded.
        if os.path.exists(folder / name):
            clips.append(Clip(name, folder / name, tuple(captions)))
        else:
            missing.append(name)
    return clips, missing


def read_csv(table: Path, columns: Sequence[str]) -> list[list[str]]:
    """The named columns of a csv file, row by row; other columns are passed over.

    Raises:
        InputError: the file is not UTF-8, lacks a column, or rows are short or hold values without
            a letter or digit.
    """
    header, rows = _read_rows(table)
    wrong = [name for name in columns if header.count(name) != 1]
    if wrong:
        raise InputError(
            f"{table}: needs the column {wrong[0]!r} once; its first line is {','.join(header)!r}"
        )
    if not rows:
        raise InputError(f"{table}: holds no rows")
    places = [header.index(name) for name in columns]
    faults = [
        f"line {line} has no word in {columns[i]}" if len(row) == len(header)
        else f"line {line} has {len(row)} fields instead of {len(header)}"
        for line, row in rows
        for i in [_first_empty(row, places, len(header))]
        if i is not None
    ]
    if faults:
        raise InputError.of(str(table), faults)
    return [[row[place] for place in places] for _, row in rows]


def _read_rows(table: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """A csv file's header, and its rows with the number of the line that each ends in."""
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)  # else an open quote swallows what follows
            header = next(reader, [])
            return header, [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read as a UTF-8 csv file ({error})") from error


def _first_empty(row: list[str], places: list[int], width: int) -> int | None:
    """The first wanted column without a word in this row, if any."""
    if len(row) != width:
        return 0
    return next((i for i, place in enumerate(places) if not row[place].strip(BLANK)), None)
