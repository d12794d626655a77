"""The gated PixelCNN's network: features of each pixel from the pixels before it, in raster order.

Two stacks of convolutions keep the field of view free of a blind spot: a vertical one that sees all
rows above, and a horizontal one that sees the row itself up to the pixel. ``step_through`` goes
from pixel to pixel and computes each activation once, so generating a whole image costs about the
arithmetic of one pass. Van den Oord et al. 2016, arXiv:1606.05328.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows._checks import check_whole
from pyroflows.nets.mlp import Dropping


def gate(a: Tensor, dim: int = 1) -> Tensor:
    """``tanh(a_1) sigmoid(a_2)`` of the two halves along ``dim``."""
    value, share = a.chunk(2, dim)
    return value.tanh() * share.sigmoid()


class GatedLayer(Dropping):
    """One layer of both stacks.

    Convolutions are masked by shape: a kernel holds only what it may see, and inputs are padded on
    the sides it looks to.

    Args:
        inputs: channels coming in.
        channels: channels going out, of each stack.
        context: width of the context; 0 for none.
        kernel: odd width of the vertical stack's kernel; it is ``kernel // 2 + 1`` high, as wide
            as the horizontal stack's.
        first: see only what lies strictly before a pixel, as the first layer must.
    """

    def __init__(self, inputs: int, channels: int, context: int, kernel: int, first: bool) -> None:
        super().__init__()
        self.shift = int(first)
        self.reach = kernel // 2 + 1
        self.vertical = nn.Conv2d(inputs, 2 * channels, (self.reach, kernel))
        self.horizontal = nn.Conv2d(inputs, 2 * channels, (1, self.reach))
        self.link = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.condition = nn.Linear(context, 2 * channels, bias=False) if context else None

    @property
    def before(self) -> int:
        """Rows and columns of padding before an image."""
        return self.reach - 1 + self.shift

    @property
    def beside(self) -> int:
        """Columns of padding on each side of the vertical stack."""
        return self.reach - 1

    def forward(self, v: Tensor, h: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both stacks' outputs, ``(n, channels, height, width)`` each."""
        height, width = v.shape[-2:]
        above = F.pad(v, (self.beside, self.beside, self.before, 0))
        left = F.pad(h, (self.before, 0, 0, 0))
        a = self.vertical(above)[..., :height, :] + self.context_bias(context)
        b = self.horizontal(left)[..., :width] + self.link(a)
        v_new, h_new = gate(a), self.out(self.drop(gate(b)))
        return (v_new, h_new) if self.shift else (v + v_new, h + h_new)

    def context_bias(self, context: Tensor | None) -> Tensor | float:
        """What the context adds to the vertical stack, ``(n, 2 channels, 1, 1)``."""
        return 0.0 if self.condition is None else self.condition(context)[:, :, None, None]


class PixelNet(nn.Module):
    """``(n, colours, height, width)`` to ``(n, channels, height, width)``, blind to pixels to come.

    With ``reach = layers * (kernel // 2)``, the features of a pixel depend on the ``reach + 1``
    pixels before it in its row, and in the ``reach + 1`` rows above on those at most ``reach``
    columns away; on none from it on.

    A layer costs ``(kernel // 2 + 1) (2 kernel + 2) + 5`` times ``channels^2`` multiplications a
    pixel; ``step_through`` costs about as much as one pass.

    Args:
        colours: channels of the image.
        channels: width of each stack.
        layers: number of gated layers.
        kernel: odd width of the vertical stack's kernels, at least 3.
        context: width of the context; 0 for none.

    Raises:
        ValueError: a size that is not a positive integer, or a kernel that is even or below 3.

    Example:
        >>> import torch, pyroflows as pf
        >>> pf.nets.PixelNet(1, channels=8)(torch.zeros(5, 1, 4, 6)).shape
        torch.Size([5, 8, 4, 6])
    """

    def __init__(
        self,
        colours: int,
        *,
        channels: int = 64,
        layers: int = 6,
        kernel: int = 5,
        context: int = 0,
    ) -> None:
        super().__init__()
        check_whole(1, colours=colours, channels=channels, layers=layers)
        check_whole(0, context=context)
        check_whole(3, kernel=kernel)
        if kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd width, got {kernel}")
        self.colours = colours
        # One more channel, of ones, tells the image from the padding around it.
        widths = [colours + 1] + [channels] * layers
        self.layers = nn.ModuleList(
            GatedLayer(inputs, channels, context, kernel, first=index == 0)
            for index, inputs in enumerate(widths[:-1])
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Features of all pixels of given images in one pass."""
        v = h = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        for layer in self.layers:
            v, h = layer(v, h, context)
        return h

    @torch.no_grad()
    def step_through(
        self,
        x: Tensor,
        step: Callable[[Tensor, int, int], None],
        context: Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Call ``step(features, i, j)`` at each pixel in raster order; it may write that pixel.

        The features ``(n, channels)`` are those ``forward`` would give for ``x`` as it is then. The
        vertical stack is computed once a row, the horizontal one once a pixel, both from what
        earlier rows and pixels left behind: no activation is computed twice.

        Args:
            x: images ``(n, colours, height, width)``; ``step`` changes them in place.
            step: is given the features of pixel (i, j) and sets ``x[:, :, i, j]``.
            context: ``(n, context)``.
            rows: the rows to step through; all by default. The others are only read.
        """
        height, width = x.shape[-2:]
        rows = range(height) if rows is None else rows
        layers: list[GatedLayer] = [*self.layers]
        first, *others = [_Stepped(layer, x, context) for layer in layers]
        for i in range(max(rows, default=-1) + 1):
            v = first.row(_with_ones(x[:, :, i - 1]) if i else None)  # of (n, colours + 1, width)
            for layer in others:
                v = layer.row(v)
            if i not in rows:
                continue
            for j in range(width):
                h = first.pixel(_with_ones(x[:, :, i, j - 1]) if j else None, j)
                for layer in others:
                    h = layer.pixel(h, j)
                step(h, i, j)


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


class _Stepped:
    """A layer evaluated row by row and pixel by pixel, with the inputs that its kernels still see.

    The first layer sees what lies strictly before a pixel: it is given the row before and the pixel
    before, None where there is none.
    """

    def __init__(self, layer: GatedLayer, x: Tensor, context: Tensor | None) -> None:
        count, width = len(x), x.shape[-1]
        inputs = layer.vertical.in_channels
        self.layer = layer
        self.bias = layer.context_bias(context)
        self.above = x.new_zeros(count, inputs, layer.reach, width + 2 * layer.beside)
        self.left = x.new_zeros(count, layer.before + width, inputs)
        # A window of the row, flattened, times a matrix: the convolution at one pixel.
        kernel = layer.horizontal.weight[:, :, 0]  # (2 channels, inputs, reach)
        self.across = kernel.permute(2, 1, 0).flatten(0, 1)
        self.out = layer.out.weight[:, :, 0, 0].T
        self.out_bias = layer.out.get_parameter("bias")
        self.drive_bias = layer.horizontal.get_parameter("bias")[:, None, None]

    def row(self, v: Tensor | None) -> Tensor:
        """The vertical stack's next row ``(n, channels, width)`` from its next row of inputs."""
        layer, beside = self.layer, self.layer.beside
        if v is not None:
            self.above = self.above.roll(-1, dims=2)
            self.above[:, :, -1, beside : beside + v.shape[-1]] = v
        a = layer.vertical(self.above) + self.bias
        drive = layer.link(a) + self.drive_bias
        self.drive = drive[:, :, 0].permute(2, 0, 1).contiguous()  # (width, n, 2 channels)
        new = gate(a)[:, :, 0]
        return new if v is None or layer.shift else v + new

    def pixel(self, h: Tensor | None, j: int) -> Tensor:
        """The horizontal stack's output ``(n, channels)`` at column ``j``."""
        layer = self.layer
        if h is not None:
            self.left[:, j + layer.reach - 1] = h
        window = self.left[:, j : j + layer.reach].flatten(1)
        new = gate(torch.addmm(self.drive[j], window, self.across))
        new = torch.addmm(self.out_bias, new, self.out)
        return new if h is None or layer.shift else h + new
