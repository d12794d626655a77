"""The density of globals with their rows integrated, and the start it gives."""

import math

import large_models as models
import pyro
import pyro.distributions as dist
import pytest
import torch
from test_structure import density

from pyroflows.structured.laplace import RowLaplace
from pyroflows.structured.start import arrow_start
from pyroflows.structured.structure import structure_of

GROUPS = 40
DATA = (*models.grouped_data(GROUPS, 5), GROUPS)


def laplace_of(model, *args):
    log_p, latent = density(model, *args)
    return RowLaplace(log_p, structure_of(log_p, latent)), latent


def marginal_of_grouped(globals_):
    """What the groups' integral is in closed form, with the Jacobian of the scales."""
    group, x, y, groups = (*DATA[:3], GROUPS)
    mean, scale, noise = globals_[:2], globals_[2:4].exp(), globals_[4].exp()
    total = dist.Normal(0.0, 5.0).log_prob(mean).sum() + globals_[2:].sum()
    total = total + dist.HalfNormal(1.0).log_prob(globals_[2:].exp()).sum()
    for each in range(groups):
        own = group == each
        design = torch.stack([torch.ones(int(own.sum())), x[own]], dim=1)
        covariance = design @ torch.diag(scale**2) @ design.T + noise**2 * torch.eye(len(design))
        total = total + dist.MultivariateNormal(design @ mean, covariance).log_prob(y[own])
    return total


def test_the_integral_of_gaussian_rows_is_exact():
    laplace, latent = laplace_of(models.grouped, *DATA)
    found = laplace.marginal(latent)
    globals_ = latent[laplace.structure.globals].clone().requires_grad_()
    expected = marginal_of_grouped(globals_)
    expected.backward()
    assert found.value == pytest.approx(expected.item(), abs=1e-3)
    torch.testing.assert_close(found.gradient, globals_.grad, rtol=1e-3, atol=1e-2)


def test_the_gradient_follows_modes_and_curvatures():
    def model():
        a = pyro.sample("a", dist.Normal(torch.tensor(0.3), 1.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(30), (0.2 * a).exp()).to_event(1))
        seen = torch.arange(30.0) % 4
        pyro.sample("y", dist.Poisson((a + b).exp()).to_event(1), obs=seen)

    laplace, latent = laplace_of(model)
    laplace.log_p.args = ()
    latent = latent.double()
    found = laplace.marginal(latent)
    step = 1e-2
    ends = []
    for sign in (1, -1):
        there = found.latent.clone()
        there[laplace.structure.globals] += sign * step
        ends.append(laplace.value(there))
    slope = (ends[0] - ends[1]) / (2 * step)
    assert found.gradient.item() == pytest.approx(slope, rel=1e-3, abs=1e-2)
    assert laplace.value(latent) == pytest.approx(found.value, abs=1e-3)


def test_each_row_goes_to_its_own_mode():
    laplace, latent = laplace_of(models.persons, models.answers(100, 5))
    there = laplace.at_modes(latent)
    rows = laplace.rows(there)
    assert max(g.abs().max().item() for g in rows.gradients) < 0.02
    assert there[laplace.structure.globals].equal(latent[laplace.structure.globals])


@pytest.mark.parametrize("far", [0.0, 3.0])
def test_the_start_is_the_posterior_of_gaussian_rows(far):
    log_p, latent = density(models.vectors, *DATA)
    structure = structure_of(log_p, latent)
    arrow = arrow_start(log_p, structure, latent + far)
    reached = RowLaplace(log_p, structure).marginal(
        latent.index_copy(0, structure.globals, arrow.loc)
    )
    assert (arrow.tril.mT @ reached.gradient).norm() < 1  # standard deviations from the mode
    # Rows given globals are Gaussian: their location is linear in the mean.
    torch.testing.assert_close(reached.latent[structure.groups[0]], arrow.rows[0].loc)


def test_globals_that_are_a_hierarchy_do_not_start_in_its_neck():
    group, _, y = models.grouped_data(500, 4)
    log_p, latent = density(models.nested, group, y, 500, 5)
    structure = structure_of(log_p, latent)
    assert len(structure.globals) == 9
    arrow = arrow_start(log_p, structure, latent)
    log_scale = arrow.loc[1].item()
    # Districts have no effect: their scale's density is highest at nothing, its mass above 0.005.
    assert math.log(0.005) < log_scale < 0


def test_a_model_without_a_maximum_has_no_start():
    def model():
        b = pyro.sample("b", dist.Normal(torch.zeros(30), 1.0).to_event(1))
        pyro.factor("up", b**2)

    laplace, latent = laplace_of(
        lambda: pyro.sample("b", dist.Normal(torch.zeros(30), 1.0).to_event(1))
    )
    log_p, _ = density(model)
    assert arrow_start(log_p, laplace.structure, latent) is None
