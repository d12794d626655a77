"""Ports of posteriordb: proved on reference draws, right under a plate, ready for a guide."""

import doctest
import importlib
import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import data as posteriordb
import dynamics
import mixtures_and_hmms
import ports
import pyro
import pyro.distributions as dist
import pytest
import regressions
import run
import torch
from compare import log_joint
from ports import WITH_DRAWS
from prove import gradients, prove
from pyro import poutine
from time_series import decayed_sum

import pyroflows as pf

pytestmark = pytest.mark.integration
VARIABLE = "PYROFLOWS_DATA"
FOLDER = Path(posteriordb.__file__).parent
ODES = ["hudson_lynx_hare-lotka_volterra", "one_comp_mm_elim_abs-one_comp_mm_elim_abs"]


@pytest.fixture
def load():
    """Loads a port, its data and every n-th reference draw; skips without the data."""
    folder = os.environ.get(VARIABLE)
    if not folder or not (Path(folder) / posteriordb.ROOT).is_dir():
        pytest.skip(f"{VARIABLE} names no folder that holds posteriordb")

    def every(name, step):
        port, data = ports.load(name)
        draws = posteriordb.reference_draws(name)
        return port, data, {key: value[::step] for key, value in draws.items()}

    return every


def alone(model, data, latents, row):
    values = {name: value[row] for name, value in latents.items()}
    return poutine.trace(poutine.condition(model, data=values)).get_trace(data).log_prob_sum()


def test_there_is_a_port_for_each_posterior_with_draws(load):
    assert posteriordb.names() == sorted(WITH_DRAWS)
    assert len(WITH_DRAWS) == 37


@pytest.mark.parametrize("name", WITH_DRAWS)
def test_port_keeps_steins_identities(name, load):
    proof = prove(*load(name, 10))
    assert proof.z < proof.bound


def without_prior_on_sigma(port, data):
    return replace(port, model=regressions.flat_regression), data


def with_columns_swapped(port, data):
    order = [1, 0, *range(2, data["design"].shape[1])]
    return port, {**data, "design": data["design"][:, order]}


def with_wrong_transitions(port, data):
    return port, {**data, "alpha": data["alpha"].flip(0)}


def with_wrong_start(port, data):
    return port, {**data, "y_init": data["y_init"] * 1.2}


def with_wrong_scale(port, data):
    return port, {**data, "sigma": data["sigma"] * 1.05}


@pytest.mark.parametrize(
    ("name", "break_it", "step"),
    [
        ("kidiq-kidscore_momiq", without_prior_on_sigma, 1),
        ("sblrc-blr", with_columns_swapped, 10),
        ("bball_drive_event_1-hmm_drive_1", with_wrong_transitions, 10),
        ("hudson_lynx_hare-lotka_volterra", with_wrong_start, 10),
        ("eight_schools-eight_schools_noncentered", with_wrong_scale, 1),
    ],
)
def test_a_wrong_port_fails(name, break_it, step, load):
    port, data, draws = load(name, step)
    proof = prove(*break_it(port, data), draws)
    assert proof.z > proof.bound


def in_a_plate(model, data, latents):
    with pyro.plate("draws", 4, dim=-1):
        trace = poutine.trace(poutine.condition(model, data=latents)).get_trace(data)
    trace.compute_log_prob()
    return sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample")


@pytest.mark.parametrize("together", [log_joint, in_a_plate])
@pytest.mark.parametrize("name", WITH_DRAWS)
def test_draws_at_once_are_each_alone(name, together, load):
    port, data, draws = load(name, 3000)
    latents = port.to_latents(draws, data)
    found = together(port.model, data, latents)
    assert found.shape == (4,)
    expected = torch.stack([alone(port.model, data, latents, row) for row in range(4)])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", WITH_DRAWS)
def test_reference_parameters_come_back(name, load):
    port, data, draws = load(name, 3000)
    assert set(port.parameters) == set(draws)
    back = port.parameters_of(port.to_latents(draws, data), data)
    for key, value in draws.items():
        torch.testing.assert_close(back[key], value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", WITH_DRAWS)
def test_a_guide_starts_in_the_datas_dtype(name, load):
    port, data, _ = load(name, 1000)
    guide = pf.AutoFlow(port.model, layers=1, hidden=(8,)).setup(data)
    latents = guide.sample_posterior(3)
    assert {value.dtype for value in latents.values()} == {torch.float64}
    assert log_joint(port.model, data, latents).shape == (3,)


@pytest.mark.parametrize("name", ODES)
def test_half_the_step_changes_nothing(name, load):
    port, data, draws = load(name, 100)
    steps = dynamics.LOTKA_VOLTERRA_STEPS if "lotka" in name else dynamics.ELIMINATION_STEPS
    coarse = log_joint(port.model, data, draws)
    fine = log_joint(lambda d: port.model(d, 2 * steps), data, draws)
    torch.testing.assert_close(coarse, fine, rtol=0, atol=1e-3)


def test_rotated_regression_has_the_likelihood_of_all_rows():
    x = torch.randn(30, 3, dtype=torch.float64)
    y = torch.randn(30, dtype=torch.float64)
    data = regressions.with_intercept(y, *x.T)
    latents = {
        "beta": torch.randn(5, 4, dtype=torch.float64),
        "sigma": torch.rand(5, dtype=torch.float64) + 0.5,
    }
    mean = latents["beta"][:, :1] + latents["beta"][:, 1:] @ x.T
    rows = dist.Normal(mean, latents["sigma"][:, None]).log_prob(y).sum(-1)
    gap = log_joint(regressions.flat_regression, data, latents) - rows
    torch.testing.assert_close(gap, gap[:1].expand(5), rtol=0, atol=1e-10)


def test_decayed_sum_is_the_recursion():
    x, decay = torch.randn(2, 13, dtype=torch.float64), torch.tensor([[0.9], [-0.7]]).double()
    errors = [x[:, 0]]
    for t in range(1, 13):
        errors.append(x[:, t] + decay[:, 0] * errors[-1])
    torch.testing.assert_close(decayed_sum(x, decay), torch.stack(errors, dim=-1))


@pytest.mark.parametrize("length", [2, 3, 8])
def test_hidden_markov_sums_over_all_paths(length):
    transition = torch.rand(2, 2, dtype=torch.float64).log_softmax(-1)
    emission = dist.Normal(torch.tensor([[[0.0], [2.0]]]).double(), 1.0).to_event(1)
    y = torch.randn(length, 1, dtype=torch.float64)
    states = torch.cartesian_prod(*[torch.arange(2)] * length).reshape(-1, length)
    paths = [
        sum(emission.base_dist.log_prob(y[t])[0, s, 0] for t, s in enumerate(path))
        + sum(transition[i, j] for i, j in pairwise(path))
        for path in states.tolist()
    ]
    model = mixtures_and_hmms.HiddenMarkov(transition, emission, length)
    torch.testing.assert_close(model.log_prob(y), torch.stack(paths).logsumexp(0))
    torch.testing.assert_close(model.expand((3,)).log_prob(y), model.log_prob(y).expand(3))


def test_hidden_markov_needs_a_step():
    emission = dist.Normal(torch.zeros(1, 2, 1), 1.0).to_event(1)
    with pytest.raises(ValueError, match="length: expected 2 outcomes or more, got 1"):
        mixtures_and_hmms.HiddenMarkov(torch.zeros(2, 2), emission, 1)


def test_gradients_are_on_the_unconstrained_scale(load):
    port, data, draws = load("kidiq-kidscore_momiq", 5000)
    theta, gradient = gradients(port.model, data, draws)
    torch.testing.assert_close(theta[:, 2], draws["sigma"].log())
    step = 1e-5 * draws["sigma"]
    up = log_joint(port.model, data, {**draws, "sigma": draws["sigma"] + step})
    down = log_joint(port.model, data, {**draws, "sigma": draws["sigma"] - step})
    # d log p / d log sigma, and 1 from the Jacobian
    torch.testing.assert_close(gradient[:, 2], (up - down) / 2e-5 + 1, rtol=1e-4, atol=1e-4)


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"expected one of arK-arK, .* got 'radon'"):
        ports.load("radon")


def test_without_the_folder_the_error_names_the_variable(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=rf"{VARIABLE} is not set.*stan-dev/posteriordb"):
        posteriordb.names()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"kidiq-kidscore_momiq.json .*posteriordb"):
        posteriordb.load_data("kidiq-kidscore_momiq")


def test_runner_in_smoke_mode(load, tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        run.main(run.parse(["--smoke", "--out", str(tmp_path), "--guides", "flow", "normal"]))
    finally:
        torch.set_num_threads(threads)
    assert "flow: 1 of 1 within 0.3 sd" in capsys.readouterr().out
    assert (tmp_path / "posteriordb.md").read_text().startswith("| posterior | guide |")
    figures = json.loads((tmp_path / "posteriordb.json").read_text())
    assert [line["guide"] for line in figures] == ["flow", "normal"]


@pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("*.py"))])
def test_examples_in_docstrings(name):
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(importlib.import_module(name), optionflags=options).failed == 0
