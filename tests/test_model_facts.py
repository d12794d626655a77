"""What the worked models claim to know exactly is so."""

import importlib.util
import math
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample

import pyroflows as pf

MODELS = Path(__file__).parent.parent / "models"


def script(name):
    spec = importlib.util.spec_from_file_location(name, MODELS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def targets():
    return script("vi_targets")


N = 200_000
SITES = [("funnel", "v"), ("funnel", "x"), ("banana", "z0"), ("banana", "z1")]
SITES += [("funana", "z0"), ("funana", "z1"), ("funana", "x")]
HEAVY = {"funnel": "v", "funana": "z1"}  # the site whose exponential is a variance


def weighted_draws(targets, name):
    """Direct draws of a model, with weights that make the sd of a heavy-tailed site exact.

    Half of the draws take the scale's site from N(9, 3) instead of N(0, 3): N(0, 3) tilted by
    exp(v), where most of E exp(v) comes from. Weights are by the mixture of both laws.
    """
    target = targets.TARGETS[name]
    if name not in HEAVY:
        return targets.draws_of(target.model, target.moments, N), torch.ones(N)
    plain, tilted = dist.Normal(0.0, 3.0), dist.Normal(9.0, 3.0)
    v = torch.cat([plain.sample((N // 2,)), tilted.sample((N // 2,))])
    conditioned = poutine.condition(target.model, {HEAVY[name]: v.unsqueeze(-1)})
    draws = targets.draws_of(conditioned, target.moments, N)
    both = torch.stack([plain.log_prob(v), tilted.log_prob(v)]).logsumexp(0) - math.log(2)
    return draws, (plain.log_prob(v) - both).exp()


@pytest.mark.parametrize(("name", "site"), SITES)
def test_exact_moments_agree_with_draws(targets, name, site):
    target = targets.TARGETS[name]
    assert set(target.moments) == {s for n, s in SITES if n == name}
    draws, weights = weighted_draws(targets, name)
    mean, sd = target.moments[site]
    x = draws[site].double()
    w = weights.double().unsqueeze(-1)
    for power, exact in ((1, mean), (2, sd**2 + mean**2)):
        values = (w * x**power).mean(dim=1)
        error = values.std() / N**0.5
        assert error < 0.03 * sd**power
        assert abs(values.mean() - exact) < 4 * error


@pytest.mark.parametrize("name", ["funnel", "banana", "funana"])
def test_nothing_is_observed_so_the_evidence_is_one(targets, name):
    trace = poutine.trace(targets.TARGETS[name].model).get_trace()
    assert trace.observation_nodes == []
    plates = {n for n, s in trace.nodes.items() if s["type"] == "sample" and site_is_subsample(s)}
    assert set(trace.stochastic_nodes) - plates == set(targets.TARGETS[name].moments)
    assert targets.LOG_EVIDENCE == 0


def test_path_of_log_variances_is_the_recursion():
    volatility = script("stochastic_volatility")
    days = 37
    mu, phi, sigma = torch.tensor([[-1.0, 0.5], [0.95, -0.6], [0.3, 1.0]], dtype=torch.float64)
    e = torch.randn(2, days, dtype=torch.float64)
    h = [mu + sigma / (1 - phi**2).sqrt() * e[:, 0]]
    for t in range(1, days):
        h.append(mu + phi * (h[-1] - mu) + sigma * e[:, t])
    torch.testing.assert_close(
        volatility.log_variances(mu, phi, sigma, e), torch.stack(h, dim=-1), rtol=1e-10, atol=1e-10
    )


def test_horseshoe_scales_are_those_of_the_paper():
    model = script("horseshoe_logistic").horseshoe
    x = torch.randn(20, 8)
    nodes = poutine.trace(model).get_trace(x).nodes
    value = {n: nodes[n]["value"] for n in ("alpha", "tau", "slab", "lambda", "z", "beta")}
    free = value["tau"] ** 2 * value["lambda"] ** 2
    scale = (value["slab"] * free / (value["slab"] + free)).sqrt()
    torch.testing.assert_close(value["beta"], value["z"] * scale)
    torch.testing.assert_close(
        nodes["logits"]["value"], value["alpha"] + x @ value["beta"], rtol=1e-4, atol=1e-5
    )


@pytest.fixture(scope="module")
def answers():
    return script("item_response")


def test_answers_follow_ability_less_difficulty(answers):
    y, truth = answers.simulate(6, 4)
    values = {name: value.double() for name, value in truth.items()}
    trace = poutine.trace(poutine.condition(answers.two_parameters, values)).get_trace(y.double())
    by_hand = 0.0
    for i, ability in enumerate(values["theta"]):
        for a, b, right in zip(values["a"], values["b"], y[i], strict=True):
            probability = torch.sigmoid(a * (ability - b))
            by_hand += (probability if right else 1 - probability).log()
    torch.testing.assert_close(trace.log_prob_sum(lambda name, _: name == "y"), by_hand)


def test_people_are_rows_given_the_items(answers):
    y, _ = answers.simulate(450, 4)
    guide = pf.AutoFlow(answers.two_parameters).setup(y)
    assert guide.latent_dim == 458
    assert guide.learned.groups == ((450, 1),)


def test_reference_of_item_response_is_one(answers):
    found = answers.reference_for(torch.zeros(answers.SIZE))
    assert found["rhat"] < 1.01
    assert found["divergences"] == 0
    sizes = [size for moments in found["parameters"].values() for size in moments["ess"]]
    assert len(sizes) == 2 * answers.SIZE[1]
    assert min(sizes) > 400
    assert answers.reference_for(torch.zeros(500, 10)) is None


def test_farthest_mean_is_in_sd_of_the_reference(answers):
    moments = {"mean": [1.0, 2.0, 3.0], "sd": [0.5, 0.1, 0.25]}
    reference = {"parameters": {"a": moments, "b": moments}}
    means = {"a": torch.tensor([1.0, 2.1, 3.0]), "b": torch.tensor([1.5, 2.0, 2.5])}
    assert answers.farthest(means, reference) == "2.000 sd (b of item 3)"
