"""Guides of models with many latent numbers: set up, trained, judged, saved."""

import math
import resource

import large_models as models
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf
from pyroflows.structured.integrated import POINTS, integrated_draws
from pyroflows.structured.structure import structure_of
from pyroflows.structured.walk import share_beyond_of_globals

GROUPS = 210
DATA = (*models.grouped_data(GROUPS, 6), GROUPS)


def noisy(y):
    """Numbers seen with noise: the evidence is known."""
    z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)


def guide_of(model, *args):
    return pf.AutoFlow(model, hidden=(16,), layers=2).setup(*args)


def test_the_guide_has_the_models_structure():
    assert guide_of(models.grouped, *DATA).learned.groups == ((GROUPS, 2),)


def test_a_small_model_has_a_flow_of_all_numbers():
    guide = guide_of(models.grouped, *models.grouped_data(20, 5), 20)
    assert not guide.structured


def test_a_flow_that_is_asked_for_is_of_all_numbers():
    data = (*models.grouped_data(40, 5), 40)
    guide = pf.AutoFlow(models.grouped, family="spline", layers=1, hidden=(8,)).setup(*data)
    assert not guide.structured


def test_the_start_is_close_to_the_evidence():
    guide = guide_of(models.grouped, *DATA)
    found = pf.report(models.grouped, guide, *DATA, num_samples=500)
    assert found.elbo > found.evidence - 0.3
    assert found.trusted


def test_rows_are_integrated_without_bias():
    y = torch.randn(450)
    guide = guide_of(noisy, y)
    with torch.no_grad():  # a guide that is off in every row
        guide.flow.transform[0].row_loc[0].add_(0.5)
        guide.flow.transform[0].row_log_scale[0].add_(0.3)
    found = pf.report(noisy, guide, y, num_samples=400)
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(y).sum().item()
    assert found.evidence == pytest.approx(exact, abs=0.05)
    assert found.weighted.rows == 450
    assert "rows      450, each integrated" in str(found)
    # The plain weights of so many rows say nothing.
    assert (
        pf.khat(pf.importance_weights(noisy, guide, y, vectorize=False, num_samples=200).log_weight)
        > 1
    )


def test_weights_within_rows_mend_their_draws():
    y = torch.randn(450)
    guide = guide_of(noisy, y)
    with torch.no_grad():
        guide.flow.transform[0].row_loc[0].add_(0.5)
    found = pf.report(noisy, guide, y, num_samples=400)
    off = (found.draws["z"].mean(0) - y / 2) / math.sqrt(0.5)
    assert off.mean().abs() < 0.02
    assert found.largest_shift == pytest.approx(0.5, abs=0.15)
    assert not found.good


def test_points_of_a_row_integrate_it_far_better_than_as_many_at_random():
    y = torch.randn(450)
    guide = guide_of(noisy, y)
    with torch.no_grad():
        guide.flow.transform[0].row_loc[0].add_(0.3)
    log_p = guide.log_density((y,), {})
    structure = structure_of(log_p, guide.flow.sample((1,))[0])
    found = integrated_draws(log_p, guide.flow, structure, 100)
    spread = (found.log_p - found.log_q).std().item()
    # Of one point a row log-weights have a variance of 450 times 0.09.
    assert spread < 0.5 * math.sqrt(450 * 0.09 / POINTS)


def test_chains_walk_into_a_tail_that_the_guide_does_not_draw():
    # Slopes that hardly differ: their scale may be nothing, and its logarithm anything below.
    group, x, y = models.grouped_data(GROUPS, 6, slopes=0.0)
    guide = guide_of(models.grouped, group, x, y, GROUPS)
    log_p = guide.log_density((group, x, y, GROUPS), {})
    structure = structure_of(log_p, guide.flow.sample((1,))[0])
    share, points = share_beyond_of_globals(log_p, guide.flow, structure)
    assert share > 0.05
    assert points[:, 3].mean() < guide.whiten.loc[3] - guide.whiten.tril[3, 3]
    found = pf.report(models.grouped, guide, group, x, y, GROUPS, num_samples=300)
    assert not found.trusted
    if found.beyond:
        assert "near scale, number 1" in found.verdict


def test_no_chain_leaves_a_guide_that_covers_all():
    guide = guide_of(models.grouped, *DATA)
    log_p = guide.log_density(DATA, {})
    structure = structure_of(log_p, guide.flow.sample((1,))[0])
    assert share_beyond_of_globals(log_p, guide.flow, structure) is None


def test_it_trains():
    guide = guide_of(models.persons, y := models.answers(400, 6))
    history = pf.fit_guide(models.persons, guide, y, max_steps=300, progress=False)
    assert history.score > history.val[0] + 0.5
    found = pf.report(models.persons, guide, y, num_samples=400)
    assert found.ess > 200


def test_it_is_saved_and_loaded(tmp_path):
    guide = guide_of(models.grouped, *DATA)
    pf.save(guide, tmp_path / "guide")
    loaded = pf.load(tmp_path / "guide", model=models.grouped)
    assert loaded.learned.groups == guide.learned.groups
    torch.manual_seed(1)
    expected = guide.sample_posterior(3)
    torch.manual_seed(1)
    torch.testing.assert_close(loaded.sample_posterior(3), expected)
    assert pf.report(models.grouped, loaded, *DATA, num_samples=300).weighted.rows == GROUPS


def test_a_walk_of_thousands_of_steps_is_judged_as_it_is():
    y = torch.randn(4200, generator=torch.Generator().manual_seed(0))
    guide = guide_of(models.walk, y)
    assert guide.learned.groups == ((4201, 1),)  # each number on its own
    found = pf.report(models.walk, guide, y, num_samples=200)
    assert not found.trusted
    assert not found.weighted.rows


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fit_guide")  # twenty steps gain nothing on such a start
def test_memory_grows_with_the_latent_numbers_and_no_faster():
    y = models.answers(100_000, 10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    guide = pf.AutoFlow(models.persons)
    pf.fit_guide(models.persons, guide, y, max_steps=20, progress=False)
    found = pf.report(models.persons, guide, y, num_samples=20)
    assert found.weighted.rows == 100_000
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"100,020 latent numbers: {grown:.0f} MiB more")
    assert grown < 4000
