"""``pf.distill``: a student that samples fast learns the density of a teacher that scores fast.

The reverse KL of a student's own draws needs no slow direction at all, but alone it drops modes,
and it starts where the teacher's density means nothing (Huang et al. 2019, PMLR 115). So the
student learns from the teacher's points: layer by layer, from one pass of the teacher, where the
two match and are affine; elsewhere by the forward KL, with the reverse KL last.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyroflows._checks import check_positive, check_share, check_whole, to_builtin
from pyroflows._distributed import mean_over, open_fabric, reduced
from pyroflows.data.fingerprint import facts_of
from pyroflows.data.rows import Rows
from pyroflows.distillation.checks import (
    check_objective,
    check_pair,
    check_scores,
    checked_data,
)
from pyroflows.distillation.draws import Contexts, divergence_on, drawn
from pyroflows.distillation.objectives import Objectives, Task
from pyroflows.distillation.pairs import matched
from pyroflows.distillation.schedule import EPOCH, Batches, phases_of
from pyroflows.distributions.flow import Flow
from pyroflows.training.checkpoints import Checkpoint, open_checkpoints
from pyroflows.training.epochs import Settings, optimise
from pyroflows.training.history import History
from pyroflows.training.identity import digest_of, facts_of_module
from pyroflows.training.recipe import COMPARED, MOVED, Recipe, complete
from pyroflows.transforms import Autoregressive

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from typing_extensions import Unpack

_DRAWS = 2000  # of each flow at an evaluation
RECIPE = {"lr": 3e-3, "clip": 5.0, "average": 0.99, "patience": 20}


def distill(
    teacher: Flow,
    student: Flow,
    *,
    data: Any = None,
    context: Any = None,
    objective: str = "auto",
    path: bool = True,
    max_steps: int = 3000,
    batch_size: int = 256,
    checkpoint: str | Path | Checkpoint | None = None,
    progress: bool = True,
    compile: bool = False,
    fabric: Fabric | dict[str, Any] | None = None,
    **recipe: Unpack[Recipe],
) -> History:
    """Train a student that samples fast to have a teacher's density, in place.

    ``pf.compare(teacher, student)`` then says how close it came.

    The teacher is used in eval mode through a frozen view and left exactly as it was. The student
    keeps its best weights: those with the least sum of both divergences at an evaluation, of which
    there is one every 50 steps. Ctrl-C ends training and leaves the best student so far.
    Where the two match layer by layer, only the student's autoregressive layers are trained,
    whatever the objective: its base, and the maps between the layers, stay those of the teacher.

    Args:
        teacher: any trained flow.
        student: a flow of the same shape whose ``fast`` is ``"sample"`` or ``"both"``, such as
            ``pf.student_of(teacher)``.
        data: rows, or a pair (rows, context), to learn from beside the teacher's own draws: up to
            half of a batch.
        context: rows of contexts to distil under, for conditional flows; those of ``data`` if not
            given.
        objective: ``"layers"``, ``"reverse_kl"``, ``"forward_kl"``, ``"z_reconstruction"``,
            ``"x_reconstruction"``, ``"mixed"`` (the reverse KL and halves of both reconstructions),
            or ``"auto"``: layer by layer where the layers match and are affine, which makes that
            loss an exact KL; else the forward KL first and the reverse KL last.
            ``pyroflows.distillation.objectives`` has the formulas. A second call goes on from where
            the first left the student, by another objective if you like.
        path: take the reverse KL's gradient along the paths of the draws alone; False for the plain
            one, which needs no inversion.
        max_steps: length of the schedule, rounded up to whole fifties, each followed by an
            evaluation.
        batch_size: draws a step, over all devices.
        checkpoint: a folder to keep checkpoints in, one an evaluation, or a ``pf.Checkpoint``,
            as in ``pf.fit``.
        progress: show both divergences, as in ``pf.fit``.
        compile: run objectives of one pass (layers, reconstructions) under ``torch.compile``.
        fabric: as in ``pf.fit``; by default one process where the student is.
        **recipe: numbers that are rarely changed, all with a default: ``lr``, the first step size
            (3e-3), which falls to zero as half a cosine; ``clip``, the largest gradient norm (5;
            steps that are not finite are skipped and counted); ``average``, the decay of the
            weights' exponential average (0.99); ``patience``, evaluations without a better student
            before stopping (20), counted once the last phase of the schedule has begun.

    Returns:
        The course of training: its ``val`` is minus the sum of both divergences at each evaluation,
        its ``curves`` are the two, in nats, and ``.plot()`` draws them.

    Raises:
        TypeError: an argument that there is not.
        ValueError: an argument of ``pf.compare``, or one that has moved; shapes, contexts or
            supports that differ, a student that samples slowly, a teacher whose parameters or own
            samples' scores are not finite, an argument out of range, or a checkpoint of another
            training. Nothing is trained then.
        DivergedError: no step was finite, also after three rollbacks.
        OSError: a checkpoint could not be written; the student holds its best weights so far.

    Example:
        >>> import pyroflows as pf
        >>> teacher = pf.maf(2, layers=1, hidden=(8,))
        >>> history = pf.distill(teacher, pf.student_of(teacher), max_steps=100, progress=False)
        >>> history.steps, list(history.curves)      # evaluations, each after 50 steps
        ([0, 1], ['reverse KL', 'forward KL'])
    """
    numbers = _checked(recipe, max_steps=max_steps, batch_size=batch_size)
    check_pair(teacher, student)
    check_objective(objective, teacher, student)
    rows, contexts = checked_data(teacher, data, context)
    check_scores(teacher, contexts.to(teacher.device))
    at = open_fabric(fabric, student)
    max_steps, batch_size = to_builtin(max_steps), to_builtin(batch_size)
    frozen = teacher.detached()
    if teacher.device != at.device:
        frozen = copy.deepcopy(frozen).to(at.device)
    frozen.eval()
    rows, contexts = at.to_device(rows), contexts.to(at.device)
    pairs = matched(frozen, student)
    phases = phases_of(objective, pairs)
    epochs = math.ceil(max_steps / EPOCH)
    evaluation = _Evaluation(frozen, student.to(at.device), contexts, at)
    settings = Settings(
        max_epochs=epochs,
        lr=numbers["lr"],
        weight_decay=0.0,
        clip=numbers["clip"],
        patience=numbers["patience"] + math.ceil(epochs * phases[-1].begin),
        average=numbers["average"],
        progress=progress and at.is_global_zero,
        label="distill",
        compile=compile,
        skip=True,
        curves=evaluation.curves,
        epsilon=1e-8,  # near the teacher the gradients that matter are small too
    )
    loss = Objectives(Task(frozen, student, pairs, evaluation.spread, path))
    size = max(1, batch_size // at.world_size)
    batches = Batches(frozen, contexts, rows, phases, epochs, size)
    identity = {"objective": objective, "path": path, "batch_size": batch_size, **numbers}
    facts = partial(_facts, frozen, student, rows, contexts, identity)
    state = [*student.state_dict().values(), *evaluation.draws]
    kept = open_checkpoints(checkpoint, facts, at, state)
    with kept as checkpoints, _training_alone(student, [pair.student for pair in pairs]):
        course = History(counted="evaluation", stride=EPOCH)
        history = optimise(student, loss, batches, evaluation, settings, at, checkpoints, course)
    student.eval()
    return history


def _checked(recipe: Mapping[str, Any], **sizes: int) -> dict[str, Any]:
    """All numbers of a recipe.

    Raises:
        TypeError: an argument that there is not.
        ValueError: one that has moved, or a number out of range.
    """
    numbers = complete(recipe, RECIPE, tuple(signature(distill).parameters), MOVED | COMPARED)
    check_whole(1, **sizes, patience=numbers["patience"])
    check_positive(lr=numbers["lr"], clip=numbers["clip"])
    check_share(average=numbers["average"])
    return numbers


def _facts(
    teacher: Flow, student: Flow, rows: Rows | None, contexts: Contexts, numbers: dict[str, Any]
) -> dict[str, Any]:
    """What a distillation is of."""
    return {
        "trainer": "distill",
        "student": facts_of_module(student),
        "teacher": {**facts_of_module(teacher), "values": digest_of(teacher)},
        "data": None if rows is None else rows.facts(),
        "contexts": facts_of(contexts.rows),
        **numbers,
    }


class _Evaluation:
    """Scores the student: minus the sum of both divergences, on fresh draws of the student."""

    def __init__(self, teacher: Flow, student: Flow, contexts: Contexts, fabric: Fabric) -> None:
        self.teacher = teacher
        self.student = student
        self.fabric = fabric
        self.context = contexts.draw(_DRAWS)
        self.draws = drawn(teacher, self.context, _DRAWS)
        self.last: dict[str, float] = {}
        spread = reduced(fabric, self.draws[0].std(dim=0), "mean")
        # The standard deviation of the teacher's draws in each coordinate; one where it is 0.
        self.spread = torch.where(spread > 0, spread, torch.ones_like(spread))

    @torch.no_grad()
    def __call__(self) -> float:
        mine = drawn(self.student, self.context, _DRAWS)
        reverse = divergence_on(mine, self.teacher, self.context).mean().item()
        forward = divergence_on(self.draws, self.student, self.context).mean().item()
        reverse, forward = mean_over(self.fabric, reverse, forward)
        self.last = {"reverse KL": reverse, "forward KL": forward}
        return -(reverse + forward)

    def state_dict(self) -> dict[str, Any]:
        """What it evaluates on."""
        return {name: getattr(self, name) for name in ("context", "draws", "spread")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Evaluate on the same again; the spread changes in place, as the objectives use it too."""
        self.spread.copy_(state["spread"])
        self.context, draws = self.fabric.to_device((state["context"], state["draws"]))
        self.draws = tuple(draws)

    def curves(self) -> dict[str, float]:
        """Both divergences at the last evaluation."""
        return self.last


@contextlib.contextmanager
def _training_alone(student: Flow, layers: list[Autoregressive]) -> Iterator[None]:
    """Train these layers, if there are any: base and what stands between are the teacher's already.

    Without them the whole student is trained.
    """
    trained = {id(parameter) for layer in layers for parameter in layer.parameters()}
    others = [p for p in student.parameters() if p.requires_grad and id(p) not in trained]
    frozen = others if layers else []
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
