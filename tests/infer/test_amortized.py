"""The amortised guide: exact posteriors, plates of all kinds, state, and what it refuses."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import init_to_value
from torch import nn
from torch.distributions import biject_to

import pyroflows as pf

NOISE = 0.5
SIZE = 100
SMALL = {"layers": 2, "hidden": (8,)}
X = torch.linspace(-2, 2, 12)[:, None]


class Rows(nn.Module):
    """The data as their own context; counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x


def of_batch(x):
    """A plate that is handed the batch."""
    with pyro.plate("data", SIZE, subsample=x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x[:, 0])


def of_batch_size(x):
    """A plate that is told the batch's size only."""
    with pyro.plate("data", SIZE, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x[:, 0])


def of_length(x):
    """A plate without subsampling, as long as the data."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x[:, 0])


def to_the_left(x):
    """The plate stands further left than the last dimension."""
    with pyro.plate("data", SIZE, subsample=x, dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def subsampling(x):
    """A plate that draws its subsample by itself."""
    with pyro.plate("data", len(x), subsample_size=5) as indices:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x[indices, 0])


def with_globals(x):
    """Two global sites; local ones that are a vector, in an interval and on the simplex."""
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", SIZE, subsample=x):
        z = pyro.sample(
            "z", dist.Normal(loc[..., None], scale[..., None]).expand([*loc.shape, 2]).to_event(1)
        )
        u = pyro.sample("u", dist.Uniform(-1.0, 2.0))
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Normal(z.sum(-1) + u + w[..., 0], NOISE), obs=x[:, 0])


def exact_guide(model):
    """A guide whose parameters are set to the exact posterior N(x / (1 + s^2), s^2 / (1 + s^2))."""
    guide = pf.AutoAmortizedFlow(model, Rows(), None).setup(X)
    gaussian = guide.flow.transform.parts[-1]
    log_scale = 0.5 * math.log(NOISE**2 / (1 + NOISE**2))
    with torch.no_grad():
        gaussian.linear.weight[0] = 1 / (1 + NOISE**2)
        gaussian.linear.bias[0] = 0.0
        gaussian.linear.bias[1] = gaussian.bound * math.atanh(log_scale / gaussian.bound)
    return guide


def evidence(x):
    return dist.Normal(0.0, (1 + NOISE**2) ** 0.5).log_prob(x[:, 0])


def elbo(model, guide, x, particles=1, vectorized=False):
    loss = Trace_ELBO(num_particles=particles, vectorize_particles=vectorized, max_plate_nesting=2)
    with torch.no_grad():
        return -loss.loss(model, guide, x)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def moved(before, module):
    return [name for name, p in module.named_parameters() if not torch.equal(before[name], p)]


# Under the exact posterior the ELBO is the log-evidence, whatever is drawn.


@pytest.mark.parametrize("vectorized", [False, True], ids=["one_by_one", "vectorized"])
@pytest.mark.parametrize("rows", [12, 4, SIZE])
@pytest.mark.parametrize("model", [of_batch, of_batch_size, to_the_left])
def test_elbo_of_a_batch_is_scaled_to_all_data(model, rows, vectorized):
    guide = exact_guide(model)
    x = torch.randn(rows, 1)
    expected = evidence(x).sum().item() * SIZE / rows
    assert elbo(model, guide, x, 3, vectorized) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [12, 1, 30])
def test_elbo_of_a_plate_as_long_as_the_data(rows):
    guide = exact_guide(of_length)
    x = torch.randn(rows, 1)
    assert elbo(of_length, guide, x) == pytest.approx(evidence(x).sum().item(), rel=1e-5)


@pytest.mark.parametrize("rows", [12, 5, 40])
def test_guide_takes_the_rows_of_the_drawn_subsample(rows):
    guide = exact_guide(subsampling)
    x = torch.randn(rows, 1)
    for _ in range(5):
        drawn = poutine.trace(guide).get_trace(x)
        indices = drawn.nodes["data"]["value"]
        ran = poutine.trace(poutine.replay(subsampling, trace=drawn)).get_trace(x)
        expected = evidence(x[indices]).sum().item() * rows / 5
        got = (ran.log_prob_sum() - drawn.log_prob_sum()).item()
        assert got == pytest.approx(expected, rel=1e-4)


def test_density_of_a_draw_is_the_flows_in_the_sites_own_units():
    guide = pf.AutoAmortizedFlow(with_globals, Rows(), **SMALL).setup(X)
    with torch.no_grad():
        for p in guide.flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    trace = poutine.trace(guide).get_trace(X)
    trace.compute_log_prob()
    values = {name: trace.nodes[name]["value"].detach() for name in ("z", "u", "w")}
    to_interval = biject_to(dist.Uniform(-1.0, 2.0).support)
    to_simplex = biject_to(dist.Dirichlet(torch.ones(3)).support)
    u, w = to_interval.inv(values["u"]), to_simplex.inv(values["w"])
    expected = guide.flow(X).log_prob(torch.cat([values["z"], u[:, None], w], dim=-1))
    expected = expected - to_interval.log_abs_det_jacobian(u, values["u"])
    expected = expected - to_simplex.log_abs_det_jacobian(w, values["w"])
    names = [*values, f"_{guide.pyro_name}_latent"]
    got = sum(trace.nodes[name]["unscaled_log_prob"] for name in names)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert {trace.nodes[name]["scale"] for name in names} == {SIZE / len(X)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_have_the_sites_shapes_supports_and_dtype(dtype):
    x = X.to(dtype)

    def model(x):
        with pyro.plate("data", SIZE, subsample=x):
            pyro.sample("u", dist.Uniform(x.new_tensor(-1.0), x.new_tensor(2.0)))
            pyro.sample("w", dist.Dirichlet(x.new_ones(3)))

    guide = pf.AutoAmortizedFlow(model, Rows(), **SMALL).setup(x)
    draws = guide.sample_posterior(6, x[:5])
    assert {k: tuple(v.shape) for k, v in draws.items()} == {"u": (6, 5), "w": (6, 5, 3)}
    assert {v.dtype for v in draws.values()} == {dtype}
    assert (draws["u"] > -1).all()
    assert (draws["u"] < 2).all()
    torch.testing.assert_close(draws["w"].sum(-1), torch.ones(6, 5, dtype=dtype))


def test_globals_stand_beside_the_locals():
    guide = pf.AutoAmortizedFlow(with_globals, Rows(), **SMALL).setup(X)
    draws = guide.sample_posterior(6, X[:5])
    shapes = {"loc": (6,), "scale": (6,), "z": (6, 5, 2), "u": (6, 5), "w": (6, 5, 3)}
    assert {k: tuple(v.shape) for k, v in draws.items()} == shapes
    assert {k: tuple(v.shape) for k, v in guide(X[:7]).items()} == {
        k: (7, *shape[2:]) if k in "zuw" else () for k, shape in shapes.items()
    }
    assert guide.median(X[:5])["z"].shape == (5, 2)
    levels = guide.quantiles([0.1, 0.9], X[:5])["u"]
    assert levels.shape == (2, 5)
    assert (levels[0] < levels[1]).all()


def test_start_is_a_gaussian_around_the_sites_start():
    def far(x):
        with pyro.plate("data", SIZE, subsample=x):
            pyro.sample("z", dist.Normal(1000.0, 0.1))

    guide = pf.AutoAmortizedFlow(far, Rows(), **SMALL, linear="reverse").setup(X)
    draws = guide.sample_posterior(20_000, X)["z"]
    torch.testing.assert_close(draws.mean(0), torch.full((12,), 1000.0), atol=0.1, rtol=0)
    torch.testing.assert_close(draws.std(0), torch.ones(12), atol=0.05, rtol=0)


# Training


def test_posterior_is_right():
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 8))
    guide = pf.AutoAmortizedFlow(of_batch, net, **SMALL)
    pf.fit_guide(of_batch, guide, X, particles=16, lr=0.03, max_steps=400, progress=False)
    draws = guide.sample_posterior(20_000, X)["z"]
    torch.testing.assert_close(draws.mean(0), X[:, 0] / (1 + NOISE**2), atol=0.08, rtol=0)
    spread = torch.full((12,), NOISE / (1 + NOISE**2) ** 0.5)
    torch.testing.assert_close(draws.std(0), spread, atol=0.06, rtol=0)


def test_global_and_local_posteriors_are_right():
    """Given its rows' mean, the global location is Normal; each local site follows its row."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(loc + z, 1.0), obs=x[:, 0])

    x = 2 + 1.4 * torch.randn(40, 1)
    guide = pf.AutoAmortizedFlow(model, Rows(), None).setup(x)
    loss = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    loss = loss(model, guide)
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 800)
    for _ in range(800):
        optimiser.zero_grad()
        loss(x).backward()
        optimiser.step()
        schedule.step()
    draws = guide.sample_posterior(5000, x)
    variance = 2.0
    exact = x.mean().item() / (1 + variance / 25 / 40)
    assert draws["loc"].mean().item() == pytest.approx(exact, abs=0.15)
    torch.testing.assert_close(draws["z"].mean(0), (x[:, 0] - exact) / variance, atol=0.25, rtol=0)


@pytest.mark.parametrize(
    "builder", [pf.iaf, pf.realnvp, pf.nsf, None], ids=["iaf", "realnvp", "nsf", "gaussian"]
)
def test_every_parameter_trains_under_svi(builder):
    small = {"layers": 2, "hidden": (8,)} if builder else {}
    guide = pf.AutoAmortizedFlow(with_globals, nn.Linear(1, 4), builder, **small).setup(X)
    before = weights(guide)
    svi = SVI(with_globals, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for rows in (12, 5, 9, 12):
        svi.step(X[:rows])
    assert len(moved(before, guide)) == len(before)


def test_second_guide_of_a_name_trains_from_the_stores_values():
    def trained(steps):
        guide = pf.AutoAmortizedFlow(with_globals, nn.Linear(1, 4), name="q", **SMALL).setup(X)
        before = weights(guide)
        svi = SVI(with_globals, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        for _ in range(steps):
            svi.step(X)
        return guide, moved(before, guide)

    first, _ = trained(30)
    kept = weights(first)
    second, changed = trained(1)
    assert len(changed) == len(kept)
    for name, p in second.named_parameters():
        assert (p - kept[name]).abs().max() < 0.05, name


@pytest.mark.parametrize("local", [False, True], ids=["store", "local_parameters"])
def test_trains_with_a_torch_optimiser(local):
    with pyro.settings.context(module_local_params=local):
        guide = pf.AutoAmortizedFlow(with_globals, nn.Linear(1, 4), **SMALL).setup(X)
        loss = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
        loss = loss(with_globals, guide)
        optimiser = torch.optim.Adam(guide.parameters(), lr=0.02)
        before = weights(guide)
        losses = []
        for step in range(60):
            optimiser.zero_grad()
            value = loss(X[:6] if step % 2 else X)
            value.backward()
            optimiser.step()
            losses.append(value.item())
    assert sum(losses[-10:]) < sum(losses[:10])
    assert len(moved(before, guide)) == len(before)


def test_trains_under_svi_with_local_parameters():
    with pyro.settings.context(module_local_params=True):
        guide = pf.AutoAmortizedFlow(with_globals, nn.Linear(1, 4), **SMALL).setup(X)
        before = weights(guide)
        svi = SVI(with_globals, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        svi.step(X)
        svi.step(X)
    assert len(moved(before, guide)) == len(before)
    assert len(pyro.get_param_store()) == 0


def test_encoder_runs_once_for_all_particles():
    encoder = Rows()
    guide = pf.AutoAmortizedFlow(with_globals, encoder, **SMALL).setup(X)
    encoder.calls = 0
    loss = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    loss.differentiable_loss(with_globals, guide, X).backward()
    assert encoder.calls == 1


def test_model_runs_no_further_than_its_plate():
    runs = []

    def model(x):
        loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", SIZE, subsample=x):
            runs.append(len(x))
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x[:, 0])

    at = init_to_value(values={"loc": torch.tensor(1.0)})  # nothing can draw it
    guide = pf.AutoAmortizedFlow(model, Rows(), init_loc_fn=at, **SMALL).setup(X)
    runs.clear()
    state = torch.get_rng_state()
    asked = guide._plate_of_the_model("data", (X[:3],), {})
    assert torch.equal(state, torch.get_rng_state())
    assert (asked.size, asked.items) == (SIZE, 3)
    guide(X)
    assert runs == []


def test_predictive_runs():
    guide = pf.AutoAmortizedFlow(of_batch, Rows(), **SMALL).setup(X)
    draws = Predictive(of_batch, guide=guide, num_samples=7)(X)
    assert draws["z"].shape == (7, 12)


# State


def test_state_dict_round_trips():
    def make():
        return pf.AutoAmortizedFlow(with_globals, nn.Linear(1, 4), **SMALL).setup(X)

    guide = make()
    svi = SVI(with_globals, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(20):
        svi.step(X)
    pyro.clear_param_store()
    fresh = make()
    fresh.load_state_dict(guide.state_dict())

    def score(guide):
        pyro.set_rng_seed(3)
        return elbo(with_globals, guide, X)

    assert score(fresh) == score(guide)


def test_store_save_clear_load_restores_the_guide(tmp_path):
    def make():
        return pf.AutoAmortizedFlow(with_globals, nn.Linear(1, 4), **SMALL).setup(X)

    guide = make()
    svi = SVI(with_globals, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(20):
        svi.step(X)
    pyro.get_param_store().save(tmp_path / "store")
    trained = dict(guide.named_parameters())
    del guide, svi
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store", map_location="cpu")
    fresh = make()
    fresh(X)
    for name, p in trained.items():
        torch.testing.assert_close(p, dict(fresh.named_parameters())[name])


def test_a_copy_trains_by_itself():
    guide = pf.AutoAmortizedFlow(with_globals, Rows(), **SMALL).setup(X)
    guide(X)
    twin = copy.deepcopy(guide)
    before = weights(guide)
    svi = SVI(with_globals, twin, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(3):
        svi.step(X)
    assert not moved(before, guide)
    assert len(moved(before, twin)) == len(before)


def test_a_pickled_guide_draws_and_says_that_its_model_is_gone():
    guide = pf.AutoAmortizedFlow(of_batch, Rows(), **SMALL).setup(X)
    guide(X)
    there = pickle.loads(pickle.dumps(guide))
    torch.manual_seed(1)
    expected = guide.sample_posterior(3, X)["z"]
    torch.manual_seed(1)
    assert torch.equal(there.sample_posterior(3, X)["z"], expected)
    with pytest.raises(RuntimeError, match="lost its model"):
        there(X)
    guide(X)


# What it refuses


def no_plate(x):
    pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, 0])


def two_plates(x):
    with pyro.plate("groups", 3):
        pyro.sample("group", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def nested(x):
    with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 3):
        pyro.sample("deep", dist.Normal(0.0, 1.0))


def sequential(x):
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))


def discrete(x):
    with pyro.plate("data", len(x)):
        pyro.sample("kind", dist.Categorical(torch.ones(3)))


def counts(x):
    with pyro.plate("data", len(x)):
        pyro.sample("count", dist.Poisson(3.0))


def undeclared(x):
    with pyro.plate("data", len(x)):
        pyro.sample("wide", dist.Normal(torch.zeros(2, len(x)), 1.0))


def own_bounds(x):
    with pyro.plate("data", len(x)):
        pyro.sample("bounded", dist.Uniform(x[:, 0] - 1, x[:, 0]))


OUTSIDE = pyro.plate("data", 12)


def plate_outside(x):
    with OUTSIDE:
        pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (no_plate, "inside a plate, found none.*use pf.AutoFlow"),
        (two_plates, "'group' in plate 'groups' and 'z' in plate 'data'"),
        (nested, "'deep' in one vectorised plate at most, got plates"),
        (sequential, r"'z0' .*data \(sequential\)"),
        (discrete, "'kind', a discrete Categorical"),
        (counts, "'count', a discrete Poisson"),
        (undeclared, r"'wide' .*got batch shape \(2, 12\)"),
        (own_bounds, "'bounded' to have the same support .*from -3 to 1"),
        (plate_outside, "made outside of it"),
    ],
)
def test_refuses(model, words):
    guide = pf.AutoAmortizedFlow(model, Rows(), **SMALL)
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            guide.setup(X)


@pytest.mark.parametrize(
    ("model", "output", "words"),
    [
        (of_batch, torch.ones(11, 2), "expected 12 rows, one for each item of the plate, got 11"),
        (of_length, torch.ones(3, 2), "expected 12 rows"),
        (subsampling, torch.ones(4, 2), "expected 5 rows, .* or 12 for the full plate, got 4"),
        (of_length, torch.ones(12), r"expected a tensor \(items, context\), got shape \(12,\)"),
        (of_length, (torch.ones(12, 1),) * 2, "got tuple"),
    ],
)
def test_refuses_rows_that_do_not_fit(model, output, words):
    class Fixed(nn.Module):
        def forward(self, x):
            return output

    with pytest.raises(ValueError, match=words):
        pf.AutoAmortizedFlow(model, Fixed(), **SMALL).setup(X)


def test_refuses_an_encoder_that_is_no_module():
    with pytest.raises(ValueError, match=r"encoder: expected a torch.nn.Module, got function"):
        pf.AutoAmortizedFlow(of_batch, lambda x: x)
