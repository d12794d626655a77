"""The recipe of training, pinned: what the project's figures rest on changes by intent alone."""

import math

import lightning_fabric
import pytest
import torch
from torch import nn

import pyroflows as pf
from pyroflows.distillation import training
from pyroflows.training import likelihood, loop
from pyroflows.training.epochs import Settings, optimise
from pyroflows.training.regularize import default_dropout, default_weight_decay
from pyroflows.training.weights import Average

SETTINGS = {
    "max_epochs": 4,
    "lr": 0.1,
    "weight_decay": 0.25,
    "clip": 5.0,
    "patience": 9,
    "average": 0.0,
    "progress": False,
    "label": "test",
}


class Slope(nn.Module):
    """A loss whose gradient is the batch's one number, for a matrix and a bias."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(1, 1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, slope):
        return (slope * (self.matrix + self.bias)).sum()


def seen_steps(monkeypatch, loss, batches, **changes):
    """The optimiser's state just before each of its steps, and the optimiser."""
    seen, made = [], []
    original = torch.optim.AdamW.__init__

    def watched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made.append(self)
        self.register_step_pre_hook(
            lambda opt, *_: seen.append(
                (
                    [g["lr"] for g in opt.param_groups],
                    [p.grad.clone() for g in opt.param_groups for p in g["params"]],
                )
            )
        )

    monkeypatch.setattr(torch.optim.AdamW, "__init__", watched)
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1)
    history = optimise(loss, loss, batches, None, Settings(**SETTINGS | changes), fabric)
    return seen, made[0], history


def batches(*slopes):
    return [(torch.tensor([[slope]]),) for slope in slopes]


def test_step_size_falls_as_half_a_cosine(monkeypatch):
    seen, _, history = seen_steps(monkeypatch, Slope(), batches(1.0, 1.0, 1.0))
    steps = 4 * 3
    wanted = [0.1 * 0.5 * (1 + math.cos(math.pi * k / steps)) for k in range(steps)]
    assert [lrs[0] for lrs, _ in seen] == pytest.approx(wanted)
    assert [lrs[1] for lrs, _ in seen] == pytest.approx(wanted)
    assert history.lr == pytest.approx(wanted[2::3])


def test_decay_is_for_matrices_alone(monkeypatch):
    loss = Slope()
    _, optimiser, _ = seen_steps(monkeypatch, loss, batches(1.0))
    matrices, rest = optimiser.param_groups
    assert matrices["params"] == [loss.matrix]
    assert rest["params"] == [loss.bias]
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.25, 0.0)


def test_epsilon_is_large_enough_for_float32(monkeypatch):
    _, optimiser, _ = seen_steps(monkeypatch, Slope(), batches(1.0))
    assert [group["eps"] for group in optimiser.param_groups] == [1e-5, 1e-5]
    assert [group["betas"] for group in optimiser.param_groups] == [(0.9, 0.999)] * 2


def test_gradients_are_clipped_by_their_norm(monkeypatch):
    seen, _, _ = seen_steps(monkeypatch, Slope(), batches(30.0, 0.3), max_epochs=1)
    norms = [torch.cat([g.flatten() for g in grads]).norm().item() for _, grads in seen]
    assert norms == pytest.approx([5.0, 0.3 * 2**0.5], rel=1e-5)


def test_average_weighs_its_first_steps_alike():
    weight = nn.Parameter(torch.zeros(1))
    average, by_hand = Average([weight], decay=0.5), 0.0
    for step in range(1, 31):
        with torch.no_grad():
            weight.fill_(float(step))
        average.update()
        decay = min(0.5, step / (9 + step))
        by_hand = decay * by_hand + (1 - decay) * step
    with average.in_place():
        assert weight.item() == pytest.approx(by_hand, rel=1e-6)
    assert weight.item() == 30.0


def test_the_average_is_what_is_judged_and_kept(monkeypatch):
    loss = Slope()
    _, _, history = seen_steps(monkeypatch, loss, batches(1.0), average=0.9, max_epochs=1, lr=1.0)
    # Adam's first step is the step size; of it the average takes 1 - 1 / 10.
    assert loss.bias.item() == pytest.approx(-0.9, rel=1e-4)
    assert len(history.steps) == 1


@pytest.mark.parametrize(
    ("rows", "decay", "dropout"), [(50, 1.0, 0.2), (100, 1.0, 0.2), (10_000, 0.01, 0.0)]
)
def test_small_data_are_held_back(rows, decay, dropout):
    flow = pf.maf(1, layers=1, hidden=(8,))
    assert default_weight_decay(rows) == pytest.approx(decay)
    assert default_dropout(flow, rows) == pytest.approx(dropout)


def test_dropout_falls_with_the_logarithm_of_the_rows():
    flow = pf.maf(1, layers=1, hidden=(8,))
    assert default_dropout(flow, 1000) == pytest.approx(0.1)
    assert default_dropout(pf.iaf(1, layers=1, hidden=(8,)), 50) == 0.0


def test_fit_hands_on_its_defaults(monkeypatch):
    handed = []

    def stop(model, loss, batches, evaluate, settings, *rest):
        handed.append(settings)
        return pf.History()

    monkeypatch.setattr(likelihood, "optimise", stop)
    pf.fit(pf.maf(2, layers=1, hidden=(8,)), torch.randn(1000, 2), progress=False)
    (settings,) = handed
    assert (settings.lr, settings.clip, settings.patience) == (1e-3, 5.0, 30)
    assert settings.epsilon == 1e-5
    # 900 rows of two features; 15 batches of 64, of which 8,000 steps are more than 300 epochs.
    assert settings.weight_decay == pytest.approx(100 * 2 / 900)
    assert settings.max_epochs == 300
    assert settings.average == pytest.approx(1 - 1 / 100)


def test_three_rollbacks_each_with_three_tenths_of_the_step():
    assert loop.MAX_ROLLBACKS == 3

    class Broken(Slope):
        def forward(self, slope):
            return super().forward(slope) * math.nan

    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1)
    with pytest.raises(pf.DivergedError, match=r"a step size of 0\.0027"):
        optimise((loss := Broken()), loss, batches(1.0), None, Settings(**SETTINGS), fabric)


def test_distill_hands_on_its_defaults(monkeypatch):

    handed = []

    def stop(model, loss, batches, evaluate, settings, *rest):
        handed.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "optimise", stop)
    teacher = pf.maf(2, layers=1, hidden=(8,))
    with pytest.raises(KeyboardInterrupt):
        pf.distill(teacher, pf.student_of(teacher), progress=False)
    (settings,) = handed
    assert (settings.lr, settings.clip, settings.average) == (3e-3, 5.0, 0.99)
    assert (settings.epsilon, settings.weight_decay) == (1e-8, 0.0)
    assert settings.skip
