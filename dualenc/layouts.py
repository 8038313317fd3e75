"""Where clips and captions lie on disk: Clotho v2.1, AudioCaps, and any folder with captions.csv.

What is read here is files' names and csv rows; no sound is opened.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from dualenc import InputError
from dualenc.csvfiles import WRONG_ROWS, read_csv, read_header
from dualenc.decoding import AUDIO_SUFFIXES

SPLITS = ("train", "val", "test")
CLOTHO_NAMES = {"train": "development", "val": "validation", "test": "evaluation"}
CLOTHO_TEST_CLIPS = 1045  # of Clotho v2.1's evaluation split, which the report calls test
# Layouts: (csv file, folder of sounds), below the data folder or one of the roots in it; {split} is
# train, val or test, {name} is what Clotho calls it.
CLOTHO_ROOTS = ("CLOTHO_v2.1", "clotho_v2.1", "clotho", "Clotho", ".")
CLOTHO_LAYOUTS = {
    "aac-datasets": ("clotho_csv_files/clotho_captions_{name}.csv", "clotho_audio_files/{name}"),
    "flat": ("clotho_captions_{name}.csv", "{name}"),
    "csv_files and waveforms": ("csv_files/{split}.csv", "waveforms/{split}"),
}
AUDIOCAPS_ROOTS = ("AUDIOCAPS", "audiocaps", "AudioCaps", ".")
AUDIOCAPS_LAYOUTS = {
    "aac-datasets": ("csv_files_v1/{split}.csv", "audio_32000Hz/{split}"),
    "aac-datasets without csv_files_v1": ("{split}.csv", "audio_32000Hz/{split}"),
    "flat with csv_files_v1": ("csv_files_v1/{split}.csv", "{split}"),
    "flat": ("{split}.csv", "{split}"),
}
# What AudioCaps' sound files are called, before the suffix; the first is aac-datasets'.
AUDIOCAPS_NAMINGS = ("{youtube_id}_{start_time}", "Y{youtube_id}", "{youtube_id}", "{audiocap_id}")
ANNOTATIONS = "metadata_eval.csv"  # the new annotations of DCASE 2025


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


def splits_in(data_dir: Path) -> list[tuple[str, str]]:
    """The (data set, split) pairs of Clotho and AudioCaps whose csv file is below a folder."""
    return [
        (dataset, split)
        for dataset in ("clotho", "audiocaps")
        for split in SPLITS
        if any(table.is_file() for _, table, _ in _places(dataset, split, data_dir))
    ]


def _places(dataset: str, split: str, data_dir: Path) -> list[tuple[str, Path, Path]]:
    """Where a split may lie: (the layout's name, csv file, folder of sounds)."""
    is_clotho = dataset == "clotho"
    layouts = CLOTHO_LAYOUTS if is_clotho else AUDIOCAPS_LAYOUTS
    names = {"split": split, "name": CLOTHO_NAMES[split]}
    return [
        (layout, *(data_dir / root / part.format(**names) for part in parts))
        for root in (CLOTHO_ROOTS if is_clotho else AUDIOCAPS_ROOTS)
        for layout, parts in layouts.items()
    ]


def _find_layout(dataset: str, split: str, data_dir: Path) -> tuple[str, Path, Path]:
    """The one place where a split lies.

    Raises:
        InputError: there is none, and what it would be; or several, and which.
    """
    places = _places(dataset, split, data_dir)
    # By file, not by path: a link, or another case of the letters, may lead to the same.
    matches = {
        (table.stat().st_ino, sounds.stat().st_ino): (layout, table, sounds)
        for layout, table, sounds in places
        if table.is_file() and sounds.is_dir()
    }
    if len(matches) > 1:
        both = " and ".join(
            f"{table} with {sounds} ({layout})" for layout, table, sounds in matches.values()
        )
        raise InputError(f"{data_dir}: {dataset} is here more than once: {both}; keep one")
    if matches:
        return next(iter(matches.values()))
    for _, table, sounds in places:
        if table.is_file():
            raise InputError(f"{table} is there, but not the folder of its sounds, {sounds}")
    _, table, sounds = places[0]
    raise InputError(
        f"{data_dir}: no {dataset} here: {table.relative_to(data_dir)} and the folder "
        f"{sounds.relative_to(data_dir)} are looked for (README says where to get it and which "
        "other layouts are read; --data-dir names another folder)"
    )


def _read_clotho(split: str, data_dir: Path) -> Split:
    layout, table, folder = _find_layout("clotho", split, data_dir)
    columns = ["file_name", *(f"caption_{i}" for i in range(1, 6))]
    rows = [(row[0], row[1:]) for row in read_csv(table, columns)]
    clips, missing = _existing(rows, folder, table)
    return Split(f"clotho/{CLOTHO_NAMES[split]}", clips, missing, layout)


def _read_audiocaps(split: str, data_dir: Path) -> Split:
    layout, table, folder = _find_layout("audiocaps", split, data_dir)
    columns = ["youtube_id", "start_time", "audiocap_id"]
    captions: dict[str, list[str]] = {}  # rows of one clip are not adjacent
    stems: dict[str, list[list[str]]] = {}  # of each row, by each naming
    for caption, *ids in read_csv(table, ["caption", *columns]):
        row = dict(zip(columns, ids, strict=True))
        names = [naming.format(**row) for naming in AUDIOCAPS_NAMINGS]
        captions.setdefault(names[0], []).append(caption)
        stems.setdefault(names[0], []).append(names)
    on_disk = _sounds_by_stem(folder)
    naming = _naming([names for rows in stems.values() for names in rows], on_disk, folder)
    rows = []
    for clip, found in captions.items():
        # Five rows of one clip have five audiocap_ids: any of them may be the file's.
        own = [names[naming] for names in stems[clip]]
        rows.append((next((on_disk[stem] for stem in own if stem in on_disk), own[0]), found))
    if naming:
        layout += f", files named {AUDIOCAPS_NAMINGS[naming]}"
    clips, missing = _existing(rows, folder, table)
    return Split(f"audiocaps/{split}", clips, missing, layout)


def _sounds_by_stem(folder: Path) -> dict[str, str]:
    """{name without suffix: name} of the sound files in a folder."""
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in AUDIO_SUFFIXES:
            if path.stem in found:
                raise InputError(f"{folder}: {found[path.stem]} and {path.name}: keep one of them")
            found[path.stem] = path.name
    return found


def _naming(rows: list[list[str]], on_disk: dict[str, str], folder: Path) -> int:
    """Which of AudioCaps' namings the files follow; the first where none does."""
    used = {}
    for names in rows:
        used |= {i: on_disk[name] for i, name in enumerate(names) if name in on_disk}
    if len(used) > 1:
        both = " and ".join(f"{name} ({AUDIOCAPS_NAMINGS[i]})" for i, name in used.items())
        raise InputError(f"{folder}: files are named in more than one way: {both}; keep one")
    return next(iter(used), 0)


def _read_folder(folder: Path) -> Split:
    table = folder / "captions.csv"
    if not table.is_file():
        raise InputError(
            f"{folder}: not a data set: give clotho, audiocaps, or a folder that holds sounds and "
            "a captions.csv with the columns file_name,caption or file_name,caption_1,caption_2,..."
        )
    header = read_header(table)
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
        if name.startswith("/") or ".." in name.split("/")
    ]
    seen: set[str] = set()
    faults += [f"{name} stands in two rows" for name, _ in rows if name in seen or seen.add(name)]
    if faults:
        raise InputError.of(f"{table}: {WRONG_ROWS}", faults)
    clips, missing = [], []
    for name, captions in rows:
        # What is there and is no file is found out, with all other faults, when it is decoded.
        if os.path.exists(os.path.join(folder, name)):  # of a million names, not a Path each
            clips.append(Clip(name, folder / name, tuple(captions)))
        else:
            missing.append(name)
    return clips, missing
