"""Draw the README's picture: a density, a posterior and a distilled sampler.

::

    python docs/picture.py            # about four minutes on one core
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from torch import Tensor

import pyroflows as pf

OUT = Path(__file__).with_name("picture.png")


def density(ax: Axes) -> None:
    """A spline flow's density of a pinwheel, and the rows it was fitted to."""
    data = pf.datasets.pinwheel(20_000)
    flow = pf.nsf(2, layers=4, hidden=(64, 64), bins=16)
    pf.fit(flow, data.train, val=data.val, max_epochs=40)
    side = torch.linspace(-3.2, 3.2, 400)
    with torch.no_grad():
        values = flow.log_prob(torch.cartesian_prod(side, side)).exp().reshape(400, 400)
    ax.pcolormesh(side, side, values.T, shading="auto", cmap="magma", rasterized=True)
    ax.set(title="density: pf.fit(pf.nsf(2), rows)")


def bent(y: Tensor) -> None:
    """Two parameters of which the data see one combination: a posterior that is bent."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.5))
    pyro.sample("y", dist.Normal(b + a**2, 0.3), obs=y)


def posterior(ax: Axes) -> None:
    """Draws of an IAF guide over the exact posterior."""
    y = torch.tensor(1.0)
    guide = pf.AutoFlow(bent)
    pf.fit_guide(bent, guide, y, max_steps=1500)
    draws = guide.sample_posterior(1500)
    a, b = torch.linspace(-2.6, 2.6, 300), torch.linspace(-5.0, 2.6, 300)
    here, there = a[:, None], b[None, :]
    exact = -(here**2) / 2 - (there / 1.5) ** 2 / 2 - ((y - there - here**2) / 0.3) ** 2 / 2
    ax.scatter(draws["a"].detach(), draws["b"].detach(), s=3, color="tab:orange", alpha=0.6, lw=0)
    levels = exact.max() - torch.tensor([6.0, 3.0, 1.5, 0.5])
    ax.contour(a, b, exact.T, levels=levels.tolist(), colors="black", linewidths=0.8)
    ax.set(title="posterior: pf.AutoFlow(model)")


def distilled(ax: Axes) -> None:
    """Draws of an IAF that a MAF taught a checkerboard."""
    data = pf.datasets.checkerboard(40_000)
    teacher = pf.maf(2, layers=8, hidden=(128, 128))
    pf.fit(teacher, data.train, val=data.val, max_epochs=40)
    student = pf.student_of(teacher)
    pf.distill(teacher, student, data=data.train, max_steps=3000)
    draws = student.sample((12_000,))
    ax.scatter(*draws.T, s=1, color="tab:blue", alpha=0.5, lw=0)
    edge = 1.05 * data.train.abs().max().item()
    ax.set(title="fast sampler: pf.distill(maf, iaf)", xlim=(-edge, edge), ylim=(-edge, edge))


def main() -> None:
    """Draw the three side by side."""
    mpl.use("Agg")
    pyro.set_rng_seed(0)
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for draw, ax in zip((density, posterior, distilled), axes, strict=True):
        draw(ax)
        ax.set(xticks=[], yticks=[])
    figure.savefig(OUT, dpi=90)


if __name__ == "__main__":
    main()
