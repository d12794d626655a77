"""How a student compares with its teacher: numbers, a table in words, a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from pyroflows.distillation import pictures
from pyroflows.infer.importance import khat_threshold
from pyroflows.training.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Estimate = tuple[float, float]  # a mean and its standard error


@dataclass
class Distillation:
    """How a student compares with its teacher; printable, with ``.plot()``; in nats.

    ``pf.compare`` makes it.

    Attributes:
        reverse_kl: ``E_student[log s - log t]`` and its standard error.
        forward_kl: ``E_teacher[log t - log s]`` and its standard error.
        layer_kl: for each pair of matched layers, base to data, the closed-form KL of teacher and
            student given the noise of the features before (``layer_loss`` has the formula), summed
            over features, and its standard error; None where layers do not match or are not affine.
        teacher_nats: mean log-density of the held-out rows under the teacher, or None.
        student_nats: the same under the student.
        gap: mean of ``log t - log s`` over the held-out rows and its (paired) standard error.
        ess: effective sample size of the weights t / s, as a share of the draws.
        khat: tail shape of these weights (PSIS); minus infinity where all are equal.
        draws: how many draws the estimates rest on.
        auc: how well a classifier tells the two's draws apart (0.5: not at all), or None.
        classifier_draws: draws of each that it saw, half of them held out.
        speeds: samples a second: ``"student"``, ``"teacher"`` (fast inversion) and ``"plain loop"``
            (a pass a feature; no more than 1,000 rows of it), each by size of the batch.
        baseline_nats: held-out score of a flow that was trained on the data directly, or None.
        baseline_gap: mean of ``log s - log baseline`` over the held-out rows and its paired
            standard error: positive where the student is better.
        history: of the distillation, where it was given.
        samples: draws of ``"teacher"`` and ``"student"``, for pictures.
        log_weights: ``log t - log s`` at the student's draws.

    Example:
        >>> import pyroflows as pf
        >>> teacher = pf.maf(2, layers=1, hidden=(8,))
        >>> student = pf.student_of(teacher)
        >>> few = dict(draws=200, classifier_draws=0, speed_batches=(1,))
        >>> report = pf.compare(teacher, student, **few)
        >>> report.draws, sorted(report.samples), report.gap     # no held-out rows were given
        (200, ['student', 'teacher'], None)
    """

    reverse_kl: Estimate
    forward_kl: Estimate
    layer_kl: list[Estimate] | None
    teacher_nats: float | None
    student_nats: float | None
    gap: Estimate | None
    ess: float
    khat: float
    draws: int
    auc: float | None
    classifier_draws: int
    speeds: dict[str, dict[int, float]]
    baseline_nats: float | None
    baseline_gap: Estimate | None
    history: History | None = field(repr=False)
    samples: dict[str, Tensor] = field(repr=False)
    log_weights: Tensor = field(repr=False)

    def __str__(self) -> str:
        lines = [
            ("reverse KL (student || teacher)", _plus_minus(self.reverse_kl)),
            ("forward KL (teacher || student)", _plus_minus(self.forward_kl)),
        ]
        if self.layer_kl is not None:
            shown = ", ".join(f"{mean:.3f}" for mean, _ in self.layer_kl)
            lines.append(("layers' KL, base to data", f"    {shown}"))
        lines.append(("weights teacher / student", self._weights()))
        if self.auc is not None:
            lines.append(("classifier's AUC", f"{self.auc:10.3f}  (0.5: cannot tell them apart)"))
        if self.gap is not None:
            lines += [
                ("teacher on held-out rows", f"{self.teacher_nats:10.3f} nats"),
                ("student on held-out rows", f"{self.student_nats:10.3f} nats"),
                ("gap", _plus_minus(self.gap)),
            ]
        if self.baseline_gap is not None:
            lines += [
                ("baseline, trained on the data", f"{self.baseline_nats:10.3f} nats"),
                ("student - baseline", f"{_plus_minus(self.baseline_gap)}: {self.verdict}"),
            ]
        for name, by_batch in self.speeds.items():
            if not by_batch or not all(map(math.isfinite, by_batch.values())):
                continue
            shown = ", ".join(f"{rate:,.0f} in batches of {n:,}" for n, rate in by_batch.items())
            lines.append((f"samples / s, {name}", f"    {shown}"))
        if self.history is not None:
            lines.append(("training", f"    {_training(self.history)}"))
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)

    @property
    def verdict(self) -> str:
        """Whether the student or the baseline is better on the held-out rows, in words."""
        if self.baseline_gap is None:
            return "no flow was trained on the data to compare with (baseline=seconds)"
        mean, error = self.baseline_gap
        if abs(mean) < 2 * error:
            return "no clear difference"
        if mean > 0:
            return "the student is better"
        return "the flow trained on the data is better"

    def _weights(self) -> str:
        threshold = khat_threshold(self.draws)
        trust = "can" if self.khat < threshold else "cannot"
        return (
            f"{self.ess:10.1%} effective, k-hat {self.khat:.2f}: they {trust} be trusted "
            f"(threshold {threshold:.2f})"
        )

    def plot(self) -> Figure:
        """Draws side by side, the weights, quantiles and speeds; with a history, the training."""
        import matplotlib.pyplot as plt

        above = "ttttttssssss" if self.history is None else "ccccttttssss"
        figure, axes = plt.subplot_mosaic(
            f"{above}\nwwwwqqqqvvvv", figsize=(12, 7), layout="constrained"
        )
        if self.history is not None:
            self.history.plot(axes["c"]).set(title="divergence in training")
        pictures.draw_samples([axes["t"], axes["s"]], self.samples)
        pictures.draw_weights(axes["w"], self.log_weights, self.khat)
        pictures.draw_quantiles(axes["q"], self.samples["teacher"], self.samples["student"])
        pictures.draw_speeds(axes["v"], self.speeds)
        return figure


def _training(history: History) -> str:
    skipped = f", {history.skipped} steps not finite and skipped" if history.skipped else ""
    back = f", {history.rollbacks} rollbacks" if history.rollbacks else ""
    return f"{history.seconds:.1f} s, {history.stopped}{skipped}{back}"


def _plus_minus(pair: Estimate) -> str:
    return f"{pair[0]:10.4f} +- {pair[1]:.4f}"
