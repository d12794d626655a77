"""Autoregressive models of one series: AR(5) and ARMA(1, 1)."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from regressions import Data, observe, with_intercept
from torch import Tensor
from torch.nn.functional import pad


def lagged(d: Data) -> Data:
    """AR(K) as a regression of the series on its own K last values, rotated."""
    series, order = d["y"], int(d["K"])
    lags = [series[order - k : -k] for k in range(1, order + 1)]
    return with_intercept(series[order:], *lags)


def ar(data: Data) -> None:
    """y_t ~ Normal(alpha + sum_k beta_k y_{t-k}, sigma)."""
    zeros = torch.zeros_like(data["outcome"])
    alpha = pyro.sample("alpha", dist.Normal(zeros[0], 10.0))
    beta = pyro.sample("beta", dist.Normal(zeros[1:], 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(zeros.new_tensor(2.5)))
    observe(data, torch.cat([alpha[..., None], beta], dim=-1), sigma)


def arma11(data: Data) -> None:
    """y_t ~ Normal(mu + phi y_{t-1} + theta e_{t-1}, sigma), e_t = y_t - its mean.

    Before the series, y_0 = mu and e_0 = 0.
    """
    y = data["y"]
    zero = y.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 10.0))
    phi = pyro.sample("phi", dist.Normal(zero, 2.0))
    theta = pyro.sample("theta", dist.Normal(zero, 2.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(zero + 2.5))
    last = torch.cat([mu[..., None], y[:-1].expand(*mu.shape, -1)], dim=-1)
    error = decayed_sum(y - mu[..., None] - phi[..., None] * last, -theta[..., None])
    pyro.sample("y", dist.Normal(y - error, sigma[..., None]).to_event(1), obs=y)


def decayed_sum(x: Tensor, decay: Tensor) -> Tensor:
    """Solve e_t = x_t + decay e_{t-1}, e_0 = 0, in log2(T) steps instead of T.

    The sum over the last 2k terms is that over the last k, plus decay^k times the one k earlier.

    Args:
        x: ``(*batch, T)``.
        decay: ``(*batch, 1)``.

    Example:
        >>> decayed_sum(torch.ones(4), torch.tensor([0.5]))
        tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    length = 1
    while length < x.shape[-1]:
        x = x + decay * pad(x[..., :-length], (length, 0))
        decay = decay.square()
        length *= 2
    return x
