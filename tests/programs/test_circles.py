"""The chart of a circle by the line: its density, its numerics, and which distributions have it."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyroflows as pf
from pyroflows._pyro.guides import FreeSite
from pyroflows.programs.circles import (
    Circle,
    Unwound,
    circular_mean,
    is_angle,
    log_window,
    turned,
    wound,
)
from pyroflows.programs.supports import bijection

CENTERS = [0.0, 1.5, math.pi, -3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_angles_end_up_inside_and_are_the_same(dtype):
    ends = torch.tensor([-3.0, -1.0, 1.0, 3.0, 5.0], dtype=dtype) * math.pi
    near = torch.stack([ends, ends.nextafter(ends - 1), ends.nextafter(ends + 1)]).flatten()
    angle = torch.cat([near, torch.linspace(-40, 40, 1001, dtype=dtype)])
    found = wound(angle)
    assert found.dtype == dtype
    assert (found >= -math.pi).all()
    assert (found < math.pi).all()
    torch.testing.assert_close(found.cos(), angle.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.sin(), angle.sin(), atol=1e-5, rtol=0)


def test_an_angle_inside_stays_to_the_last_bit():
    angle = torch.linspace(-3.14, 3.14, 1001)
    assert torch.equal(wound(angle), angle)


def test_shares_of_the_same_angle_sum_to_one():
    z = torch.linspace(-4, 4, 801, dtype=torch.float64)
    total = sum(log_window(z + 2 * math.pi * k).exp() for k in range(-4, 5))
    torch.testing.assert_close(total, torch.ones_like(z), atol=1e-14, rtol=0)


def test_the_share_has_its_first_and_second_derivatives():
    z = torch.linspace(-20, 20, 41, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_window, z)
    assert torch.autograd.gradgradcheck(log_window, z)


@pytest.mark.parametrize("center", CENTERS)
def test_the_chart_has_its_first_and_second_derivatives(center):
    chart = Unwound(torch.tensor(center, dtype=torch.float64))
    z = torch.linspace(-20, 20.5, 41, dtype=torch.float64, requires_grad=True)  # not on the seam
    assert torch.autograd.gradcheck(chart, z)
    assert torch.autograd.gradgradcheck(lambda z: chart(z).cos(), z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_far_out_all_is_finite(dtype):
    far = torch.logspace(-3, 8, 200, dtype=dtype)
    z = torch.cat([-far, far]).requires_grad_()
    value = log_window(z)
    (slope,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), z)
    for found in (value, slope, bend, Unwound(torch.tensor(1.0))(z)):
        assert found.isfinite().all()
    assert (value <= 0).all()
    assert (bend <= 1e-6).all()
    assert (slope.detach() * z.detach() <= 1e-6).all()


def test_derivatives_of_many_at_once_are_those_alone():
    z = torch.linspace(-9, 9, 25)
    bend = torch.func.grad(torch.func.grad(log_window))
    alone = torch.stack([bend(value) for value in z])
    torch.testing.assert_close(torch.func.vmap(bend)(z), alone)


@pytest.mark.parametrize("center", CENTERS)
def test_a_density_on_the_line_has_the_mass_of_that_on_the_circle(center):
    chart, fn = (
        Unwound(torch.tensor(center).double()),
        dist.VonMises(2.0, torch.tensor(0.7).double()),
    )
    z = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    theta = chart(z)
    log_p = fn.log_prob(theta) + chart.log_abs_det_jacobian(z, theta)
    mass = torch.trapezoid(log_p.exp(), z)
    resultant = torch.trapezoid(log_p.exp() * (theta - 2).cos(), z)
    assert mass.item() == pytest.approx(1, abs=1e-6)
    assert resultant.item() == pytest.approx(1 - fn.variance.item(), abs=1e-6)


@pytest.mark.parametrize("center", CENTERS)
def test_the_inverse_is_the_number_of_the_middle_turn(center):
    chart = Unwound(torch.tensor(center))
    theta = torch.linspace(-3.1, 3.1, 101)
    z = chart.inv(theta)
    assert (z.abs() <= math.pi).all()
    torch.testing.assert_close(chart(z), theta, atol=1e-5, rtol=0)


def test_a_circle_of_several_angles_has_its_chart():
    support = constraints.independent(Circle(torch.tensor([0.0, 3.0])), 1)
    chart = bijection(support)
    z = torch.tensor([[0.5, 0.5], [4.0, 0.0]])
    theta = chart(z)
    torch.testing.assert_close(theta[0], torch.tensor([0.5, 3.5 - 2 * math.pi]))
    assert support.check(theta).all()
    assert not Circle(0.0).check(torch.tensor(3.3))
    assert chart.log_abs_det_jacobian(z, theta).shape == (2,)


def test_no_flow_over_data_takes_a_circle_for_its_support():
    with pytest.raises(ValueError, match="no bijection onto|with room"):
        pf.nice(2, support=Circle(0.0))


SKEWED = dist.SineSkewed(dist.VonMises(torch.zeros(1), 1.0).to_event(1), torch.tensor([0.5]))
MIXED = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.VonMises(torch.ones(2), 1.0))


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (dist.VonMises(0.0, 1.0), True),
        (dist.VonMises(torch.zeros(3), 1.0).to_event(1), True),
        (dist.VonMises(torch.zeros(3), 1.0).mask(False), True),
        (dist.VonMises(0.0, 1.0).expand_by([2]).to_event(1).mask(True), True),
        (SKEWED, True),
        (MIXED, True),
        (dist.Normal(0.0, 1.0), False),
        (dist.Uniform(-math.pi, math.pi), False),
        (dist.ProjectedNormal(torch.ones(2)), False),
    ],
    ids=[
        "plain", "event", "masked", "expanded", "skewed", "mixture", "normal", "uniform", "sphere",
    ],
)  # fmt: skip
def test_which_distributions_are_of_angles(fn, expected):
    assert is_angle(fn) is expected


def test_the_mean_of_angles_about_the_seam_is_there():
    angle = torch.tensor([3.0, -3.0, 3.1, -3.1])
    assert circular_mean(angle).abs().item() == pytest.approx(math.pi, abs=1e-5)
    weighted = circular_mean(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert weighted.item() == pytest.approx(1.0)


def test_the_seam_goes_where_draws_are_rarest():
    support = constraints.independent(Circle(torch.tensor([1.0, 0.0])), 1)
    plain = FreeSite("plain", torch.Size([]), constraints.real)
    sites = (plain, FreeSite("z", torch.Size([2]), support))
    modes = torch.tensor([0.0, math.pi]).repeat(200)  # two opposite ones
    noise = 0.1 * torch.randn(400, 3)
    draws = noise + torch.stack([modes, torch.full((400,), 2.5), modes], dim=1)
    (same, moved), shift = turned(sites, draws)
    assert same is plain
    assert shift[0] == 0
    assert shift[1].item() == pytest.approx(2.5, abs=0.15)
    assert abs(shift[2].item()) == pytest.approx(math.pi / 2, abs=0.15)
    center = moved.support.base_constraint.center
    torch.testing.assert_close(center, wound(torch.tensor([1.0, 0.0]) + shift[1:]))


def test_a_middle_that_is_a_little_off_stays():
    site = FreeSite("z", torch.Size([]), Circle(torch.tensor(1.0)))
    (found,), shift = turned((site,), 0.2 + 0.3 * torch.randn(400, 1))
    assert not shift.any()
    assert found.support.center == 1.0
