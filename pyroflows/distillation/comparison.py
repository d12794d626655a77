"""``pf.compare``: how close a student came to its teacher, and how fast it is."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows._checks import check_whole, to_builtin
from pyroflows.data.checks import as_pair
from pyroflows.data.rows import Rows
from pyroflows.distillation.checks import (
    check_alike,
    check_baseline,
    check_draws,
    check_scores,
    check_sizes,
    checked_data,
)
from pyroflows.distillation.draws import Contexts, divergence_on, drawn, scored
from pyroflows.distillation.measures import (
    layer_divergences,
    mean_and_error,
    plain_loop_speed,
    sampling_speed,
    two_sample_auc,
)
from pyroflows.distillation.report import Distillation, Estimate
from pyroflows.distributions.flow import Flow
from pyroflows.flows.assembly import rebuilt
from pyroflows.infer.importance import effective_size, psis
from pyroflows.training.history import History
from pyroflows.training.likelihood import fit

_LOOP_ROWS = 1000
_SHOWN = 2000


def compare(
    teacher: Flow,
    student: Flow,
    test: Any = None,
    context: Any = None,
    *,
    draws: int = 10_000,
    classifier_draws: int = 2000,
    speed_batches: Sequence[int] = (1, 1000, 10_000),
    data: Any = None,
    baseline: float | Flow | None = None,
    history: History | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Distillation:
    """Say how close a student is to its teacher, and how fast both draw.

    Both are used in eval mode through frozen views and left exactly as they were; any two flows
    over the same rows can be compared. Draws and scores many rows with each, some of them in its
    slow direction, and the speeds take a few seconds more.

    Args:
        teacher: the flow whose density is wanted.
        student: the flow that is to have it, such as ``pf.distill`` has trained.
        test: held-out rows, or a pair (rows, context), on which both are scored.
        context: rows of contexts to draw under, for conditional flows; those of ``test`` if not
            given.
        draws: of each flow, at least 10.
        classifier_draws: of each flow for the classifier two-sample test, at least 10 and at most
            ``draws``; 0 for none.
        speed_batches: sizes of the batches that both draw by the clock.
        data: rows, or a pair (rows, context), to train a baseline on.
        baseline: seconds for which a fresh flow like the student is trained on ``data`` by maximum
            likelihood, to be compared with it on ``test``: as many epochs as fit in them by the
            clock of a first one. ``history.seconds`` is what the distillation took. Or a flow that
            you trained yourself.
        history: of the distillation, as ``pf.distill`` returns it, for the report to show.
        seed: of the classifier.
        progress: show the training of the baseline, as in ``pf.fit``.

    Returns:
        Divergences with standard errors, importance weights, scores on held-out rows, a two-sample
        test, speeds.

    Raises:
        ValueError: shapes, contexts, supports or dtypes that differ, parameters or a teacher's own
            samples' scores that are not finite, a baseline that cannot be trained or
            judged, or an argument out of range.

    Example:
        >>> import pyroflows as pf
        >>> teacher = pf.maf(2, layers=1, hidden=(8,))
        >>> student = pf.student_of(teacher)       # one that pf.distill would train
        >>> report = pf.compare(teacher, student, draws=1000, speed_batches=(1000,))
        >>> abs(report.reverse_kl[0]) < 0.1
        True
    """
    check_draws(draws, classifier_draws)
    check_sizes(speed_batches)
    check_whole(0, seed=seed)
    check_alike(teacher, student)
    rows, contexts = checked_data(student, test, context, name="test")
    baseline = to_builtin(baseline)
    check_baseline(baseline, student, data, rows)
    device = student.device
    contexts = contexts.to(device)
    check_scores(_view(teacher, device), contexts)
    if isinstance(baseline, (int, float)):
        baseline = fitted_like(student, data, baseline, progress)
    flows = {"teacher": teacher, "student": student, "baseline": baseline}
    views = {name: _view(flow, device) for name, flow in flows.items() if flow is not None}
    return Distillation(
        **_divergences(views, contexts, to_builtin(draws), to_builtin(classifier_draws), seed),
        **_scores(views, None if rows is None else rows.to(device)),
        speeds=_speeds(views, contexts, [to_builtin(size) for size in speed_batches]),
        history=history,
    )


def _view(flow: Flow, device: torch.device) -> Flow:
    """The flow in eval mode and without gradients, on a device; it stays as it is itself."""
    view = flow.detached()
    if flow.device != device:
        view = copy.deepcopy(view).to(device)
    return view.eval()


def _divergences(
    flows: dict[str, Flow], contexts: Contexts, draws: int, classifier_draws: int, seed: int
) -> dict[str, Any]:
    """What draws of both, and their scores, say."""
    teacher, student = flows["teacher"], flows["student"]
    context = contexts.draw(draws)
    theirs, mine = drawn(teacher, context, draws), drawn(student, context, draws)
    forward = divergence_on(theirs, student, context)
    reverse = divergence_on(mine, teacher, context)
    log_weights, khat = psis(-reverse)
    seen = min(classifier_draws, draws)
    return {
        "reverse_kl": mean_and_error(reverse),
        "forward_kl": mean_and_error(forward),
        "layer_kl": layer_divergences(teacher, student, theirs[0], context),
        "ess": effective_size(log_weights) / draws,
        "khat": khat,
        "draws": draws,
        "auc": _auc(theirs[0][:seen], mine[0][:seen], context, seed) if seen else None,
        "classifier_draws": seen,
        "samples": {"teacher": theirs[0][:_SHOWN].cpu(), "student": mine[0][:_SHOWN].cpu()},
        "log_weights": -reverse.cpu(),
    }


def _auc(theirs: Tensor, mine: Tensor, context: Tensor | None, seed: int) -> float:
    samples = [x.flatten(1) for x in (theirs, mine)]
    if context is not None:
        samples = [torch.cat([x, context[: len(x)].flatten(1)], dim=1) for x in samples]
    return two_sample_auc(samples[0], samples[1], seed)


def _scores(flows: dict[str, Flow], rows: Rows | None) -> dict[str, Any]:
    """What the held-out rows score, and the paired differences."""
    scores = {}
    if rows is not None:
        scores = {name: scored(flow, *rows.batch).double() for name, flow in flows.items()}

    def gap(first: str, second: str) -> Estimate | None:
        both = first in scores and second in scores
        return mean_and_error(scores[first] - scores[second]) if both else None

    nats = {name: score.mean().item() for name, score in scores.items()}
    return {
        "teacher_nats": nats.get("teacher"),
        "student_nats": nats.get("student"),
        "gap": gap("teacher", "student"),
        "baseline_nats": nats.get("baseline"),
        "baseline_gap": gap("student", "baseline"),
    }


def _speeds(
    flows: dict[str, Flow], contexts: Contexts, sizes: list[int]
) -> dict[str, dict[int, float]]:
    """Samples a second by flow and by size of the batch."""
    rates = {
        name: {size: sampling_speed(flows[name], contexts, size) for size in sizes}
        for name in ("student", "teacher")
    }
    # Of more than 1,000 rows, whose speed a row is that of 1,000, it loops over these, once.
    looped = {size: min(size, _LOOP_ROWS) for size in sizes}
    counts = dict.fromkeys(looped.values())
    loops = {rows: plain_loop_speed(flows["teacher"], contexts, rows) for rows in counts}
    return {**rates, "plain loop": {size: loops[rows] for size, rows in looped.items()}}


def fitted_like(student: Flow, data: Any, seconds: float, progress: bool = False) -> Flow:
    """A fresh flow like the student, trained on rows by maximum likelihood for about so long.

    It takes all of the seconds, without a stop before. The first epoch, by which the others are
    counted, has the set-up in it; so it takes less time rather than more.

    Args:
        student: a flow made by a builder.
        data: rows, or a pair (rows, context).
        seconds: of wall-clock.
        progress: as in ``pf.fit``.
    """
    flow = rebuilt(student.config or {}).to(student.device, student.dtype)
    x, context = as_pair(data)
    begin = time.perf_counter()
    fit(copy.deepcopy(flow), x, context, max_epochs=1, progress=False)
    an_epoch = time.perf_counter() - begin
    epochs = max(1, round(seconds / an_epoch))
    fit(flow, x, context, max_epochs=epochs, patience=epochs, progress=progress)
    return flow
