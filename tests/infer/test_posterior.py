"""One call for a posterior."""

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf


def regression(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ b, scale), obs=y)


def correlated():
    tril = torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril))


def test_a_good_guides_draws_are_taken_as_they_are():
    x = torch.randn(30, 2)
    y = x @ torch.tensor([1.0, -2.0]) + 0.5 * torch.randn(30)
    found = pf.sample_posterior(regression, x, y, draws=300, progress=False)
    assert found.trusted
    assert found.chains is None
    assert found["b"].shape == (300, 2)
    assert "taken as they are" in found.how
    assert "b[1]" in str(found)
    assert abs(found["b"][:, 0].mean() - 1.0) < 0.3


def distrusted(*args, **kwargs):
    return dataclasses.replace(pf.report(*args, **kwargs), khat=2.0, ess=100.0)


def test_chains_run_where_the_verdict_asks_for_them(monkeypatch):
    monkeypatch.setattr("pyroflows.infer.posterior.report", distrusted)
    guide = pf.AutoFlow(correlated, layers=1, hidden=(8,))
    found = pf.sample_posterior(correlated, guide=guide, draws=500, chains=16, progress=False)
    assert found.chains is not None
    assert found.trusted
    assert "16 chains" in found.how
    assert found["z"].shape == (500, 2)
    assert abs(found["z"][:, 0].std() - 2.0) < 0.3


def test_chains_that_disagree_are_not_trusted(monkeypatch):
    monkeypatch.setattr("pyroflows.infer.posterior.report", distrusted)
    monkeypatch.setattr(pf.NeuTra, "r_hat", lambda self: {"z": torch.tensor([1.0, 1.2])})
    guide = pf.AutoFlow(correlated, layers=1, hidden=(8,))
    found = pf.sample_posterior(correlated, guide=guide, draws=50, chains=4, progress=False)
    assert not found.trusted
    assert found.how.startswith("Do not trust these draws")
    assert "1.200 (z)" in found.how


def test_chains_cannot_mend_a_mode_that_was_missed(monkeypatch):
    def misses(*args, **kwargs):
        return dataclasses.replace(pf.report(*args, **kwargs), missed="there is another mode")

    monkeypatch.setattr("pyroflows.infer.posterior.report", misses)
    guide = pf.AutoFlow(correlated, layers=1, hidden=(8,))
    found = pf.sample_posterior(correlated, guide=guide, draws=50, progress=False)
    assert not found.trusted
    assert found.chains is None
    assert "there is another mode" in found.how


def test_chains_go_on_where_they_leave_the_guide(monkeypatch):
    def walked(*_):
        return 0.1, torch.tensor([[5.0, 0.0], [5.2, 1.0], [4.8, -1.0]])

    guide = pf.AutoFlow(correlated, layers=1, hidden=(8,)).setup()
    assert pf.report(correlated, guide).good
    monkeypatch.setattr("pyroflows.infer.verdict.share_beyond", walked)
    found = pf.report(correlated, guide)
    assert found.verdict.startswith(
        "Do not trust it: there is posterior mass near z, number 0, = 5 that the guide hardly "
        "draws, at least 10 % of all"
    )
    assert not found.trusted
    drawn = pf.sample_posterior(correlated, guide=guide, draws=50, chains=4, progress=False)
    assert drawn.chains is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [({"draws": 0}, "draws"), ({"chains": 1}, "chains"), ({"draws": math.nan}, "draws")],
    ids=["no draws", "one chain", "nan"],
)
def test_what_is_out_of_range_is_named(options, said):
    with pytest.raises(ValueError, match=said):
        pf.sample_posterior(correlated, **options)


def test_numbers_that_never_vary_do_not_speak_against_chains(monkeypatch):
    def factor():
        pyro.sample("tril", dist.LKJCholesky(2, 2.0))  # of whose numbers only two vary

    monkeypatch.setattr("pyroflows.infer.posterior.report", distrusted)
    guide = pf.AutoFlow(factor, layers=1, hidden=(8,))
    found = pf.sample_posterior(factor, guide=guide, draws=100, chains=16, progress=False)
    assert found.chains is not None
    assert found.trusted
