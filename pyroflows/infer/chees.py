"""ChEES-HMC: many chains at once, which tune their steps and trajectories by looking at each other.

Knows nothing of flows or models: a function over a batched log-density.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DIVERGED = 1000.0  # nats of energy gained, as in Stan
TARGET = 0.651  # harmonic mean of the acceptance (Hoffman, Radul & Sountsov 2021, section 3.2)
JITTER = 0.6  # trajectories last between 1 - JITTER and 1 times the tuned length
LONGEST = 1000  # leapfrogs a trajectory
SHORTER = (
    0.5  # mean of the exponential law by whose draw a chain's step is shorter, logarithmically
)
_LEAST = 1e-3  # acceptance: one chain that is stuck must not make the step of all vanish


class Point(NamedTuple):
    """Where the chains are: ``z`` and the gradient ``(chains, D)``, ``log_p`` ``(chains,)``."""

    z: Tensor
    log_p: Tensor
    gradient: Tensor


class Proposal(NamedTuple):
    """Where trajectories end; ``energy`` at their start and ``gained`` along them, in nats."""

    end: Point
    momentum: Tensor
    length: Tensor
    energy: Tensor
    gained: Tensor
    diverging: Tensor


class Chains(NamedTuple):
    """What ``chees`` returns.

    Attributes:
        draws: ``(chains, draws, D)``.
        energy: of each draw, potential and kinetic, in nats, ``(chains, draws)``.
        acceptance: probability with which each proposal was taken, ``(chains, draws)``.
        diverging: whether its trajectory diverged, ``(chains, draws)``.
        leapfrogs: gradients each draw took, alike for all chains, ``(draws,)``.
        step_size: of a leapfrog, in units of ``scale``.
        trajectory: the tuned length, in units of ``scale``.
        scale: the coordinates' standard deviations in the metric, ``(D,)``.
    """

    draws: Tensor
    energy: Tensor
    acceptance: Tensor
    diverging: Tensor
    leapfrogs: Tensor
    step_size: float
    trajectory: float
    scale: Tensor


@torch.no_grad()
def chees(
    log_density: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    draws: int,
    warmup: int,
    target: float = TARGET,
    tell: Callable[[float, float], None] | None = None,
) -> Chains:
    """Hamiltonian Monte Carlo of all chains at once, without anything to tune.

    Every step draws new momenta and walks all chains through as many leapfrogs, one gradient of the
    batch each; lengths are jittered by a Halton sequence, and each chain's step is at random
    somewhat shorter, so that none stays stuck where the density is narrow. Warm-up adapts, for all
    chains together, the step size (dual averaging on the harmonic mean of the acceptance), the
    trajectory length (Adam on its logarithm, up the change of the estimator of expected squares,
    ``E[(|x' - E x'|^2 - |x - E x|^2)^2] / 4``) and a diagonal metric (the spread across chains).
    Afterwards nothing adapts, and the chains leave the density invariant.

    A trajectory that meets a density or gradient that is not finite, or gains 1,000 nats, is held
    where it began and rejected: it counts as diverging.

    Source: Hoffman, Radul & Sountsov 2021, AISTATS, "An adaptive MCMC scheme for setting trajectory
    lengths in Hamiltonian Monte Carlo"; the metric after Sountsov & Hoffman 2021, arXiv:2110.11576.

    Args:
        log_density: of ``(chains, D)``, in nats, ``(chains,)``; each row's depends on it alone.
        start: ``(chains, D)``, two chains or more, best draws of something near the density.
        draws: kept of each chain.
        warmup: steps before, which adapt.
        target: harmonic mean of the acceptance; nearer to 1 means smaller steps.
        tell: called after each step with the mean acceptance and the step size.

    Raises:
        ValueError: fewer than two chains, or a density or gradient that is not finite at the start.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> scale = torch.tensor([1.0, 100.0])
        >>> def log_density(z):
        ...     return -(z / scale).square().sum(-1) / 2
        >>> chains = chees(log_density, torch.randn(32, 2), draws=100, warmup=200)
        >>> chains.draws.shape
        torch.Size([32, 100, 2])
        >>> bool(((chains.draws.flatten(0, 1).std(0) / scale - 1).abs() < 0.1).all())
        True
    """
    if start.dim() != 2 or len(start) < 2:
        raise ValueError(f"start: expected (chains, D), two chains or more, got {start.shape}")
    here = evaluate(log_density, start)
    if not _finite(here).all():
        raise ValueError("start: the density or its gradient is not finite at some of the starts")
    tuned = Adaptation(first_step(log_density, here), start, target)
    kept, leapfrogs = [], []
    for index in range(1, warmup + draws + 1):
        if index == warmup + 1:
            tuned.settle()
        length = (1 - JITTER + JITTER * _halton(index)) * tuned.trajectory
        count = min(max(1, math.ceil(length / tuned.step)), LONGEST)
        proposal = trajectory(log_density, here, tuned.step, count, tuned.scale)
        acceptance = (-proposal.gained).exp().clamp(max=1.0)
        taken = torch.rand_like(acceptance) < acceptance
        there = chosen(taken, proposal.end, here)
        if index <= warmup:
            tuned.update(here, proposal, acceptance, there.z)
        else:
            energy = torch.where(taken, proposal.energy + proposal.gained, proposal.energy)
            kept.append((there.z, energy, acceptance, proposal.diverging))
            leapfrogs.append(count)
        here = there
        if tell is not None:
            tell(acceptance.mean().item(), tuned.step)
    z, energies, acceptances, diverging = (torch.stack(v, dim=1) for v in zip(*kept, strict=True))
    return Chains(
        draws=z,
        energy=energies,
        acceptance=acceptances,
        diverging=diverging,
        leapfrogs=torch.tensor(leapfrogs),
        step_size=tuned.step,
        trajectory=tuned.trajectory,
        scale=tuned.scale,
    )


class Adaptation:
    """Step size, trajectory length and metric of all chains, from what happened in a step.

    Args:
        step: a step size to begin with.
        start: where the chains begin, ``(chains, D)``.
        target: harmonic mean of the acceptance.
    """

    def __init__(self, step: float, start: Tensor, target: float) -> None:
        self.step, self.trajectory, self.target = step, 1.0, target
        self.scale = torch.ones_like(start[0])
        self._steps, self._centre, self._lack = 0, math.log(step), 0.0
        self._log_length, self._squares = 0.0, 0.0
        self._averaged_step, self._averaged_length = math.log(step), 0.0
        self._mean, self._variance = start.mean(0), self.scale.clone()

    def update(self, here: Point, proposal: Proposal, acceptance: Tensor, z: Tensor) -> None:
        """Adapt to trajectories from ``here``, after which the chains are at ``z``."""
        self._steps += 1
        self._update_length(here, proposal, acceptance)
        self._update_step(1 / (1 / acceptance.clamp(min=_LEAST)).mean().item())
        self._update_metric(z)

    def settle(self) -> None:
        """Take the averages of what was tried."""
        self.step = math.exp(self._averaged_step)
        self.trajectory = math.exp(self._averaged_length)

    def _update_step(self, acceptance: float) -> None:
        """Dual averaging (Nesterov 2009), with the constants of Hoffman & Gelman 2014."""
        self._lack += (self.target - acceptance - self._lack) / (self._steps + 10)
        log_step = self._centre - self._steps**0.5 / 0.05 * self._lack
        weight = self._steps**-0.75
        self._averaged_step += weight * (log_step - self._averaged_step)
        self.step = math.exp(log_step)

    def _update_length(self, here: Point, proposal: Proposal, acceptance: Tensor) -> None:
        """Adam without momentum, up the gradient of the criterion in the logarithmic length."""
        weight = acceptance / acceptance.sum().clamp(min=_LEAST)
        before, after = here.z / self.scale, proposal.end.z / self.scale
        before, after = before - before.mean(0), after - weight @ after
        change = after.square().sum(-1) - before.square().sum(-1)
        along = proposal.length * (after * proposal.momentum).sum(-1)
        slope = (weight * change * along).sum().item()
        if math.isfinite(slope) and slope:
            self._squares += 0.05 * (slope**2 - self._squares)
            # A division by what the average can be after so few steps, as Adam does.
            usual = (self._squares / (1 - 0.95**self._steps)) ** 0.5
            self._log_length += 0.05 * slope / usual
        # Never beyond what so many leapfrogs reach, or an overlong trajectory would go on growing.
        self._log_length = min(self._log_length, math.log(self.step * LONGEST))
        share = max(2 / (self._steps + 1), 0.05)
        self._averaged_length += share * (self._log_length - self._averaged_length)
        self.trajectory = math.exp(self._log_length)

    def _update_metric(self, z: Tensor) -> None:
        """The variance across chains, averaged over the last part of the steps, shrunk to one."""
        weight = 1 / math.ceil(self._steps / 8 + 1)
        self._mean = self._mean + weight * (z.mean(0) - self._mean)
        spread = (z - self._mean).square().mean(0)
        self._variance = self._variance + weight * (spread - self._variance)
        seen = len(z) * self._steps
        self.scale = ((seen * self._variance + 5) / (seen + 5)).sqrt()


def evaluate(log_density: Callable[[Tensor], Tensor], z: Tensor) -> Point:
    """The log-density and its gradient at ``z``, ``(chains, D)``."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        log_p = log_density(z)
        (gradient,) = torch.autograd.grad(log_p.sum(), z)
    return Point(z.detach(), log_p.detach(), gradient)


def trajectory(
    log_density: Callable[[Tensor], Tensor], start: Point, step: float, count: int, scale: Tensor
) -> Proposal:
    """Leapfrogs of all chains from new momenta.

    Args:
        log_density: of ``(chains, D)``.
        start: where the chains are.
        step: size of a leapfrog at most, in units of ``scale``.
        count: of leapfrogs.
        scale: ``(D,)``, the inverse square roots of the masses.
    """
    shorter = torch.empty_like(start.log_p).exponential_(1 / SHORTER)
    steps = (step * (-shorter).exp())[:, None]
    momentum = torch.randn_like(start.z)
    energy = momentum.square().sum(-1) / 2 - start.log_p
    here, gained = start, torch.zeros_like(energy)
    diverging = torch.zeros_like(energy, dtype=torch.bool)
    for _ in range(count):
        momentum = momentum + steps / 2 * scale * here.gradient
        # A chain that diverged stays at its start: a model may raise where no finite number leads.
        moved = torch.where(diverging[:, None], start.z, here.z + steps * scale * momentum)
        moved = torch.where(moved.isfinite().all(-1, keepdim=True), moved, start.z)
        there = evaluate(log_density, moved)
        momentum = momentum + steps / 2 * scale * there.gradient
        gained = momentum.square().sum(-1) / 2 - there.log_p - energy
        diverging = diverging | ~_finite(there) | ~(gained <= DIVERGED)
        here = chosen(diverging, start, there)
        momentum = torch.where(diverging[:, None], torch.zeros_like(momentum), momentum)
    gained = gained.masked_fill(diverging, math.inf)
    return Proposal(here, momentum, count * steps[:, 0], energy, gained, diverging)


def first_step(log_density: Callable[[Tensor], Tensor], here: Point) -> float:
    """One, halved until one leapfrog is accepted half the time."""
    step, scale = 1.0, torch.ones_like(here.z[0])
    for _ in range(50):
        gained = trajectory(log_density, here, step, 1, scale).gained
        if (-gained).exp().clamp(max=1.0).mean() > 0.5:
            break
        step /= 2
    return step


def _finite(point: Point) -> Tensor:
    return point.log_p.isfinite() & point.gradient.isfinite().all(-1)


def chosen(rows: Tensor, one: Point, other: Point) -> Point:
    """Of each chain one point or the other."""
    row = rows[:, None]
    return Point(
        torch.where(row, one.z, other.z),
        torch.where(rows, one.log_p, other.log_p),
        torch.where(row, one.gradient, other.gradient),
    )


def _halton(index: int) -> float:
    """Van der Corput's sequence in base 2, which fills (0, 1) more evenly than draws do."""
    value, share = 0.0, 0.5
    while index:
        value, index, share = value + share * (index % 2), index // 2, share / 2
    return value
