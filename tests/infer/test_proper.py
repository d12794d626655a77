"""A posterior without an end is refused before anything is trained."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyroflows as pf


def flat(name, support=constraints.real):
    return pyro.sample(name, dist.ImproperUniform(support, (), ()))


def unused():
    flat("z")
    pyro.sample("w", dist.Normal(0.0, 1.0))


def only_a_sum():
    loc = flat("a") + flat("b")
    pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))


def separable():
    logits = flat("b") * torch.tensor([-1.0, 1.0])
    pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=torch.tensor([0.0, 1.0]))


def flat_scale_of_one_row():
    pyro.sample("y", dist.Normal(0.0, flat("s", constraints.positive)), obs=torch.tensor(1.0))


def scale_that_nothing_holds():
    flat("s", constraints.positive)  # without curvature, and without a Gaussian to start from


def wide():
    pyro.sample("z", dist.Normal(0.0, 1e6))


def heavy():
    pyro.sample("z", dist.Cauchy(0.0, 1.0))
    pyro.sample("s", dist.HalfCauchy(1.0))


def wide_logarithm():
    pyro.sample("s", dist.LogNormal(0.0, 10.0))


def flat_with_data():
    loc, scale = flat("b"), flat("s", constraints.positive)
    y = torch.linspace(-1, 1, 10)
    pyro.sample("y", dist.Normal(loc, scale).expand([10]).to_event(1), obs=y)


def horseshoe():
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    lam = pyro.sample("lam", dist.HalfCauchy(torch.ones(5)).to_event(1))
    b = pyro.sample("b", dist.Normal(torch.zeros(5), tau * lam).to_event(1))
    pyro.sample("y", dist.Normal(b, 1.0).to_event(1), obs=torch.ones(5))


def centred():
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    pyro.sample("z", dist.Normal(torch.zeros(8), scale).to_event(1))


def bounded():
    pyro.sample("p", dist.Beta(0.5, 0.5))
    pyro.sample("q", dist.Dirichlet(torch.ones(3)))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (unused, "'z'"),
        (only_a_sum, "'a', 'b'"),
        (separable, "'b'"),
        (flat_scale_of_one_row, "'s'"),
        (scale_that_nothing_holds, "'s'"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_improper_posterior_is_refused_by_its_sites(model, names):
    with pytest.raises(
        ValueError, match=f"the posterior is improper along {names}: .* proper prior"
    ):
        pf.AutoFlow(model).setup()


@pytest.mark.parametrize(
    "model",
    [wide, heavy, wide_logarithm, flat_with_data, horseshoe, centred, bounded],
    ids=lambda model: model.__name__,
)
def test_a_proper_one_is_not(model):
    assert pf.AutoFlow(model, layers=1, hidden=(8,)).setup().learned is not None
