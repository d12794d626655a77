"""The recursion over scales that squeezing makes possible."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.chain import joint_fast
from pyroflows.transforms.images.masks import IMAGE
from pyroflows.transforms.images.squeeze import squeeze, unsqueeze


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
