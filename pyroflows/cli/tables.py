"""Tables in files: CSV (also gzipped), NumPy's .npy, Parquet where pyarrow is installed."""

from __future__ import annotations

import csv
import gzip
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

from pyroflows._files.text_tables import SAMPLE_LINES, is_header, number, separator_of

BINARY = (".npy", ".parquet")
KINDS = (".csv", ".tsv", ".txt", *BINARY)


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
def csv_lines(path: Path) -> Iterator[Any]:
    """A ``csv.reader`` of a file, whose separator it sees: comma, semicolon or tab."""
    try:
        with _open_text(path) as file:
            separator = separator_of(file)
            file.seek(0)
            yield csv.reader(file, delimiter=separator)
    except UnicodeError:
        raise ValueError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}: is not a CSV ({error})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: is not a gzip file, or cut short ({error})") from None


def _open_text(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _read_csv(path: Path, header: bool | None) -> Table:
    numbers = array("d")
    names: list[str] = []
    words: dict[str, tuple[int, str]] = {}
    with csv_lines(path) as lines:
        numbered = ((lines.line_num, cells) for cells in lines if cells)
        first = list(islice(numbered, SAMPLE_LINES))
        if header is None and first:
            header = is_header(first[0][1], [cells for _, cells in first[1:]])
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
                    count, where = words.get(name, (0, f"{_short(cell)} in line {line}"))
                    words[name] = count + 1, where
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
    except (pyarrow.ArrowException, OSError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{path}: is not a Parquet file, or damaged ({why})") from None
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
    if path is not None and kind_of(path) in BINARY:
        values = np.concatenate(list(batches))
        if kind_of(path) == ".npy":
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
