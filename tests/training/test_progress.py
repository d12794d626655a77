"""What a training says of how far it is, to a terminal and to a log."""

import io
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf
from pyroflows.training import progress
from pyroflows.training.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test says so."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_ten_seconds(capsys, clock):
    shown = Progress("fit", "epoch", 2000, done=3)
    for step in range(2000 - 3):
        shown.tell(train=f"{step:.1f}")
        shown.update()
        clock[0] += 1 / 32
    shown.close()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "fit: epoch 324 of 2000, train 320.0, 10 s"
    assert said[-1] == "fit: epoch 2000 of 2000, train 1996.0, 62 s"
    assert len(said) == 7
    assert not any("\r" in line for line in said)


def test_a_bar_is_for_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = Progress("fit", "epoch", 5)
    shown.tell(train="-1.0")
    shown.update()
    shown.say("a word")
    shown.close()
    assert "\r" in terminal.getvalue()
    assert "fit" in terminal.getvalue()
    assert "a word\n" in terminal.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_said_unasked(terminal, monkeypatch):
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    shown = Progress("fit", "epoch", 5, show=False)
    shown.update()
    shown.say("a word")
    shown.close()
    Progress("fit", "epoch", 5).close()  # nothing was done
    assert terminal or stderr.getvalue() == ""


def test_no_stderr_at_all(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    shown = Progress("fit", "epoch", 5)
    shown.update()
    shown.close()
    assert capsys.readouterr().out == ""


def model():
    pyro.sample("z", dist.Normal(torch.tensor(3.0), 0.5))


def long_fit():
    pf.fit(pf.nice(2, hidden=(4,)), torch.randn(100, 2), max_epochs=3)
    return "fit: epoch 3 of 3, train -", "nats"


def long_distillation():
    teacher = pf.maf(2, layers=1, hidden=(4,))
    pf.distill(teacher, pf.student_of(teacher), max_steps=100)
    return "distill: epoch 2 of 2, reverse KL ", "forward KL"


def long_ascent():
    pf.fit_guide(model, pf.AutoFlow(model, layers=1, hidden=(4,)), max_steps=100, particles=4)
    return "fit_guide: step 100 of 100, elbo ", "+-"


@pytest.mark.parametrize("train", [long_fit, long_distillation, long_ascent])
def test_each_training_says_how_far_it_is(train, capsys):
    expected = train()
    said = capsys.readouterr().err
    assert "\r" not in said
    assert said.count("\n") <= 2
    for part in expected:
        assert part in said.splitlines()[-1]
