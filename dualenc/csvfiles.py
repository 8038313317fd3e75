"""Csv files with named columns, whose faults are named by line.

A file of its own, since splits, annotations and queries are all read with it.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

from dualenc import InputError


def read_header(table: Path) -> list[str]:
    """The names in a csv file's first line."""
    with open(table, encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file), [])


def read_csv(table: Path, columns: Sequence[str]) -> list[list[str]]:
    """The named columns of a csv file, row by row; other columns are passed over.

    Raises:
        InputError: the file is not UTF-8, lacks a column, or rows are short or hold empty values.
    """
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read as a UTF-8 csv file ({error})") from error
    wrong = [name for name in columns if header.count(name) != 1]
    if wrong:
        raise InputError(
            f"{table}: needs the column {wrong[0]!r} once; its first line is {','.join(header)!r}"
        )
    if not rows:
        raise InputError(f"{table}: holds no rows")
    places = [header.index(name) for name in columns]
    faults = [
        f"line {line} has an empty {columns[i]}" if len(row) == len(header)
        else f"line {line} has {len(row)} fields instead of {len(header)}"
        for line, row in rows
        for i in [_first_empty(row, places, len(header))]
        if i is not None
    ]
    if faults:
        raise InputError.of(str(table), faults)
    return [[row[place] for place in places] for _, row in rows]


def _first_empty(row: list[str], places: list[int], width: int) -> int | None:
    """The first wanted column without a value in this row, if any."""
    if len(row) != width:
        return 0
    return next((i for i, place in enumerate(places) if not row[place].strip()), None)
