"""The transforms one by one: families, layers, what they refuse, and torch's own protocol."""

import copy
import gc
import math
import pickle
import weakref

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.optim.clipped_adam import ClippedAdam
from torch import nn
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import ComposeTransform

import pyroflows as pf
from pyroflows.flows import LinearRationalSpline
from pyroflows.nets import MADE, MLP
from pyroflows.testing import check_transform, randomize
from pyroflows.transforms import (
    ActNorm,
    Additive,
    Affine,
    Autoregressive,
    Chain,
    ContextAffine,
    Coupling,
    DiagonalScale,
    Family,
    Inverse,
    LULinear,
    Permute,
    RationalQuadraticSpline,
    Standardize,
    ToSupport,
)

FLOAT64 = torch.float64
FAMILIES = {
    "additive": Additive(),
    "affine": Affine(),
    "affine_loose": Affine(bound=8.0),
    "spline": RationalQuadraticSpline(),
    "spline_small": RationalQuadraticSpline(bins=2, bound=1.5),
    "spline_fine": RationalQuadraticSpline(bins=24, bound=3.0),
    "spline_linear_rational": LinearRationalSpline(bins=5),
}
SPLINES = [family for name, family in FAMILIES.items() if name.startswith("spline")]


def thetas(family, rows, size, seed, dtype=FLOAT64):
    generator = torch.Generator().manual_seed(seed)
    theta = size * torch.randn(rows, family.params, generator=generator, dtype=FLOAT64)
    return theta.to(dtype)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(0.0, 3.0), at=st.floats(-60.0, 60.0))
def test_family_is_an_increasing_bijection(family, seed, size, at):
    theta = thetas(family, 200, size, seed)
    x = torch.linspace(-4, 4, 200, dtype=FLOAT64) + (at if seed % 3 == 0 else 0)
    y, log_derivative = family.forward(x, theta)
    back, log_inverse = family.inverse(y, theta)
    # A flat piece magnifies rounding by one over its slope.
    allowed = 1e-12 + 1e-14 * (1 + x.abs()) * (-log_derivative.clamp(max=0)).exp() ** 2
    assert ((back - x).abs() <= 100 * allowed).all()
    assert log_derivative.isfinite().all()
    assert (log_inverse + log_derivative).abs().max() < 1e-5
    one = theta[:1].expand(200, -1)
    assert (family.forward(x, one)[0].diff() > 0).all()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_family_log_derivative_is_autograds(family, direction):
    theta = thetas(family, 300, 1.0, 0)
    x = torch.linspace(-7, 7, 300, dtype=FLOAT64).requires_grad_()
    value, log_derivative = getattr(family, direction)(x, theta)
    (derivative,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(derivative.log(), log_derivative, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_family_is_the_identity_at_zero(family):
    x = torch.linspace(-7, 7, 101, dtype=FLOAT64)
    for step in (family.forward, family.inverse):
        y, log_derivative = step(x, torch.zeros(101, family.params, dtype=FLOAT64))
        torch.testing.assert_close(y, x, rtol=0, atol=1e-12)
        torch.testing.assert_close(log_derivative, torch.zeros_like(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_family_broadcasts_parameters(family, direction):
    step = getattr(family, direction)
    x, theta = torch.randn(5, 1, 3, dtype=FLOAT64), torch.randn(4, 3, family.params, dtype=FLOAT64)
    wide = step(x.expand(5, 4, 3), theta.expand(5, 4, 3, family.params))
    for got, expected in zip(step(x, theta), wide, strict=True):
        torch.testing.assert_close(got.broadcast_to(expected.shape), expected)


@pytest.mark.parametrize("spline", SPLINES, ids=lambda s: f"bins{s.bins}")
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_spline_is_the_identity_outside(spline, direction):
    edge = spline.bound
    x = torch.tensor(
        [-1e30, -1e3, -edge - 1e-9, -edge, edge, edge + 1e-9, 1e3, 1e30], dtype=FLOAT64
    )
    x.requires_grad_()
    theta = thetas(spline, 8, 3.0, 1).requires_grad_()
    y, log_derivative = getattr(spline, direction)(x, theta)
    assert torch.equal(y, x)
    assert (log_derivative == 0).all()
    for gradient in torch.autograd.grad((y + log_derivative).sum(), (x, theta)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("spline", SPLINES, ids=lambda s: f"bins{s.bins}")
def test_spline_has_slope_one_at_its_edges(spline):
    theta = thetas(spline, 100, 1.0, 2)
    for sign in (-1, 1):
        x = torch.full((100,), sign * (spline.bound - 1e-9), dtype=FLOAT64)
        y, log_derivative = spline.forward(x, theta)
        assert log_derivative.abs().max() < 1e-4
        torch.testing.assert_close(y, x, rtol=0, atol=1e-7)


@pytest.mark.parametrize("spline", SPLINES, ids=lambda s: f"bins{s.bins}")
def test_spline_is_right_at_its_knots(spline):
    theta = thetas(spline, 50, 1.0, 3)
    xs = spline.knots(theta[:, : spline.bins])
    ys = spline.knots(theta[:, spline.bins : 2 * spline.bins])
    slopes = spline.slopes(theta[:, 2 * spline.bins :])
    for k in range(1, spline.bins):
        y, log_derivative = spline.forward(xs[:, k], theta)
        torch.testing.assert_close(y, ys[:, k], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(log_derivative.exp(), slopes[:, k], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_family_survives_large_weights_in_float32(family):
    theta = thetas(family, 2000, 5.0, 4, torch.float32).requires_grad_()
    x = torch.linspace(-20, 20, 2000).requires_grad_()
    y, log_derivative = family.forward(x, theta)
    back, log_inverse = family.inverse(y.detach(), theta)
    for value in (y, log_derivative, back, log_inverse):
        assert value.isfinite().all()
        if not value.requires_grad:
            continue
        for gradient in torch.autograd.grad(
            value.sum(), (x, theta), retain_graph=True, allow_unused=True
        ):
            assert gradient is None or gradient.isfinite().all()
    again = family.forward(back, theta)[0]
    torch.testing.assert_close(again, y, rtol=1e-3, atol=1e-3)


BAD_ARGUMENTS = [
    (lambda: Affine(bound=0.0), "bound: expected a positive number"),
    (lambda: RationalQuadraticSpline(bins=1), "bins: expected an integer >= 2"),
    (lambda: RationalQuadraticSpline(bound=-1.0), "bound: expected a positive number"),
    (lambda: RationalQuadraticSpline(min_bin=3.0), "min_bin: expected a number in"),
    (lambda: RationalQuadraticSpline(min_derivative=1.0), "min_derivative: expected a number in"),
    (lambda: RationalQuadraticSpline(min_derivative=0.0), "min_derivative: expected a positive"),
    (lambda: pf.transforms.ContextAffine(2, 3, bound=math.inf), "bound: expected a positive"),
    (lambda: pf.transforms.ContextAffine(2, 0), "context: expected an integer >= 1"),
    (lambda: pf.transforms.LULinear(0), "features: expected an integer >= 1"),
    (lambda: pf.transforms.Whiten(0), "features: expected an integer >= 1"),
    (lambda: pf.transforms.Standardize(0), "features: expected an integer >= 1"),
    (lambda: pf.transforms.ActNorm(2, dims=0), "dims: expected an integer >= 1"),
    (lambda: pf.transforms.DiagonalScale(2.0), "features: expected an integer >= 1"),
    (lambda: pf.transforms.Conv1x1(True), "channels: expected an integer >= 1"),
    (lambda: pf.transforms.MaskedConv(0), "channels: expected an integer >= 1"),
    (lambda: pf.transforms.MaskedConv(1, iterations=0), "iterations: expected an integer >= 1"),
    (lambda: pf.transforms.MaskedConv(1, tolerance=math.nan), "tolerance: expected a positive"),
    (lambda: pf.Flow(pf.transforms.ContextAffine(2, 3), shape=2), "shape: the transform does not"),
]


@pytest.mark.parametrize(("make", "message"), BAD_ARGUMENTS, ids=[m for _, m in BAD_ARGUMENTS])
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_affine_scale_is_bounded():
    theta = torch.tensor([[1e6, 0.0], [-1e6, 0.0]])
    log_scale = Affine(math.log(5.0)).forward(torch.ones(2), theta)[1]
    torch.testing.assert_close(log_scale, torch.tensor([math.log(5.0), -math.log(5.0)]))


class Cubic(Family):
    """Written by a user: y = x + exp(theta) x^3, whose inverse Newton's method finds."""

    params = 1

    def forward(self, x, theta):
        a = theta[..., 0].exp()
        return x + a * x**3, (1 + 3 * a * x**2).log()

    def inverse(self, y, theta):
        x = y
        for _ in range(100):
            value, log_derivative = self.forward(x, theta)
            x = x - (value - y) / log_derivative.exp()
        return x, -self.forward(x, theta)[1]


def autoregressive(features, context=0, family=None, **kwargs):
    family = family or Affine()
    kwargs = {"hidden": (8, 8), "activation": "tanh"} | kwargs
    layer = Autoregressive(MADE(features, family.params, context=context, **kwargs), family)
    layer = layer.to(FLOAT64)
    randomize(layer)
    return layer


@pytest.mark.parametrize(
    ("transform", "features", "context"),
    [
        (autoregressive(4), 4, 0),
        (autoregressive(1), 1, 0),
        (autoregressive(1, 2), 1, 2),
        (autoregressive(3, 2, RationalQuadraticSpline(bins=4)).inv, 3, 2),
        (autoregressive(3, 0, Additive()), 3, 0),
        (autoregressive(3, 0, Cubic()), 3, 0),
        (autoregressive(12, hidden=(5,)), 12, 0),
        (Coupling(MLP(2, 2, activation="elu"), Affine(), torch.tensor([True, False, True])), 3, 0),
        (Coupling(MLP(1, 2, context=3), Additive(), torch.tensor([False, True, False])), 3, 3),
        (Permute([2, 0, 1]), 3, 0),
        (Permute.random(6, seed=3), 6, 0),
        (LULinear(1), 1, 0),
        (LULinear(5), 5, 0),
        (Standardize(3), 3, 0),
        (ActNorm(3), 3, 0),
        (DiagonalScale(3).inv, 3, 0),
        (ContextAffine(3, 2), 3, 2),
        (Chain([LULinear(3), Chain([ActNorm(3), Permute([1, 0, 2])]).inv]).inv, 3, 0),
        (Chain([]), 3, 0),
        (ToSupport(constraints.positive, 2), 2, 0),
        (ToSupport(constraints.interval(-2.0, 5.0), 3), 3, 0),
        (ToSupport(constraints.greater_than(3.0), 2), 2, 0),
        (ToSupport(constraints.simplex, 4), 3, 0),
        (ToSupport(constraints.real, 2), 2, 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_transform_keeps_the_contract(transform, features, context):
    check_transform(transform, features, context)


def unrolled_inverse(layer, y, context):
    """The inverse feature by feature, with autograd through every pass."""
    features = []
    for i in range(y.shape[-1]):
        known = [*features, *(torch.zeros_like(y[..., 0]) for _ in range(y.shape[-1] - i))]
        theta = layer.net(torch.stack(known, dim=-1), context)
        features.append(layer.family.inverse(y, theta)[0][..., i])
    x = torch.stack(features, dim=-1)
    return x, layer.family.inverse(y, layer.net(x, context))[1].sum(dim=-1)


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize(
    "family",
    [Affine(), RationalQuadraticSpline(bins=4), Additive()],
    ids=lambda f: type(f).__name__,
)
@pytest.mark.parametrize("features", [1, 2, 6])
def test_autoregressive_inverse_has_the_gradient_of_the_unrolled_loop(features, family, context):
    layer = autoregressive(features, context, family)
    y = torch.randn(5, features, dtype=FLOAT64).requires_grad_()
    c = torch.randn(5, context, dtype=FLOAT64).requires_grad_() if context else None
    sources = [y, *layer.parameters(), *([c] if context else [])]
    weights = torch.randn(5, features, dtype=FLOAT64)
    found = []
    for x, log_det in (layer.inverse_and_log_det(y, c), unrolled_inverse(layer, y, c)):
        loss = (x * weights).sum() + log_det.square().sum()
        gradients = torch.autograd.grad(loss, sources, allow_unused=True, materialize_grads=True)
        found.append([x, log_det, *gradients])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_autoregressive_takes_any_callable():
    def net(x, context):
        return torch.nn.functional.pad(x[..., :-1], (1, 0)).sin()[..., None]

    layer = Autoregressive(net, Additive())
    check_transform(layer, 4)
    check_transform(Autoregressive(autoregressive(3).net.forward, Affine()), 3)


def test_a_net_that_offers_half_of_a_solve_is_called_once_a_feature():
    class Half(torch.nn.Module):
        solve = solve_back = None

        def forward(self, x, context=None):
            return torch.nn.functional.pad(x[..., :-1], (1, 0)).sin()[..., None]

    check_transform(Autoregressive(Half(), Additive()), 4)


CASTED = {
    "autoregressive": lambda: Autoregressive(MADE(4, 2, hidden=(8,)), Affine()),
    "coupling": lambda: Coupling(
        MLP(2, 4, hidden=(8,)), Affine(), torch.tensor([True, False, True, False])
    ),
    "image_coupling": lambda: pf.transforms.ImageCoupling(
        pf.nets.ConvNet(2, 4, channels=4), Affine(), torch.tensor([0, 0, 1, 1])[:, None, None]
    ),
    "context_affine": lambda: ContextAffine(4, 4),
}


@pytest.mark.parametrize("name", CASTED)
def test_log_determinants_are_no_half_precision_sums_under_autocast(name):
    layer = CASTED[name]()
    randomize(layer)
    x = torch.randn(5, 4, 2, 2) if name == "image_coupling" else torch.randn(5, 4)
    context = torch.randn(5, 4) if name == "context_affine" else None
    exact = layer.forward_and_log_det(x, context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steps = (layer.forward_and_log_det, layer.inverse_and_log_det)
        found = [step(x, context) for step in steps]
        found.append(layer.forward_with_state(x, context)[:2])
    assert {t.dtype for pair in found for t in pair} == {torch.float32}
    for got, expected in zip(found[0], exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_conv1x1_in_part_frozen_has_the_gradients_of_the_rest():
    layer, x = pf.transforms.Conv1x1(3), torch.randn(2, 3, 4, 4)
    names = ("lower", "upper", "log_diagonal")
    y, log_det = layer.forward_and_log_det(x)
    (y.sin().sum() + log_det.sum()).backward()
    expected = {name: getattr(layer, name).grad for name in names}
    for name in names:
        layer.zero_grad()
        layer.requires_grad_(True).get_parameter(name).requires_grad_(False)
        y, log_det = layer.forward_and_log_det(x)
        (y.sin().sum() + log_det.sum()).backward()
        for other in names:
            got = getattr(layer, other).grad
            assert got is None if other == name else torch.equal(got, expected[other])


def test_coupling_takes_any_callable_and_refuses_masks():
    layer = Coupling(lambda kept, c: kept * c, Additive(), torch.tensor([True, False]))
    y = layer.condition(torch.tensor([3.0]))(torch.tensor([2.0, 1.0]))
    assert y.tolist() == [2.0, 7.0]
    for mask in (torch.ones(3), torch.zeros(3), torch.ones(1), torch.eye(2)):
        with pytest.raises(ValueError, match="mask: expected one dimension"):
            Coupling(lambda kept, c: kept, Additive(), mask)


def test_permute():
    layer = Permute([2, 0, 1])
    assert layer(torch.tensor([10.0, 20.0, 30.0])).tolist() == [30.0, 10.0, 20.0]
    state = torch.get_rng_state()
    assert torch.equal(Permute.random(9, 1).permutation, Permute.random(9, 1).permutation)
    assert not torch.equal(Permute.random(9, 1).permutation, Permute.random(9, 2).permutation)
    assert torch.equal(state, torch.get_rng_state())
    for wrong in ([0, 0, 1], [1, 2, 3], [[0, 1]], [0, -1]):
        with pytest.raises(ValueError, match="permutation: expected each of 0"):
            Permute(wrong)


def test_lu_linear_is_its_matrix():
    layer = LULinear(4).to(FLOAT64)
    randomize(layer)
    lower = layer.lower.tril(-1) + torch.eye(4, dtype=FLOAT64)
    upper = layer.upper.triu(1) + layer.log_diagonal.exp().diag()
    x = torch.randn(7, 4, dtype=FLOAT64)
    torch.testing.assert_close(layer(x), x @ (lower @ upper).T + layer.bias)
    log_det = torch.linalg.slogdet(lower @ upper).logabsdet
    torch.testing.assert_close(layer.forward_and_log_det(x)[1], log_det.expand(7))


def test_lu_linear_solves_many_rows_as_few():
    layer = LULinear(3).to(FLOAT64)
    randomize(layer)
    y = torch.randn(20, 3, dtype=FLOAT64, requires_grad=True)
    together, apart = layer.inv(y), torch.stack([layer.inv(row) for row in y])
    torch.testing.assert_close(together, apart)
    of = [y, *layer.parameters()]
    gradients = zip(
        *(torch.autograd.grad(x.sin().sum(), of) for x in (together, apart)), strict=True
    )
    for got, expected in gradients:
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("inverse", [False, True])
def test_standardize_and_actnorm_set_themselves_from_data(inverse):
    data = 100 + 5 * torch.randn(500, 3, dtype=FLOAT64) * torch.tensor([1.0, 2.0, 3.0])
    for layer in (Standardize(3).to(FLOAT64), ActNorm(3).to(FLOAT64)):
        assert torch.equal(layer(data), data)
        layer = layer if inverse else layer.inv
        z = layer.initialize(data)
        torch.testing.assert_close(z.mean(0), torch.zeros(3, dtype=FLOAT64), rtol=0, atol=1e-9)
        torch.testing.assert_close(z.std(0, correction=0), torch.ones(3, dtype=FLOAT64))
        torch.testing.assert_close(layer(z), data)


def test_actnorm_is_set_once_and_standardize_again():
    for kind, again in ((ActNorm, False), (Standardize, True)):
        layer = kind(2)
        layer.initialize(torch.randn(50, 2))
        before = copy.deepcopy(layer.state_dict())
        fresh = kind(2)
        fresh.load_state_dict(before)
        for one in (layer, fresh):
            one.initialize(5 + 3 * torch.randn(50, 2))
            changed = any(not torch.equal(v, before[k]) for k, v in one.state_dict().items())
            assert changed == again


@pytest.mark.parametrize("kind", [ActNorm, Standardize])
@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(torch.float32, e) for e in (-38, -20, 20, 37)] + [(FLOAT64, e) for e in (-300, -37, 37, 300)],
)
def test_any_unit_is_standardised(kind, dtype, exponent):
    rows = 10.0**exponent * (1 + torch.randn(100, 3, dtype=FLOAT64))
    z = kind(3).to(dtype).initialize(rows.to(dtype))
    assert z.mean(dim=0).abs().max() < 1e-3
    assert (z.std(dim=0, correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("kind", [ActNorm, Standardize])
def test_constant_columns_are_only_centred(kind):
    layer = kind(2)
    data = torch.stack([torch.full((20,), 7.1), torch.randn(20)], dim=1)
    with pytest.warns(UserWarning, match=r"1 of 2 columns are constant \(\[0\]\)"):
        z = layer.initialize(data)
    assert z.isfinite().all()
    assert z[:, 0].abs().max() < 1e-5


def test_chain_initialises_parts_on_what_arrives_there():
    chain = Chain([ActNorm(2), LULinear(2), Standardize(2)]).to(FLOAT64)
    randomize(chain[1])
    data = 3 + torch.randn(300, 2, dtype=FLOAT64)
    z = chain.initialize(data)
    torch.testing.assert_close(z.mean(0), torch.zeros(2, dtype=FLOAT64), rtol=0, atol=1e-9)
    torch.testing.assert_close(z, chain.inv(data))
    with pytest.raises(ValueError, match="parts: expected FlowTransforms, got Linear"):
        Chain([nn.Linear(2, 2)])


def test_what_is_bound_to_a_context_is_set_from_data_too():
    layer = ActNorm(2)
    x = 5 + torch.randn(100, 2)
    z = layer.condition(torch.zeros(100, 3)).initialize(x)
    assert layer.initialized
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(2), rtol=0, atol=1e-5)


def test_the_batch_of_a_context_reaches_the_log_determinant_of_a_chain():
    net = MLP(1, 1, hidden=(4,), context=3)
    shift = Coupling(net, Additive(), torch.tensor([True, False]))
    chain = Chain([DiagonalScale(2), shift])
    for step in (chain.forward_and_log_det, chain.inverse_and_log_det):
        y, log_det = step(torch.ones(2), torch.ones(5, 3))
        assert (y.shape, log_det.shape) == ((5, 2), (5,))


def test_chain_takes_nested_chains_apart_and_keeps_order():
    chain = Chain([Chain([Standardize(2), ActNorm(2)]), Permute([1, 0])])
    assert [type(part) for part in chain] == [Standardize, ActNorm, Permute]
    assert len(chain) == 3
    assert chain[-1] is chain.parts[2]
    assert Chain([autoregressive(2), autoregressive(2).inv]).fast == "neither"
    assert Chain([autoregressive(2), LULinear(2)]).fast == "sample"
    assert Chain([autoregressive(2), LULinear(2)]).inv.fast == "log_prob"
    assert Chain([Permute([1, 0]), autoregressive(2, 0, Additive())]).volume_preserving
    assert not Chain([Permute([1, 0]), LULinear(2)]).volume_preserving


def test_to_support_of_several_pieces():
    support = constraints.cat(
        [constraints.positive, constraints.interval(-1.0, 2.0), constraints.simplex], -1, [2, 1, 3]
    )
    layer = ToSupport(support, 6)
    assert layer.inputs == 5
    z = torch.randn(7, 5, dtype=FLOAT64)
    x, log_det = layer.forward_and_log_det(z)
    assert x.shape == (7, 6)
    assert layer.codomain.check(x).all()
    assert not layer.codomain.check(-x).any()
    torch.testing.assert_close(layer.inv(x), z)
    pieces = [(constraints.positive, z[:, :2]), (constraints.interval(-1.0, 2.0), z[:, 2:3])]
    expected = biject_to(constraints.simplex).log_abs_det_jacobian(z[:, 3:], x[:, 3:])
    for constraint, piece in pieces:
        to = biject_to(constraint)
        expected = expected + to.log_abs_det_jacobian(piece, to(piece)).sum(-1)
    torch.testing.assert_close(log_det, expected)
    torch.testing.assert_close(layer.inverse_and_log_det(x)[1], -expected)
    again = biject_to(layer.codomain)
    torch.testing.assert_close(again(z), x)
    check_transform(
        ToSupport(
            constraints.cat([constraints.positive, constraints.interval(0, 1)], -1, [1, 2]), 3
        ),
        3,
    )


FAR = {
    "real": (constraints.real, [-500.0, 500.0, 3.0]),
    "real_vector": (constraints.real_vector, [-500.0, 500.0, 3.0]),
    "positive": (constraints.positive, [500.0, 1e-30, 3.0]),
    "softplus_positive": (dist.constraints.softplus_positive, [500.0, 1e-30, 3.0]),
    "greater_than": (constraints.greater_than(-500.0), [-499.5, 500.0, 3.0]),
    "interval": (constraints.interval(-500.0, 500.0), [-499.5, 499.5, 3.0]),
    "ordered_vector": (dist.constraints.ordered_vector, [-500.0, 3.0, 500.0]),
    "independent": (constraints.independent(constraints.real, 1), [-500.0, 500.0, 3.0]),
    "stack": (
        constraints.stack([constraints.real, constraints.positive, constraints.real], -1),
        [-500.0, 500.0, 500.0],
    ),
    "cat": (
        constraints.cat([constraints.positive, constraints.real_vector], -1, [1, 2]),
        [1e-30, 500.0, -500.0],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("name", FAR)
def test_to_support_goes_as_far_as_the_data(name, dtype):
    support, y = FAR[name]
    layer, y = ToSupport(support, 3), torch.tensor(y, dtype=dtype)
    x, log_det = layer.inverse_and_log_det(y)
    again, back = layer.forward_and_log_det(x)
    torch.testing.assert_close(again, y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back, -log_det, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["positive", "softplus_positive", "interval", "ordered_vector"])
def test_to_support_stays_inside_for_any_input(name):
    x = torch.tensor([1e4, -1e4, 1e4])
    support = dist.constraints.simplex if name == "interval" else FAR[name][0]
    y, log_det = ToSupport(support, 3 + (name == "interval")).forward_and_log_det(x)
    assert y.isfinite().all()
    assert log_det.isfinite()


def test_a_flow_over_all_vectors_reaches_data_far_out():
    x = 20 * torch.randn(500, 2) + torch.tensor([170.0, 70.0])
    flow = pf.maf(2, layers=1, hidden=(8,), support=constraints.real_vector)
    pf.initialize(flow, x)
    assert (flow.sample((2000,)).mean(dim=0) - x.mean(dim=0)).abs().max() < 5


def test_flow_with_several_supports_is_a_density():
    support = constraints.cat([constraints.positive, constraints.interval(-1.0, 2.0)], -1, [1, 1])
    pf.testing.check_flow(
        lambda: pf.maf(2, layers=1, hidden=(8,), support=support),
        laws=["round_trip", "log_det", "density_integrates_to_one", "draws_are_scored", "state"],
    )


@pytest.mark.parametrize(
    ("support", "message"),
    [
        (constraints.cat([constraints.positive, constraints.real], -1, [1, 1]), "lengths that add"),
        (constraints.cat([constraints.positive, constraints.real], -2, [1, 2]), "last dimension"),
        (constraints.integer_interval(0, 3), "no bijection onto"),
        (constraints.corr_cholesky, "expected a constraint on vectors"),
    ],
)
def test_to_support_refuses(support, message):
    with pytest.raises(ValueError, match=message):
        ToSupport(support, 3)


PROTOCOL = {
    "autoregressive": lambda: autoregressive(3),
    "inverse": lambda: autoregressive(3).inv,
    "chain": lambda: Chain([autoregressive(3), LULinear(3), ActNorm(3).inv]).to(FLOAT64),
    "spline": lambda: autoregressive(3, 0, RationalQuadraticSpline(4)).inv,
    "support": lambda: Chain([autoregressive(3), ToSupport(constraints.positive, 3)]),
}


@pytest.fixture(params=PROTOCOL.values(), ids=PROTOCOL)
def transform(request):
    made = request.param()
    randomize(made)
    return made


def test_inverse_is_a_module_with_the_same_parameters(transform):
    inverse = transform.inv
    assert inverse.inv is transform
    assert transform.inv is inverse
    assert isinstance(inverse, nn.Module)
    assert [id(p) for p in inverse.parameters()] == [id(p) for p in transform.parameters()]
    x = torch.randn(5, 3, dtype=FLOAT64)
    x = transform(x) if isinstance(transform, Inverse) else x
    torch.testing.assert_close(inverse(transform(x)), x)
    copied = copy.deepcopy(inverse)
    assert copied.inv.inv is copied
    assert pickle.loads(pickle.dumps(transform)).inv.inv is not transform


def test_plain_transformed_distribution_scores_right(transform):
    base = dist.Normal(torch.zeros(3, dtype=FLOAT64), 1.0).to_event(1)
    flow = pf.Flow(transform, shape=3).to(FLOAT64)
    x = flow.sample((6,))
    for make in (dist.TransformedDistribution, torch.distributions.TransformedDistribution):
        plain = make(base, [transform])
        found = []
        for log_prob in (plain.log_prob, flow.log_prob):
            value = x.clone().requires_grad_()
            score = log_prob(value)
            sources = [value, *transform.parameters()]
            found.append([score, *torch.autograd.grad(score.sum(), sources)])
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected)
        draw = plain.rsample((4,))
        torch.testing.assert_close(plain.log_prob(draw), flow.log_prob(draw.detach()))


def test_log_det_is_not_stale_after_a_change(transform):
    x = torch.randn(5, 3, dtype=FLOAT64)
    y = transform(x).detach()
    x = transform.inv(y)
    before = transform.log_abs_det_jacobian(x, y)
    torch.testing.assert_close(before, transform.forward_and_log_det(x.clone())[1])
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(0.2)
    y = y if transform.fast == "log_prob" else transform.forward_and_log_det(x)[0]
    after = transform.log_abs_det_jacobian(x, y)
    assert not torch.allclose(before, after)
    if transform.fast == "log_prob":
        torch.testing.assert_close(after, -transform.inverse_and_log_det(y.clone())[1])
    else:
        torch.testing.assert_close(after, transform.forward_and_log_det(x.clone())[1])


def test_log_det_has_a_gradient_when_the_pair_was_made_without():
    layer = autoregressive(3)
    x = torch.randn(5, 3, dtype=FLOAT64)
    with torch.no_grad():
        y = layer(x)
    assert layer.log_abs_det_jacobian(x, y).requires_grad


def test_calls_are_never_answered_from_a_cache(transform):
    x = torch.randn(5, 3, dtype=FLOAT64)
    x = transform.inv(transform(x)).detach().requires_grad_()
    y = transform(x)
    again = transform.inv(y)
    (gradient,) = torch.autograd.grad(again.sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(x))
    assert again is not x


def test_calls_keep_nothing_alive(transform):
    gc.collect()
    gc.disable()
    try:
        y = transform(torch.zeros(5, 3, dtype=FLOAT64))
        reference = weakref.ref(y)
        del y
        assert reference() is None
    finally:
        gc.enable()


def test_copies_after_use(transform):
    x = torch.randn(5, 3, dtype=FLOAT64)
    y = transform(x)
    y.sum().backward()
    transform.log_abs_det_jacobian(x, y)
    for new in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        assert torch.equal(new(x), y)
        with torch.no_grad():
            next(new.parameters()).add_(1.0)
        assert torch.equal(transform(x), y)


def test_inside_torchs_composition(transform):
    x = torch.randn(5, 3, dtype=FLOAT64)
    composed = ComposeTransform([transform], cache_size=1)
    y = composed(x)
    torch.testing.assert_close(y, transform(x))
    expected = transform.forward_and_log_det(x)[1]
    torch.testing.assert_close(composed.log_abs_det_jacobian(x, y), expected)
    torch.testing.assert_close(composed.inv(y), x)
    assert transform.with_cache(1) is transform


def test_conditioned_views():
    layer = autoregressive(3, 2)
    context = torch.randn(4, 2, dtype=FLOAT64)
    view = layer.condition(context)
    assert [id(p) for p in view.parameters()] == [id(p) for p in layer.parameters()]
    x = torch.randn(3, dtype=FLOAT64)
    y = view(x)
    assert y.shape == (4, 3)
    torch.testing.assert_close(y, layer.forward_and_log_det(x.expand(4, 3), context)[0])
    torch.testing.assert_close(view.inv(y), x.expand(4, 3))
    torch.testing.assert_close(
        view.log_abs_det_jacobian(x.expand(4, 3), y), layer.forward_and_log_det(x, context)[1]
    )
    assert "context" not in view.state_dict()
    assert view.fast == layer.fast
    assert layer.inv.condition(context).fast == "log_prob"
    other = layer.condition(context + 1)
    assert not torch.allclose(other(x), y)
    assert torch.equal(view(x), y)


def test_abstract_methods_say_which():
    class Unfinished(pf.FlowTransform):
        pass

    with pytest.raises(NotImplementedError, match="Unfinished.forward_and_log_det"):
        Unfinished()(torch.zeros(2))
    with pytest.raises(NotImplementedError, match="Unfinished.inverse_and_log_det"):
        Unfinished().inv(torch.zeros(2))


def test_tensor_bounds_move_with_the_module():
    support = constraints.interval(torch.zeros(2), torch.ones(2))
    layer = ToSupport(support, 2).to("meta")
    assert layer.support.lower_bound.device.type == "meta"
    assert ToSupport(support, 2).double().support.upper_bound.dtype == torch.float64


def test_one_row_leaves_the_biases_alone():
    flow = pf.maf(3, layers=1, hidden=(8, 8))
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    flow.sample((1,))
    flow.sample()
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())


@pytest.mark.parametrize(
    ("build", "remembers"),
    [(pf.iaf, True), (pf.maf, False), (pf.nsf, False), (pf.realnvp, False)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_draws_without_a_graph_are_remembered_where_that_saves_a_solve(build, remembers):
    d = build(2, layers=1, hidden=(8,))()
    with torch.no_grad():
        x = d.sample((3,))
        assert (d._memo.get(x, d._owner) is not None) == remembers
    y = d.rsample((3,))  # scored from its own graph, not from a second one
    assert d._memo.get(y, d._owner) is not None


def test_optimiser_steps_alone_make_what_is_kept_untrue():
    """Steps that write to ``.data``, as Pyro's own optimisers do, change no version."""
    flow = pf.iaf(2, layers=1, hidden=(8,)).eval()
    d = flow()
    with torch.no_grad():
        x = d.sample((3,))
        before = d.log_prob(x)
    parameters = list(flow.parameters())
    versions = [p._version for p in parameters]
    for p in parameters:
        p.grad = torch.ones_like(p)
    ClippedAdam(parameters, lr=0.1).step()
    assert [p._version for p in parameters] == versions
    with torch.no_grad():
        assert d._memo.get(x, flow) is None
        assert torch.equal(d.log_prob(x), copy.deepcopy(flow).log_prob(x))
        assert not torch.equal(d.log_prob(x), before)


def test_a_draw_without_a_graph_keeps_nothing_but_its_score():
    flow = pf.nsf(3, 2, scheme="autoregressive", fast="sample", layers=2, hidden=(8,))
    q = flow(torch.zeros(50, 2))
    with torch.no_grad():
        x, log_q = q.rsample_and_log_prob()
        assert q._memo.get(x, flow, *q._given()) == (log_q, None)
    x = q.rsample()
    assert q._memo.get(x, flow, *q._given())[1] is not None


def test_a_used_flow_goes_with_its_last_reference():
    gc.collect()
    gc.disable()
    try:
        flow = pf.iaf(2, layers=1, hidden=(8,))
        flow().rsample_and_log_prob((3,))
        reference = weakref.ref(flow)
        del flow
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("depth", [0, 1])
@torch.no_grad()
def test_memory_sees_a_layer_in_anothers_place(depth):
    flow = pf.iaf(2, layers=1, hidden=(8,))
    d = flow()
    x = d.sample()
    assert d._memo.get(x, flow) is not None
    holder, name = [(flow, "transform"), (flow.transform.parts, "0")][depth]
    setattr(holder, name, pf.transforms.LULinear(2))
    assert d._memo.get(x, flow) is None


def test_memory_is_not_kept_for_plain_functions():
    w = torch.ones(())
    layer = pf.transforms.Coupling(
        lambda kept, c: kept * w, pf.transforms.Additive(), torch.tensor([True, False])
    )
    d = pf.Flow(layer, shape=2)()
    x = d.rsample()
    assert len(d._memo) == 0
    w.add_(1.0)
    assert torch.equal(d.log_prob(x), d.log_prob(x.clone()))


def test_base_distribution_follows_its_buffers():
    def make(scale):
        base = torch.distributions.MultivariateNormal(torch.zeros(2), scale * torch.eye(2))
        return pf.maf(2, layers=1, hidden=(8,), base=base)

    a, b = make(1.0), make(9.0)
    x = torch.ones(1, 2)
    assert not torch.allclose(a.log_prob(x), b.log_prob(x))
    a.load_state_dict(b.state_dict())
    assert torch.allclose(a.log_prob(x), b.log_prob(x))


def test_flow_made_in_inference_mode_works_outside():
    with torch.inference_mode():
        flow = pf.maf(2, layers=1, hidden=(8,))
        flow.sample((2,))
    assert flow.sample((2,)).shape == (2, 2)


def test_number_of_draws_may_be_an_integer():
    assert pf.maf(2).sample(5).shape == (5, 2)


def test_a_flow_over_scalars_scores_each_draw():
    class Shift(pf.FlowTransform):
        domain = codomain = constraints.real

        def forward_and_log_det(self, x, context=None):
            return x + 1, torch.zeros_like(x)

        def inverse_and_log_det(self, y, context=None):
            return y - 1, torch.zeros_like(y)

    x = torch.randn(5)
    expected = torch.distributions.Normal(1.0, 1.0).log_prob(x)
    torch.testing.assert_close(pf.Flow(Shift(), shape=()).log_prob(x), expected)


class Mistyped(pf.FlowTransform):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward_and_log_det(self, x, context=None):
        return x * self.weigth, x.sum(dim=-1)  # the mistake

    def inverse_and_log_det(self, y, context=None):
        return y / self.weight, -y.sum(dim=-1)


class Misshapen(Mistyped):
    def forward_and_log_det(self, x, context=None):
        return torch.ones(3) @ x.mT @ torch.ones(7), x.sum(dim=-1)


def test_a_mistake_in_ones_own_transform_comes_out_as_it_is():
    with pytest.raises(AttributeError, match="weigth") as caught:
        pf.Flow(Mistyped(), shape=2)
    assert "forward_and_log_det" in [entry.name for entry in caught.traceback]


def test_events_that_do_not_fit_name_the_line_that_failed():
    with pytest.raises(ValueError, match="does not take events of shape") as caught:
        pf.Flow(Misshapen(), shape=2)
    assert isinstance(caught.value.__cause__, RuntimeError)
