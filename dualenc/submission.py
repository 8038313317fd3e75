"""Similarities -> the challenge's csv files, read back and checked before they take their place.

DCASE 2025: a row per query, a column per sound file, in each cell their similarity. Earlier years:
a row per query with the names of the ten best. Names and queries are kept byte for byte.

Shapes: Q queries, N clips.
"""

import argparse
import csv
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dualenc import InputError, replacing
from dualenc.csvfiles import read_csv
from dualenc.decoding import AUDIO_SUFFIXES
from dualenc.layouts import Clip, Split, read_split
from dualenc.options import Parser, number

# What is not valid UTF-8 in a file's name comes from the disk, and goes back, as the same bytes.
CSV = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


def add_challenge_options(parser: Parser) -> None:
    group = parser.add_argument_group("the challenge's files")
    group.add_argument("--submission", type=Path, metavar="CSV", help="write similarities here")
    group.add_argument(
        "--queries", type=Path, metavar="CSV", help="with a column caption; default: the split's"
    )
    group.add_argument(
        "--audio", type=Path, metavar="FOLDER", help="the clips to rank; default: the split's"
    )
    group.add_argument(
        "--top", type=number(int, 1), metavar="K", help="write the K best names, as before 2025"
    )


def what_is_ranked(args: argparse.Namespace) -> tuple[Split, list[str] | None]:
    """The clips, and the queries where they are not the clips' own captions.

    Raises:
        InputError: the clips or the queries cannot be read, or options contradict each other.
    """
    if (args.queries or args.audio or args.top) and not args.submission:
        raise InputError("--queries, --audio and --top go with --submission")
    if args.submission and (args.compare or args.seeds):
        raise InputError("--submission takes one --checkpoint, or an --ensemble")
    if args.audio and not args.queries:
        raise InputError("--audio needs --queries: what is asked of these clips")
    if args.audio:
        split = sounds_in(args.audio)
    else:
        split = read_split(args.dataset, args.split, args.data_dir)
    if args.top and args.top > len(split.clips):
        raise InputError(f"--top {args.top}: there are only {len(split.clips)} clips")
    if not args.queries:
        return split, None
    clips = [dataclasses.replace(clip, captions=()) for clip in split.clips]
    queries = [caption for (caption,) in read_csv(args.queries, ["caption"])]
    return dataclasses.replace(split, clips=clips), queries


def sounds_in(folder: Path) -> Split:
    """The sound files directly in a folder, in the order of their names, without captions."""
    if not folder.is_dir():
        raise InputError(f"--audio {folder}: no such folder")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in AUDIO_SUFFIXES)
    if not paths:
        raise InputError(f"--audio {folder}: holds no sound file")
    clips = [Clip(path.name, path, ()) for path in paths]
    return Split(str(folder.resolve()), clips, [], "folder")


def write_submission(
    path: Path,
    queries: Sequence[str],
    names: Sequence[str],
    audio: Tensor,
    text: Tensor,
    top: int | None = None,
) -> str:
    """Write one of the two forms; return a line that says what was written.

    Args:
        queries: Q of them; one that stands there several times is written once.
        names: of the N clips.
        audio, text: (N, D), (Q, D).
        top: write the so many best names instead of all similarities.

    Raises:
        InputError: the file cannot be written, or does not read back as what it should be.
    """
    first_rows: dict[str, int] = {}
    for row, query in enumerate(queries):
        first_rows.setdefault(query, row)
    similarity = text[list(first_rows.values())] @ audio.T
    if not similarity.isfinite().all() or len(set(names)) < len(names):
        raise InputError(f"{path}: not written: two clips share a name, or a number is not finite")
    if top:
        header, rows = top_rows(list(first_rows), names, similarity, top)
    else:
        header, rows = similarity_rows(list(first_rows), names, similarity)
    write_checked(path, [header, *rows])
    repeated = len(queries) - len(first_rows)
    return (
        f"submission  {path}: {len(first_rows):,} queries, {len(names):,} clips; read back: every "
        "query and clip once, all numbers finite"
        + (f"; {repeated:,} repeated queries left out" if repeated else "")
    )


def write_checked(path: Path, lines: list[list[str]]) -> None:
    """Write a csv file and read it back before it takes its place."""
    with replacing(path) as temporary:
        with open(temporary, "w", **CSV) as file:
            csv.writer(file, lineterminator="\n").writerows(lines)
        with open(temporary, **CSV) as file:
            pairs = itertools.zip_longest(csv.reader(file), lines)
            if not all(read == written for read, written in pairs):
                raise InputError(f"{path}: does not read back as it was written; nothing is kept")


def similarity_rows(
    queries: Sequence[str], names: Sequence[str], similarity: Tensor
) -> tuple[list[str], list[list[str]]]:
    """DCASE 2025: header and rows of `index` and a column per file; similarity is (Q, N)."""
    # Nine digits tell any two float32 values apart.
    cells = [[f"{value:.9g}" for value in values] for values in similarity.tolist()]
    rows = [[query, *row] for query, row in zip(queries, cells, strict=True)]
    return ["index", *names], rows


def top_rows(
    queries: Sequence[str], names: Sequence[str], similarity: Tensor, k: int
) -> tuple[list[str], list[list[str]]]:
    """Earlier years: header and rows of `caption` and the k best names; the earlier of equals."""
    best = similarity.argsort(dim=1, descending=True, stable=True)[:, :k].tolist()
    rows = [[q, *(names[i] for i in row)] for q, row in zip(queries, best, strict=True)]
    return ["caption", *(f"fname_{i}" for i in range(1, k + 1))], rows
