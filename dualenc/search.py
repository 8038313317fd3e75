"""A folder of sounds and a sentence -> the sounds that match, and where in them.

    python -m dualenc.search "a dog barks, then a car passes" --audio FOLDER
    python -m dualenc.search --like bark.wav --audio FOLDER      # a sound as the query
    python -m dualenc.search --audio FOLDER                      # asks for sentence after sentence
    python -m dualenc.search --serve --audio FOLDER              # a local page to type into
    python -m dualenc.search --queries queries.csv --audio FOLDER --submission out.csv

The first search embeds all sounds of the folder, later ones only what is new or has changed. The
score is the cosine of query and sound; "above" is the share of the searched files that score lower.

N files, S segments of all of them together, s segments of one, Q queries, D = 1024 values of an
embedding, n samples at 32 kHz.
"""

import collections
import contextlib
import csv
import functools
import hashlib
import importlib
import json
import os
import queue
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dualenc import audio, decoding, page
from dualenc.checkpoints import checkpoint_file, newest_checkpoint, save_atomically
from dualenc.data import read_csv
from dualenc.errors import (
    InputError, Parser, check_output_file, counted, first_line, positive_int, printable, replacing,
    run_command,
)
from dualenc.model import PRECISIONS, DualEncoder, choose_device, choose_precision

INDEX_NAME = ".dualenc-index"  # The dot hides it from a scan of the sounds.
INDEX_FORMAT = "index 3"
SAVE_SECONDS = 60  # between two saves, so that an interruption costs little
MAX_PARTS = 100  # An index of more parts is merged into one.
EMBED_SEGMENTS = 16  # embedded at a time, from several files together
QUEUED_BLOCKS = 64  # the most decoded blocks of 10 s that wait to be embedded: 40 MB
HASHED_BYTES = 2**20  # read at a time, while a file is hashed
STRAIGHT = str.maketrans("‘’", "''")  # Phones type curly apostrophes.


class Match(NamedTuple):
    """A file that matches a query, and where its best segment lies."""

    path: Path
    score: float  # cosine with the query
    above: float  # the share of the searched files that score lower
    start: int  # s, of the best segment
    end: float  # s
    seconds: float  # the length of the whole file

    def where(self) -> str:
        return f"{page.clock(self.start)} to {page.clock(self.end)}"


class File(NamedTuple):
    """A file as the index knows it: by size and time, and by its content."""

    size: int  # bytes
    modified: int  # ns
    digest: str  # a hash of the content


class Content(NamedTuple):
    """What is known of a content, which one file has, or several equal ones share."""

    seconds: float
    segment_count: int  # 0 if it cannot be read
    fault: str  # why it cannot be read, or not whole; else ""


class Block(NamedTuple):
    """Ten seconds of a file, or its shorter rest, which are one segment."""

    path: str
    digest: str  # a hash of the file's content
    waveform: np.ndarray  # (n,) int16
    vector: Tensor | None  # (D,) if it was embedded before an interruption


class Unfinished(NamedTuple):
    """A file that is being embedded."""

    digest: str  # a hash of its content
    vectors: list[Tensor]  # (D,) for each of its segments so far


class Reading(NamedTuple):
    """The result of reading a file to its end.

    Damage belongs to the content, and is kept as content.fault. What may be over at the next search
    (the network fails, the file is being written) leaves file and content None, and fault tells it.
    """

    path: str
    file: File | None  # None if the file cannot be read now
    content: Content | None  # None if it is known already
    fault: str = ""  # why it cannot be read now


# --- The index in memory: exact search ---

class SoundIndex:
    """Embedded sound files, and exact search in them.

    A file's embedding is the sum of its segments' vectors, divided by the norm of that sum. Each
    vector is stored divided by that norm, so that a file's score is the sum of its segments'
    products with the query.

    Attributes:
        root: the folder that names are relative to.
        names: (N,) of the files that are searched.
        owner: (S,) int64, the index in names of each segment's file.
        faults: {name: why the file cannot be read, or not whole}.
        missing: names of files below root that are embedded, but not there now.
        skipped: how many "files of other kinds" and "folders that may not be entered" were passed
            over.
    """

    def __init__(
        self, model: DualEncoder, root: Path, contents: dict[str, Content],
        parts: Sequence[Tensor], rows: Tensor,
    ):
        """Put the index of some files together; build() makes one from a folder.

        Args:
            contents: {name: Content}, each of at least one segment.
            parts: matrices (S_p, D) of scaled segments.
            rows: (S,) int64, the row of each segment, counted through all parts; first those of the
                first file, then those of the second, and so on.
        """
        self.model = model
        self.root = root
        self.names = list(contents)
        self.seconds = [content.seconds for content in contents.values()]
        self.faults: dict[str, str] = {}
        self.missing: list[str] = []
        self.skipped: collections.Counter[str] = collections.Counter()
        counts = [content.segment_count for content in contents.values()]
        self.owner = np.repeat(np.arange(len(counts)), counts)
        self._ends = np.cumsum([0, *counts])  # File i has the segments _ends[i] : _ends[i + 1].
        self._parts = parts
        self._rows = rows

    @classmethod
    def build(
        cls, model: DualEncoder, sounds: decoding.AnyPath | Iterable[decoding.AnyPath],
        index_folder: decoding.AnyPath | None = None, prune: bool = False,
    ) -> "SoundIndex":
        """Embed a folder of sounds, or a list of sound files.

        Args:
            index_folder: where embeddings are kept, so that only new and changed files are embedded
                next time; None keeps none.
            prune: drop the embeddings of files of the folder that are not there now.

        Raises:
            InputError: no sound can be read, or the index cannot be written.
        """
        is_folder = isinstance(sounds, str | os.PathLike)
        root = Path(os.path.abspath(sounds if is_folder else os.sep))
        skipped = collections.Counter()
        if is_folder:
            paths = decoding.sounds_below(root, skipped)
        else:
            paths = dict.fromkeys(map(os.path.abspath, sounds))  # each once, in their order
        # Stored paths begin with the root's real path, so that it may be reached through links.
        # Links below the root are not resolved.
        root_prefix = os.path.join(root, "")
        prefix = os.path.join(os.path.realpath(root), "")
        paths = [prefix + os.fspath(path).removeprefix(root_prefix) for path in paths]
        stored = StoredIndex(index_folder, model)

        # 1. Compare the files with what is stored.
        there, changed, faults = stored.compare(paths)

        # 2. Embed what is new or has changed.
        if changed:
            stored.check_writable()
            faults |= embed_changed(model, stored, changed)

        # 3. Forget what was moved; what else is missing is kept until it is back, unless pruned.
        stored.forget(stored.moved())
        missing = []
        if is_folder:
            missing = sorted(stored.files_below(prefix) - set(there))
        if prune:
            stored.forget(missing)
        stored.tidy(prune)

        # 4. Make an index of the files that are there.
        searched = stored.searchable(there, faults)
        faults = {path.removeprefix(prefix): faults[path] for path in sorted(faults)}
        if not searched:
            reasons = [f"{name}: {fault}" for name, fault in faults.items()]
            if missing:
                reasons.append(f"{counted(len(missing), 'file')} of the index, not there now")
            headline = f"{root}: no sound file that can be read"
            raise InputError.of(headline, reasons or ["none there"])
        contents = {path.removeprefix(prefix): stored.content_of(path) for path in searched}
        rows = stored.rows_of([stored.files[path].digest for path in searched])
        index = cls(model, root, contents, stored.parts, rows)
        index.faults = faults
        index.missing = [path.removeprefix(prefix) for path in missing]
        index.skipped = skipped
        return index

    def search(self, sentence: str, k: int = 10, by: str = "file") -> list[Match]:
        """Return the k files that match a sentence best, best first, and ties in order of names.

        Args:
            by: "file" scores a file by its embedding, "segment" by that of its best segment.
        """
        return self.nearest(self.model.embed_text(in_words(sentence))[0], k, by)

    def search_like(self, path: decoding.AnyPath, k: int = 10, by: str = "file") -> list[Match]:
        """Return the k files that sound most like one, which need not be in the index."""
        reading, segments = embed_file(self.model, path)
        if len(segments) == 0:
            fault = reading.content.fault if reading.content else reading.fault
            raise InputError(f"{path}: {fault}")
        return self.nearest(segments.sum(dim=0), k, by)

    def nearest(self, query: Tensor, k: int = 10, by: str = "file") -> list[Match]:
        """Return the k best files for a query (D,) of unit norm, by exact search."""
        if k < 1 or by not in ("file", "segment"):
            raise InputError(f"k={k}, by={by}: at least 1, and 'file' or 'segment', are needed")
        products = self._products(query)  # (S,)
        cosines = products / self._norms  # (S,)
        if by == "file":
            scores = self._reduce_to_files(np.add, products)  # (N,)
        else:
            scores = self._reduce_to_files(np.maximum, cosines)

        # topk alone would take any of several equal scores; here the first by name are taken.
        least = scores.topk(min(k, len(scores))).values[-1]
        candidates = (scores >= least).nonzero().flatten()
        order = scores[candidates].argsort(descending=True, stable=True)[:k]

        matches = []
        for i in candidates[order].tolist():
            above = (scores < scores[i]).double().mean().item()
            best = int(cosines[self._ends[i] : self._ends[i + 1]].argmax())
            start = best * audio.SEGMENT_SECONDS
            end = min(start + audio.SEGMENT_SECONDS, self.seconds[i])
            path = self.root / self.names[i]
            matches.append(Match(path, scores[i].item(), above, start, end, self.seconds[i]))
        return matches

    def scores(self, query: Tensor) -> Tensor:
        """Return the cosine of a query with each file: (D,) of unit norm -> (N,)."""
        return self._reduce_to_files(np.add, self._products(query))

    def vectors(self) -> Tensor:
        """Copy all segments' vectors, for other search libraries: (S, D) of unit norm."""
        return take_rows(self._parts, self._rows) / self._norms[:, None]

    def _products(self, query: Tensor) -> Tensor:
        products = torch.cat([part @ query for part in self._parts])
        return products[self._rows]

    @functools.cached_property
    def _norms(self) -> Tensor:
        """Return the norm of each scaled segment, which makes its product a cosine: (S,)."""
        norms = torch.cat([part.norm(dim=1) for part in self._parts])
        return norms[self._rows]

    def _reduce_to_files(self, reduce: np.ufunc, values: Tensor) -> Tensor:
        """Reduce the values of each file's segments to one: (S,) -> (N,)."""
        return torch.from_numpy(reduce.reduceat(values.numpy(), self._ends[:-1]))


def take_rows(parts: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Copy rows (S,), counted through all parts, out of these matrices (S_p, D): (S, D)."""
    taken = torch.empty(len(rows), parts[0].shape[1])
    first = 0
    for part in parts:
        inside = (first <= rows) & (rows < first + len(part))
        taken[inside] = part[rows[inside] - first]
        first += len(part)
    return taken


def in_words(sentence: str) -> str:
    """Return a sentence as it is embedded; an InputError if it holds no word."""
    if not any(c.isalnum() for c in sentence):
        raise InputError(f"{sentence.strip()!r}: no word is left to search for")
    # What a terminal in another encoding left, half of a surrogate pair, becomes a question mark.
    return sentence.strip().translate(STRAIGHT).encode(errors="replace").decode()


# --- The index on disk: a folder of parts for each model ---

class StoredIndex:
    """The embeddings of one model, on disk in a folder of parts, or only in memory without folder.

    A part holds what was new at a save: files, their contents, and the scaled segments of those. A
    content that several files have is stored once. Parts are read in the order of their names; if
    two tell of one file, the later counts. So two searches at once need no lock: each writes its
    own parts, and at worst both embed the same sounds.

    Beside the parts, DIGEST.unfinished holds the vectors of a content whose embedding had begun but
    not ended at a save.

    Attributes:
        files: {path: File}, also files that are not there now.
        contents: {digest: Content}, at least those of all files.
        parts: matrices (S_p, D) of scaled segments, memory-mapped.
        first_row: {digest: the row of its first segment, counted through all parts}.
    """

    def __init__(self, index_folder: decoding.AnyPath | None, model: DualEncoder):
        self.folder = None
        self._arrived: set[str] = set()  # digests of the files that this run added
        self._no_segments = torch.zeros(0, model.config.embedding)
        self._start_empty()
        self._start_next_part()
        if index_folder is not None:
            self.folder = Path(os.path.realpath(index_folder)) / digest_of_model(model)
            old_index = self.folder.parent / "index"
            if old_index.is_file() and not self.folder.exists():
                tell(f"{old_index}: is of an earlier version and can be removed; the sounds are "
                     "embedded again")
            self._read()

    def _start_empty(self) -> None:
        self.files: dict[str, File] = {}
        self.contents: dict[str, Content] = {}
        self.parts: list[Tensor] = []
        self.first_row: dict[str, int] = {}
        self._part_files: list[Path] = []
        self._row_count = 0

    def _start_next_part(self) -> None:
        self._new_files: dict[str, File | None] = {}  # None: the file is to be forgotten
        self._new_contents: dict[str, Content] = {}
        self._new_segments: list[Tensor] = []

    def _read(self) -> None:
        """Read all parts; a damaged one is passed over, and reported in a line."""
        for part_file in sorted(self.folder.glob("*.part")):
            try:
                files, contents, segments = read_part(part_file)
            except FileNotFoundError:
                # Another search has just merged it into another part, so reading begins again.
                self._start_empty()
                return self._read()
            except PermissionError:
                raise
            except Exception as error:  # torch.load and json pass on whatever their parsers raise.
                tell(f"{part_file}: cannot be read ({first_line(error)}); its sounds are embedded "
                     "again. If this is said at every search, remove the file")
                continue
            for path, file in files.items():
                path = os.path.normpath(self.folder / path)
                if file is None:
                    self.files.pop(path, None)
                else:
                    self.files[path] = file
            self._place(contents)
            self.parts.append(segments)
            self._part_files.append(part_file)
        # A file is embedded again if its content was in a damaged part.
        for path in [path for path, file in self.files.items() if file.digest not in self.contents]:
            del self.files[path]

    def _place(self, contents: dict[str, Content]) -> None:
        """Give contents the next rows, in their order."""
        for digest, content in contents.items():
            self.contents[digest] = content
            self.first_row[digest] = self._row_count
            self._row_count += content.segment_count

    def content_of(self, path: str) -> Content:
        return self.contents[self.files[path].digest]

    def searchable(self, paths: Sequence[str], faults: dict[str, str]) -> list[str]:
        """List the files that hold sound, and add the faults of all contents to faults."""
        searched = []
        for path in paths:
            if path not in self.files:  # It is new, but cannot be read now.
                continue
            content = self.content_of(path)
            if content.fault:
                faults.setdefault(path, content.fault)
            if content.segment_count > 0:
                searched.append(path)
        return searched

    def rows_of(self, digests: Sequence[str]) -> Tensor:
        """Return the rows of all segments of contents, counted through all parts: (S,) int64."""
        counts = np.array([self.contents[digest].segment_count for digest in digests], np.int64)
        first_rows = np.array([self.first_row[digest] for digest in digests], np.int64)
        # A segment's row is its content's first one, plus its number within the content.
        segments_before = np.cumsum(counts) - counts
        within = np.arange(counts.sum()) - np.repeat(segments_before, counts)
        return torch.from_numpy(np.repeat(first_rows, counts) + within)

    def compare(self, paths: Iterable[str]) -> tuple[list[str], list[str], dict[str, str]]:
        """Compare files with the stored ones, by size and time.

        Returns:
            The paths that are there; those of them that are new or have changed; {path: fault} of
            paths that are no file, and of new ones that cannot be read.
        """
        there = []
        changed = []
        faults = {}
        for path in paths:
            known = self.files.get(path)
            try:
                status = os.stat(path)
            except OSError as error:
                if known is None:
                    faults[path] = f"cannot be read ({error.strerror})"
                continue
            if not stat.S_ISREG(status.st_mode):
                faults[path] = "is not a file"
                continue
            there.append(path)
            if known is None or (known.size, known.modified) != stamp(status):
                changed.append(path)
        return there, changed, faults

    def check_writable(self) -> None:
        """Raise an InputError if the index cannot be written."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise InputError(f"{self.folder.parent}: the index cannot be written there "
                             f"({error.strerror}); name a folder for it: --index FOLDER") from error

    def add(self, reading: Reading, segments: Tensor) -> None:
        """Add a file that was read, and its scaled segments (s, D) if its content is new."""
        self.files[reading.path] = reading.file
        self._new_files[reading.path] = reading.file
        self._arrived.add(reading.file.digest)
        if reading.content is not None:
            digest = reading.file.digest
            # Several files of the same content may have been read at once; the first counts.
            if digest not in self.contents:
                self._new_contents[digest] = reading.content
                self._new_segments.append(segments)
                self._place({digest: reading.content})

    def forget(self, paths: Iterable[str]) -> None:
        for path in paths:
            del self.files[path]
            self._new_files[path] = None

    def moved(self) -> list[str]:
        """List the files that are gone, but whose content was added under a new name."""
        return [
            path for path, file in self.files.items()
            if file.digest in self._arrived and not os.path.exists(path)
        ]

    def files_below(self, folder: str) -> set[str]:
        return {path for path in self.files if path.startswith(folder)}

    def save(self) -> None:
        """Write what is new since the last save, as one more part."""
        if not self._new_files:
            return
        segments = torch.cat([self._no_segments, *self._new_segments])
        self._write(self._new_files, self._new_contents, segments)
        self.parts.append(segments)
        if self.folder is not None:
            for file in self._new_files.values():
                if file is not None:
                    self._unfinished_file(file.digest).unlink(missing_ok=True)
        self._start_next_part()

    def save_unfinished(self, files: Iterable[Unfinished]) -> None:
        """Write what is embedded so far of these files, so that it need not be embedded again."""
        if self.folder is None:
            return
        for file in files:
            vectors = torch.stack(file.vectors)  # (s, D)
            save_atomically(vectors, self._unfinished_file(file.digest), by_many=True)

    def vectors_of_unfinished(self, digest: str) -> Tensor:
        """Read what an interrupted run embedded of a content: (s, D), s = 0 if there is nothing."""
        if self.folder is None:
            return self._no_segments
        unfinished_file = self._unfinished_file(digest)
        try:
            return torch.load(unfinished_file, weights_only=True)
        except FileNotFoundError:
            return self._no_segments
        except Exception as error:  # torch.load passes on whatever its parsers raise.
            tell(f"{unfinished_file}: cannot be read ({first_line(error)}); its recording is "
                 "embedded from its beginning")
            return self._no_segments

    def _unfinished_file(self, digest: str) -> Path:
        return self.folder / f"{digest}.unfinished"

    def tidy(self, prune: bool) -> None:
        """Save, and merge the parts if they are many or something is to be dropped from them."""
        is_something_forgotten = None in self._new_files.values()
        self.save()
        # A run that found nothing new merges nothing, since it may lack the permission to write.
        are_many = bool(self._arrived) and len(self._part_files) > MAX_PARTS
        if are_many or (prune and is_something_forgotten):
            self.merge()
        if prune and self.folder is not None:
            # All that can be read in this folder is embedded by now. What is left belongs to files
            # that are gone or cannot be read now, or to another folder that shares this index: its
            # interrupted recording is then embedded from its beginning.
            for unfinished_file in self.folder.glob("*.unfinished"):
                unfinished_file.unlink(missing_ok=True)

    def merge(self) -> None:
        """Replace all parts by one, without what no longer belongs to any file."""
        old_part_files = self._part_files.copy()
        digests = list(dict.fromkeys(file.digest for file in self.files.values()))
        segments = take_rows([self._no_segments, *self.parts], self.rows_of(digests))
        # The old parts go only when the new one is written, so an interruption loses nothing.
        contents = {digest: self.contents[digest] for digest in digests}
        self._write(self.files, contents, segments)
        for part_file in old_part_files:
            part_file.unlink(missing_ok=True)

    def _write(
        self, files: dict[str, File | None], contents: dict[str, Content], segments: Tensor
    ) -> None:
        if self.folder is None:
            return
        newest = int(self._part_files[-1].name.partition("-")[0]) if self._part_files else 0
        # The new part must come last, even if the clock was put back.
        number = max(time.time_ns(), newest + 1)
        part_file = self.folder / f"{number:020}-{os.getpid()}.part"
        # Paths are relative to the index, so that it and the sounds may be moved together.
        relative = {os.path.relpath(path, self.folder): file for path, file in files.items()}
        header = json.dumps({"files": relative, "sounds": contents})
        save_atomically([header, segments], part_file)
        self._part_files.append(part_file)


def read_part(part_file: Path) -> tuple[dict[str, File | None], dict[str, Content], Tensor]:
    """Read a part, memory-mapped: {path: File}, {digest: Content}, their segments (S_p, D).

    None in place of a File says that the file is to be forgotten.
    """
    header, segments = torch.load(part_file, weights_only=True, mmap=True)
    header = json.loads(header)
    files = {path: file and File(*file) for path, file in header["files"].items()}
    contents = {digest: Content(*facts) for digest, facts in header["sounds"].items()}
    if sum(content.segment_count for content in contents.values()) != len(segments):
        raise ValueError("its header tells of other segments")
    return files, contents, segments


def digest_of_model(model: DualEncoder) -> str:
    """Return a digest of a model: of about a thousand values of each of its weight tensors."""
    values = []
    for weights in model.state_dict().values():
        weights = weights.flatten()
        values.append(weights[:: max(1, len(weights) // 1000)].cpu())
    spread = torch.cat(values)
    return hashlib.sha256(INDEX_FORMAT.encode() + spread.numpy().tobytes()).hexdigest()[:16]


def stamp(status: os.stat_result) -> tuple[int, int]:
    """Return a file's size in bytes and its time of modification in ns."""
    return status.st_size, status.st_mtime_ns


def tell(line: str) -> None:
    print(printable(line), file=sys.stderr)


# --- Files -> blocks -> segments ---

def embed_changed(model: DualEncoder, stored: StoredIndex, paths: Sequence[str]) -> dict[str, str]:
    """Embed files into the index, and save it every minute.

    Threads hash and decode the next files while the model embeds.

    Returns:
        {path: why it cannot be read now}, for the files of which this is so.
    """
    faults = {}
    unfinished: dict[str, Unfinished] = {}
    save_at = time.monotonic() + SAVE_SECONDS
    # An index in memory is built by a program, and shows no bar. With None tqdm decides: it shows a
    # bar on a terminal only.
    no_bar = True if stored.folder is None else None
    bar = tqdm(total=len(paths), desc="embedding", unit="file", disable=no_bar)
    stopping = threading.Event()
    readers = (read_file(path, stored, stopping) for path in paths)
    try:
        with bar, contextlib.closing(in_threads(readers, QUEUED_BLOCKS, stopping)) as pieces:
            for finished in embed(model, pieces, unfinished):
                for reading, segments in finished:
                    if reading.file is None:
                        faults[reading.path] = reading.fault
                    else:
                        stored.add(reading, segments)
                    bar.update()
                if time.monotonic() > save_at:
                    stored.save()
                    stored.save_unfinished(unfinished.values())
                    save_at = time.monotonic() + SAVE_SECONDS
    finally:  # After Ctrl-C, too, what is embedded is kept.
        stored.save()
        stored.save_unfinished(unfinished.values())
    return faults


def embed_file(model: DualEncoder, path: decoding.AnyPath) -> tuple[Reading, Tensor]:
    """Embed one file, however long: its scaled segments (s, D), none if it cannot be read."""
    empty_index = StoredIndex(None, model)
    pieces = read_file(os.fspath(path), empty_index, stopping=threading.Event())
    for finished in embed(model, pieces, unfinished={}):
        if finished:
            return finished[0]


def read_file(
    path: str, stored: StoredIndex, stopping: threading.Event
) -> Iterator[Block | Reading]:
    """Read one file: yield its blocks, and then a Reading.

    There are no blocks if its content is stored already. No error is raised for a bad file: its
    Reading tells the fault.
    """
    faults = []
    samples = 0
    segment_count = 0
    try:
        before = stamp(os.stat(path))
        digest = digest_of_file(path, stopping)
        content = None
        if digest not in stored.contents:
            vectors = stored.vectors_of_unfinished(digest)
            try:
                for waveform in decoding.stream_audio(path, faults):
                    samples += len(waveform)
                    if segment_count > 0 and len(waveform) < audio.MIN_REMAINDER:
                        break
                    vector = vectors[segment_count] if segment_count < len(vectors) else None
                    segment_count += 1
                    yield Block(path, digest, decoding.to_int16(waveform), vector)
                seconds = samples / decoding.SAMPLE_RATE
                content = Content(seconds, segment_count, "; ".join(faults))
            except InputError as error:
                fault = str(error).removeprefix(printable(f"{path}: "))
                if isinstance(error.__cause__, OSError):  # The disk or the network failed.
                    yield Reading(path, None, None, fault)
                    return
                content = Content(0.0, 0, fault)
        if stamp(os.stat(path)) != before:
            yield Reading(path, None, None, "was changed while it was read")
            return
    except OSError as error:
        yield Reading(path, None, None, f"cannot be read now ({error.strerror})")
        return
    yield Reading(path, File(*before, digest), content)


def digest_of_file(path: str, stopping: threading.Event) -> str:
    """Return a digest of a file's bytes; an InterruptedError once `stopping` is set."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(HASHED_BYTES):
            digest.update(chunk)
            # Stopping is looked for after every megabyte: a file may be large and a network slow.
            if stopping.is_set():
                raise InterruptedError
    return digest.hexdigest()[:32]


def embed(
    model: DualEncoder, pieces: Iterator[Block | Reading], unfinished: dict[str, Unfinished]
) -> Iterator[list[tuple[Reading, Tensor]]]:
    """Embed the blocks of files, EMBED_SEGMENTS at a time, whichever files they belong to.

    Args:
        unfinished: {path: Unfinished} of the files that are being embedded. It is kept up to date
            here, so that the caller can save them.

    Yields after each step the files that it finished: their Readings and scaled segments (s, D).
    """
    blocks: list[Block] = []
    read_to_end: list[Reading] = []

    def keep(block: Block, vector: Tensor) -> None:
        file = unfinished.setdefault(block.path, Unfinished(block.digest, []))
        file.vectors.append(vector)

    def embed_blocks() -> list[tuple[Reading, Tensor]]:
        if blocks:
            segments, _ = audio.to_segments([block.waveform for block in blocks])
            for block, vector in zip(blocks, project(model, segments), strict=True):
                keep(block, vector)
        finished = []
        for reading in read_to_end:
            file = unfinished.pop(reading.path, None)
            finished.append((reading, scaled(file, reading, model.config.embedding)))
        blocks.clear()
        read_to_end.clear()
        return finished

    for piece in pieces:
        if isinstance(piece, Reading):
            read_to_end.append(piece)
        elif piece.vector is not None:
            keep(piece, piece.vector)
        else:
            blocks.append(piece)
        # Files whose content is known bring no blocks, and do not wait long for those of others.
        if EMBED_SEGMENTS in (len(blocks), len(read_to_end)) or not blocks:
            yield embed_blocks()
    yield embed_blocks()


def project(model: DualEncoder, segments: Tensor) -> Tensor:
    """Project segments in evaluation mode, without gradients: (S, 320000) -> (S, D) on the CPU."""
    with torch.no_grad(), model.evaluating():
        return model.project_segments(segments.to(model.device)).cpu()


def scaled(file: Unfinished | None, reading: Reading, width: int) -> Tensor:
    """Scale a file's segments so that their sum has unit norm: (s, D)."""
    if reading.content is None or reading.content.segment_count == 0:
        return torch.zeros(0, width)
    segments = torch.stack(file.vectors)
    return segments / segments.sum(dim=0).norm()


class ThreadEnd(NamedTuple):
    """The last item that a thread puts into the queue."""

    error: BaseException | None  # that ended the thread; None if nothing was left to do


def in_threads(
    iterators: Iterable[Iterator], capacity: int, stopping: threading.Event
) -> Iterator:
    """Run iterators in as many threads as there are cores, and yield their items as they come.

    Items of one iterator stay in their order, and at most `capacity` items wait in all. When the
    consumer closes this generator, after an error or Ctrl-C, `stopping` is set and the threads end.
    """
    waiting = iter(iterators)
    lock = threading.Lock()
    items = queue.Queue(capacity)

    def work() -> None:
        error = None
        try:
            while not stopping.is_set():
                with lock:
                    iterator = next(waiting, None)
                if iterator is None:
                    break
                for item in iterator:
                    items.put(item)
                    if stopping.is_set():
                        break
        except BaseException as raised:
            error = raised
        items.put(ThreadEnd(error))

    running = decoding.usable_cores()
    for _ in range(running):
        threading.Thread(target=work, daemon=True).start()
    try:
        while running > 0:
            item = items.get()
            if not isinstance(item, ThreadEnd):
                yield item
                continue
            running -= 1
            if item.error is not None:
                raise item.error
    finally:
        stopping.set()
        # The queue is emptied, since a thread that cannot put its item would wait for ever.
        while running > 0:
            if isinstance(items.get(), ThreadEnd):
                running -= 1


# --- The submission ---

def write_submission(path: Path, queries: Sequence[str], index: SoundIndex) -> None:
    """Write DCASE's csv: a row per distinct query, a column per file, in each cell their cosine.

    Raises:
        InputError: a file cannot be read, or not whole; nothing is written then.
    """
    if index.faults:
        faults = [f"{name}: {fault}" for name, fault in index.faults.items()]
        raise InputError.of(f"{index.root}: no submission without these files", faults)
    queries = list(dict.fromkeys(queries))
    embeddings = index.model.embed_text([in_words(query) for query in queries])  # (Q, D)
    # A file's name may hold bytes that are not UTF-8, which are written as escapes.
    text = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
    with replacing(path) as temporary, open(temporary, "w", **text) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["index", *index.names])
        for query, embedding in zip(queries, embeddings, strict=True):
            scores = index.scores(embedding).tolist()
            writer.writerow([query, *(f"{score:.9g}" for score in scores)])
    rows = counted(len(queries), "query", "queries")
    columns = counted(len(index.names), "file")
    print(f"submission  {path}: {rows}, {columns}")


# --- The command ---

def parse_arguments():
    parser = Parser(__doc__)

    query = parser.add_argument_group("what to search for").add_mutually_exclusive_group()
    query.add_argument("sentence", nargs="?", help="what is to be heard (default: asks for it)")
    query.add_argument("--like", type=Path, metavar="FILE", help="search for sounds like this one")
    query.add_argument(
        "--serve", action="store_true", help="serve a page to type into, on this machine alone"
    )
    query.add_argument(
        "--queries", type=Path, metavar="CSV", help="a csv with a column caption, for --submission"
    )
    query.add_argument(
        "--list-faults", action="store_true",
        help="list the files that cannot be read, or not whole, and those that are not there now",
    )

    sounds = parser.add_argument_group("where to search")
    sounds.add_argument(
        "--audio", type=Path, metavar="FOLDER", required=True, help="the sounds to search"
    )
    sounds.add_argument(
        "--index", type=Path, metavar="FOLDER",
        help=f"where embeddings are kept (default {INDEX_NAME} among the sounds)",
    )
    sounds.add_argument(
        "--prune", action="store_true",
        help="drop from the index what is not there now; else it is kept until it is back",
    )

    model = parser.add_argument_group("which model")
    model.add_argument(
        "--checkpoint",
        help="a file, a run's folder, salsa or baseline (default: the newest runs/**/best.pt)",
    )
    model.add_argument(
        "--tokenizer", help="tokenizer for a checkpoint that holds none, a name or folder"
    )
    model.add_argument(
        "--device", default="auto",
        help="cpu, cuda, cuda:N or mps (default: cuda where there is one)",
    )
    model.add_argument(
        "--precision", choices=("auto", *PRECISIONS), default="auto",
        help="autocast type of both encoders (default: bf16 or fp16 on a GPU, fp32 on a CPU)",
    )

    answer = parser.add_argument_group("what is shown")
    answer.add_argument(
        "--top", type=positive_int, default=10, metavar="N", help="files shown (default 10)"
    )
    answer.add_argument(
        "--by", choices=("file", "segment"), default="file",
        help="score a file by the mean over its 10 s segments, or by its best one (default file)",
    )
    answer.add_argument(
        "--json", action="store_true", help="print one JSON object for each query"
    )
    answer.add_argument(
        "--submission", type=Path, metavar="CSV",
        help="write the similarity of each of --queries and each file, as DCASE 2025 asks",
    )
    answer.add_argument(
        "--port", type=int, default=8765, help="port of --serve (default 8765; 0: any free one)"
    )
    try:
        args = parser.parse_args()
    except InputError as error:
        hint = ""
        if any(word.startswith("-") and not word.startswith("--") for word in sys.argv[1:]):
            hint = "; a sentence that begins with a dash goes after --"
        raise InputError(f"{error}{hint}") from error

    # Input is checked before the model is loaded and the folder embedded, which take long.
    if args.sentence is not None:
        args.sentence = in_words(args.sentence)
    if args.like:
        next(decoding.stream_audio(args.like))
    if (args.queries is None) != (args.submission is None):
        parser.error("--queries and --submission go together")
    if args.submission:
        check_output_file(args.submission)
        args.queries = queries_of(args.queries)
    return args


def queries_of(table: Path) -> list[str]:
    """Read the queries of a submission; an InputError if one holds no word."""
    queries = [row["caption"] for row in read_csv(table, ["caption"])]
    for query in queries:
        try:
            in_words(query)
        except InputError as error:
            raise InputError(f"{table}: {error}") from error
    return queries


def typed_sentences() -> Iterator[str]:
    """Yield the lines of standard input, with a prompt and a history if a person types them."""
    sys.stdin.reconfigure(errors="replace")  # Bytes that are not UTF-8 should not end it.
    prompt = ""
    if sys.stdin.isatty():
        print("Type a sentence, then another; Ctrl-D ends it.", file=sys.stderr)
        if sys.stdout.isatty():
            with contextlib.suppress(ImportError):  # Some builds of Python lack it.
                importlib.import_module("readline")  # input() then edits lines and keeps them.
            prompt = "> "
    while True:
        try:
            sentence = input(prompt)
        except EOFError:
            break
        yield sentence


def show(query: str, matches: list[Match], root: Path, as_json: bool) -> None:
    if as_json:
        objects = [match._asdict() | {"path": str(match.path)} for match in matches]
        print(json.dumps({"query": query, "matches": objects}), flush=True)
        return
    print(f"{'':4} {'score':>6}  {'above':>6}  {'where':>18}  file")
    for rank, match in enumerate(matches, start=1):
        name = printable(os.path.relpath(match.path, root))
        print(f"{rank:3}. {match.score:6.3f}  {match.above:6.1%}  {match.where():>18}  {name}")


def missing_by_folder(index: SoundIndex) -> dict[str, int]:
    """Count the files that are not there now, by the topmost folder of which nothing is there.

    Returns:
        {folder, or the file itself if all of its folders are there: number of missing files}.
    """
    folders_there = set()
    for name in [*index.names, *index.faults]:
        folders_there.update(map(str, Path(name).parents))
    missing = collections.Counter()
    for name in index.missing:
        folders_gone = [
            folder for folder in map(str, Path(name).parents) if folder not in folders_there
        ]
        if folders_gone:
            missing[folders_gone[-1] + os.sep] += 1  # The last one is the topmost.
        else:
            missing[name] += 1
    return missing


def describe(index: SoundIndex, folder: Path, pruned: bool) -> str:
    """Return a line that says what is searched, and what is not."""
    facts = [counted(len(index.names), "file")]
    if index.faults:
        facts.append(f"{len(index.faults):,} could not be read, or not to the end (--list-faults)")
    if index.missing and pruned:
        facts.append(f"{counted(len(index.missing), 'file')} not there, dropped from the index")
    elif index.missing:
        facts.append(f"{counted(len(index.missing), 'file')} not there now, kept in the index "
                     "(--prune drops them)")
    skipped = []
    if count := index.skipped["files of other kinds"]:
        skipped.append(f"{counted(count, 'file')} of other kinds")
    if count := index.skipped["folders that may not be entered"]:
        skipped.append(f"{counted(count, 'folder')} that may not be entered")
    if skipped:
        facts.append(f"passed over: {', '.join(skipped)}")
    facts.append(f"index in {folder}")
    return "; ".join(facts)


def main() -> None:
    args = parse_arguments()
    server = None
    if args.serve:
        # The port is taken before the long work, since another program may hold it.
        server = page.search_server(args.port)

    # --- The model ---
    device = choose_device(args.device)
    checkpoint = checkpoint_file(args.checkpoint or newest_checkpoint())
    model = DualEncoder.load(checkpoint, device, args.tokenizer)
    model.precision = choose_precision(args.precision, device)

    # --- The sounds ---
    folder = args.index or args.audio / INDEX_NAME
    index = SoundIndex.build(model, args.audio, folder, args.prune)
    print(describe(index, folder, args.prune), file=sys.stderr)

    # --- The answers ---
    if args.list_faults:
        for name, fault in index.faults.items():
            print(printable(f"{name}: {fault}"))
        for name, files in missing_by_folder(index).items():
            print(printable(f"{name}: is not there now ({counted(files, 'file')})"))
    elif args.submission:
        write_submission(args.submission, args.queries, index)
    elif args.serve:
        page.serve(server, index, args.top, args.by)
    elif args.like:
        matches = index.search_like(args.like, args.top, args.by)
        show(str(args.like), matches, index.root, args.json)
    elif args.sentence:
        show(args.sentence, index.search(args.sentence, args.top, args.by), index.root, args.json)
    else:
        for sentence in typed_sentences():
            try:
                matches = index.search(sentence, args.top, args.by)
                show(sentence.strip(), matches, index.root, args.json)
            except InputError as error:
                print(error, file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
