"""Ports without reference draws: Stan's density, Stan's constraints, and references that fit."""

import os
import re
from dataclasses import replace
from pathlib import Path

import data as posteriordb
import groups
import pyro
import pyro.distributions as dist
import pytest
import radon
import reference
import run
import torch
from compare import compare, latent_sites, log_joint, random_latents
from ports import WITHOUT_DRAWS, load
from pyro import poutine

pytestmark = pytest.mark.integration
VARIABLE = "PYROFLOWS_DATA"
REFERENCES = posteriordb.references()
ONE_OF_EACH = list({name.rsplit("-", 1)[-1]: name for name in reversed(WITHOUT_DRAWS)}.values())


@pytest.fixture
def folder():
    """The folder of posteriordb; skips without it."""
    named = os.environ.get(VARIABLE)
    if not named or not (Path(named) / posteriordb.ROOT).is_dir():
        pytest.skip(f"{VARIABLE} names no folder that holds posteriordb")
    return Path(named) / posteriordb.ROOT


@pytest.mark.parametrize("name", WITHOUT_DRAWS)
def test_port_has_the_density_of_stans_code(name, folder):
    torch.manual_seed(0)
    assert compare(name, *load(name), points=3).passes


def with_a_wider_prior(port):
    def pooled(data):
        zero = data["log_radon"].new_zeros(())
        alpha = pyro.sample("alpha", dist.Normal(zero, 10.5))
        beta = pyro.sample("beta", dist.Normal(zero, 10.0))
        radon._observe(data, alpha + beta * data["floor_measure"])

    return replace(port, model=pooled)


def with_a_wrong_index(port):
    return replace(port, prepare=lambda d: {**port.prepare(d), "rat": d["rat"].long() % 30})


def with_a_wrong_scale(port):
    return replace(port, model=lambda data: groups.seeds({**data, "x1": 1.001 * data["x1"]}))


@pytest.mark.parametrize(
    ("name", "break_it"),
    [
        ("radon_mn-radon_pooled", with_a_wider_prior),
        ("rats_data-rats_model", with_a_wrong_index),
        ("seeds_data-seeds_model", with_a_wrong_scale),
    ],
)
def test_a_wrong_port_fails(name, break_it, folder):
    torch.manual_seed(0)
    port = break_it(WITHOUT_DRAWS[name])
    assert not compare(name, port, port.prepare(posteriordb.load_data(name))).passes


DECLARATION = re.compile(
    r"^(?:array\[.+?\] )?(\w+)(?:<(.+?)>)?(?:\[.+\])? (\w+);", flags=re.MULTILINE
)
KINDS = {
    "simplex": "simplex",
    "cholesky_factor_corr": "corrcholesky",
    "ordered": "ordered",
    "positive_ordered": "positiveordered",
}
NARROWER = {  # where the density ends before the declared bounds do
    ("GLMM_Poisson_model", "beta2"): (-10.0, 10.0),
    ("dogs_log", "beta"): (-100.0, 100.0),
}


def declared(folder, name):
    """Stan's parameters with their kind and bounds."""
    text = (folder / "models" / "stan" / f"{name}.stan").read_text()
    text = re.sub(r"//.*", "", text)
    block = re.search(r"^parameters \{(.*?)^\}", text, flags=re.DOTALL | re.MULTILINE).group(1)
    lines = "\n".join(" ".join(line.split()) for line in block.splitlines())
    found = {}
    for kind, limits, parameter in DECLARATION.findall(lines):
        bounds = dict(part.split("=") for part in limits.replace(" ", "").split(",") if part)
        low, high = (bounds.get(side) for side in ("lower", "upper"))
        found[parameter] = (kind, low, high)
    return found


def bounds_of(support):
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return (
        type(support).__name__.strip("_").lower(),
        *(getattr(support, f"{side}_bound", None) for side in ("lower", "upper")),
    )


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_latent_sites_are_stans_parameters_with_their_constraints(name, folder):
    port, data = load(name)
    stan = name.rsplit("-", 1)[-1]
    wanted = declared(folder, stan)
    sites = latent_sites(port.model, data)
    assert sorted(sites) == sorted(wanted)
    for parameter, (kind, low, high) in wanted.items():
        found, lower, upper = bounds_of(sites[parameter]["fn"].support)
        if (stan, parameter) in NARROWER:
            low, high = NARROWER[stan, parameter]
        if kind in ("real", "vector", "matrix"):
            for bound, limit in ((lower, low), (upper, high)):
                if limit is not None and re.fullmatch(r"[-\d.]+", str(limit)):
                    extreme = torch.as_tensor(bound)
                    assert float(limit) in (extreme.min().item(), extreme.max().item())
                elif limit is None:
                    assert bound is None
        else:
            assert found.removesuffix("vector") == KINDS[kind]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_draws_at_once_are_each_alone(name, folder):
    port, data = load(name)
    values, _ = random_latents(port.model, data, 3)
    values = {key: value.requires_grad_() for key, value in values.items()}
    together = log_joint(port.model, data, values)
    assert together.shape == (3,)
    gradients = torch.autograd.grad(together.sum(), list(values.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    first = {key: value[0] for key, value in values.items()}
    alone = poutine.trace(poutine.condition(port.model, data=first)).get_trace(data).log_prob_sum()
    torch.testing.assert_close(together[0], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({"rhat": 1.02}, "R-hat 1.020"),
        ({"ess": 400}, "ESS 400"),
        ({"divergences": 5}, "0.1% of the draws diverge"),
        ({"rhat": 1.5, "ess": 7}, "R-hat 1.500, ESS 7"),
    ],
)
def test_a_run_is_no_reference_that(changed, reason):
    line = {"rhat": 1.009, "ess": 401, "chains": 4, "draws": 1000, "divergences": 4}
    assert reference.why_not({**line, **changed}) == reason


def test_table_has_a_row_a_reference(capsys):
    reference.main(reference.parse(["--table"]))
    assert len(capsys.readouterr().out.splitlines()) == len(REFERENCES) + 2


def test_references_are_of_ports_without_draws_and_good():
    assert set(REFERENCES) <= set(WITHOUT_DRAWS)
    for name, line in REFERENCES.items():
        assert ("parameters" not in line) == bool(reference.why_not(line)), name
        assert line.get("no_reference", "") == reference.why_not(line), name


@pytest.mark.parametrize("name", [name for name in REFERENCES if "parameters" in REFERENCES[name]])
def test_reference_has_the_ports_parameters(name, folder):
    port, data = load(name)
    values, _ = random_latents(port.model, data, 2)
    found = port.parameters_of(values, data)
    assert {key: value.shape[1:] for key, value in found.items()} == {
        key: mean.shape for key, (mean, _) in posteriordb.moments(name).items()
    }


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        (name, name.replace("_noncentered", "_centered"))
        for name in WITHOUT_DRAWS
        if name.endswith("_noncentered")
    ],
)
def test_centred_or_not_a_posterior_has_one_reference(name, twin, folder):
    assert WITHOUT_DRAWS[name].parameters == WITHOUT_DRAWS[twin].parameters
    ours, theirs = posteriordb.moments(name), posteriordb.moments(twin)
    assert (ours is None) == (theirs is None)
    for key in ours or {}:
        apart = (ours[key][0] - theirs[key][0]) / theirs[key][1]
        assert apart.abs().max() < 0.2  # each mean errs by 0.05 sd at 400 effective draws


def test_eight_schools_centred_have_the_reference_draws_of_the_others(folder):
    centred = posteriordb.moments("eight_schools-eight_schools_centered")
    draws = posteriordb.reference_draws("eight_schools-eight_schools_noncentered")
    torch.testing.assert_close(centred["theta"][0], draws["theta"].mean(0))


def test_draws_are_judged_by_the_references_moments(folder):
    name = "GLM_Binomial_data-GLM_Binomial_model"
    port, reference = WITHOUT_DRAWS[name], posteriordb.moments(name)
    steps = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    latents = {key: mean + sd * (2 * steps + 0.5) for key, (mean, sd) in reference.items()}
    found = run.judged(port, load(name)[1], latents, reference)
    assert found["error"] == pytest.approx(0.5)
    assert found["sd_ratios"] == pytest.approx([2.0, 2.0])


def test_without_a_reference_nothing_is_judged():
    assert run.judged(WITHOUT_DRAWS["Rate_1_data-Rate_1_model"], {}, {}, None) == {}
    line = {"posterior": "a-b", "guide": "flow", "weighted_error": None}
    line |= {"seconds": 1.0, "cpu_seconds": 1.0}
    assert "| no reference |" in run.table([line])
    assert "0 of 0 within 0.3 sd" in run.summary([line], "flow")
    assert "1 without a reference" in run.summary([line], "flow")
