"""Models whose means solve a differential equation, by Runge-Kutta steps of a fixed size."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from priors import Restricted, positive_vector
from regressions import Data
from torch import Tensor

# Steps between two observations.
LOTKA_VOLTERRA_STEPS = 10
ELIMINATION_STEPS = 10


def lotka_volterra(data: Data, steps: int = LOTKA_VOLTERRA_STEPS) -> None:
    """Hares and lynxes, 1900-1920: u' = (alpha - beta v) u, v' = (-gamma + delta u) v.

    Solved for log u and log v, which stay positive and turn less sharply.
    """
    y = torch.cat([data["y_init"][None], data["y"]])  # (years, 2)
    middle = y.new_tensor([1.0, 0.05, 1.0, 0.05])
    prior = dist.Normal(middle, y.new_tensor([0.5, 0.05, 0.5, 0.05])).to_event(1)
    theta = pyro.sample("theta", Restricted(prior, positive_vector))
    start = dist.LogNormal(y.new_full((2,), math.log(10)), 1.0).to_event(1)
    z_init = pyro.sample("z_init", start)
    sigma = pyro.sample("sigma", dist.LogNormal(y.new_full((2,), -1.0), 1.0).to_event(1))

    alpha, beta, gamma, delta = theta.unbind(dim=-1)
    growth, effect = torch.stack([alpha, -gamma], dim=-1), torch.stack([-beta, delta], dim=-1)

    def slope(time: float, log_z: Tensor) -> Tensor:
        return torch.addcmul(growth, effect, log_z.flip(-1).exp())

    times = [0.0, *data["ts"].tolist()]
    log_z = torch.stack(rk4(slope, z_init.log(), times, steps), dim=-2)
    pyro.sample("y", dist.LogNormal(log_z, sigma[..., None, :]).to_event(2), obs=y)


def one_comp_mm_elim_abs(data: Data, steps: int = ELIMINATION_STEPS) -> None:
    """A drug is absorbed at a constant rate and eliminated by Michaelis-Menten kinetics.

    C' = k_a exp(-k_a t) D / V - (V_m / V) C / (K_m + C), C = 0 at the start.
    """
    seen = data["C_hat"]
    one = seen.new_ones(())
    k_a, K_m, V_m, sigma = (
        pyro.sample(name, dist.HalfCauchy(one)) for name in ("k_a", "K_m", "V_m", "sigma")
    )
    dose, fastest = k_a * data["D"] / data["V"], V_m / data["V"]

    def slope(time: float, c: Tensor) -> Tensor:
        c = c.clamp_min(0.0)  # a step may overshoot zero where parameters are extreme
        return dose * (-k_a * time).exp() - fastest * c / (K_m + c)

    times = [data["t0"].item(), *data["times"].tolist()]
    path = rk4(slope, torch.zeros_like(k_a), times, steps)
    c = torch.stack(path[1:], dim=-1).clamp_min(torch.finfo(seen.dtype).tiny)
    pyro.sample("C_hat", dist.LogNormal(c.log(), sigma[..., None]).to_event(1), obs=seen)


def rk4(
    slope: Callable[[float, Tensor], Tensor], state: Tensor, times: list[float], steps: int
) -> list[Tensor]:
    """Solve x' = slope(t, x) by the classical Runge-Kutta method of order four.

    Args:
        slope: the derivative at a time and a state; batch dimensions go through.
        state: the state at ``times[0]``.
        times: when the solution is wanted.
        steps: equal steps between two of those times.

    Returns:
        The states at all ``times``.

    Example:
        >>> _, end = rk4(lambda time, x: -x, torch.ones(()), [0.0, 1.0], steps=10)
        >>> round(end.item(), 5)
        0.36788
    """
    path = [state]
    for begin, end in pairwise(times):
        h = (end - begin) / steps
        for i in range(steps):
            time = begin + i * h
            first = slope(time, state)
            second = slope(time + h / 2, torch.add(state, first, alpha=h / 2))
            third = slope(time + h / 2, torch.add(state, second, alpha=h / 2))
            fourth = slope(time + h, torch.add(state, third, alpha=h))
            middle = second + third
            state = state + h / 6 * torch.add(first + fourth, middle, alpha=2.0)
        path.append(state)
    return path
