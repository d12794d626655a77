"""Chains at once: exact moments, what they adapt to, densities not finite, NeuTra's API."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin

import pyroflows as pf
from pyroflows.infer.chees import chees, evaluate, trajectory


def gaussian(z):
    """Standard deviations 1 and 100, that is condition number 1e4."""
    return -(z / z.new_tensor([1.0, 100.0])).square().sum(-1) / 2


def banana(z):
    return -z[:, 0].square() / 8 - (z[:, 1] - (z[:, 0].square() - 4) / 4).square() / 2


def student(z):
    """Of 8 degrees of freedom: the variance is 8 / 6."""
    return -(8 + 2) / 2 * torch.log1p(z.square().sum(-1) / 8)


EXACT = {
    "gaussian": (gaussian, [1.0, 1e4]),
    "banana": (banana, [4.0, 3.0]),
    "student": (student, [8 / 6, 8 / 6]),
}


def off(values, expected):
    """How far a mean over all chains lies from its value, in standard errors."""
    error = values.std((0, 1)) / effective_sample_size(values, 0, 1).sqrt()
    return ((values.mean((0, 1)) - expected) / error).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_moments_are_exact(name, dtype):
    log_density, variances = EXACT[name]
    torch.manual_seed(0)
    draws = chees(log_density, torch.randn(32, 2, dtype=dtype), draws=200, warmup=200).draws
    assert draws.dtype == dtype
    assert off(draws, torch.zeros(2)) < 4
    assert off(draws.square(), torch.tensor(variances)) < 4
    assert split_gelman_rubin(draws, 0, 1).max() < 1.03


def test_leapfrogs_turn_around(monkeypatch):
    start, scale = evaluate(banana, torch.randn(4, 2).double()), torch.tensor([1.0, 3.0]).double()
    torch.manual_seed(1)
    there = trajectory(banana, start, 0.1, 7, scale)
    torch.manual_seed(1)  # the same draw of the chains' steps; the momenta turned around
    monkeypatch.setattr(torch, "randn_like", lambda _: -there.momentum)
    back = trajectory(banana, there.end, 0.1, 7, scale)
    assert torch.allclose(back.end.z, start.z, atol=1e-10)
    assert torch.allclose(back.gained, -there.gained, atol=1e-10)


def test_metric_is_the_spread():
    torch.manual_seed(0)
    scale = chees(gaussian, torch.randn(64, 2), draws=1, warmup=200).scale
    assert torch.allclose(scale / torch.tensor([1.0, 100.0]), torch.ones(2), atol=0.15)


def test_an_isotropic_density_takes_a_quarter_of_a_turn():
    torch.manual_seed(0)
    run = chees(lambda z: -z.square().sum(-1) / 2, torch.randn(64, 10), draws=20, warmup=150)
    assert 0.8 < run.trajectory < 4.0
    assert run.leapfrogs.float().mean() < 5


@pytest.mark.parametrize("outside", [math.nan, -math.inf], ids=str)
def test_what_is_not_finite_is_refused(outside):
    def half(z):  # a half-normal: nothing below 0
        return torch.where(z > 0, -z.square() / 2, z * 0 + outside).sum(-1)

    torch.manual_seed(0)
    run = chees(half, torch.rand(32, 1, dtype=torch.float64) + 0.1, draws=300, warmup=100)
    assert (run.draws > 0).all()
    assert run.diverging.any()
    assert run.energy.isfinite().all()
    assert off(run.draws.square(), torch.ones(1)) < 4


def test_start_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="not finite"):
        chees(lambda z: z.log().sum(-1), -torch.ones(2, 1), draws=1, warmup=1)


def test_one_chain_is_an_error():
    with pytest.raises(ValueError, match="two chains"):
        chees(gaussian, torch.zeros(1, 2), draws=1, warmup=1)


def positive(y):
    """Conjugate: rate | y is Gamma(2 + n, 1 + sum(y))."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Exponential(rate), obs=y)


Y = torch.tensor([0.4, 0.9, 0.2, 1.5])


def neutra(model=positive, *args, chains=32):
    return pf.NeuTra(model, pf.AutoFlow(model, layers=1, hidden=(8,)).setup(*args), chains=chains)


def test_chains_of_a_model_are_exact():
    pyro.set_rng_seed(0)
    many = neutra(positive, Y)
    rate = many.run(Y, num_samples=100, warmup_steps=100, progress=False)["rate"]
    a, b = 2 + 4, 1 + Y.sum()
    assert rate.shape == (32, 100)
    assert off(rate[..., None], a / b) < 4
    assert off((rate[..., None] - a / b).square(), a / b**2) < 4
    assert many.r_hat()["rate"] < 1.03
    assert many.ess()["rate"] > 500


def test_a_seed_gives_the_same_draws():
    runs = []
    many = neutra(positive, Y, chains=4)
    for _ in range(2):
        pyro.set_rng_seed(3)
        runs.append(many.run(Y, num_samples=5, warmup_steps=5, progress=False)["rate"])
    assert torch.equal(*runs)


def test_arviz_gets_the_statistics():
    many = neutra(positive, Y, chains=4)
    many.run(Y, num_samples=10, warmup_steps=5, progress=False)
    stats = pf.to_arviz(positive, many, Y).sample_stats
    for name in ("energy", "diverging", "acceptance_rate", "step_size", "n_steps"):
        assert stats[name].shape == (4, 10)
        assert np.array_equal(stats[name], many.stats[name])


def test_two_modes_show_in_r_hat():
    """The guide holds both; no chain goes from one to the other."""

    def modes():
        z = pyro.sample("z", dist.Normal(0.0, 5.0))
        pyro.factor("f", -(z.abs() - 4).square() * 8)

    guide = pf.AutoFlow(modes, layers=1, hidden=(8,), init="init", init_scale=4.0).setup()
    pyro.set_rng_seed(0)
    many = pf.NeuTra(modes, guide, chains=16)
    many.run(num_samples=50, warmup_steps=100, progress=False)
    assert many.r_hat()["z"] > 1.5


@pytest.mark.slow
def test_a_model_that_raises_far_out_is_refused_there():
    def picky():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if (z > 1.0).any():
            raise ValueError("too far")

    guide = pf.AutoFlow(pyro.poutine.block(picky, hide=[]), layers=1, hidden=(8,), init="init")
    many = pf.NeuTra(picky, guide, chains=8)
    z = many.run(num_samples=30, warmup_steps=30, progress=False)["z"]
    assert (z <= 1).all()
    assert many.diverging.any()


def test_models_that_take_one_draw_at_a_time_have_chains():
    def branch():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", z if z > 0 else -z)

    many = neutra(branch, chains=3)
    assert many.run(num_samples=4, warmup_steps=4, progress=False)["z"].shape == (3, 4)


@pytest.mark.parametrize("chains", [1, 0, 2.5, True])
def test_numbers_of_chains_out_of_range_are_errors(chains):
    with pytest.raises(ValueError, match="or None for NUTS"):
        pf.NeuTra(positive, pf.AutoFlow(positive), chains=chains)


def test_num_chains_beside_chains_is_an_error():
    with pytest.raises(ValueError, match="run at once already"):
        neutra(positive, Y).run(Y, num_chains=2)
