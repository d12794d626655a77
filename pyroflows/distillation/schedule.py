"""Which objectives a step is trained on, and on which points."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflows.data.rows import Rows
from pyroflows.distillation.draws import Contexts, drawn
from pyroflows.distillation.objectives import LOSSES
from pyroflows.distillation.pairs import Pair
from pyroflows.distributions.flow import Flow

EPOCH = 50  # steps between two evaluations of the student
CHOICES = ("auto", *LOSSES, "mixed")
_BLEND = 0.1  # share of the schedule in which one phase gives way to the next
_MOST_REPEATS = 20  # how often a row of the data is used, at most


class Phase(NamedTuple):
    """Weights of objectives, and the share of the schedule at which they begin."""

    begin: float
    weights: dict[str, float]


def phases_of(objective: str, pairs: list[Pair]) -> list[Phase]:
    """The phases that an objective's name stands for, given the layers that match.

    ``"auto"`` trains layer by layer where that loss is an exact KL: for affine layers. There a
    second phase on either divergence did not improve the score of held-out rows, and each of its
    steps cost several times as much; the reverse KL made the score worse, because some of these
    rows lie where the student seldom draws. For spline layers that loss is an approximation, and
    the forward KL learns a density with sharp edges far better.
    """
    if objective == "mixed":
        halves = {"z_reconstruction": 0.5, "x_reconstruction": 0.5}
        return [Phase(0.0, {**halves, "reverse_kl": 1.0})]
    if objective in LOSSES:
        return [Phase(0.0, {objective: 1.0})]
    if pairs and all(pair.gaussian for pair in pairs):
        return [Phase(0.0, {"layers": 1.0})]
    return [Phase(0.0, {"forward_kl": 1.0}), Phase(0.8, {"reverse_kl": 1.0})]


def weights_at(phases: list[Phase], done: float) -> dict[str, float]:
    """The objectives' weights at a share of the schedule; phases give way to each other smoothly.

    Example:
        >>> phases = [Phase(0.0, {"layers": 1.0}), Phase(0.5, {"reverse_kl": 1.0})]
        >>> weights_at(phases, 0.2), weights_at(phases, 0.5), weights_at(phases, 0.9)
        ({'layers': 1.0}, {'layers': 0.5, 'reverse_kl': 0.5}, {'reverse_kl': 1.0})
    """
    total: dict[str, float] = {}
    for phase, following in zip(phases, [*phases[1:], None], strict=True):
        share = _risen(phase.begin, done) if phase.begin else 1.0
        if following is not None:
            share -= _risen(following.begin, done)
        for name, weight in phase.weights.items():
            if share > 0:
                total[name] = total.get(name, 0.0) + share * weight
    return total


def _risen(begin: float, done: float) -> float:
    return min(max((done - begin) / _BLEND + 0.5, 0.0), 1.0)


class Batches:
    """The batches of an epoch: draws of the teacher and rows of the data, with the loss's weights.

    The teacher draws an epoch's points at once, as its sequential solve costs little more for many
    rows than for few. A row of the data comes up at most ``_MOST_REPEATS`` times, so that few rows
    cannot be learned by heart.

    Args:
        teacher: draws the points.
        contexts: what to draw under.
        rows: data, or None.
        phases: of the schedule.
        epochs: its length.
        size: points in a batch.
    """

    def __init__(
        self,
        teacher: Flow,
        contexts: Contexts,
        rows: Rows | None,
        phases: list[Phase],
        epochs: int,
        size: int,
    ) -> None:
        self.teacher = teacher
        self.contexts = contexts
        self.rows = rows
        self.phases = phases
        self.epochs = epochs
        self.size = size
        self.epoch = 0
        count = 0 if rows is None else len(rows)
        self.share = min(0.5, _MOST_REPEATS * count / (epochs * EPOCH * size))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None, dict[str, float]]]:
        points = self._points()
        for step in range(EPOCH):
            batch = points[step * self.size : (step + 1) * self.size]
            done = (self.epoch + step / EPOCH) / self.epochs
            yield *batch.batch, weights_at(self.phases, done)
        self.epoch += 1

    def __len__(self) -> int:
        return EPOCH

    def state_dict(self) -> dict[str, int]:
        """The epoch it is at."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from an epoch."""
        self.epoch = state["epoch"]

    def _points(self) -> Rows:
        """Points for an epoch, in random order."""
        count = EPOCH * self.size
        from_data = round(self.share * count)
        context = self.contexts.draw(count - from_data)
        points = Rows(drawn(self.teacher, context, count - from_data)[0], context)
        if self.rows is None or not from_data:
            return points
        device = points.x.device
        index = torch.randint(len(self.rows), (from_data,), device=device)
        order = torch.randperm(count, device=device)
        return Rows.joined([points, self.rows[index]])[order]
