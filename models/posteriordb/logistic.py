"""Logistic regressions: wells in Bangladesh, votes, dogs that learn, genes. Each is one draw's."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from priors import Restricted, flat, positive, positive_vector
from regressions import Data
from torch import Tensor

# Flat priors


def flat_logistic(data: Data) -> None:
    """An intercept alpha and slopes beta."""
    x = data["design"]
    alpha = pyro.sample("alpha", dist.Normal(x.new_zeros(()), 1.0).mask(False))
    beta = pyro.sample("beta", flat(x, x.shape[1]))
    _observe(data, alpha + (x @ beta[..., None]).squeeze(-1))


def wells_dist(data: Data) -> None:
    """Who switched to a safer well, by the distance in meters."""
    beta = pyro.sample("beta", flat(data["dist"], 2))
    _observe({"outcome": data["switched"]}, beta[..., 0] + beta[..., 1] * data["dist"])


def wells(*columns: str) -> Callable[[Data], Data]:
    """Make the design of a model of the wells (Gelman & Hill 2007).

    Args:
        columns: ``dist`` in 100 m, ``arsenic``, ``educ`` in 4 years, ``assoc``; with ``c_`` in
            front, less its mean; or two of those joined by ``*``.
    """

    def column(d: Data, name: str) -> Tensor:
        if "*" in name:
            first, second = name.split("*")
            return column(d, first) * column(d, second)
        plain = name.removeprefix("c_")
        value = d[plain] / {"dist": 100.0, "educ": 4.0}.get(plain, 1.0)
        return value if name == plain else value - value.mean()

    def prepared(d: Data) -> Data:
        design = torch.stack([column(d, name) for name in columns], dim=1)
        return {"outcome": d["switched"], "design": design}

    return prepared


def nes_logit(d: Data) -> Data:
    """Votes by income."""
    return {"outcome": d["vote"], "design": d["income"][:, None]}


def _observe(data: Data, logit: Tensor) -> None:
    with pyro.plate("rows", len(data["outcome"])):
        pyro.sample("y", dist.Bernoulli(logits=logit), obs=data["outcome"])


# Dogs that learn to avoid a shock (Solomon & Wynne 1953); y is 1 where a dog was shocked


def shocks(d: Data) -> Data:
    """Count each dog's shocks and avoidances before each trial."""
    y = d["y"]
    shock, avoid = y.cumsum(dim=1) - y, (1 - y).cumsum(dim=1) - (1 - y)
    return {"y": y, "shock": shock, "avoid": avoid}


def dogs(data: Data) -> None:
    """Logits linear in both counts."""
    beta = pyro.sample("beta", dist.Normal(data["y"].new_zeros(3), 100.0).to_event(1))
    logit = beta[..., 0, None, None] + beta[..., 1, None, None] * data["avoid"]
    _observe_trials(data["y"], logit + beta[..., 2, None, None] * data["shock"])


def dogs_log(data: Data) -> None:
    """No intercept; an avoidance lowers the logit, a shock raises it, so Stan's bounds."""
    low, high = data["y"].new_tensor([-100.0, 0.0]), data["y"].new_tensor([0.0, 100.0])
    beta = pyro.sample("beta", dist.Uniform(low, high).to_event(1))
    logit = beta[..., 0, None, None] * data["avoid"] + beta[..., 1, None, None] * data["shock"]
    _observe_trials(data["y"], logit)


def dogs_hierarchical(data: Data) -> None:
    """The probability of a shock is a^shocks b^avoidances: log-linear."""
    zero = data["y"].new_zeros(())
    a, b = (pyro.sample(name, dist.Uniform(zero, 1.0)) for name in ("a", "b"))
    _observe_products(data, a.log(), b.log())


def dogs_nonhierarchical(data: Data) -> None:
    """Each dog has its own a and b, whose logits are correlated.

    The names of this model and of the one before are Stan's; they should be each other's.
    """
    zeros = data["y"].new_zeros(2)
    mu = pyro.sample("mu_logit_ab", dist.Logistic(zeros, 1.0).to_event(1))
    sigma = pyro.sample("sigma_logit_ab", dist.HalfNormal(zeros + 1).to_event(1))
    factor = pyro.sample("L_logit_ab", dist.LKJCholesky(2, zeros[0] + 2))
    z = pyro.sample("z", dist.Normal(zeros.new_zeros(len(data["y"]), 2), 1.0).to_event(2))
    logit = mu[..., None, :] + z @ (sigma[..., :, None] * factor)
    log_ab = torch.nn.functional.logsigmoid(logit)
    _observe_products(data, log_ab[..., :1], log_ab[..., 1:])


def _observe_products(data: Data, log_a: Tensor, log_b: Tensor) -> None:
    """The first trial is left out: all dogs are shocked there, with probability 1."""
    log_p = log_a * data["shock"][:, 1:] + log_b * data["avoid"][:, 1:]
    _observe_trials(data["y"][:, 1:], log_p - (-log_p.expm1()).log())


def _observe_trials(y: Tensor, logit: Tensor) -> None:
    with pyro.plate("dogs", y.shape[0], dim=-2), pyro.plate("trials", y.shape[1], dim=-1):
        pyro.sample("y", dist.Bernoulli(logits=logit), obs=y)


# Genes


def regularized_horseshoe(data: Data) -> None:
    """54 or 102 patients, thousands of genes (Piironen & Vehtari 2017)."""
    x = data["x"]
    zero, ones = x.new_zeros(()), x.new_ones(x.shape[1])
    beta0 = pyro.sample("beta0", dist.Normal(zero, data["scale_icept"]))
    z = pyro.sample("z", dist.Normal(0 * ones, 1.0).to_event(1))
    local = dist.StudentT(data["nu_local"], 0 * ones, 1.0).to_event(1)
    lam = pyro.sample("lambda", Restricted(local, positive_vector))
    whole = dist.StudentT(data["nu_global"], zero, 2 * data["scale_global"])
    tau = pyro.sample("tau", Restricted(whole, positive))
    half = data["slab_df"] / 2
    caux = pyro.sample("caux", dist.InverseGamma(half, half))
    slab = data["slab_scale"].square() * caux[..., None]
    free = (tau[..., None] * lam).square()
    beta = pyro.deterministic("beta", z * (slab * free / (slab + free)).sqrt(), event_dim=1)
    _observe({"outcome": data["y"]}, beta0 + (x @ beta[..., None]).squeeze(-1))
