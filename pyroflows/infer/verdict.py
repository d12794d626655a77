"""Can this posterior be trusted? A verdict in words, and weights that correct the draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyroflows.infer.importance import (
    WeightedDraws,
    effective_size,
    importance_weights,
    khat_threshold,
    log_mean_exp,
    psis,
)

_FAR = 0.3  # posterior sd by which a mean may be off before the report warns
_EVEN = 0.99  # share of the draws that the weighted ones are worth, from which on weights are even


@dataclass(frozen=True)
class Report:
    """A guide judged by its importance weights; printable.

    Attributes:
        khat: shape of the weights' tail; minus infinity where all are equal.
        threshold: the largest k-hat that can be trusted with this many draws.
        ess: how many equally weighted draws the weighted ones are worth.
        elbo: the ELBO in nats, and ``elbo_error`` its standard error.
        elbo_error: see ``elbo``.
        evidence: the importance-weighted estimate of the log evidence in nats, and its error.
        evidence_error: see ``evidence``; not to be believed where k-hat is above the threshold.
        shift: for each site how far the weights move its means, in posterior sd, ``(*site shape)``.
        weighted: the draws with both densities.
        log_weights: smoothed, normalised log-weights that correct the draws, ``(draws,)``.

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> found = pf.report(model, model, num_samples=1000)
        >>> print(f"{found.khat} {found.ess:.0f} draws, {found.elbo:.3f} nats")
        -inf 1000 draws, 0.000 nats
    """

    khat: float
    threshold: float
    ess: float
    elbo: float
    elbo_error: float
    evidence: float
    evidence_error: float
    shift: dict[str, Tensor]
    weighted: WeightedDraws
    log_weights: Tensor

    @property
    def draws(self) -> dict[str, Tensor]:
        """The draws of every site, ``(draws, *site shape)``."""
        return self.weighted.draws

    @property
    def largest_shift(self) -> float:
        """The largest of ``shift``."""
        return max((s.abs().max().item() for s in self.shift.values() if s.numel()), default=0.0)

    @property
    def even(self) -> bool:
        """Whether the weighted draws are worth 99 % of their number, with a k-hat below 1.

        k-hat measures the shape of the weights' tail, not how much weight it has. With weights as
        even as this, a tail of finite mean moves no posterior mean by a tenth of a posterior sd.
        """
        return self.ess > _EVEN * len(self.log_weights) and self.khat < 1

    @property
    def trusted(self) -> bool:
        """Whether the weighted draws can be relied on, by a good k-hat or by even weights."""
        return self.khat < self.threshold or self.even

    def means(self) -> dict[str, Tensor]:
        """The weighted mean of every site."""
        return {name: _mean(value, self.log_weights) for name, value in self.draws.items()}

    def resample(self, count: int) -> dict[str, Tensor]:
        """Equally weighted draws, picked by weight with replacement.

        Args:
            count: how many.
        """
        index = torch.multinomial(self.log_weights.exp(), count, replacement=True)
        return {name: value[index] for name, value in self.draws.items()}

    @property
    def verdict(self) -> str:
        """A sentence in plain words."""
        if self.khat == -math.inf:
            return "Exact: all weights are equal, the guide is the posterior."
        if not self.trusted:
            return (
                f"Do not trust it: k-hat {self.khat:.2f} is above {self.threshold:.2f}, so neither "
                "the draws nor their weights can be relied on. Train longer, use a larger flow or "
                "another parametrisation, or run pf.NeuTra."
            )
        if self.largest_shift < 0.1 and (self.khat < 0.5 or self.even):
            return "Good: the draws can be used as they are."
        if self.largest_shift < _FAR:
            return (
                "Usable: take the weighted draws; the weights move a mean by "
                f"{self.largest_shift:.2f} posterior sd at most."
            )
        site = max(self.shift, key=lambda name: self.shift[name].abs().max().item())
        return (
            f"Use the weighted draws only: the weights move {site} by {self.largest_shift:.2f} "
            "posterior sd, so the guide itself is off."
        )

    def __str__(self) -> str:
        count = len(self.log_weights)
        return (
            f"k-hat     {self.khat:.2f}  (threshold {self.threshold:.2f} for {count} draws)\n"
            f"ESS       {self.ess:.0f} of {count}\n"
            f"ELBO      {self.elbo:.3f} +- {self.elbo_error:.3f} nats\n"
            f"evidence  {self.evidence:.3f} +- {self.evidence_error:.3f} nats, by importance\n"
            f"shift     {self.largest_shift:.3f} posterior sd at most, guide's against weighted "
            f"means\n{self.verdict}"
        )


@torch.no_grad()
def report(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 10_000,
    **kwargs: Any,
) -> Report:
    """Judge a guide by its importance weights.

    k-hat sees how heavy the tail of the weights is where the guide draws. Mass that the guide never
    draws, a second mode far off, leaves no trace in them.

    Args:
        model: a Pyro model.
        guide: any Pyro guide.
        *args: their arguments.
        num_samples: how many draws; 10,000 cost one run of a model that takes many at once.
        **kwargs: their keyword arguments.

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> print(pf.report(model, model, num_samples=1000).verdict)
        Exact: all weights are equal, the guide is the posterior.
    """
    found = importance_weights(model, guide, *args, num_samples=num_samples, **kwargs)
    log_weight = found.log_weight.double()
    log_weights, shape = psis(log_weight)
    count = len(log_weight)
    weights = log_weight.softmax(0)
    return Report(
        khat=shape,
        threshold=khat_threshold(count),
        ess=effective_size(log_weights),
        elbo=log_weight.mean().item(),
        elbo_error=log_weight.std().item() / count**0.5,
        evidence=log_mean_exp(log_weight).item(),
        # The delta method: the relative error of the mean weight.
        evidence_error=(weights - 1 / count).square().sum().sqrt().item(),
        shift={name: _shift(value, log_weights) for name, value in found.draws.items()},
        weighted=found,
        log_weights=log_weights,
    )


def _mean(value: Tensor, log_weights: Tensor) -> Tensor:
    weights = log_weights.exp().reshape(-1, *[1] * (value.dim() - 1))
    return (value.double() * weights).sum(0)


def _shift(value: Tensor, log_weights: Tensor) -> Tensor:
    """How far the weights move the mean, in weighted standard deviations."""
    mean = _mean(value, log_weights)
    spread = _mean((value.double() - mean).square(), log_weights).sqrt()
    moved = mean - value.double().mean(0)
    return torch.where(spread > 0, moved / spread.clamp(min=1e-300), torch.zeros_like(moved))
