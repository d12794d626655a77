"""Awkward models, each against its exact posterior: right, or distrusted in words."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import SEEDS, grid, judge, normal, quadrature

COUNTS = torch.tensor([3.0, 0.0, 7.0])
ROWS = torch.tensor([-2.3, -1.9, -1.2, 1.4, 2.0, 2.2, 2.9])
X = torch.linspace(-1, 1, 8)[:, None] ** torch.arange(1.0, 4.0)
Y = torch.tensor([0.3, -0.2, 0.5, 0.9, 1.1, 1.0, 1.9, 2.6])


def signs():
    z = pyro.sample("z", dist.Normal(0.0, 5.0))
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z.abs() + 0.1 * w, 0.5), obs=torch.tensor(4.0))


def four():
    for name in "ab":
        z = pyro.sample(name, dist.Normal(0.0, 3.0))
        pyro.sample(f"y_{name}", dist.Normal(z.abs(), 0.3), obs=torch.tensor(2.0))


def bound():
    a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
    z = pyro.sample("z", dist.Uniform(0.0, a))
    pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(1.0))


def coefficients():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    mean = (X * b.unsqueeze(-2)).sum(-1) + a
    pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=Y)


def rate():
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Poisson(z.exp()), obs=torch.tensor(0.0))


def heavy():
    z = pyro.sample("z", dist.StudentT(3.0, 0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 2.0), obs=torch.tensor(6.0))


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("p", 2):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def simplex():
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rows", 10):
        pyro.sample("y", dist.Categorical(p), obs=torch.arange(3).repeat_interleave(COUNTS.long()))


def labels():
    low = pyro.sample("low", dist.Normal(-1.0, 2.0))
    high = pyro.sample("high", dist.Normal(1.0, 2.0))
    with pyro.plate("rows", len(ROWS)):
        label = pyro.sample("label", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(torch.where(label > 0, high, low), 0.7), obs=ROWS)


def walk():
    z = torch.tensor(0.0)
    for t in range(5):
        z = pyro.sample(f"z_{t}", dist.Normal(0.8 * z, 1.0))
        pyro.sample(f"y_{t}", dist.Normal(z, 0.5), obs=Y[t + 3])


def hidden():
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    state = 0
    for t in pyro.markov(range(len(ROWS))):
        stay = torch.tensor([0.8, 0.2])[state]
        state = pyro.sample(f"s_{t}", dist.Bernoulli(stay), infer={"enumerate": "parallel"}).long()
        pyro.sample(f"y_{t}", dist.Normal(loc * (1 - 2 * state), 1.0), obs=ROWS[t])


def regression():
    """In closed form: a Gaussian."""
    x = torch.cat([torch.ones(8, 1), X], 1).double()
    spread = torch.linalg.inv(torch.eye(4).double() + x.T @ x / 0.25)
    marginal = x @ x.T + 0.25 * torch.eye(8).double()
    mean = spread @ x.T @ Y.double() / 0.25
    evidence = dist.MultivariateNormal(torch.zeros(8).double(), marginal).log_prob(Y.double())
    return evidence.item(), mean, spread.diagonal().sqrt()


def smoothing():
    """In closed form: a Gaussian, of the precision that the steps and the data give."""
    step = torch.eye(5).double() - 0.8 * torch.eye(5).double().roll(1, 0).tril()
    prior = torch.linalg.inv(step.T @ step)
    marginal = prior + 0.25 * torch.eye(5).double()
    y = Y[3:].double()
    gain = prior @ torch.linalg.inv(marginal)
    evidence = dist.MultivariateNormal(torch.zeros(5).double(), marginal).log_prob(y)
    return evidence.item(), gain @ y, (prior - gain @ prior).diagonal().sqrt()


def forward(loc):
    """The forward algorithm; one's probability is 0.8 after zero and 0.2 after one."""
    zero, one = torch.zeros_like(loc), torch.full_like(loc, -math.inf)
    for y in ROWS.double():
        ahead = torch.logaddexp(zero + math.log(0.2), one + math.log(0.8))
        other = torch.logaddexp(zero + math.log(0.8), one + math.log(0.2))
        zero, one = ahead + normal(y, loc, 1), other + normal(y, -loc, 1)
    return normal(loc, 0, 2) + torch.logaddexp(zero, one)


def dirichlet():
    """In closed form: conjugate."""
    found = dist.Dirichlet(1 + COUNTS.double())
    # The density of the rows in their order: without the number of orders.
    evidence = math.lgamma(3) + torch.lgamma(1 + COUNTS.double()).sum() - math.lgamma(13)
    return evidence.item(), found.mean, found.variance.sqrt()


def mixture(low, high):
    log_p = normal(low, -1, 2) + normal(high, 1, 2)
    for y in ROWS.double():
        log_p = log_p + torch.logaddexp(normal(y, low, 0.7), normal(y, high, 0.7)) - math.log(2)
    return log_p


TRUTHS = {
    signs: lambda: quadrature(
        lambda z, w: normal(z, 0, 5) + normal(w, 0, 1) + normal(4, z.abs() + 0.1 * w, 0.5),
        [grid(-9, 9), grid(-6, 6)],
    ),
    four: lambda: quadrature(
        lambda a, b: sum(normal(z, 0, 3) + normal(2, z.abs(), 0.3) for z in (a, b)),
        [grid(-5, 5)] * 2,
    ),
    # Over log a and the share of a that z is.
    bound: lambda: quadrature(
        lambda s, u: normal(s, 0, 1) + normal(1, u * s.exp(), 0.5),
        [grid(-7, 7), grid(0.0005, 0.9995, 1000)],
        lambda s, u: (s.exp(), u * s.exp()),
    ),
    coefficients: regression,
    rate: lambda: quadrature(lambda z: normal(z, 0, 2) - z.exp(), [grid(-20, 8, 8001)]),
    heavy: lambda: quadrature(
        lambda z: dist.StudentT(3.0, 0.0, 1.0).log_prob(z) + normal(6, z, 2), [grid(-20, 30, 8001)]
    ),
    # Prior alone: x has the variance E exp(v).
    funnel: lambda: (0.0, torch.zeros(3), torch.tensor([3.0] + [math.exp(2.25)] * 2)),
    simplex: dirichlet,
    walk: smoothing,
    hidden: lambda: quadrature(forward, [grid(-9, 9, 8001)]),
    labels: lambda: quadrature(mixture, [grid(-9, 9)] * 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("model", TRUTHS, ids=lambda model: model.__name__)
def test_right_or_distrusted(model, seed):
    judge(model, TRUTHS[model](), seed)
