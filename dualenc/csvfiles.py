"""Csv files with named columns, whose faults are named by line.

A file of its own, since splits, annotations and queries are all read with it.
"""

import csv
import string
from collections.abc import Sequence
from pathlib import Path

from dualenc import InputError

BLANK = string.whitespace + string.punctuation  # nothing of it is left of a normalised caption


def read_header(table: Path) -> list[str]:
    """The names in a csv file's first line."""
    return _read_rows(table)[0]


def read_csv(table: Path, columns: Sequence[str]) -> list[list[str]]:
    """The named columns of a csv file, row by row; other columns are passed over.

    Raises:
        InputError: the file is not UTF-8, lacks a column, or rows are short, hold empty values, or
            captions of which nothing is left when they are normalised.
    """
    header, rows = _read_rows(table)
    wrong = [name for name in columns if header.count(name) != 1]
    if wrong:
        raise InputError(
            f"{table}: needs the column {wrong[0]!r} once; its first line is {','.join(header)!r}"
        )
    if not rows:
        raise InputError(f"{table}: holds no rows")
    places = [(header.index(name), BLANK if "caption" in name else None) for name in columns]
    faults = [
        f"line {line} has no word in {columns[i]}" if len(row) == len(header)
        else f"line {line} has {len(row)} fields instead of {len(header)}"
        for line, row in rows
        for i in [_first_empty(row, places, len(header))]
        if i is not None
    ]
    if faults:
        raise InputError.of(str(table), faults)
    return [[row[place] for place, _ in places] for _, row in rows]


def _read_rows(table: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """A csv file's header, and its rows with the number of the line that each ends in."""
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)  # else an open quote swallows what follows
            header = next(reader, [])
            return header, [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read as a UTF-8 csv file ({error})") from error


def _first_empty(
    row: list[str], places: list[tuple[int, str | None]], width: int
) -> int | None:
    """The first wanted column in which nothing but blanks stands in this row, if any."""
    if len(row) != width:
        return 0
    return next((i for i, (at, blank) in enumerate(places) if not row[at].strip(blank)), None)
