"""What calling a ``PixelCNN`` returns: a Pyro distribution over images of whole numbers.

It knows of shapes and checks; probabilities and draws are the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

if TYPE_CHECKING:
    from pyroflows.discrete.pixel_model import PixelCNN


def _size(shape: int | Sequence[int]) -> Size:
    return Size([shape] if isinstance(shape, int) else shape)


class PixelDistribution(TorchDistribution):
    """What calling a ``PixelCNN`` returns: images ``(colours, height, width)`` of whole numbers.

    Args:
        model: a ``PixelCNN``; its parameters decide, as they are when it is asked.
        context: ``(*batch, classes)``, or None; its batch shape is the distribution's.
        batch_shape: the batch shape, where there is no context.
        validate_args: as everywhere in torch.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self,
        model: PixelCNN,
        context: Tensor | None = None,
        batch_shape: Sequence[int] = (),
        validate_args: bool | None = None,
    ) -> None:
        self.model = model
        self.context = context
        batch = Size(batch_shape) if context is None else context.shape[:-1]
        super().__init__(batch, model.event_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=3)
    def support(self) -> constraints.Constraint:
        """Whole numbers 0 to bins - 1."""
        return self.model.support

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> PixelDistribution:
        """The same distribution with a larger batch."""
        batch = Size(batch_shape)
        context = None if self.context is None else self.context.expand(*batch, -1)
        new = PixelDistribution(self.model, context, batch, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability in nats, of shape ``(*sample, *batch)``; one pass."""
        if self._validate_args:
            check_shape("value", value, self.event_shape)
            check_levels("value", value, self.model.bins)
        batch = common_batch("value", value.shape[:-3], self.batch_shape)
        # Without a context one score of each image does for the whole batch.
        own = value.shape[:-3] if self.context is None else batch
        images = value.expand(own + self.event_shape).reshape(own.numel(), *self.event_shape)
        scores = self.model.score(images, rows_of(self.context, own))
        return scores.reshape(own).expand(batch)

    @torch.no_grad()
    def sample(self, sample_shape: int | Sequence[int] = ()) -> Tensor:
        """Images ``(*sample, *batch, colours, height, width)`` of integers, about one pass."""
        batch = _size(sample_shape) + self.batch_shape
        blank = torch.zeros(batch.numel(), *self.event_shape, device=self.model.device)
        known = torch.zeros_like(blank, dtype=torch.bool)
        images = self.model.fill(blank, known, rows_of(self.context, batch))
        return images.reshape(batch + self.event_shape)

    def __repr__(self) -> str:
        return (
            f"PixelDistribution(batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)}, bins={self.model.bins})"
        )


def check_shape(name: str, x: Tensor, shape: Size) -> None:
    """Refuse what is not ``(*batch, *shape)``."""
    if x.dim() < len(shape) or x.shape[x.dim() - len(shape) :] != shape:
        raise ValueError(
            f"{name}: expected images of shape (*batch, {', '.join(map(str, shape))}), "
            f"got {tuple(x.shape)}"
        )


def check_levels(name: str, x: Tensor, bins: int) -> None:
    """Refuse what is not whole numbers 0 to bins - 1."""
    bad = ~((x >= 0) & (x <= bins - 1) & (x % 1 == 0))
    if bad.any():
        raise ValueError(
            f"{name}: expected whole numbers 0 to {bins - 1}, got {int(bad.sum())} pixels that are "
            f"not, the first {x[bad][0].item():g}; quantise the images, or build the model with "
            "another bins="
        )


def common_batch(name: str, batch: Size, others: Size) -> Size:
    """The batch shape of images and contexts together, or a ``ValueError``."""
    try:
        return torch.broadcast_shapes(batch, others)
    except RuntimeError:
        raise ValueError(
            f"{name}: a batch of shape {tuple(batch)} does not go with the distribution's "
            f"{tuple(others)}"
        ) from None


def rows_of(context: Tensor | None, batch: Size) -> Tensor | None:
    """A context for each member of a batch, ``(n, classes)``."""
    if context is None:
        return None
    return context.expand(*batch, -1).reshape(batch.numel(), context.shape[-1])
