"""What happened during training, as numbers and as a picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyroflows.discrete.levels import bits_per_dim
from pyroflows.distributions.flow import Flow
from pyroflows.training.state import Many, Named

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What is in a history's lists, for ``training.state.check_like``.
LINES = {
    "steps": Many(0),
    "train": Many(0.0),
    "val": Many(0.0),
    "curves": Named(Many(0.0)),
    "lr": Many(0.0),
}
_FLOOR = 1e-4  # where curves are drawn at least: an estimate of a small divergence may be negative


@dataclass
class History:
    """The course of a training run.

    Attributes:
        unit: what ``train`` and ``val`` are measured in: nats (per row, or of the ELBO), or
            ``"bits/dim"``.
        per_nat: one nat in that unit; negative where lower is better, as for bits per dimension.
        counted: what ``steps`` counts: ``"epoch"``, ``"evaluation"`` for a distillation,
            ``"step"`` of the optimiser for a guide.
        stride: steps of the optimiser from one of these to the next, where that is fixed: 50 for a
            distillation.
        steps: at which a line was recorded.
        train: mean training score at each.
        val: mean validation score at each, or the ELBO of the parameters that may be kept; empty
            where nothing was held out or measured.
        curves: further numbers at each, by name: both divergences of a distillation, in nats.
        lr: step size at each.
        best: index of the line whose weights were kept.
        stopped: why training ended, in words.
        rollbacks: how often a non-finite loss sent it back to its best weights.
        skipped: how many non-finite steps were not applied.
        taken: how many steps there were, these among them.
        left_out: how many rows far outside all others ``fit`` left out, as this process saw.
        seconds: how long it took, by the clock.

    Example:
        >>> history = History(stopped="max_epochs reached")
        >>> for epoch, train, val in [(1, -2.5, -2.6), (2, -2.1, -2.4), (3, -1.9, -2.5)]:
        ...     history.record(epoch, train, val, lr=1e-3)
        ...     if history.improved():
        ...         history.best = len(history.steps) - 1
        >>> history
        History(3 lines, best -2.400 nats at 2, max_epochs reached, 0.0 s)
    """

    unit: str = "nats"
    per_nat: float = 1.0
    counted: str = "epoch"
    stride: int = 1
    steps: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    val: list[float] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    lr: list[float] = field(default_factory=list)
    best: int = 0
    stopped: str = ""
    rollbacks: int = 0
    skipped: int = 0
    taken: int = 0
    left_out: int = 0
    seconds: float = 0.0

    def record(
        self,
        step: int,
        train: float,
        val: float | None,
        lr: float,
        curves: dict[str, float] | None = None,
    ) -> None:
        """Add a line; the scores are given in nats, the curves as they are kept."""
        self.steps.append(step)
        self.train.append(train * self.per_nat)
        self.lr.append(lr)
        if val is not None:
            self.val.append(val * self.per_nat)
        for name, value in (curves or {}).items():
            self.curves.setdefault(name, []).append(value)

    @property
    def is_whole(self) -> bool:
        """Whether each line has all that the others have, and one of them is the best."""
        count = len(self.steps)
        lists = [self.train, self.lr, *([self.val] if self.val else []), *self.curves.values()]
        return all(len(each) == count for each in lists) and self.best < max(count, 1)

    @property
    def score(self) -> float:
        """The score of the weights that were kept, in ``unit``; validation where there is one."""
        return (self.val or self.train)[self.best]

    def improved(self) -> bool:
        """Whether the last line's score is better than that of the weights that are kept."""
        last = (self.val or self.train)[-1]
        return len(self.steps) == 1 or (last - self.score) * self.per_nat > 0

    def plot(self, ax: Axes | None = None) -> Axes:
        """Scores over the steps, or the curves where there are any, the kept weights marked.

        Args:
            ax: matplotlib axes to draw on; a new figure by default.
        """
        import matplotlib.pyplot as plt
        from matplotlib.ticker import MaxNLocator

        if ax is None:
            _, ax = plt.subplots(figsize=(6, 4), layout="constrained")
        strides = self.stride > 1  # of which the one numbered 0 is after as many steps
        steps = [(step + 1) * self.stride for step in self.steps] if strides else self.steps
        marker = "o" if len(steps) == 1 else None  # no line joins a single point
        if self.curves:
            for name, values in self.curves.items():
                shown = [max(value, _FLOOR) for value in values]
                ax.plot(steps, shown, label=name, marker=marker)
            ax.set(yscale="log", ylabel="nats")
        else:
            ax.plot(steps, self.train, label="train", color="tab:blue", lw=1, marker=marker)
            if self.val:
                ax.plot(steps, self.val, label=self._val_label, color="tab:orange", marker=marker)
            self._leave_out_the_first(ax)
            ax.set(ylabel=self.unit)
        if steps:
            ax.axvline(steps[self.best], color="grey", ls=":", label="weights kept")
        ax.set(xlabel="step" if strides else self.counted)
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        ax.legend()
        return ax

    @property
    def _val_label(self) -> str:
        return "measured" if self.counted == "step" else "validation"

    def _leave_out_the_first(self, ax: Axes) -> None:
        """Limit the axis to most scores: the first, far lower, would flatten all others."""
        worst_first = sorted(self.train + self.val, reverse=self.per_nat < 0)
        if len(worst_first) > 4:
            low, high = sorted((worst_first[len(worst_first) // 20], worst_first[-1]))
            ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))

    def __repr__(self) -> str:
        if not self.steps:
            return "History(empty)"
        return (
            f"History({len(self.steps)} lines, best {self.score:.3f} {self.unit} at "
            f"{self.steps[self.best]}, {', '.join([self.stopped, *self.lost()])}, "
            f"{self.seconds:.1f} s)"
        )

    def lost(self) -> list[str]:
        """What did not count, in words: rows and steps left out, and periods taken back."""
        found = []
        if self.left_out:
            found.append(f"{_counted(self.left_out, 'row')} far outside left out")
        if self.skipped:
            found.append(f"{self.skipped} of {self.taken} steps not finite and left out")
        if self.rollbacks:
            times = _counted(self.rollbacks, "time")
            found.append(f"{times} back to the best weights with smaller steps")
        return found

    @property
    def share_lost(self) -> float:
        """The larger of the shares of steps left out and of periods taken back."""
        periods = len(self.steps) + self.rollbacks
        return max(self.skipped / max(self.taken, 1), self.rollbacks / max(periods, 1))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def empty_history(flow: Flow) -> History:
    """For a fit: probabilities are told in bits per dimension, densities in nats."""
    if not flow.support.is_discrete:
        return History()
    return History(unit="bits/dim", per_nat=bits_per_dim(1.0, flow.event_shape))
