"""The modes of a posterior: where they are, what each holds, and whether a guide misses one.

Newton ascents start far apart. Where two of them end is one mode unless the density dips between.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflows.distributions.flow import Flow
from pyroflows.distributions.mixture import MixtureFlow
from pyroflows.infer.proper import check_proper, values_of
from pyroflows.infer.start import (
    Gaussians,
    best_gaussians,
    climbed,
    from_ends,
    joined,
    same_draws,
)
from pyroflows.programs.log_density import ERRORS, LogDensity

MOST_MODES = 24
_CANDIDATES = 512
_PRIOR_DRAWS = 256
_FEW = 16  # candidates, and prior draws, where the model takes one at a time
_FEW_ASCENTS = 8  # side by side there
_BEST = 4  # candidates from which an ascent starts since their density is highest
_ENDED = 400  # up to so many dimensions a density's end is looked for along each
MOST_FULL = 4096  # up to so many dimensions a full covariance is worth its second derivatives
_ASCENTS = ((10, 24), (20, 12), (50, 5))  # up to so many dimensions so many ascents a round
_ROUNDS = 3  # of ascents; a second one only where the first has found several modes
_WITHIN = 7.0  # nats of the best ELBO within which a mode is worth a flow
_AT_END = 0.1  # standard deviations from an ascent's end, which are still the end
_SAME = 0.02  # spreads of where they start up to which ascents may have ended at the same place
_NEAR = 3.0  # standard deviations up to which two Gaussians are one
_DIP = 2.0  # nats by which the density between two modes is lower than at the lower one
_STEPS = 9  # points between two modes
_WEIGHED = 1000  # draws of each flow by which its share is found
_THIN = math.log(20)  # nats by which a guide's density is too low for mass to be covered by it
_MISSED = 0.03  # of the guide's evidence: mass that is worth a word


class Missed(NamedTuple):
    """Posterior mass that a guide hardly draws.

    Attributes:
        log_mass: a lower bound on its evidence in nats.
        loc: its middle, ``(D,)``.
    """

    log_mass: float
    loc: Tensor


def gaussian_starts(log_p: LogDensity, start: Tensor, narrow: Tensor, climb: bool) -> Gaussians:
    """The Gaussian of each mode that was found, the best first; one where nothing is known.

    The random points are the same each time, so that processes and resumed runs agree.

    Args:
        log_p: of the model.
        start: the first point tried, ``(D,)``.
        narrow: the factor ``(D, D)`` where no better one is found or wanted.
        climb: whether to search for better ones.

    Raises:
        ValueError: the model's log-density is finite at no point.
    """
    with same_draws():
        try:
            points, values = _candidates(log_p, start, climb)
        except ERRORS:  # the first step of training raises the model's error
            return _one(start, narrow)
        first = _first(points, values)
        if not len(first):
            raise ValueError(_where_not_finite(log_p, start))
        found = _modes(log_p, first, points, values) if climb else _none(first)
        if not len(found.elbo):  # nor is there one where nothing bends the density
            found = _one(first[0], narrow)
        if climb and len(start) <= _ENDED:
            check_proper(log_p, found.loc[0], found.tril[0])
    return found


def _one(loc: Tensor, tril: Tensor) -> Gaussians:
    return Gaussians(loc.new_zeros(1), loc[None], tril[None], loc[None], tril[None] * math.nan)


def _none(points: Tensor) -> Gaussians:
    points = points[:0]
    square = points[..., None] * points[:, None]
    return Gaussians(points[:, 0], points, square, points, square)


def _where_not_finite(log_p: LogDensity, start: Tensor) -> str:
    """The message for a model whose log-density is nowhere finite."""
    try:
        with torch.no_grad():
            trace = log_p.trace(start)
    except ERRORS as error:
        return f"model: it raises {type(error).__name__} near its start: {error}"
    bad = [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not torch.isfinite(site["log_prob_sum"])
    ]
    return (
        f"model: the log-density of site {', '.join(map(repr, bad)) or 'its sum'} is NaN or "
        "infinite at the start and at 512 points around it; check its support and its data, "
        "or pass another init_loc_fn="
    )


def _ascents(log_p: LogDensity, size: int) -> int:
    """How many go on side by side: in many dimensions each is expensive."""
    found = next((count for most, count in _ASCENTS if size <= most), 1)
    return min(found, _FEW_ASCENTS) if log_p.batching == "alone" else found


def _candidates(log_p: LogDensity, start: Tensor, climb: bool) -> tuple[Tensor, Tensor]:
    """``start``, random points around it and draws of the prior, with their log-densities."""
    if log_p.batching is None:
        log_p.settle(start)
    alone = log_p.batching == "alone"
    count = (_FEW if alone else _CANDIDATES) // 2
    parts = [
        start[None],
        start + torch.randn(count, len(start)).to(start),
        4 * torch.rand(count, len(start)).to(start) - 2,
    ]
    if climb and _ascents(log_p, len(start)) > 1:
        parts.append(log_p.prior_draws(_FEW if alone else _PRIOR_DRAWS, start))
    points = torch.cat(parts)
    return points, values_of(log_p, points)


def _first(points: Tensor, values: Tensor) -> Tensor:
    """The start and the best four of the other points, where the density is finite."""
    best = values[1:].topk(_BEST).indices + 1
    chosen = torch.cat([best.new_zeros(1), best])
    return points[chosen[values[chosen].isfinite()]]


def _far_apart(points: Tensor, values: Tensor, taken: Tensor, count: int) -> Tensor:
    """Points of decent density, each drawn by its squared distance from those before it.

    As k-means++ does (Arthur & Vassilvitskii 2007); units are the points' own spread.
    """
    decent = values.isfinite() & points.isfinite().all(1)
    decent &= values >= values[decent].median()
    pool = points[decent]
    spread = pool.std(0, correction=0)
    unit = torch.where(spread > 0, spread, 1.0)
    distance = torch.cdist(pool / unit, taken / unit).amin(1).square()
    chosen: list[Tensor] = []
    while len(chosen) < count and distance.max() > 0:
        chosen.append(pool[torch.multinomial(distance, 1)])
        distance = distance.minimum(((pool - chosen[-1]) / unit).square().sum(1))
    return torch.cat([taken[:0], *chosen])


def _modes(log_p: LogDensity, first: Tensor, points: Tensor, values: Tensor) -> Gaussians:
    """The Gaussians of ascents that ended in modes of their own, the best first."""
    count = _ascents(log_p, first.shape[1])
    if first.shape[1] > MOST_FULL:
        return _none(first)
    taken = first[:count]
    more = _far_apart(points, values, taken, count - len(taken))
    found = best_gaussians(log_p, taken[:1])
    found = _distinct(log_p, _with_others(log_p, found, torch.cat([taken[1:], more])))
    for _ in range(_ROUNDS - 1):
        if len(found.elbo) < 2:
            break
        before = len(found.elbo)
        taken = torch.cat([taken, more])
        more = _far_apart(points, values, taken, 2 * count)
        found = _distinct(log_p, _with_others(log_p, found, more))
        if len(found.elbo) == before:
            break
    return found


def _with_others(log_p: LogDensity, found: Gaussians, points: Tensor) -> Gaussians:
    """Gaussians, and those of ascents from other points.

    Where the best on an ascent was at its end, the density is Gaussian there, and those that lead
    to the same end bring nothing. Else each way may meet a better one.
    """
    at_ends = (from_ends(found.loc, found) < _AT_END).all()
    more = _elsewhere(log_p, found, points) if at_ends else best_gaussians(log_p, points)
    return joined([found, more])


def _elsewhere(log_p: LogDensity, known: Gaussians, points: Tensor) -> Gaussians:
    """The Gaussians of ascents that do not end where a known one did.

    Of those that end at the same place one is judged by draws on its way, by which it is then told
    whether the place is the same.
    """
    if not len(points):
        return _none(points)
    unit = points.std(0, correction=0).clamp(min=1e-12)
    points, ends = _left(points, climbed(log_p, points, known, _NEAR), known)
    if not len(points):
        return _none(points)
    chosen = _first_of_each(torch.cdist(ends / unit, ends / unit) < _SAME)
    found = best_gaussians(log_p, points[chosen])
    rest = torch.ones(len(points), dtype=torch.bool)
    rest[chosen] = False
    points, ends = _left(points[rest], ends[rest], found)
    return joined([found, best_gaussians(log_p, points)]) if len(points) else found


def _left(points: Tensor, ends: Tensor, known: Gaussians) -> tuple[Tensor, Tensor]:
    """Those points whose ascents end elsewhere, and these ends."""
    others = from_ends(ends, known) >= _NEAR
    return points[others], ends[others]


def _distinct(log_p: LogDensity, found: Gaussians) -> Gaussians:
    """The best Gaussian of each mode, the best first, without those of hardly any mass."""
    order = found.elbo.argsort(descending=True)
    best = found.elbo[order[0]]
    found = found.at(order[(found.elbo[order] >= best - _WITHIN) & (best > -math.inf)])
    found = _groups_best(found, _sees(found) < _NEAR)
    found = found.at(list(range(min(MOST_MODES, len(found.elbo)))))
    if len(found.elbo) < 2:
        return found
    # The ends too: the way between two Gaussians on a bent ridge leaves it.
    return _groups_best(found, ~(_dips(log_p, found.loc) & _dips(log_p, found.end)))


def _groups_best(found: Gaussians, alike: Tensor) -> Gaussians:
    """The first of each group: those alike to it, to those that are, and so on."""
    return found.at(_first_of_each(alike))


def _first_of_each(alike: Tensor) -> list[int]:
    """The numbers of the first of each group of things that are alike, ``(n, n)``."""
    left = torch.ones(len(alike), dtype=torch.bool, device=alike.device)
    chosen = []
    for i in range(len(alike)):
        if left[i]:
            chosen.append(i)
            left &= ~alike[i]
            left[i] = False
    return chosen


def _sees(found: Gaussians) -> Tensor:
    """How many standard deviations apart two Gaussians are by the wider, ``(n, n)``."""
    gap = (found.loc[None] - found.loc[:, None]).mT
    apart = torch.linalg.solve_triangular(found.tril, gap, upper=False).norm(dim=1)
    return apart.minimum(apart.mT)


def _dips(log_p: LogDensity, ends: Tensor) -> Tensor:
    """Between which of the points ``(n, D)`` the density is lower than at both, ``(n, n)``."""
    count = len(ends)
    along = torch.linspace(0, 1, _STEPS + 2).to(ends)[:, None]
    i, j = torch.triu_indices(count, count, 1).to(ends.device)
    ways = ends[i, None] + along * (ends[j] - ends[i])[:, None]
    values = values_of(log_p, ways.flatten(0, 1)).reshape(len(i), -1)
    lower = values[:, 0].minimum(values[:, -1])
    dips = torch.zeros(count, count, dtype=torch.bool, device=ends.device)
    dips[i, j] = dips[j, i] = values.amin(1) < lower - _DIP
    return dips


@torch.no_grad()
def weigh(flow: MixtureFlow, log_p: LogDensity) -> None:
    """Give each flow the share of the posterior that importance weights find around it.

    Draws of all flows, weighted against their even mixture, are told apart by the flows' densities,
    the shares by which they are told being those that come out (population Monte Carlo; Cappe et
    al. 2008, arXiv:0710.4242). So flows that overlap share what they both cover. Costs 1000 draws
    of each flow and a run of the model.

    Args:
        flow: whose shares are set.
        log_p: of the model.
    """
    points = torch.cat([each.sample((_WEIGHED,)) for each in flow.components])
    log_q = torch.stack([each.log_prob(points) for each in flow.components])
    log_w = values_of(log_p, points) - (log_q.logsumexp(0) - math.log(len(log_q)))
    evidence = log_w.logsumexp(0) - math.log(len(points))
    if not evidence.isfinite():
        return
    # A weight far above all others says little (truncation as by Ionides 2008).
    log_w = log_w.clamp(max=(evidence + 0.5 * math.log(len(points))).item())
    log_shares = torch.zeros_like(flow.log_weights)
    for _ in range(100):
        belongs = (log_shares[:, None] + log_q).log_softmax(0)
        log_shares = (belongs + log_w).logsumexp(1).log_softmax(0).clamp(min=-30.0)
    flow.log_weights.copy_(log_shares + evidence)


@torch.no_grad()
def missed_mass(log_p: LogDensity, flow: Flow | MixtureFlow, evidence: float) -> Missed | None:
    """Mass that new ascents find where the flow's density is below a twentieth of the posterior's.

    Costs as much as the search for the first Gaussian, and 128 draws of each that it finds. In
    over 50 dimensions, and where the model sees a part of its rows at a time, nothing is looked
    for.

    Args:
        log_p: of the model.
        flow: of the guide.
        evidence: the log evidence in nats by the guide's draws.
    """
    start = flow.sample((1,))[0]
    if log_p.batching is None:
        log_p.settle(start)
    count = _ascents(log_p, len(start))
    if count == 1 or not math.isfinite(evidence):
        return None
    if log_p.subsampled(start):  # each run sees other rows than the evidence, which is of all
        return None
    try:
        points, values = _candidates(log_p, start, climb=True)
        starts = _far_apart(points, values, _first(points, values)[:1], count)
        found = _distinct(log_p, _elsewhere(log_p, _none(starts), starts))
    except ERRORS:
        return None
    each = [
        _uncovered(log_p, flow, evidence, loc, tril)
        for loc, tril in zip(found.loc, found.tril, strict=True)
    ]
    return max(filter(None, each), key=lambda missed: missed.log_mass, default=None)


def _uncovered(
    log_p: LogDensity, flow: Flow | MixtureFlow, evidence: float, loc: Tensor, tril: Tensor
) -> Missed | None:
    """The mass under a Gaussian that a flow does not cover, if it is worth a word."""
    noise = torch.randn(128, len(loc)).to(loc)
    draws = loc + noise @ tril.mT
    here = values_of(log_p, draws)
    bare = here - evidence - flow.log_prob(draws) > _THIN
    if not bare.any():
        return None
    log_normal = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(1)
    log_w = here - (log_normal - tril.diagonal().log().sum())
    # By Jensen's inequality: few draws of great weight cannot raise it.
    mass = bare.to(log_w).mean().log() + log_w[bare].mean()
    if mass < evidence + math.log(_MISSED):
        return None
    return Missed(mass.item(), loc)
