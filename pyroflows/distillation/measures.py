"""How close a student came to its teacher, measured: divergences, weights, a judge, speeds."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows.data.checks import reference
from pyroflows.data.rows import Rows
from pyroflows.distillation.objectives import layer_loss, lessons
from pyroflows.distillation.report import Distillation, Estimate
from pyroflows.distillation.student import matched, parts_of
from pyroflows.distributions.flow import Flow
from pyroflows.flows import builders
from pyroflows.infer.importance import effective_size, psis
from pyroflows.training.history import History
from pyroflows.training.likelihood import fit
from pyroflows.transforms import Autoregressive
from pyroflows.transforms.base import Inverse

_CHUNK = 10_000
_LOOP_ROWS = 1000
_SHOWN = 2000


def measure(
    teacher: Flow,
    student: Flow,
    contexts: Contexts,
    held: Rows | None,
    *,
    draws: int,
    classifier_draws: int,
    speed_batches: Sequence[int],
    baseline: Flow | None,
    history: History,
    course: list[tuple[int, float, float]],
) -> Distillation:
    """Draw from both flows and compare them: everything that the report says.

    Args:
        teacher: in eval mode.
        student: in eval mode.
        contexts: what to draw under.
        held: held-out rows, or None.
        draws: how many of each.
        classifier_draws: how many of each to train and judge a classifier on; 0 for none.
        speed_batches: sizes of the batches to draw by the clock.
        baseline: a flow trained on the data directly, or None.
        history: of the training.
        course: both divergences at each look during training.
    """
    context = contexts.draw(draws)
    theirs, mine = drawn(teacher, context, draws), drawn(student, context, draws)
    forward = divergence_on(theirs, student, context)
    reverse = divergence_on(mine, teacher, context)
    log_weights, khat = psis(-reverse)
    scores = {}
    if held is not None:
        flows = {"teacher": teacher, "student": student, "baseline": baseline}
        scores = {n: scored(f, *held.batch).double() for n, f in flows.items() if f is not None}
    nats = {name: score.mean().item() for name, score in scores.items()}
    rates = {
        name: {n: sampling_speed(flow, contexts, n) for n in speed_batches}
        for name, flow in (("student", student), ("teacher", teacher))
    }
    # Of more than 1,000 rows, whose speed a row is that of 1,000, it loops over these, once.
    looped = {n: min(n, _LOOP_ROWS) for n in speed_batches}
    loops = {n: plain_loop_speed(teacher, contexts, n) for n in dict.fromkeys(looped.values())}
    rates["plain loop"] = {n: loops[rows] for n, rows in looped.items()}
    return Distillation(
        reverse_kl=mean_and_error(reverse),
        forward_kl=mean_and_error(forward),
        layer_kl=layer_divergences(teacher, student, theirs[0], context),
        teacher_nats=nats.get("teacher"),
        student_nats=nats.get("student"),
        gap=mean_and_error(scores["teacher"] - scores["student"]) if scores else None,
        ess=effective_size(log_weights) / draws,
        khat=khat,
        draws=draws,
        auc=_auc(theirs[0], mine[0], context, classifier_draws),
        classifier_draws=classifier_draws,
        speeds=rates,
        baseline_nats=nats.get("baseline"),
        baseline_gap=(
            mean_and_error(scores["student"] - scores["baseline"]) if "baseline" in scores else None
        ),
        history=history,
        course=course,
        samples={"teacher": theirs[0][:_SHOWN].cpu(), "student": mine[0][:_SHOWN].cpu()},
        log_weights=-reverse.cpu(),
    )


def _auc(theirs: Tensor, mine: Tensor, context: Tensor | None, count: int) -> float | None:
    if not count:
        return None
    samples = [x[:count].flatten(1) for x in (theirs, mine)]
    if context is not None:
        samples = [torch.cat([x, context[:count].flatten(1)], dim=1) for x in samples]
    return two_sample_auc(*samples)


class Contexts:
    """Contexts to draw under: none, or random rows of those given."""

    def __init__(self, rows: Tensor | None) -> None:
        self.rows = rows

    def draw(self, n: int) -> Tensor | None:
        """``n`` of the rows, with replacement; None where there are none."""
        if self.rows is None:
            return None
        return self.rows[torch.randint(len(self.rows), (n,), device=self.rows.device)]


@torch.no_grad()
def drawn(flow: Flow, context: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """``n`` draws, one under each context, and their log-densities; in chunks, without a graph."""
    parts = []
    for start in range(0, n, _CHUNK):
        given = None if context is None else context[start : start + _CHUNK]
        shape = (min(_CHUNK, n - start),) if context is None else ()
        parts.append(flow(given, validate_args=False).rsample_and_log_prob(shape))
    x, log_prob = zip(*parts, strict=True)
    return torch.cat(x), torch.cat(log_prob)


@torch.no_grad()
def scored(flow: Flow, x: Tensor, context: Tensor | None) -> Tensor:
    """Log-densities in nats, in chunks, each row like any other value."""
    parts = Rows(x.clone(), context).chunks(_CHUNK)
    return torch.cat([flow(p.context, validate_args=False).log_prob(p.x) for p in parts])


def divergence_on(draws: tuple[Tensor, Tensor], other: Flow, context: Tensor | None) -> Tensor:
    """``log p(x) - log q(x)`` for each draw x of p: its mean is KL(p || q)."""
    x, log_p = draws
    return log_p - scored(other, x, context)


def mean_and_error(values: Tensor) -> Estimate:
    """The mean and its standard error."""
    values = values.double()
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


@torch.no_grad()
def layer_divergences(
    teacher: Flow, student: Flow, x: Tensor, context: Tensor | None
) -> list[Estimate] | None:
    """The closed-form KL of each pair of matched Gaussian layers at the teacher's points."""
    pairs = matched(teacher, student)
    if not pairs or not all(pair.gaussian for pair in pairs):
        return None
    taught = lessons(teacher, pairs, x, context)
    return [mean_and_error(layer_loss(pair, *lesson, context)) for pair, *lesson in taught]


def two_sample_auc(first: Tensor, second: Tensor, seed: int = 0) -> float:
    """How well gradient-boosted trees tell two samples apart: 0.5 if not at all, 1 if always.

    scikit-learn's ``HistGradientBoostingClassifier``, trained on one half of the rows and judged on
    the other (Lopez-Paz & Oquab 2017, arXiv:1610.06545).

    Args:
        first: ``(rows, *event)``.
        second: the same of the other sample.
        seed: of the split and of the trees.
    """
    import numpy as np
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score

    rows = torch.cat([first.flatten(1), second.flatten(1)]).double().cpu().numpy()
    label = np.repeat([0, 1], [len(first), len(second)])
    order = np.random.default_rng(seed).permutation(len(rows))
    train, test = order[::2], order[1::2]
    judge = HistGradientBoostingClassifier(random_state=seed).fit(rows[train], label[train])
    return float(roc_auc_score(label[test], judge.predict_proba(rows[test])[:, 1]))


def speed(draw: Callable[[], Tensor], n: int, repeats: int = 5) -> float:
    """Samples a second: the fastest of a few calls that draw ``n``, after one to warm up.

    What else the machine does then matters little.
    """
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        x = draw()
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        seconds.append(time.perf_counter() - begin)
    return n / min(seconds[1:])


def sampling_speed(flow: Flow, contexts: Contexts, n: int) -> float:
    """Samples a second in batches of ``n``."""
    context = contexts.draw(n)
    return speed(lambda: drawn(flow, context, n)[0], n, repeats=5 if n > 1 else 20)


def plain_loop_speed(flow: Flow, contexts: Contexts, n: int) -> float:
    """The same by the textbook's inversion: a whole pass of each net for every feature.

    NaN for flows without a layer to invert.
    """
    parts = parts_of(flow)
    if not any(_is_slow(part) for part in parts):
        return math.nan
    context = contexts.draw(n)

    @torch.no_grad()
    def draw() -> Tensor:
        x = flow(context, validate_args=False).base_dist.sample((n,) if context is None else ())
        for part in parts:
            if _is_slow(part):
                x = plain_inverse(part.transform, x, context)
            else:
                x = part.forward_and_log_det(x, context)[0]
        return x

    return speed(draw, n, repeats=1)


def plain_inverse(layer: Autoregressive, y: Tensor, context: Tensor | None) -> Tensor:
    """``x`` with ``layer(x) = y``, by one pass of the net a feature, in the net's order."""
    x = y.clone()
    order = range(y.shape[-1])
    for i in reversed(order) if getattr(layer.net, "descending", False) else order:
        x[..., i] = layer.family.inverse(y, layer.net(x, context))[0][..., i]
    return x


def _is_slow(part: object) -> bool:
    return isinstance(part, Inverse) and isinstance(part.transform, Autoregressive)


def untrained(student: Flow) -> Flow:
    """A fresh flow like the student, without the teacher; a copy of one made elsewhere."""
    build = builders().get((student.config or {}).get("builder"))
    if build is None:
        return copy.deepcopy(student)
    return build(**copy.deepcopy(student.config["arguments"])).to(reference(student))


def fit_for(seconds: float, flow: Flow, rows: Rows, **devices: Any) -> None:
    """Maximum likelihood for about so many seconds; the schedule is cut to the time there is.

    It takes the whole of it, without a stop before. The first epoch, by which the others are
    counted, has the set-up in it; so it takes less time rather than more.

    Args:
        seconds: of wall-clock.
        flow: what to train, in place.
        rows: data and context.
        **devices: arguments of ``pf.fit``.
    """
    begin = time.perf_counter()
    fit(copy.deepcopy(flow), rows.x, rows.context, max_epochs=1, progress=False, **devices)
    an_epoch = time.perf_counter() - begin
    epochs = max(1, round(seconds / an_epoch))
    x, context = rows.batch
    fit(flow, x, context, max_epochs=epochs, patience=epochs, progress=False, **devices)
