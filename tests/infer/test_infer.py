"""Guides that start well, gradients of low variance, weights, and verdicts that do not lie."""

import math
import warnings

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceTailAdaptive_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from torch.distributions import biject_to, constraints

import pyroflows as pf
from pyroflows.infer import ForwardKL, ImportanceELBO, PathELBO
from pyroflows.infer.proper import values_of
from pyroflows.programs.vectorize import can_run_together
from pyroflows.testing import randomize

FLOAT64 = torch.float64
COVARIANCE = torch.tensor([[4.0, 1.5], [1.5, 1.0]], dtype=FLOAT64)
MEAN = torch.tensor([100.0, -3.0], dtype=FLOAT64)


def gaussian():
    pyro.sample("z", dist.MultivariateNormal(MEAN, COVARIANCE))


def regression(x, y):
    """Flat priors, one of them on the positive numbers."""
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real, (), (2,)))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    mean = beta[..., :1] + beta[..., 1:] * x
    pyro.sample("y", dist.Normal(mean, sigma[..., None]).to_event(1), obs=y)


def line():
    x = torch.linspace(1000, 1100, 40, dtype=FLOAT64)
    return x, 5e4 + 30.0 * x + 100 * torch.randn(40, dtype=FLOAT64)


SCHOOLS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


def eight_schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


# Where guides start


@pytest.mark.parametrize(
    ("init", "model", "args", "bound"),
    [
        ("init", gaussian, (), 5),
        ("newton", gaussian, (), 12),
        ("init", eight_schools, (SCHOOLS,), 5),
        ("newton", eight_schools, (SCHOOLS,), 6 + 2 * 60),
    ],
)
def test_runs_of_the_model_are_bounded(init, model, args, bound):
    runs = []

    def counted(*args):
        runs.append(args)
        return model(*args)

    guide = pf.AutoFlow(counted, init=init, layers=1, hidden=(8,)).setup(*args)
    assert len(runs) <= bound
    runs.clear()
    pf.fit_guide(counted, guide, *args, max_steps=2, progress=False)
    # Steps, the start and the end measured, and what is left to gain.
    assert len(runs) == 4 + 2 + 2 + 1
    runs.clear()
    pf.importance_weights(counted, guide, *args, num_samples=100)
    assert len(runs) == 3 + 1


def test_points_at_which_a_model_raises_cost_few_runs():
    runs = []

    def log_density(points):
        runs.append(len(points))
        if (points > 2.9).any():
            raise ValueError("out of the support")
        return -points.square().sum(1)

    points = torch.linspace(0, 3, 65)[:, None]
    values = values_of(log_density, points)
    bad = points.squeeze() > 2.9
    assert values[bad].eq(-math.inf).all()
    torch.testing.assert_close(values[~bad], -points[~bad].squeeze().square())
    assert len(runs) < 20


def test_start_is_the_posterior_where_that_is_a_gaussian():
    guide = pf.AutoFlow(gaussian).setup()
    torch.testing.assert_close(guide.whiten.loc, MEAN)
    torch.testing.assert_close(guide.whiten.tril @ guide.whiten.tril.mT, COVARIANCE)
    found = pf.report(gaussian, guide, num_samples=1000)
    assert found.elbo == pytest.approx(0.0, abs=1e-6)


def test_flat_priors_and_units_of_any_size():
    x, y = line()
    design = torch.stack([torch.ones_like(x), x], dim=1)
    exact = torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    guide = pf.AutoFlow(regression, layers=2, hidden=(16,)).setup(x, y)
    assert guide.flow.sample((3,)).dtype == FLOAT64
    pf.fit_guide(regression, guide, x, y, max_steps=300, progress=False)
    found = pf.report(regression, guide, x, y, num_samples=2000)
    draws = found.draws["beta"]
    assert ((draws.mean(0) - exact).abs() < 0.1 * draws.std(0)).all()
    assert (found.draws["sigma"] > 0).all()


def test_log_density_is_the_density_of_the_unconstrained_sites():
    def model():
        pyro.sample("scale", dist.Gamma(torch.tensor(3.0, dtype=FLOAT64), 2.0))
        pyro.sample("simplex", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0], dtype=FLOAT64)))

    guide = pf.AutoFlow(model, init="init", layers=1, hidden=(4,)).setup()
    latent = torch.randn(5, 3, dtype=FLOAT64)
    scale, simplex = (biject_to(c) for c in (constraints.positive, constraints.simplex))
    expected = dist.TransformedDistribution(dist.Gamma(3.0, 2.0), scale.inv).log_prob(latent[:, 0])
    dirichlet = dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0], dtype=FLOAT64))
    weights = simplex(latent[:, 1:])
    expected = expected + dirichlet.log_prob(weights)
    expected = expected + simplex.log_abs_det_jacobian(latent[:, 1:], weights)
    torch.testing.assert_close(guide.log_density((), {})(latent), expected)


def test_centred_hierarchy_has_no_mode_and_starts_all_the_same():
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])

    def schools():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        theta = dist.Normal(mu[..., None], tau[..., None]).expand((*mu.shape, 8)).to_event(1)
        theta = pyro.sample("theta", theta)
        pyro.sample("y", dist.Normal(theta, 12.0).to_event(1), obs=y)

    guide = pf.AutoFlow(schools).setup()
    assert (guide.whiten.tril.diagonal() > 1e-2).all()
    assert pf.report(schools, guide, num_samples=1000).elbo > -45


def test_init_without_newton_is_narrow_at_the_given_place():
    guide = pf.AutoFlow(
        gaussian,
        init="init",
        init_scale=0.5,
        init_loc_fn=pyro.infer.autoguide.init_to_value(values={"z": torch.ones(2, dtype=FLOAT64)}),
    ).setup()
    assert guide.whiten.loc.tolist() == [1.0, 1.0]
    assert guide.whiten.tril.tolist() == [[0.5, 0.0], [0.0, 0.5]]


def test_hidden_sites_are_left_alone():
    def model():
        pyro.sample("kept", dist.Normal(0.0, 1.0))
        pyro.sample("left", dist.Bernoulli(0.5))

    guide = pf.AutoFlow(model, pf.iaf, hide=["left"], layers=1, hidden=(8,)).setup()
    assert list(guide.sample_posterior(2)) == ["kept"]


def test_state_loads_into_a_guide_that_was_set_up():
    x, y = line()
    guides = [pf.AutoFlow(regression, layers=1, hidden=(8,)).setup(x, y) for _ in range(2)]
    pf.testing.randomize(guides[0].flow, gain=0.1)
    guides[1].load_state_dict(guides[0].state_dict())
    z = torch.randn(4, 3, dtype=FLOAT64)
    torch.testing.assert_close(guides[0].flow.log_prob(z), guides[1].flow.log_prob(z))


def discrete():
    pyro.sample("kind", dist.Poisson(3.0))
    pyro.sample("z", dist.Normal(0.0, 1.0))


def subsampled():
    with pyro.plate("rows", 100, subsample_size=10):
        pyro.sample("local", dist.Normal(0.0, 1.0))


def improper():
    scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
    pyro.sample("y", dist.Normal(0.0, scale).mask(False), obs=torch.tensor(1.0))


def hopeless():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("likelihood", z * float("nan"))


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (discrete, "'kind' is a discrete Poisson without finite support"),
        (subsampled, "latent site 'local' is inside the plate 'rows'.*AutoAmortizedFlow"),
        (hopeless, "log-density of site 'likelihood' is NaN or infinite at the start"),
        (lambda: None, "expected continuous latent sites, found none"),
    ],
    ids=["discrete", "subsampled", "hopeless", "empty"],
)
def test_models_a_guide_cannot_serve(model, message):
    with pytest.raises(ValueError, match=message), pyro.validation_enabled(False):
        pf.AutoFlow(model).setup()


def test_posterior_without_end_is_an_error():
    guide = pf.AutoFlow(improper, layers=1, hidden=(8,), family="affine", init="init")
    with pytest.raises(ValueError, match="'scale'.*the posterior is improper"):
        pf.fit_guide(improper, guide, lr=0.5, max_steps=1000, progress=False)


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")  # Pyro notices too
def test_model_whose_sites_come_and_go_is_an_error():
    calls = []

    def model():
        calls.append(1)
        pyro.sample("always", dist.Normal(0.0, 1.0))
        if len(calls) > 60:
            pyro.sample("sometimes", dist.Normal(0.0, 1.0))

    guide = pf.AutoFlow(model, layers=1, hidden=(4,)).setup()
    calls[:] = []
    with pytest.raises(ValueError, match="latent site 'sometimes' comes and goes"):
        pf.fit_guide(model, guide, max_steps=200, progress=False)


# Objectives


def off_guide(**options):
    """A flow guide that is not at its optimum."""
    guide = pf.AutoFlow(gaussian, pf.iaf, layers=1, hidden=(4,), linear="reverse", **options)
    guide.setup()
    pf.testing.randomize(guide.flow, gain=0.2)
    return guide


def gradients(elbo, guide, repeats):
    parameters = list(guide.flow.parameters())
    found = []
    for _ in range(repeats):
        guide.zero_grad()
        elbo.loss_and_grads(gaussian, guide)
        flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        found.append(torch.cat([g.flatten() for g in flat]))
    return torch.stack(found)


SETTINGS = {"num_particles": 256, "vectorize_particles": True, "max_plate_nesting": 0}


def test_path_gradient_agrees_with_the_total_one_in_expectation():
    guide = off_guide()
    path, total = (gradients(kind(**SETTINGS), guide, 60) for kind in (PathELBO, Trace_ELBO))
    error = (path.var(0) / 60 + total.var(0) / 60).sqrt()
    z = (path.mean(0) - total.mean(0)) / error.clamp(min=1e-12)
    assert z.abs().max() < 4.5
    assert error.max() > 0


def test_path_gradient_vanishes_at_the_optimum():
    guide = pf.AutoFlow(gaussian, pf.iaf, layers=2, hidden=(8,)).setup()  # starts there
    assert gradients(PathELBO(**SETTINGS), guide, 3).abs().max() < 1e-8
    assert gradients(Trace_ELBO(**SETTINGS), guide, 3).abs().max() > 1e-3


class Breaks(Trace_ELBO):
    """NaN in some of its calls; remembers the guide's location at each."""

    def __init__(self, calls, seen):
        super().__init__()
        self.calls, self.seen = calls, seen

    def differentiable_loss(self, model, guide, *args, **kwargs):
        self.seen.append(guide.loc.detach().clone())
        loss = super().differentiable_loss(model, guide, *args, **kwargs)
        return loss * float("nan") if len(self.seen) in self.calls else loss


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_steps_that_stay_not_finite_lead_back_to_the_best_parameters():
    guide, seen = AutoMultivariateNormal(gaussian), []
    objective = Breaks(range(103, 201), seen)
    settings = {"objective": objective, "average": 0.0, "max_steps": 400, "progress": False}
    with pytest.warns(UserWarning, match="98 of 400 steps not finite .* 1 time back"):
        history = pf.fit_guide(gaussian, guide, **settings)
    assert history.rollbacks == 1
    assert history.skipped == 98
    assert history.steps == [0, 100, 300, 400]
    assert history.lr[2] == pytest.approx(0.3 * history.lr[1])
    torch.testing.assert_close(seen[200], seen[100], rtol=0, atol=0)  # as after step 100
    assert not torch.equal(seen[110], seen[100])


def test_the_step_shrinks_where_the_elbo_is_flat(monkeypatch):
    monkeypatch.setattr("pyroflows.infer.plateau._NOTHING_LEFT", -1.0)
    guide = pf.AutoFlow(gaussian, layers=1, hidden=(4,))  # starts at the optimum
    history = pf.fit_guide(gaussian, guide, particles=2, progress=False)
    assert "the ELBO is flat" in history.stopped
    assert list(dict.fromkeys(history.lr)) == pytest.approx([1e-2, 3e-3, 9e-4])


def test_a_short_last_window_counts_like_any_other():
    history = pf.fit_guide(
        gaussian, AutoMultivariateNormal(gaussian), particles=2, max_steps=130, progress=False
    )
    assert history.rollbacks == 0
    assert history.steps == [0, 100, 130]


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_steps_that_are_never_finite_again_end_with_the_best_parameters():
    guide, seen = AutoMultivariateNormal(gaussian), []
    objective = Breaks(range(150, 10_000), seen)
    with pytest.raises(FloatingPointError, match="no finite ELBOs in steps 900 to 999"):
        pf.fit_guide(gaussian, guide, objective=objective, max_steps=2000, progress=False)
    torch.testing.assert_close(guide.loc.detach(), seen[-1], rtol=0, atol=0)


@pytest.mark.parametrize("build", [pf.iaf, pf.maf, pf.nsf], ids=lambda b: b.__name__)
@pytest.mark.parametrize("context", [0, 2], ids=["plain", "conditional"])
def test_a_draws_density_along_its_path_is_the_detached_one(build, context):
    flow = build(5, context=context, layers=3, hidden=(16, 16)).double()
    randomize(flow)
    c = torch.randn(40, 2, dtype=torch.float64) if context else None
    q = flow(c)
    x = q.rsample(() if context else (40,))
    got = q.path_log_prob(x)
    expected = flow.detached().log_prob(x, c)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    sources = [x, *flow.parameters()]
    pair = [
        torch.autograd.grad(v.sum(), sources, retain_graph=True, allow_unused=True)
        for v in (got, expected)
    ]
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no_grad"])
@pytest.mark.parametrize("rows", [7, 5000])  # many are drawn in pieces, where there is no graph
def test_a_draws_density_along_its_path_calls_no_network(graph, rows, monkeypatch):
    flow = pf.iaf(5, layers=3, hidden=(16,))
    calls = []
    with torch.set_grad_enabled(graph):
        q = flow()
        x = q.rsample((rows,))
        monkeypatch.setattr(pf.nets.MADE, "forward", lambda *a: calls.append(a))
        monkeypatch.setattr(pf.nets.MADE, "solve", lambda *a: calls.append(a))
        log_q = q.path_log_prob(x)
        if graph:
            log_q.sum().backward()
    assert calls == []


def test_importance_gradient_is_that_of_the_bound():
    """Against autograd through the bound itself, in expectation."""
    guide = off_guide()
    settings = {**SETTINGS, "num_particles": 8}
    reparameterised = gradients(ImportanceELBO(**settings), guide, 1500)
    plain = gradients(RenyiELBO(alpha=0, **settings), guide, 1500)
    error = (reparameterised.var(0) / 1500 + plain.var(0) / 1500).sqrt().clamp(min=1e-12)
    assert ((reparameterised.mean(0) - plain.mean(0)) / error).abs().max() < 4.5
    assert reparameterised.var(0).sum() < plain.var(0).sum()


def test_forward_kl_moves_towards_the_posterior():
    guide = off_guide()
    before = pf.report(gaussian, guide, num_samples=4000).elbo
    history = pf.fit_guide(
        gaussian, guide, objective=ForwardKL(**SETTINGS), max_steps=300, progress=False
    )
    after = pf.report(gaussian, guide, num_samples=4000).elbo
    assert after > before
    assert after > -0.01
    assert history.skipped == 0


@pytest.mark.parametrize(
    "elbo",
    [
        PathELBO(num_particles=4),
        ImportanceELBO(**SETTINGS),
        RenyiELBO(alpha=0.5, **SETTINGS),
        TraceTailAdaptive_ELBO(**SETTINGS),
    ],
    ids=lambda e: type(e).__name__,
)
def test_objectives_train_under_svi(elbo):
    guide = off_guide()
    before = pf.report(gaussian, guide, num_samples=4000).elbo
    svi = SVI(gaussian, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pyro says of its own objectives
        losses = [svi.step() for _ in range(60)]
    assert len(losses) == 60  # Pyro's tail-adaptive one has no value to show
    assert pf.report(gaussian, guide, num_samples=4000).elbo > before + 0.5 * abs(before)


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_path_gradient_of_pyro_guides(kind):
    guide = kind(gaussian)
    guide()
    history = pf.fit_guide(gaussian, guide, max_steps=200, lr=0.1, progress=False)
    assert math.isfinite(history.train[-1])


def test_path_gradient_refuses_what_cannot_be_differentiated():
    def guide():
        pyro.sample("k", dist.Poisson(pyro.param("rate", torch.tensor(2.0))))

    with pytest.raises(NotImplementedError, match="site 'k' is drawn from Poisson"):
        PathELBO(max_plate_nesting=0).differentiable_loss(guide, guide)


# Training


def test_steps_at_which_the_model_raises_are_counted():
    calls = []

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        calls.append(1)
        if len(calls) > 200 and len(calls) % 7 == 0:
            raise ValueError("not positive definite")
        pyro.factor("f", -z.abs().sqrt())  # a tail that keeps the training going

    guide = pf.AutoFlow(model, pf.iaf, layers=1, hidden=(4,)).setup()
    calls[:] = [1] * 150
    with pytest.warns(UserWarning, match=r"fit_guide: \d+ of 300 steps not finite and left out"):
        history = pf.fit_guide(model, guide, max_steps=300, progress=False)
    assert 10 < history.skipped < 100
    assert f"{history.skipped} of 300 steps not finite and left out" in repr(history)


@pytest.mark.filterwarnings("ignore:fit_guide")
@pytest.mark.parametrize("lr", [1e-2, 1.0, 100.0])
@pytest.mark.parametrize("steps", [100, 150])
def test_a_guide_is_never_worse_than_it_began(lr, steps):
    def model():
        with pyro.plate("rows", 2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = pf.AutoFlow(model, layers=1, hidden=(8,), init="init")
    history = pf.fit_guide(model, guide, lr=lr, max_steps=steps, progress=False)
    assert history.score >= history.val[0]
    found = pf.report(model, guide, num_samples=2000)
    assert found.elbo > history.val[0] - 0.1


@pytest.mark.filterwarnings("ignore:fit_guide")
@pytest.mark.parametrize("lr", [1e-2, 1.0, 100.0])
def test_a_guide_of_batches_is_never_far_worse_than_it_began(lr):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) + 1

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", 1000, subsample=x):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    guide = pf.AutoFlow(model, layers=1, hidden=(8,)).setup(x)
    before = pf.report(model, guide, x, num_samples=1000).elbo
    history = pf.fit_guide(model, guide, batches=x.split(100), lr=lr, max_steps=150, progress=False)
    assert not history.val
    # What eight of ten batches may tell otherwise: 10 / 8 (1 / 2 + 3 sqrt(1 / 2)) + 3 nats.
    assert pf.report(model, guide, x, num_samples=1000).elbo > before - 6.3


def test_a_model_that_always_raises_says_why():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z.requires_grad:
            raise ValueError("a mistake in the model")

    guide = AutoNormal(model)
    guide()
    with pytest.raises(ValueError, match="a mistake in the model"):
        pf.fit_guide(model, guide, objective="elbo", vectorize=False, progress=False)


def test_mini_batches():
    data = 3.0 + torch.randn(100)

    def model(rows):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 100, subsample=rows):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=rows)

    loader = torch.utils.data.DataLoader(data, batch_size=25, shuffle=True)
    guide = pf.AutoFlow(model, pf.iaf, layers=1, hidden=(4,))
    pf.fit_guide(model, guide, batches=loader, max_steps=400, progress=False)
    assert guide.median()["loc"].item() == pytest.approx(data.mean().item(), abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"particles": 0}, "particles: expected"),
        ({"average": 1.0}, "average: expected"),
        ({"objective": "best"}, "objective: expected one of"),
        ({"batches": []}, "batches: expected at least one"),
    ],
)
def test_fit_guide_refuses(arguments, message):
    guide = pf.AutoFlow(gaussian, layers=1, hidden=(4,)).setup()
    with pytest.raises(ValueError, match=message):
        pf.fit_guide(gaussian, guide, progress=False, **arguments)


# Weights and verdicts


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_psis_is_arviz_own(spread):
    log_weight = spread * torch.randn(2000, dtype=FLOAT64)
    smoothed, shape = pf.psis(log_weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, k = az.psislw(log_weight.numpy())
    assert shape == pytest.approx(float(k), abs=1e-6)
    np.testing.assert_allclose(smoothed.numpy(), np.asarray(expected), atol=1e-6)


def test_psis_knows_the_tail_of_a_pareto():
    uniform = torch.rand(100_000, dtype=FLOAT64)
    for shape in (0.3, 0.7, 1.2):
        assert pf.khat(-shape * uniform.log()) == pytest.approx(shape, abs=0.1)


def test_special_weights():
    assert pf.khat(torch.full((1000,), 3.0)) == -math.inf
    assert pf.khat(torch.randn(10)) == math.inf
    assert pf.khat(torch.cat([torch.randn(100), torch.tensor([float("nan")])])) == math.inf
    zero = torch.randn(1000)
    zero[:10] = -math.inf
    assert math.isfinite(pf.khat(zero))


def test_ten_thousand_weights_cost_one_run_of_the_model():
    runs = []

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        runs.append(z.shape)

    guide = pf.AutoFlow(model, layers=1, hidden=(4,)).setup()
    runs.clear()
    found = pf.importance_weights(model, guide, num_samples=10_000)
    assert runs == 4 * [(3,)]  # to see how it can be run; then all at once
    assert found.draws["z"].shape == (10_000, 3)
    assert found.log_weight.shape == (10_000,)


def test_weights_of_plates_and_of_models_one_by_one():
    y = torch.randn(5)

    def model():
        with pyro.plate("rows", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = AutoNormal(model)
    guide()
    together = pf.importance_weights(model, guide, num_samples=50)
    alone = pf.importance_weights(model, guide, num_samples=50, vectorize=False)
    for found in (together, alone):
        assert found.draws["z"].shape == (50, 5)
        expected = dist.Normal(0.0, 1.0).log_prob(found.draws["z"]).sum(1)
        expected = expected + dist.Normal(found.draws["z"], 1.0).log_prob(y).sum(1)
        torch.testing.assert_close(found.log_p, expected)


def sums_its_draws(y):
    """A posterior N(1.5, 1 / 2) by a factor that adds up all draws of a run."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("prior", -0.5 * ((z - 3.0) ** 2).sum())
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def test_a_sum_over_draws_is_noticed_next_to_many_rows():
    y = torch.randn(100_000)
    guide = pf.AutoFlow(sums_its_draws, layers=1, hidden=(8,)).setup(y)
    assert guide.whiten.loc.item() == pytest.approx(1.5, abs=0.01)
    with pytest.warns(UserWarning, match="site 'prior' .* one by one"):
        assert not can_run_together(sums_its_draws, guide, (y,), {}, 4, 1)
    log_density = guide.log_density((y,), {})  # by vmap each draw has a run of its own
    assert log_density.settle(torch.zeros(1)) is None
    z = torch.randn(3, 1)
    alone = guide.log_density((y,), {}, batching="alone")(z)
    torch.testing.assert_close(log_density(z), alone)


def test_rounding_next_to_many_rows_is_no_other_density():
    y = 100.0 + torch.randn(100_000)

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 100.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z, scale), obs=y)

    guide = pf.AutoFlow(model, init="init", layers=1, hidden=(8,)).setup(y)
    assert can_run_together(model, guide, (y,), {}, 4, 1)


@pytest.mark.filterwarnings("ignore:the model cannot run")
@pytest.mark.parametrize("vectorize", [True, False])
def test_weights_one_by_one_are_of_the_model_outside_any_plate(vectorize):
    y = torch.randn(5)

    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z[0].sum(), 1.0), obs=y)  # the first component

    def guide(y):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    found = pf.importance_weights(model, guide, y, num_samples=3, vectorize=vectorize)
    z = found.draws["z"]
    log_q = dist.Normal(0.0, 1.0).log_prob(z).sum(1)
    expected = log_q + dist.Normal(z[:, :1], 1.0).log_prob(y).sum(1)
    torch.testing.assert_close(found.log_p, expected)
    torch.testing.assert_close(found.log_q, log_q)

    flow_guide = pf.AutoFlow(model, layers=1, hidden=(8,)).setup(y)
    batching = None if vectorize else "alone"
    torch.testing.assert_close(flow_guide.log_density((y,), {}, None, batching)(z), expected)


def test_weights_that_tie_at_the_top_are_not_exact():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("half", torch.where(z > 0, 0.0, -5.0))

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    found = pf.report(model, guide, num_samples=1000)
    assert math.isfinite(found.khat)
    assert found.khat < 0
    assert found.verdict.startswith("Use the weighted draws only")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-7, 1e-5, 1e-3])
def test_weights_that_are_even_but_for_rounding_are_good(dtype, scale):
    noise = torch.randn(4000, dtype=torch.float64)
    rounded = (noise * scale / 1e-7).round() * 1e-7  # as sums of large numbers leave them
    assert pf.khat(rounded.to(dtype) + 0.5) < 0


def test_weights_without_a_tail_that_fits_have_no_good_khat():
    assert pf.khat(torch.cat([torch.zeros(990), torch.linspace(1, 3, 10)])) == math.inf
    smoothed, shape = pf.psis(torch.full((100,), -math.inf))
    assert shape == math.inf
    torch.testing.assert_close(smoothed.exp(), torch.full((100,), 0.01, dtype=FLOAT64))


@pytest.mark.parametrize("wrong", [10.5, "a", 0, True])
def test_number_of_draws_is_checked(wrong):
    with pytest.raises(ValueError, match="num_samples: expected an integer"):
        pf.importance_weights(gaussian, gaussian, num_samples=wrong)


def test_a_setup_that_failed_can_be_repeated():
    def model(broken=False):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        inside = dist.Uniform(0.0, 1.0, validate_args=False)
        pyro.sample("y", inside, obs=torch.tensor(2.0 if broken else 0.5))

    builders = [pf.realnvp, pf.iaf]  # the first needs two features
    guide = pf.AutoFlow(model, builder=lambda n: builders.pop(0)(n))
    with pytest.raises(ValueError, match="features"):
        guide.setup()
    assert guide.setup()().keys() == {"z"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guide = pf.AutoFlow(model, layers=1, hidden=(8,))
        with pytest.raises(ValueError, match="site 'y'"):
            guide.setup(broken=True)
    assert guide.setup().pyro_name == "AutoFlow(z)#2"  # no site twice


def test_a_resumed_training_has_the_models_buffers(tmp_path):
    class Decoder(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.BatchNorm1d(1)

        def forward(self, y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal(z + self.net(y[:, None])[:, 0], 1.0), obs=y)

    def train(steps, resume):
        pyro.clear_param_store()
        model = Decoder()
        guide = pf.AutoFlow(model, layers=1, hidden=(4,), init="init")
        checkpoint = pf.Checkpoint(tmp_path, resume=resume)
        settings = {"particles": 1, "progress": False, "checkpoint": checkpoint}
        pf.fit_guide(model, guide, y, max_steps=steps, **settings)
        return {name: value.clone() for name, value in model.net.named_buffers()}

    y = torch.randn(20) + 5
    first, again = train(100, False), train(100, True)
    assert first["num_batches_tracked"] > 50
    for name, value in first.items():
        torch.testing.assert_close(again[name], value)


def test_report_on_an_exact_guide():
    found = pf.report(gaussian, gaussian, num_samples=500)
    assert found.khat == -math.inf
    assert found.ess == pytest.approx(500)
    assert found.largest_shift < 1e-9
    assert "Exact" in str(found)


def shifted(by, width):
    def guide():
        pyro.sample("z", dist.Normal(torch.tensor(by, dtype=FLOAT64), width))

    return guide


def standard():
    pyro.sample("z", dist.Normal(torch.tensor(0.0, dtype=FLOAT64), 1.0))


def test_report_measures_how_far_a_guide_is_off():
    found = pf.report(standard, shifted(0.5, 1.2), num_samples=20_000)
    assert found.trusted
    assert found.shift["z"].item() == pytest.approx(-0.5, abs=0.05)
    assert found.means()["z"].item() == pytest.approx(0.0, abs=0.05)
    assert found.evidence == pytest.approx(0.0, abs=4 * found.evidence_error + 1e-3)
    assert "z by 0.5" in found.verdict
    assert found.resample(5000)["z"].mean().item() == pytest.approx(0.0, abs=0.1)


def test_weights_move_no_number_that_never_varies():
    def model():
        pyro.sample("tril", dist.LKJCholesky(2, 2.0))  # whose first number is one

    def guide():
        pyro.sample("tril", dist.LKJCholesky(2, 2.2))

    found = pf.report(model, guide)
    assert found.shift["tril"][0].tolist() == [0, 0]
    assert found.verdict.startswith("Good")


def test_report_looks_at_the_size_of_a_tail_too():
    """Weights ``1 + scale u^-0.9`` have a tail of shape 0.9, of any size."""

    def uniform():
        zero = torch.tensor(0.0, dtype=FLOAT64)
        return pyro.sample("u", dist.Uniform(zero, 1.0))

    def report(scale):
        def model():
            u = uniform()
            pyro.factor("more", (scale * u**-0.9).log1p())

        return pf.report(model, uniform)

    small, large = report(1e-5), report(1e-2)
    assert min(small.khat, large.khat) > small.threshold
    assert small.even
    assert small.verdict.startswith("Good")
    assert small.evidence == pytest.approx(1e-4, abs=1e-4)  # log(1 + scale / 0.1)
    assert not large.trusted


def test_a_tail_of_next_to_no_weight_is_no_alarm_whatever_its_shape():
    def uniform():
        return pyro.sample("u", dist.Uniform(torch.tensor(0.0, dtype=FLOAT64), 1.0))

    def model():
        pyro.factor("more", (1e-6 * uniform().clamp(min=1e-9) ** -1.3).log1p())

    found = pf.report(model, uniform)
    assert found.khat > 1
    assert found.verdict.startswith("Good")
    assert found.evidence == pytest.approx(0.0, abs=0.01)


def test_a_guide_of_one_number_is_more_than_a_gaussian():
    def rate():
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Poisson(z.exp()), obs=torch.tensor(0.0))

    guide = pf.AutoFlow(rate)
    pf.fit_guide(rate, guide, progress=False)
    found = pf.report(rate, guide)
    assert found.good
    assert found.ess > 9900


def test_report_distrusts_a_guide_too_narrow():
    found = pf.report(standard, shifted(0.0, 0.3), num_samples=5000)
    assert not found.trusted
    assert found.verdict.startswith("Do not trust it")


def test_a_flow_is_neither_a_guide_nor_what_makes_one():
    flow = pf.iaf(2, layers=1, hidden=(8,))
    with pytest.raises(
        ValueError, match=r"guide: expected .*such as pf.AutoFlow\(model\), got Flow"
    ):
        pf.fit_guide(gaussian, flow, progress=False)
    for builder, came in ((flow, "a Flow"), ("iaf", "'iaf'")):
        with pytest.raises(ValueError, match=f"builder: expected a function .*got {came}"):
            pf.AutoFlow(gaussian, builder)
        with pytest.raises(ValueError, match=f"builder: expected a function .*got {came}"):
            pf.AutoAmortizedFlow(gaussian, torch.nn.Linear(1, 1), builder)
