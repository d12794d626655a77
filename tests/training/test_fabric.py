"""Where and how a training runs: ``fabric=``, ``checkpoint=``, the recipe, and words that moved."""

import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning_fabric import Fabric

import pyroflows as pf
from pyroflows._distributed import open_fabric
from pyroflows.training.recipe import MOVED

LIKE = torch.zeros(1)


def small():
    torch.manual_seed(0)
    return pf.maf(2, layers=1, hidden=(8,))


def model():
    pyro.sample("z", dist.Normal(3.0, 0.5))


def fit(**settings):
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(1))
    return pf.fit(small(), x, max_epochs=2, progress=False, **settings)


def distil(**settings):
    teacher = small()
    return pf.distill(teacher, pf.student_of(teacher), max_steps=5, progress=False, **settings)


def fit_guide(**settings):
    pyro.clear_param_store()
    torch.manual_seed(0)
    guide = pf.AutoFlow(model, layers=1, hidden=(4,))
    return pf.fit_guide(model, guide, max_steps=5, particles=4, progress=False, **settings)


TRAINERS = {"fit": fit, "distill": distil, "fit_guide": fit_guide}
every_trainer = pytest.mark.parametrize("train", TRAINERS.values(), ids=TRAINERS)


@every_trainer
def test_a_fabric_and_its_arguments_give_the_same(train):
    arguments = {"accelerator": "cpu", "devices": 1}
    courses = [train(fabric=f).train for f in (None, {}, arguments, Fabric(**arguments))]
    assert all(course == courses[0] for course in courses)


@every_trainer
def test_processes_draw_apart_once(train, monkeypatch):
    """A second time the numbers of several processes would be others than those of a seed."""
    calls = []
    for name, module in list(sys.modules.items()):
        if name.startswith("pyroflows") and hasattr(module, "draw_apart"):
            monkeypatch.setattr(module, "draw_apart", calls.append)
    train()
    assert len(calls) == 1


@every_trainer
def test_mixed_precision_trains(train):
    history = train(fabric={"precision": "bf16-mixed"})
    assert torch.tensor(history.train).isfinite().all()


@every_trainer
@pytest.mark.parametrize("wrong", ["cpu", 2, [1], torch.device("cpu")], ids=repr)
def test_another_kind_of_fabric_is_refused(train, wrong):
    with pytest.raises(ValueError, match=r"fabric: expected a lightning_fabric\.Fabric, a dict"):
        train(fabric=wrong)


@every_trainer
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "8-bit"}, "precision: expected None or one of"),
        ({"precision": 16}, "precision: expected None or one of"),
        ({"accelerator": "abacus"}, "Lightning Fabric refuses .*abacus"),
        ({"divices": 2}, "Lightning Fabric refuses .*divices"),
        ({"num_nodes": 2}, "fabric: expected a process started on each of 2 nodes, by torchrun"),
    ],
    ids=str,
)
def test_arguments_that_fabric_refuses_are_named(train, arguments, message, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)  # of earlier processes
    with pytest.raises(ValueError, match=message):
        train(fabric=arguments)


def test_a_given_fabric_is_launched_if_it_is_not():
    fabric = Fabric(accelerator="cpu", devices=1)
    launches = []
    fabric.launch = lambda: launches.append(1)
    assert open_fabric(fabric, LIKE) is fabric
    assert launches == [1]
    launched = Fabric(accelerator="cpu", devices=1)
    launched.launch()
    launched.launch = fabric.launch
    assert open_fabric(launched, LIKE) is launched
    assert launches == [1]


@every_trainer
def test_a_given_fabric_that_would_move_the_flow_is_refused(train):
    with pytest.raises(ValueError, match="precision: expected None or .*, got 'bf16-true'"):
        train(fabric=Fabric(accelerator="cpu", devices=1, precision="bf16-true"))


def test_a_given_fabric_computes_in_its_precision():
    mixed = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    assert fit(fabric=mixed).train == fit(fabric={"precision": "bf16-mixed"}).train
    assert fit(fabric=mixed).train != fit().train


def test_a_precision_may_come_as_a_plugin():
    from lightning_fabric.plugins import MixedPrecision

    plugin = MixedPrecision("bf16-mixed", "cpu")
    assert fit(fabric={"plugins": plugin}).train == fit(fabric={"precision": "bf16-mixed"}).train


@pytest.mark.parametrize("devices", [{}, {"devices": 1}], ids=str)
def test_one_device_is_the_one_where_the_flow_is(monkeypatch, devices):
    made = []

    class Recorded(Fabric):
        def __init__(self, **arguments):
            made.append(arguments)
            super().__init__(accelerator="cpu", devices=1)

    class OnSecondGpu:
        dtype = torch.float32
        device = torch.device("cuda:1")

    monkeypatch.setattr("lightning_fabric.Fabric", Recorded)
    open_fabric(devices, OnSecondGpu())
    assert (made[0]["accelerator"], made[0]["devices"]) == ("cuda", [1])


def test_a_double_flow_is_trained_in_double():
    made = open_fabric(None, torch.zeros(1, dtype=torch.float64))
    assert made.strategy.precision.precision == "32-true"  # which converts nothing
    assert open_fabric({"precision": "64-true"}, torch.zeros(1, dtype=torch.float64))


@every_trainer
@pytest.mark.parametrize("name", MOVED)
def test_a_word_that_moved_says_where_it_is_now(train, name):
    with pytest.raises(ValueError, match=rf"{name}: say (fabric=\{{'{name}'|checkpoint=pf\.Ch)"):
        train(**{name: 1})


@pytest.mark.parametrize("train", [fit, distil], ids=["fit", "distill"])
@pytest.mark.parametrize(
    ("wrong", "meant"), [("patiance", "patience"), ("batchsize", "batch_size")]
)
def test_a_mistyped_word_is_named_with_what_was_meant(train, wrong, meant):
    with pytest.raises(TypeError, match=f"{wrong}: .*did you mean {meant}"):
        train(**{wrong: 3})


def test_a_word_of_the_models_is_the_models():
    def shifted(by=0.0):
        pyro.sample("z", dist.Normal(by, 0.5))

    guide = pf.AutoFlow(shifted, layers=1, hidden=(4,))
    pf.fit_guide(shifted, guide, max_steps=5, particles=4, by=7.0, clip=5.0, progress=False)
    assert guide.median(by=7.0)["z"].item() == pytest.approx(7.0, abs=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"folder": 3}, "checkpoint: expected a folder, got a int"),
        ({"folder": "x", "every": 0}, "every: expected a positive number, got 0"),
        ({"folder": "x", "every": "1"}, "every: expected a positive number"),
        ({"folder": "x", "resume": "yes"}, "resume: expected True or False"),
    ],
    ids=str,
)
def test_a_checkpoint_checks_what_it_is_given(arguments, message):
    with pytest.raises(ValueError, match=message):
        pf.Checkpoint(**arguments)


@every_trainer
def test_a_folder_alone_is_a_checkpoint(train, tmp_path):
    train(checkpoint=str(tmp_path))
    assert list(tmp_path.iterdir())
