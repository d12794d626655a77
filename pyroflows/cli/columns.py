"""Which columns are used, their bounds, and which rows can be used."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.distributions import constraints

from pyroflows.cli.tables import Table
from pyroflows.data.rows import Rows
from pyroflows.data.wild import Screen

MOST_COLUMNS = 2000
FEWEST_ROWS = 20


def listed(names: Sequence[str], limit: int = 8) -> str:
    """Names with commas between them, and how many more there are than ``limit``."""
    shown = ", ".join(map(repr, names[:limit]))
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def split_names(options: Sequence[str], known: Sequence[str]) -> list[str]:
    """Column names from options: each a name, or several with commas between.

    Raises:
        ValueError: a name that the table does not have, or one given twice.
    """
    names: list[str] = []
    for option in options:
        parts = [option] if option in known else [part.strip() for part in option.split(",")]
        names += [part for part in parts if part]
    check_names(names, known)
    repeated = [n for i, n in enumerate(names) if n in names[:i]]
    if repeated:
        raise ValueError(f"column {repeated[0]!r} is given twice")
    return names


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """See that a table has these columns.

    Raises:
        ValueError: it has not.
    """
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the table has {listed(known)}"
            raise ValueError(f"there is no column {name!r}; {hint}")


def choose(table: Table, options: Sequence[str]) -> tuple[list[str], list[str]]:
    """The columns to use, and the columns of words that were left out.

    Without options all columns but those without a single number.

    Raises:
        ValueError: a chosen column holds words, no column is left, or there are too many.
    """
    rows = len(table.values)
    empty = [
        name
        for i, name in enumerate(table.names)
        if np.isnan(table.values[:, i]).all() and (name in table.words or rows > 1)
    ]
    left_out = [] if options else empty
    names = split_names(options, table.names) or [n for n in table.names if n not in left_out]
    for name in names:
        if name in table.words:
            count, first = table.words[name]
            raise ValueError(
                f"column {name!r} has {count} cells that are no numbers ({first}); correct them or "
                "choose others with --columns"
            )
    if not names:
        _, first = next(iter(table.words.values()), (0, ""))
        hint = f", {first} is none; decimals have a point, not a comma" if first else ""
        raise ValueError(f"the table has no column of numbers{hint}")
    if len(names) > MOST_COLUMNS:
        raise ValueError(
            f"the table has {len(names)} columns of numbers; a flow here takes up to "
            f"{MOST_COLUMNS}: choose with --columns"
        )
    return names, left_out


def header_note(table: Table) -> str:
    """How the first line of a text was read, where no option says how."""
    if table.header:
        return f"names in the first line: {listed(table.names)} (--no-header if it is a row)"
    return f"no names in the first line: {listed(table.names, 2)} (--header if it has them)"


def values_of(table: Table, names: Sequence[str]) -> np.ndarray:
    """``(rows, len(names))``."""
    at = {name: i for i, name in enumerate(table.names)}
    return table.values[:, [at[name] for name in names]]


def usable(values: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """Which rows are finite, ``(rows,)`` of booleans, and the counts of what is not."""
    missing, infinite = np.isnan(values), np.isinf(values)
    rows = ~(missing | infinite).any(axis=1)
    facts = {
        "rows": len(values),
        "used": int(rows.sum()),
        "missing": {n: int(c) for n, c in zip(names, missing.sum(0), strict=True) if c},
        "infinite": {n: int(c) for n, c in zip(names, infinite.sum(0), strict=True) if c},
    }
    return rows, facts


def report_rows(facts: dict[str, Any]) -> list[str]:
    """The counts in words."""
    lines = [f"{facts['rows']:,} rows, {facts['used']:,} of them usable"]
    for word in ("missing", "infinite"):
        if facts[word]:
            counts = ", ".join(f"{name} {count:,}" for name, count in facts[word].items())
            lines.append(f"{word} values: {counts}")
    return lines


def bounds_of(
    names: Sequence[str], positive: Sequence[str], bounded: Sequence[str]
) -> dict[str, tuple[float, float] | None]:
    """The bounds of each column: None for all numbers, else two; the upper may be infinite.

    Args:
        names: the columns in use.
        positive: options of ``--positive``.
        bounded: options of ``--bounded``, each ``name=low:high``.

    Raises:
        ValueError: an unknown column, one with two supports, or ends that are no ends.
    """
    found: dict[str, tuple[float, float] | None] = dict.fromkeys(names)
    for name in split_names(positive, names):
        found[name] = 0.0, float("inf")
    for option in bounded:
        name, equals, ends = option.rpartition("=")
        low, _, high = ends.partition(":")
        try:
            if not equals:
                raise ValueError
            pair = float(low), float(high)
        except ValueError:
            raise ValueError(f"--bounded: expected NAME=LOW:HIGH, got {option!r}") from None
        if not (np.isfinite(pair).all() and pair[0] < pair[1]):
            raise ValueError(f"--bounded: expected two finite numbers, low first, got {option!r}")
        name = name if name in names else name.strip()
        check_names([name], names)
        if found[name] is not None:
            raise ValueError(f"column {name!r} is given two supports")
        found[name] = pair
    return found


def without_wild(
    values: np.ndarray, bounds: dict[str, tuple[float, float] | None], numbers: np.ndarray, of: str
) -> np.ndarray:
    """The rows that are not far outside all others; the others would set the scale for all.

    Args:
        values: of the usable rows.
        bounds: of each column.
        numbers: those of the rows, counted from 1.
        of: name of the table, for the warning that names rows and columns.

    Warns:
        UserWarning: which rows are left out.
    """
    if len(values) < FEWEST_ROWS:
        return values
    rows = Rows(torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)))
    screen = Screen(support_of(bounds) or constraints.real_vector, rows, list(bounds))
    return screen.usual(rows, f"{of} (rows counted from 1)", numbers).x.numpy()


def support_of(bounds: dict[str, tuple[float, float] | None]) -> Any:
    """The constraint on a whole row; None where all columns take all numbers."""
    if not any(bounds.values()):
        return None
    parts: list[list[Any]] = []
    for ends in bounds.values():
        if parts and parts[-1][0] == ends:
            parts[-1][1] += 1
        else:
            parts.append([ends, 1])
    made = [_constraint(ends) for ends, _ in parts]
    if len(made) == 1:
        return made[0]
    return constraints.cat(made, dim=-1, lengths=[length for _, length in parts])


def _constraint(ends: tuple[float, float] | None) -> Any:
    if ends is None:
        return constraints.real
    low, high = ends
    return constraints.positive if high == float("inf") else constraints.interval(low, high)


def check_values(values: np.ndarray, bounds: dict[str, tuple[float, float] | None]) -> list[str]:
    """Refuse columns that have no density; returns notes on those that hardly have one.

    Raises:
        ValueError: too few rows, a constant column, values outside their support or beyond what
            arithmetic takes.
    """
    if len(values) < FEWEST_ROWS:
        raise ValueError(f"expected at least {FEWEST_ROWS} usable rows, got {len(values)}")
    notes = []
    for index, (name, ends) in enumerate(bounds.items()):
        column = values[:, index]
        low, high = float(column.min()), float(column.max())
        if ends is not None and not (ends[0] < low and high < ends[1]):
            count = int(((column <= ends[0]) | (column >= ends[1])).sum())
            raise ValueError(
                f"column {name!r} has {count} values not inside ({ends[0]:g}, {ends[1]:g}), ends "
                f"excluded (they go from {low:g} to {high:g}); correct the bounds or the values"
            )
        if low == high:
            raise ValueError(
                f"column {name!r} is {low:g} in every row, which has no density; leave it out with "
                "--columns"
            )
        largest = max(abs(low), abs(high))
        if largest > 1e100 or high - low < 1e-100 or high - low < 1e-9 * largest:
            raise ValueError(
                f"column {name!r} goes from {low!r} to {high!r}, more than the arithmetic of a "
                "density takes; shift or rescale it"
            )
        few = len(np.unique(column))
        if few <= max(2, min(20, len(column) // 10)):
            notes.append(
                f"column {name!r} has {few} different values; a density of such a column grows "
                "without bound on top of them"
            )
    return notes


def dtype_for(values: np.ndarray, bounds: dict[str, tuple[float, float] | None]) -> str:
    """``"float64"`` where single precision would lose the differences between values."""
    largest, spread = np.abs(values).max(axis=0), values.std(axis=0)
    fine = (largest < 1e4 * spread) & (largest < 1e15) & (spread > 1e-15)
    if not fine.all():
        return "float64"
    single = values.astype(np.float32)
    for index, ends in enumerate(bounds.values()):  # rounding may reach an end
        if ends is not None and not (ends[0] < single[:, index].min() <= single[:, index].max()):
            return "float64"
        if ends is not None and not single[:, index].max() < np.float32(ends[1]):
            return "float64"
    return "float32"
