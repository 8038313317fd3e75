"""Sound files, embedded once -> an index on disk -> exact search in it.

    index = SoundIndex.build(model, paths)
    index.search("a dog barks, then a car passes", k=10)

Finding, stamping and embedding the files themselves is in sounds.py; arrays.py writes and reads.
Shapes: N files, S segments of all files together, D embedding values, Q queries.

On disk an index is a folder of four arrays (see arrays.py) and says which checkpoint made it:

    embeddings   (N, D) float32, unit norm
    segments     (S, D) float32, unit norm
    files        (N,) records: size, modification time, samples; where its name and segments end
    names        all names joined, as bytes, since a name need not be valid UTF-8
"""

import dataclasses
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dualenc import InputError
from dualenc.arrays import make_writable, read_arrays, write_arrays
from dualenc.audio import SAMPLE_RATE, SEGMENT_SAMPLES
from dualenc.decoding import AUDIO_SUFFIXES
from dualenc.model import DualEncoder
from dualenc.sounds import (
    Embedded,
    begins,
    embed_file,
    embed_files,
    file_stamps,
    fingerprint,
)

FORMAT = "dualenc index 1"
ARRAYS = ("embeddings", "segments", "files", "names")
FILE_RECORD = np.dtype(
    [(name, "<i8") for name in ("size", "modified", "samples", "name_end", "segment_end")]
)
SAVE_SECONDS = 60  # of work that a crash may cost
QUERY_BLOCK = 64  # queries at a time: their scores over a million files take 256 MB

Stamp = tuple[int, int]  # a file's size in bytes and modification time in ns
Row = tuple[bytes, Stamp, Embedded]  # one file's name, stamp, and vectors


@dataclasses.dataclass(frozen=True)
class Match:
    """One file found.

    Attributes:
        number: the file's row in the index.
        path: where it lies.
        score: its cosine with the query, or its best segment's.
        above: the share of the index, from 0 to 1, that scores lower.
        start, end: the 10 s segment that matches best, in seconds.
    """

    number: int
    path: Path
    score: float
    above: float
    start: float
    end: float


class SoundIndex:
    """Embedded sound files, and exact search in them.

    Attributes:
        model: embeds the queries; the same that embedded the files.
        root: the folder that the files' names are relative to.
        embeddings: (N, D) float32, unit norm.
        segments: (S, D) float32, unit norm.
        files: (N,) FILE_RECORD.
        names: (bytes,) uint8, all names joined.
        faults: files that could not be read when the index was last brought up to date.
    """

    def __init__(self, model: DualEncoder, root: str | os.PathLike, rows: Sequence[Row] = ()):
        self.model, self.root = model, Path(os.path.abspath(root))
        self.faults: list[str] = []
        names, stamps, sounds = zip(*rows, strict=True) if rows else ((), (), ())
        nothing = np.zeros((0, model.config.embedding), np.float32)
        self.embeddings = np.stack([sound.embedding for sound in sounds]) if rows else nothing
        self.segments = np.concatenate([nothing, *(sound.segments for sound in sounds)])
        self.names = np.frombuffer(b"".join(names), np.uint8)
        self.files = np.zeros(len(rows), FILE_RECORD)
        self.files["size"] = [size for size, _ in stamps]
        self.files["modified"] = [modified for _, modified in stamps]
        self.files["samples"] = [sound.samples for sound in sounds]
        self.files["name_end"] = np.cumsum([len(name) for name in names])
        self.files["segment_end"] = np.cumsum([len(sound.segments) for sound in sounds])

    def __len__(self) -> int:
        return len(self.files)

    def path(self, number: int) -> Path:
        """Where a file lies: always a sound file below the root, whoever wrote the index."""
        name = Path(os.fsdecode(self._name(number)))
        if name.suffix.lower() not in AUDIO_SUFFIXES:
            raise InputError(f"{name}: the index names what is no sound file")
        if name.is_absolute() or ".." in name.parts:
            raise InputError(f"{name}: the index names a file outside of {self.root}")
        return self.root / name

    def _name(self, number: int) -> bytes:
        return bytes(self.names[self._span("name_end", number)])

    def _span(self, end: str, number: int) -> slice:
        start = self.files[end][number - 1] if number else 0
        return slice(int(start), int(self.files[end][number]))

    def _row(self, number: int) -> Row:
        size, modified, samples = self.files[number].item()[:3]
        segments = self.segments[self._span("segment_end", number)]
        sound = Embedded(samples, self.embeddings[number], segments)
        return self._name(number), (size, modified), sound

    # --- Building ---

    @classmethod
    def build(
        cls,
        model: DualEncoder,
        paths: Iterable[str | os.PathLike],
        root: str | os.PathLike | None = None,
    ) -> "SoundIndex":
        """Embed sound files; what cannot be read is left out and listed in `faults`.

        Args:
            root: a folder above all of them (default: the lowest there is).
        """
        paths = [Path(os.path.abspath(path)) for path in paths]
        if root is None and paths:
            root = os.path.commonpath([path.parent for path in paths])
        return cls(model, root or ".").updated(paths)

    def updated(
        self, paths: Iterable[str | os.PathLike], save_to: Path | None = None, label: str = ""
    ) -> "SoundIndex":
        """The index of just these files, of which only new and changed ones are embedded.

        Args:
            save_to: the index's folder; what is done is saved there every minute, and at the end.
            label: of a progress bar; there is none without.

        Raises:
            InputError: a path lies outside of root, or the folder cannot be written.
        """
        stamps, faults = file_stamps(paths, self.root)
        rows = {row[0]: row for row in map(self._row, range(len(self)))}
        rows = {name: row for name, row in rows.items() if stamps.get(name) == row[1]}
        kept, fresh = len(rows), [name for name in stamps if name not in rows]
        paths = [self.root / os.fsdecode(name) for name in fresh]
        if save_to is not None and any(map(begins, paths)):
            make_writable(save_to)
        due = time.monotonic() + SAVE_SECONDS
        bar = tqdm(paths, label, unit="file", leave=False, disable=None if label else True)
        for name, found in zip(fresh, embed_files(self.model, bar), strict=True):
            if isinstance(found, InputError):
                faults.append(str(found))
                continue
            rows[name] = name, stamps[name], found
            if save_to is not None and time.monotonic() > due:
                began = time.monotonic()
                self._with(rows).save(save_to)
                # A large index takes long to write: no more than a tenth of the time goes there.
                due = time.monotonic() + max(SAVE_SECONDS, 10 * (time.monotonic() - began))
        changed = not len(rows) == kept == len(self)
        index = self._with(rows) if changed else self
        if save_to is not None and changed and rows:
            index.save(save_to)
        index.faults = faults
        return index

    def _with(self, rows: dict[bytes, Row]) -> "SoundIndex":
        return SoundIndex(self.model, self.root, [rows[name] for name in sorted(rows)])

    # --- Saving and loading ---

    def save(self, folder: str | os.PathLike) -> None:
        header = {
            "format": FORMAT,
            "checkpoint": fingerprint(self.model),
            "root": os.path.relpath(self.root, folder),
        }
        write_arrays(Path(folder), header, {name: getattr(self, name) for name in ARRAYS})

    @classmethod
    def load(cls, folder: str | os.PathLike, model: DualEncoder) -> "SoundIndex":
        """Open an index, memory-mapped.

        Args:
            model: the one that made it.

        Raises:
            InputError: there is no index, it is damaged, or another checkpoint made it.
        """
        try:
            header, arrays = read_arrays(Path(folder), FORMAT, ARRAYS)
            index = cls(model, Path(folder, header["root"]))
            own = header["checkpoint"] == fingerprint(model)
            if own:
                index.embeddings, index.segments, index.files, index.names = arrays
                index._check()
        except FileNotFoundError as error:
            raise InputError(f"{error.filename}: not there, so {folder} holds no index") from error
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{folder}: is damaged or not an index ({error}); remove it to have it built anew"
            ) from error
        if not own:
            raise InputError(
                f"{folder}: another checkpoint made this index; give that one with --checkpoint, "
                "name another folder with --index, or remove this one to have it built anew"
            )
        return index

    def _check(self) -> None:
        """Raise ValueError where the arrays do not belong together."""
        ends = {"name_end": len(self.names), "segment_end": len(self.segments)}
        width = self.model.config.embedding
        if not (
            self.files.dtype == FILE_RECORD
            and len(self.files)
            and self.embeddings.shape == (len(self.files), width)
            and self.segments.shape[1:] == (width,)
            and self.embeddings.dtype == self.segments.dtype == np.float32
            and all((np.diff(self.files[end], prepend=0) > 0).all() for end in ends)
            and all(self.files[end][-1] == length for end, length in ends.items())
        ):
            raise ValueError("its arrays do not fit each other")

    # --- Searching ---

    def search(self, text: str, k: int = 10, by: str = "file") -> list[Match]:
        """The k files that match a sentence best, best first.

        Args:
            by: "file" scores a file by its embedding, "segment" by its best segment.
        """
        return self.nearest(self.model.embed_text([text]), k, by)[0]

    def search_like(self, path: str | os.PathLike, k: int = 10, by: str = "file") -> list[Match]:
        """The k files that sound most like one, which need not be of the index."""
        return self.nearest(embed_file(self.model, path), k, by)[0]

    def nearest(self, queries: Tensor, k: int = 10, by: str = "file") -> list[list[Match]]:
        """Exact search: for each of (Q, D) queries of unit norm its k best files, best first."""
        if not len(self):
            return [[] for _ in queries]
        found = []
        for block in queries.float().split(QUERY_BLOCK):
            scores = self._scores(block, by)
            best, numbers = scores.topk(min(k, len(self)))
            for i, query in enumerate(block):
                above = _share_below(scores[i], best[i])
                rows = zip(numbers[i].tolist(), best[i].tolist(), above.tolist(), strict=True)
                rows = sorted(rows, key=lambda row: (-row[1], row[0]))  # ties: lower index first
                found.append([self._match(query, *row) for row in rows])
        return found

    def _scores(self, queries: Tensor, by: str) -> Tensor:
        """(Q, D) -> (Q, N): each file's cosine, or that of its best segment."""
        if by == "file":
            return queries @ torch.from_numpy(self.embeddings).T
        if by != "segment":
            raise ValueError(f"by={by!r}: neither 'file' nor 'segment'")
        scores = queries @ torch.from_numpy(self.segments).T
        ends = self.files["segment_end"]
        starts = np.concatenate([[0], ends[:-1]])
        return torch.from_numpy(np.maximum.reduceat(scores.numpy(), starts, axis=1))

    def _match(self, query: Tensor, number: int, score: float, above: float) -> Match:
        segments = self.segments[self._span("segment_end", number)]
        start = int((segments @ query.numpy()).argmax()) * SEGMENT_SAMPLES
        end = min(start + SEGMENT_SAMPLES, int(self.files["samples"][number]))
        path = self.path(number)
        return Match(number, path, score, above, start / SAMPLE_RATE, end / SAMPLE_RATE)


def _share_below(scores: Tensor, best: Tensor) -> Tensor:
    """(N,) scores, of which (k,) best are the highest -> (k,) the share of all that is lower."""
    reached = (best[:, None] <= best).sum(dim=1)
    reached[best == best[-1]] = (scores >= best[-1]).sum()  # its ties may go on beyond the k best
    return (len(scores) - reached).double() / len(scores)
