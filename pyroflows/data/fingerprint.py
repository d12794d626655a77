"""What data are, in a few words: shape, dtype and a hash of their values.

By these a checkpoint knows whether it is of the same data. They are had in bounded time: of an
array up to 16 MiB every byte is hashed, of a larger one 256 pieces of 64 KiB spread over it; all
its values go into a sum beside. Of a file the sum is left out, so that it is not read as a whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from pyroflows.data.position import generators_put_back, seed_generators

_PIECES, _PIECE = 256, 64 * 2**10  # of so many bytes each
_DEEPEST = 8  # lists in lists


def facts_of(value: Any, depth: int = 0) -> Any:
    """A tensor, an array, a module, or a nest of these and of plain values, in a few words.

    Args:
        value: anything; of what is not known only the type's name is taken.
        depth: of the nest it is in.

    Example:
        >>> import torch
        >>> facts_of([torch.zeros(2, 3), 0.5])["0"]["shape"]
        '(2, 3)'
    """
    if isinstance(value, Tensor):
        return _facts_of_array(value, str(value.dtype))
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return _facts_of_array(value, str(value.dtype))
    if isinstance(value, nn.Module):
        return facts_of(dict(value.state_dict()), depth)
    if isinstance(value, Mapping) and depth < _DEEPEST:
        return {str(key): facts_of(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and depth < _DEEPEST:
        spread = range(0, len(value), max(1, len(value) // _PIECES))
        items = {str(i): facts_of(value[i], depth + 1) for i in spread}
        return {"length": len(value), **items}
    if value is None or isinstance(value, (str, Number)):
        return repr(value)
    return f"a {type(value).__name__}"


def facts_of_file(path: str | Path, begin: int = 0, size: int | None = None) -> dict[str, str]:
    """A file's size and a hash of pieces of it.

    Args:
        path: of the file.
        begin: where what counts begins.
        size: how many bytes of it count; by default all.
    """
    size = os.path.getsize(path) - begin if size is None else size
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        for start, stop in _pieces(size, _PIECE):
            file.seek(begin + start)
            hashed.update(file.read(stop - start))
    return {"bytes": str(size), "values": hashed.hexdigest()[:16]}


def _facts_of_array(value: Tensor | np.ndarray, dtype: str) -> dict[str, str]:
    """Rows count from the first dimension, or elements where they lie one after another."""
    facts = {"shape": str(tuple(value.shape)), "dtype": dtype}
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta:
            return facts
        value = value.detach()
        dense, size = value.is_contiguous(), value.element_size()
    else:
        dense, size = value.flags.c_contiguous, value.itemsize
    rows: Any = value.reshape(-1) if dense or value.ndim == 0 else value
    per_row = size * int(np.prod(rows.shape[1:], dtype=int))
    hashed = hashlib.sha256()
    for start, stop in _pieces(len(rows), max(1, _PIECE // max(per_row, 1))):
        hashed.update(_bytes_of(rows[start:stop]))
    if len(rows) * per_row > _PIECES * _PIECE:
        hashed.update(str(_sum(rows)).encode())
    return {**facts, "values": hashed.hexdigest()[:16]}


def _pieces(length: int, piece: int) -> Iterator[tuple[int, int]]:
    """Begin and end of everything, or of 256 pieces from the first to the last."""
    if length <= _PIECES * piece:
        yield 0, length
        return
    for index in range(_PIECES):
        start = index * (length - piece) // (_PIECES - 1)
        yield start, start + piece


def _bytes_of(part: Tensor | np.ndarray) -> bytes:
    if isinstance(part, Tensor):
        part = part.resolve_conj().resolve_neg().cpu().contiguous().view(torch.uint8).numpy()
    return part.tobytes()


def _sum(rows: Tensor | np.ndarray) -> int:
    """Of all values read as whole numbers, which comes out alike in every order."""
    if isinstance(rows, Tensor):
        rows = torch.view_as_real(rows.resolve_conj()) if rows.is_complex() else rows
        whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        return int(rows.view(whole[rows.element_size()]).sum())
    rows = rows.view(rows.real.dtype) if rows.dtype.kind == "c" else rows
    return int(rows.view(f"i{rows.itemsize}").sum(dtype=np.int64))


def facts_of_items(get: Callable[[int], Any], count: int) -> Any:
    """A few items of a data set; none where they differ from one time to the next.

    Args:
        get: gives an item; it may draw from the global generators, which are seeded alike for each
            look and then put back.
        count: how many items there are.
    """
    places = sorted({0, count // 2, count - 1})
    looks = []
    with generators_put_back(torch.device("cpu")):
        for _ in range(2):
            seed_generators(0)
            try:
                looks.append(facts_of([get(place) for place in places]))
            except Exception:  # such as one whose items have other names than numbers
                return "unknown"
    return looks[0] if looks[0] == looks[1] else "random"


def facts_of_loader(loader: DataLoader) -> dict[str, Any]:
    """By which a loader is known again.

    Its kind of batches, how many items there are, and what they are: the tensors of a
    ``TensorDataset``; of another data set with numbered items the first, the middle and the last,
    where this process reads them and they come out alike twice.

    Args:
        loader: any.
    """
    return {
        "rows": _length(loader.dataset),
        "drop_last": loader.drop_last,
        "order": type(loader.batch_sampler).__name__,
        "sampler": type(loader.sampler).__name__,
        "items": _facts_of_dataset(loader.dataset, read=loader.num_workers == 0),
    }


def _facts_of_dataset(dataset: Any, read: bool) -> Any:
    if isinstance(dataset, TensorDataset):
        return facts_of(dataset.tensors)
    if isinstance(dataset, Subset):
        part = facts_of(np.asarray(dataset.indices))
        return {"part": part, "of": _facts_of_dataset(dataset.dataset, read)}
    count = _length(dataset)
    if isinstance(dataset, IterableDataset) or not read or not isinstance(count, int) or not count:
        return type(dataset).__name__
    return facts_of_items(dataset.__getitem__, count)


def _length(dataset: Any) -> int | str:
    try:
        return len(dataset)
    except TypeError:
        return "unknown"
