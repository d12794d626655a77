"""The networks: what MADE may see, that its sequential evaluation is exact, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.functional import jacobian

import pyroflows as pf
from pyroflows.nets import MADE, MLP, MaskedLinear, masked_linear
from pyroflows.testing import randomize

FLOAT64 = torch.float64
MADES = [
    # features, hidden, context, residual
    (1, (4,), 0, True),
    (1, (4, 4), 3, True),
    (2, (1,), 0, False),
    (3, (2, 2), 0, True),
    (5, (3,), 2, True),
    (5, (16, 16), 0, True),
    (5, (16, 16), 0, False),
    (6, (7, 11, 11), 2, True),
    (9, (4, 4), 0, True),
    (9, (5, 3), 1, False),
    (17, (8, 8, 8), 0, True),
    (26, (40,), 4, False),
]


def made(features, hidden, context, residual, params=2, activation="tanh"):
    net = MADE(
        features, params, hidden=hidden, context=context, residual=residual, activation=activation
    ).to(FLOAT64)
    randomize(net, gain=1.0)
    return net


def context_of(width, rows):
    return torch.randn(rows, width, dtype=FLOAT64) if width else None


@pytest.mark.parametrize(("features", "hidden", "context", "residual"), MADES)
def test_made_sees_only_what_comes_before(features, hidden, context, residual):
    net = made(features, hidden, context, residual)
    c = context_of(context, 1)
    c = None if c is None else c[0]
    matrix = jacobian(lambda x: net(x, c), torch.randn(features, dtype=FLOAT64))
    strictly_before = torch.ones(features, features).tril(-1).bool()
    for parameter in range(2):
        assert (matrix[:, parameter][~strictly_before] == 0).all()


@pytest.mark.parametrize(("features", "hidden", "context", "residual"), MADES)
def test_wide_made_sees_all_that_comes_before(features, hidden, context, residual):
    net = made(features, tuple(64 for _ in hidden), context, residual)
    c = context_of(context, 1)
    c = None if c is None else c[0]
    matrix = jacobian(lambda x: net(x, c), torch.randn(features, dtype=FLOAT64))[:, 0]
    assert (matrix[torch.ones(features, features).tril(-1).bool()] != 0).all()


@pytest.mark.parametrize("features", [1, 2, 5])
def test_every_output_of_made_sees_the_context(features):
    net = made(features, (8, 8), 2, True)
    x = torch.randn(features, dtype=FLOAT64)
    matrix = jacobian(lambda c: net(x, c), torch.randn(2, dtype=FLOAT64))
    assert (matrix.abs().sum(dim=(1, 2)) > 0).all()


def naive_solve(net, step, rows, context):
    x = torch.zeros(rows, net.features, dtype=FLOAT64)
    for i in range(net.features):
        x[:, i] = step(i, net(x, context)[:, i])
    return x, net(x, context)


def check_solve(net, context_width, rows=4):
    y = torch.randn(rows, net.features, dtype=FLOAT64)
    context = context_of(context_width, rows)

    def step(i, theta):
        return y[:, i] * theta[:, 0].tanh().exp() + theta[:, -1]

    x, theta = net.solve(step, y, context)
    with torch.no_grad():
        expected_x, expected_theta = naive_solve(net, step, rows, context)
    torch.testing.assert_close(x, expected_x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(theta, expected_theta, rtol=1e-12, atol=1e-12)
    assert not x.requires_grad
    assert not theta.requires_grad


@pytest.mark.parametrize(("features", "hidden", "context", "residual"), MADES)
def test_solve_is_the_naive_loop(features, hidden, context, residual):
    check_solve(made(features, hidden, context, residual), context)


@settings(max_examples=40, deadline=None)
@given(
    features=st.integers(1, 20),
    hidden=st.lists(st.integers(1, 24), min_size=1, max_size=3),
    context=st.integers(0, 3),
    residual=st.booleans(),
    params=st.integers(1, 3),
    activation=st.sampled_from(["relu", "elu", "silu", "gelu", "tanh"]),
)
def test_solve_is_the_naive_loop_for_any_sizes(
    features, hidden, context, residual, params, activation
):
    net = made(features, tuple(hidden), context, residual, params, activation)
    check_solve(net, context)


def test_solve_takes_no_rows():
    net = made(5, (8, 8), 0, True)
    x, theta = net.solve(lambda i, t: t[:, 0], torch.zeros(0, 5, dtype=FLOAT64))
    assert x.shape == (0, 5)
    assert theta.shape == (0, 5, 2)


@pytest.mark.parametrize(
    "net", [MADE(4, 3, hidden=(8, 8), context=2), MLP(4, 3, context=2)], ids=["MADE", "MLP"]
)
def test_nets_start_at_zero_and_broadcast_the_context(net):
    assert (net(torch.randn(5, 4), torch.randn(5, 2)) == 0).all()
    net = copy.deepcopy(net)
    randomize(net)
    x, c = torch.randn(4), torch.randn(6, 3, 2)
    torch.testing.assert_close(net(x, c), net(x.expand(6, 3, 4), c))


def test_skips_join_equal_widths_only():
    x = torch.randn(6, 3)
    for kind in (lambda **k: MLP(3, 2, **k), lambda **k: MADE(3, 2, **k)):
        for hidden, differs in (((8, 8), True), ((8, 9), False)):
            plain, joined = kind(hidden=hidden, residual=False), kind(hidden=hidden)
            randomize(plain)
            joined.load_state_dict(plain.state_dict())
            assert torch.equal(plain(x), joined(x)) != differs


@pytest.mark.parametrize("hidden", [(), (0,), (-3, 4), 5, (2.5,)])
@pytest.mark.parametrize(
    "kind", [lambda h: MADE(3, 1, hidden=h), lambda h: MLP(3, 1, hidden=h)], ids=["MADE", "MLP"]
)
def test_nets_refuse_widths(kind, hidden):
    with pytest.raises(ValueError, match="hidden: expected a tuple of positive integers"):
        kind(hidden)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: MADE(0, 2), "features"),
        (lambda: MADE(3, 0), "params"),
        (lambda: MADE(3, 2, context=-1), "context"),
        (lambda: MLP(3, True), "outputs"),
        (lambda: pf.nets.ConvNet(3, 4, channels=0), "channels"),
        (lambda: pf.nets.ConvResNet(3, 4, blocks=-1), "blocks"),
        (lambda: pf.nets.CausalConv(5, 2, channels=None), "channels"),
        (lambda: pf.nets.CausalConv(5, 2, dilations=(1, None)), "dilations"),
        (lambda: pf.nets.PixelNet(0), "colours"),
        (lambda: pf.nets.PixelNet(1, kernel=4), "kernel"),
    ],
)
def test_nets_refuse_sizes(make, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        make()


def test_sizes_may_be_numpys_integers():
    flow = pf.maf(np.int64(3), layers=1, hidden=(np.int64(8),))
    assert flow.sample((2,)).shape == (2, 3)
    assert flow.config["arguments"]["hidden"] == (8,)
    assert type(flow.config["arguments"]["hidden"][0]) is int


def test_a_flow_notes_what_it_was_built_from_and_not_what_became_of_that():
    hidden = [8, 8]
    flow = pf.maf(2, layers=1, hidden=hidden)
    hidden.append(4)
    assert flow.config["arguments"]["hidden"] == (8, 8)


def test_only_what_is_marked_is_a_builder(monkeypatch):
    monkeypatch.setattr(pf.flows.spline, "helper", torch.no_grad()(lambda: None), raising=False)
    assert "helper" not in pf.flows.builders()


def test_nets_refuse_unknown_activations():
    for kind in (MADE, MLP):
        with pytest.raises(ValueError, match="activation: expected one of"):
            kind(3, 1, activation="step")


def test_masked_linear_masks():
    layer = MaskedLinear(torch.tensor([[True, False], [False, False]]))
    matrix = jacobian(layer, torch.randn(2))
    assert (matrix != 0).tolist() == [[True, False], [False, False]]
    assert "mask" not in layer.state_dict()


def test_nets_say_what_they_are():
    assert repr(MADE(3, 2, hidden=(8, 8), context=4)) == (
        "MADE(3 -> 3 x 2, hidden=(8, 8), relu, residual, context=4)"
    )
    assert repr(MLP(3, 2, hidden=(8,), activation="elu")) == "MLP(3 -> 8 -> 2, elu)"


# Descending order, solving backwards, and skipped blocks


def descending_made(features=6, hidden=(9, 9), context=2):
    net = MADE(features, 2, hidden=hidden, context=context, activation="tanh", descending=True)
    randomize(net.to(FLOAT64), gain=1.0)
    return net


def test_descending_made_sees_only_what_comes_after():
    net = descending_made()
    c = context_of(2, 1)[0]
    matrix = jacobian(lambda x: net(x, c), torch.randn(6, dtype=FLOAT64))[:, 0]
    after = torch.ones(6, 6).triu(1).bool()
    assert (matrix[~after] == 0).all()
    assert (matrix[after] != 0).any()


@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize(
    ("features", "hidden"), [(1, (4,)), (2, (3, 3)), (7, (12, 12)), (10, (4,))]
)
def test_solves_are_of_the_map_and_its_transpose(features, hidden, descending):
    net = MADE(features, 2, hidden=hidden, context=2, activation="tanh", descending=descending).to(
        FLOAT64
    )
    randomize(net, gain=1.0)
    layer = pf.transforms.Autoregressive(net, pf.transforms.Affine())
    c = context_of(2, 5)
    x = torch.randn(5, features, dtype=FLOAT64)
    y = layer.forward_and_log_det(x, c)[0].detach().requires_grad_()
    back, log_det = layer.inverse_and_log_det(y, c)
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
    row = jacobian(lambda v: layer.forward_and_log_det(v, c[0])[0], x[0])
    grad = torch.randn(features, dtype=FLOAT64)
    (got,) = torch.autograd.grad(back[0] @ grad, y, retain_graph=True)
    torch.testing.assert_close(got[0], torch.linalg.solve(row.mT, grad), rtol=1e-9, atol=1e-9)


def big_made():
    torch.manual_seed(0)
    net = MADE(24, 4, hidden=(512, 512)).to(FLOAT64)
    randomize(net, gain=1.0)
    return net


def dense(net):
    """The same network with no block skipped."""
    twin = copy.deepcopy(net)
    for layer in (*twin.layers, twin.last):
        layer.spans = []
    return twin


def test_skipping_empty_blocks_changes_nothing():
    net = big_made()
    twin = dense(net)
    assert any(layer.spans for layer in net.layers)
    x = torch.randn(3, 5, 24, dtype=FLOAT64, requires_grad=True)
    out, expected = net(x), twin(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), (x, *net.parameters()))
    wanted = torch.autograd.grad((expected * weight).sum(), (x, *twin.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_skipping_empty_blocks_has_second_derivatives():
    net = big_made()
    x = torch.randn(2, 24, dtype=FLOAT64, requires_grad=True)
    results = []
    for model in (net, dense(net)):
        (first,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), model.layers[1].weight)[0])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_only_the_gradients_asked_for_are_computed(monkeypatch):
    layer = MADE(64, 8, hidden=(512,)).last
    assert layer.spans
    called = []
    plain = masked_linear.weight_gradient
    monkeypatch.setattr(masked_linear, "weight_gradient", lambda *a: called.append(0) or plain(*a))
    x = torch.randn(3, 512, requires_grad=True)
    layer.requires_grad_(False)(x).sum().backward()
    assert called == []
    torch.testing.assert_close(x.grad[0], (layer.weight * layer.mask).sum(dim=0))
    layer.bias.requires_grad_()
    layer(x.detach()).sum().backward()
    assert called == []
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 3))
    layer.weight.requires_grad_()
    layer(x.detach()).sum().backward()
    assert called == [0]
    torch.testing.assert_close(layer.weight.grad, x.detach().sum(dim=0) * layer.mask)


def test_dropout_acts_only_while_training():
    net = MADE(3, 1, hidden=(64,)).to(FLOAT64)
    randomize(net, gain=1.0)
    x = torch.randn(4, 3, dtype=FLOAT64)
    plain = net(x)
    net.dropout = 0.5
    assert not torch.equal(net(x), plain)
    assert torch.equal(net.eval()(x), plain)
