"""Space to depth, and the recursion over scales that it makes possible."""

from __future__ import annotations

import torch
from torch import Size, Tensor

from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.chain import joint_fast
from pyroflows.transforms.images.squeeze import IMAGE


def squeeze(x: Tensor) -> Tensor:
    """``(*batch, C, H, W)`` to ``(*batch, 4 C, H / 2, W / 2)``: 2 x 2 blocks become channels.

    Dinh et al. 2017, arXiv:1605.08803, section 3.6. The result is laid out channels last.

    Raises:
        ValueError: height or width is odd.

    Example:
        >>> import torch
        >>> squeeze(torch.arange(4.0).view(1, 2, 2)).flatten()
        tensor([0., 1., 2., 3.])
    """
    *batch, channels, height, width = squeezed_shape(x.shape)
    blocks = x.reshape(-1, channels // 4, height, 2, width, 2)
    flat = blocks.permute(0, 2, 4, 1, 3, 5).reshape(*batch, height, width, channels)
    return flat.movedim(-1, -3)


def unsqueeze(x: Tensor) -> Tensor:
    """The inverse of ``squeeze``: ``(*batch, 4 C, H, W)`` to ``(*batch, C, 2 H, 2 W)``.

    Args:
        x: a picture or a batch of them, as ``squeeze`` gives.

    Raises:
        ValueError: the number of channels is not divisible by four.

    Example:
        >>> import torch
        >>> x = torch.arange(16.0).view(1, 4, 4)
        >>> torch.equal(unsqueeze(squeeze(x)), x)
        True
    """
    *batch, channels, height, width = unsqueezed_shape(x.shape)
    blocks = x.movedim(-3, -1).reshape(-1, height // 2, width // 2, channels, 2, 2)
    flat = blocks.permute(0, 1, 4, 2, 5, 3).reshape(*batch, height, width, channels)
    return flat.movedim(-1, -3)


def squeezed_shape(shape: Size) -> Size:
    """The shape that ``squeeze`` gives.

    Raises:
        ValueError: height or width is odd.
    """
    *batch, channels, height, width = shape
    if height % 2 or width % 2:
        raise ValueError(f"x: expected an even height and width to squeeze, got {height} x {width}")
    return Size([*batch, 4 * channels, height // 2, width // 2])


def unsqueezed_shape(shape: Size) -> Size:
    """The shape that ``unsqueeze`` gives.

    Raises:
        ValueError: the number of channels is not divisible by four.
    """
    *batch, channels, height, width = shape
    if channels % 4:
        raise ValueError(f"x: expected a number of channels divisible by 4, got {channels}")
    return Size([*batch, channels // 4, 2 * height, 2 * width])


class Squeeze(FlowTransform):
    """Space to depth, ``(C, H, W)`` to ``(4 C, H / 2, W / 2)``: volume-preserving.

    At a call it raises a ``ValueError`` where height or width is odd, and its ``.inv`` where
    channels do not come in fours.

    Both directions cost one copy. Dinh et al. 2017, arXiv:1605.08803, section 3.6.

    Example:
        >>> import torch
        >>> Squeeze()(torch.ones(3, 8, 8)).shape
        torch.Size([12, 4, 4])
    """

    domain = codomain = IMAGE
    volume_preserving = True

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """2 x 2 blocks to channels."""
        return squeeze(x), x.new_zeros(x.shape[:-3])

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Channels to 2 x 2 blocks."""
        return unsqueeze(y), y.new_zeros(y.shape[:-3])

    def forward_shape(self, shape: Size) -> Size:
        """A quarter of the pixels, four times the channels."""
        return squeezed_shape(shape)

    def inverse_shape(self, shape: Size) -> Size:
        """Four times the pixels, a quarter of the channels."""
        return unsqueezed_shape(shape)


class MultiScale(FlowTransform):
    """A level at half the resolution, of whose channels the first half goes through further levels.

    From the data on: squeeze, the level's inverse, then ``inner``'s inverse on the first half of
    the channels, while the second half is done (factored out). What is done stays in its place, so
    the event keeps its shape ``(C, H, W)`` and one Gaussian over it is the base. Dinh et al. 2017,
    arXiv:1605.08803, section 3.6.

    A level that begins (at its base side) with an affine coupling which keeps the first half gives
    each factored-out half a Gaussian with mean and scale from the kept half, as in RealNVP and
    Glow.

    Each direction costs what the levels' do in it, of which a level acts on half the numbers of the
    one before.

    Args:
        level: acts on images ``(4 C, H / 2, W / 2)``.
        inner: acts on images ``(2 C, H / 2, W / 2)``, a ``MultiScale`` itself perhaps; None where
            this is the last level.

    At a call it raises a ``ValueError`` where height or width is odd.

    Example:
        >>> import torch, pyroflows as pf
        >>> flip = lambda channels: pf.transforms.Conv1x1(channels)
        >>> two_levels = MultiScale(flip(4), MultiScale(flip(8)))
        >>> two_levels(torch.ones(1, 4, 4)).shape
        torch.Size([1, 4, 4])
    """

    domain = codomain = IMAGE

    def __init__(self, level: FlowTransform, inner: FlowTransform | None = None) -> None:
        super().__init__()
        self.level = level
        self.inner = inner

    def _parts(self) -> list[FlowTransform]:
        return [self.level] if self.inner is None else [self.inner, self.level]

    @property
    def fast(self) -> str:
        """The direction that costs one pass in every part."""
        return joint_fast(self._parts())

    @property
    def volume_preserving(self) -> bool:
        """Whether every part is."""
        return all(part.volume_preserving for part in self._parts())

    def _through_inner(self, x: Tensor, step: str, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The first half of the channels through ``inner``; ``step`` names its method."""
        kept, done = x.chunk(2, dim=-3)
        kept, log_det = getattr(self.inner, step)(kept, context)
        done = done.expand(*kept.shape[:-3], *done.shape[-3:])  # where the context has more rows
        return torch.cat([kept, done], dim=-3), log_det

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``inner`` on half of the channels, then the level."""
        h = squeeze(x)
        if self.inner is None:
            y, log_det = self.level.forward_and_log_det(h, context)
            return unsqueeze(y), log_det
        h, total = self._through_inner(h, "forward_and_log_det", context)
        y, log_det = self.level.forward_and_log_det(h, context)
        return unsqueeze(y), total + log_det

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The level's inverse, then ``inner``'s on half of the channels."""
        h, total = self.level.inverse_and_log_det(squeeze(y), context)
        if self.inner is None:
            return unsqueeze(h), total
        h, log_det = self._through_inner(h, "inverse_and_log_det", context)
        return unsqueeze(h), total + log_det

    def initialize(
        self, value: Tensor, context: Tensor | None = None, *, inverse: bool = True
    ) -> Tensor:
        """Initialise the level and ``inner``, each on what the other passes on."""
        h = squeeze(value)
        for part in [self.level, self.inner] if inverse else [self.inner, self.level]:
            if part is self.level:
                h = part.initialize(h, context, inverse=inverse)
            elif part is not None:
                kept, done = h.chunk(2, dim=-3)
                h = torch.cat([part.initialize(kept, context, inverse=inverse), done], dim=-3)
        return unsqueeze(h)

    def __repr__(self) -> str:
        parts = "".join(f"\n{part!r}" for part in self._parts()).replace("\n", "\n  ")
        return f"MultiScale({parts}\n)"
