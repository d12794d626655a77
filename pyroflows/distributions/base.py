"""Base distributions of flows, as modules whose tensors move with ``.to()``."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution

from pyroflows._pyro.memo import Kept

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class StandardNormal(dist.Independent):
    """``Normal(0, 1)`` over a whole event, its log-density in one pass."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Nats, of shape ``batch``."""
        dims = tuple(range(-len(self.event_shape), 0))
        count = self.event_shape.numel()
        square = value.square()
        square = square.sum(dim=dims) if dims else square  # over no dimensions torch sums all
        return -0.5 * square - count * _HALF_LOG_TWO_PI


class Logistic(dist.Logistic):
    """Pyro's, but finite: that draws minus infinity where its uniform number is zero.

    In single precision one number in 2^24 is, so one batch of pictures in a few hundred.
    """

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws ``(*sample, *batch)``, at the quantiles of uniform numbers."""
        shape = self._extended_shape(sample_shape)
        u = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
        u = u.clamp(min=torch.finfo(u.dtype).eps / 4)  # half of the least positive number drawn
        return self.loc + self.scale * (u.log() - (-u).log1p())


def arguments_of(distribution: Distribution) -> dict[str, Tensor]:
    """The tensors with which to construct a distribution again, by name; empty if none are found.

    They belong to a single parametrisation, as a constructor accepts only one: torch's
    ``lazy_property`` stores others beside it once they were read.
    """
    if isinstance(distribution, torch.distributions.Beta):  # keeps a Dirichlet
        names = ["concentration1", "concentration0"]
    elif isinstance(distribution, torch.distributions.MultivariateNormal):
        names = ["loc", "scale_tril"]
    else:
        names = [n for n in distribution.arg_constraints if n in distribution.__dict__]
    return {name: getattr(distribution, name) for name in names}


class Base(nn.Module):
    """The base distribution as a module: its tensors are buffers and move with ``.to()``.

    Args:
        distribution: any torch or Pyro distribution with plain tensor arguments (``Independent``
            around it is fine); None for a standard normal.
        shape: the event shape it must have.

    Raises:
        ValueError: the event shape differs, or the distribution's tensors cannot be found. Then
            pass a module whose call returns the distribution; it may have parameters too.
    """

    loc: Tensor  # of the standard normal; its scale moves with it

    def __init__(self, distribution: Distribution | None, shape: Size) -> None:
        super().__init__()
        self.wraps = 0
        self.is_standard = distribution is None
        self._standard: Kept[StandardNormal] = Kept()
        if distribution is None:
            self.kind: type[Distribution] = dist.Normal
            # Constants that say where and in which dtype to draw; nothing to save.
            self.register_buffer("loc", torch.zeros(shape), persistent=False)
            self.register_buffer("scale", torch.ones(shape), persistent=False)
            self.names = ["loc", "scale"]
            self.wraps = len(shape)
            return
        if distribution.batch_shape or distribution.event_shape != shape:
            raise ValueError(
                f"base: expected event shape {tuple(shape)} and no batch shape, got "
                f"{tuple(distribution.event_shape)} and {tuple(distribution.batch_shape)}; give "
                "it a parameter for each feature, and .to_event()"
            )
        while isinstance(distribution, torch.distributions.Independent):
            self.wraps += distribution.reinterpreted_batch_ndims
            distribution = distribution.base_dist
        self.kind = Logistic if type(distribution) is dist.Logistic else type(distribution)
        arguments = arguments_of(distribution)
        self.names = list(arguments)
        if not self.names:
            raise ValueError(
                f"base: cannot find the tensors of a {self.kind.__name__}; pass a torch.nn.Module "
                "whose call returns the distribution"
            )
        for name, value in arguments.items():
            self.register_buffer(name, value.detach().clone())

    def forward(self) -> Distribution:
        """The distribution from the buffers as they are now."""
        if self.is_standard:
            return self._standard_normal()
        made = self._made()
        return dist.Independent(made, self.wraps, validate_args=False) if self.wraps else made

    def _made(self) -> Distribution:
        arguments: dict[str, Any] = {name: self.get_buffer(name) for name in self.names}
        return self.kind(**arguments, validate_args=False)

    def _standard_normal(self) -> StandardNormal:
        """Made once for each place it is moved to."""
        return self._standard.get(
            [self.loc], lambda: StandardNormal(self._made(), self.wraps, validate_args=False)
        )

    def __repr__(self) -> str:
        shapes = {name: tuple(self.get_buffer(name).shape) for name in self.names}
        return f"{self.kind.__name__}({', '.join(f'{n}: {s}' for n, s in shapes.items())})"
