"""What calling a ``PixelCNN`` returns: a Pyro distribution over images of whole numbers.

It knows of shapes and checks; probabilities and draws are the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from pyroflows._checks import as_size, check_shape, common_batch
from pyroflows.discrete.levels import check_levels
from pyroflows.discrete.pixel_scores import PixelScores


class PixelDistribution(TorchDistribution):
    """What calling a ``PixelCNN`` returns: images ``(colours, height, width)`` of whole numbers.

    Args:
        model: what scores and draws; its parameters decide, as they are when it is asked.
        context: ``(*batch, classes)``, or None; its batch shape is the distribution's.
        batch_shape: the batch shape, where there is no context.
        validate_args: as everywhere in torch.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self,
        model: PixelScores,
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
        # Without a context an image has one score, whatever the distribution's batch shape.
        scored = value.shape[:-3] if self.context is None else batch
        images = value.expand(scored + self.event_shape).reshape(scored.numel(), *self.event_shape)
        scores = self.model.score(images, rows_of(self.context, scored))
        return scores.reshape(scored).expand(batch)

    @torch.no_grad()
    def sample(self, sample_shape: int | Sequence[int] = ()) -> Tensor:
        """Images ``(*sample, *batch, colours, height, width)`` of integers, about one pass."""
        batch = as_size(sample_shape) + self.batch_shape
        blank = torch.zeros(batch.numel(), *self.event_shape, device=self.model.device)
        known = torch.zeros_like(blank, dtype=torch.bool)
        images = self.model.fill(blank, known, rows_of(self.context, batch))
        return images.reshape(batch + self.event_shape)

    def __repr__(self) -> str:
        return (
            f"PixelDistribution(batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)}, bins={self.model.bins})"
        )


def rows_of(context: Tensor | None, batch: Size) -> Tensor | None:
    """A context for each member of a batch, ``(n, classes)``."""
    if context is None:
        return None
    return context.expand(*batch, -1).reshape(batch.numel(), context.shape[-1])
