"""Ctrl-C and SIGTERM end a training between two steps: best weights, and a checkpoint to go on."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyroflows as pf
from pyroflows.infer import plateau
from pyroflows.training.interruption import Interruption
from pyroflows.training.loop import Run

SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
X = torch.randn(60, 2, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """A shell's background processes are born deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Stream(IterableDataset):
    """Rows of which nobody knows how many there are."""

    def __iter__(self):
        return (x + 0.1 * torch.randn(2) for x in X)


def fit(seed, data=None, **settings):
    torch.manual_seed(seed)
    flow = pf.maf(2, layers=1, hidden=(8,))
    torch.manual_seed(seed + 3)
    base = {"max_epochs": 4, "val": X[:9], "dropout": 0.1, "progress": False}
    history = pf.fit(flow, X if data is None else data, **{**base, **settings})
    return history, flow.state_dict()


def fit_stream(seed, **settings):
    return fit(seed, DataLoader(Stream(), batch_size=20), **settings)


def distil(seed, **settings):
    torch.manual_seed(5)
    teacher = pf.maf(2, layers=1, hidden=(8,))
    torch.manual_seed(seed)
    student = pf.student_of(teacher)
    base = {"max_steps": 150, "batch_size": 8, "progress": False, "objective": "mixed"}
    history = pf.distill(teacher, student, **{**base, **settings})
    return history, student.state_dict()


def model(data):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", 60, subsample_size=len(data)):
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=data)


def guide(seed, batches=None, **settings):
    pyro.clear_param_store()
    torch.manual_seed(seed)
    made = pf.AutoFlow(model, layers=1, hidden=(4,))
    torch.manual_seed(seed + 3)
    args = (X,) if batches is None else ()
    base = {"particles": 2, "max_steps": 24, "progress": False, "batches": batches}
    history = pf.fit_guide(model, made, *args, **{**base, **settings})
    return history, made.state_dict()


def guide_in_batches(seed, **settings):
    batches = DataLoader(TensorDataset(X), batch_size=20, shuffle=True)
    return guide(seed, batches, **settings)


# Of each a step within a period, one at its end, and the last of all.
TRAINERS = {
    "fit": (lambda seed, **s: fit(seed, batch_size=20, **s), (2, 6, 12)),
    "fit of a stream": (fit_stream, (2, 6, 12)),
    "distill": (distil, (70, 100, 150)),
    "fit_guide": (guide, (13, 20, 24)),
    "fit_guide in batches": (guide_in_batches, (13, 20, 24)),
}


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    monkeypatch.setattr(plateau, "WINDOW", 10)
    monkeypatch.setattr(plateau, "_NOTHING_LEFT", -1.0)  # nor an end before the last


def at_step(patch, number, do):
    """Do something within the step with this number."""
    taken = [0]
    step = Run._step

    def counted(self, *args):
        step(self, *args)
        taken[0] += 1
        if taken[0] == number:
            do()

    patch.setattr(Run, "_step", counted)
    return taken


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def same(one, other):
    return all(torch.equal(value, other[key]) for key, value in one.items())


def cases():
    """Each trainer once by default."""
    for name in TRAINERS:
        for number in SIGNALS:
            for place, where in enumerate(["within", "at the end", "last"]):
                few = place == 0 and number == signal.SIGTERM
                marks = [] if few else [pytest.mark.slow]
                id = f"{name}, {number.name} {where}"
                yield pytest.param(name, place, number, id=id, marks=marks)


@pytest.mark.parametrize(("name", "place", "number"), [*cases()])
def test_a_signal_leaves_a_checkpoint_to_go_on_from(name, place, number, tmp_path, monkeypatch):
    train, stops = TRAINERS[name]
    before = handlers()
    expected, weights = train(0)
    with monkeypatch.context() as patch:
        taken = at_step(patch, stops[place], lambda: signal.raise_signal(number))
        checkpoint = pf.Checkpoint(tmp_path, every=1000)
        stopped, best = train(0, checkpoint=checkpoint)
    assert stopped.stopped == SIGNALS[number]
    assert taken == [stops[place]]  # not one more
    assert all(value.isfinite().all() for value in best.values())
    assert len(list(tmp_path.iterdir())) == 1
    history, again = train(7, checkpoint=pf.Checkpoint(tmp_path, resume=True))
    for field in ("steps", "train", "val", "lr", "best", "stopped", "taken", "curves"):
        assert getattr(history, field) == getattr(expected, field), field
    assert same(weights, again)
    assert handlers() == before


@pytest.mark.parametrize("name", TRAINERS)
def test_without_a_checkpoint_the_best_weights_stay(name, monkeypatch):
    train, stops = TRAINERS[name]
    at_step(monkeypatch, stops[0] + stops[1], lambda: signal.raise_signal(signal.SIGTERM))
    at_step(monkeypatch, stops[1] + 1, lambda: signal.raise_signal(signal.SIGTERM))
    stopped, weights = train(0)
    assert stopped.stopped == "terminated"
    assert stopped.steps
    assert all(value.isfinite().all() for value in weights.values())


def test_a_second_signal_ends_it_at_once(tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("not reached")

    at_step(monkeypatch, 5, twice)
    history, _ = fit(0, batch_size=20, checkpoint=tmp_path)
    assert history.stopped == "terminated"
    assert len(list(tmp_path.iterdir())) == 1  # of the epoch before: this step may be half done


def test_a_handler_of_the_users_own_is_left_alone(monkeypatch):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("mine"))
    try:
        at_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        history, _ = fit(0, batch_size=20)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["mine"]
    assert history.stopped == "all 4 epochs done"


def test_a_handler_set_meanwhile_stays(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with Interruption():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_a_thread_no_handler_is_set():
    before, seen = handlers(), []

    def look():
        with Interruption():
            seen.append(handlers())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_the_command_writes_its_run_and_says_so_by_its_exit_code(number, tmp_path):
    table = tmp_path / "table.csv"
    np.savetxt(table, np.random.default_rng(0).normal(size=(500, 2)), delimiter=",")
    options = ["--flow", "maf", "--layers", "1", "--hidden", "8", "--epochs", "99999"]
    options += ["--patience", "99999"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pyroflows", "fit", table, "--out", tmp_path / "run", *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    for line in process.stderr:
        if line.startswith("fitting"):
            break
    time.sleep(3)  # some epochs
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert SIGNALS[number] in out
    assert f"written to {tmp_path / 'run'}" in out
    assert f"fit: {SIGNALS[number]}; what it came to: History(" in err
    assert pf.load(tmp_path / "run").log_prob(X).isfinite().all()
