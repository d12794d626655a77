"""Probability density distillation: a flow that samples fast, trained on one that scores fast.

A MAF scores in one pass and an IAF samples in one. The student draws x, scores its own draws for
free, and the teacher scores them in one pass: the reverse KL needs no slow direction at all (van
den Oord et al. 2018, arXiv:1711.10433). On its own it drops modes, and it starts where the
teacher's density means nothing (Huang et al. 2019, PMLR 115): the teacher's samples come first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.distillation import Contexts, Distillation, divergence_on, draw, drawn, report
from pyroflows.distribution import Flow
from pyroflows.flows import iaf, nsf, wavenet
from pyroflows.rows import Batch, as_pair, checked_rows, reference
from pyroflows.training import Settings, open_fabric, optimise
from pyroflows.transforms import Standardize

if TYPE_CHECKING:
    pass

_EPOCH = 50  # steps between two looks at the student


def student_of(teacher: Flow, **changes: Any) -> Flow:
    """An untrained student for a teacher: its architecture, turned to sample in one pass.

    Layers, widths, mixing and order are the teacher's, so that each layer of the student has one of
    the teacher's to learn; its standardisation is copied.

    Args:
        teacher: a flow over vectors; one made by ``pf.maf``, ``pf.wavenet`` or
            ``pf.nsf(scheme="autoregressive")`` is matched layer by layer, any other gets an IAF of
            default size.
        **changes: arguments of the student's builder to set otherwise, for example ``hidden``.

    Raises:
        ValueError: the teacher's events are not vectors.

    Example:
        >>> import pyroflows as pf
        >>> pf.student_of(pf.maf(3, layers=2)).fast
        'sample'
    """
    if len(teacher.event_shape) != 1:
        raise ValueError(
            f"teacher: expected a flow over vectors, got events of {tuple(teacher.event_shape)}"
        )
    name = (teacher.config or {}).get("builder")
    arguments = dict((teacher.config or {}).get("arguments", {}))
    if name == "nsf" and arguments.get("scheme") == "autoregressive":
        build, arguments["fast"] = nsf, "sample"
    elif name == "wavenet":
        build, arguments["fast"] = wavenet, "sample"
    elif name in ("maf", "iaf"):
        build = iaf
    else:
        build = iaf
        kept = ("features", "context", "support")
        arguments = {k: v for k, v in arguments.items() if k in kept}
        arguments.setdefault("features", teacher.event_shape[0])
        arguments.setdefault("context", sum(teacher.context_shape))
        unbounded = teacher.support is constraints.real_vector
        arguments.setdefault("support", None if unbounded else teacher.support)
    # A base given as a module is copied: the student's may be trained and moved.
    student = build(**{**copy.deepcopy(arguments), **changes}).to(reference(teacher))
    copy_standardisation(teacher, student)
    return student


def copy_standardisation(teacher: Flow, student: Flow) -> None:
    """Give the student's ``Standardize`` the teacher's location and scale, where both have one."""
    pair = [
        next((m for m in flow.transform.modules() if isinstance(m, Standardize)), None)
        for flow in (teacher, student)
    ]
    if None not in pair and pair[0].loc.shape == pair[1].loc.shape:
        pair[1].load_state_dict(pair[0].state_dict())


class _Loss(nn.Module):
    """The objective of a step: pairs (noise, teacher sample) first, the reverse KL later."""

    def __init__(self, teacher: Flow, student: Flow, contexts: Contexts, batch_size: int) -> None:
        super().__init__()
        self.student = student
        self.batch_size = batch_size
        # Not sub-modules: neither is trained, moved or switched by whoever trains this module.
        self.__dict__.update(teacher=teacher, contexts=contexts)

    def forward(self, pairs_share: float) -> Tensor:
        """``pairs_share`` of the pair loss and the rest of the reverse KL."""
        context = self.contexts.draw(self.batch_size)
        loss = torch.zeros((), device=reference(self.student).device)
        if pairs_share > 0:
            loss = loss + pairs_share * self._pairs(context)
        if pairs_share < 1:
            x, log_s = draw(self.student, context, self.batch_size)
            log_t = self.teacher(context, validate_args=False).log_prob(x)
            loss = loss + (1 - pairs_share) * (log_s - log_t).mean()
        return loss

    def _pairs(self, context: Tensor | None) -> Tensor:
        """Forward KL on teacher samples: finds every mode, and is finite from the start."""
        with torch.no_grad():
            x, _ = draw(self.teacher, context, self.batch_size)
        return -self.student(context, validate_args=False).log_prob(x).mean()


class _Schedule:
    """``_EPOCH`` steps an epoch; the share of the pair loss falls from one to zero midway."""

    def __init__(self, epochs: int, warm: float) -> None:
        self.epochs = epochs
        self.warm = warm
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[float]]:
        for step in range(_EPOCH):
            done = (self.epoch + step / _EPOCH) / self.epochs
            # A quarter of the schedule blends one into the other.
            yield (min(max((self.warm + 0.125 - done) / 0.25, 0.0), 1.0),)
        self.epoch += 1

    def __len__(self) -> int:
        return _EPOCH


def distill(
    teacher: Flow,
    student: Flow,
    *,
    data: Any = None,
    context: Any = None,
    max_steps: int = 3000,
    batch_size: int = 256,
    lr: float = 1e-3,
    clip: float = 5.0,
    warm: float = 0.5,
    average: float = 0.99,
    patience: int = 20,
    progress: bool = True,
    compile: bool = False,
    accelerator: str | None = None,
    devices: int | str | list[int] = 1,
    strategy: str = "auto",
    precision: str | None = None,
    num_nodes: int = 1,
) -> Distillation:
    """Train a student that samples fast to have a teacher's density, in place; report how close.

    Forward KL on teacher samples first, which finds every mode, then reverse KL on the student's
    own samples. The teacher is used in eval mode through a frozen view and left exactly as it was.

    Args:
        teacher: any trained flow.
        student: a flow of the same shape whose ``fast`` is ``"sample"`` or ``"both"``, such as
            ``pf.student_of(teacher)``.
        data: held-out rows, or a pair (rows, context), on which the report compares both; they are
            not trained on.
        context: rows of contexts to distil under, for conditional flows; those of ``data`` if not
            given.
        max_steps: length of the schedule.
        batch_size: draws a step.
        lr: first step size; falls to zero as half a cosine.
        clip: largest gradient norm.
        warm: the share of the schedule by which the forward KL has given way to the reverse.
        average: decay of the weights' exponential average.
        patience: looks (every 50 steps) without a better student before stopping.
        progress: show a progress bar.
        compile: run the step under ``torch.compile``.
        accelerator: as in Lightning Fabric; by default where the student is.
        devices: as in Fabric.
        strategy: as in Fabric.
        precision: as in Fabric.
        num_nodes: as in Fabric.

    Returns:
        Both divergences with standard errors, scores on ``data``, and speeds.

    Raises:
        ValueError: shapes, contexts or supports that differ, a student that samples slowly, a
            teacher whose parameters or own samples' scores are not finite. Nothing is trained then.
        DivergedError: the loss was not finite again after three rollbacks.

    Example:
        >>> import pyroflows as pf
        >>> teacher = pf.maf(2, layers=1, hidden=(8,))
        >>> report = pf.distill(teacher, pf.student_of(teacher), max_steps=50, progress=False)
        >>> abs(report.reverse_kl[0]) < 0.1
        True
    """
    if max_steps < 1 or batch_size < 1 or lr <= 0 or clip <= 0:
        raise ValueError(
            "max_steps, batch_size, lr, clip: expected positive numbers, got "
            f"{max_steps}, {batch_size}, {lr}, {clip}"
        )
    if not 0 <= warm <= 1:
        raise ValueError(f"warm: expected a share in [0, 1], got {warm}")
    held, rows = _check(teacher, student, data, context)
    fabric = open_fabric(
        reference(student),
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        precision=precision,
        num_nodes=num_nodes,
    )
    frozen = teacher.detached()
    if reference(teacher).device != fabric.device:
        frozen = copy.deepcopy(frozen).to(fabric.device)
    frozen.eval()
    contexts = Contexts(None if rows is None else fabric.to_device(rows))
    epochs = math.ceil(max_steps / _EPOCH)
    settings = Settings(
        max_epochs=epochs,
        lr=lr,
        weight_decay=0.0,
        clip=clip,
        patience=max(patience, round(epochs * min(warm + 0.2, 1.0))),
        average=average,
        progress=progress and fabric.is_global_zero,
        label="distill",
        compile=compile,
    )
    loss = _Loss(frozen, student, contexts, max(1, batch_size // fabric.world_size))
    judge_context = contexts.draw(2000)
    with torch.no_grad():
        judged = draw(frozen, judge_context, 2000)

    def evaluate() -> float:
        forward = divergence_on(judged, student, judge_context)
        reverse = divergence_on(drawn(student, judge_context, 2000), frozen, judge_context)
        return -(forward.mean() + reverse.mean()).item()

    schedule = _Schedule(epochs, warm)
    history = optimise(student, loss, schedule, evaluate, settings, fabric)
    student.eval()
    held = fabric.to_device(held)
    return report(frozen, student, contexts, held, history)


def _check(
    teacher: Flow, student: Flow, data: Any, context: Any
) -> tuple[Batch | None, Tensor | None]:
    """The held-out rows and the contexts to draw under, or an error before any step."""
    for what in ("event_shape", "context_shape"):
        mine, theirs = tuple(getattr(student, what)), tuple(getattr(teacher, what))
        if mine != theirs:
            raise ValueError(
                f"student: its {what} {mine} differs from the teacher's {theirs}; "
                "pf.student_of(teacher) builds one that fits"
            )
    if repr(student.support) != repr(teacher.support):
        raise ValueError(
            f"student: its support {student.support} differs from the teacher's {teacher.support}"
        )
    if reference(student).dtype != reference(teacher).dtype:
        raise ValueError(
            f"student: its dtype {reference(student).dtype} differs from the teacher's "
            f"{reference(teacher).dtype}; use student.to(dtype)"
        )
    if student.fast not in ("sample", "both"):
        raise ValueError(
            f"student: expected a flow that samples in one pass, got fast={student.fast!r}; "
            "use pf.student_of(teacher) or pf.iaf"
        )
    bad = [n for n, p in teacher.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise ValueError(f"teacher: its parameters are not finite ({', '.join(bad[:5])})")
    held = None
    if data is not None:
        x, given = as_pair(data)
        held = checked_rows(teacher, x, context if given is None else given, name="data")
    rows = held[1] if held is not None else None
    if teacher.context_shape and rows is None:
        if context is None:
            raise ValueError("context: a conditional teacher needs contexts to be distilled under")
        rows = torch.as_tensor(context).to(reference(teacher))
    with torch.no_grad():
        sample_context = Contexts(rows).draw(256)
        x, log_t = drawn(teacher, sample_context, 256)
    if not (torch.isfinite(x).all() and torch.isfinite(log_t).all()):
        raise ValueError("teacher: it scores its own samples as NaN or infinite")
    return held, rows
