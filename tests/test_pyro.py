"""Flows inside Pyro: as guides, priors and modules, with the parameter store and without it."""

import copy
import gc
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import NeuTraReparam, TransformReparam
from pyro.nn import PyroModule
from torch.distributions import biject_to, constraints, kl_divergence, transform_to

import pyroflows as pf

DATA = torch.tensor([1.0, 2.0, 3.0, 2.5])


def model(data):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(data)):
        pyro.sample("obs", dist.Normal(loc, scale), obs=data)


def make_guide(**changes):
    arguments = {"layers": 2, "hidden": (8,), **changes}
    return pf.AutoFlow(model, **arguments)


def make_svi(guide, lr=0.02):
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True)
    return SVI(model, guide, pyro.optim.Adam({"lr": lr}), elbo)


def train(guide, steps=150):
    svi = make_svi(guide)
    return [svi.step(DATA) for _ in range(steps)]


def elbo_of(guide, particles=500):
    pyro.set_rng_seed(1)
    loss = Trace_ELBO(num_particles=particles, vectorize_particles=True)
    with torch.no_grad():
        return loss.loss(model, guide, DATA)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def moved(before, module):
    return [name for name, p in module.named_parameters() if not torch.equal(before[name], p)]


@pytest.fixture
def local_parameters():
    with pyro.settings.context(module_local_params=True):
        yield


@pytest.mark.parametrize("builder", [pf.iaf, pf.realnvp, pf.nice, pf.nsf, pf.maf])
def test_guide_trains_under_svi(builder):
    guide = make_guide(builder=builder, init="init").setup(DATA)
    before = weights(guide.flow)
    losses = train(guide)
    assert sum(losses[-20:]) < sum(losses[:20])
    assert len(moved(before, guide.flow)) == len(before)


def test_guide_trains_under_elbo_module():
    guide = make_guide().setup(DATA)
    loss = Trace_ELBO(num_particles=8, vectorize_particles=True)(lambda: model(DATA), guide)
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.02)
    before = weights(guide.flow)
    losses = []
    for _ in range(100):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
        losses.append(value.item())
    assert sum(losses[-20:]) < sum(losses[:20])
    assert len(moved(before, guide.flow)) == len(before)


def test_guide_trains_under_svi_with_local_parameters(local_parameters):
    guide = make_guide().setup(DATA)
    before = weights(guide.flow)
    losses = train(guide)
    assert sum(losses[-20:]) < sum(losses[:20])
    assert len(moved(before, guide.flow)) == len(before)
    assert len(pyro.get_param_store()) == 0


def test_second_guide_with_local_parameters_is_independent(local_parameters):
    first, second = make_guide().setup(DATA), make_guide().setup(DATA)
    kept = weights(second.flow)
    train(first, 20)
    assert not moved(kept, second.flow)


def test_two_guides_of_one_model_are_fitted_to_two_data_sets():
    far, near = make_guide(), make_guide()
    settings = {"max_steps": 300, "particles": 32, "progress": False}
    pf.fit_guide(model, far, 50 + DATA, **settings)
    kept = weights(far)
    pf.fit_guide(model, near, DATA, **settings)
    far(DATA)  # a guide takes over what the store holds under its name
    assert not moved(kept, far)
    assert far.median()["loc"].item() == pytest.approx(52, abs=0.5)
    assert near.median()["loc"].item() == pytest.approx(2.1, abs=0.5)


def test_guides_that_share_a_name_share_their_parameters():
    first, second = make_guide(name="q"), make_guide(name="q")
    train(first, 20)
    kept = weights(first)
    second.setup(DATA)(DATA)  # it continues from the store
    assert not moved(kept, second)
    train(second, 5)
    assert len(moved(kept, second)) == len(kept)
    first(DATA)
    assert not moved(weights(second), first)


def test_trained_weights_are_the_flows_own():
    train(make_guide(name="q"), 60)
    guide = make_guide(name="q")
    train(guide, 60)
    store = pyro.get_param_store()
    for name, parameter in guide.flow.named_parameters():
        assert store._params[f"q.flow$$${name}"] is parameter
    outside = guide.flow().sample((2000,)).mean(dim=0)
    inside = torch.stack([guide(DATA)["loc"] for _ in range(500)]).mean()
    assert abs(outside[0] - inside) < 0.3


def test_torch_optimiser_made_before_the_store_wins_moves_the_flow():
    train(make_guide(name="q"), 20)
    guide = make_guide(name="q").setup(DATA)
    optimiser = torch.optim.Adam(guide.flow.parameters(), lr=0.02)
    loss = Trace_ELBO()(lambda: model(DATA), guide)
    loss()  # the store's values arrive
    before = weights(guide.flow)
    loss().backward()
    optimiser.step()
    assert len(moved(before, guide.flow)) == len(before)


def test_store_save_clear_load_restores_the_loss(tmp_path):
    guide = make_guide()
    train(guide)
    reached = elbo_of(guide)
    pyro.get_param_store().save(tmp_path / "store")
    del guide
    pyro.clear_param_store()
    torch.manual_seed(99)
    pyro.get_param_store().load(tmp_path / "store", map_location="cpu")
    fresh = make_guide().setup(DATA)
    assert elbo_of(fresh) == pytest.approx(reached, abs=1e-4)


def test_store_holds_what_fit_set_in_a_prior(tmp_path):
    flow = pf.maf(2, layers=1, hidden=(8,))
    pf.initialize(flow, 100 + 7 * torch.randn(500, 2))
    pyro.module("prior", flow)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    fresh = pf.maf(2, layers=1, hidden=(8,))
    pyro.module("prior", fresh)
    x = torch.full((1, 2), 100.0)
    assert torch.allclose(fresh.log_prob(x), flow.log_prob(x))


def test_moving_a_registered_flow_keeps_its_newer_state():
    flow = pf.maf(2, layers=1, hidden=(8,))
    pyro.module("prior", flow)
    flow.double()
    pf.initialize(flow, 100 + 7 * torch.randn(500, 2, dtype=torch.float64))
    expected = flow.transform.parts[-1].loc.clone()
    pyro.module("prior", flow)
    assert torch.equal(flow.transform.parts[-1].loc, expected)


@pytest.mark.parametrize("depth", [0, 1, 20], ids=["direct", "nested", "deeply_nested"])
def test_module_under_a_held_name_takes_the_stores_values(depth):
    def wrap(flow):
        for _ in range(depth):
            flow = torch.nn.Sequential(flow)
        return flow

    first, second = (pf.maf(2, layers=1, hidden=(8,)) for _ in range(2))
    for p in first.parameters():
        p.data.normal_()
    pyro.module("flow", wrap(first))
    pyro.module("flow", wrap(second))
    x = torch.randn(5, 2)
    assert torch.allclose(first.log_prob(x), second.log_prob(x))


def test_held_name_of_another_shape_is_an_error():
    pyro.module("flow", pf.maf(2, layers=1, hidden=(8,)))
    with pytest.raises(ValueError, match="another model used this name"):
        pyro.module("flow", pf.maf(3, layers=1, hidden=(8,)))


def test_state_dict_loads_into_a_guide_set_up_but_never_called():
    guide = make_guide()
    train(guide, 50)
    pyro.clear_param_store()
    fresh = make_guide().setup(DATA)
    fresh.load_state_dict(guide.state_dict())
    assert elbo_of(fresh) == pytest.approx(elbo_of(guide), abs=1e-4)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))])
def test_guide_survives_copy_and_pickle_after_use(how):
    guide = make_guide()
    train(guide, 20)
    twin = how(guide.flow)
    x = torch.randn(5, 2)
    assert torch.allclose(twin.log_prob(x), guide.flow.log_prob(x))
    assert guide.model is not None
    train(guide, 2)


def test_pickling_a_guide_leaves_the_living_one_whole():
    guide = make_guide()
    train(guide, 2)
    pickle.dumps(guide)
    train(guide, 2)


def test_posterior_is_right():
    # A conjugate model: the exact posterior is Normal(1.875, 0.25^0.5 * ...).
    def conjugate():
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", 4):
            pyro.sample("obs", dist.Normal(z, 1.0), obs=DATA)

    guide = pf.AutoFlow(conjugate, layers=1, hidden=(8,))
    pf.fit_guide(conjugate, guide, progress=False)
    precision = 1 / 4 + 4
    draws = guide.sample_posterior(20_000)["z"]
    assert draws.mean().item() == pytest.approx(DATA.sum().item() / precision, abs=0.03)
    assert draws.std().item() == pytest.approx(precision**-0.5, rel=0.05)


def test_median_and_quantiles_have_the_sites_shapes():
    def vector_model():
        with pyro.plate("groups", 3):
            pyro.sample("theta", dist.HalfNormal(1.0))
        pyro.sample("weights", dist.Dirichlet(torch.ones(4)))

    guide = pf.AutoFlow(vector_model, layers=1, hidden=(8,)).setup()
    assert {k: tuple(v.shape) for k, v in guide.median().items()} == {
        "theta": (3,),
        "weights": (4,),
    }
    levels = guide.quantiles([0.1, 0.5, 0.9])["theta"]
    assert levels.shape == (3, 3)
    assert (levels.diff(dim=0) > 0).all()
    assert torch.allclose(guide.sample_posterior(5)["weights"].sum(-1), torch.ones(5))


def test_predictive_and_parallel_particles():
    guide = make_guide().setup(DATA)
    for parallel in (False, True):
        draws = Predictive(model, guide=guide, num_samples=7, parallel=parallel)(DATA)
        assert draws["loc"].shape[0] == 7


def test_neutra_samples_in_the_flows_base_space():
    guide = make_guide()
    train(guide, 100)
    guide.requires_grad_(False).eval()
    neutra = NeuTraReparam(guide)
    warped = neutra.reparam(model)
    mcmc = MCMC(NUTS(warped), num_samples=50, warmup_steps=50, disable_progbar=True)
    mcmc.run(DATA)
    latent = next(iter(mcmc.get_samples().values()))
    loc = neutra.transform_sample(latent.unsqueeze(-2))["loc"]
    assert abs(loc.mean() - DATA.mean()) < 0.6


def test_guide_without_latents_is_an_error():
    with pytest.raises(ValueError, match="continuous latent"):
        pf.AutoFlow(lambda: None).setup()


# Flows as priors


@pytest.fixture
def prior():
    flow = pf.iaf(2, layers=1, hidden=(8,))
    for p in flow.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return flow.requires_grad_(False).eval()


def prior_model(flow):
    z = pyro.sample("z", flow())
    pyro.sample("obs", dist.Normal(z, 0.5).to_event(1), obs=torch.tensor([0.5, -0.5]))


def exact_mean(flow):
    x = flow.sample((50_000,))
    weight = dist.Normal(x, 0.5).to_event(1).log_prob(torch.tensor([0.5, -0.5])).softmax(0)
    return (weight[:, None] * x).sum(dim=0)


@pytest.mark.parametrize("fast", ["sample", "log_prob"])
def test_prior_under_nuts(prior, fast):
    if fast == "log_prob":
        prior = pf.maf(2, layers=1, hidden=(8,)).requires_grad_(False)
    mcmc = MCMC(NUTS(prior_model), num_samples=200, warmup_steps=100, disable_progbar=True)
    mcmc.run(prior)
    drawn = mcmc.get_samples()["z"]
    assert torch.allclose(drawn.mean(0), exact_mean(prior), atol=0.25)


def test_prior_under_autonormal(prior):
    guide = AutoNormal(prior_model)
    svi = SVI(prior_model, guide, pyro.optim.Adam({"lr": 0.02}), TraceMeanField_ELBO())
    losses = [svi.step(prior) for _ in range(400)]
    assert sum(losses[-50:]) < sum(losses[:50])
    assert torch.allclose(guide.median()["z"], exact_mean(prior), atol=0.3)


def test_prior_under_transform_reparam(prior):
    warped = pyro.poutine.reparam(prior_model, config={"z": TransformReparam()})
    mcmc = MCMC(NUTS(warped), num_samples=200, warmup_steps=100, disable_progbar=True)
    mcmc.run(prior)
    z = prior.transform(mcmc.get_samples()["z_base"])
    assert torch.allclose(z.mean(0), exact_mean(prior), atol=0.25)


def test_prior_inside_a_pyro_module_trains():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.prior = pf.realnvp(2, layers=2, hidden=(8,))

        def forward(self, x):
            with pyro.plate("rows", len(x)):
                pyro.sample("x", self.prior(), obs=x)

    trained = Model()
    before = weights(trained)
    x = torch.randn(64, 2) + 3
    svi = SVI(trained, lambda x: None, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(50)]
    assert losses[-1] < losses[0]
    assert len(moved(before, trained)) == len(before)


def test_conditional_flow_in_a_plate():
    flow = pf.maf(2, 3, layers=1, hidden=(8,))
    context = torch.randn(5, 3)
    with pyro.plate("rows", 5), pyro.poutine.trace() as trace:
        value = pyro.sample("x", flow(context))
    assert value.shape == (5, 2)
    trace.trace.compute_log_prob()
    assert trace.trace.nodes["x"]["log_prob"].shape == (5,)


# Registries


def test_kl_is_exact_where_the_transform_is_shared():
    flow = pf.iaf(2, layers=1, hidden=(8,))
    narrow = pf.FlowDistribution(
        dist.Normal(torch.zeros(2), 0.5).to_event(1), flow.transform, flow.event_shape
    )
    expected = kl_divergence(narrow.base_dist, flow().base_dist)
    assert torch.allclose(kl_divergence(narrow, flow()), expected)


def test_kl_between_different_flows_says_what_to_do():
    with pytest.raises(NotImplementedError, match="rsample_and_log_prob"):
        kl_divergence(pf.iaf(2)(), pf.iaf(2)())


@pytest.mark.parametrize("registry", [biject_to, transform_to])
def test_constraint_yields_a_frozen_flow(prior, registry):
    bijection = registry(pf.FlowConstraint(prior))
    assert not any(p.requires_grad for p in bijection.parameters())
    x = torch.randn(4, 2, requires_grad=True)
    assert torch.allclose(bijection(x), prior.transform(x))
    assert torch.allclose(bijection.inv(bijection(x)), x, atol=1e-4)


class Warped(dist.MultivariateNormal):
    """A distribution that samplers are told to explore through a flow."""

    def __init__(self, loc, covariance_matrix, flow):
        self.flow = flow
        super().__init__(loc, covariance_matrix)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self):
        return pf.FlowConstraint(self.flow)


def warped_model(flow):
    pyro.sample("z", Warped(torch.tensor([1.0, -1.0]), 0.25 * torch.eye(2), flow))


def test_constraint_under_nuts(prior):
    mcmc = MCMC(NUTS(warped_model), num_samples=300, warmup_steps=100, disable_progbar=True)
    mcmc.run(prior)
    z = mcmc.get_samples()["z"]
    assert torch.allclose(z.mean(0), torch.tensor([1.0, -1.0]), atol=0.2)
    assert torch.allclose(z.std(0), torch.tensor([0.5, 0.5]), atol=0.15)


def test_constraint_under_autonormal(prior):
    guide = AutoNormal(warped_model)
    svi = SVI(warped_model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(num_particles=8))
    losses = [svi.step(prior) for _ in range(300)]
    assert sum(losses[-50:]) < sum(losses[:50])
    assert torch.allclose(guide.median(prior)["z"], torch.tensor([1.0, -1.0]), atol=0.4)


# Found by trying to break it


def test_state_dict_loaded_over_a_full_store_is_kept():
    guide = make_guide()
    train(guide, 20)
    saved = copy.deepcopy(guide.state_dict())
    train(guide, 20)
    fresh = make_guide(name=guide.pyro_name).setup(DATA)
    fresh.load_state_dict(saved)
    fresh(DATA)
    assert all(torch.equal(v, saved[k]) for k, v in fresh.state_dict().items())


def test_store_loaded_over_a_loaded_state_dict_wins(tmp_path):
    guide = make_guide()
    train(guide, 20)
    pyro.get_param_store().save(tmp_path / "store")
    wanted = weights(guide.flow)
    saved = copy.deepcopy(guide.state_dict())
    for value in saved.values():
        value.add_(1.0) if value.is_floating_point() else None
    guide.load_state_dict(saved)
    pyro.get_param_store().load(tmp_path / "store", map_location="cpu")
    guide(DATA)
    assert not moved(wanted, guide.flow)


def test_store_loaded_after_a_state_dict_wins_with_tensors_in_old_places(tmp_path):
    """New tensors of the store take the ids of those it held when the state_dict was loaded."""
    wanted = pf.iaf(2, layers=1, hidden=(8,))
    pyro.module("q", wanted)
    pyro.get_param_store().save(tmp_path / "store")
    for _ in range(8):
        pyro.clear_param_store()
        other = pf.iaf(2, layers=8, hidden=(8, 8))
        pyro.module("other", other)
        flow = pf.iaf(2, layers=1, hidden=(8,))
        flow.load_state_dict(flow.state_dict())
        pyro.clear_param_store()
        del other
        gc.collect()
        pyro.get_param_store().load(tmp_path / "store", map_location="cpu")
        pyro.module("q", flow)
        assert not moved(weights(wanted), flow)


def test_guides_of_different_models_live_side_by_side():
    def other():
        pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))

    train(make_guide(), 5)
    pf.AutoFlow(other, layers=1, hidden=(8,)).setup()()
    train(make_guide(), 5)


def test_store_can_be_hooked_and_optimised_as_in_pyros_tutorials():
    train(make_guide(), 2)
    for _, value in pyro.get_param_store().named_parameters():
        value.register_hook(lambda g: g)


def test_model_that_does_not_broadcast_is_run_one_by_one():
    def careless():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("f", -0.5 * (z**2).sum())  # sums over the particles too

    guide = AutoNormal(careless)  # in a plate of particles; an AutoFlow has runs of its own
    with pytest.warns(UserWarning, match="one by one"):
        pf.fit_guide(careless, guide, particles=8, max_steps=300, lr=0.02, progress=False)
    spread = torch.stack([guide()["z"].detach() for _ in range(1000)]).std(0)
    assert torch.allclose(spread, torch.full((3,), 0.5**0.5), atol=0.12)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_model_that_is_nan_everywhere_is_an_error():
    def broken():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", z * float("nan"))

    message = "log-density of site 'f' is NaN or infinite at the start"
    with pytest.raises(ValueError, match=message), pyro.validation_enabled(False):
        pf.AutoFlow(broken, layers=1, hidden=(8,)).setup()
    guide = AutoNormal(broken)
    error = pytest.raises(FloatingPointError, match="no finite ELBOs in steps 0 to 9")
    with error, pyro.validation_enabled(False):
        pf.fit_guide(broken, guide, vectorize=False, particles=1, max_steps=10, progress=False)


def test_copied_guide_keeps_its_model_and_goes_its_own_way(local_parameters):
    guide = make_guide().setup(DATA)
    train(guide, 5)
    twin = copy.deepcopy(guide)
    kept = weights(guide.flow)
    assert not moved(kept, twin.flow)
    train(twin, 5)
    assert not moved(kept, guide.flow)
    assert len(moved(kept, twin.flow)) == len(kept)
