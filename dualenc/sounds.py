"""Sound files below a folder, of any length -> embeddings of each file and of its 10 s segments.

Here is what concerns files: finding them, their stamps, embedding them; index.py keeps and searches
what comes of it.

Shapes: s segments of one file, D embedding values.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dualenc import InputError
from dualenc.audio import MIN_REMAINDER, SEGMENT_SAMPLES, cut
from dualenc.decoding import AUDIO_SUFFIXES, decode_blocks, to_int16
from dualenc.model import DualEncoder

CHUNK_FILES = 64  # embedded together, so that short files share the model's batches


class Embedded(NamedTuple):
    """What the model makes of one file: (D,) and (s, D) float32 of unit norm.

    The embedding is the mean over all segments, as in training but beyond 30 s, too.
    """

    samples: int  # at 32 kHz, as far as segments reach
    embedding: np.ndarray
    segments: np.ndarray


def sounds_below(folder: Path) -> tuple[list[Path], Counter[str], list[str]]:
    """All sound files below a folder, but for hidden ones (".name").

    Returns:
        the files in order; other files counted by suffix; folders that could not be listed.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of sounds")
    found, others, faults = [], Counter(), []

    def note(error: OSError) -> None:
        faults.append(f"{error.filename}: {error.strerror}")

    for place, folders, names in os.walk(folder, onerror=note):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(place, name)
            if path.suffix.lower() in AUDIO_SUFFIXES:
                found.append(path)
            else:
                others[path.suffix.lower() or "no suffix"] += 1
    return found, others, faults


def file_stamp(path: Path) -> tuple[int, int]:
    """What tells whether a file has changed: bytes, and nanoseconds of its last modification.

    Raises:
        InputError: there is no such file; opening a pipe or device would wait for ever.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: is not a file")
    return found.st_size, found.st_mtime_ns


def file_stamps(
    paths: Iterable[str | os.PathLike], root: Path
) -> tuple[dict[bytes, tuple[int, int]], list[str]]:
    """The stamp of each file by its name relative to root, and which files are none.

    Raises:
        InputError: a path lies outside of root.
    """
    stamps, faults = {}, []
    for path in paths:
        name = os.path.relpath(path, root)
        if name.startswith(os.pardir + os.sep):
            raise InputError(f"{path}: lies outside of the index's folder {root}")
        try:
            if Path(name).suffix.lower() not in AUDIO_SUFFIXES:
                raise InputError(f"{path}: has no sound file's ending")
            stamps[os.fsencode(name)] = file_stamp(Path(path))
        except InputError as error:
            faults.append(str(error))
    return stamps, faults


def begins(path: Path) -> bool:
    """Whether a sound file can be decoded at least at its start."""
    try:
        return bool(len(next(decode_blocks(path))))
    except InputError:
        return False


def embed_file(model: DualEncoder, path: str | os.PathLike) -> Tensor:
    """Embed one file: (1, D) of unit norm, a query for files that sound like it.

    Raises:
        InputError: it cannot be read.
    """
    (found,) = embed_files(model, [Path(path)])
    if isinstance(found, InputError):
        raise found
    return torch.from_numpy(found.embedding)[None]


def embed_files(model: DualEncoder, paths: Iterable[Path]) -> Iterator[Embedded | InputError]:
    """Embed files one after the other, streamed: for each what came of it, or why nothing did.

    A progress bar around the paths moves as they are read.
    """
    paths = iter(paths)
    while True:
        read: list[tuple[int, int, InputError | None]] = []  # samples, segments, fault of each
        chunk = itertools.islice(paths, CHUNK_FILES)
        vectors = model.embed_segments(_segments(chunk, read))
        if not read:
            return
        parts = vectors.split([count for _, count, _ in read])
        for (samples, _, fault), own in zip(read, parts, strict=True):
            yield fault or Embedded(
                samples,
                F.normalize(own.mean(dim=0), dim=0).numpy(),
                F.normalize(own, dim=1).numpy(),
            )


def _segments(paths: Iterable[Path], read: list) -> Iterator[np.ndarray]:
    """The segments of all files by blocks: (at most 3, 320000) int16; each file is noted in read"""
    for path in paths:
        samples, count, fault = 0, 0, None
        try:
            file_stamp(path)
            for block in decode_blocks(path):
                if samples and len(block) < MIN_REMAINDER:
                    break  # a remainder that does not count, as in audio.segment_count
                segments = cut(to_int16(block))
                samples += len(block)
                count += len(segments)
                yield segments
        except InputError as error:
            fault = error
        read.append((min(samples, count * SEGMENT_SAMPLES), count, fault))


def fingerprint(model: DualEncoder) -> str:
    """Of all that decides an embedding: sizes, tokenizer and weights.

    Of every weight tensor some thousand values count: training changes all tensors, and to hash the
    report's model whole would take longer than to open an index of a million files.
    """
    config = dataclasses.asdict(model.config)
    digest = hashlib.sha256(json.dumps([config, model.tokenizer.to_str()]).encode())
    for name, value in model.state_dict().items():
        spread = value.flatten()[:: max(1, value.numel() // 1000)].cpu()
        digest.update(name.encode())
        digest.update(spread.contiguous().numpy())
    return digest.hexdigest()
