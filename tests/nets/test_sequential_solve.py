"""The exact inverse by sequential solves: every size, family, dtype and layout; what is refused."""

import copy
import pickle

import pytest
import torch

import pyroflows as pf
from pyroflows.nets import MADE, CausalConv, made_inverse
from pyroflows.testing import randomize
from pyroflows.transforms import Additive, Affine, Autoregressive, RationalQuadraticSpline

FLOAT64 = torch.float64
FAMILIES = [Additive(), Affine(), RationalQuadraticSpline(bins=4)]
# rows few enough for fixed-point passes over one block and over several, and too many for them
SIZES = [(40, (64, 64), 3), (150, (40,), 2), (40, (12, 12, 9), 1), (40, (64, 64), 2000)]


def layer_of(features, hidden, family=None, dtype=FLOAT64, **options):
    family = family or Affine()
    net = MADE(features, family.params, hidden=hidden, **options)
    layer = Autoregressive(net, family).to(dtype)
    randomize(layer)
    return layer.eval()


def loop(layer, y, context=None):
    """One network call a feature."""
    x = layer.plain_inverse(y, context)
    return x, layer.family.inverse(y, layer.net(x, context))[1].sum(dim=-1)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_inverse_is_the_plain_loop(size, descending, family):
    features, hidden, rows = size
    layer = layer_of(features, hidden, family, context=2, descending=descending)
    y, c = torch.randn(rows, features, dtype=FLOAT64), torch.randn(rows, 2, dtype=FLOAT64)
    for got, expected in zip(
        layer.inverse_and_log_det(y, c), loop(layer, y[:5], c[:5]), strict=True
    ):
        torch.testing.assert_close(got[:5], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_cover_fixed_points_and_single_features(size):
    features, hidden, rows = size
    blocks = made_inverse.fixed_point_blocks(MADE(features, 2, hidden=hidden).plan(), rows)
    assert (blocks is None) == (rows == 2000)
    assert blocks is None or (len(blocks) > 1) == (features > 128)


@torch.no_grad()
def test_single_precision_is_as_close_as_the_loop():
    layer = layer_of(40, (64, 64), dtype=torch.float32)
    for rows in (3, 2000):
        x = torch.randn(rows, 40)
        y = layer(x)
        back = layer.inverse_and_log_det(y)[0]
        plain = loop(layer, y[:3])[0]
        assert (back[:3] - x[:3]).abs().max() < 4 * (plain - x[:3]).abs().max() + 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [4, 2000])
@torch.no_grad()
def test_a_row_that_is_not_finite_leaves_the_others_exact(rows, value):
    layer = layer_of(40, (64, 64))
    y = torch.randn(rows, 40, dtype=FLOAT64)
    clean = layer.inverse_and_log_det(y)
    y[2, 17] = value
    x, log_det = layer.inverse_and_log_det(y)
    others = torch.arange(rows) != 2
    torch.testing.assert_close(x[others], clean[0][others], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det[others], clean[1][others], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x[2, :17], clean[0][2, :17], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_passes_that_do_not_settle_are_solved_feature_by_feature(monkeypatch):
    """A first guess that overflows inside the net, though the solution is small."""
    layer = layer_of(20, (32,))
    layer.net.activation, layer.net.activate = "fourth power", lambda h: h.square().square()
    layer.net.last.weight.mul_(1e-3)
    layer.net.last.bias.fill_(0.0)
    layer.net.last.bias[2 * 3 + 1] = 1e90  # the shift of feature 3
    x = torch.randn(2, 20, dtype=FLOAT64)
    x[:, 4:] = 0.0
    y = layer.forward_and_log_det(x)[0]
    settled = []
    solve = made_inverse._Solve.by_fixed_point
    spy = lambda *a: settled.append(solve(*a)) or settled[-1]  # noqa: E731
    monkeypatch.setattr(made_inverse._Solve, "by_fixed_point", spy)
    got = layer.inverse_and_log_det(y)[0]
    assert settled == [False]
    torch.testing.assert_close(got[:, :3], x[:, :3], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (2, 3)], ids=str)
@pytest.mark.parametrize("features", [1, 2, 20])
def test_any_batch_shape(features, shape):
    layer = layer_of(features, (5, 5))
    y = torch.randn(*shape, features, dtype=FLOAT64, requires_grad=True)
    x, log_det = layer.inverse_and_log_det(y)
    assert (x.shape, log_det.shape) == (y.shape, shape)
    torch.testing.assert_close(layer.forward_and_log_det(x)[0], y, rtol=1e-9, atol=1e-9)
    (x.sum() + log_det.sum()).backward()
    assert y.grad.shape == y.shape


def test_layout_of_the_input_does_not_matter():
    layer = layer_of(20, (16, 16))
    wide = torch.randn(20, 2, 7, dtype=FLOAT64)
    views = (wide[:, 0].mT, wide[:, :1, 0].mT.expand(4, 20), wide.permute(2, 1, 0)[::2].flip(-1))
    for view in views:
        assert not view.is_contiguous()
        for got, expected in zip(
            layer.inverse_and_log_det(view),
            layer.inverse_and_log_det(view.contiguous()),
            strict=True,
        ):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize(
    "size", [(18, 3), (18, 2000), (140, 2)], ids=["one block", "features", "blocks"]
)
def test_gradients_by_the_implicit_function(size, descending):
    """Feature by feature and by fixed points, against autograd through a loop over features."""
    features, rows = size
    layer = layer_of(features, (24, 24), context=2, descending=descending)
    y = torch.randn(rows, features, dtype=FLOAT64, requires_grad=True)
    c = torch.randn(2, dtype=FLOAT64, requires_grad=True)
    sources = [y, c, *layer.parameters()]
    weights = torch.randn(features, dtype=FLOAT64)
    x, log_det = layer.inverse_and_log_det(y, c)
    got = torch.autograd.grad((x @ weights + log_det.square()).sum(), sources)
    found = [torch.zeros_like(y[:, 0])] * features
    for i in reversed(range(features)) if descending else range(features):
        known = torch.stack(found, dim=-1)
        found[i] = layer.family.inverse(y, layer.net(known, c))[0][:, i]
    x = torch.stack(found, dim=-1)
    log_det = layer.family.inverse(y, layer.net(x, c))[1].sum(dim=-1)
    expected = torch.autograd.grad((x @ weights + log_det.square()).sum(), sources)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rows", [4, 2000])
def test_a_gradient_that_is_not_finite_stays_in_its_row(rows):
    layer = layer_of(40, (64, 64))
    y = torch.randn(rows, 40, dtype=FLOAT64, requires_grad=True)
    x = layer.inverse_and_log_det(y)[0]
    sent = torch.randn_like(x)
    clean = torch.autograd.grad(x, y, sent, retain_graph=True)[0]
    sent[2, 17] = float("nan")
    got = torch.autograd.grad(x, y, sent)[0]
    others = torch.arange(rows) != 2
    torch.testing.assert_close(got[others], clean[others], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[2, 18:], clean[2, 18:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
def test_gradcheck_through_the_inverse(family):
    layer = layer_of(4, (7, 7), family, activation="tanh", context=1)
    y = torch.randn(3, 4, dtype=FLOAT64, requires_grad=True)
    c = torch.randn(3, 1, dtype=FLOAT64, requires_grad=True)
    assert torch.autograd.gradcheck(layer.inverse_and_log_det, (y, c))


def test_frozen_parts_get_no_gradient():
    layer = layer_of(5, (8, 8))
    for layer_ in (*layer.net.layers, layer.net.last):
        layer_.weight.requires_grad_(False)
    y = torch.randn(3, 5, dtype=FLOAT64)
    layer.inverse_and_log_det(y)[0].sum().backward()
    assert layer.net.last.bias.grad is not None
    assert layer.net.last.weight.grad is None


@pytest.mark.parametrize("known", [False, True], ids=["solved", "known"])
def test_weights_written_to_before_backward_are_an_error(known):
    layer = layer_of(5, (8, 8))
    y, _, state = layer.forward_with_state(torch.randn(3, 5, dtype=FLOAT64))
    y = y.detach().requires_grad_()
    x, log_det = layer.inverse_from_state(y, state) if known else layer.inverse_and_log_det(y)
    with torch.no_grad():
        layer.net.last.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (x.sum() + log_det.sum()).backward()


@pytest.mark.parametrize("kind", [MADE, CausalConv], ids=lambda k: k.__name__)
def test_inverses_are_in_full_precision_under_autocast(kind):
    layer = Autoregressive(kind(6, 2), Affine())
    randomize(layer)
    y, found = torch.randn(5, 6), []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            x, log_det = layer.inverse_and_log_det(y)
            target = x.sin().sum() + log_det.sum()
            found.append((x, log_det, *torch.autograd.grad(target, list(layer.parameters()))))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_masks_that_cannot_be_solved_through_are_refused(layer):
    net = MADE(4, 2, hidden=(6, 6))
    parts = [*net.layers, net.last]
    parts[layer].mask = parts[layer].mask.flip(0)
    with pytest.raises(ValueError, match=f"units sorted by degree, but in layer {layer}"):
        Autoregressive(net, Affine())


# Weights that were masked once, for as long as they stay


def changed_in_place(flow):
    for p in flow.parameters():
        p.mul_(1.1)


def changed_data(flow):
    for p in flow.parameters():
        p.data.mul_(1.1)
    flow.eval()  # without which it would go unseen, as it does in autograd


def loaded(flow):
    flow.load_state_dict({k: 1.1 * v for k, v in flow.state_dict().items()})


def replaced(flow):
    for module in list(flow.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(1.1 * p.detach()))


def stepped(flow):
    with torch.enable_grad():
        optimiser = torch.optim.AdamW(flow.parameters(), lr=0.1, fused=True)
        sum(p.sum() for p in flow.parameters()).backward()
        optimiser.step()


def moved(flow):
    flow.float()


@pytest.mark.parametrize(
    "change", [changed_in_place, changed_data, loaded, replaced, stepped, moved]
)
@pytest.mark.parametrize("build", [pf.maf, pf.iaf], ids=lambda b: b.__name__)
@torch.no_grad()
def test_masked_weights_are_never_outdated(build, change):
    sizes = {"layers": 2, "hidden": (160, 160)}  # large enough to be kept
    flow = build(5, **sizes, linear="reverse", residual=False).to(FLOAT64).eval()
    randomize(flow)
    x = torch.randn(4, 5, dtype=FLOAT64)
    before = flow.log_prob(x)
    change(flow)
    fresh = build(5, **sizes, linear="reverse", residual=False)
    fresh.to(next(flow.parameters()).dtype).load_state_dict(flow.state_dict())
    x = x.to(next(flow.parameters()).dtype)
    torch.testing.assert_close(flow.log_prob(x), fresh.eval().log_prob(x))
    assert change is moved or not torch.allclose(flow.log_prob(x).double(), before, atol=1e-6)


@torch.no_grad()
def test_kept_weights_are_neither_copied_nor_pickled():
    flow = pf.iaf(5, layers=1, hidden=(160, 160)).eval()
    plain = len(pickle.dumps(flow))
    flow.log_prob(torch.randn(2, 5))
    net = flow.transform.parts[0].net
    assert net._kept
    assert net.layers[1]._kept
    assert not copy.deepcopy(net)._kept
    assert len(pickle.dumps(flow)) == plain
    flow.eval()
    assert not net._kept
    assert not net.layers[1]._kept


def test_scoring_after_inference_mode_has_a_gradient():
    flow = pf.maf(5, layers=1, hidden=(16,)).eval()
    with torch.inference_mode():
        flow.log_prob(torch.randn(2, 5))
        flow.sample((2,))
    x = torch.randn(2, 5, requires_grad=True)
    flow.requires_grad_(False).log_prob(x).sum().backward()
    assert x.grad.isfinite().all()
