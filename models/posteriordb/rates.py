"""Rates and counts of Lee & Wagenmakers (2013): a few binomial observations, one or two rates."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from regressions import Data


def rate_1(data: Data) -> None:
    """One rate, one count."""
    theta = _rate("theta", data["k"])
    pyro.sample("k", dist.Binomial(data["n"], theta), obs=data["k"])


def rate_2(data: Data) -> None:
    """Two rates, and their difference delta."""
    theta1, theta2 = (_rate(name, data["k1"]) for name in ("theta1", "theta2"))
    pyro.deterministic("delta", theta1 - theta2)
    pyro.sample("k1", dist.Binomial(data["n1"], theta1), obs=data["k1"])
    pyro.sample("k2", dist.Binomial(data["n2"], theta2), obs=data["k2"])


def rate_3(data: Data) -> None:
    """A rate common to two counts."""
    theta = _rate("theta", data["k1"])
    pyro.sample("k1", dist.Binomial(data["n1"], theta), obs=data["k1"])
    pyro.sample("k2", dist.Binomial(data["n2"], theta), obs=data["k2"])


def rate_4(data: Data) -> None:
    """One rate, beside one that nothing is known of."""
    _rate("thetaprior", data["k"])
    rate_1(data)


def survey(data: Data) -> None:
    """How many surveys were sent out, up to 500, of which so many came back five times.

    The number is summed out.
    """
    k = data["k"]
    theta = _rate("theta", k)
    sent = torch.arange(int(k.max()), int(data["nmax"]) + 1, dtype=k.dtype)
    returned = dist.Binomial(sent[:, None], theta[..., None, None]).log_prob(k)
    pyro.factor("returned", returned.sum(dim=-1).logsumexp(dim=-1))


def _rate(name: str, like: torch.Tensor) -> torch.Tensor:
    return pyro.sample(name, dist.Beta(like.new_ones(()), like.new_ones(())))
