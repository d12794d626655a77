"""Tables in files: CSV (also gzipped), NumPy's .npy, Parquet where pyarrow is installed."""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
BINARY = (".npy", ".parquet")
KINDS = (".csv", ".tsv", ".txt", *BINARY)
LOOKED_AT = 20  # lines that show the separator, and whether the first has names


@dataclass
class Table:
    """Numbers in named columns.

    Attributes:
        names: of the columns; ``column_1``, ... where the file names none.
        values: ``(rows, columns)`` in double precision, NaN where there is no number.
        header: whether the file names its columns.
        words: for columns with cells that are no numbers: how many, and where the first is.
    """

    names: list[str]
    values: np.ndarray
    header: bool
    words: dict[str, tuple[int, str]] = field(default_factory=dict)


def kind_of(path: Path) -> str:
    """The suffix that says how to read or write a file; of text also one before ``.gz``.

    Raises:
        ValueError: another suffix.
    """
    zipped = path.suffix.lower() == ".gz"
    kind = (path.with_suffix("") if zipped else path).suffix.lower()
    if kind not in KINDS or (zipped and kind in BINARY):
        raise ValueError(f"{path}: expected a file named {', '.join(KINDS)} (or .csv.gz)")
    return kind


def read_table(path: Path, header: bool | None = None) -> Table:
    """All columns of a file.

    Args:
        path: of the file.
        header: whether the first line of a CSV names the columns; None to see: it does where none
            of its cells is a number, or where a word stands above numbers.

    Raises:
        ValueError: no file, an unknown kind, no rows, lines of different lengths, not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    kind = kind_of(path)
    if kind == ".npy":
        table = _read_npy(path)
    elif kind == ".parquet":
        table = _read_parquet(path)
    else:
        table = _read_csv(path, header)
    if len(table.values) == 0:
        raise ValueError(f"{path}: expected rows of numbers, found none")
    name, times = Counter(table.names).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{path}: two columns are named {name!r}; rename one")
    return table


@contextmanager
def csv_lines(path: Path) -> Iterator[Iterator[list[str]]]:
    """The lines of a CSV as cells, cut at its separator: comma, semicolon or tab."""
    try:
        with _open_text(path) as file:
            separator = _separator(file)
            file.seek(0)
            yield csv.reader(file, delimiter=separator)
    except UnicodeError:
        raise ValueError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}: is not a CSV ({error})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: is not a gzip file, or cut short ({error})") from None


def _separator(file: IO[str]) -> str:
    """The first of tab, semicolon and comma to cut the first lines into equally many cells.

    In that order, since a comma may also be what a number has before its decimals.
    """
    for separator in "\t;,":
        file.seek(0)
        try:
            lines = filter(None, csv.reader(file, delimiter=separator))
            widths = {len(cells) for cells in islice(lines, LOOKED_AT)}
        except csv.Error:  # such as a cell that is too long, as it is no cell
            continue
        if len(widths) == 1 and widths != {1}:
            return separator
    file.seek(0)
    first = next((line for line in file if line.strip()), "")
    return max(",;\t", key=first.count)


def _open_text(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def number(cell: str) -> float | None:
    """A cell's number, NaN if it is missing, None if it is a word."""
    cell = cell.strip()
    if cell.lower() in MISSING:
        return float("nan")
    try:
        return None if "_" in cell else float(cell)  # Python alone reads 1_000 as a number
    except ValueError:
        return None


def _is_header(cells: list[str], below: list[list[str]]) -> bool:
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
    return None not in kinds and not all(math.isnan(kind) for kind in kinds)


def _read_csv(path: Path, header: bool | None) -> Table:
    numbers, names, words = array("d"), [], {}
    with csv_lines(path) as lines:
        numbered = ((lines.line_num, cells) for cells in lines if cells)
        first = list(islice(numbered, LOOKED_AT))
        if header is None and first:
            header = _is_header(first[0][1], [cells for _, cells in first[1:]])
        for line, cells in chain(first, numbered):
            if not names:
                names = [f"column_{i + 1}" for i in range(len(cells))]
                if header:
                    stripped = (" ".join(cell.split()) for cell in cells)
                    names = [c or name for c, name in zip(stripped, names, strict=True)]
                    continue
            if len(cells) != len(names):
                raise ValueError(
                    f"{path}: line {line} has {len(cells)} cells, the first one {len(names)}"
                )
            for name, cell in zip(names, cells, strict=True):
                value = number(cell)
                if value is None:
                    count, first = words.get(name, (0, f"{_short(cell)} in line {line}"))
                    words[name] = count + 1, first
                    value = float("nan")
                numbers.append(value)
    values = np.frombuffer(numbers, dtype=np.float64).reshape(-1, max(len(names), 1))
    return Table(names, values, bool(header), words)


def _short(cell: str) -> str:
    return repr(cell if len(cell) <= 30 else cell[:27] + "...")


def _read_npy(path: Path) -> Table:
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{path}: is not an array of numbers in NumPy's format ({error})"
        ) from None
    if values.dtype.names:
        names = list(values.dtype.names)
        columns = [values[name] for name in names]
        if any(column.dtype.kind not in "fiub" or column.ndim != 1 for column in columns):
            raise ValueError(f"{path}: expected columns of real numbers, got {values.dtype}")
        return Table(names, np.stack([c.astype(np.float64) for c in columns], axis=1), True)
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{path}: expected real numbers, got an array of {values.dtype}")
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"{path}: expected shape (rows, columns), got {values.shape}")
    names = [f"column_{i + 1}" for i in range(values.shape[1])]
    return Table(names, values.astype(np.float64), False)


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            "Parquet needs pyarrow, which is not installed; run: pip install "
            "'pyroflows[parquet]', or save the table as CSV"
        ) from None
    return pyarrow


def _read_parquet(path: Path) -> Table:
    pyarrow = _pyarrow()
    try:
        read = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: is not a Parquet file ({error})") from None
    columns, words = [], {}
    for name, column in zip(read.column_names, read.columns, strict=True):
        kind = column.type
        if not (
            pyarrow.types.is_floating(kind)
            or pyarrow.types.is_integer(kind)
            or pyarrow.types.is_boolean(kind)
        ):
            words[name] = read.num_rows, f"a column of {kind}"
            columns.append(np.full(read.num_rows, np.nan))
        else:
            columns.append(np.asarray(column.to_pandas(), dtype=np.float64))
    values = np.stack(columns, axis=1) if columns else np.zeros((0, 1))
    return Table(list(read.column_names), values, True, words)


def write_table(
    path: Path | None, names: Sequence[str], batches: Iterable[np.ndarray], header: bool = True
) -> None:
    """Rows to a file, or to stdout as CSV, batch by batch.

    Args:
        path: None for stdout.
        names: of the columns.
        batches: each ``(rows, columns)``, of one dtype.
        header: whether a CSV's first line has the names.
    """
    kind = ".csv" if path is None else kind_of(path)
    if kind in BINARY:
        values = np.concatenate(list(batches))
        if kind == ".npy":
            with open(path, "wb") as file:  # given a name, NumPy may write to another
                np.save(file, values)
            return
        pyarrow = _pyarrow()
        columns = {name: values[:, i] for i, name in enumerate(names)}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return
    with csv_writer(path) as writer:
        if header:
            writer.writerow(names)
        for batch in batches:
            writer.writerows(map(texts, batch))


def texts(row: np.ndarray) -> list[str]:
    """Numbers with as few digits as give the very same number again."""
    if row.dtype == np.float32:
        return [f"{value:.9g}" for value in row.tolist()]
    return [repr(value) for value in row.tolist()]


@contextmanager
def csv_writer(path: Path | None, separator: str = ",") -> Iterator[Any]:
    """A writer to a file (gzipped if it is named so) or to stdout."""
    import sys

    if path is None:
        yield csv.writer(sys.stdout, delimiter=separator, lineterminator="\n")
        return
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    separator = "\t" if kind_of(path) == ".tsv" else separator
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        yield csv.writer(file, delimiter=separator, lineterminator="\n")
