"""Coupling of images: some channels or pixels stay and decide what happens to the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyroflows.transforms.coupling import CouplingLayer, Step
from pyroflows.transforms.families import Family
from pyroflows.transforms.images.masks import IMAGE, rows_of


class ImageCoupling(CouplingLayer):
    r"""``y = x`` where the mask holds; elsewhere :math:`y_i = g(x_i; \theta_i(x_{mask}, c))`.

    Both directions cost one network call. Dinh et al. 2017, arXiv:1605.08803, section 3.4. A mask
    of channels ``(C, 1, 1)`` that moves one run of them splits the image: the net sees the channels
    that are kept, and no other work is done. Any other mask blanks the moved pixels out for the
    net, which then gives parameters for all.

    Args:
        net: ``net(kept, context)`` gives ``(rows, family.params * moved, H, W)``, the first
            ``moved`` channels each channel's first parameter, from ``(rows, kept, H, W)`` (with a
            split; ``kept = moved = C`` otherwise); a module or any callable.
        family: what is done to each moved number.
        mask: broadcasts to ``(C, H, W)``; True where a number is kept.
        context_dim: number of dimensions of a context: 1 for a vector, 3 for an image.

    Raises:
        ValueError: the mask has not three dimensions, or keeps all or nothing.

    Example:
        >>> import torch, pyroflows as pf
        >>> mask = torch.tensor([True, False])[:, None, None]
        >>> add = pf.transforms.Additive()
        >>> layer = pf.transforms.ImageCoupling(lambda kept, c: kept, add, mask)
        >>> layer(torch.tensor([1.0, 2.0])[:, None, None]).flatten()
        tensor([1., 3.])
    """

    domain = codomain = IMAGE
    mask: Tensor

    def __init__(
        self,
        net: Callable[[Tensor, Tensor | None], Tensor],
        family: Family,
        mask: Tensor,
        *,
        context_dim: int = 1,
    ) -> None:
        super().__init__(net, family)
        mask = torch.as_tensor(mask, dtype=torch.bool)
        if mask.dim() != 3 or mask.all() or not mask.any():
            raise ValueError(
                f"mask: expected (channels, height, width) with numbers kept and numbers moved, "
                f"got shape {tuple(mask.shape)} with {int(mask.sum())} kept"
            )
        self.context_dim = context_dim
        self.register_buffer("mask", mask)
        self.run = _moved_run(mask)  # of channels, where these move together

    def _theta(self, kept: Tensor, context: Tensor | None) -> Tensor:
        """``(rows, moved, H, W, params)``: a view on what the net gives."""
        theta = self.net(kept, context).to(kept.dtype)  # under autocast the net rounds
        return theta.unflatten(1, (self.family.params, -1)).movedim(1, -1)

    def apply_family(
        self, step: Step, value: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The family's step on what is moved, by what the net makes of what is kept."""
        x, context, batch = rows_of(value, context, self.context_dim)
        if self.run is None:
            y, log_derivative = self._masked(step, x, context)
        else:
            y, log_derivative = self._split(self.run, step, x, context)
        log_det = (
            x.new_zeros(batch)
            if self.volume_preserving
            else log_derivative.sum(dim=(1, 2, 3)).view(batch)
        )
        return y.view(*batch, *y.shape[1:]) if len(batch) != 1 else y, log_det

    def _split(
        self, run: tuple[int, int], step: Step, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        before, moved, after = x.tensor_split(run, dim=1)
        kept = [part for part in (before, after) if part.shape[1]]
        theta = self._theta(kept[0] if len(kept) == 1 else torch.cat(kept, dim=1), context)
        moved, log_derivative = step(moved, theta)
        parts = [part for part in (before, moved, after) if part.shape[1]]
        return torch.cat(parts, dim=1), log_derivative

    def _masked(self, step: Step, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        y, log_derivative = step(x, self._theta(x * self.mask, context))
        return torch.where(self.mask, x, y), log_derivative * ~self.mask

    def extra_repr(self) -> str:
        """Family, net and how much is kept."""
        return f"{self.family}, {self.net}, kept={int(self.mask.sum())} of {self.mask.numel()}"


def channels_of(mask: Tensor, channels: int) -> tuple[int, int]:
    """How many channels the net of an ``ImageCoupling`` sees, and for how many it has to answer.

    Args:
        mask: of the coupling.
        channels: of the images.
    """
    run = _moved_run(mask)
    moved = channels if run is None else run[1] - run[0]
    return (channels if run is None else channels - moved), moved


def _moved_run(mask: Tensor) -> tuple[int, int] | None:
    """First and last-plus-one of the moved channels, where they are one run of whole channels."""
    if mask.shape[1:] != (1, 1):
        return None
    moved = (~mask.flatten()).nonzero()[:, 0].tolist()
    return (moved[0], moved[-1] + 1) if len(moved) == moved[-1] + 1 - moved[0] else None
