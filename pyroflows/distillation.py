"""How close a student came to its teacher: divergences, held-out scores and speeds."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyroflows.distribution import Flow
from pyroflows.history import History
from pyroflows.rows import Batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass
class Distillation:
    """What a distillation came to. KL divergences and scores are in nats.

    Attributes:
        reverse_kl: ``E_student[log s - log t]`` and its standard error.
        forward_kl: ``E_teacher[log t - log s]`` and its standard error.
        student_nats: mean log-density of the held-out data under the student, or None.
        teacher_nats: the same under the teacher.
        gap: mean of ``log t - log s`` over the held-out rows and its (paired) standard error.
        student_speed: samples a second, in batches of 10,000.
        teacher_speed: the same of the teacher.
        history: the course of training; its score is minus the sum of both divergences.
    """

    reverse_kl: tuple[float, float]
    forward_kl: tuple[float, float]
    student_nats: float | None
    teacher_nats: float | None
    gap: tuple[float, float] | None
    student_speed: float
    teacher_speed: float
    history: History = field(repr=False)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The score over the epochs (see ``History.plot``)."""
        return self.history.plot(ax)

    def __str__(self) -> str:
        lines = [
            f"reverse KL (student || teacher)  {_plus_minus(self.reverse_kl)}",
            f"forward KL (teacher || student)  {_plus_minus(self.forward_kl)}",
        ]
        if self.gap is not None:
            lines += [
                f"teacher on held-out data         {self.teacher_nats:10.3f} nats",
                f"student on held-out data         {self.student_nats:10.3f} nats",
                f"gap                              {_plus_minus(self.gap)}",
            ]
        ratio = self.student_speed / self.teacher_speed
        lines += [
            f"teacher                          {self.teacher_speed:10,.0f} samples/s",
            f"student                          {self.student_speed:10,.0f} samples/s, {ratio:.1f}x",
        ]
        return "\n".join(lines)


def _plus_minus(pair: tuple[float, float]) -> str:
    return f"{pair[0]:10.4f} +- {pair[1]:.4f}"


class Contexts:
    """Contexts to draw under: none, or random rows of those given."""

    def __init__(self, rows: Tensor | None) -> None:
        self.rows = rows

    def draw(self, n: int) -> Tensor | None:
        """``n`` of the rows, with replacement; None where there are none."""
        if self.rows is None:
            return None
        return self.rows[torch.randint(len(self.rows), (n,), device=self.rows.device)]


def draw(flow: Flow, context: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """``n`` differentiable draws, one under each context, and their log-densities."""
    return flow(context, validate_args=False).rsample_and_log_prob((n,) if context is None else ())


@torch.no_grad()
def drawn(flow: Flow, context: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """The same without a graph."""
    return draw(flow, context, n)


@torch.no_grad()
def divergence_on(draws: tuple[Tensor, Tensor], other: Flow, context: Tensor | None) -> Tensor:
    """``log p(x) - log q(x)`` for each draw x of p: its mean is KL(p || q)."""
    x, log_p = draws
    return log_p - other(context, validate_args=False).log_prob(x.clone())


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    values = values.double()
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def report(
    teacher: Flow, student: Flow, contexts: Contexts, held: Batch | None, history: History
) -> Distillation:
    """Measure both divergences on 10,000 draws, both flows on the held-out rows, and the speeds."""
    n = 10_000
    context = contexts.draw(n)
    gap = student_nats = teacher_nats = None
    if held is not None:
        with torch.no_grad():
            log_t = teacher.log_prob(*held)
            log_s = student.log_prob(*held)
        gap = _mean_and_error(log_t - log_s)
        student_nats, teacher_nats = log_s.mean().item(), log_t.mean().item()
    return Distillation(
        reverse_kl=_mean_and_error(divergence_on(drawn(student, context, n), teacher, context)),
        forward_kl=_mean_and_error(divergence_on(drawn(teacher, context, n), student, context)),
        student_nats=student_nats,
        teacher_nats=teacher_nats,
        gap=gap,
        student_speed=_speed(student, context, n),
        teacher_speed=_speed(teacher, context, n),
        history=history,
    )


def _speed(flow: Flow, context: Tensor | None, n: int) -> float:
    """Samples a second: the median of three batches, after one to warm up."""
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        x, _ = drawn(flow, context, n)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        seconds.append(time.perf_counter() - begin)
    return n / statistics.median(seconds[1:])
