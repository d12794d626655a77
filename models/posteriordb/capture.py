"""How many there are, from how often each was seen (Kery & Schaub 2012; Royle & Dorazio 2008).

The animals seen are filled up with rows of zeros. Each row is an animal with probability omega;
whether it is, is summed out. Each model is one draw's.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from regressions import Data
from torch import Tensor
from torch.nn.functional import logsigmoid


def m0(data: Data) -> None:
    """One probability of being caught."""
    p = _probability("p", data)
    _observe(data, p.logit() * torch.ones_like(data["y"]))


def mt(data: Data) -> None:
    """A probability for each occasion."""
    _observe(data, _by_occasion("p", data).logit() * torch.ones_like(data["y"]))


def mb(data: Data) -> None:
    """Another probability c right after a catch."""
    p, c = _probability("p", data), _probability("c", data)
    _observe(data, torch.where(_caught_before(data) > 0, c.logit(), p.logit()))


def mh(data: Data) -> None:
    """Individual logits around a common one; only counts of catches are known."""
    mean_p, sigma = _probability("mean_p", data), _deviation(data, 5.0)
    eps = mean_p.logit() + sigma * _effects(data)
    count = data["y"]
    occasions = data["T"]
    log_likelihood = count * logsigmoid(eps) + (occasions - count) * logsigmoid(-eps)
    _observe_animals(data, log_likelihood, count > 0)


def mth(data: Data) -> None:
    """Occasions and individuals differ."""
    mean_lp = _by_occasion("mean_p", data).logit()
    sigma = _deviation(data, 5.0)
    _observe(data, mean_lp + (sigma * _effects(data))[..., None])


def mtbh(data: Data) -> None:
    """Occasions and individuals differ, and a catch changes the next one's logit by gamma."""
    alpha = _by_occasion("mean_p", data).logit()
    gamma = pyro.sample("gamma", dist.Normal(data["y"].new_zeros(()), 10.0))
    eps = _deviation(data, 3.0) * _effects(data)
    _observe(data, alpha + eps[..., None] + gamma * _caught_before(data))


def multi_occupancy(data: Data) -> None:
    """Butterflies: species may be there, live at a site, be seen (Dorazio et al. 2006).

    28 species were seen, 50 are thought of. A species' logits of living at a site and of being seen
    on a visit are correlated.
    """
    seen, visits = data["X"], data["K"]
    zero = seen.new_zeros(())
    alpha, beta = (pyro.sample(name, dist.Cauchy(zero, 2.5)) for name in ("alpha", "beta"))
    omega = pyro.sample("Omega", dist.Beta(zero + 2, zero + 2))
    rho = pyro.sample("rho_uv", dist.Uniform(zero - 1, 1.0))
    pyro.factor("rho_prior", dist.Beta(zero + 2, zero + 2).log_prob((rho + 1) / 2))
    sigma = pyro.sample("sigma_uv", dist.HalfCauchy(zero.new_full((2,), 2.5)).to_event(1))
    with pyro.plate("effects", int(data["S"])):
        uv1 = pyro.sample("uv1", dist.Normal(zero, sigma[..., 0]))
        mean = rho * sigma[..., 1] / sigma[..., 0] * uv1
        uv2 = pyro.sample("uv2", dist.Normal(mean, sigma[..., 1] * (1 - rho.square()).sqrt()))
    lives, found = (uv1 + alpha)[..., None], (uv2 + beta)[..., None]
    known = len(seen)
    rows = torch.cat([seen, seen.new_zeros(int(data["S"]) - known, seen.shape[1])])
    counts = rows * logsigmoid(found) + (visits - rows) * logsigmoid(-found)
    here = logsigmoid(lives) + counts
    here = torch.where(rows > 0, here, torch.logaddexp(here, logsigmoid(-lives)))
    _sum_out(omega, here.sum(dim=-1), torch.arange(len(rows)) < known)


def _probability(name: str, data: Data) -> Tensor:
    return pyro.sample(name, dist.Uniform(data["y"].new_zeros(()), 1.0))


def _by_occasion(name: str, data: Data) -> Tensor:
    with pyro.plate("occasion_logits", int(data["T"])):
        return _probability(name, data)


def _deviation(data: Data, bound: float) -> Tensor:
    return pyro.sample("sigma", dist.Uniform(data["y"].new_zeros(()), bound))


def _effects(data: Data) -> Tensor:
    with pyro.plate("effects", len(data["y"])):
        return pyro.sample("eps_raw", dist.Normal(data["y"].new_zeros(()), 1.0))


def _caught_before(data: Data) -> Tensor:
    """Whether each was caught on the occasion before; on the first, not."""
    y = data["y"]
    return torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], dim=1)


def _observe(data: Data, logit: Tensor) -> None:
    """Catches ``(animals, occasions)`` with these logits."""
    y = data["y"]
    log_likelihood = (y * logit - torch.nn.functional.softplus(logit)).sum(dim=-1)
    _observe_animals(data, log_likelihood, y.sum(dim=1) > 0)


def _observe_animals(data: Data, log_likelihood: Tensor, seen: Tensor) -> None:
    _sum_out(_probability("omega", data), log_likelihood, seen)


def _sum_out(omega: Tensor, log_likelihood: Tensor, seen: Tensor) -> None:
    """A row is there with probability omega; one that was seen certainly is."""
    there = omega.log() + log_likelihood
    terms = torch.where(seen, there, torch.logaddexp(there, (-omega).log1p()))
    with pyro.plate("rows", len(seen)):
        pyro.factor("histories", terms)
