"""A guide is no worse than at its start, however large the steps are."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyroflows as pf


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("p", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def test_steps_that_are_too_large_pass_for_no_noise():
    torch.manual_seed(1)
    guide = AutoNormal(funnel)
    guide()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = pf.fit_guide(funnel, guide, lr=10.0, max_steps=300, particles=16, progress=False)
    assert history.score >= history.val[0] - 0.01


def test_sites_wider_than_their_plates_are_told_of_rows_in_batches_too():
    x, y = torch.randn(40, 3), torch.ones(40)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 10.0).to_event(1))
        with pyro.plate("n", 400, subsample_size=len(x)):
            pyro.sample("y", dist.Bernoulli(logits=(x @ w.unsqueeze(-1)).squeeze(-1)), obs=y)

    guide = AutoNormal(model)  # an AutoFlow runs each draw by itself
    guide(x, y)
    with pytest.warns(UserWarning, match="site 'y' has shape"):
        pf.fit_guide(model, guide, x, y, max_steps=2, particles=4, progress=False)


def test_steps_that_are_too_large_are_taken_back_with_batches_too():
    torch.manual_seed(0)
    x = torch.randn(200, 3)
    y = (torch.rand(200) < torch.sigmoid(x @ torch.tensor([1.0, -1.0, 0.5]))).float()

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 10.0).to_event(1))
        with pyro.plate("n", 200, subsample_size=len(x)):
            pyro.sample("y", dist.Bernoulli(logits=(x * w).sum(-1)), obs=y)

    torch.manual_seed(2)
    guide = pf.AutoFlow(model, layers=1, hidden=(8,)).setup(x, y)
    before = pf.report(model, guide, x, y, num_samples=2000).elbo
    batches = list(zip(x.split(20), y.split(20), strict=True))
    settings = {"batches": batches, "max_steps": 300, "particles": 8, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pf.fit_guide(model, guide, lr=10.0, **settings)
    # What a batch of a tenth of the rows may tell otherwise: 10 (3 / 2 + 3 sqrt(3 / 2)) + 3 nats.
    assert pf.report(model, guide, x, y, num_samples=2000).elbo > before - 55
