"""What cannot be distilled, said before any step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyroflows._checks import check_whole
from pyroflows.data.checks import (
    as_pair,
    check_is_flow,
    checked_context,
    checked_rows,
    reference,
)
from pyroflows.data.rows import Rows
from pyroflows.distillation.measures import Contexts, drawn, scored
from pyroflows.distillation.schedule import CHOICES
from pyroflows.distillation.student import matched
from pyroflows.distributions.flow import Flow

_PROBES = 256
_HELD = 0.1
_JUDGED = 10  # draws of each flow that a classifier can be trained and judged on, at least


def check_pair(teacher: Flow, student: Flow) -> None:
    """Raise a ``ValueError`` where the student cannot take the teacher's place."""
    check_is_flow(teacher=teacher, student=student)
    for what in ("event_shape", "context_shape"):
        mine, theirs = tuple(getattr(student, what)), tuple(getattr(teacher, what))
        if mine != theirs:
            raise ValueError(
                f"student: its {what} {mine} differs from the teacher's {theirs}; "
                "pf.student_of(teacher) builds one that fits"
            )
    if repr(student.support) != repr(teacher.support):
        raise ValueError(
            f"student: its support {student.support} differs from the teacher's {teacher.support}; "
            "pf.student_of(teacher) builds one that fits"
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
    shared = {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}
    if shared:
        raise ValueError(
            f"student: it shares {len(shared)} parameters with the teacher, which must not change; "
            "use pf.student_of(teacher) or copy.deepcopy"
        )
    for name, flow in (("teacher", teacher), ("student", student)):
        bad = [n for n, p in flow.named_parameters() if not torch.isfinite(p).all()]
        if bad:
            raise ValueError(f"{name}: its parameters are not finite ({', '.join(bad[:5])})")


def check_objective(objective: str, teacher: Flow, student: Flow) -> None:
    """Raise a ``ValueError`` for an unknown objective, or one for which the two do not fit."""
    if not isinstance(objective, str) or objective not in CHOICES:
        raise ValueError(f"objective: expected one of {CHOICES}, got {objective!r}")
    if objective == "layers" and not matched(teacher, student):
        raise ValueError(
            "objective: 'layers' needs a student whose layers match the teacher's, as "
            "pf.student_of(teacher) has for a teacher by pf.maf, pf.nsf or pf.wavenet; use 'auto'"
        )
    if objective in ("z_reconstruction", "x_reconstruction", "mixed"):
        mine, theirs = (
            tuple(flow.transform.inverse_shape(flow.event_shape)) for flow in (student, teacher)
        )
        if mine != theirs:
            raise ValueError(
                f"objective: {objective!r} pairs the same z in both flows, but the student's base "
                f"has shape {mine}, the teacher's {theirs}; use 'auto' or 'forward_kl'"
            )


def check_sizes(sizes: Any) -> None:
    """Raise a ``ValueError`` where these are no sizes of batches to draw by the clock."""
    if not isinstance(sizes, (tuple, list)) or not sizes:
        raise ValueError(f"speed_batches: expected a tuple of sizes, got {sizes!r}")
    check_whole(1, **{f"speed_batches[{i}]": size for i, size in enumerate(sizes)})


def check_draws(draws: int, classifier_draws: int) -> None:
    """Raise a ``ValueError`` where there are too few to compare two flows by."""
    check_whole(_JUDGED, draws=draws)
    check_whole(0, classifier_draws=classifier_draws)
    if 0 < classifier_draws < _JUDGED:
        raise ValueError(
            f"classifier_draws: expected 0 for no classifier, or at least {_JUDGED}, got "
            f"{classifier_draws}"
        )


def check_baseline(rows: Rows | None) -> None:
    """Raise a ``ValueError`` where no flow can be trained on the data directly."""
    if rows is None:
        raise ValueError("baseline: expected data= to train a flow on directly, got none")
    if not round(_HELD * len(rows)):
        raise ValueError(
            f"baseline: expected enough data= to hold a tenth of them out, got {len(rows)} rows "
            "to train on; give more, or baseline=False"
        )


def checked_data(
    teacher: Flow, data: Any, test: Any, context: Any
) -> tuple[Rows | None, Rows | None, Tensor | None]:
    """Rows to learn from, held-out rows, and contexts to draw under.

    A tenth of the data is held out where no test rows are given.
    """
    rows = held = None
    if data is not None:
        x, given = as_pair(data)
        rows = checked_rows(teacher, x, context if given is None else given, name="data")
    if test is not None:
        held = checked_rows(teacher, *as_pair(test), name="test")
    elif rows is not None and round(_HELD * len(rows)) > 0:
        rows, held = rows.split(_HELD, seed=0)
    known = next((r.context for r in (rows, held) if r is not None), None)
    if context is not None or known is None:
        known = checked_context(teacher, context)
    return rows, held, None if known is None else known.to(reference(teacher).device)


def check_scores(teacher: Flow, contexts: Contexts) -> None:
    """Raise a ``ValueError`` where the teacher's own samples or their scores are not finite."""
    context = contexts.draw(_PROBES)
    x, log_prob = drawn(teacher, context, _PROBES)
    if torch.isfinite(x).all() and torch.isfinite(log_prob).all():
        again = scored(teacher, x, context)
        if torch.isfinite(again).all():
            return
    raise ValueError(
        "teacher: it scores its own samples as NaN or infinite; train it again with a smaller lr "
        "or bound, or in float64"
    )
