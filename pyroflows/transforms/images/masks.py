"""What all maps of images share: their space, their rows, and the masks of their couplings.

An image is an event ``(channels, height, width)``. Rows of images are laid out channels last inside
a flow, which convolutions on a CPU are faster with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Size, Tensor
from torch.distributions import constraints

IMAGE = constraints.independent(constraints.real, 3)
"""All images: the domain and the codomain of maps from images to images."""


def rows_of(
    x: Tensor, context: Tensor | None = None, context_dim: int = 1
) -> tuple[Tensor, Tensor | None, Size]:
    """Images ``(rows, C, H, W)``, their contexts ``(rows, ...)``, and the batch both stand for.

    A context broadcasts against the batch. Views, where they can be: nothing is done to a single
    batch dimension.

    Args:
        x: ``(*batch, C, H, W)``.
        context: ``(*batch, *shape)`` or None.
        context_dim: number of dimensions of the context's shape.
    """
    batch, event = x.shape[:-3], x.shape[-3:]
    if context is not None:
        cut = context.dim() - context_dim
        batch = torch.broadcast_shapes(batch, context.shape[:cut])
        shape = context.shape[cut:]
        context = context.expand(*batch, *shape).reshape(-1, *shape)
        x = x.expand(*batch, *event)
    return (x if x.dim() == 4 else x.reshape(-1, *event)), context, batch


def checkerboard(shape: Sequence[int]) -> Tensor:
    """``(1, H, W)``, True where row plus column is even (Dinh et al. 2017, arXiv:1605.08803, 3.4).

    Example:
        >>> checkerboard((1, 2, 3)).int()
        tensor([[[1, 0, 1],
                 [0, 1, 0]]], dtype=torch.int32)
    """
    rows, columns = torch.arange(shape[-2])[:, None], torch.arange(shape[-1])
    return ((rows + columns) % 2 == 0)[None]


def even_rows(shape: Sequence[int]) -> Tensor:
    """``(1, H, W)``, True in rows 0, 2, 4 ...

    Args:
        shape: ``(C, H, W)`` of the pictures that the mask is for.

    Example:
        >>> even_rows((1, 3, 2)).int()
        tensor([[[1, 1],
                 [0, 0],
                 [1, 1]]], dtype=torch.int32)
    """
    return (torch.arange(shape[-2]) % 2 == 0)[None, :, None].repeat(1, 1, shape[-1])


def even_columns(shape: Sequence[int]) -> Tensor:
    """``(1, H, W)``, True in columns 0, 2, 4 ...

    Args:
        shape: ``(C, H, W)`` of the pictures that the mask is for.

    Example:
        >>> even_columns((1, 2, 3)).int()
        tensor([[[1, 0, 1],
                 [1, 0, 1]]], dtype=torch.int32)
    """
    return (torch.arange(shape[-1]) % 2 == 0)[None, None].repeat(1, shape[-2], 1)


def first_half(shape: Sequence[int]) -> Tensor:
    """``(C, 1, 1)``, True for the first half of the channels.

    Args:
        shape: ``(C, H, W)`` of the pictures that the mask is for.

    Example:
        >>> first_half((4, 2, 2)).flatten()
        tensor([ True,  True, False, False])
    """
    return (torch.arange(shape[-3]) < shape[-3] // 2)[:, None, None]


def all_but_channel(shape: Sequence[int], moved: int) -> Tensor:
    """``(C, 1, 1)``, True for all channels but one.

    Taken in turn for ``moved = 0, 1, 2, 0 ...``, each colour is set by the two others.

    Args:
        shape: ``(C, H, W)`` of the pictures that the mask is for.
        moved: the channel that is False.

    Example:
        >>> all_but_channel((3, 2, 2), moved=1).flatten()
        tensor([ True, False,  True])
    """
    return (torch.arange(shape[-3]) != moved % shape[-3])[:, None, None]
