"""Which numbers are rows, independent given the globals, is seen by the factors of the density."""

import large_models as models
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf
from pyroflows.structured.structure import by_row, structure_of

GROUP, X, Y = models.grouped_data(100, 5)
BIG_GROUP, _, BIG_Y = models.grouped_data(1000, 2)


def density(model, *args):
    """A model's log-density, and a vector where it can be run."""
    guide = pf.AutoFlow(model, init="init", builder=pf.realnvp, layers=1, hidden=(4,))
    guide.setup(*args)
    return guide.log_density(args, {}), guide.flow.sample((1,))[0]


CASES = {
    "no plates": (models.grouped, (GROUP, X, Y, 100), 5, ((100, 2),)),
    "items and persons": (models.persons, (models.answers(200, 4),), 8, ((200, 1),)),
    "short rows in rows": (models.nested, (GROUP, Y, 100, 50), 4, ((50, 3),)),
    "long rows are global": (models.nested, (BIG_GROUP, BIG_Y, 1000, 10), 14, ((1000, 1),)),
    "vectors": (models.vectors, (GROUP, X, Y, 100), 5, ((100, 2),)),
    "crossed": (models.crossed, (torch.randn(100, 20),), 22, ((100, 1),)),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_found(case):
    model, args, globals_, groups = CASES[case]
    structure = structure_of(*density(model, *args))
    assert len(structure.globals) == globals_
    assert tuple(tuple(group.shape) for group in structure.groups) == groups
    assert structure.order.sort().values.equal(torch.arange(len(structure.order)))


@pytest.mark.parametrize("case", CASES)
def test_a_row_has_the_factors_that_it_is_in(case):
    model, args, *_ = CASES[case]
    log_p, latent = density(model, *args)
    structure = structure_of(log_p, latent)
    rows = structure.groups[0]
    moved = latent.clone()
    moved[rows[3]] += 0.5
    before, after = (by_row(log_p.factors(x), structure) for x in (latent, moved))
    changed = (before != after).nonzero().flatten()
    assert changed.tolist() == [4]  # the globals are number 0
    torch.testing.assert_close(before.sum(), log_p(latent))


def test_rows_of_two_makes_are_two_groups():
    def model():
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        a = pyro.sample("a", dist.Normal(torch.zeros(60), scale).to_event(1))
        b = pyro.sample("b", dist.Normal(torch.zeros(40), scale).to_event(1))
        pyro.sample("y", dist.Normal(a[:40] - b, 1.0).to_event(1), obs=torch.zeros(40))

    structure = structure_of(*density(model))
    assert sorted(tuple(group.shape) for group in structure.groups) == [(20, 1), (40, 2)]


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (models.walk, (torch.randn(60),)),
        (models.crossed, (torch.randn(600, 500),)),
        (lambda: pyro.sample("z", dist.MultivariateNormal(torch.zeros(50), torch.eye(50))), ()),
    ],
    ids=["a walk", "too many globals", "one vector"],
)
def test_what_is_tied_up_has_no_structure(model, args):
    assert structure_of(*density(model, *args)) is None


def test_what_depends_on_a_neighbour_far_out_alone_is_no_structure():
    # Derivatives near the start do not show it; rows moved one half of them do.
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(50), 1.0).to_event(1))
        far = torch.relu(z.roll(1) - 1.2)
        pyro.sample("y", dist.Normal(z + far, 1.0).to_event(1), obs=torch.zeros(50))

    log_p, _ = density(model)
    assert structure_of(log_p, torch.zeros(50)) is None
