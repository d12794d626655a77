"""A batch taken in pieces: what is computed of one at a time fits a cache, and memory stays small.

A piece of a batch is an index, one slice a dimension; without any it is the whole batch. Tensors
that broadcast against the batch are cut with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Size, Tensor

from pyroflows._pyro.memo import transformed

# What goes through a transform at once where there is no graph to keep: no more rows than this, and
# no more numbers in them. A core is busy then, and finds in its cache what it computed of a vector;
# of a picture it computes far more, of each pixel. Other devices are wider.
# Seconds for a million rows, or milliseconds for a picture, one core, networks by default:
#
#   event     rows at once:    500   1000   2000   4000   8000  16000    all
#         6, maf, log_prob     8.4    6.5    6.2    5.6    5.3    5.6   11.3
#         6, maf, sample      26.8   15.7   14.3   11.0    8.1    8.5   14.7
#         6, nsf, log_prob    33.0   26.8   23.9   22.9   21.3   22.6   24.3
#        64, maf, log_prob    35.7   32.4   30.3   33.4   43.9          49.8
#                               10     20     50    100    200    500    all
#   3,16,16, glow, log_prob    5.7    4.0    2.5    2.2    2.4    2.4    2.9
#   3,32,32, glow, sample     10.3    7.9    7.1    7.2    9.0    9.1    8.7
_ROWS, _IN_VECTORS, _IN_PICTURES, _WIDER = 8000, 2_000_000, 128_000, 16

Piece = tuple[slice, ...]


def rows_at_once(event_shape: Size, device: torch.device) -> int:
    """How many rows of a batch are taken together."""
    numbers = _IN_VECTORS if len(event_shape) == 1 else _IN_PICTURES
    rows = min(max(numbers // event_shape.numel(), 1), _ROWS)
    return rows if device.type == "cpu" else _WIDER * rows


def pieces(batch: Sequence[int], most: int) -> Iterator[Piece]:
    """A batch in pieces of at most so many rows, cut from its last dimension on.

    Contexts stand in the last dimensions: all draws under one of them stay together, and what is
    computed of a context alone is computed once, while they are no more than ``most``.

    Args:
        batch: shape of the batch.
        most: rows in a piece.

    Example:
        >>> [[(s.start, s.stop) for s in piece] for piece in pieces((2, 3), most=4)]
        [[(0, 2), (0, 2)], [(0, 2), (2, 3)]]
    """
    lengths = list(batch)
    for dim in reversed(range(len(lengths))):
        others = math.prod(lengths) // max(lengths[dim], 1)
        lengths[dim] = max(1, min(lengths[dim], most // max(others, 1)))
    cuts = (
        [slice(start, min(start + length, size)) for start in range(0, size, length)]
        for size, length in zip(batch, lengths, strict=True)
    )
    return itertools.product(*cuts)


def part_of(tensor: Tensor, piece: Piece, event_dim: int) -> Tensor:
    """What of a tensor ``(*batch, *event)``, which may broadcast, belongs to a piece; a view."""
    if not piece:
        return tensor
    shape = tensor.shape[: tensor.dim() - event_dim]
    own = piece[len(piece) - len(shape) :]
    return tensor[tuple(s if n > 1 else slice(None) for s, n in zip(own, shape, strict=True))]


def in_pieces(
    run: Callable[[Piece], tuple[Tensor, ...]], batch: Size, most: int
) -> tuple[Tensor, ...]:
    """What ``run`` gives for each piece of a batch, put together.

    All at once where there may be a graph to keep, and under a compiler or ``torch.func``.

    Args:
        run: gives tensors ``(*piece, ...)``.
        batch: shape of the batch.
        most: rows in a piece.
    """
    if batch.numel() <= most or torch.is_grad_enabled() or transformed():
        return run(())
    whole: tuple[Tensor, ...] = ()
    for piece in pieces(batch, most):
        found = run(piece)
        # Not put together at the end, where everything would be there twice.
        whole = whole or tuple(t.new_empty(batch + t.shape[len(batch) :]) for t in found)
        for target, value in zip(whole, found, strict=True):
            target[piece] = value
    return whole
