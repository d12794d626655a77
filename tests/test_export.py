"""Posteriors handed to ArviZ: guides, chains, both generations of the library."""

import math

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyroflows as pf

GROUPS = torch.tensor([0, 0, 1, 1, 2])
Y = torch.tensor([[0.3, 1.0], [0.1, 0.5], [-1.0, 2.0], [-0.7, 1.5], [1.1, 0.2]])


def model(y):
    """A plated latent, one with an event dimension, a positive one, a factor, a deterministic."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("groups", 3):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    pyro.deterministic("doubled", 2 * scale)
    pyro.factor("penalty", -(scale.log() ** 2))
    with pyro.plate("rows", len(y)):
        loc = (level[..., GROUPS] + 0.0 * slope[..., 0]).unsqueeze(-1) + slope
        pyro.sample("y", dist.Normal(loc, scale.unsqueeze(-1)).to_event(1), obs=y)


def gauss(y):
    """Conjugate: loc | y is N(sum(y) / (n + 1), 1 / (n + 1))."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def exact_guide(y):
    n = len(y) + 1
    pyro.sample("loc", dist.Normal(y.sum() / n, n**-0.5))


def off_guide(y):
    pyro.sample("loc", dist.Normal(y.sum() / (len(y) + 1) + 0.3, 0.6))


def groups_of(data):
    """Names of the groups: a method of InferenceData, the children of a DataTree."""
    return list(data.groups() if callable(data.groups) else data.children)


def elpd(loo):
    """The estimate under its name in either generation."""
    return loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd


def test_every_group_has_its_sites_shapes_and_dimensions():
    guide = pf.AutoFlow(model, layers=1, hidden=(8,)).setup(Y)
    data = pf.to_arviz(model, guide, Y, num_samples=30, prior=True)
    assert type(data).__name__ == ("InferenceData" if az.__version__ < "1" else "DataTree")
    shapes = {
        group: {k: v.dims for k, v in data[group].data_vars.items()} for group in groups_of(data)
    }
    latent = {
        "scale": ("chain", "draw"),
        "slope": ("chain", "draw", "slope_dim_0"),
        "level": ("chain", "draw", "groups"),
        "doubled": ("chain", "draw"),
    }
    drawn = {"y": ("chain", "draw", "rows", "y_dim_1")}
    assert shapes == {
        "posterior": latent,
        "sample_stats": dict.fromkeys(("lp", "log_q", "log_weight"), ("chain", "draw")),
        "log_likelihood": {"y": ("chain", "draw", "rows")},
        "posterior_predictive": drawn,
        "prior": latent,
        "prior_predictive": drawn,
        "observed_data": {"y": ("rows", "y_dim_1")},
    }
    assert data.posterior.sizes == {"chain": 1, "draw": 30, "slope_dim_0": 2, "groups": 3}
    assert np.array_equal(data.observed_data["y"].values, Y.numpy())
    doubled = data.posterior["doubled"].values
    assert np.allclose(doubled, 2 * data.posterior["scale"].values)


def test_likelihood_and_lp_are_those_of_each_draw():
    guide = AutoNormal(model)
    data = pf.to_arviz(model, guide, Y, num_samples=5)
    post = {k: torch.tensor(v.values[0]) for k, v in data.posterior.items()}
    for i in range(5):
        loc = post["level"][i, GROUPS, None] + post["slope"][i]
        rows = dist.Normal(loc, post["scale"][i]).log_prob(Y).sum(-1)
        assert np.allclose(data.log_likelihood["y"].values[0, i], rows, atol=1e-4)
        lp = (
            rows.sum()
            + dist.HalfNormal(1.0).log_prob(post["scale"][i])
            + dist.Normal(0.0, 1.0).log_prob(post["slope"][i]).sum()
            + dist.Normal(0.0, 1.0).log_prob(post["level"][i]).sum()
            - post["scale"][i].log() ** 2
        )
        assert math.isclose(data.sample_stats["lp"].values[0, i], lp, abs_tol=1e-3)
    stats = data.sample_stats
    assert np.allclose(stats["log_weight"], stats["lp"] - stats["log_q"], atol=1e-3)


def test_likelihood_ignores_scale_and_keeps_masks():
    def scaled(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        mask = torch.tensor([True, False])
        with pyro.poutine.scale(scale=10.0), pyro.poutine.mask(mask=mask), pyro.plate("rows", 2):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    y = torch.tensor([1.0, 2.0])
    data = pf.to_arviz(scaled, {"loc": torch.zeros(1, 3)}, y)
    one = dist.Normal(0.0, 1.0).log_prob(y)
    assert np.allclose(data.log_likelihood["y"].values, [[[one[0], 0.0]] * 3])
    lp = 10 * one[0] + dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0))
    assert np.allclose(data.sample_stats["lp"], lp)


def test_posterior_and_predictions_are_the_conjugate_ones():
    y = torch.tensor([1.0, 2.0, 3.0])
    data = pf.to_arviz(gauss, exact_guide, y, num_samples=4000, prior=True)
    assert np.allclose(data.posterior["loc"].mean(), 1.5, atol=0.05)
    again = data.posterior_predictive["y"].values[0]
    assert np.allclose(again.mean(0), 1.5, atol=0.1)
    assert np.allclose(again.var(0), 1.25, atol=0.15)
    assert abs(np.corrcoef(again.T)[0, 1] - 0.2) < 0.06  # rows share loc and not the noise
    prior = data.prior_predictive["y"].values[0]
    assert np.allclose(prior.mean(0), 0.0, atol=0.12)
    assert np.allclose(prior.var(0), 2.0, atol=0.25)


def test_resampling_corrects_the_guide():
    y = torch.tensor([1.0, 2.0, 3.0])
    raw = pf.to_arviz(gauss, off_guide, y, num_samples=4000)
    better = pf.to_arviz(gauss, off_guide, y, num_samples=4000, resample=True)
    assert abs(raw.posterior["loc"].mean() - 1.8) < 0.05
    assert abs(better.posterior["loc"].mean() - 1.5) < 0.05
    assert abs(better.posterior["loc"].std() - 0.5) < 0.03
    assert better.sample_stats.attrs["pareto_k"] < 0.7
    assert (raw.sample_stats.attrs["resampled"], better.sample_stats.attrs["resampled"]) == (0, 1)
    again = (better.log_likelihood["y"].sum("rows") + 0.0).values
    loc = better.posterior["loc"].values
    expected = -0.5 * ((y.numpy() - loc[..., None]) ** 2 + math.log(2 * math.pi)).sum(-1)
    assert np.allclose(again, expected, atol=1e-3)  # draws and rows stay together


def test_resampling_by_bad_weights_warns():
    def narrow(y):
        pyro.sample("loc", dist.Normal(3.5, 0.2))

    with pytest.warns(UserWarning, match=r"k = .* > 0.7"):
        pf.to_arviz(gauss, narrow, torch.tensor([1.0, 2.0, 3.0]), num_samples=200, resample=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_resampling_by_weights_without_a_khat_warns():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("far", torch.where(z > 2.6, z, 0.0 * z))

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.warns(UserWarning, match="k = inf"):
        pf.to_arviz(model, guide, num_samples=100, resample=True)


def test_arviz_computes_on_it():
    import matplotlib

    matplotlib.use("Agg")
    guide = AutoMultivariateNormal(model, init_scale=0.05)
    data = pf.to_arviz(
        model, guide, Y, num_samples=400, coords={"groups": ["a", "b", "c"]}, predictive=False
    )
    summary = az.summary(data, kind="stats")
    assert {"scale", "level[a]", "level[c]", "slope[1]", "doubled"} <= set(summary.index)
    assert summary.notna().all().all()
    loo = az.loo(data, pointwise=True)
    assert loo.n_data_points == 5
    assert np.isfinite(elpd(loo))
    az.plot_pair(data, var_names=["scale", "slope"])
    matplotlib.pyplot.close("all")


def test_loo_is_the_exact_one():
    """Leave-one-out of the conjugate model has a closed form."""
    y = torch.tensor([0.5, -0.3, 1.2, 0.1, 0.9, -0.8])
    data = pf.to_arviz(gauss, exact_guide, y, num_samples=4000)
    n = len(y)  # n - 1 others and the prior
    exact = dist.Normal((y.sum() - y) / n, (1 + 1 / n) ** 0.5).log_prob(y).sum()
    assert abs(elpd(az.loo(data)) - exact.item()) < 0.05


def test_chains_of_mcmc():
    y = torch.tensor([1.0, 2.0, 3.0])
    mcmc = MCMC(NUTS(gauss), num_samples=50, warmup_steps=20, disable_progbar=True)
    mcmc.run(y)
    data = pf.to_arviz(gauss, mcmc, y)
    assert data.sample_stats["diverging"].dtype == bool
    assert np.array_equal(data.posterior["loc"], mcmc.get_samples(group_by_chain=True)["loc"])


def test_draws_with_chains_keep_their_order():
    loc = torch.randn(3, 7)
    y = torch.tensor([1.0, 2.0])
    data = pf.to_arviz(gauss, {"loc": loc}, y)
    assert np.array_equal(data.posterior["loc"].values, loc.numpy())
    expected = dist.Normal(loc[..., None], 1.0).log_prob(y)
    assert np.allclose(data.log_likelihood["y"].values, expected, atol=1e-5)
    assert data.sample_stats["lp"].shape == (3, 7)
    assert data.posterior_predictive["y"].shape == (3, 7, 2)
    assert np.isfinite(az.rhat(data)["loc"])


def test_numbers_of_draws_and_rows_may_agree():
    y = torch.tensor([1.0, 2.0, 4.0])
    loc = torch.tensor([[0.0, 1.0, 2.0]])
    data = pf.to_arviz(gauss, {"loc": loc}, y)
    expected = dist.Normal(loc[..., None], 1.0).log_prob(y)
    assert np.allclose(data.log_likelihood["y"].values, expected, atol=1e-5)


def test_chunks_make_no_difference(monkeypatch):
    draws = {"loc": torch.randn(1, 11)}
    y = torch.tensor([1.0, 2.0])
    whole = pf.to_arviz(gauss, draws, y)
    monkeypatch.setattr("pyroflows.programs.predictive._ELEMENTS", 24)
    parts = pf.to_arviz(gauss, draws, y)
    assert np.allclose(whole.log_likelihood["y"], parts.log_likelihood["y"])
    assert parts.posterior_predictive["y"].shape == (1, 11, 2)


def test_batch_without_a_plate():
    def placed(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(loc, torch.ones(len(y))), obs=y)

    y = torch.tensor([1.0, 2.0, 4.0, 8.0])
    loc = torch.randn(1, 6)
    data = pf.to_arviz(placed, {"loc": loc}, y)
    expected = dist.Normal(loc[..., None], 1.0).log_prob(y)
    assert np.allclose(data.log_likelihood["y"].values, expected, atol=1e-5)
    assert data.log_likelihood["y"].dims == ("chain", "draw", "y_dim_0")


def test_two_plates_keep_their_order():
    def grid(y):
        with pyro.plate("columns", 3, dim=-1):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("lines", 2, dim=-2):
                pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    y = torch.arange(6.0).reshape(2, 3)
    a = torch.randn(1, 4, 3)
    data = pf.to_arviz(grid, {"a": a}, y)
    assert data.log_likelihood["y"].dims == ("chain", "draw", "lines", "columns")
    expected = dist.Normal(a[:, :, None], 1.0).log_prob(y)
    assert np.allclose(data.log_likelihood["y"].values, expected, atol=1e-5)


def test_model_that_does_not_broadcast_runs_one_by_one():
    def careless(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(w[0] + w[1], 1.0), obs=y)

    w = torch.randn(1, 4, 2)
    y = torch.tensor([1.0, 2.0, 3.0])
    with pytest.warns(UserWarning, match="one by one"):
        data = pf.to_arviz(careless, {"w": w}, y)
    expected = dist.Normal(w.sum(-1, keepdim=True), 1.0).log_prob(y)
    assert np.allclose(data.log_likelihood["y"].values, expected, atol=1e-5)
    assert data.posterior_predictive["y"].shape == (1, 4, 3)


def test_a_sum_over_draws_is_noticed_next_to_many_rows():
    y = torch.randn(100_000)

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("prior", -0.5 * ((z - 3.0) ** 2).sum())
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    z = torch.randn(1, 3)
    with pytest.warns(UserWarning, match="site 'prior' .* one by one"):
        data = pf.to_arviz(model, {"z": z}, y, predictive=False)
    one = dist.Normal(0.0, 1.0)
    expected = one.log_prob(z) - 0.5 * (z - 3.0) ** 2 + one.log_prob(y).sum()
    assert np.allclose(data.sample_stats["lp"], expected, rtol=1e-6)


def test_deterministic_site_that_mixes_draws_up_is_noticed():
    def summed():
        with pyro.plate("groups", 3):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
        pyro.deterministic("total", level.sum())

    level = torch.randn(1, 4, 3)
    with pytest.warns(UserWarning, match="total of a draw .* one by one"):
        data = pf.to_arviz(summed, {"level": level})
    assert np.allclose(data.posterior["total"].values, level.sum(-1), atol=1e-5)


def test_float64_stays():
    y = torch.tensor([1.0, 2.0], dtype=torch.float64)
    data = pf.to_arviz(gauss, {"loc": torch.randn(1, 4, dtype=torch.float64)}, y)
    assert data.log_likelihood["y"].dtype == np.float64
    assert data.posterior["loc"].dtype == np.float64


def test_newer_arviz_gets_a_nested_dict(monkeypatch):
    """ArviZ 1 takes groups in one dict, and attributes by group."""
    calls = []

    def from_dict(data, *, dims=None, coords=None, attrs=None):
        calls.append((data, dims, coords, attrs))
        return "tree"

    monkeypatch.setattr(az, "__version__", "1.3.0")
    monkeypatch.setattr(az, "from_dict", from_dict)
    y = torch.tensor([1.0, 2.0, 3.0])
    got = pf.to_arviz(gauss, exact_guide, y, num_samples=50, coords={"rows": ["a", "b", "c"]})
    assert got == "tree"
    ((data, dims, coords, attrs),) = calls
    assert set(data) == {
        "posterior",
        "sample_stats",
        "log_likelihood",
        "posterior_predictive",
        "observed_data",
    }
    assert data["posterior"]["loc"].shape == (1, 50)
    assert isinstance(data["log_likelihood"]["y"], np.ndarray)
    assert dims == {"loc": [], "y": ["rows"]}
    assert coords == {"rows": ["a", "b", "c"]}
    assert set(attrs) == {"sample_stats"}
    assert "pareto_k" in attrs["sample_stats"]


def test_groups_without_content_are_left_out():
    def lonely():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    data = pf.to_arviz(lonely, {"z": torch.randn(1, 5)})
    assert groups_of(data) == ["posterior", "sample_stats"]


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        ({}, "every latent site"),
        ({"other": torch.zeros(1, 3)}, "every latent site"),
        ({"loc": torch.zeros(3)}, "leading shapes"),
        ({"loc": torch.zeros(1, 3, 2)}, r"draws of 'loc' of shape \(chains, draws, \*\(\)\)"),
        (3.0, "expected a guide"),
    ],
)
def test_draws_that_do_not_fit_are_errors(draws, message):
    with pytest.raises(ValueError, match=message):
        pf.to_arviz(gauss, draws, torch.ones(2))


def test_subsampling_and_empty_requests_are_errors():
    def part(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[rows])

    with pytest.raises(ValueError, match="plate 'rows' takes 2 of 4"):
        pf.to_arviz(part, {"loc": torch.zeros(1, 3)}, torch.ones(4))
    with pytest.raises(ValueError, match="num_samples"):
        pf.to_arviz(gauss, exact_guide, torch.ones(4), num_samples=0)


def test_nothing_is_left_behind():
    outer = pyro.poutine.trace()
    with outer:
        pf.to_arviz(gauss, exact_guide, torch.ones(4), num_samples=20)
    assert len(outer.trace.nodes) <= 2  # trace keeps _INPUT and _RETURN only
