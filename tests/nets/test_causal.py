"""Causal convolutions: what they see, and that solves are exact, linear and differentiable."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.autograd.functional import jacobian
from torch.utils._python_dispatch import TorchDispatchMode

import pyroflows as pf
from pyroflows.nets import CausalConv
from pyroflows.nets.causal import covering_dilations
from pyroflows.testing.cases import randomize
from pyroflows.transforms import Affine, Autoregressive, RationalQuadraticSpline

NETS = {
    "default": {},
    "context": {"context": 3},
    "three_taps": {"kernel": 3, "dilations": (1, 2)},
    "beyond_the_signal": {"kernel": 3, "dilations": (1, 50), "context": 2},
    "no_block": {"dilations": ()},
}


def net_of(features=9, params=2, *, channels=5, dtype=torch.float64, **sizes):
    net = CausalConv(features, params, channels=channels, **sizes).to(dtype).eval()
    randomize(net)
    return net


def points(*batch, features=9, context=0, dtype=torch.float64):
    x = torch.randn(*batch, features, dtype=dtype)
    return x, torch.randn(*batch, context, dtype=dtype) if context else None


def as_function(net):
    """The same network, inverted by one call a step."""
    return lambda x, context: net(x, context)


@pytest.mark.parametrize("sizes", NETS.values(), ids=NETS)
def test_a_step_sees_the_steps_before_it_alone(sizes):
    net = net_of(**sizes)
    x, context = points(context=net.context)
    seen = jacobian(lambda v: net(v, context), x).abs().amax(dim=1)  # (steps, steps)
    assert seen.triu().max() == 0
    if sizes == {}:
        assert seen.tril(-1)[torch.ones(9, 9).tril(-1).bool()].min() > 0


def test_dilations_cover_the_signal_and_no_more():
    for features in (1, 2, 3, 5, 8, 9, 100):
        for kernel in (2, 3):
            reach = [1 + (kernel - 1) * d for d in covering_dilations(features, kernel)]
            field = 1 + sum(r - 1 for r in reach)
            assert field >= features
            assert len(reach) == 1 or field - reach[-1] + 1 < features


def test_the_signal_may_be_longer_than_the_one_learned_from():
    short, long = net_of(8, dilations=(1, 2, 4)), CausalConv(20, 2, channels=5, dilations=(1, 2, 4))
    long.double().load_state_dict(short.state_dict())
    x, _ = points(4, features=20)
    torch.testing.assert_close(long(x)[:, :8], short(x[:, :8]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", NETS.values(), ids=NETS)
@pytest.mark.parametrize("batch", [(), (0,), (1,), (7,), (3, 2)], ids=str)
def test_solve_equals_loop(sizes, batch):
    net = net_of(**sizes)
    y, context = points(*batch, context=net.context)
    with torch.no_grad():
        found = Autoregressive(net, Affine()).inverse_and_log_det(y, context)
        expected = Autoregressive(as_function(net), Affine()).inverse_and_log_det(y, context)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sizes", NETS.values(), ids=NETS)
def test_gradient_of_the_walk_equals_that_of_the_loop(sizes):
    net = net_of(features=6, params=11, **sizes)
    family = RationalQuadraticSpline(bins=4)
    y, context = points(4, features=6, context=net.context)
    given = [y.requires_grad_(), *([] if context is None else [context.requires_grad_()])]
    found = []
    for conditioner in (net, as_function(net)):
        x, log_det = Autoregressive(conditioner, family).inverse_and_log_det(y, context)
        target = (x.sin() * torch.arange(1, 7)).sum() + log_det.square().sum()
        found.append(torch.autograd.grad(target, [*given, *net.parameters()], allow_unused=True))
    assert any(g.abs().max() > 1e-3 for g in found[0][len(given) :])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("sizes", NETS.values(), ids=NETS)
def test_gradcheck_through_the_inverse(sizes):
    net = net_of(features=4, channels=2, **sizes)
    layer = Autoregressive(net, Affine())
    y, context = points(2, features=4, context=net.context)
    inputs = [y, *([] if context is None else [context])]

    def solved(*values):
        given = values[: len(inputs)]
        return layer.inverse_and_log_det(given[0], *given[1:])

    # The weights are leaves of their own: gradcheck moves them in place.
    assert gradcheck(solved, [t.requires_grad_() for t in (*inputs, *net.parameters())])


def test_solves_use_no_dropout():
    """Neither the inverse nor its gradient, as ``MADE``'s do not."""
    layer = Autoregressive(net_of(), Affine())
    y, _ = points(4)
    found = []
    for share in (0.0, 0.5):
        for block in layer.net.train().blocks:
            block.dropout = share
        given = y.clone().requires_grad_()
        x, log_det = layer.inverse_and_log_det(given)
        target = (x.sin().sum() + log_det.sum(), [given, *layer.parameters()])
        found.append(torch.autograd.grad(*target))
    assert all(map(torch.equal, *found))


def test_a_net_without_context_may_be_given_one():
    layer = Autoregressive(net_of(), Affine())
    y, context = points(4, context=2)
    context.requires_grad_()
    x, log_det = layer.inverse_and_log_det(y, context)
    (x.sum() + log_det.sum()).backward()
    assert context.grad is None
    assert layer.net.first.weight.grad.isfinite().all()


def test_contexts_broadcast_and_matter_from_the_first_step():
    net = net_of(context=2)
    x, _ = points(4, 3)
    context = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(net(x, context)[2, 1], net(x[2, 1], context[1]))
    assert (net(x, context)[:, 0, 0] - net(x, context)[:, 1, 0]).abs().min() > 1e-3
    layer = Autoregressive(net, Affine())
    back, _ = layer.inverse_and_log_det(layer.forward_and_log_det(x, context)[0], context)
    torch.testing.assert_close(back, x)


def test_float32():
    net = net_of(features=200, dtype=torch.float32)
    layer = Autoregressive(net, Affine())
    x, _ = points(5, features=200, dtype=torch.float32)
    y, log_det = layer.forward_and_log_det(x)
    back, inverse_log_det = layer.inverse_and_log_det(y)
    assert back.dtype == inverse_log_det.dtype == torch.float32
    torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(-inverse_log_det, log_det, rtol=1e-3, atol=1e-2)


class Multiplications(TorchDispatchMode):
    """How many multiplications matrix products came to."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.strip("_") in ("mm", "addmm"):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def multiplications(call):
    with Multiplications() as counter:
        call()
    return counter.count


@pytest.mark.parametrize("features", [64, 128])
def test_solving_costs_the_arithmetic_of_a_pass(features):
    net = net_of(features, context=2, kernel=3, dilations=(1, 3, 9))
    x, context = points(10, features=features, context=2)
    weights = sum(p.numel() for p in net.parameters() if p.dim() == 2)
    with torch.no_grad():
        one_pass = multiplications(lambda: net(x, context))
        solved = multiplications(lambda: net.solve(lambda t, theta: theta[:, 0], x, context, None))
    assert 0.9 < one_pass / (10 * features * weights) <= 1
    assert solved <= one_pass
    # A pass, its derivative by weights and by input, and the solve.
    back = multiplications(
        lambda: net.solve_back(lambda t, sent, adjoint: adjoint.fill_(1.0), x, context)
    )
    assert back <= 4 * one_pass


def test_a_walk_remembers_the_receptive_field_and_not_the_signal():
    net = net_of(1000, kernel=3, dilations=(1, 2, 4))
    assert [b.remembered(net.features) for b in net.blocks] == [3, 5, 9]
    assert [b.remembered(4) for b in net.blocks] == [3, 4, 4]


@pytest.mark.parametrize("fast", ["log_prob", "sample"])
def test_layers_keep_the_direction_of_time(fast):
    flow = pf.wavenet(6, layers=3, channels=4, fast=fast).double()
    randomize(flow)
    z = torch.randn(6, dtype=torch.float64)
    drawn = jacobian(lambda v: flow.transform.forward_and_log_det(v)[0], z)
    assert drawn.triu(1).abs().max() == 0
    assert drawn.tril(-1).abs().max() > 1e-3


def test_student_of_a_wavenet_samples_in_one_pass():
    teacher = pf.wavenet(12, 2, layers=2, channels=4, kernel=3, bins=5)
    pf.initialize(teacher, 3 + 2 * torch.randn(50, 12), torch.randn(50, 2))
    student = pf.student_of(teacher)
    assert (teacher.fast, student.fast) == ("log_prob", "sample")
    assert student.config == {**teacher.config, "mirrored": 1.5}
    assert torch.equal(student.transform[-1].loc, teacher.transform[-1].loc)
    assert pf.student_of(teacher, layers=3).config["arguments"]["layers"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": 0}, "features: expected an integer >= 1"),
        ({"features": 5, "kernel": 1}, "kernel: expected an integer >= 2"),
        ({"features": 5, "channels": 0}, "channels: expected an integer >= 1"),
        ({"features": 5, "dilations": (1, 0)}, "dilations: expected a tuple of positive"),
        ({"features": 5, "bins": -1}, "bins: expected an integer >= 0"),
        ({"features": 5, "fast": "both"}, "fast: expected one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        pf.wavenet(**arguments)
