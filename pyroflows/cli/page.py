"""The page of ``pyroflows report``: one HTML file, its pictures inside."""

from __future__ import annotations

import base64
import html
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyroflows._files.atomic import write_atomically
from pyroflows.cli.runs import Run, log_prob
from pyroflows.training.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARGINALS, PAIRS, DOTS = 12, 5, 800
DATA, MODEL = "tab:blue", "tab:orange"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h1, h2 { font-weight: 600; overflow-wrap: anywhere } h2 { margin-top: 2.5rem }
table { border-collapse: collapse } td, th { padding: .25rem 1rem .25rem 0; text-align: left;
       vertical-align: top; border-bottom: 1px solid #ddd; overflow-wrap: anywhere }
th { font-weight: 500; color: #555; white-space: nowrap } div { overflow-x: auto }
img { max-width: 100%; height: auto } img.wide { max-width: max(100%, 44rem) }
p { max-width: 46rem }
"""


def judged(run: Run, samples: int) -> dict[str, Any]:
    """The numbers of the page.

    ``pit`` of a held-out row is the share of the flow's own draws that are less dense than the row;
    where the densities are right it is uniform. ``ks`` is its largest distance from that.
    """
    draws = run.tensor(np.concatenate(list(run.draws(samples))))
    scores, of_draws = run.scores(run.test), np.sort(log_prob(run.flow, draws))
    pit = np.sort(np.searchsorted(of_draws, scores) / samples)
    n = len(pit)
    steps = np.arange(n + 1) / n
    ks = max(np.abs(pit - steps[1:]).max(), np.abs(pit - steps[:-1]).max())
    limit = 1.36 * np.sqrt(1 / n + 1 / samples)  # Kolmogorov and Smirnov, 95 %, two samples
    return {
        "nats": float(scores.mean()),
        "error": float(scores.std() / np.sqrt(n)),
        "gaussian": _gaussian(run),
        "ks": float(ks),
        "ks_limit": float(limit),
        "calibrated": bool(ks <= limit),
        "pit": pit,
        "draws": draws.numpy().astype(np.float64),
    }


def _gaussian(run: Run) -> float:
    """What a Gaussian with the training rows' mean and covariance scores on the held-out rows."""
    mean, scale = run.train.mean(0), run.train.std(0)
    scale = np.where(scale > 0, scale, 1)  # a column may be constant in these rows, not in all
    train, test = (run.train - mean) / scale, (run.test - mean) / scale
    covariance = train.T @ train / len(train) + 1e-9 * np.eye(len(mean))
    inverse, (_, log_det) = np.linalg.inv(covariance), np.linalg.slogdet(covariance)
    distance = np.einsum("ni,ij,nj->n", test, inverse, test)
    constant = len(mean) * np.log(2 * np.pi) + log_det + 2 * np.log(scale).sum()
    return float(-0.5 * (distance + constant).mean())


def write_page(run: Run, facts: dict[str, Any], path: Path) -> None:
    """Draw and write it.

    Args:
        run: what it is about.
        facts: of ``judged``.
        path: of the page.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in another script
        pictures = {
            "Training": _training(run),
            "Marginals": _marginals(run, facts["draws"]),
            "Pairs": _pairs(run, facts["draws"]),
            "Calibration of the densities": _calibration(facts),
        }
        parts = [_section(title, *drawn) for title, drawn in pictures.items()]
    teacher = run.facts.get("teacher")
    how = f"distilled from {teacher}, which was fitted" if teacher else "fitted"
    title = f"{run.builder} {how} to {run.facts.get('source', 'a table')}"
    body = f"<h1>{html.escape(title)}</h1>\n{_summary(run, facts)}\n" + "\n".join(parts)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode("utf-8", "replace"))


def _summary(run: Run, facts: dict[str, Any]) -> str:
    counts = run.facts.get("counts", {})
    missing = ", ".join(f"{name}: {n:,}" for name, n in counts.get("missing", {}).items())
    rows = {
        "Columns": f"{len(run.columns)}: {', '.join(run.columns[:40])}",
        "Rows": f"{counts.get('rows', 0):,}, {counts.get('used', 0):,} of them usable",
        "Missing values": missing or "none",
        "Rows far outside, left out": f"{counts.get('far_out', 0):,}",
        "Held-out rows": f"{facts['nats']:.3f} ± {facts['error']:.3f} nats a row, in the table's "
        f"units ({len(run.test):,} rows)",
        "A Gaussian scores": f"{facts['gaussian']:.3f} nats; the flow is "
        f"{facts['nats'] - facts['gaussian']:+.3f} nats from it",
        "Calibration": f"KS distance {facts['ks']:.3f}; by chance up to {facts['ks_limit']:.3f}",
        "Parameters": f"{sum(p.numel() for p in run.flow.parameters()):,}",
    }
    lines = (f"<tr><th>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
    return f"<table>{''.join(lines)}</table>"


def _section(title: str, figure: Figure, text: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    # On a narrow screen a picture of many panels scrolls sideways, or nobody could read it.
    wide = ' class="wide"' if figure.get_figwidth() > 6 else ""
    image = f'<div><img{wide} alt="{html.escape(title)}" src="data:image/png;base64,{data}"></div>'
    return f"<h2>{html.escape(title)}</h2>\n<p>{html.escape(text)}</p>\n{image}"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _name(name: str) -> str:
    """A column's name as a label: short, and no formula."""
    name = "".join(c if c.isprintable() else " " for c in name)
    return (name if len(name) <= 24 else name[:23] + "…").replace("$", r"\$")


def _training(run: Run) -> tuple[Figure, str]:
    figure = _figure(8, 3.5)
    history = History(**run.facts["history"])
    if history.steps:
        history.plot(figure.subplots())
    if "teacher" in run.facts:
        what = (
            "Minus the loss (train), and minus the sum of both KL divergences between student and "
            "teacher (validation), of which the student keeps its best; an epoch is 50 steps. "
        )
    else:
        what = (
            "Mean log-density over the epochs, on the rows trained on and on those kept for "
            "stopping. "
        )
    return figure, f"{what}Training ended: {history.stopped or 'not recorded'}."


def _window(*values: np.ndarray) -> tuple[float, float]:
    """A range that holds nearly all of each, so that no single value flattens the picture."""
    low = min(np.quantile(v, 0.002) for v in values)
    high = max(np.quantile(v, 0.998) for v in values)
    pad = 0.03 * (high - low) or 1.0
    return low - pad, high + pad


def _marginals(run: Run, draws: np.ndarray) -> tuple[Figure, str]:
    shown = run.columns[:MARGINALS]
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    figure = _figure(2.6 * across + 0.4, 2.1 * down + 0.4)
    for i, ax in enumerate(figure.subplots(down, across, squeeze=False).flat):
        if i >= len(shown):
            ax.axis("off")
            continue
        data, model = run.test[:, i], draws[:, i]
        bins = np.linspace(*_window(data, model), 41)
        ax.hist(data, bins, density=True, color=DATA, alpha=0.45, label="data")
        ax.hist(model, bins, density=True, color=MODEL, histtype="step", lw=1.4, label="flow")
        ax.set(title=_name(shown[i]), yticks=[])
        ax.title.set_fontsize(9)
        ax.locator_params(axis="x", nbins=4)
        ax.tick_params(labelsize=7)
        if i == 0:
            ax.legend(fontsize=7)
    more = len(run.columns) - len(shown)
    return figure, "Held-out rows beside the flow's samples, column by column" + (
        f"; {more} columns more are not shown." if more else "."
    )


def _pairs(run: Run, draws: np.ndarray) -> tuple[Figure, str]:
    count = min(PAIRS, len(run.columns))
    figure = _figure(2 * count + 0.5, 2 * count + 0.5)
    grid = figure.subplots(count, count, squeeze=False)
    dots = min(DOTS, len(run.test), len(draws))
    size = 3 if dots > 300 else 7
    windows = [_window(run.test[:, i], draws[:, i]) for i in range(count)]
    for i in range(count):
        for j in range(count):
            ax, lower = grid[i, j], i > j
            if i == j:
                bins = np.linspace(*windows[i], 31)
                ax.hist(run.test[:, i], bins, density=True, color=DATA, alpha=0.45)
                ax.hist(draws[:, i], bins, density=True, color=MODEL, histtype="step")
                ax.set_yticks([])
            else:
                rows, colour = (run.test, DATA) if lower else (draws, MODEL)
                rows = rows[:dots]
                ax.scatter(rows[:, j], rows[:, i], s=size, alpha=0.5, color=colour, linewidths=0)
                ax.set(ylim=windows[i])
            ax.set(xlim=windows[j])
            ax.locator_params(axis="x", nbins=4)
            ax.tick_params(labelsize=6)
            if i < count - 1:
                ax.set_xticklabels([])
            else:
                ax.set_xlabel(_name(run.columns[j]), fontsize=8)
            if j == 0:
                ax.set_ylabel(_name(run.columns[i]), fontsize=8)
            else:
                ax.set_yticklabels([])
    return figure, (
        f"The first {count} columns in pairs: held-out rows below the diagonal (blue), as many of "
        "the flow's samples above it (orange)."
    )


def _calibration(facts: dict[str, Any]) -> tuple[Figure, str]:
    figure = _figure(5, 4)
    ax = figure.subplots()
    pit, limit = facts["pit"], facts["ks_limit"]
    line = np.array([0.0, 1.0])
    ax.fill_between(line, line - limit, line + limit, color="0.9", label="chance, 95 %")
    ax.plot(line, line, color="grey", lw=1, ls=":")
    ax.plot(pit, np.arange(1, len(pit) + 1) / len(pit), color=DATA, label="held-out rows")
    ax.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="share of the flow's samples that are less dense",
        ylabel="share of held-out rows",
    )
    ax.legend(loc="upper left")
    return figure, (
        "For each held-out row the share of the flow's own samples that are less dense than it. "
        "Where the densities are right these shares are uniform: the curve follows the diagonal. "
        "Above it the flow is too narrow, data fall where it expects few; below it, too wide."
    )
