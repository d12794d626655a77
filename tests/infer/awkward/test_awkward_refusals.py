"""Models that no guide can serve: their own error or a sentence with the site, never a verdict."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import SEEDS, gaussian, judge
from pyro.nn import PyroModule, PyroSample
from torch.distributions import constraints

import pyroflows as pf

X = torch.linspace(-1.0, 1.0, 8)[:, None] ** torch.arange(1.0, 3.0)
Y = torch.tensor([0.3, -0.2, 0.5, 0.9, 1.1, 1.0, 1.9, 2.6])


def improper():
    loc = pyro.sample("loc", dist.ImproperUniform(constraints.real, (), ()))
    other = pyro.sample("other", dist.ImproperUniform(constraints.real, (), ()))
    pyro.sample("y", dist.Normal(loc - other, 1.0), obs=torch.tensor(1.0))


def improper_scale():
    pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))


def not_a_number():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("likelihood", (z - 1e3).log())


class Sometimes:
    """A model whose second site is there in every third run alone."""

    def __init__(self):
        self.runs = 0

    def __call__(self):
        self.runs += 1
        pyro.sample("always", dist.Normal(0.0, 1.0))
        if self.runs % 3 == 0:
            pyro.sample("sometimes", dist.Normal(0.0, 1.0))


def on_a_branch():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if z > 1:
        pyro.sample("sometimes", dist.Normal(0.0, 1.0))


def counts():
    kind = pyro.sample("kind", dist.Poisson(3.0))
    pyro.sample("y", dist.Normal(kind, 1.0), obs=torch.tensor(2.0))


def broken():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z @ torch.zeros(3), 1.0), obs=torch.tensor(0.0))


def broken_in_its_own_words():
    pyro.sample("z", dist.Normal(0.0, 1.0))
    raise KeyError("no such column")


def wrong_data():
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    pyro.sample("y", dist.Bernoulli(p), obs=torch.tensor(2.0))


CASES = [
    (improper, ValueError, "the posterior is improper along 'loc', 'other'"),
    (improper_scale, ValueError, "the posterior is improper along 'scale'"),
    (not_a_number, ValueError, "invalid values:\nnan"),  # Pyro's, of the factor
    (Sometimes(), ValueError, "site 'sometimes' comes and goes .* always sample every site"),
    (on_a_branch, ValueError, "site 'sometimes' comes and goes .* always sample every site"),
    (counts, ValueError, "site 'kind' is a discrete Poisson without finite support; sum it out"),
    (broken, RuntimeError, "size mismatch|inconsistent tensor size"),
    (broken_in_its_own_words, KeyError, "no such column"),
    (wrong_data, ValueError, "within the support"),
]


@pytest.mark.filterwarnings("ignore:Encountered", "ignore:the model cannot run at many draws")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("model", "error", "said"), CASES, ids=[getattr(m, "__name__", "by_turns") for m, *_ in CASES]
)
def test_an_error_and_no_verdict(model, error, said, seed):
    torch.manual_seed(seed)
    with pytest.raises(error, match=said):
        pf.sample_posterior(model, progress=False)


def regression(network):
    def model():
        mean = network()(X).squeeze(-1)
        with pyro.plate("rows", len(Y)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=Y)

    return model


def sampled_module():
    linear = PyroModule[torch.nn.Linear](2, 1)
    linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
    linear.bias = PyroSample(dist.Normal(0.0, 2.0).expand([1]).to_event(1))
    return lambda: linear


def lifted_module():
    plain = torch.nn.Linear(2, 1)
    priors = {
        "weight": dist.Normal(torch.zeros(1, 2), 1.0).to_event(2),
        "bias": dist.Normal(torch.zeros(1), 2.0).to_event(1),
    }
    return pyro.random_module("linear", plain, priors)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("network", [sampled_module, lifted_module], ids=lambda n: n.__name__)
def test_random_parameters_of_a_module(network, seed):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `random_module` primitive is deprecated")
        model = regression(network())

        def weights_first(draws):
            names = sorted(draws, key=lambda name: "weight" not in name)
            return torch.cat([draws[name].flatten(1) for name in names], dim=1)

        design = torch.cat([X, torch.ones(8, 1)], 1)
        prior = torch.tensor([1.0, 1.0, 4.0]).diag()
        truth = gaussian(torch.zeros(3), prior, design, torch.full((8,), 0.5), Y)
        judge(model, truth, seed, of=weights_first)
