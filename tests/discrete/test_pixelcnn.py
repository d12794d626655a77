"""PixelCNN: a distribution over integer images, its cached generation, its uses."""

import copy
import itertools
import math
import pickle
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pyroflows as pf
from pyroflows.discrete.levels import to_level, to_unit
from pyroflows.discrete.pixel_likelihoods import Categorical, LogisticMixture
from pyroflows.nets import PixelNet

SMALL = {"channels": 8, "layers": 2, "kernel": 3}


def make(shape=(1, 4, 5), classes=0, *, bins=4, mixture=3, **options):
    """A small model in double precision whose parameters are far from where they start."""
    model = pf.pixelcnn(shape, classes, bins=bins, mixture=mixture, **{**SMALL, **options}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def all_images(shape, bins):
    size = torch.Size(shape).numel()
    return torch.tensor(list(itertools.product(range(bins), repeat=size))).reshape(-1, *shape)


# Likelihoods of one level.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "likelihood", [Categorical(5), LogisticMixture(5, 3), LogisticMixture(256, 2)]
)
def test_a_likelihood_sums_to_one_with_gradients(likelihood, dtype):
    for spread in (0.0, 1.0, 30.0, 1000.0):
        params = (spread * torch.randn(50, likelihood.params, dtype=dtype)).requires_grad_()
        levels = torch.arange(likelihood.bins).expand(50, -1)
        log_prob = likelihood.log_prob(params[:, None].expand(-1, likelihood.bins, -1), levels)
        assert log_prob.dtype == dtype
        total = log_prob.logsumexp(dim=1)
        assert torch.allclose(total, torch.zeros_like(total), atol=2e-5)
        assert torch.isfinite(log_prob).all()
        assert torch.isfinite(torch.autograd.grad(log_prob.sum(), params)[0]).all()


def test_a_logistic_scores_bins_far_out_as_an_exact_reference():
    likelihood = LogisticMixture(256, 1)
    params = torch.tensor([0.0, 0.9, -5.0], dtype=torch.float64)
    x = torch.tensor([0, 1, 100, 254, 255])
    got = likelihood.log_prob(params.float().expand(5, -1), x).double()
    log_scale = likelihood._split(params)[2]
    # Far below the mean F is its lower tail, exp(a): differences of F would be zero in float32.
    low, high = (
        (to_unit(x.double() + shift, 256) - 0.9) / log_scale.exp() for shift in (-0.5, 0.5)
    )
    below = torch.where(x == 0, 0.0, low.sigmoid())
    mass = torch.where(x == 255, 1.0, high.sigmoid()) - below
    assert mass[0] < 1e-100
    assert torch.allclose(got, mass.log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("likelihood", [Categorical(5), LogisticMixture(5, 3)])
def test_draws_of_a_likelihood_follow_its_probabilities(likelihood):
    params = torch.randn(likelihood.params, dtype=torch.float64)
    side = 400 if likelihood.uniforms == 2 else 160_000
    grid = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    uniforms = torch.cartesian_prod(*[grid] * likelihood.uniforms).reshape(-1, likelihood.uniforms)
    x = likelihood.draw(params.expand(len(uniforms), -1), uniforms)
    share = torch.bincount(x.long(), minlength=5) / len(x)
    expected = likelihood.log_prob(params.expand(5, -1), torch.arange(5)).exp()
    assert torch.allclose(share.double(), expected, atol=4e-3)


def test_draws_stay_in_range_at_the_ends_of_the_uniform_numbers():
    ends = torch.tensor([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24]])
    assert LogisticMixture(256, 1).draw(torch.zeros(2, 3), ends).tolist() == [0, 255]
    assert Categorical(3).draw(torch.zeros(2, 3), ends[:, :1]).tolist() == [0, 2]
    assert to_level(to_unit(torch.arange(256.0), 256), 256).tolist() == list(range(256))


# The network.


def jacobian(net, shape, context=None):
    """How much pixel p's features change with pixel q: ``(pixels, pixels)``."""
    x = torch.randn(1, *shape, dtype=torch.float64)
    full = torch.autograd.functional.jacobian(lambda x: net(x, context)[0].flatten(1), x)
    return full.abs().sum(dim=(0, 2, 3)).flatten(1)


@pytest.mark.parametrize("kernel", [3, 5])
def test_a_pixel_sees_every_one_before_it_and_no_other(kernel):
    """No blind spot: also far to the right in the row above."""
    height, width = 4, 5
    net = PixelNet(1, channels=6, layers=4, kernel=kernel).double()
    sees = jacobian(net, (1, height, width)) > 0
    assert torch.equal(sees, torch.ones_like(sees).tril(-1))


def test_what_a_pixel_sees_reaches_as_far_as_told():
    layers, kernel, side = 2, 3, 9
    net = PixelNet(1, channels=6, layers=layers, kernel=kernel).double()
    sees = (jacobian(net, (1, side, side)) > 0).reshape(side, side, side, side)[7, 4]
    i, j = sees.nonzero().T
    reach = layers * (kernel // 2)
    assert i.min() == 7 - reach - 1
    assert (j[i < 7].min(), j[i < 7].max()) == (4 - reach, 4 + reach)
    assert j[i == 7].min() == 4 - reach - 1


def test_walking_gives_the_features_of_one_pass():
    net = PixelNet(2, channels=6, layers=3, kernel=5, context=3).double()
    x = torch.randn(3, 2, 5, 6, dtype=torch.float64)
    c = torch.eye(3, dtype=torch.float64)
    expected, got = net(x, c), torch.zeros(3, 6, 5, 6, dtype=torch.float64)
    net.step_through(x, lambda features, i, j: got[:, :, i, j].copy_(features), c)
    assert torch.allclose(got, expected, atol=1e-12)
    got.zero_()
    net.step_through(x, lambda features, i, j: got[:, :, i, j].copy_(features), c, rows=[1, 3])
    assert torch.allclose(got[:, :, [1, 3]], expected[:, :, [1, 3]], atol=1e-12)
    assert (got[:, :, [0, 2, 4]] == 0).all()


# The distribution.


@pytest.mark.parametrize("mixture", [2, "categorical"])
@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 1, 2), (4, 1, 1)])
def test_probabilities_of_all_images_sum_to_one(shape, mixture):
    """For several colours only if each sees the ones before it alone."""
    model = make(shape, bins=3, mixture=mixture)
    total = model.log_prob(all_images(shape, 3)).logsumexp(dim=0)
    assert torch.allclose(total, torch.zeros_like(total), atol=1e-10)


def test_a_colour_depends_on_the_colours_before_it():
    model = make((2, 1, 1), bins=3)
    log_prob = model.log_prob(all_images((2, 1, 1), 3)).reshape(3, 3)
    second = log_prob.log_softmax(dim=1)
    assert (second[0] - second[1]).abs().max() > 1e-3


def test_draws_follow_the_probabilities():
    model = make((1, 1, 3), bins=2, mixture="categorical")
    x = model.sample((20_000,)).reshape(-1, 3)
    share = torch.bincount(x @ torch.tensor([4, 2, 1]), minlength=8) / len(x)
    expected = model.log_prob(all_images((1, 1, 3), 2)).exp()
    assert (share - expected).abs().max() < 0.015


@torch.no_grad()
def fill_by_full_passes(model, x, known, context, seed):
    """The definition: a whole pass for each pixel, with the same uniform numbers."""
    colours, height, width = model.event_shape
    x = x.double()
    generator = torch.Generator().manual_seed(seed)
    size = (height, width, colours, len(x), model.likelihood.uniforms)
    uniforms = torch.rand(size, dtype=torch.float64, generator=generator)
    for i, j, colour in itertools.product(range(height), range(width), range(colours)):
        u = to_unit(x, model.bins)
        features = model.hidden(model.net(u, context).movedim(1, -1))[:, i, j]
        params = model._likelihood_at(features, u[:, :, i, j], colour)
        level = model.likelihood.draw(params, uniforms[i, j, colour])
        x[:, colour, i, j] = torch.where(known[:, colour, i, j], x[:, colour, i, j], level)
    return x.long()


@pytest.mark.parametrize("mixture", [3, "categorical"])
@pytest.mark.parametrize("colours", [1, 3])
def test_cached_generation_equals_a_pass_for_each_pixel(colours, mixture):
    shape = (colours, 5, 6)
    model = make(shape, 2, bins=16, mixture=mixture, layers=3, kernel=5)
    context = torch.eye(2, dtype=torch.float64)[[0, 1, 1, 0]]
    x = torch.randint(16, (4, *shape))
    known = torch.rand(4, *shape) < 0.3
    known[:, :, 2] = True
    for given in (torch.zeros_like(known), known):
        cached = model.complete(x, given, context, seed=5)
        assert torch.equal(cached, fill_by_full_passes(model, x * given, given, context, seed=5))
    assert len(cached.unique()) > 4


def test_generation_is_ten_times_faster_than_a_pass_for_each_pixel():
    model = pf.pixelcnn((1, 28, 28), channels=32, layers=4)

    def seconds(call):
        begin = time.perf_counter()
        with torch.no_grad():
            call()
        return time.perf_counter() - begin

    x = model.sample((8,))
    one_pass = min(seconds(lambda: model.log_prob(x)) for _ in range(3))
    drawing = seconds(lambda: model.sample((8,)))
    assert 28 * 28 * one_pass > 10 * drawing


@pytest.mark.parametrize("batch", [(), (1,), (7,), (3, 4), (0,), (2, 0)])
def test_batch_shapes(batch):
    model = make()
    x = model.sample(batch)
    assert x.shape == (*batch, 1, 4, 5)
    assert x.dtype == torch.int64
    assert model.log_prob(x).shape == batch
    assert model().expand((3, *batch)).log_prob(x).shape == (3, *batch)
    flat = model.log_prob(x.reshape(-1, 1, 4, 5)) if x.numel() else torch.zeros(0)
    assert torch.allclose(model.log_prob(x).flatten(), flat.to(model.log_prob(x)))


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_batch_shapes_of_contexts(batch):
    model = make(classes=4)
    labels = torch.randint(4, batch)
    d = model(labels)
    assert d.batch_shape == batch
    x = d.sample((6,))
    assert x.shape == (6, *batch, 1, 4, 5)
    one_by_one = torch.stack(
        [
            model.log_prob(x[(k, *index)], labels[index])
            for k in range(6)
            for index in itertools.product(*map(range, batch))
        ]
    )
    assert torch.allclose(d.log_prob(x).flatten(), one_by_one)
    assert d.expand((6, *batch)).log_prob(x[0]).shape == (6, *batch)
    assert d.expand((6, *batch)).sample().shape == (6, *batch, 1, 4, 5)


def test_labels_and_one_hot_rows_are_one():
    model = make(classes=4)
    x = model.sample((), torch.tensor([1, 3]))
    by_label = model.log_prob(x, torch.tensor([1, 3]))
    assert torch.equal(by_label, model.log_prob(x, torch.eye(4)[[1, 3]]))
    assert not torch.allclose(by_label, model.log_prob(x, torch.tensor([3, 1])))


def test_it_is_a_discrete_distribution_of_pyro():
    d = make(bins=4)()
    assert isinstance(d, dist.TorchDistribution)
    assert d.support.is_discrete
    assert d.support.event_dim == 3
    assert not d.has_rsample
    x = d.sample((3,))
    assert d.support.check(x).all()
    assert d.support.check(x + 4).sum() == 0
    assert torch.equal(d.log_prob(x), d.log_prob(x.float()))
    assert torch.equal(d.log_prob(x), d.log_prob(x.byte()))
    assert repr(d) == "PixelDistribution(batch_shape=(), event_shape=(1, 4, 5), bins=4)"


def test_the_gradient_reaches_every_parameter():
    model = make((2, 3, 3), 2)
    labels = torch.tensor([0, 1, 1])
    model.log_prob(model.sample((), labels), labels).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_single_precision_and_copies_score_the_same():
    model = make(classes=2)
    labels = torch.tensor([0, 1])
    x = model.sample((), labels)
    expected = model.log_prob(x, labels)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.log_prob(x, labels), expected)
    other = make(classes=2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.log_prob(x, labels), expected)
    single = model.float().log_prob(x, labels)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), expected, rtol=1e-5)
    assert model.config["builder"] == "pixelcnn"
    assert model.config["arguments"]["classes"] == 2


# What it is for.


def test_classes_by_bayes():
    model = make((1, 2, 2), 3, bins=3)
    x = torch.randint(3, (4, 5, 1, 2, 2))
    joint = torch.stack([model.log_prob(x, torch.tensor(k)) for k in range(3)], dim=-1).exp()
    equal = model.classify(x)
    assert equal.shape == (4, 5, 3)
    assert not equal.requires_grad
    assert torch.allclose(equal.sum(dim=-1), torch.ones(4, 5, dtype=torch.float64))
    assert torch.allclose(equal, joint / joint.sum(dim=-1, keepdim=True))
    weighted = joint * torch.tensor([1.0, 0.0, 3.0])
    expected = weighted / weighted.sum(dim=-1, keepdim=True)
    assert torch.allclose(model.classify(x, [1, 0, 3]), expected)
    assert model.classify(x[0, 0]).shape == (3,)
    assert model.classify(x[:0]).shape == (0, 5, 3)


def test_completing_keeps_what_is_known():
    model = make((2, 4, 5), 3, bins=8)
    x = torch.randint(8, (6, 2, 4, 5))
    known = torch.rand(4, 5) < 0.5
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    got = model.complete(x, known, labels, seed=1)
    assert torch.equal(got[..., known], x[..., known])
    assert not torch.equal(got, x)
    nonsense = torch.where(known, x, -99).double().masked_fill(~known, float("nan"))
    assert torch.equal(model.complete(nonsense, known, labels, seed=1), got)
    assert not torch.equal(model.complete(x, known, labels, seed=2), got)
    assert torch.equal(model.complete(x, torch.ones(4, 5, dtype=torch.bool), labels), x)
    # One image in every class.
    assert model.complete(x[0], known, torch.arange(3)).shape == (3, 2, 4, 5)
    torch.manual_seed(3)
    first = model.complete(x, known, labels)
    torch.manual_seed(3)
    assert torch.equal(model.complete(x, known, labels), first)


def test_completions_follow_the_conditional_distribution():
    model = make((1, 1, 3), bins=2, mixture="categorical")
    x = torch.tensor([[[1, 0, 0]]]).expand(20_000, 1, 1, 3)
    got = model.complete(x, torch.tensor([True, False, False]), seed=0).reshape(-1, 3)
    share = torch.bincount(got @ torch.tensor([4, 2, 1]) - 4, minlength=4) / len(got)
    expected = model.log_prob(all_images((1, 1, 3), 2)[4:]).softmax(dim=0)
    assert (share - expected).abs().max() < 0.015


def striped(count):
    """Images of a class: rows of one level, columns of another."""
    labels = torch.arange(count) % 2
    stripes = torch.arange(4) % 2 * 3
    rows, columns = stripes[:, None].expand(4, 4), stripes.expand(4, 4)
    return torch.stack([rows, columns])[labels][:, None], labels


def test_fit_trains_it_on_integers_and_labels():
    x, labels = striped(100)
    model = pf.pixelcnn((1, 4, 4), 2, bins=4, **SMALL)
    seen = set()
    hook = model.net.layers[0].register_forward_hook(lambda layer, *_: seen.add(layer.dropout))
    settings = {"batch_size": 30, "lr": 2e-2, "weight_decay": 0.0, "dropout": 0.1, "average": 0}
    history = pf.fit(model, x, labels, max_epochs=40, progress=False, **settings)
    hook.remove()
    assert history.unit == "bits/dim"
    assert history.score < 0.5 < 1.5 < history.val[0]
    assert history.score == pytest.approx(min(history.val))
    assert model.classify(x[:2]).argmax(dim=-1).tolist() == [0, 1]
    assert seen == {0.1}
    assert {layer.dropout for layer in model.net.layers} == {0.0}


def test_fit_takes_bytes_and_one_hot_rows_and_refuses_what_does_not_fit():
    x, labels = striped(20)
    model = pf.pixelcnn((1, 4, 4), 2, bins=4, **SMALL)
    options = {"max_epochs": 1, "progress": False}
    pf.fit(model, x.byte(), torch.eye(2)[labels], **options)
    pf.fit(model, x.numpy(), labels.numpy(), **options)
    before = model.log_prob(x, labels)
    with pytest.raises(ValueError, match="integers"):
        pf.fit(model, x.float() / 3, labels, **options)
    with pytest.raises(ValueError, match="20 rows are outside.*upper_bound=3.*from 2 to 5"):
        pf.fit(model, x + 2, labels, **options)
    with pytest.raises(ValueError, match=r"expected shape \(rows, 1, 4, 4\)"):
        pf.fit(model, x[:, 0], labels, **options)
    with pytest.raises(ValueError, match="labels 0 to 1, got 1 to 2"):
        pf.fit(model, x, labels + 1, **options)
    with pytest.raises(ValueError, match="needs one"):
        pf.fit(model, x, **options)
    assert torch.equal(model.log_prob(x, labels), before)


# With Pyro.


def observe(model, x, labels):
    pyro.module("pixels", model)
    with pyro.plate("images", len(x)):
        pyro.sample("x", model(labels), obs=x)


def test_svi_trains_it_in_a_plate():
    x, labels = striped(16)
    model = pf.pixelcnn((1, 4, 4), 2, bins=4, **SMALL)
    before = model.log_prob(x, labels).mean().item()

    def fit_steps(model, steps):
        svi = SVI(
            lambda x, y: observe(model, x, y),
            lambda x, y: None,
            pyro.optim.Adam({"lr": 1e-2}),
            Trace_ELBO(),
        )
        return [svi.step(x, labels) for _ in range(steps)]

    losses = fit_steps(model, 40)
    assert abs(losses[0] / 16 + before) < 1e-3 * abs(before)
    assert model.log_prob(x, labels).mean() > before / 2
    # The store wins: a second model under the name goes on from there, and is what is trained.
    second = pf.pixelcnn((1, 4, 4), 2, bins=4, **SMALL)
    assert fit_steps(second, 1)[0] < losses[-1] * 1.1
    assert torch.allclose(second.log_prob(x, labels), model.log_prob(x, labels), atol=2.0)
    middle = second.log_prob(x, labels).mean()
    fit_steps(second, 20)
    assert second.log_prob(x, labels).mean() > middle


def test_an_enumerated_class_has_the_posterior_that_classify_gives():
    model = make((1, 2, 2), 3, bins=3).requires_grad_(False)
    x = model.sample((4,), torch.tensor([0, 2])).flatten(0, 1)
    prior = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)

    @config_enumerate
    def images():
        with pyro.plate("images", len(x)):
            label = pyro.sample("label", dist.Categorical(prior))
            pyro.sample("x", model(label), obs=x)

    posterior = TraceEnum_ELBO(max_plate_nesting=1).compute_marginals(images, lambda: None)
    assert torch.allclose(posterior["label"].probs, model.classify(x, prior))


def test_it_draws_in_a_plate():
    model = make(classes=3)
    with pyro.plate("inner", 3), pyro.plate("outer", 2):
        assert pyro.sample("x", model(torch.arange(3))).shape == (2, 3, 1, 4, 5)
        assert pyro.sample("y", make()()).shape == (2, 3, 1, 4, 5)


# Refusals.


def test_images_that_do_not_fit_are_refused():
    model = make(bins=4)
    x = model.sample((2,))
    with pytest.raises(ValueError, match=r"1 of 40 do not fit, the first is 9"):
        model.log_prob(torch.where(torch.arange(40).reshape(x.shape) == 17, 9, x))
    with pytest.raises(ValueError, match=r"integers from 0 to 3.* -1"):
        model.log_prob(-torch.ones(1, 4, 5))
    with pytest.raises(ValueError, match=r"integers from 0 to 3.* 0\.25"):
        model.log_prob(torch.full((1, 4, 5), 0.25))
    with pytest.raises(ValueError, match=r"nan"):
        model.log_prob(torch.full((1, 4, 5), float("nan")))
    with pytest.raises(ValueError, match=r"\(\*batch, 1, 4, 5\), got \(2, 4, 5\)"):
        model.log_prob(x[:, 0])
    with pytest.raises(ValueError, match=r"got \(5,\)"):
        model.log_prob(x[0, 0, 0])
    with pytest.raises(ValueError, match=r"\(2,\) does not go with the distribution's \(3,\)"):
        model().expand((3,)).log_prob(x)


def test_contexts_that_do_not_fit_are_refused():
    model, x = make(classes=3), make().sample((2,))
    with pytest.raises(ValueError, match="labels 0 to 2, got 0 to 3"):
        model.log_prob(x, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="got -1 to 1"):
        model(torch.tensor([-1, 1]))
    with pytest.raises(ValueError, match=r"expected shape \(\*batch, 3\), got \(2, 4\)"):
        model(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="got None"):
        model.sample((2,))
    with pytest.raises(ValueError, match="floating point"):
        model(F.one_hot(torch.tensor([0, 1]), 3))
    for context in (torch.zeros(2, 3), [1, 2]):
        with pytest.raises(ValueError, match="takes none, got one of shape"):
            make()(context)


class CountReads(TorchDispatchMode):
    """How often a tensor's value was asked for: each time a GPU is waited for."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("validate_args", "reads"), [(True, 1), (None, 1), (False, 0)])
def test_labels_are_looked_at_once_and_where_it_was_asked_for(validate_args, reads):
    model, labels = make(classes=3), torch.tensor([[0, 2], [1, 1]])
    with CountReads() as count:
        d = model(labels, validate_args=validate_args)
    assert count.reads == reads
    assert torch.equal(d.context, F.one_hot(labels, 3).to(d.context.dtype))


def test_uses_that_do_not_fit_are_refused():
    model, x = make(classes=3), make().sample((2,))
    known = torch.ones(4, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="no classes"):
        make().classify(x)
    bad = [1.0, 2.0], [0.0] * 3, [1.0, -1.0, 1.0], [math.inf, 1.0, 1.0], [math.nan, 1.0, 1.0]
    for prior in bad:
        with pytest.raises(ValueError, match="prior: expected 3 finite weights"):
            model.classify(x, prior)
    with pytest.raises(ValueError, match="first is 7"):
        model.classify(torch.full((1, 4, 5), 7))
    with pytest.raises(ValueError, match="booleans"):
        model.complete(x, known.float(), torch.tensor(0))
    with pytest.raises(ValueError, match=r"\(3, 5\) does not broadcast"):
        model.complete(x, known[:3], torch.tensor(0))
    with pytest.raises(ValueError, match="first is 7"):
        model.complete(torch.full((1, 4, 5), 7), known, torch.tensor(0))
    with pytest.raises(ValueError, match=r"got \(2, 4, 5\)"):
        model.complete(x[:, 0], known, torch.tensor(0))
    with pytest.raises(ValueError, match=r"\(2,\) .*\(3,\)"):
        model.complete(x, known, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"shape": 28}, "got 28"),
        ({"shape": (28, 28)}, "colours, height, width"),
        ({"shape": (1, 0, 4)}, "got 0"),
        ({"classes": -1}, "classes.* got -1"),
        ({"bins": 1}, "bins.* >= 2, got 1"),
        ({"channels": 0}, "channels.* got 0"),
        ({"layers": 0}, "layers.* got 0"),
        ({"kernel": 1}, "kernel.* got 1"),
        ({"kernel": 4}, "odd number, got 4"),
        ({"mixture": 0}, "mixture.* got 0"),
        ({"mixture": "gaussian"}, "'categorical', got 'gaussian'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        pf.pixelcnn(**{"shape": (1, 4, 4), **arguments})
