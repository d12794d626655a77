"""The log-density of any model: batched, placed and summed out as one draw at a time would be."""

import itertools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.reparam import LocScaleReparam, ProjectedNormalReparam
from pyro.nn import PyroModule, PyroSample
from torch.distributions import constraints
from torch.func import jacrev

import pyroflows as pf
from pyroflows.programs.discrete_sites import discrete_probabilities, draw_discrete
from pyroflows.programs.log_density import LogDensity
from pyroflows.programs.supports import LowerCholeskyVector, PositiveDefiniteVector, bijection
from pyroflows.programs.vectorize import ChangedModelError


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


Y = torch.tensor([0.3, -1.2, 2.0, 0.7])
X = torch.linspace(-1.0, 1.0, 8).reshape(4, 2)


def regression():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("rows", 4):  # an index from the left, which no plate of draws allows
        pyro.sample("y", dist.Normal((X * b).sum(-1) + a, 1.0), obs=Y)


def from_the_left():
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z[0] + z[1] * z[2], 1.0), obs=torch.tensor(1.0))


def groups():
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("groups", 3, dim=-2):
        loc = pyro.sample("loc", dist.Normal(0.0, scale))
        with pyro.plate("rows", 4, dim=-1):
            pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("y", dist.Normal(loc, 1.0), obs=Y.expand(3, 4))


def names_in_a_loop():
    z = torch.tensor(0.0)
    for t in pyro.markov(range(4)):
        z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 1.0))
        pyro.sample(f"y_{t}", dist.Normal(z, 0.5), obs=Y[t])


def row_by_row():
    scale = pyro.sample("scale", dist.Exponential(1.0))
    for i in pyro.plate("rows", 4):
        z = pyro.sample(f"z_{i}", dist.Normal(0.0, scale))
        pyro.sample(f"y_{i}", dist.Normal(z, 1.0), obs=Y[i])


def moving_support():
    a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
    z = pyro.sample("z", dist.Uniform(0.0, a))
    pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(1.0))


def moving_in_a_plate():
    a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", 4):
        z = pyro.sample("z", dist.Uniform(-a, a))
        pyro.sample("y", dist.Normal(z, 0.5), obs=Y)


def simplex_and_cholesky():
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    corr = pyro.sample("corr", dist.LKJCholesky(3, 2.0))
    pyro.sample("y", dist.MultivariateNormal(p, scale_tril=corr), obs=Y[:3])


def ordered():
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    cuts = pyro.sample(
        "cuts", dist.TransformedDistribution(base, dist.transforms.OrderedTransform())
    )
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.OrderedLogistic(z, cuts), obs=torch.tensor(2))


def wishart():
    w = pyro.sample("w", dist.Wishart(torch.tensor(5.0), torch.eye(2)))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), precision_matrix=w), obs=Y[:2])


def mixture():
    parts = dist.MultivariateNormal(torch.tensor([[0.0, 0.0], [4.0, 4.0]]), torch.eye(2))
    pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))


def flat():
    scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
    pyro.sample("y", dist.Normal(0.0, scale).expand([4]).to_event(1), obs=Y)


def factor_and_deterministic():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    twice = pyro.deterministic("twice", 2 * z)
    pyro.factor("extra", -0.5 * twice**2)


def masked_and_scaled():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 4), poutine.mask(mask=Y > 0), poutine.scale(scale=3.0):
        pyro.sample("y", dist.Normal(z, 1.0), obs=Y)


def missing_data():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.Normal(z, 1.0), obs=Y, obs_mask=Y > 0)


def size_zero():
    pyro.sample("none", dist.Normal(0.0, 1.0).expand([0]).to_event(1))
    pyro.sample("z", dist.Normal(0.0, 1.0))


def reparametrised():
    z = pyro.sample("scale", dist.HalfNormal(1.0))
    with poutine.reparam(config={"x": LocScaleReparam(0.0)}):
        x = pyro.sample("x", dist.Normal(0.0, z))
    pyro.sample("y", dist.Normal(x, 1.0), obs=Y[0])


class Network(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self):
        loc = self.linear(X).squeeze(-1)
        with pyro.plate("rows", 4):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=Y)


def mixture_of_rows():
    p = pyro.sample("p", dist.Dirichlet(torch.ones(2)))
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    with pyro.plate("rows", 4):
        k = pyro.sample("k", dist.Categorical(p))
        pyro.sample("y", dist.Normal(loc[k], 1.0), obs=Y)


def hidden_markov():
    rows = dist.Dirichlet(torch.ones(2)).expand([2]).to_event(1)
    move = pyro.sample("move", rows)
    loc = pyro.sample("loc", dist.Normal(torch.tensor([0.0, 1.0]), 1.0).to_event(1))
    k = 0
    for t in pyro.markov(range(4)):
        k = pyro.sample(f"k_{t}", dist.Categorical(move[k]))
        pyro.sample(f"y_{t}", dist.Normal(loc[k], 1.0), obs=Y[t])


def discrete_first():
    k = pyro.sample("k", dist.Bernoulli(0.3))
    pyro.sample("z", dist.Normal(3 * k, 1.0))  # a continuous site under a discrete one


@poutine.reparam(config={"z": ProjectedNormalReparam()})
def projected():
    z = pyro.sample("z", dist.ProjectedNormal(torch.tensor([0.5, 0.0, 1.0])))
    pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=Y[:3])


def filled():
    z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    mean = 2 * z.unsqueeze(-1).repeat(1, 2)
    mean[z < 0] = 0.5
    pyro.sample("y", dist.Normal(mean[:, 0], 1.0).to_event(1), obs=Y)


def angles():
    mean = pyro.sample("mean", dist.VonMises(3.0, 1.0))
    strength = pyro.sample("strength", dist.HalfNormal(3.0))
    with pyro.plate("rows", 4), poutine.mask(mask=Y > 0):
        z = pyro.sample("z", dist.VonMises(mean, strength))
        pyro.sample("y", dist.VonMises(z, 2.0), obs=Y)
    pyro.sample("pair", dist.VonMises(torch.zeros(2), z[:2].exp()).to_event(1))


def written_into():
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    path = torch.zeros(4)
    for t in range(3):
        path[t + 1] = path[t] + z[t]
    pyro.sample("y", dist.Normal(path, 1.0).to_event(1), obs=Y)


CONTINUOUS = [
    regression,
    from_the_left,
    groups,
    names_in_a_loop,
    row_by_row,
    moving_support,
    moving_in_a_plate,
    simplex_and_cholesky,
    ordered,
    wishart,
    mixture,
    flat,
    factor_and_deterministic,
    masked_and_scaled,
    size_zero,
    reparametrised,
    angles,
    projected,
    filled,
    written_into,
    Network(),
]
WRITTEN_INTO = [ordered, projected, filled, written_into]
DISCRETE = [mixture_of_rows, hidden_markov, discrete_first]


def name_of(model):
    return getattr(model, "__name__", type(model).__name__)


def set_up(model):
    return pf.AutoFlow(model, init="init", layers=1, hidden=(8,)).setup()


def expected(model, ran, index):
    """By plain Pyro: the model conditioned on one draw's values."""
    values = {name: value[index] for name, value in ran.values.items()}
    conditioned = poutine.condition(model, data=values)
    log_p = poutine.trace(conditioned).get_trace().log_prob_sum()
    return log_p + sum(value[index].sum() for value in ran.log_dets.values())


@pytest.mark.parametrize("model", CONTINUOUS, ids=name_of)
def test_a_batch_is_pyros_own_density_at_each_draw(model):
    guide = set_up(model)
    log_density = guide.log_density((), {})
    latent = torch.randn(5, guide.latent_dim)
    ran = log_density.run(latent)
    assert log_density.batching == ("anchored" if model in WRITTEN_INTO else "vmap")
    for i in range(5):
        torch.testing.assert_close(ran.log_p[i], expected(model, ran, i))


@pytest.mark.parametrize("model", CONTINUOUS + DISCRETE, ids=name_of)
def test_a_batch_is_what_its_draws_are_alone(model):
    guide = set_up(model)
    latent = torch.randn(5, guide.latent_dim)
    alone = guide.log_density((), {}, batching="alone")(latent)
    torch.testing.assert_close(guide.log_density((), {})(latent), alone)


@pytest.mark.parametrize("model", CONTINUOUS + DISCRETE, ids=name_of)
def test_its_gradients_are_those_of_its_draws_alone(model):
    guide = set_up(model)
    latent = torch.randn(3, guide.latent_dim)
    found = []
    for batching in (None, "alone"):
        z = latent.clone().requires_grad_()
        found.append(torch.autograd.grad(guide.log_density((), {}, None, batching)(z).sum(), z)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("model", DISCRETE, ids=name_of)
def test_discrete_sites_are_summed_out(model):
    guide = set_up(model)
    ran = guide.log_density((), {}).run(torch.randn(3, guide.latent_dim))
    for i in range(3):
        values = {name: value[i] for name, value in ran.values.items()}
        conditioned = config_enumerate(poutine.condition(model, data=values), "parallel")
        log_p = -TraceEnum_ELBO(max_plate_nesting=1).loss(conditioned, lambda: None)
        log_det = sum(value[i].sum() for value in ran.log_dets.values())
        torch.testing.assert_close(ran.log_p[i], log_det + log_p)


@pytest.mark.parametrize("model", DISCRETE, ids=name_of)
def test_second_derivatives_go_through_the_sum(model, double):
    guide = set_up(model)
    log_density = guide.log_density((), {})
    z = torch.randn(2, guide.latent_dim, requires_grad=True)
    assert torch.autograd.gradgradcheck(log_density, z)


def test_impossible_discrete_values_leave_finite_gradients():
    def model():
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        k = pyro.sample("k", dist.Categorical(torch.stack([p, 1 - p, torch.zeros(())])))
        pyro.sample("y", dist.Delta(k.float()), obs=torch.tensor(1.0))

    guide = set_up(model)
    z = torch.randn(3, 1, requires_grad=True)
    with pyro.validation_enabled(False):
        log_p = guide.log_density((), {})(z)
    p = z.sigmoid()[:, 0]
    torch.testing.assert_close(log_p, (1 - p).log() + math.log(6) + 2 * (p.log() + (1 - p).log()))
    assert torch.autograd.grad(log_p.sum(), z)[0].isfinite().all()


def test_missing_values_have_their_prior():
    guide = set_up(missing_data)
    latent = torch.randn(3, guide.latent_dim)
    ran = guide.log_density((), {}).run(latent)
    z, y = ran.values["z"][:, None], ran.values["y_unobserved"]
    parts = dist.Normal(0.0, 1.0).log_prob(z), dist.Normal(z, 1.0).log_prob(y)
    seen = dist.Normal(z, 1.0).log_prob(Y) * (Y > 0)
    torch.testing.assert_close(ran.log_p, sum(part.sum(1) for part in (*parts, seen)))


def test_a_guide_of_missing_values_is_right():
    guide = pf.AutoFlow(missing_data, layers=1, hidden=(8,))
    pf.fit_guide(missing_data, guide, max_steps=300, progress=False)
    seen = Y[Y > 0]
    draws = guide.sample_posterior(20_000)["z"]
    assert abs(draws.std() - (1 + len(seen)) ** -0.5) < 0.01
    assert abs(draws.mean() - seen.sum() / (1 + len(seen))) < 0.02


def test_a_hidden_site_is_drawn_for_each_vector_and_not_scored():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + noise, 1.0), obs=torch.tensor(0.5))

    guide = pf.AutoFlow(model, hide=["noise"], init="init", layers=1, hidden=(8,)).setup()
    log_p = guide.log_density((), {})(torch.zeros(4000, 1))
    assert len(log_p.unique()) > 3000
    evidence = log_p.logsumexp(0) - math.log(4000)
    wanted = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0))
    wanted = wanted + dist.Normal(0.0, math.sqrt(2)).log_prob(torch.tensor(0.5))
    assert abs(evidence - wanted) < 0.05


def test_a_subsample_is_the_same_for_all_vectors_of_a_call():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 100, subsample_size=5) as index:
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    y = torch.randn(100)
    guide = pf.AutoFlow(model, init="init", layers=1, hidden=(8,)).setup(y)
    log_density = guide.log_density((y,), {})
    first, second = log_density(torch.zeros(6, 1)), log_density(torch.zeros(6, 1))
    assert log_density.batching == "vmap"
    assert len(first.unique()) == 1
    assert first[0] != second[0]


def test_a_branch_runs_draw_by_draw_and_says_so():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = z if z > 0 else -z
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(0.5))

    guide = pf.AutoFlow(model, layers=1, hidden=(8,))
    with pytest.warns(
        UserWarning, match=r"control flow.*one by one.*8 of them a step.*torch.where"
    ):
        pf.fit_guide(model, guide, max_steps=100, progress=False)
    with pytest.warns(UserWarning, match=r"at many draws at once"):
        found = pf.importance_weights(model, guide, num_samples=200)
    z = found.draws["z"]
    wanted = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z.abs(), 1.0).log_prob(
        torch.tensor(0.5)
    )
    torch.testing.assert_close(found.log_p, wanted)


def test_a_model_that_keeps_something_runs_draw_by_draw():
    runs = []

    def model():
        runs.append(0)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(float(len(runs) % 2)))

    guide = set_up(model)
    assert "keeps something" in guide.log_density((), {}).settle(torch.zeros(1))


def test_the_models_own_error_comes_out():
    def model(size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample(
            "y", dist.Normal(z + torch.zeros(size) @ torch.zeros(3), 1.0), obs=torch.zeros(())
        )

    guide = pf.AutoFlow(model, init="init", layers=1, hidden=(8,)).setup(3)
    with pytest.raises(RuntimeError, match="size"):
        guide.log_density((4,), {})(torch.zeros(2, 1))


def test_a_site_that_comes_and_goes_is_named():
    def model(extra):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        if extra:
            pyro.sample("more", dist.Normal(0.0, 1.0))

    guide = pf.AutoFlow(model, init="init", layers=1, hidden=(8,)).setup(False)
    with pytest.raises(ChangedModelError, match="'more' comes and goes"):
        guide.log_density((True,), {})(torch.zeros(2, 1))


@pytest.mark.parametrize("kind", [LowerCholeskyVector, PositiveDefiniteVector])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_matrices_have_their_jacobian(kind, size):
    to_support, entries = kind(), size * (size + 1) // 2
    x = torch.randn(entries, dtype=torch.float64)
    row, column = torch.tril_indices(size, size)
    jacobian = jacrev(lambda x: to_support(x)[row, column])(x)
    y = to_support(x)
    torch.testing.assert_close(to_support.log_abs_det_jacobian(x, y), jacobian.slogdet().logabsdet)
    torch.testing.assert_close(to_support.inv(y), x)
    assert to_support.codomain.check(y)
    assert to_support.forward_shape((3, entries)) == (3, size, size)
    assert to_support.inverse_shape((3, size, size)) == (3, entries)


@pytest.mark.parametrize("kind", [LowerCholeskyVector, PositiveDefiniteVector])
def test_matrices_of_a_batch_are_those_of_its_vectors(kind):
    x = torch.randn(3, 6)
    torch.testing.assert_close(torch.func.vmap(kind())(x), torch.stack([kind()(v) for v in x]))


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (
            dist.VonMises3D(torch.tensor([1.0, 0.0, 0.0])),
            r"'z' .VonMises3D. has no start.*ProjectedNormalReparam.*pyro.factor",
        ),
        (
            dist.ProjectedNormal(torch.ones(3)),
            r"'z' .ProjectedNormal. is a direction on a sphere.*ProjectedNormalReparam",
        ),
        (dist.Poisson(3.0), r"'z' is a discrete Poisson without finite support"),
        (dist.Geometric(0.3), r"'z' is a discrete Geometric without finite support"),
    ],
    ids=["sphere", "projected", "poisson", "geometric"],
)
def test_sites_without_a_map_are_named(fn, said):
    with pytest.raises(ValueError, match=said):
        set_up(lambda: pyro.sample("z", fn))


def test_a_support_without_a_map_is_named():
    class Odd(dist.Normal):
        support = constraints.dependent

    with pytest.raises(ValueError, match=r"'z' \(Odd\) has no start, since no map"):
        set_up(lambda: pyro.sample("z", Odd(0.0, 1.0)))


def test_a_support_that_moves_is_right_at_the_end():
    """a ~ LogNormal(0, 1), z ~ Uniform(0, a), y ~ N(z, .5) = 2."""

    def model():
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", dist.Uniform(0.0, a))
        pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(2.0))

    a = torch.linspace(-6, 6, 4001, dtype=torch.float64).exp()[:, None]
    share = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    log_p = (
        dist.LogNormal(0.0, 1.0).log_prob(a)
        + a.log()
        + dist.Normal(a * share, 0.5).log_prob(torch.tensor(2.0))
    )
    weights = log_p.flatten().softmax(0).reshape(log_p.shape)
    guide = pf.AutoFlow(model)
    pf.fit_guide(model, guide, max_steps=600, progress=False)
    found = pf.report(model, guide)
    mean = (weights * a).sum()
    sd = ((weights * a**2).sum() - mean**2).sqrt()
    assert abs(found.means()["a"] - mean) < 0.1 * sd
    evidence = log_p.flatten().logsumexp(0) + math.log(12 / 4000 / 400)
    assert abs(found.evidence - evidence) < 0.1
    draws = guide.sample_posterior(100)
    assert (draws["z"] <= draws["a"]).all()


@pytest.mark.parametrize("model", [moving_support, moving_in_a_plate], ids=name_of)
def test_a_moving_guide_gives_pyros_elbo(model):
    guide = set_up(model)
    pyro.set_rng_seed(0)
    loss = pyro.infer.Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    by_pyro = loss.loss(model, guide)
    by_density = pf.infer.DensityELBO(2000).loss(model, guide)
    assert abs(by_pyro - by_density) < 0.1 * abs(by_pyro)


@pytest.mark.parametrize("path", [True, False], ids=["path", "total"])
def test_the_elbos_gradient_is_that_of_pyros_statements(path):
    guide = set_up(groups)
    kind = pf.infer.PathELBO if path else pyro.infer.Trace_ELBO
    theirs = kind(num_particles=64, vectorize_particles=True, max_plate_nesting=2)
    found = []
    for elbo in (theirs, pf.infer.DensityELBO(64, path=path)):
        pyro.set_rng_seed(1)
        guide.zero_grad()
        elbo.differentiable_loss(groups, guide).backward()
        found.append(torch.cat([p.grad.flatten() for p in guide.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_the_models_parameters_train_with_the_guide():
    def model():
        tau = pyro.param("tau", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("rows", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, tau), obs=3 * Y)

    guide = pf.AutoFlow(model, layers=1, hidden=(8,))
    pf.fit_guide(model, guide, max_steps=600, progress=False)
    wanted = ((3 * Y).square().mean() - 1).sqrt()  # y ~ N(0, 1 + tau^2)
    assert abs(pyro.param("tau") - wanted) < 0.05


def test_set_up_runs_the_model_at_most_twelve_times():
    def model():
        runs.append(0)
        pyro.sample("z", dist.Normal(3.0, 0.5))

    runs = []
    pf.AutoFlow(model, layers=1, hidden=(8,)).setup()
    assert len(runs) <= 12


def test_validation_stays_as_it_was():
    guide = set_up(regression)
    with pyro.validation_enabled(True), warnings.catch_warnings():
        guide.log_density((), {})(torch.zeros(2, 3))
        with pytest.raises(ValueError, match="scale"):
            dist.Normal(0.0, -1.0)


def test_independent_supports_keep_their_event():
    support = dist.Gamma(torch.ones(2, 3), 1.0).to_event(2).support
    x = torch.randn(2, 3)
    assert bijection(support).log_abs_det_jacobian(x, bijection(support)(x)).shape == ()


def draws_a_part(y):
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y), subsample_size=6) as index:
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def gets_a_part(y):
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", 20, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def gets_rows(y):
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", 20, subsample=torch.arange(len(y))):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def draws_two_parts(y):
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    for name in "ab":
        with pyro.plate(name, len(y), subsample_size=5) as index:
            pyro.sample(f"y_{name}", dist.Normal(z, 1.0), obs=y[index])


@pytest.mark.parametrize("size", [20, 21], ids=["lcm of 60", "lcm of 42"])
def test_a_guide_of_a_model_that_draws_a_part_is_judged_by_all_rows(size):
    y = 1.0 + torch.randn(size)
    guide = pf.AutoFlow(draws_a_part, init="init", layers=1, hidden=(8,)).setup(y)
    found = pf.importance_weights(draws_a_part, guide, y, num_samples=50)
    z = found.draws["z"]
    expected = dist.Normal(0.0, 2.0).log_prob(z) + dist.Normal(z[:, None], 1.0).log_prob(y).sum(1)
    torch.testing.assert_close(found.log_p, expected)


@pytest.mark.parametrize(
    ("model", "args", "said"),
    [
        (gets_a_part, 5, "sees 5 of the 20 rows of the plate 'rows', and which ones its arguments"),
        (gets_rows, 5, "sees 5 of the 20 rows of the plate 'rows', and which ones its arguments"),
        (draws_two_parts, 20, "plates 'a', 'b' draw subsamples"),
    ],
    ids=["a batch", "indices", "two plates"],
)
def test_no_verdict_by_a_part_of_the_rows(model, args, said):
    y = torch.randn(args)
    guide = pf.AutoFlow(model, init="init", layers=1, hidden=(8,)).setup(y)
    with pytest.raises(ValueError, match=said):
        pf.report(model, guide, y, num_samples=20)


def test_what_a_training_measures_is_the_elbo_of_all_rows():
    y = 1.0 + torch.randn(24)
    guide = pf.AutoFlow(draws_a_part, layers=1, hidden=(8,))
    history = pf.fit_guide(draws_a_part, guide, y, max_steps=100, progress=False)
    found = pf.report(draws_a_part, guide, y, num_samples=4000)
    assert abs(history.val[-1] - found.elbo) < 0.05


@pytest.mark.slow
def test_mini_batches_reach_the_posterior_of_all_rows():
    y = 1.0 + torch.randn(400)
    data = torch.utils.data.TensorDataset(y)
    batches = torch.utils.data.DataLoader(data, batch_size=20, shuffle=True)

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", 400, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = pf.AutoFlow(model, layers=1, hidden=(8,))
    pf.fit_guide(model, guide, batches=batches, particles=16, progress=False)
    found = pf.report(model, guide, y, num_samples=2000)
    assert found.verdict.startswith("Good")
    assert abs(found.means()["z"] - y.mean()) < 0.1 / 20


def test_training_ends_where_nothing_is_left_to_gain():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = pf.AutoFlow(model, layers=1, hidden=(8,))
    history = pf.fit_guide(model, guide, progress=False)
    assert history.steps[-1] == 100
    assert "within 0.01 nats of the evidence" in history.stopped


def test_training_goes_on_where_the_model_has_parameters():
    def model():
        loc = pyro.param("loc", torch.tensor(0.0))
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(3.0))

    guide = pf.AutoFlow(model, layers=1, hidden=(8,))
    pf.fit_guide(model, guide, max_steps=600, progress=False)
    assert abs(pyro.param("loc") - 3.0) < 0.3


def test_a_bound_that_is_trained_moves_the_draws():
    def model():
        top = pyro.param("top", torch.tensor(1.0), constraint=constraints.positive)
        z = pyro.sample("z", dist.Uniform(0.0, top))
        pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(1.0))

    guide = set_up(model)
    pyro.get_param_store()["top"] = torch.tensor(5.0)
    z = guide.sample_posterior(200)["z"]
    assert 1.0 < z.max() < 5.0


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_tracing_is_refused_in_words():
    guide = set_up(regression)
    svi = pyro.infer.SVI(
        regression, guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.JitTrace_ELBO()
    )
    with pytest.raises(NotImplementedError, match="use Trace_ELBO"):
        svi.step()


def brute_force(model, guide, latent):
    """The probability of each assignment of four binary sites, by running all sixteen."""
    names = sorted(guide.learned.discrete)
    ran = guide.log_density((), {}).run(latent[None])
    values = {name: value[0] for name, value in ran.values.items()}
    found = {}
    for states in itertools.product([0, 1], repeat=4):
        given = (
            dict(zip(names, map(torch.tensor, states), strict=True))
            if len(names) == 4
            else {names[0]: torch.tensor(states)}
        )
        conditioned = poutine.condition(model, data={**values, **given})
        found[states] = poutine.trace(conditioned).get_trace().log_prob_sum()
    weights = torch.stack(list(found.values())).softmax(0)
    return dict(zip(found, weights.tolist(), strict=True))


@pytest.mark.parametrize("model", [mixture_of_rows, hidden_markov], ids=name_of)
def test_discrete_sites_come_back_as_probabilities(model):
    guide = set_up(model)
    latent = torch.randn(guide.latent_dim)
    expected = brute_force(model, guide, latent)
    found = discrete_probabilities(guide.log_density((), {}), latent[None])
    ones = torch.cat([found[name][0, ..., 1].reshape(-1) for name in sorted(found)])
    for place in range(4):
        wanted = sum(p for states, p in expected.items() if states[place])
        assert abs(ones[place] - wanted) < 1e-4


@pytest.mark.parametrize("model", [mixture_of_rows, hidden_markov], ids=name_of)
def test_discrete_sites_come_back_as_joint_draws(model):
    guide = set_up(model)
    latent = torch.randn(guide.latent_dim)
    expected = brute_force(model, guide, latent)
    vectors = latent.expand(600, -1)
    found = draw_discrete(guide.log_density((), {}), vectors)
    rows = torch.cat([found[name].reshape(600, -1) for name in sorted(found)], dim=1).tolist()
    for states, p in expected.items():
        share = sum(tuple(map(int, row)) == states for row in rows) / 600
        assert abs(share - p) < 4 * (p * (1 - p) / 600) ** 0.5 + 0.005


def test_a_guide_gives_its_discrete_sites_back():
    guide = set_up(mixture_of_rows)
    draws = guide.sample_discrete(7)
    assert {name: value.shape for name, value in draws.items()} == {
        "p": (7, 2),
        "loc": (7, 2),
        "k": (7, 4),
    }
    probabilities = guide.discrete_probabilities(draws=5)["k"]
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(4))


@pytest.mark.parametrize("model", [regression, hidden_markov, moving_support], ids=name_of)
def test_many_vectors_run_in_parts(model, monkeypatch):
    guide = set_up(model)
    log_density, latent = guide.log_density((), {}), torch.randn(7, guide.latent_dim)
    whole = log_density.run(latent)
    monkeypatch.setattr("pyroflows.programs.log_density._AT_ONCE", 2 * log_density.numbers)
    sizes, batched = [], log_density._batched
    monkeypatch.setattr(log_density, "_batched", lambda z: (sizes.append(len(z)), batched(z))[1])
    with torch.no_grad():
        parts = log_density.run(latent)
    assert max(sizes) == 2
    torch.testing.assert_close(parts.log_p, whole.log_p)
    torch.testing.assert_close(parts.values, whole.values)


def counting_numbers(monkeypatch):
    """Lists how many numbers each run without gradients has, all its vectors together."""
    numbers, batched = [], LogDensity._batched

    def counted(self, latent):
        ran = batched(self, latent)
        if not torch.is_grad_enabled():
            numbers.append(len(latent) * self.numbers)
        return ran

    monkeypatch.setattr(LogDensity, "_batched", counted)
    return numbers


def rows_of(count):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", count):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(count))

    return model


def test_training_runs_no_more_at_once_than_memory_likes(monkeypatch):
    model = rows_of(200)
    guide = pf.AutoFlow(model, layers=1, hidden=(8,)).setup()
    numbers = counting_numbers(monkeypatch)
    monkeypatch.setattr("pyroflows.programs.log_density._AT_ONCE", 10_000)
    pf.fit_guide(model, guide, max_steps=1, progress=False)  # to measure it, and the gap
    assert sum(numbers) > 4000 * 201
    assert max(numbers) <= 10_000


def test_the_first_run_sees_how_many_may_run_at_once(monkeypatch):
    guide = pf.AutoFlow(rows_of(200), layers=1, hidden=(8,)).setup()
    numbers = counting_numbers(monkeypatch)
    monkeypatch.setattr("pyroflows.programs.log_density._AT_ONCE", 10_000)
    log_density, latent = guide.log_density((), {}, batching="vmap"), torch.randn(1000, 1)
    with torch.no_grad():
        found = log_density(latent)
    assert max(numbers) <= 10_000
    torch.testing.assert_close(found, log_density(latent))


def test_a_subsample_is_the_same_for_all_parts_of_a_call(monkeypatch):
    data = torch.randn(1000)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(data), subsample_size=5) as index:
            pyro.sample("y", dist.Normal(z, 1.0), obs=data[index])

    log_density = pf.AutoFlow(model, layers=1, hidden=(8,)).setup().log_density((), {})
    log_density(torch.zeros(2, 1))
    monkeypatch.setattr("pyroflows.programs.log_density._AT_ONCE", log_density.numbers)
    with torch.no_grad():
        values = log_density(torch.zeros(6, 1))
        assert (values == values[0]).all()
        assert log_density(torch.zeros(6, 1))[0] != values[0]


def test_hidden_sites_differ_between_parts(monkeypatch):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + h, 1.0), obs=torch.tensor(0.0))

    guide = pf.AutoFlow(model, hide=["h"], layers=1, hidden=(8,)).setup()
    log_density = guide.log_density((), {})
    log_density(torch.zeros(2, 1))
    monkeypatch.setattr("pyroflows.programs.log_density._AT_ONCE", log_density.numbers)
    with torch.no_grad():
        assert len(log_density(torch.zeros(6, 1)).unique()) == 6
