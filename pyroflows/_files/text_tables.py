"""What a table in a text says without saying it: its separator, its names, its missing cells."""

from __future__ import annotations

import csv
import math
from itertools import islice
from typing import IO

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
SAMPLE_LINES = 20  # lines that show the separator, and whether the first has names


def number(cell: str) -> float | None:
    """A cell's number, NaN if it is missing, None if it is a word."""
    cell = cell.strip()
    if cell.lower() in MISSING:
        return float("nan")
    try:
        return None if "_" in cell else float(cell)  # Python alone reads 1_000 as a number
    except ValueError:
        return None


def separator_of(file: IO[str]) -> str:
    """The first of tab, semicolon and comma to cut the first lines into equally many cells.

    In that order, since a comma may also be what a number has before its decimals.
    """
    for separator in "\t;,":
        file.seek(0)
        try:
            lines = filter(None, csv.reader(file, delimiter=separator))
            widths = {len(cells) for cells in islice(lines, SAMPLE_LINES)}
        except csv.Error:  # such as a cell that is too long, as it is no cell
            continue
        if len(widths) == 1 and widths != {1}:
            return separator
    file.seek(0)
    first = next((line for line in file if line.strip()), "")
    return max(",;\t", key=first.count)


def is_header(cells: list[str], below: list[list[str]]) -> bool:
    """Whether no cell is a number, or a word stands above numbers alone.

    In a row without names a cell of words has words below it too. A mark without a letter, such as
    a dash, is no name beside numbers; nor are digits with marks, such as 1,5, above more of them.
    """
    kinds = [number(cell) for cell in cells]
    words = [
        (any(map(str.isalpha, cell)), any(map(str.isdigit, cell)), _above_numbers(i, below))
        for i, (cell, kind) in enumerate(zip(cells, kinds, strict=True))
        if kind is None
    ]
    if any(kind is not None and not math.isnan(kind) for kind in kinds):
        return any(letters and above for letters, _, above in words)
    return any(letters or above or not digits for letters, digits, above in words)


def _above_numbers(place: int, below: list[list[str]]) -> bool:
    kinds = [number(cells[place]) for cells in below if place < len(cells)]
    numbers = [kind for kind in kinds if kind is not None]
    return len(numbers) == len(kinds) and not all(map(math.isnan, numbers))
