"""The value every data set returns, and the two operations that act on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TypeVar

import torch


# Equality is by identity: comparing tensors elementwise has no single truth value.
@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Training, validation and test rows of one data set.

    The first axis counts the rows. Vector sets hold floating-point tensors of
    shape ``(n, features)``, image sets ``uint8`` tensors of shape
    ``(n, channels, height, width)``. A split unpacks as ``train, val, test``.

    Attributes:
        train: rows to fit a model on.
        val: rows to choose settings or a stopping time on.
        test: rows to report a score on.

    Example:
        >>> train, val, test = Split(torch.zeros(8, 2), torch.zeros(1, 2), torch.zeros(1, 2))
        >>> train.shape
        torch.Size([8, 2])
    """

    train: torch.Tensor
    val: torch.Tensor
    test: torch.Tensor

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield the training, validation and test rows, in that order."""
        yield self.train
        yield self.val
        yield self.test


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledSplit(Split):
    """A split whose rows carry class labels.

    Unpacking gives the three tensors of inputs, as for ``Split``; the labels are
    reached by name.

    Attributes:
        train_labels: classes of the training rows, ``int64`` of shape ``(n,)``.
        val_labels: classes of the validation rows, ``int64`` of shape ``(n,)``.
        test_labels: classes of the test rows, ``int64`` of shape ``(n,)``.

    Example:
        >>> rows, labels = torch.zeros(4, 2), torch.tensor([0, 1, 1, 0])
        >>> split = LabelledSplit(rows, rows[:1], rows[:1], labels, labels[:1], labels[:1])
        >>> split.train[split.train_labels == 1].shape
        torch.Size([2, 2])
    """

    train_labels: torch.Tensor
    val_labels: torch.Tensor
    test_labels: torch.Tensor


AnySplit = TypeVar("AnySplit", bound=Split)


def standardize(split: AnySplit) -> AnySplit:
    """Shift and scale each column to mean 0 and standard deviation 1 on the training rows.

    The validation and test rows are moved by the statistics of the training rows,
    so that nothing about them reaches the model. A column that is constant on the
    training rows is only shifted.

    Args:
        split: floating-point rows, each tensor of shape ``(n, features)``.

    Returns:
        A split of the same kind; labels, where there are any, are passed on.

    Raises:
        TypeError: if the rows are not floating-point.
        ValueError: if there are fewer than two training rows.

    Example:
        >>> rows = torch.tensor([[0.0], [2.0], [4.0]])
        >>> standardize(Split(rows, rows[:1], rows[2:])).train.squeeze(-1)
        tensor([-1.,  0.,  1.])
    """
    if not split.train.is_floating_point():
        raise TypeError(f"standardize needs floating-point rows, got {split.train.dtype}")
    if len(split.train) < 2:
        raise ValueError("standardize needs at least two training rows")
    # Large offsets with a small spread lose all their digits in single precision.
    train = split.train.double()
    mean, scale = train.mean(0), train.std(0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    moved = {
        name: ((getattr(split, name).double() - mean) / scale).to(split.train.dtype)
        for name in ("train", "val", "test")
    }
    return dataclasses.replace(split, **moved)


def shuffled_split(rows: torch.Tensor, generator: torch.Generator) -> Split:
    """Shuffle rows and cut them into 80 % training, 10 % validation and 10 % test.

    Args:
        rows: the whole set; the first axis counts the rows.
        generator: source of the permutation. The global state is left alone.

    Returns:
        The split. Validation and test get ``n // 10`` rows each, training the rest.

    Raises:
        ValueError: if there are fewer than ten rows, so that a part would be empty.
    """
    n = len(rows)
    if n < 10:
        raise ValueError(f"an 80/10/10 split needs at least 10 rows, got {n}")
    tenth = n // 10
    rows = rows[torch.randperm(n, generator=generator)]
    return Split(rows[: n - 2 * tenth], rows[n - 2 * tenth : n - tenth], rows[n - tenth :])


def seeded(seed: int) -> torch.Generator:
    """Return a CPU generator that starts at ``seed`` and is independent of the global one."""
    return torch.Generator().manual_seed(seed)


def resolved_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """Return ``dtype``, or torch's default floating-point type where it is ``None``.

    Args:
        dtype: a floating-point type or ``None``.

    Returns:
        A floating-point type.

    Raises:
        TypeError: if the type is not floating-point.
    """
    chosen = torch.get_default_dtype() if dtype is None else dtype
    if not chosen.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type, got {chosen}")
    return chosen
