r"""What a student is trained on. All losses are in nats, or in units that compare with them.

``reverse_kl``
    :math:`E_s[\log s(x) - \log t(x)]` on the student's own draws, which it scores for free and the
    teacher in one pass (van den Oord et al. 2018, arXiv:1711.10433). Alone it seeks modes. By
    default with the path gradient (Roeder et al. 2017, arXiv:1703.09194), whose variance vanishes
    as the student comes close, and which costs the student a sequential solve.
``forward_kl``
    :math:`-E_t[\log s(x)]` on the teacher's draws, and on data. It finds every mode, and costs the
    student a sequential solve.
``z_reconstruction``, ``x_reconstruction``
    How far x is from the student's image of the teacher's z(x), and z from the teacher's z of the
    student's x(z) (Huang et al. 2019, PMLR 115; halves of both: Krause et al. 2021, CaloFlow II,
    arXiv:2110.11377). They ask for the teacher's map itself, not for its density alone.
``layers``
    Each layer of the student learns the teacher's points before and after that layer, known from
    one pass of the teacher: no inversion, no errors that add up over the layers (CaloFlow II's
    "fully guided" training).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyroflows.distillation.pairs import Pair
from pyroflows.distributions.flow import Flow


@dataclass(frozen=True)
class Task:
    """Who learns from whom.

    Attributes:
        teacher: a frozen view, in eval mode.
        student: what is trained.
        pairs: layers that match.
        scale: the unit of each coordinate of x, of the event's shape: the teacher's spread.
        path: the reverse KL's gradient along the paths alone.
    """

    teacher: Flow
    student: Flow
    pairs: list[Pair]
    scale: Tensor
    path: bool = True


class Objectives(nn.Module):
    """The loss of a step: a weighted sum of objectives on one batch of points.

    Its only sub-module is the student, which is what is trained, moved and switched with it.

    Args:
        task: who learns from whom.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.student = task.student
        self.task = task
        self.losses = dict(LOSSES)

    def forward(self, x: Tensor, context: Tensor | None, weights: dict[str, float]) -> Tensor:
        """The weighted sum.

        Args:
            x: points ``(rows, *event)`` of the teacher's, or of the data.
            context: ``(rows, *context)`` for conditional flows.
            weights: of the objectives by name.
        """
        return torch.stack(
            [weight * self.losses[name](self.task, x, context) for name, weight in weights.items()]
        ).sum()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the objectives of one pass; a sequential solve would take minutes."""
        for name in ("layers", "z_reconstruction", "x_reconstruction"):
            self.losses[name] = torch.compile(LOSSES[name], *args, **kwargs)


def _reverse_kl(task: Task, x: Tensor, context: Tensor | None) -> Tensor:
    student = task.student(context, validate_args=False)
    shape = x.shape[:1] if context is None else torch.Size()
    if task.path:
        x = student.rsample(shape)
        log_s = student.path_log_prob(x)
    else:
        x, log_s = student.rsample_and_log_prob(shape)
    return (log_s - task.teacher(context, validate_args=False).log_prob(x)).mean()


def _forward_kl(task: Task, x: Tensor, context: Tensor | None) -> Tensor:
    return -task.student(context, validate_args=False).log_prob(x).mean()


def _z_reconstruction(task: Task, x: Tensor, context: Tensor | None) -> Tensor:
    with torch.no_grad():
        z = task.teacher.transform.inverse_and_log_det(x, context)[0]
    back = task.student.transform.forward_and_log_det(z, context)[0]
    return half_square((back - x) / task.scale)


def _x_reconstruction(task: Task, x: Tensor, context: Tensor | None) -> Tensor:
    student = task.student(context, validate_args=False)
    z = student.base_dist.sample(x.shape[:1] if context is None else torch.Size())
    drawn = task.student.transform.forward_and_log_det(z, context)[0]
    back = task.teacher.transform.inverse_and_log_det(drawn, context)[0]
    return half_square(back - z)


def _layers(task: Task, x: Tensor, context: Tensor | None) -> Tensor:
    targets = layer_targets(task.teacher, task.pairs, x, context)
    return torch.stack([layer_loss(target, context).mean() for target in targets]).sum()


LOSSES: dict[str, Callable[[Task, Tensor, Tensor | None], Tensor]] = {
    "layers": _layers,
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "z_reconstruction": _z_reconstruction,
    "x_reconstruction": _x_reconstruction,
}


def half_square(error: Tensor) -> Tensor:
    """Half the squared length of each row, on average: nats where the error has unit spread."""
    return 0.5 * error.square().flatten(1).sum(dim=1).mean()


class LayerTarget(NamedTuple):
    """What a layer of the student learns: to map ``before`` to ``after``, as the teacher's does."""

    pair: Pair
    before: Tensor
    after: Tensor
    theta: Tensor  # the parameters of the teacher's layer there


@torch.no_grad()
def layer_targets(
    teacher: Flow, pairs: list[Pair], x: Tensor, context: Tensor | None
) -> list[LayerTarget]:
    """For each pair the points before and after the teacher's layer, and its parameters there.

    One pass of the teacher, from x to its base.
    """
    by_index = {pair.index: pair for pair in pairs}
    parts = teacher.parts
    found = []
    for index in reversed(range(len(parts))):
        after = x
        if index in by_index:
            layer = by_index[index].teacher
            theta = layer.net(after, context)
            x = layer.family.forward(after, theta)[0]
            found.append(LayerTarget(by_index[index], x, after, theta))
        else:
            x = parts[index].inverse_and_log_det(after, context)[0]
    return found[::-1]


def layer_loss(target: LayerTarget, context: Tensor | None) -> Tensor:
    r"""How far a student's layer is from the teacher's, in nats, ``(*batch)``.

    Both map noise ``before`` = z to ``after`` = x, feature by feature given the noise of the
    features before. Where both are affine, :math:`x_i | z_{<i}` is :math:`N(\mu, \sigma)` in each,
    and this is :math:`\sum_i KL(N(\mu_t, \sigma_t) \| N(\mu_s, \sigma_s))` with

    .. math:: KL = \log\frac{\sigma_s}{\sigma_t}
        + \frac{\sigma_t^2 + (\mu_t - \mu_s)^2}{2 \sigma_s^2} - \frac12,

    (ClariNet's closed form per step; Ping et al. 2019, arXiv:1807.07281). For other families its
    second order: half the squared errors of x, in units of the teacher's slope, and of the
    log-slope.
    """
    pair, before, after, theta = target
    teach, learn = pair.teacher.family, pair.student.family
    answer = pair.student.net(before, context)
    if pair.gaussian:
        zero = torch.zeros_like(before)
        mean_t, log_t = teach.inverse(zero, theta)
        mean_s, log_s = learn.forward(zero, answer)
        spread = (2 * log_t).exp() + (mean_t - mean_s).square()
        kl = log_s - log_t + 0.5 * spread * (-2 * log_s).exp() - 0.5
        return kl.sum(dim=-1)
    log_t = -teach.forward(after, theta)[1]
    got, log_s = learn.forward(before, answer)
    error = (got - after) * (-log_t).exp()
    return 0.5 * (error.square() + (log_s - log_t).square()).sum(dim=-1)
