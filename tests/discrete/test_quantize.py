"""Flows over integers: the bound, its noise, Pyro's contract, fit, bits per dimension."""

import copy
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import constraints

import pyroflows as pf
from pyroflows.discrete.noise import within_the_unit_interval

SEEN = {"progress": False, "max_epochs": 1}


def small(features=2, context=0, **options):
    return pf.realnvp(features, context, layers=2, hidden=(8,), linear="permute", **options)


class OneToOne(pf.FlowTransform):
    """A shift and a scale of an event of any shape: a flow whose probabilities are known."""

    def __init__(self, loc, scale, event_dim):
        super().__init__()
        self.register_buffer("loc", torch.as_tensor(loc))
        self.register_buffer("scale", torch.as_tensor(scale))
        self.codomain = self.domain = constraints.independent(constraints.real, event_dim)

    def _log_det(self, x):
        event = x.shape[x.dim() - self.domain.event_dim :]
        return x.new_zeros(x.shape[: x.dim() - len(event)]) + event.numel() * self.scale.log()

    def forward_and_log_det(self, x, context=None):
        return self.loc + self.scale * x, self._log_det(x)

    def inverse_and_log_det(self, y, context=None):
        return (y - self.loc) / self.scale, -self._log_det(y)


def normal(shape=(3,), loc=0.4, scale=0.3, dtype=torch.float64):
    return pf.Flow(OneToOne(loc, scale, len(shape)), shape=shape).to(dtype)


def level_log_probs(bins, loc=0.4, scale=0.3):
    """log P(level) under a normal over (x + u) / bins."""
    edges = torch.arange(bins + 1, dtype=torch.float64) / bins
    return torch.distributions.Normal(loc, scale).cdf(edges).diff().log()


# What the numbers should be


def test_bits_per_dim_turns_the_published_nats_into_the_published_bits():
    for nats, bits in ((-1300.5, 1.89), (-1380.8, 2.04), (-1100.3, 1.52)):
        found = pf.bits_per_dim(nats, (1, 28, 28), bins=256, log_det=4620.1)
        assert found == pytest.approx(bits, abs=0.005)
        assert found == pytest.approx(8 - (nats + 4620.1) / (784 * math.log(2)))


def test_bits_per_dim_of_integers_drawn_blindly_is_the_log_of_the_levels():
    log_prob = torch.full((4,), -5 * math.log(16))
    torch.testing.assert_close(pf.bits_per_dim(log_prob, 5), torch.full((4,), 4.0))
    torch.testing.assert_close(
        pf.bits_per_dim(torch.zeros(2, requires_grad=True), (1, 5), bins=16), torch.full((2,), 4.0)
    )


@pytest.mark.parametrize("shape", [0, (3, 0)])
def test_bits_per_dim_needs_a_dimension(shape):
    with pytest.raises(ValueError, match="shape: expected at least one dimension"):
        pf.bits_per_dim(0.0, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logit", [None, 0.05, 1e-6])
def test_many_draws_of_the_noise_reach_the_probability_of_the_integers(logit, dtype):
    """Through a logit too: the flow is then the one whose sigmoid is normal."""
    bins, shape = 4, (2,)
    flow = normal(shape, dtype=dtype)
    if logit is not None:
        flow = pf.Flow(pf.Chain([OneToOne(0.4, 0.3, 1), _Logit(logit)]), shape=shape).to(dtype)
    x = torch.cartesian_prod(torch.arange(bins), torch.arange(bins))
    wanted = level_log_probs(bins)[x].sum(-1)
    with torch.no_grad():
        found = pf.quantized(flow, bins, logit=logit, samples=20_000).log_prob(x, seed=0)
    torch.testing.assert_close(found.double(), wanted, atol=0.03, rtol=0)


class _Logit(pf.FlowTransform):
    """The transform that ``logit=`` applies, written anew."""

    domain = constraints.independent(constraints.unit_interval, 1)

    def __init__(self, edge):
        super().__init__()
        self.edge = edge

    def forward_and_log_det(self, y, context=None):
        v = self.edge + (1 - 2 * self.edge) * y
        log_det = math.log(1 - 2 * self.edge) - v.log() - (1 - v).log()
        return torch.logit(v), log_det.sum(-1)

    def inverse_and_log_det(self, z, context=None):
        y = (torch.sigmoid(z) - self.edge) / (1 - 2 * self.edge)
        return y, -self.forward_and_log_det(y)[1]


def test_one_draw_bounds_the_probability_and_more_draws_bound_it_tighter():
    bins = 4
    x = torch.randint(0, bins, (2000, 3))
    exact = level_log_probs(bins)[x].sum(-1).mean()
    flow = normal()
    bounds = [pf.quantized(flow, bins, samples=k).log_prob(x).mean() for k in (1, 4, 32)]
    assert bounds[0] < bounds[1] - 0.02 < bounds[2] - 0.02
    assert bounds[2] < exact + 0.01
    # What uniform noise loses, from the closed form of E log p.
    y = (x + torch.rand(64, *x.shape, dtype=torch.float64)) / bins
    one = (torch.distributions.Normal(0.4, 0.3).log_prob(y) - math.log(bins)).sum(-1).mean()
    torch.testing.assert_close(bounds[0], one, atol=0.05, rtol=0)


@pytest.mark.parametrize("samples", [None, 64])
@pytest.mark.parametrize("context", [0, 2])
def test_bits_per_dim_is_the_mean_over_all_rows(context, samples):
    q = pf.quantized(small(context=context), 8, logit=0.05, samples=16)
    pf.testing.randomize(q, 0.3)
    x = torch.randint(8, (1100, 2))
    c = torch.randn(1100, 2) if context else None
    many = pf.quantized(q.flow, 8, logit=0.05, samples=samples or 16)
    with torch.no_grad():
        expected = pf.bits_per_dim(many.log_prob(x, c).mean().item(), 2)
        loose = pf.bits_per_dim(pf.quantized(q.flow, 8, logit=0.05).log_prob(x, c).mean().item(), 2)
    found = q.bits_per_dim(x, c, samples=samples)
    assert abs(found - expected) < 0.2 * (loose - expected)


def test_draws_have_the_frequencies_of_the_levels():
    bins = 4
    wanted = level_log_probs(bins).exp()
    below, above = torch.distributions.Normal(0.4, 0.3).cdf(torch.tensor([0.0, 1.0]).double())
    wanted[0] += below  # what the flow puts outside goes to the outer levels
    wanted[-1] += 1 - above
    x = pf.quantized(normal((1,)), bins).sample((40_000,))
    assert x.dtype == torch.int64
    found = torch.bincount(x.flatten(), minlength=bins).double() / len(x)
    torch.testing.assert_close(found, wanted, atol=0.01, rtol=0)


@pytest.mark.parametrize("logit", [None, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantize_undoes_dequantize(logit, dtype):
    q = pf.quantized(small(256).to(dtype), 256, logit=logit)
    x = torch.arange(256).expand(50, 256)
    y, log_weight = q.dequantize(x)
    assert y.dtype == log_weight.dtype == dtype
    assert torch.isfinite(y).all()
    # In float32 (255 + u) / 256 rounds up now and then.
    wrong = (q.quantize(y) != x).double().mean()
    assert wrong == 0 if dtype == torch.float64 else wrong < 1e-3


@pytest.mark.parametrize(("dtype", "bins"), [(torch.bfloat16, 16), (torch.float16, 128)])
@pytest.mark.parametrize("logit", [None, 0.05])
def test_noise_in_half_precision_fills_the_gaps_or_is_refused(dtype, bins, logit):
    q = pf.quantized(pf.nice(2, layers=2, hidden=(8,)), bins, logit=logit).to(dtype)
    x = torch.full((4000, 2), bins - 3)
    y, weight = q.dequantize(x, seed=0)
    assert y.dtype == dtype
    exact = torch.tensor(-2 * math.log(bins))
    assert logit or torch.allclose(weight, exact)
    assert len(y.unique()) >= 8
    if logit is None:
        assert (q.quantize(y) - x).abs().max() <= 1
        assert (q.quantize(y) == x).float().mean() > 0.9
    many = pf.quantized(pf.nice(2, layers=2, hidden=(8,)), 2 * bins, logit=logit).to(dtype)
    with pytest.raises(ValueError, match=rf"bins: {dtype} has no numbers between {2 * bins}"):
        many.log_prob(x)
    many.float().log_prob(x)


def test_the_log_weight_is_the_log_det_of_the_map_minus_that_of_the_noise():
    q = pf.quantized(small(3).double(), 8, logit=0.05)
    x = torch.tensor([[0, 3, 7]])
    y, log_weight = q.dequantize(x, seed=3)
    v = torch.sigmoid(y)
    slopes = (1 - 0.1) / (v * (1 - v)) / 8  # uniform noise has density one
    torch.testing.assert_close(log_weight, slopes.log().sum(-1))
    torch.testing.assert_close(q.log_prob(x, seed=3), q.flow.log_prob(y) + log_weight)


# Noise


def test_noise_is_new_at_each_call_unless_a_seed_is_given():
    q = pf.quantized(small(), 8)
    x = torch.tensor([[0, 7], [3, 4]])
    assert not torch.equal(q.log_prob(x), q.log_prob(x))
    before = torch.get_rng_state()
    first = q.log_prob(x, seed=5)
    assert torch.equal(first, q.log_prob(x, seed=5))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, q.log_prob(x, seed=6))
    assert torch.equal(first, q(seed=5).expand((2,)).log_prob(x))


@pytest.mark.parametrize("support", [None, constraints.unit_interval])
def test_variational_noise_stays_in_the_unit_interval_and_has_the_density_it_says(support):
    noise = pf.iaf(1, 1, layers=2, hidden=(8,), support=support).double()
    pf.testing.randomize(noise, 1.0, 0)
    q = pf.quantized(normal((1,)), 4, dequantizer=noise)
    x = torch.full((200_000, 1), 2)
    with torch.no_grad():
        y, log_weight = q.dequantize(x)
    u = 4 * y[:, 0] - 2
    assert ((u >= 0) & (u <= 1)).all()
    log_q = -log_weight - math.log(4)
    # E_q [f / q] is the integral of f over [0, 1): here of u^2.
    assert (u.square() / log_q.exp()).mean().item() == pytest.approx(1 / 3, abs=0.01)
    assert u.mean() != pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "support",
    [
        constraints.interval(-1.0, 1.0),
        constraints.interval(0.0, 1.2),
        constraints.cat([constraints.unit_interval, constraints.real], lengths=[1, 1]),
    ],
    ids=["below", "above", "one element"],
)
def test_noise_that_leaves_the_unit_interval_a_little_is_brought_there(support):
    noise = pf.iaf(2, 2, layers=1, hidden=(8,), support=support).double()
    q = pf.quantized(normal((2,)), 4, dequantizer=noise)
    y, _ = q.dequantize(torch.full((500, 2), 2))
    assert ((4 * y >= 2) & (4 * y <= 3)).all()


UNIT = constraints.unit_interval


@pytest.mark.parametrize(
    ("support", "within"),
    [
        (constraints.real_vector, False),
        (constraints.positive, False),
        (constraints.independent(UNIT, 2), True),
        (constraints.interval(0.1, 0.9), True),
        (constraints.interval(0.0, 1.0 + 1e-6), False),
        (constraints.interval(-1e-30, 1.0), False),
        (constraints.interval(torch.zeros(2), torch.tensor([1.0, 2.0])), False),
        (constraints.cat([UNIT, constraints.interval(0.0, 0.5)], lengths=[1, 1]), True),
        (constraints.stack([UNIT, constraints.real]), False),
        (constraints.simplex, False),  # tells of no bounds
    ],
)
def test_a_support_says_by_its_bounds_whether_it_is_within_the_unit_interval(support, within):
    assert within_the_unit_interval(support) == within


@pytest.mark.parametrize("shape", [(4,), (1, 4, 4)], ids=["vectors", "images"])
def test_variational_noise_is_finite_at_a_uniform_number_of_zero(shape, monkeypatch):
    q = pf.quantized(normal(shape, dtype=torch.float32), 8, dequantizer="variational")
    x = torch.randint(8, (5, *shape))
    monkeypatch.setattr(torch, "rand", torch.zeros)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda u, *_: u.zero_())
    q.log_prob(x).sum().backward()
    assert torch.isfinite(q.log_prob(x)).all()
    assert all(torch.isfinite(p.grad).all() for p in q.parameters() if p.grad is not None)


def test_variational_noise_starts_near_uniform_noise():
    q = pf.quantized(small(4), 8, dequantizer="variational")
    y, log_weight = q.dequantize(torch.zeros(2000, 4))
    assert (log_weight + 4 * math.log(8)).abs().mean() < 0.1
    assert (8 * y).mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 4, 2)])
def test_convolutional_noise_starts_as_uniform_noise(shape):
    q = pf.quantized(normal(shape), 8, dequantizer="variational")
    y, log_weight = q.dequantize(torch.full((2000, *shape), 3))
    assert not any(isinstance(m, pf.nets.MADE) for m in q.modules())
    assert log_weight.add(math.prod(shape) * math.log(8)).abs().max() < 1e-10
    mean, second = ((8 * y - 3) ** k for k in (1, 2))
    assert mean.mean().item() == pytest.approx(1 / 2, abs=0.02)
    assert second.mean().item() == pytest.approx(1 / 3, abs=0.02)


def test_convolutional_noise_has_the_density_it_says():
    q = pf.quantized(normal((1, 2, 2)), 4, dequantizer="variational")
    pf.testing.randomize(q.dequantizer, 0.1, 0)
    x = torch.tensor([0, 1, 2, 3]).reshape(2, 2).expand(100_000, 1, 2, 2)
    with torch.no_grad():
        y, log_weight = q.dequantize(x)
    u = 4 * y - x
    assert ((u >= 0) & (u <= 1)).all()
    weight = (log_weight + 4 * math.log(4)).exp()  # 1 / q(u given x)
    # E_q [f / q] is the integral of f over the unit cube: here of one square.
    for square in u.square().flatten(1).unbind(1):
        assert (square * weight).mean().item() == pytest.approx(1 / 3, abs=0.01)
    assert weight.std() > 0.1


def test_noise_of_odd_pictures_is_drawn_number_by_number():
    q = pf.quantized(normal((1, 3, 2)), 8, dequantizer="variational")
    assert any(isinstance(m, pf.nets.MADE) for m in q.modules())
    assert q.log_prob(torch.zeros(2, 1, 3, 2)).shape == (2,)


@pytest.mark.parametrize("samples", [1, 3])
def test_variational_noise_is_tighter_once_trained(samples):
    """On a fixed flow the bound's optimum is the exact probability."""
    bins, flow = 2, normal((2,), loc=0.25, scale=0.12)
    x = torch.cartesian_prod(torch.arange(bins), torch.arange(bins))
    exact = level_log_probs(bins, 0.25, 0.12)[x].sum(-1).mean()
    q = pf.quantized(flow, bins, dequantizer="variational", samples=samples)
    uniform = pf.quantized(flow, bins, samples=samples)
    optimiser = torch.optim.Adam(q.parameters(), lr=0.01)
    for _ in range(250):
        optimiser.zero_grad()
        (-q.log_prob(x.repeat(32, 1)).mean()).backward()
        optimiser.step()
    with torch.no_grad():
        many = x.repeat(2000, 1)
        trained, plain = q.log_prob(many).mean(), uniform.log_prob(many).mean()
    assert plain < exact - 0.3
    assert exact - 0.15 < trained < exact + 0.05


@pytest.mark.slow
def test_variational_noise_gives_a_better_bound_on_digits():
    """The same flow, epochs and step sizes; 2.68 against 2.61 bits per dimension at 40 epochs."""
    data = pf.datasets.digits(dequantize=False)
    train, test = data.train.long(), data.test.long()
    bits = {}
    for kind in ("uniform", "variational"):
        torch.manual_seed(0)
        q = pf.quantized(
            pf.realnvp(64, layers=4, hidden=(64,), linear="permute"), 17, dequantizer=kind
        )
        pf.fit(q, train, max_epochs=40, progress=False)
        with torch.no_grad():
            bound = torch.stack([q.log_prob(test).mean() for _ in range(8)]).mean()
        bits[kind] = pf.bits_per_dim(bound.item(), 64)
    assert bits["variational"] < bits["uniform"] - 0.03


# Pyro's contract


def test_verbs_and_shapes_with_a_context_and_an_image():
    q = pf.quantized(small(3, context=2), 8, samples=2)
    context = torch.zeros(5, 2)
    d = q(context)
    assert (d.batch_shape, d.event_shape) == ((5,), (3,))
    x = q.sample((4,), context)
    assert x.shape == (4, 5, 3)
    assert q.log_prob(x, context).shape == (4, 5)
    assert q.log_prob(x[0, 0], context).shape == (5,)
    assert (q.event_shape, q.context_shape, q.fast) == ((3,), (2,), "both")
    image = pf.quantized(normal((1, 4, 2)), 8, dequantizer=small(8, context=8).double())
    x = image.sample((3,))
    assert x.shape == (3, 1, 4, 2)
    assert image.log_prob(x).shape == (3,)
    assert image().expand((2, 3)).log_prob(x).shape == (2, 3)
    assert image.log_prob(x[:0]).shape == (0,)


def test_support_is_integers():
    q = pf.quantized(normal((1, 4, 2)), 8)
    assert q.support.is_discrete
    assert q().support.event_dim == 3
    assert q.support.check(q.sample((6,))).all()
    assert not q.support.check(torch.full((1, 4, 2), 8))
    assert not q.support.check(torch.full((1, 4, 2), 0.5))
    assert not q().has_rsample


@pytest.mark.parametrize("kind", ["uniform", "variational"])
def test_trains_under_svi_in_a_plate(kind):
    x = torch.randint(0, 3, (300, 2)) + torch.tensor([0, 5])
    q = pf.quantized(small(), 8, dequantizer=kind)

    def model(x):
        pyro.module("pixels", q)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", q(), obs=x)

    before = {name: p.detach().clone() for name, p in q.named_parameters()}
    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(x) / len(x) for _ in range(60)]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5
    for name, parameter in q.named_parameters():
        assert f"pixels$$${name}" in pyro.get_param_store()
        assert not torch.equal(parameter, before[name]), name


def test_a_second_model_under_a_name_of_the_store_goes_on_from_there():
    first, second = (pf.quantized(small(), 8) for _ in range(2))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.3)
    pyro.module("pixels", first)
    pyro.module("pixels", second)
    x = torch.tensor([[0, 7]])
    torch.testing.assert_close(first.log_prob(x, seed=0), second.log_prob(x, seed=0))


def test_masks_to_event_and_expands_and_lives_in_a_pyro_module():
    q = pf.quantized(small(), 8)
    x = torch.tensor([[0, 7], [3, 4]])
    d = q(seed=0).expand((2,))
    log_prob = d.log_prob(x)
    assert d.to_event(1).log_prob(x) == log_prob.sum()
    mask = torch.tensor([True, False])
    assert torch.equal(d.mask(mask).log_prob(x), log_prob * mask)

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.pixels = pf.quantized(small(), 8)

        def forward(self):
            with pyro.plate("rows", 3):
                return pyro.sample("x", self.pixels())

    trace = pyro.poutine.trace(Model()).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"].shape == (3,)
    assert trace.nodes["x"]["value"].dtype == torch.int64


def test_copies_pickles_and_loads():
    q = pf.quantized(small(), 8, dequantizer="variational")
    x = torch.tensor([[0, 7]])
    wanted = q.log_prob(x, seed=0)
    file = io.BytesIO()
    torch.save(q.state_dict(), file)
    file.seek(0)
    loaded = pf.quantized(small(), 8, dequantizer="variational")
    loaded.load_state_dict(torch.load(file))
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), loaded):
        torch.testing.assert_close(other.log_prob(x, seed=0), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["uniform", "variational"])
def test_every_parameter_gets_a_gradient_in_either_dtype(dtype, kind):
    q = pf.quantized(small(3).to(dtype), 8, dequantizer=kind, logit=1e-6)
    pf.testing.randomize(q, 1.0, 0)
    x = torch.tensor([[0, 3, 7], [7, 0, 0]], dtype=torch.uint8)
    log_prob = q.log_prob(x)
    assert log_prob.dtype == dtype
    log_prob.sum().backward()
    for name, parameter in q.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


# fit


def test_fit_reports_bits_per_dim_and_learns():
    x = torch.randint(0, 2, (400, 2)) + torch.tensor([0, 6])
    q = pf.quantized(small(), 8)
    history = pf.fit(q, x, max_epochs=40, lr=0.01, progress=False)
    assert history.unit == "bits/dim"
    assert history.score == min(history.val) < 1.8 < 3  # one bit is the truth, 3 knowing nothing
    assert "bits/dim" in repr(history)
    found = pf.bits_per_dim(q.log_prob(x).mean().detach(), 2)
    assert found.item() == pytest.approx(history.score, abs=0.25)
    ax = history.plot()
    assert ax.get_ylabel() == "bits/dim"
    assert ax.get_xlabel() == "epoch"
    low, high = ax.get_ylim()
    assert low < history.score < high


def test_fit_wraps_a_flow_by_one_argument():
    x = torch.randint(0, 3, (200, 2), dtype=torch.uint8)
    flow = small()
    history = pf.fit(flow, x, bins=4, val=x[:20], **SEEN)
    assert history.unit == "bits/dim"
    assert not flow.training
    assert (flow.sample((2000,)).mean(0) - 0.375).abs().max() < 0.1  # (1 + 1/2) / 4
    assert pf.fit(small(), torch.randn(200, 2), **SEEN).unit == "nats"


def test_fit_takes_arrays_loaders_and_booleans():
    x = torch.randint(0, 2, (100, 2))
    pf.fit(small(), x.numpy(), bins=2, **SEEN)
    pf.fit(small(), x.bool(), bins=2, **SEEN)
    loader = torch.utils.data.DataLoader(x, batch_size=20)
    assert pf.fit(small(), loader, bins=2, val=loader, **SEEN).unit == "bits/dim"


def test_fit_validates_on_the_same_noise_and_leaves_the_generator_where_noise_took_it():
    """With a step size of nearly zero the score stays where it is."""
    x = torch.randint(0, 8, (200, 2))
    history = pf.fit(
        pf.quantized(small(), 8), x, lr=1e-12, average=0.0, max_epochs=3, progress=False
    )
    assert history.val == pytest.approx([history.val[0]] * 3, abs=1e-6)
    assert history.train[0] != history.train[1]


def test_fit_makes_the_start_on_dequantised_data():
    x = torch.randint(100, 103, (500, 2))
    q = pf.quantized(small(), 256)
    before = torch.get_rng_state()
    pf.initialize(q, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert (q.sample((2000,)).double().mean(0) - 101).abs().max() < 0.5


# Bad input

BAD_DATA = {
    "above": (torch.tensor([[0, 300]]), "1 of 1 rows are outside.*upper_bound=255.*from 0 to 300"),
    "below": (torch.tensor([[-1, 3]]), "1 of 1 rows are outside.*from -1 to 3"),
    "floats": (torch.rand(4, 2), r"x: expected integers.*float32, with values from 0\.\d* to"),
    "shape": (torch.zeros(4, 3).long(), r"x: expected shape \(rows, 2\).*\(4, 3\)"),
    "empty": (torch.zeros(0, 2).long(), "x: expected at least one row"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_of_fit(name):
    x, message = BAD_DATA[name]
    for call in (pf.fit, pf.initialize):
        with pytest.raises(ValueError, match=message):
            call(pf.quantized(small(), 256), x)


BAD_VALUES = {
    "above": (torch.tensor([0, 300]), "integers from 0 to 255, got torch.int64 values, from 0 to"),
    "below": (torch.tensor([-1.0, 3.0]), "integers from 0 to 255, got torch.float32.*from -1 to 3"),
    "floats": (torch.tensor([0.25, 3.0]), "not all of them whole, from 0.25 to 3"),
    "nan": (torch.tensor([float("nan"), 3.0]), "not all of them whole"),
    "shape": (torch.zeros(3), r"value: expected shape \(\*batch, 2\), got \(3,\)"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_values_of_log_prob(name):
    value, message = BAD_VALUES[name]
    with pytest.raises(ValueError, match=message):
        pf.quantized(small(), 256).log_prob(value)
    with pytest.raises(ValueError, match=message.replace("value:", "x:")):
        pf.quantized(small(), 256).dequantize(value)
    assert torch.isfinite(pf.quantized(small(), 256).log_prob(torch.tensor([0.0, 255.0])))


BAD_ARGUMENTS = {
    "no_rows": (
        lambda: pf.quantized(small(), 8).bits_per_dim(torch.zeros(0, 2)),
        r"x: expected rows of shape \(n, 2\), at least one, got \(0, 2\)",
    ),
    "one_row": (
        lambda: pf.quantized(small(), 8).bits_per_dim(torch.zeros(2)),
        r"x: expected rows of shape \(n, 2\), at least one, got \(2,\)",
    ),
    "one_bin": (lambda: pf.quantized(small(), 1), "bins: expected an integer >= 2, got 1"),
    "half_bins": (lambda: pf.quantized(small(), 2.5), "bins: expected an integer >= 2, got 2.5"),
    "logit": (lambda: pf.quantized(small(), 8, logit=0.5), r"logit: .*\(0, 0.5\).*got 0.5"),
    "samples": (lambda: pf.quantized(small(), 8, samples=0), "samples: .*>= 1, got 0"),
    "flow": (lambda: pf.quantized(nn.Linear(2, 2), 8), "flow: expected a Flow, got Linear"),
    "twice": (lambda: pf.quantized(pf.quantized(small(), 8), 8), "flow: .*got Quantized"),
    "word": (lambda: pf.quantized(small(), 8, dequantizer="vi"), "dequantizer: .*got 'vi'"),
    "width": (
        lambda: pf.quantized(small(), 8, dequantizer=small(3, context=2)),
        r"dequantizer: .*over 2 elements.*\(3,\), context \(2,\)",
    ),
    "no_context": (
        lambda: pf.quantized(small(), 8, dequantizer=small()),
        r"dequantizer: .*\(2,\), context \(\)",
    ),
    "slow": (
        lambda: pf.quantized(small(), 8, dequantizer=pf.maf(2, 2, layers=1, hidden=(8,))),
        "dequantizer: .*in one pass.*'log_prob'",
    ),
    "fit_bins": (lambda: pf.fit(small(), torch.zeros(9, 2).long(), bins=0), "bins: .*got 0"),
    "context": (lambda: pf.quantized(small(), 8)(torch.zeros(2)), "context: this flow takes none"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name):
    make, message = BAD_ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_distribution_is_pyros_and_reads_well():
    d = pf.quantized(small(), 8)()
    assert isinstance(d, dist.TorchDistribution)
    assert repr(d) == "QuantizedDistribution(batch_shape=(), event_shape=(2,), bins=8)"
    assert "bins=8, logit=0.05, samples=1" in repr(pf.quantized(small(), 8, logit=0.05))
