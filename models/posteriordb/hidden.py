"""Mixtures, and Markov chains, whose states may change places. Each model is one draw's."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from mixtures_and_hmms import log_product
from priors import Restricted, ordered, positive_vector
from regressions import Data
from torch import Tensor


def normal_mixture(data: Data) -> None:
    """Two Gaussians of known scale; theta weighs the first."""
    zero = data["y"].new_zeros(())
    theta = pyro.sample("theta", dist.Uniform(zero, 1.0))
    mu = pyro.sample("mu", dist.Normal(zero.new_zeros(2), 10.0).to_event(1))
    _observe_mixture(data, torch.stack([theta, 1 - theta], dim=-1), mu, torch.ones_like(mu))


def low_dim_gauss_mix_collapse(data: Data) -> None:
    """Two Gaussians in no order, either of which may collapse."""
    zeros = data["y"].new_zeros(2)
    mu = pyro.sample("mu", dist.Normal(zeros, 2.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(zeros + 2).to_event(1))
    theta = pyro.sample("theta", dist.Beta(zeros[0] + 5, zeros[0] + 5))
    _observe_mixture(data, torch.stack([theta, 1 - theta], dim=-1), mu, sigma)


def normal_mixture_k(data: Data) -> None:
    """Five Gaussians, flat weights and scales."""
    zeros = data["y"].new_zeros(int(data["K"]))
    theta = pyro.sample("theta", dist.Dirichlet(zeros + 1))
    mu = pyro.sample("mu", dist.Normal(zeros, 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.Uniform(zeros, 10.0).to_event(1))
    _observe_mixture(data, theta, mu, sigma)


def _observe_mixture(data: Data, weights: Tensor, mu: Tensor, sigma: Tensor) -> None:
    parts = dist.Normal(mu[..., None, :], sigma[..., None, :])
    mixture = dist.MixtureSameFamily(dist.Categorical(weights[..., None, :]), parts)
    with pyro.plate("rows", len(data["y"])):
        pyro.sample("y", mixture, obs=data["y"])


def hmm_gaussian(data: Data) -> None:
    """Three states with flat priors on all but the order of their means."""
    y, states = data["y"], int(data["K"])
    ones = y.new_ones(states)
    first = pyro.sample("pi1", dist.Dirichlet(ones))
    moves = pyro.sample("A", dist.Dirichlet(y.new_ones(states, states)).to_event(1))
    wide = dist.Normal(torch.arange(states).to(y), 1.0).to_event(1).mask(False)
    mu = pyro.sample("mu", Restricted(wide, ordered))
    flat_scales = dist.LogNormal(0 * ones, 1.0).to_event(1).mask(False)
    sigma = pyro.sample("sigma", Restricted(flat_scales, positive_vector))
    emitted = dist.Normal(mu[:, None], sigma[:, None]).log_prob(y)  # (state, time)
    steps = log_product(moves.log()[:, :, None] + emitted[None, :, 1:])
    start = first.log() + emitted[:, 0]
    pyro.factor("y", (start[:, None] + steps).logsumexp(dim=(0, 1)))


def iohmm_reg(data: Data) -> None:
    """Regressions whose coefficients are those of one of three states.

    Stan's code weighs the way from state i to any other by a softmax over i of the inputs, so that
    the states' sum factorises over time.
    """
    y, u, states = data["y"], data["u"], int(data["K"])
    zeros = y.new_zeros(states, u.shape[1])
    first = pyro.sample("pi1", dist.Dirichlet(zeros[:, 0] + 1))
    w = pyro.sample("w", dist.Normal(zeros, 5.0).to_event(2))
    b = pyro.sample("b", dist.Normal(zeros, 5.0).to_event(2))
    sigma = pyro.sample("sigma", dist.HalfNormal(zeros[:, 0] + 3).to_event(1))
    emitted = dist.Normal(u @ b.mT, sigma).log_prob(y[:, None])  # (time, state)
    weights = (u[1:] @ w.mT).log_softmax(dim=-1)
    later = (emitted[1:-1] + weights[1:]).logsumexp(dim=-1).sum()
    start = (first.log() + emitted[0] + weights[0]).logsumexp(dim=-1)
    pyro.factor("y", start + later + emitted[-1].logsumexp(dim=-1))
