"""A student's nets can start as the teacher's, turned around."""

import pytest
import torch

import pyroflows as pf
from pyroflows.distillation.inherit import inherit
from pyroflows.distillation.pairs import Pair, matched
from pyroflows.nets import MADE
from pyroflows.transforms import Additive, Affine, Autoregressive, RationalQuadraticSpline


def pair(family, size, *, hidden=(16, 16), wider=None, context=0, **nets):
    """A teacher's layer with random weights whose parameters are about as large as ``size``."""

    def layer(hidden):
        net = MADE(5, family.params, hidden=hidden, context=context, **nets)
        return Autoregressive(net, family).double()

    teacher, student = layer(hidden), layer(wider or hidden)
    torch.nn.init.normal_(teacher.net.last.weight, std=size)
    torch.nn.init.normal_(teacher.net.last.bias, std=size)
    return Pair(0, teacher, student)


@pytest.mark.parametrize("wider", [(16, 16), (24, 24), (16, 16, 16), (40, 40, 40)])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("context", [0, 2])
def test_a_wider_or_deeper_net_holds_the_teachers(wider, descending, context):
    both = pair(Affine(), 1.0, wider=wider, descending=descending, context=context)
    assert inherit(both)
    x = torch.randn(50, 5, dtype=torch.float64)
    c = torch.randn(50, context, dtype=torch.float64) if context else None
    torch.testing.assert_close(both.student.net(x, c), -both.teacher.net(x, c))


@pytest.mark.parametrize("family", [Additive(), Affine(), RationalQuadraticSpline(bins=4)])
def test_the_error_is_of_second_order(family):
    errors = []
    for size in (1e-2, 1e-3):
        torch.manual_seed(0)
        both = pair(family, size, wider=(24, 24))
        assert inherit(both)
        z = 2 * torch.randn(200, 5, dtype=torch.float64)
        x = both.teacher.inverse_and_log_det(z)[0]
        errors.append((both.student.forward_and_log_det(z)[0] - x).abs().mean().item())
    assert errors[1] < errors[0] / 50


def test_what_does_not_fit_is_left_alone():
    for both in (
        pair(Affine(), 1.0, wider=(12, 12)),
        pair(Affine(), 1.0, wider=(16,)),
        pair(Affine(), 1.0, wider=(16, 16, 24)),
        Pair(0, pair(Affine(), 1.0).teacher, pair(Affine(), 1.0, activation="tanh").student),
        Pair(0, pair(Affine(), 1.0).teacher, pair(Affine(bound=1.0), 1.0).student),
        Pair(0, pair(Affine(), 1.0, context=2).teacher, pair(Affine(), 1.0).student),
    ):
        before = {name: value.clone() for name, value in both.student.state_dict().items()}
        assert not inherit(both)
        after = both.student.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_student_that_inherits_starts_closer():
    torch.manual_seed(0)
    teacher = pf.maf(5, layers=2, hidden=(16, 16))
    for name, parameter in teacher.named_parameters():
        if name.endswith("last.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    x = teacher.sample((1000,))
    student = pf.student_of(teacher)
    inherited = (teacher.log_prob(x) - student.log_prob(x)).mean()
    for each in matched(teacher, student):
        torch.nn.init.zeros_(each.student.net.last.weight)
        torch.nn.init.zeros_(each.student.net.last.bias)
    assert inherited < (teacher.log_prob(x) - student.log_prob(x)).mean() / 4
