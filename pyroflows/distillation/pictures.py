"""Pictures of two densities side by side: draws, weights, quantiles, speeds.

Draw on axes of matplotlib, which is loaded by who makes these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = {"teacher": "tab:blue", "student": "tab:orange", "plain loop": "tab:grey"}
_FEATURES = 64  # whose quantiles are drawn at most


def draw_samples(axes: Sequence[Axes], samples: dict[str, Tensor]) -> None:
    """A scatter for each of the samples, in the plane of the teacher's first principal axes.

    Args:
        axes: one for each of the samples.
        samples: ``(rows, *event)`` by name, of which one is ``"teacher"``.
    """
    flat, labels = _in_a_plane({name: x.flatten(1).double() for name, x in samples.items()})
    low, high = (flat["teacher"].quantile(q, dim=0) for q in (0.002, 0.998))
    margin = 0.1 * (high - low)
    limits = list(zip((low - margin).tolist(), (high + margin).tolist(), strict=True))
    for ax, (name, points) in zip(axes, flat.items(), strict=True):
        across, up = points.T.numpy()
        ax.scatter(across, up, s=3, lw=0, alpha=0.5, color=_COLORS[name])
        ax.set(title=f"{name}'s draws", xlabel=labels[0], ylabel=labels[1])
        ax.set(xlim=limits[0], ylim=limits[1])


def _in_a_plane(flat: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, str]]:
    """The rows in two coordinates, and what to call these."""
    teacher = flat["teacher"]
    if teacher.shape[1] == 2:
        return flat, ("x1", "x2")
    if teacher.shape[1] == 1:
        spread = {name: torch.cat([x, torch.rand_like(x)], dim=1) for name, x in flat.items()}
        return spread, ("x1", "(spread at random)")
    mean, scale = _mean_and_scale(teacher)
    directions = torch.linalg.svd((teacher - mean) / scale, full_matrices=False)[2][:2]
    projected = {name: (x - mean) / scale @ directions.T for name, x in flat.items()}
    return projected, ("first principal axis", "second")


def _mean_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), x.std(0).clamp(min=1e-300)


def draw_weights(ax: Axes, log_weights: Tensor, khat: float) -> None:
    """A histogram of the log-weights."""
    log_weights = log_weights.double()
    log_weights = log_weights[torch.isfinite(log_weights)]
    low, high = (log_weights.quantile(q).item() for q in (0.001, 0.999))
    ax.hist(log_weights.clamp(low, high).numpy(), bins=60, color="grey")
    ax.axvline(0, color="black", lw=1)
    ax.set(title=f"log-weights, k-hat {khat:.2f}", yticks=[])
    ax.set(xlabel="log t - log s at the student's draws, nats")


def draw_quantiles(ax: Axes, teacher: Tensor, student: Tensor) -> None:
    """The student's quantiles of each feature over the teacher's."""
    levels = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    theirs, mine = (x.flatten(1).double()[:, :_FEATURES] for x in (teacher, student))
    mean, scale = _mean_and_scale(theirs)
    a, b = (((x - mean) / scale).quantile(levels, dim=0) for x in (theirs, mine))
    ax.axline((0, 0), slope=1, color="black", lw=1)
    ax.plot(a.numpy(), b.numpy(), lw=1, alpha=0.5, color=_COLORS["student"])
    ax.set(title="quantiles of each feature", xlabel="teacher, in sd", ylabel="student, in sd")


def draw_speeds(ax: Axes, speeds: dict[str, dict[int, float]]) -> None:
    """Bars of samples a second, by size of the batch and by who draws."""
    shown = {n: rates for n, rates in speeds.items() if all(map(math.isfinite, rates.values()))}
    batches = list(next(iter(shown.values())))
    for index, (name, rates) in enumerate(shown.items()):
        places = [place + (index - 1) * 0.27 for place in range(len(batches))]
        bars = ax.bar(places, list(rates.values()), 0.25, label=name, color=_COLORS[name])
        labels = [f"{_three_digits(rate):,.0f}" for rate in rates.values()]
        ax.bar_label(bars, labels, fontsize=7, rotation=90, padding=2)
    ax.set(title="samples a second", yscale="log", xticks=range(len(batches)))
    ax.set(xlabel="rows in a batch")
    ax.set_xticklabels([f"{n:,}" for n in batches])
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.35)  # room for the labels and the legend
    ax.legend(loc="upper left", ncols=len(shown), fontsize=7)


def _three_digits(rate: float) -> float:
    """Rounded: clocks vary by more."""
    return float(f"{rate:.3g}")
