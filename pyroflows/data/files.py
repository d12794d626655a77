"""Rows in files larger than memory, read block by block: ``.npy``, memory-mapped arrays, Parquet.

Memory stays below three buffers of 32 MiB (the one in use, the next as read and as mixed), 16 bytes
for each row of one, a batch, 65,536 rows held out for validation, and what the allocator keeps of
buffers before, whatever the size of the file: a process grows by 100 to 220 MiB. For Parquet a row
group, which is read as a whole, counts as a buffer where it is larger. Rows held out of a ``.npy``
are read one by one, once, a seek each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pyroflows.data.batches import Streamed
from pyroflows.data.checks import checked_rows
from pyroflows.data.fingerprint import facts_of_file
from pyroflows.data.rows import Batch, Rows, shuffled, validation_count
from pyroflows.distributions.flow import Flow

BUFFER = 32 * 2**20  # bytes
MOST_HELD_OUT = 65_536  # rows held out at most
_BLOCKS = 8  # in a buffer


class Table(Protocol):
    """A file of rows that can be read in part."""

    name: str
    shape: tuple[int, ...]
    columns: Sequence[str]
    blocks: list[tuple[int, int]]
    span: tuple[int, int | None]  # first byte and number of those that count; None for all

    def read(self, begin: int, stop: int) -> np.ndarray:
        """The rows of one of the blocks."""

    def take(self, index: np.ndarray) -> np.ndarray:
        """Some rows, in rising order."""


def is_table(x: Any) -> bool:
    """Whether these are rows in a file."""
    # A copy of a mapped array has no file, and what was written under mode "c" never reaches one.
    mapped = isinstance(x, np.memmap) and x.filename is not None and x.mode != "c"
    return mapped or isinstance(x, (str, Path))


def open_table(x: str | Path | np.memmap, name: str = "x") -> Table:
    """The table in a file.

    Args:
        x: a path to a ``.npy`` or ``.parquet`` file, or a memory-mapped array.
        name: what to call it in errors.

    Raises:
        ValueError: another kind of file, or an array whose rows do not lie one after another.
        ImportError: Parquet needs pyarrow.
        OSError: the file cannot be read.
    """
    if isinstance(x, np.memmap):
        return NpyTable(x)
    suffix = Path(x).suffix.lower()
    if suffix not in (".npy", ".parquet", ".pq"):
        advice = "; read it by pandas.read_csv, or use the command pyroflows fit"
        raise ValueError(
            f"{name}: expected a .npy or .parquet file, rows or a Dataset, got {str(x)!r}"
            f"{advice if suffix == '.csv' else ''}"
        )
    if not Path(x).is_file():
        raise FileNotFoundError(f"{name}: there is no file {str(x)!r}")
    return NpyTable(np.load(x, mmap_mode="r")) if suffix == ".npy" else ParquetTable(Path(x))


class NpyTable:
    """A memory-mapped array, read from its file by position, so that no page of it stays mapped."""

    def __init__(self, array: np.memmap) -> None:
        whole = array
        while isinstance(whole.base, np.memmap):
            whole = whole.base
        if array.ndim < 1 or not array.flags.c_contiguous:
            raise ValueError(
                "x: expected a memory-mapped array whose rows lie one after another, got strides "
                f"{array.strides}; save it anew with np.save"
            )
        self.name = str(array.filename)
        self.shape = array.shape
        self.columns: Sequence[str] = ()
        self.dtype = array.dtype
        address, start = (a.__array_interface__["data"][0] for a in (array, whole))
        self.offset = whole.offset + address - start
        self.row_bytes = array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=int))
        self.span: tuple[int, int | None] = self.offset, self.row_bytes * len(array)
        step = max(1, BUFFER // _BLOCKS // max(self.row_bytes, 1))
        self.blocks = [(b, min(b + step, len(array))) for b in range(0, len(array), step)]

    def read(self, begin: int, stop: int) -> np.ndarray:
        """The rows from ``begin`` to ``stop``."""
        with open(self.name, "rb") as file:
            return self._read(file, begin, stop)

    def take(self, index: np.ndarray) -> np.ndarray:
        """Some rows, one by one."""
        with open(self.name, "rb") as file:
            return np.concatenate([self._read(file, int(row), int(row) + 1) for row in index])

    def _read(self, file: Any, begin: int, stop: int) -> np.ndarray:
        file.seek(self.offset + begin * self.row_bytes)
        rows = np.empty((stop - begin, *self.shape[1:]), self.dtype)
        if file.readinto(rows.reshape(-1).view(np.uint8)) < rows.nbytes:
            raise ValueError(f"x: {self.name} ends before row {stop}; it was cut short")
        return rows.astype(self.dtype.newbyteorder("="), copy=False)


class ParquetTable:
    """A Parquet file of numbers, read row group by row group."""

    def __init__(self, path: Path) -> None:
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise ImportError(
                "reading Parquet needs pyarrow: pip install 'pyroflows[parquet]'"
            ) from error
        self.name = str(path)
        self.span: tuple[int, int | None] = 0, None
        self._open = lambda: ParquetFile(path)
        with self._open() as file:
            metadata, schema = file.metadata, file.schema_arrow
        kinds = {field.name: str(field.type) for field in schema}
        others = {n: k for n, k in kinds.items() if not k.startswith(("float", "double", "halffl"))}
        if others:
            raise ValueError(
                f"x: expected columns of floating-point numbers in {self.name}, got {others}; "
                "write these as floats (counts with uniform noise in [0, 1) added), or drop them"
            )
        self.columns: Sequence[str] = list(kinds)
        self.shape: tuple[int, ...] = (metadata.num_rows, len(kinds))
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        ends = np.cumsum([0, *sizes]).tolist()
        self.blocks = list(zip(ends[:-1], ends[1:], strict=True))

    def read(self, begin: int, stop: int) -> np.ndarray:
        """The rows of one row group; missing values are NaN."""
        with self._open() as file:
            group = file.read_row_group(self.blocks.index((begin, stop)))
        return np.stack([column.to_numpy() for column in group.columns], axis=1)

    def take(self, index: np.ndarray) -> np.ndarray:
        """Some rows; each row group that has one is read."""
        found = []
        for begin, stop in self.blocks:
            inside = index[(index >= begin) & (index < stop)] - begin
            if len(inside):
                found.append(self.read(begin, stop)[inside])
        return np.concatenate(found)


class TableBatches(Streamed):
    """Random mini-batches from a table: an epoch is each row once, without those left out.

    Blocks come in a new random order, and the rows of about eight of them are mixed at a time. All
    processes read all blocks, and each takes its part, of equal size, of the same batches. A file
    with more columns than the flow has features has its context in those that follow.

    Args:
        flow: decides what rows may be.
        table: the file.
        size: rows in a batch, over all processes.
        seed: of the order.
        rank: number of this process.
        processes: how many there are.
        left_out: rows to leave out, in rising order.
    """

    def __init__(
        self,
        flow: Flow,
        table: Table,
        size: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        left_out: np.ndarray | None = None,
    ) -> None:
        self.flow = flow
        self.table = table
        self.columns = table.columns
        self.asked = size
        self.size = max(1, size // processes) * processes
        self.rank = rank
        self.processes = processes
        self.left_out = np.empty(0, dtype=int) if left_out is None else left_out
        self.generator = torch.Generator().manual_seed(seed)
        self.count = table.shape[0] - len(self.left_out)
        if self.count < 1:
            raise ValueError(f"x: expected at least one row, got none in {table.name}")

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __iter__(self) -> Iterator[Batch]:
        rest: Rows | None = None
        for mixed in self._mixed():
            rows = mixed if rest is None else Rows.joined([rest, mixed])
            count = len(rows) - len(rows) % self.size
            for begin in range(0, count, self.size):
                yield self._part(rows[begin : begin + self.size])
            # A copy, so that the buffer is not kept for the sake of a few rows.
            rest = rows[torch.arange(count, len(rows))]
            del rows, mixed
        if rest is not None and len(rest):
            yield self._part(rest)
        if self.screen is not None:
            self.screen.end_pass()

    def starting_at(self, position: int) -> Iterator[Batch]:
        """One epoch from a batch on; those before it are read all the same."""
        return islice(self, position, None)

    def facts(self) -> dict[str, Any]:
        """By which the rows are known again."""
        table = self.table
        pieces = facts_of_file(table.name, *table.span)
        return {"rows": self.count, "shape": str(table.shape), **pieces}

    def _part(self, rows: Rows) -> Batch:
        """This process's part; the first rows fill up the last ones."""
        count = len(rows)
        index = torch.arange(count + -count % self.processes) % count
        return rows[index[self.rank :: self.processes]].batch

    def _mixed(self) -> Iterator[Rows]:
        """Buffers of rows in random order."""
        blocks = self.table.blocks
        buffer: list[Rows] = []
        filled = 0
        for place in shuffled(len(blocks), self.generator).tolist():
            block = self._block(*blocks[place])
            if block is not None:
                buffer.append(block)
                filled += block.nbytes
            if filled >= BUFFER * (_BLOCKS - 1) / _BLOCKS:
                yield self._shuffled(buffer)
                buffer, filled = [], 0
        if buffer:
            yield self._shuffled(buffer)

    def _shuffled(self, buffer: list[Rows]) -> Rows:
        return Rows.mixed(buffer, shuffled(sum(map(len, buffer)), self.generator))

    def _block(self, begin: int, stop: int) -> Rows | None:
        numbers, rows = np.arange(begin, stop), self.table.read(begin, stop)
        low, high = np.searchsorted(self.left_out, [begin, stop])
        if low < high:
            numbers, rows = (
                np.delete(part, self.left_out[low:high] - begin, axis=0) for part in (numbers, rows)
            )
        where = f"rows {begin} to {stop - 1} of {self.table.name}"
        if not len(rows):
            return None
        checked = _checked(self.flow, rows, where)
        return (
            checked if self.screen is None else self.screen.usual(checked, f"x ({where})", numbers)
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Where the generator of the order stands."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the orders that follow."""
        self.generator.set_state(state["generator"])


def hold_out(flow: Flow, table: Table, share: float, seed: int) -> tuple[np.ndarray, Rows]:
    """A random share of the rows for validation, 65,536 at most: their numbers, and themselves."""
    count = min(validation_count(table.shape[0], share), MOST_HELD_OUT)
    generator = torch.Generator().manual_seed(seed)
    if table.shape[0] <= 2**24:
        index = shuffled(table.shape[0], generator)[:count].sort().values
    else:  # an order of all rows would be too large; among so many hardly two are the same
        drawn = torch.randint(table.shape[0], (count,), generator=generator, device="cpu")
        index = drawn.unique()
    left_out = index.numpy()
    return left_out, _checked(flow, table.take(left_out), f"rows held out of {table.name}")


def _checked(flow: Flow, rows: np.ndarray, where: str) -> Rows:
    features = tuple(flow.event_shape)
    context = None
    if flow.context_shape and len(features) == rows.ndim - 1 == 1:
        rows, context = rows[:, : features[0]], rows[:, features[0] :]
    return checked_rows(flow, rows, context, name=f"x ({where})", context_name=f"context ({where})")
