"""Clotho, AudioCaps or a folder of sounds -> clips and captions -> batches (report, section 3).

    python -m dualenc.data check FOLDER    # what is there, and what is wrong with it

Batches and crops are seeded from (seed, epoch) and (seed, epoch, clip), so that they are the same
in any data worker, in any process and in a resumed run. What is held out of a folder is the same
for every seed.

A pair is a clip and one of its captions, so there are as many pairs as captions.

n samples at 32 kHz; P pairs in all; B pairs of a batch, B_r of one process's share of it,
C clips, S segments, L tokens.
"""

import ast
import csv
import dataclasses
import hashlib
import json
import os
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
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
    SAMPLE_RATE, Waveforms, all_channels, decode_once, sounds_below, stream_audio, usable_cores,
)
from dualenc.errors import InputError, Parser, counted, printable, run_command
from dualenc.text import tokenize

PARTS = ("train", "val", "test")
HELD_OUT_SHARE = 0.1  # the share of a folder's clips that is not trained on, but validates
MIN_HELD_OUT = 10  # the fewest clips that are held out of a folder of twenty or more


# --- A split: clips and their captions ---

class Clip(NamedTuple):
    """One sound file and its captions."""

    name: str  # as the csv writes it, byte for byte; AudioCaps' csv has none, so as on disk
    path: Path
    captions: tuple[str, ...]


@dataclasses.dataclass
class Split:
    """One split of a data set: those of its clips that are on disk."""

    name: str  # such as "clotho/development"; parse_split_name explains it
    source: Path  # the csv file
    clips: list[Clip]  # those whose sound is on disk, in the csv's order
    missing: list[str]  # names of the sounds that the csv lists and the disk lacks
    waveforms: Sequence[np.ndarray] = ()  # (n,) int16 of each clip, once decode_splits has run

    @property
    def captions(self) -> list[str]:
        """Return all captions, clip by clip."""
        captions = []
        for clip in self.clips:
            captions += clip.captions
        return captions

    @property
    def clip_of_caption(self) -> list[int]:
        """Return, for each caption, the index of its clip."""
        clip_of_caption = []
        for index, clip in enumerate(self.clips):
            clip_of_caption += [index] * len(clip.captions)
        return clip_of_caption

    @property
    def identity(self) -> str:
        """Describe the split for a run's settings, which must be the same when a run is resumed.

        A folder may be renamed or moved in between, so the text holds neither its name nor its
        sounds' paths: `dataset` is then a digest of its captions (parse_split_name).
        """
        _, dataset, part = parse_split_name(self.name)
        digest = short_digest([[clip.name, clip.captions] for clip in self.clips])
        return f"{dataset}/{part} ({len(self.clips)} clips, digest {digest})"

    def __str__(self) -> str:
        facts = [counted(len(self.clips), "clip"), counted(len(self.captions), "caption")]
        if self.waveforms:
            samples = sum(len(waveform) for waveform in self.waveforms)
            facts.append(f"{samples / SAMPLE_RATE / 3600:.2f} h")
        if self.missing:
            facts.append(f"{len(self.missing):,} more not on disk")
        return f"{self.name}: {', '.join(facts)} ({self.source})"


def parse_split_name(name: str) -> tuple[str, str, str]:
    """Return a split's title, the data set that it is a part of, and which part it is.

    The title is what a data set is called, and most are known by it: "clotho/development" ->
    ("clotho", "clotho", "development"). A user's folder may be renamed or moved, so it is known by
    a digest of its captions: "my_sounds@1a2b3c4d/val" -> ("my_sounds", "1a2b3c4d", "val"). Its
    parts are "train", "val" and "all".
    """
    title_and_digest, _, part = name.rpartition("/")
    title, _, dataset = title_and_digest.rpartition("@")
    return title or dataset, dataset, part


def dataset_names(split_names: Iterable[str]) -> list[str]:
    """Return what the data sets of some splits are called, each once and sorted.

    ["clotho/development", "my_sounds@1a2b3c4d/val"] -> ["clotho", "my_sounds"].
    """
    titles = set()
    for name in split_names:
        title, _, _ = parse_split_name(name)
        titles.add(title)
    return sorted(titles)


def short_digest(values) -> str:
    """Return eight hexadecimal digits that stand for the values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


def read_split(dataset: str, part: str, data_dir: Path) -> Split:
    """Read a split's csv file, and find its clips on disk.

    Args:
        dataset: "clotho", "audiocaps", or a folder of sounds with a captions.csv.
        part: "train", "val" or "test"; for a folder "train", "val" or "all".
        data_dir: where Clotho and AudioCaps lie.

    Raises:
        InputError: there is no such split, a row of its csv cannot be used, or none of its sounds
            is on disk.
    """
    if dataset == "clotho":
        return read_clotho(part, data_dir)
    if dataset == "audiocaps":
        return read_audiocaps(part, data_dir)
    return read_folder(Path(dataset), part)


# --- What lies where ---

class Layout(NamedTuple):
    """The places of a split's csv file and of the folder of its sounds."""

    table: Path
    sounds: Path


# Clotho and AudioCaps are looked for in these folders below the data folder, first to last.
ROOTS = {
    "clotho": ("CLOTHO_v2.1", "clotho_v2.1", "clotho", "Clotho", "."),
    "audiocaps": ("AUDIOCAPS", "audiocaps", "AudioCaps", "."),
}
# Clotho's own names of its parts. "evaluation" is the report's test split of 1045 clips, and not
# the evaluation set of the challenge's leaderboard (section 3).
CLOTHO_NAMES = {"train": "development", "val": "validation", "test": "evaluation"}
# Patterns of a split's csv file and of the folder of its sounds, in one of the roots.
LAYOUTS = {
    "clotho": (
        ("clotho_captions_{clotho_name}.csv", "{clotho_name}"),  # as Clotho's archives are unpacked
        ("clotho_csv_files/clotho_captions_{clotho_name}.csv", "clotho_audio_files/{clotho_name}"),
        ("csv_files/{part}.csv", "waveforms/{part}"),
    ),
    "audiocaps": (
        ("csv_files_v1/{part}.csv", "audio_32000Hz/{part}"),  # as aac-datasets writes it
        ("{part}.csv", "audio_32000Hz/{part}"),
        ("csv_files_v1/{part}.csv", "{part}"),
        ("{part}.csv", "{part}"),
        ("csv_files_v2/{part}.csv", "audio_32000Hz/{part}"),  # AudioCaps 2.0
    ),
}


def possible_layouts(dataset: str, part: str, data_dir: Path) -> list[Layout]:
    """List all layouts in which a split of Clotho or AudioCaps may lie below a folder."""
    layouts = []
    for root in ROOTS[dataset]:
        for patterns in LAYOUTS[dataset]:
            paths = []
            for pattern in patterns:
                name = pattern.format(part=part, clotho_name=CLOTHO_NAMES[part])
                paths.append(data_dir / root / name)
            layouts.append(Layout(*paths))
    return layouts


def find_layout(dataset: str, part: str, data_dir: Path) -> Layout:
    """Return the first layout whose csv file and folder of sounds are both there."""
    if part not in PARTS:
        raise InputError(
            f"--split {part}: {dataset} has train, val and test; only folders have all"
        )
    layouts = possible_layouts(dataset, part, data_dir)
    for layout in layouts:
        if layout.table.is_file() and layout.sounds.is_dir():
            return layout
    with_table = [layout for layout in layouts if layout.table.is_file()]
    example = with_table[0] if with_table else layouts[0]
    raise InputError(
        f"{data_dir}: no {dataset} here: looked for {example.table}, for example, and its sounds "
        f"in {example.sounds}; --data-dir names another folder"
    )


def read_csv(table: Path, columns: Sequence[str], row_hint: str = "") -> list[dict[str, str]]:
    """Read the rows of a comma-separated csv file in UTF-8 that has these columns, or more.

    Empty rows, as Excel leaves them at the end, are skipped.

    Args:
        row_hint: is added to the message about rows with fewer or more fields than columns.

    Raises:
        InputError: there is no such file, no such column or no row, or a row is too short or long.
    """
    rows = []
    faulty_rows = []
    present_columns: Sequence[str] = ()  # It stays empty, and so is refused, if reading fails.
    fault = "has other columns"  # what a message says, unless reading fails
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if not any(row.values()):
                    continue
                rows.append(row)
                # DictReader marks more fields by a key None, and fewer by a value None.
                if None in row or None in row.values():
                    faulty_rows.append(f"line {reader.line_num}")
            present_columns = reader.fieldnames or ()
    except FileNotFoundError as error:
        raise InputError(f"{table}: no such file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        fault = f"cannot be read ({error})"
    if not set(columns) <= set(present_columns):
        with open(table, "rb") as file:
            first_line = printable(file.readline(200).decode(errors="replace").strip())
        raise InputError(
            f"{table}: a comma-separated csv in UTF-8 with the columns {','.join(columns)} is "
            f"needed; it {fault}; its first line is {first_line!r}"
        )
    if not rows:
        raise InputError(f"{table}: has no rows below its first line")
    if faulty_rows:
        headline = f"{table}: rows with fewer or more fields than its first line{row_hint}"
        raise InputError.of(headline, faulty_rows)
    return rows


def sounds_by_name(folder: Path) -> dict[str, Path]:
    """Return {comparable_name of its path within the folder: path} of all sounds below a folder."""
    sounds = {}
    for path in sounds_below(folder):
        sounds[comparable_name(os.path.relpath(path, folder))] = path
    return sounds


def comparable_name(name: str) -> str:
    """Write a file's name in one form, in which a csv's names equal those on disk.

    The csv may have Windows' backslashes, and either may be in another of Unicode's forms.
    """
    return normalize("NFC", name.replace("\\", "/"))


def match_with_disk(
    split_name: str, layout: Layout, captions: dict[str, list[str]], sounds: dict[str, Path]
) -> Split:
    """Look for the sound of each file name that a csv lists, and make a split of those on disk.

    Args:
        captions: {file name, as Clip.name has it: its captions}.
        sounds: sounds_by_name(layout.sounds).
    """
    clips = []
    missing = []
    for name, clip_captions in captions.items():
        # The scan lists only known suffixes; a file with another one is looked for by its name.
        path = sounds.get(comparable_name(name), layout.sounds / name)
        if path.exists():
            clips.append(Clip(name, path, tuple(clip_captions)))
        else:
            missing.append(name)
    if not clips:
        raise InputError(
            f"{layout.table}: none of its {counted(len(missing), 'sound')} is in {layout.sounds}: "
            f"looked for {missing[0]}, for example; there is {next(iter(sounds), 'none at all')}"
        )
    return Split(split_name, layout.table, clips, missing)


# --- Clotho ---

def read_clotho(part: str, data_dir: Path) -> Split:
    """Read a split of Clotho (section 3): each row of its csv is a clip with five captions."""
    layout = find_layout("clotho", part, data_dir)
    captions = read_captions(layout.table)
    sounds = sounds_by_name(layout.sounds)
    return match_with_disk(f"clotho/{CLOTHO_NAMES[part]}", layout, captions, sounds)


def read_captions(table: Path) -> dict[str, list[str]]:
    """Read {file name: its captions}; they may stand in several columns, several rows, or both."""
    captions: dict[str, list[str]] = {}
    for row in read_csv(table, ["file_name"]):
        clip_captions = captions.setdefault(row["file_name"], [])
        for column, text in row.items():
            is_caption = column == "caption" or column.startswith("caption_")
            if is_caption and text.strip():
                clip_captions.append(text)
    without_caption = [name for name, clip_captions in captions.items() if not clip_captions]
    if without_caption:
        headline = f"{table}: sounds without a caption (columns caption, or caption_1, ...)"
        raise InputError.of(headline, without_caption)
    return captions


def parse_names(cell: str) -> list[str]:
    """Read the file names in a cell of metadata_eval.csv, the "new annotations" of Table 1.

    A cell holds a Python list, or else one name.
    """
    try:
        return list(ast.literal_eval(cell))
    except (ValueError, SyntaxError, TypeError):
        return [cell]


# --- AudioCaps ---

# Possible names of AudioCaps' sound files, without suffix; the first is that of aac-datasets.
AUDIOCAPS_STEMS = (
    "{youtube_id}_{start_time}", "{youtube_id}_{start_time}_{end_time}", "Y{youtube_id}",
    "{youtube_id}", "{audiocap_id}",
)
AUDIOCAPS_SECONDS = 10  # length of each clip, an excerpt of a video
AUDIOCAPS_HINT = (
    " (AudioCaps 2.0's dataset2.0/train.csv of github.com/cdjkim/audiocaps had three rows broken "
    "over two lines until October 2025: fetch it again)"
)


def read_audiocaps(part: str, data_dir: Path) -> Split:
    """Read a split of AudioCaps (section 3): each row of its csv is one caption of a clip.

    Clips of the training split have one caption each, those of the other two splits have five.
    """
    layout = find_layout("audiocaps", part, data_dir)
    rows_of_clip: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in read_audiocaps_rows(layout.table):
        rows_of_clip[row["youtube_id"], row["start_time"]].append(row)

    sounds = sounds_by_name(layout.sounds)
    name_of_stem = {Path(name).stem: name for name in sounds}
    captions = {}
    for rows in rows_of_clip.values():
        captions[audiocaps_name(rows, name_of_stem)] = [row["caption"] for row in rows]
    return match_with_disk(f"audiocaps/{part}", layout, captions, sounds)


def read_audiocaps_rows(table: Path) -> list[dict]:
    """Read the rows of AudioCaps' csv, and add the end_time that some file names contain."""
    columns = ["audiocap_id", "youtube_id", "start_time", "caption"]
    rows = read_csv(table, columns, AUDIOCAPS_HINT)
    faulty_times = []
    for row in rows:
        try:
            row["end_time"] = int(float(row["start_time"])) + AUDIOCAPS_SECONDS
        except ValueError:
            faulty_times.append(row["start_time"])
    if faulty_times:
        raise InputError.of(f"{table}: a start_time is no number{AUDIOCAPS_HINT}", faulty_times)
    return rows


def audiocaps_name(rows: list[dict], name_of_stem: dict[str, str]) -> str:
    """Return the name of a clip's sound on disk, or if there is none, the one of aac-datasets.

    Args:
        rows: the clip's, one for each caption, each with an audiocap_id of its own: any of these
            ids may be the sound's name.
        name_of_stem: {name without folder and suffix: name} of the sounds on disk.
    """
    for pattern in AUDIOCAPS_STEMS:
        for row in rows:
            stem = pattern.format(**row)
            if stem in name_of_stem:
                return name_of_stem[stem]
    return AUDIOCAPS_STEMS[0].format(**rows[0]) + ".wav"


# --- A folder of sounds with a captions.csv ---

def read_folder(folder: Path, part: str) -> Split:
    """Read a folder, or the part of it that is trained on ("train") or held out ("val")."""
    layout = Layout(folder / "captions.csv", folder)
    if not layout.table.is_file():
        raise InputError(
            f"{folder}: no data set: give clotho, audiocaps, or a folder of sounds with a "
            "captions.csv of file_name,caption or file_name,caption_1,..."
        )
    if part == "test":
        raise InputError(f"{folder}: a folder has no test split; give --split val, or all")
    captions = read_captions(layout.table)
    digest = short_digest(sorted(captions.items()))
    split_name = f"{folder.resolve().name}@{digest}/{part}"
    if part != "all":
        if len(captions) < 2:
            raise InputError(f"{folder}: nothing can be held out of a single clip")
        held_out = names_held_out(captions)
        names = held_out if part == "val" else captions.keys() - held_out
        captions = {name: captions[name] for name in captions if name in names}
    return match_with_disk(split_name, layout, captions, sounds_by_name(folder))


def names_held_out(names: Iterable[str]) -> set[str]:
    """Choose a tenth of a folder's clips, but at least ten; of fewer than twenty, choose half.

    They are drawn among all names in the csv, not only those on disk, so that a sound that goes
    missing changes nothing for the others. The names are sorted first, so that the order of the
    rows does not matter.
    """
    names = sorted(names)
    count = round(HELD_OUT_SHARE * len(names))
    count = max(count, min(MIN_HELD_OUT, len(names) // 2))
    shuffled = np.random.default_rng(0).permutation(len(names))
    return {names[i] for i in shuffled[:count]}


# --- What is trained on, and what validates ---

def training_splits(
    datasets: Sequence[str], validation: str | None, data_dir: Path
) -> tuple[list[Split], Split]:
    """Read the splits that are trained on, and the one whose mAP@10 chooses the best epoch.

    Args:
        validation: the data set that validates. None chooses Clotho if Clotho or AudioCaps is
            trained on; else the first folder, of which a part is then held out.

    Raises:
        InputError: clips would be trained on twice, or be both trained on and validated on.
    """
    if validation is None:
        trains_on_published = "clotho" in datasets or "audiocaps" in datasets
        validation = "clotho" if trains_on_published else datasets[0]
    splits = []
    for dataset in datasets:
        if dataset == "clotho":
            parts = ["train"]
        elif dataset == "audiocaps":
            parts = ["train", "val", "test"]  # They are merged (section 3).
        elif Path(dataset).resolve() == Path(validation).resolve():
            parts = ["train"]  # The rest of the folder validates.
        else:
            parts = ["all"]
        splits += [read_split(dataset, part, data_dir) for part in parts]
    validation_split = read_split(validation, "val", data_dir)

    names = [split.name for split in splits]
    option = f"--datasets {' '.join(datasets)}"
    if len(set(names)) < len(names):
        raise InputError(f"{option}: names the same data set twice")
    if was_seen(validation_split, names):
        raise InputError(
            f"{option}: {validation_split.name} would be trained on and validate as well; "
            "--validation names another data set"
        )
    return splits, validation_split


def was_seen(split: Split, trained_on: Sequence[str]) -> bool:
    """Tell whether a model trained on splits of these names has seen this split or a part of it."""
    _, dataset, part = parse_split_name(split.name)
    for name in trained_on:
        _, trained_dataset, trained_part = parse_split_name(name)
        if trained_dataset != dataset:
            continue
        if part == trained_part or part == "all" or trained_part == "all":
            return True
    return False


# --- Waveforms, decoded once ---

def decode_splits(splits: Sequence[Split], cache_dir: Path) -> None:
    """Fill in the splits' waveforms, after decoding the sounds that are new or have changed."""
    paths = []
    for split in splits:
        paths += [clip.path for clip in split.clips]
    cache_files = decode_once(paths, cache_dir)
    for split in splits:
        split.waveforms = Waveforms(cache_files[clip.path] for clip in split.clips)


# --- Batches (sections 3 and 4) ---

@dataclasses.dataclass
class Batch:
    """One process's share of a batch.

    Consecutive pairs of one clip share its segments.
    """

    segments: Tensor  # (S, 320000) int16
    counts: Tensor  # (C,) segments of each clip, summing to S
    clip_rows: Tensor  # (B_r,) each pair's clip among the C
    tokens: Tensor  # (B_r, L)
    # The ids are those of the whole batch, since the losses compare all of its pairs. They are also
    # the rows of the teachers' embeddings (distill.py).
    clip_ids: Tensor  # (B,), equal where two pairs show the same clip
    pair_ids: Tensor  # (B,)

    def inputs(self, device: torch.device) -> list[Tensor]:
        """Move what the model encodes to its device: segments, counts, clip_rows, tokens."""
        tensors = [self.segments, self.counts, self.clip_rows, self.tokens]
        return [tensor.to(device, non_blocking=True) for tensor in tensors]

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory; DataLoader calls this."""
        return Batch(*(tensor.pin_memory() for tensor in vars(self).values()))

    def pieces(self, pairs_per_piece: int) -> Iterator["Batch"]:
        """Yield the batch in pieces; a clip whose pairs fall into two pieces is in both."""
        segment_starts = [0, *self.counts.cumsum(0).tolist()]  # (C + 1,), the last is S
        for start in range(0, len(self.tokens), pairs_per_piece):
            clip_rows = self.clip_rows[start : start + pairs_per_piece]
            first_clip = int(clip_rows[0])
            end_clip = int(clip_rows[-1]) + 1
            yield dataclasses.replace(
                self,
                segments=self.segments[segment_starts[first_clip] : segment_starts[end_clip]],
                counts=self.counts[first_clip:end_clip],
                clip_rows=clip_rows - first_clip,
                tokens=self.tokens[start : start + pairs_per_piece],
            )


class PairBatches(torch.utils.data.Dataset):
    """The batches of a run: item i is this process's share of the run's i-th batch.

    Its length is the number of batches of one epoch, and items go on beyond it, epoch after epoch.
    An epoch puts all pairs in a new order, in which captions_per_clip captions of one clip stand
    side by side, and cuts it into whole batches. The few pairs left over are not shown, so that the
    loss always compares equally many pairs.
    """

    def __init__(
        self, splits: Sequence[Split], tokenizer: Tokenizer, batch_size: int,
        captions_per_clip: int = 1, seed: int = 0, rank: int = 0, world: int = 1,
    ):
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.share_size = batch_size // world
        self.captions_per_clip = captions_per_clip
        self.seed = seed
        self.rank = rank
        # Clips and captions are numbered through all splits in their order. These numbers are the
        # clip_ids and pair_ids of the batches, and the rows of the teachers' embeddings, which
        # distill.py makes of the same splits in the same order.
        self.clips: list[tuple[Split, int]] = []  # a clip's split, and its index there
        self.captions: list[str] = []  # (P,)
        self.pairs_of_clip: list[np.ndarray] = []
        for split in splits:
            for index, clip in enumerate(split.clips):
                first_pair = len(self.captions)
                self.captions += clip.captions
                self.clips.append((split, index))
                self.pairs_of_clip.append(np.arange(first_pair, len(self.captions)))
        pair_counts = [len(pairs) for pairs in self.pairs_of_clip]
        self.clip_of_pair = np.repeat(np.arange(len(self.clips)), pair_counts)  # (P,)
        self._ordered_epoch: int | None = None
        self._pairs_in_order: np.ndarray | None = None
        if len(self.captions) < batch_size or batch_size % world:
            raise InputError(
                f"--batch-size {batch_size}: at most the {len(self.captions):,} pairs that there "
                f"are, and a multiple of the processes ({world})"
            )

    def __len__(self) -> int:
        return len(self.captions) // self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        """Return the numbers of all pairs in the order in which an epoch shows them: (P,)."""
        if epoch != self._ordered_epoch:
            self._pairs_in_order = self._draw_order(epoch)
            self._ordered_epoch = epoch
        return self._pairs_in_order

    def _draw_order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        groups = []
        for pairs in self.pairs_of_clip:
            shuffled = rng.permutation(pairs)
            for start in range(0, len(pairs), self.captions_per_clip):
                groups.append(shuffled[start : start + self.captions_per_clip])
        return np.concatenate([groups[i] for i in rng.permutation(len(groups))])

    def __getitem__(self, step: int) -> Batch:
        epoch, index = divmod(step, len(self))
        start = index * self.batch_size
        pairs = self.order(epoch)[start : start + self.batch_size]  # (B,), of all processes
        share_start = self.rank * self.share_size
        share = pairs[share_start : share_start + self.share_size]  # (B_r,)
        clip_of_share = self.clip_of_pair[share]  # (B_r,)
        # Consecutive pairs of one clip share its crop, which is encoded once.
        is_new_clip = np.append(True, clip_of_share[1:] != clip_of_share[:-1])
        crops = [self._draw_crop(int(clip), epoch) for clip in clip_of_share[is_new_clip]]
        segments, counts = to_segments(crops)
        return Batch(
            segments=segments,
            counts=counts,
            clip_rows=torch.from_numpy(np.cumsum(is_new_clip) - 1),
            tokens=tokenize(self.tokenizer, [self.captions[pair] for pair in share]),
            clip_ids=torch.from_numpy(self.clip_of_pair[pairs]),
            pair_ids=torch.from_numpy(pairs),
        )

    def _draw_crop(self, clip: int, epoch: int) -> np.ndarray:
        """Return the 30 s or less that an epoch shows of a clip: (n,) int16."""
        split, index = self.clips[clip]
        rng = np.random.default_rng([self.seed, epoch, clip])
        return crop(split.waveforms[index], rng)


# --- python -m dualenc.data check FOLDER ---

SILENT_PEAK = 1e-4  # a share of full scale: -80 dB
UNREADABLE = "cannot be read"
NOT_WHOLE = "not whole"


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("action", choices=("check",), help="the one action that there is")
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER",
        help="a folder of sounds, with or without a captions.csv, or the folder that holds Clotho "
        "and AudioCaps",
    )
    folder = parser.parse_args().folder
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")

    # --- A folder of sounds, with captions or without, or Clotho and AudioCaps ---
    if (folder / "captions.csv").is_file():
        datasets_and_parts = [(str(folder), "all")]
    else:
        datasets_and_parts = published_splits(folder)
    fault_count = 0
    if not datasets_and_parts:
        fault_count += check_split(sounds_without_captions(folder))
    clotho_test = None
    for dataset, part in datasets_and_parts:
        try:
            split = read_split(dataset, part, folder)
        except InputError as error:  # The other splits are checked all the same.
            print(error)
            fault_count += 1
            continue
        fault_count += check_split(split)
        if split.name == "clotho/evaluation":
            clotho_test = split

    # --- The new annotations of Clotho's test split (section 6) ---
    annotations = folder / "metadata_eval.csv"
    if annotations.is_file():
        fault_count += check_annotations(annotations, clotho_test)
    elif clotho_test is not None:
        print(f"{annotations}: is not there; Table 1 will lack the columns of the new annotations")

    print(counted(fault_count, "fault"))
    return 1 if fault_count else 0


def published_splits(folder: Path) -> list[tuple[str, str]]:
    """List (data set, part) of the splits of Clotho and AudioCaps whose csv is below a folder."""
    datasets_and_parts = []
    for dataset in LAYOUTS:
        for part in PARTS:
            layouts = possible_layouts(dataset, part, folder)
            if any(layout.table.is_file() for layout in layouts):
                datasets_and_parts.append((dataset, part))
    return datasets_and_parts


def sounds_without_captions(folder: Path) -> Split:
    """Make a split of all sounds below a folder; an InputError if there is none."""
    sounds = sounds_by_name(folder)
    if not sounds:
        raise InputError(f"{folder}: no sound file in it")
    clips = [Clip(name, path, ()) for name, path in sounds.items()]
    return Split("sounds without captions", folder, clips, missing=[])


def check_split(split: Split) -> int:
    """Read all sounds of a split, print what is wrong with it, and return the number of faults."""
    print(dataclasses.replace(split, missing=[]))  # The missing files are listed below.
    faults = defaultdict(list)  # {headline of a kind of fault: a line for each such fault}
    faults["missing"] += split.missing
    bar = tqdm(split.clips, f"reading {split.name}", leave=False, disable=None)
    pool = ThreadPoolExecutor(usable_cores())
    try:
        results = pool.map(fault_of_sound, [clip.path for clip in split.clips])
        for clip, (headline, sentence) in zip(bar, results, strict=True):
            if headline:
                faults[headline].append(f"{clip.name}: {sentence}" if sentence else clip.name)
    finally:
        pool.shutdown(cancel_futures=True)  # After Ctrl-C no further sound is begun.
    fault_count = print_faults(faults)
    if UNREADABLE in faults or NOT_WHOLE in faults:
        print("  Training and evaluation stop at sounds that cannot be read or are not whole. One "
              "that is removed or renamed is passed over as missing.")
    return fault_count


def fault_of_sound(path: Path) -> tuple[str, str]:
    """Return a headline and a sentence for what is wrong with a sound; both empty if nothing is."""
    peak = 0.0
    decoding_faults: list[str] = []
    try:
        for block in stream_audio(path, decoding_faults):
            peak = max(peak, np.abs(block).max())
    except InputError as error:
        return UNREADABLE, str(error).removeprefix(printable(f"{path}: "))
    if decoding_faults:
        return NOT_WHOLE, decoding_faults[0]
    if peak > SILENT_PEAK:
        return "", ""
    for block in all_channels(path, []):
        if np.abs(block).max() > SILENT_PEAK:
            return "silent as one channel, since its channels cancel", ""
    return "silent", ""


def check_annotations(table: Path, clotho_test: Split | None) -> int:
    """Print the faults of the new annotations (section 6), and return how many there are.

    Their queries and file names are compared with Clotho's test split, if that is on disk.
    """
    try:
        rows = read_csv(table, ["query", "audio_filenames"])
    except InputError as error:
        print(error)
        return 1
    print(f"{table}: {counted(len(rows), 'row')}")
    if clotho_test is None:
        return 0
    captions = set(clotho_test.captions)
    names = {clip.name for clip in clotho_test.clips} | set(clotho_test.missing)
    faults = defaultdict(list)
    for row in rows:
        # The queries may be captions of missing clips, which are not known here.
        if row["query"] not in captions and not clotho_test.missing:
            faults[f"queries that are no captions of {clotho_test.name}"].append(row["query"])
        for name in parse_names(row["audio_filenames"]):
            if name not in names:
                faults[f"names that are no clips of {clotho_test.name}"].append(name)
    return print_faults(faults)


def print_faults(faults: dict[str, list[str]]) -> int:
    """Print at most twenty faults of each kind, and return the number of all faults."""
    for headline, lines in faults.items():
        if lines:
            print(textwrap.indent(str(InputError.of(headline, lines)), "  "))
    return sum(len(lines) for lines in faults.values())


if __name__ == "__main__":
    run_command(main)
