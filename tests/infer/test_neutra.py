"""NUTS in a flow's base space: exact moments, geometry plain NUTS fails on, errors."""

import copy
import math

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyroflows as pf
from pyroflows.distributions.mixture import MixtureFlow
from pyroflows.infer.neutra import _potential, share_beyond

MEAN = torch.tensor([1.0, -2.0])
COVARIANCE = torch.tensor([[1.0, 0.95 * 3.0], [0.95 * 3.0, 9.0]])


def correlated():
    pyro.sample("x", dist.MultivariateNormal(MEAN, COVARIANCE))


def positive(y):
    """Conjugate: rate | y is Gamma(2 + n, 1 + sum(y))."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Exponential(rate), obs=y)


def funnel():
    """Neal's funnel (2003, section 8)."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("xs", 3):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def quick(model, *args, steps=300, **options):
    guide = pf.AutoFlow(model, layers=1, hidden=(8,), **options)
    if steps:
        pf.fit_guide(model, guide, *args, particles=16, lr=0.02, max_steps=steps, progress=False)
    return guide


def test_moments_of_a_correlated_gaussian():
    neutra = pf.NeuTra(correlated, quick(correlated))
    draws = neutra.run(num_samples=300, warmup_steps=75, num_chains=2, progress=False)["x"]
    assert draws.shape == (2, 300, 2)
    flat = draws.flatten(0, 1)
    assert torch.allclose(flat.mean(0), MEAN, atol=0.4)
    scale = torch.tensor([1.0, 3.0])
    assert torch.allclose(flat.std(0) / scale, torch.ones(2), atol=0.12)
    assert abs(torch.corrcoef(flat.T)[0, 1] - 0.95) < 0.02
    assert all((r < 1.05).all() for r in neutra.r_hat().values())
    assert neutra.diverging.shape == (2, 300)


def test_moments_are_right_although_the_guide_is_not():
    """NUTS corrects whatever the flow is: the Jacobians of flow and support are both there."""
    y = torch.tensor([0.4, 0.9, 0.2, 1.5])
    guide = quick(positive, y, steps=0, init_scale=0.7)
    draws = pf.NeuTra(positive, guide).run(y, num_samples=500, warmup_steps=75, progress=False)[
        "rate"
    ]
    a, b = 2 + 4, 1 + y.sum().item()
    assert abs(draws.mean().item() / (a / b) - 1) < 0.09
    assert abs(draws.std().item() / (math.sqrt(a) / b) - 1) < 0.2


def test_density_is_that_of_the_pulled_back_model():
    y = torch.tensor([0.4, 0.9], dtype=torch.float64)

    def double(y):
        rate = pyro.sample("rate", dist.Gamma(y.new_tensor(2.0), y.new_tensor(1.0)))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Exponential(rate), obs=y)

    neutra = pf.NeuTra(double, quick(double, y, steps=0))
    log_density = neutra._set_up((y,), {})
    latent = torch.tensor([0.3], dtype=torch.float64)
    rate = latent.exp()
    expected = (
        dist.Gamma(y.new_tensor(2.0), y.new_tensor(1.0)).log_prob(rate)
        + dist.Exponential(rate).log_prob(y).sum()
        + 0.3  # log d exp(u) / du
    )
    assert torch.allclose(log_density(latent), expected.squeeze())
    draws = neutra.run(y, num_samples=5, warmup_steps=5, progress=False)
    assert draws["rate"].dtype == torch.float64


def test_potential_has_the_jacobian_of_a_bent_flow():
    guide = quick(correlated, steps=0)
    log_density = pf.NeuTra(correlated, guide)._set_up((), {})
    with torch.no_grad():
        for parameter in guide.flow.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    flow, posterior = guide.flow.detached(), dist.MultivariateNormal(MEAN, COVARIANCE)
    for z in torch.randn(3, 2):
        jacobian = torch.autograd.functional.jacobian(flow.transform, z)
        expected = posterior.log_prob(flow.transform(z)) + torch.linalg.slogdet(jacobian)[1]
        got = -_potential(flow, log_density, z)
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-3)


def test_draws_go_to_arviz():
    y = torch.tensor([0.4, 0.9, 0.2, 1.5])
    neutra = pf.NeuTra(positive, quick(positive, y, steps=0))
    with pytest.raises(ValueError, match="no draws yet"):
        pf.to_arviz(positive, neutra, y)
    neutra.run(y, num_samples=60, warmup_steps=30, num_chains=2, progress=False)
    data = pf.to_arviz(positive, neutra, y)
    assert data.posterior.sizes == {"chain": 2, "draw": 60}
    assert np.array_equal(data.sample_stats["diverging"], neutra.diverging)
    assert data.log_likelihood["y"].dims == ("chain", "draw", "rows")
    assert np.isfinite(az.summary(data).loc["rate", "r_hat"])


def test_guide_is_left_as_it_was():
    guide = quick(correlated, steps=20)
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    pf.NeuTra(correlated, guide).run(num_samples=5, warmup_steps=5, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in guide.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in guide.flow.parameters())


def test_flow_is_the_one_in_pyros_store(tmp_path):
    quick(correlated, steps=50)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    fresh = pf.AutoFlow(correlated, layers=1, hidden=(8,)).setup()
    pyro.get_param_store().load(tmp_path / "store", map_location="cpu")
    pf.NeuTra(correlated, fresh)._set_up((), {})
    stored = list(pyro.get_param_store().values())
    for parameter in fresh.flow.parameters():
        assert any(p.shape == parameter.shape and torch.equal(p, parameter) for p in stored)


@pytest.mark.slow
def test_funnel():
    guide = pf.AutoFlow(funnel)
    pf.fit_guide(funnel, guide, progress=False)
    neutra = pf.NeuTra(funnel, guide)
    v = neutra.run(num_samples=1000, warmup_steps=500, num_chains=2, progress=False)["v"]
    assert abs(v.std().item() - 3.0) < 0.45
    assert abs(v.mean().item()) < 0.6


def test_other_guides_are_errors():
    with pytest.raises(ValueError, match=r"expected a pf\.AutoFlow, got AutoNormal"):
        pf.NeuTra(correlated, AutoNormal(correlated))


def test_discrete_sites_are_summed_out():
    def mixed():
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("z", dist.Normal(3 * k, 1.0))

    neutra = pf.NeuTra(mixed, pf.AutoFlow(mixed, layers=1, hidden=(8,)))
    draws = neutra.run(num_samples=5, warmup_steps=5, progress=False)
    assert draws.keys() == {"z"}
    guide = neutra.guide
    latent, potential = torch.randn(2, 1), neutra._set_up((), {})
    parts = torch.stack(
        [dist.Normal(3.0, 1.0).log_prob(latent), dist.Normal(0.0, 1.0).log_prob(latent)]
    )
    expected = (parts + torch.tensor([0.3, 0.7]).log()[:, None, None]).logsumexp(0)
    torch.testing.assert_close(potential(latent), expected[:, 0])
    assert guide.learned.discrete == ("k",)


def test_sites_that_the_guide_does_not_draw_are_errors():
    def noisy():
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(noise, 1.0))

    partial = pf.AutoFlow(pyro.poutine.block(noisy, hide=["noise"]), layers=1, hidden=(8,))
    with pytest.raises(ValueError, match="'noise' comes and goes"):
        pf.NeuTra(noisy, partial).run(progress=False)
    hiding = pf.AutoFlow(noisy, hide=["noise"], layers=1, hidden=(8,))
    with pytest.raises(ValueError, match="'noise' is a latent site that the guide hides"):
        pf.NeuTra(noisy, hiding).run(progress=False)


def test_subsampling_is_an_error():
    def part(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[rows])

    with pytest.raises(ValueError, match="subsample"):
        pf.NeuTra(part, quick(part, torch.ones(4), steps=0)).run(torch.ones(4), progress=False)


@pytest.mark.parametrize("draws", [1, 3])
def test_few_draws_are_draws(draws):
    neutra = pf.NeuTra(correlated, quick(correlated, steps=0))
    found = neutra.run(num_samples=draws, warmup_steps=2, progress=False)
    assert found["x"].shape == (1, draws, 2)
    assert neutra.diverging.shape == (1, draws)
    data = pf.to_arviz(correlated, neutra)
    assert data.posterior.sizes["draw"] == draws


@pytest.mark.parametrize(
    "wrong",
    [{"num_samples": 0}, {"num_samples": 10.5}, {"num_chains": 0}, {"warmup_steps": -1}],
)
def test_numbers_out_of_range_are_errors(wrong):
    with pytest.raises(ValueError, match="expected an integer"):
        pf.NeuTra(correlated, pf.AutoFlow(correlated)).run(**wrong)


def test_density_that_is_nowhere_finite_is_an_error():
    level = [0.0]

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", z * 0 + level[0])

    neutra = pf.NeuTra(model, quick(model, steps=0).setup())
    level[0] = -math.inf  # after the guide was set up, which would have refused it
    with pytest.raises(ValueError, match="not finite"):
        neutra.run(progress=False)


def test_r_hat_needs_a_run():
    with pytest.raises(ValueError, match="call run first"):
        pf.NeuTra(correlated, pf.AutoFlow(correlated)).r_hat()


def chains_of_unlike_scale():
    return torch.randn(6, 200, 2) * torch.tensor([1.0, 1, 1, 3, 3, 3])[:, None, None]


def test_chains_of_unlike_scale_do_not_agree():
    neutra = pf.NeuTra(correlated, pf.AutoFlow(correlated))
    neutra.draws, neutra.stats = {"x": chains_of_unlike_scale()}, {"diverging": torch.zeros(6, 200)}
    assert (neutra.r_hat()["x"] > 1.1).all()


def test_agreement_is_told_number_by_number_whatever_the_site_is_called():
    neutra = pf.NeuTra(correlated, pf.AutoFlow(correlated))
    draws = torch.randn(6, 200, 2, 3)
    draws[..., 0, 1] = 1.0
    neutra.draws = {"a/b": draws, "c": torch.randn(6, 200)}
    neutra.stats = {"diverging": torch.zeros(6, 200)}
    r_hat, ess = neutra.r_hat(), neutra.ess()
    assert r_hat["a/b"].shape == ess["a/b"].shape == (2, 3)
    assert abs(r_hat["c"] - 1) < 0.02
    assert r_hat["a/b"].isnan().sum() == 1
    assert ess["a/b"][1, 2].item() == pytest.approx(float(az.ess(draws[..., 1, 2].numpy())))


def normal(factor):
    """Two standard normal numbers, and a guide so many times as wide."""

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = pf.AutoFlow(model, layers=1, hidden=(8,), init="init").setup()
    guide.whiten.set(torch.zeros(2), factor * torch.eye(2))
    return guide.log_density((), {}), guide.flow


@pytest.mark.parametrize("modes", [1, 2])
def test_chains_walk_into_a_tail_that_the_guide_hardly_draws(modes):
    joint, flow = normal(0.5)
    if modes == 2:
        flow = MixtureFlow([flow, copy.deepcopy(flow)], torch.zeros(2))
    share, points = share_beyond(joint, flow, 0.0)
    # p / q > 10 where 3/2 |z|^2 > log 40, and |z|^2 / 2 is exponential.
    assert share == pytest.approx(40 ** (-1 / 3), abs=0.06)
    assert points.square().sum(1).min() > math.log(40) * 2 / 3 - 1e-3


@pytest.mark.parametrize("factor", [0.85, 1.0, 1.5])
def test_chains_stay_where_the_guide_draws_enough(factor):
    assert share_beyond(*normal(factor), 0.0) is None


def test_chains_do_not_judge_what_runs_draw_by_draw():
    joint, flow = normal(0.5)
    joint.batching = "alone"
    assert share_beyond(joint, flow, 0.0) is None
