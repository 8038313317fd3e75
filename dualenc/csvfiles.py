"""Csv files with named columns, whose faults are named by line.

A file of its own, since splits, annotations and queries are all read with it.
"""

import csv
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

from dualenc import InputError

BLANK = string.whitespace + string.punctuation  # nothing of it is left of a normalised caption
WRONG_ROWS = "rows to be mended or removed"


def read_header(table: Path) -> list[str]:
    """The names in a csv file's first line."""
    return next(_rows(table), (1, []))[1]


def read_csv(table: Path, columns: Sequence[str]) -> list[list[str]]:
    """The named columns of a csv file, row by row; other columns are passed over.

    Raises:
        InputError: the file is not UTF-8, lacks a column, or rows are short, hold empty values, or
            captions of which nothing is left when they are normalised.
    """
    numbered = _rows(table)
    _, header = next(numbered, (1, []))
    rows = [(line, row) for line, row in numbered if row]
    wrong = [name for name in columns if header.count(name) != 1]
    if wrong:
        raise InputError(
            f"{table}: needs the column {wrong[0]!r} once; its first line is {','.join(header)!r}"
        )
    if not rows:
        raise InputError(f"{table}: holds no rows; write some below its first line")
    places = [(header.index(name), BLANK if "caption" in name else None) for name in columns]
    faults = [
        f"line {line} has no word in {columns[i]}" if len(row) == len(header)
        else f"line {line} has {len(row)} fields instead of {len(header)}"
        for line, row in rows
        for i in [_first_empty(row, places, len(header))]
        if i is not None
    ]
    if faults:
        raise InputError.of(f"{table}: {WRONG_ROWS}", faults)
    return [[row[place] for place, _ in places] for _, row in rows]


def _rows(table: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv file, its header first, each with the number of the line that it ends in.

    Raises:
        InputError: names the line that is not UTF-8, or in which a row begins that is not csv.
    """
    line = 0
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)  # else an open quote swallows what follows
            for row in reader:
                line = reader.line_num
                yield line, row
    except OSError as error:
        raise InputError(f"{table}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = _first_not_utf8(table)
        raise InputError(f"{table}: line {line} is not UTF-8; save the file as UTF-8") from error
    except csv.Error as error:
        raise InputError(
            f"{table}: line {line + 1} cannot be read as csv ({error}); a quote that opens must "
            "close, and a quote within quotes is doubled"
        ) from error


def _first_not_utf8(table: Path) -> int:
    with open(table, "rb") as file:
        return next(i for i, s in enumerate(file, 1) if s.decode(errors="ignore").encode() != s)


def _first_empty(
    row: list[str], places: list[tuple[int, str | None]], width: int
) -> int | None:
    """The first wanted column in which nothing but blanks stands in this row, if any."""
    if len(row) != width:
        return 0
    return next((i for i, (at, blank) in enumerate(places) if not row[at].strip(blank)), None)
