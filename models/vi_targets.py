"""Three targets that Gaussian guides cannot follow, with everything known about them exactly.

Each is a Pyro model without data, so its posterior is its prior, its log evidence is 0, and an
ELBO of -k says that the guide is k nats of KL away. Second arguments of N are standard deviations.

funnel (Neal 2003, 10 dimensions)::

    v ~ N(0, 3),  x_i ~ N(0, exp(v/2)),  i = 1..9

banana (Haario et al. 1999; constants of Agrawal & Domke 2024, arXiv:2412.08824)::

    z0 ~ N(0, 10),  z1 ~ N(0.03 (z0^2 - 100), 1)

funana (Agrawal & Domke 2024; we take 10 dimensions)::

    z0 ~ N(0, 10),  z1 ~ N(0, 3),  x_i ~ N(0.03 (z0^2 - 100), exp(z1/2)),  i = 1..8

Exact moments. For v ~ N(0, 3), E exp(v) = exp(9/2). For z0 ~ N(0, 10), E z0^2 = 100 and
Var z0^2 = 2 * 10^4, so b = 0.03 (z0^2 - 100) has mean 0 and variance 0.0009 * 2 * 10^4 = 18.
By the law of total variance

- funnel: E x_i = 0 and Var x_i = E exp(v) = exp(9/2), sd 9.488;
- banana: E z1 = 0 and Var z1 = 1 + 18 = 19, sd 4.359;
- funana: E x_i = 0 and Var x_i = exp(9/2) + 18, sd 10.393.

A funnel's sd rests on rare draws (the sampling error of Var x_i from n draws is about 100 / sqrt(n)
of it), so the table has the median of |x_i| too, against as many exact draws. Run with::

    python models/vi_targets.py [--out runs/vi_targets.png] [--smoke]
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal, AutoNormal
from torch import Tensor

import pyroflows as pf

LOG_EVIDENCE = 0.0
BANANA_VARIANCE = 0.03**2 * 2 * 10.0**4


def funnel() -> None:
    """Neal's funnel: the scale of nine variables spans e^-9 to e^9."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("dimensions", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def banana() -> None:
    """A Gaussian bent along a parabola."""
    z0 = pyro.sample("z0", dist.Normal(0.0, 10.0))
    pyro.sample("z1", dist.Normal(0.03 * (z0**2 - 100), 1.0))


def funana() -> None:
    """Bent like the banana, and as wide as the funnel says."""
    z0 = pyro.sample("z0", dist.Normal(0.0, 10.0))
    z1 = pyro.sample("z1", dist.Normal(0.0, 3.0))
    with pyro.plate("dimensions", 8):
        pyro.sample("x", dist.Normal(0.03 * (z0**2 - 100), (z1 / 2).exp()))


class Target(NamedTuple):
    """A model, what is known of it, and the two sites worth a picture.

    Attributes:
        model: a Pyro model without observations.
        moments: exact mean and sd of every site (of each of its elements).
        axes: site along x, site along y (its first element).
        limits: half width of the picture along x, lower and upper end along y.
    """

    model: Callable[[], None]
    moments: dict[str, tuple[float, float]]
    axes: tuple[str, str]
    limits: tuple[float, float, float]


TARGETS = {
    "funnel": Target(
        funnel,
        {"v": (0.0, 3.0), "x": (0.0, math.exp(9 / 4))},
        axes=("x", "v"),
        limits=(20.0, -9.0, 9.0),
    ),
    "banana": Target(
        banana,
        {"z0": (0.0, 10.0), "z1": (0.0, math.sqrt(1 + BANANA_VARIANCE))},
        axes=("z0", "z1"),
        limits=(32.0, -8.0, 25.0),
    ),
    "funana": Target(
        funana,
        {
            "z0": (0.0, 10.0),
            "z1": (0.0, 3.0),
            "x": (0.0, math.sqrt(math.exp(9 / 2) + BANANA_VARIANCE)),
        },
        axes=("z0", "x"),
        limits=(32.0, -20.0, 35.0),
    ),
}
GUIDES: dict[str, Callable[[Callable], AutoGuide]] = {
    "AutoFlow": pf.AutoFlow,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoNormal": AutoNormal,
}


@torch.no_grad()
def draws_of(source: Callable, sites: Iterable[str], n: int) -> dict[str, Tensor]:
    """``n`` draws of each site, ``(n, elements)``, of a guide or, exact ones, of a target."""
    with pyro.plate("draws", n, dim=-2):  # left of the plate "dimensions"
        nodes = poutine.trace(source).get_trace().nodes
    return {site: nodes[site]["value"].reshape(n, -1) for site in sites}


@torch.no_grad()
def elbo(model: Callable, guide: AutoGuide, n: int) -> tuple[float, float]:
    """Mean and standard error of the ELBO from ``n`` draws, in ten batches."""
    loss = Trace_ELBO(num_particles=n // 10, vectorize_particles=True, max_plate_nesting=1)
    values = torch.tensor([-loss.loss(model, guide) for _ in range(10)])
    return values.mean().item(), values.std().item() / 10**0.5


def summary(draws: dict[str, Tensor]) -> dict[str, str]:
    """Mean, sd and median magnitude of each site; elements of a vector are alike, so pooled."""
    return {
        site: f"{x.mean():.2f} +- {x.std():.2f}, {x.abs().median():.2f}"
        for site, x in draws.items()
    }


def fit_all(name: str, target: Target, smoke: bool) -> tuple[list[tuple[str, str]], dict]:
    """Fit each guide to one target; rows of the table, and draws for the picture."""
    n = 1000 if smoke else 50_000
    draws = {"exact": draws_of(target.model, target.moments, n)}
    rows = [
        (f"{name}: exact log evidence", f"{LOG_EVIDENCE:.2f}"),
        *(
            (f"{name}: {site}, exact", f"{mean:.2f} +- {sd:.2f}")
            for site, (mean, sd) in target.moments.items()
        ),
    ]
    for label, make in GUIDES.items():
        guide = make(target.model)
        history = pf.fit_guide(target.model, guide, max_steps=20 if smoke else 2000)
        draws[label] = draws_of(guide, target.moments, n)
        value, error = elbo(target.model, guide, n)
        rows.append(
            (f"{name}: ELBO, {label} ({history.seconds:.0f} s)", f"{value:.2f} +- {error:.2f}")
        )
    for label, sites in draws.items():
        title = f"{n} exact draws" if label == "exact" else label
        rows += [(f"{name}: {site}, {title}", text) for site, text in summary(sites).items()]
    return rows, draws


def draw(everything: dict[str, dict], path: Path) -> None:
    """A row for each target, a column for each source of draws; exact ones in grey beneath."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    labels = list(next(iter(everything.values())))
    fig, axes = plt.subplots(
        len(everything), len(labels), figsize=(12, 9), sharex="row", sharey="row", squeeze=False
    )
    for line, (name, draws) in zip(axes, everything.items(), strict=True):
        target = TARGETS[name]
        for ax, label in zip(line, labels, strict=True):
            layers = {"exact": "0.75"} | ({} if label == "exact" else {label: "tab:blue"})
            for source, colour in layers.items():
                x, y = (draws[source][site][:3000, 0].numpy() for site in target.axes)
                ax.scatter(x, y, s=2, color=colour, linewidths=0)
            half, low, high = target.limits
            ax.set(xlim=(-half, half), ylim=(low, high), xlabel=target.axes[0])
            ax.set_title(f"{name}: {label}", fontsize=10)
        line[0].set_ylabel(target.axes[1])
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Fit three guides to three targets, print the table, save the picture; returns the table."""
    logging.getLogger("pyro").setLevel(logging.WARNING)
    begin = time.perf_counter()
    rows, everything = [], {}
    for name, target in TARGETS.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        lines, everything[name] = fit_all(name, target, args.smoke)
        rows += lines
    draw(everything, args.out)
    rows.append(("seconds in all", f"{time.perf_counter() - begin:.0f}"))
    width = max(len(name) for name, _ in rows)
    print("\nsites: mean +- sd, median of |x|")
    print("\n".join(f"{name:<{width}}  {value:>22}" for name, value in rows))
    print(f"\npicture: {args.out}")
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/vi_targets.png"), help="picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
