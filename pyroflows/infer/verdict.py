"""Can this posterior be trusted? A verdict in words, and weights that correct the draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyroflows.infer.guides import AutoFlow
from pyroflows.infer.importance import (
    Moved,
    WeightedDraws,
    effective_size,
    importance_weights,
    khat_threshold,
    log_mean_exp,
    psis,
    structure_as_of,
)
from pyroflows.infer.modes import missed_mass
from pyroflows.infer.neutra import share_beyond
from pyroflows.programs.circles import about_mean, circular_mean
from pyroflows.programs.log_density import LogDensity
from pyroflows.structured.walk import share_beyond_of_globals

_NEAR = 0.1  # posterior sd by which a mean may be off without being worth a word
_FAR = 0.3  # posterior sd by which a mean may be off before the report warns
_EVEN = 0.99  # share of the draws that the weighted ones are worth, from which on weights are even
_ALL_EVEN = 0.999  # and from which on their tail is that of next to nothing, whatever its shape


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
        shift: for each site how far the weights move its means, in posterior sd, ``(*site shape)``;
            of an angle, measured from its mean direction on.
        weighted: the draws with both densities.
        log_weights: smoothed, normalised log-weights that correct the draws, ``(draws,)``.
        missed: posterior mass that the guide hardly draws, in words; empty where none was found.
        beyond: the same of mass that chains from its draws walk into, at its own edges.
        angles: names of the sites that an ``AutoFlow`` knows for angles.

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
    missed: str = ""
    beyond: str = ""
    angles: tuple[str, ...] = ()

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
        """Whether weighted draws are worth 99 % of their number, with a k-hat below 1, or 99.9 %.

        k-hat measures the shape of the weights' tail, not how much weight it has. With weights as
        even as this, a tail of finite mean moves no posterior mean by a tenth of a posterior sd;
        and the mean is finite (it is the evidence), though k-hat, of a few weights that hardly
        differ, may come out above 1.
        """
        share = self.ess / len(self.log_weights)
        return share > _ALL_EVEN or (share > _EVEN and self.khat < 1)

    @property
    def trusted(self) -> bool:
        """Whether the weighted draws can be relied on, by a good k-hat or by even weights.

        Never where mass was found that the guide hardly draws.
        """
        found = self.missed or self.beyond
        return not found and (self.khat < self.threshold or self.even)

    @property
    def good(self) -> bool:
        """Whether the draws can be used as they are, without their weights."""
        small = self.largest_shift < _NEAR and (self.khat < 0.5 or self.even)
        return self.trusted and (self.khat == -math.inf or small)

    def means(self) -> dict[str, Tensor]:
        """The weighted mean of every site, of an ``AutoFlow``'s angles the mean direction."""
        return {
            name: (_direction if name in self.angles else _mean)(value, self.log_weights)
            for name, value in self.draws.items()
        }

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
        if self.missed:
            return (
                f"Do not trust it: {self.missed}. Set up and train another guide, a larger one or "
                "from another init_loc_fn=, or write the model so that it has one mode."
            )
        if self.beyond:
            return (
                f"Do not trust it: {self.beyond}. Train longer, use a larger flow or another "
                "parametrisation, or run pf.NeuTra."
            )
        if self.khat == -math.inf:
            return "Exact: all weights are equal, the guide is the posterior."
        if not self.trusted:
            return (
                f"Do not trust it: k-hat {self.khat:.2f} is above {self.threshold:.2f}, so neither "
                "the draws nor their weights can be relied on. Train longer, use a larger flow or "
                "another parametrisation, or run pf.NeuTra."
            )
        if self.good:
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
        rows = self.weighted.rows
        integrated = f"rows      {rows}, each integrated given all other numbers\n" if rows else ""
        return (
            f"{integrated}"
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
    draws, a second mode far off, leaves no trace in them. So for an ``AutoFlow`` of up to 50
    dimensions new Newton ascents look for it, from other points than ``setup``, at its cost.
    They bound from below the evidence where the guide has less than a twentieth of the density that
    it should have; above 3 % of all the verdict says where, and how much. A mode that no ascent
    meets stays unseen. Where all that is well, short chains start from the guide's draws, and the
    verdict says likewise where they walk off, into a tail of which the guide draws too little: at
    the cost of 120 training steps of twice the particles, or fewer where the data are many, and not
    of models that run draw by draw or see a part of their rows.

    Of a large model whose rows are independent given the globals (``guide.learned.groups``) rows
    are integrated one by one, given draws of the globals, by 16 points of the guide each: weights,
    k-hat and evidence are then those of the globals, without bias, and ``shift`` has what weights
    within rows do too, on the unconstrained scale. Fewer draws are taken than asked for where these
    would take minutes, or keep over 4 million numbers; 200 at the least. Chains walk over the
    globals alone, by 800 searches for the modes of all rows.

    Args:
        model: a Pyro model.
        guide: any Pyro guide.
        *args: their arguments.
        num_samples: how many draws; 10,000 cost one run of a model that takes many at once. Of a
            mixture of flows they are scored by each, at the cost of its slow direction.
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
    evidence = log_mean_exp(log_weight).item()
    angles = guide.angles if isinstance(guide, AutoFlow) else ()
    judged = Report(
        khat=shape,
        threshold=khat_threshold(count),
        ess=effective_size(log_weights),
        elbo=log_weight.mean().item(),
        elbo_error=log_weight.std().item() / count**0.5,
        evidence=evidence,
        # The delta method: the relative error of the mean weight.
        evidence_error=(weights - 1 / count).square().sum().sqrt().item(),
        shift=_shifts(found, log_weights, angles),
        weighted=found,
        log_weights=log_weights,
        angles=angles,
    )
    if not isinstance(guide, AutoFlow):
        return judged
    log_p = guide.log_density(args, kwargs, model)
    mass = missed_mass(log_p, guide.flow, evidence)
    if mass is not None:
        place = guide.constrained(mass.loc[None], args, kwargs)
        return replace(judged, missed=_told(place, found.draws, mass.log_mass - evidence))
    if not judged.trusted or (guide.structured and not found.rows):
        return judged
    if guide.structured:
        walked, hidden = _walked_over_globals(log_p, guide)
    else:
        walked, hidden = share_beyond(log_p, guide.flow, evidence), []
    if walked is not None:
        place = guide.constrained(walked[1], args, kwargs)
        place = {name: value for name, value in place.items() if name not in hidden}
        log_ratio = math.log(walked[0]) - math.log1p(-min(walked[0], 0.99))
        return replace(judged, beyond=_told(place, found.draws, log_ratio))
    return judged


def _walked_over_globals(
    log_p: LogDensity, guide: AutoFlow
) -> tuple[tuple[float, Tensor] | None, list[str]]:
    """What chains over the globals find, and the names of the sites that are rows."""
    structure = structure_as_of(guide, log_p)
    if structure is None:
        return None, []
    is_row = torch.ones(guide.latent_dim, dtype=torch.bool)
    is_row[structure.globals] = False
    return share_beyond_of_globals(log_p, guide.flows[0], structure), guide.sites_of(is_row)


def _told(place: dict[str, Tensor], draws: dict[str, Tensor], log_ratio: float) -> str:
    """Where mass is missed, by the number that is farthest from the draws, and how much.

    Args:
        place: each site's values there, ``(n, *site shape)``.
        draws: of the guide.
        log_ratio: the mass missed over the evidence found, in nats.
    """
    far: dict[str, float] = {}
    for name, value in place.items():
        drawn = draws[name].double().reshape(len(draws[name]), -1)
        points = value.double().reshape(len(value), -1)
        # In units of the points' own spread where there are several: chance moves wide ones far.
        unit = (points if len(points) > 1 else drawn).std(0).clamp(min=1e-12)
        middle = points.median(0).values
        off = ((middle - drawn.mean(0)) / unit).abs()
        index = int(off.argmax())
        label = name if drawn.shape[1] == 1 else f"{name}, number {index},"
        far[f"{label} = {middle[index].item():.3g}"] = off[index].item()
    share = 100 * torch.tensor(log_ratio).sigmoid()
    return (
        f"there is posterior mass near {max(far, key=far.__getitem__)} that the guide hardly "
        f"draws, at least {share:.0f} % of all (the evidence is short by "
        f"{math.log1p(math.exp(min(log_ratio, 700))):.2f} nats or more)"
    )


def _mean(value: Tensor, log_weights: Tensor) -> Tensor:
    return (value.double() * _weights(value, log_weights)).sum(0)


def _weights(value: Tensor, log_weights: Tensor) -> Tensor:
    return log_weights.exp().reshape(-1, *[1] * (value.dim() - 1))


def _direction(value: Tensor, log_weights: Tensor) -> Tensor:
    """The weighted mean direction of angles."""
    return circular_mean(value.double(), _weights(value, log_weights))


def _unwound(value: Tensor, log_weights: Tensor) -> Tensor:
    """Angles about their weighted mean direction, so that no seam is where they are most."""
    return about_mean(value.double(), _weights(value, log_weights))


def _shifts(
    found: WeightedDraws, log_weights: Tensor, angles: tuple[str, ...]
) -> dict[str, Tensor]:
    """How far the weights move each site's mean, those within rows too where they have some."""
    moved = found.moved
    if moved is None:
        draws = {k: _unwound(v, log_weights) if k in angles else v for k, v in found.draws.items()}
        moved = {name: Moved(value, value, value) for name, value in draws.items()}
    return {name: _shift(*of_site, log_weights) for name, of_site in moved.items()}


def _shift(picked: Tensor, by_weight: Tensor, plain: Tensor, log_weights: Tensor) -> Tensor:
    """How far the weights move the mean, in weighted standard deviations."""
    spread = _mean((picked.double() - _mean(picked, log_weights)).square(), log_weights).sqrt()
    change = _mean(by_weight, log_weights) - plain.double().mean(0)
    # Rounding gives a spread, and a move of its size, to numbers that never vary.
    varies = (picked.amax(0) != picked.amin(0)) & (spread > 0)
    return torch.where(varies, change / spread.clamp(min=1e-300), torch.zeros_like(change))
