"""What cannot be distilled or compared, said before anything is done."""

from __future__ import annotations

from typing import Any

import torch

from pyroflows._checks import check_positive, check_whole
from pyroflows.data.checks import (
    as_pair,
    check_is_flow,
    checked_context,
    checked_rows,
)
from pyroflows.data.rows import Rows
from pyroflows.distillation.draws import Contexts, drawn, scored
from pyroflows.distillation.pairs import matched
from pyroflows.distillation.schedule import CHOICES, phases_of
from pyroflows.distributions.flow import Flow
from pyroflows.flows.assembly import MARKED

_PROBES = 256
_HELD = 0.1  # share of the rows on which pf.fit judges a baseline
_JUDGED = 10  # draws of each flow that a classifier can be trained and judged on, at least


def check_alike(
    teacher: Flow, student: Flow, first: str = "teacher", second: str = "student"
) -> None:
    """Raise a ``ValueError`` where these are no two densities over the same rows.

    Args:
        teacher: one flow.
        student: the other.
        first: what errors call the one.
        second: what errors call the other.
    """
    check_is_flow(**{first: teacher, second: student})
    for what in ("event_shape", "context_shape"):
        mine, theirs = tuple(getattr(student, what)), tuple(getattr(teacher, what))
        if mine != theirs:
            raise ValueError(
                f"{second}: its {what} {mine} differs from the {first}'s {theirs}; "
                "pf.student_of(teacher) builds one that fits"
            )
    if repr(student.support) != repr(teacher.support):
        raise ValueError(
            f"{second}: its support {student.support} differs from the {first}'s {teacher.support};"
            " pf.student_of(teacher) builds one that fits"
        )
    if student.dtype != teacher.dtype:
        raise ValueError(
            f"{second}: its dtype {student.dtype} differs from the {first}'s "
            f"{teacher.dtype}; use {second}.to(dtype)"
        )
    for name, flow in ((first, teacher), (second, student)):
        bad = [n for n, p in flow.named_parameters() if not torch.isfinite(p).all()]
        if bad:
            raise ValueError(f"{name}: its parameters are not finite ({', '.join(bad[:5])})")


def check_pair(teacher: Flow, student: Flow) -> None:
    """Raise a ``ValueError`` where the student cannot learn to take the teacher's place."""
    check_alike(teacher, student)
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


def check_objective(objective: str, teacher: Flow, student: Flow) -> None:
    """Raise a ``ValueError`` for an unknown objective, or one for which the two do not fit."""
    if not isinstance(objective, str) or objective not in CHOICES:
        raise ValueError(f"objective: expected one of {CHOICES}, got {objective!r}")
    if objective == "layers" and not matched(teacher, student):
        raise ValueError(
            "objective: 'layers' needs a student whose layers match the teacher's, as "
            "pf.student_of(teacher) has for a teacher by pf.maf, pf.nsf or pf.wavenet; use 'auto'"
        )
    losses = {name for phase in phases_of(objective, []) for name in phase.weights}
    if losses & {"z_reconstruction", "x_reconstruction"}:
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


def check_baseline(
    baseline: float | Flow | None, student: Flow, data: Any, test: Rows | None
) -> None:
    """Raise a ``ValueError`` where a baseline can be neither trained nor judged."""
    if data is not None and not isinstance(baseline, (int, float)):
        raise ValueError(
            "data: only a baseline is trained on it; pass baseline=seconds too, or test=rows to "
            "score the flows on"
        )
    if baseline is None:
        return
    if test is None:
        raise ValueError("baseline: expected test= to score the flows on, got none")
    if not isinstance(baseline, (int, float)):
        check_alike(student, baseline, "student", "baseline")
        return
    check_positive(baseline=baseline)
    if data is None:
        raise ValueError("baseline: expected data= to train a flow on directly, got none")
    rows = checked_rows(student, *as_pair(data), name="data")
    if not round(_HELD * len(rows)):
        raise ValueError(
            f"baseline: expected enough data= to hold a tenth of them out, got {len(rows)} rows "
            "to train on; give more, or baseline=None"
        )
    if (student.config or {}).get("builder") not in MARKED:
        raise ValueError(
            "baseline: a fresh flow like the student is made by its builder, and it has none; "
            "train one yourself and pass baseline=flow"
        )


def checked_data(
    flow: Flow, data: Any, context: Any, name: str = "data"
) -> tuple[Rows | None, Contexts]:
    """Rows with their contexts, where there are any, and contexts to draw under."""
    rows = None
    if data is not None:
        x, context_of_rows = as_pair(data)
        both = context if context_of_rows is None else context_of_rows
        rows = checked_rows(flow, x, both, name=name)
    if context is not None or rows is None:
        return rows, Contexts(checked_context(flow, context))
    return rows, Contexts(rows.context)


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
