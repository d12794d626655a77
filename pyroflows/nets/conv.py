"""Convolutional networks for couplings of images, with a class or an image as context.

Weights are laid out channels last, which convolutions on a CPU are faster with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroflows._checks import check_whole, context_shape
from pyroflows.nets.mlp import Dropping


class FromContext(nn.Module):
    """A context as ``(rows, channels, height, width)`` or ``(rows, channels, 1, 1)``, to be added.

    A vector (a class goes in one-hot) sets one number a channel. An image is read by a convolution
    whose kernel and stride are how many of its pixels make one of ours, so at every level of a
    multi-scale flow all of it is seen. Zero at first: then a net sets out as it would without a
    context, which random numbers for each class only kept it from (0.14 bits per dimension on MNIST
    after two minutes).

    Args:
        context: width of the vector, or shape of the context: ``(width,)`` or
            ``(channels, height, width)``.
        channels: how many channels come out.
        size: height and width of the images the result is added to.

    Raises:
        ValueError: a context of two or more than three dimensions, or an image whose size is no
            multiple of ``size``.

    Example:
        >>> import torch
        >>> FromContext((1, 8, 8), 5, (4, 4))(torch.ones(2, 1, 8, 8)).shape
        torch.Size([2, 5, 4, 4])
    """

    def __init__(self, context: int | Sequence[int], channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        shape = context_shape(context)
        self.is_image = len(shape) == 3
        if len(shape) == 1:
            self.read: nn.Linear | nn.Conv2d = nn.Linear(shape[0], channels, bias=False)
            nn.init.zeros_(self.read.weight)
            return
        if not self.is_image:
            raise ValueError(
                f"context: expected a width or the shape (channels, height, width), got {shape}"
            )
        if shape[1] % size[0] or shape[2] % size[1]:
            raise ValueError(
                f"context: expected images whose size is a multiple of {size[0]} x {size[1]}, "
                f"got {shape[1]} x {shape[2]}"
            )
        stride = shape[1] // size[0], shape[2] // size[1]
        self.read = nn.Conv2d(shape[0], channels, stride, stride, bias=False)
        nn.init.zeros_(self.read.weight)

    def forward(self, context: Tensor) -> Tensor:
        """What is added to a hidden layer; ``context`` is ``(rows, *shape)``."""
        read = self.read(context)
        return read if self.is_image else read[:, :, None, None]


def from_context(
    context: int | Sequence[int], channels: int, size: tuple[int, int]
) -> FromContext | None:
    """A ``FromContext``, if a width or a shape of a context says that there is one."""
    return FromContext(context, channels, size) if context_shape(context) else None


def _zeroed(last: nn.Conv2d) -> nn.Conv2d:
    """The layer at zero: a flow starts as the identity."""
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    return last


def _channels_last(net: nn.Module) -> None:
    """Lay the weights of all convolutions out channels last."""
    nn.Module.to(net, memory_format=torch.channels_last)  # type: ignore[call-overload]


class ConvNet(Dropping):
    """Glow's coupling net: 3x3, 1x1 and 3x3 convolutions with rectifiers in between.

    Kingma & Dhariwal 2018, arXiv:1807.03039, section 5. The last layer starts at zero.

    Args:
        inputs: channels in.
        outputs: channels out.
        channels: width of both hidden layers.
        size: height and width of the images; needed with a context alone.
        context: width or shape of the context, which is added to the first hidden layer; 0 for
            none.

    Raises:
        ValueError: a size that is not a positive integer, or a context that does not fit ``size``.

    Example:
        >>> import torch
        >>> ConvNet(3, 4, channels=8)(torch.ones(2, 3, 6, 6)).shape
        torch.Size([2, 4, 6, 6])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        channels: int = 128,
        size: tuple[int, int] = (1, 1),
        context: int | Sequence[int] = 0,
    ) -> None:
        super().__init__()
        check_whole(1, inputs=inputs, outputs=outputs, channels=channels)
        self.first = nn.Conv2d(inputs, channels, 3, padding=1)
        self.from_context = from_context(context, channels, size)
        self.middle = nn.Conv2d(channels, channels, 1)
        self.last = _zeroed(nn.Conv2d(channels, outputs, 3, padding=1))
        _channels_last(self)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``(rows, inputs, height, width)`` to ``(rows, outputs, height, width)``."""
        h = self.first(x)
        if self.from_context is not None:
            h.add_(self.from_context(context))
        h = self.middle(self.drop(h.relu_())).relu_()
        return self.last(self.drop(h))

    def __repr__(self) -> str:
        widths = (self.first.in_channels, self.first.out_channels, self.last.out_channels)
        return f"ConvNet({' -> '.join(map(str, widths))})"


class ConvResNet(Dropping):
    """RealNVP's coupling net: a 3x3 convolution, residual blocks of two each, and a 1x1.

    Dinh et al. 2017, arXiv:1605.08803, section 4.1, without batch normalisation: the scales of a
    coupling are bounded, and the density stays one of single images. The last layer starts at zero.

    Args:
        inputs: channels in.
        outputs: channels out.
        channels: width of all hidden layers.
        blocks: number of residual blocks.
        size: height and width of the images; needed with a context alone.
        context: width or shape of the context, which is added to the first hidden layer; 0 for
            none.

    Raises:
        ValueError: a size that is not a positive integer, or a context that does not fit ``size``.

    Example:
        >>> import torch
        >>> ConvResNet(3, 4, channels=8, blocks=2)(torch.ones(2, 3, 6, 6)).shape
        torch.Size([2, 4, 6, 6])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        channels: int = 64,
        blocks: int = 2,
        size: tuple[int, int] = (1, 1),
        context: int | Sequence[int] = 0,
    ) -> None:
        super().__init__()
        check_whole(1, inputs=inputs, outputs=outputs, channels=channels)
        check_whole(0, blocks=blocks)
        self.first = nn.Conv2d(inputs, channels, 3, padding=1)
        self.from_context = from_context(context, channels, size)
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
            for _ in range(blocks)
        )
        self.last = _zeroed(nn.Conv2d(channels, outputs, 1))
        _channels_last(self)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``(rows, inputs, height, width)`` to ``(rows, outputs, height, width)``."""
        h = self.first(x)
        if self.from_context is not None:
            h.add_(self.from_context(context))
        pairs: list[nn.ModuleList] = [*self.blocks]
        for one, other in pairs:
            h = other(self.drop(one(h.relu()).relu_())).add_(h)
        return self.last(h.relu())

    def __repr__(self) -> str:
        widths = (self.first.in_channels, self.first.out_channels, self.last.out_channels)
        return f"ConvResNet({' -> '.join(map(str, widths))}, blocks={len(self.blocks)})"
