"""Where do points come from? A log-Gaussian Cox process on a grid: hundreds of tied unknowns.

Counts of points in the cells of a unit square have an unknown intensity, the exponential of a
Gaussian field (Moller, Syversveen & Waagepetersen 1998, doi:10.1111/1467-9469.00115)::

    mu ~ N(2, 2),  sigma ~ N+(0, 1),  log range ~ N(log 0.15, 0.5),  e ~ N(0, 1) for each cell
    f = mu + sigma L e L^T,  L L^T = exp(-|s - s'| / range) along either side
    counts ~ Poisson(exp(f)), in points a cell

The field is written by independent e, so that its covariance is in the model and not in the prior.
No two cells are independent given the three numbers above, so the guide is over all at once:
``pf.sample_posterior`` trains it, judges it, and lets chains run in its base space where its
verdict asks for them. Counts are simulated, so the field is known::

    python models/log_gaussian_cox.py [--cells 24] [--out runs/log_gaussian_cox.png] [--smoke]
"""

from __future__ import annotations

import argparse
import logging
import math
import resource
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyroflows as pf

TRUTH = {"mu": 2.0, "sigma": 1.0, "range": 0.2}


def field(mu: Tensor, sigma: Tensor, reach: Tensor, e: Tensor) -> Tensor:
    """The log-intensity of each cell, ``(n, n)``, of independent numbers."""
    at = (torch.arange(e.shape[-1]) + 0.5).to(e) / e.shape[-1]
    apart = (at[:, None] - at).abs()
    factor = torch.linalg.cholesky(torch.exp(-apart / reach) + 1e-5 * torch.eye(len(at)).to(e))
    return mu + sigma * (factor @ e @ factor.mT)


def cox(counts: Tensor) -> None:
    """Counts ``(n, n)`` of a Poisson process whose log-intensity is a Gaussian field."""
    mu = pyro.sample("mu", dist.Normal(2.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    reach = pyro.sample("range", dist.LogNormal(math.log(0.15), 0.5))
    e = pyro.sample("e", dist.Normal(torch.zeros_like(counts), 1.0).to_event(2))
    f = pyro.deterministic("f", field(mu, sigma, reach, e), event_dim=2)
    pyro.sample("counts", dist.Poisson(f.exp()).to_event(2), obs=counts)


def simulate(cells: int, seed: int) -> tuple[Tensor, Tensor]:
    """The true log-intensity and counts."""
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(cells, cells, generator=generator)
    f = field(*map(torch.tensor, TRUTH.values()), e)
    return f, torch.poisson(f.exp(), generator=generator)


def draw(panels: dict[str, Tensor], path: Path) -> None:
    """Fields side by side; all but the last, a deviation, on one scale."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.3), layout="constrained")
    low, high = (bound(list(panels.values())[1]).item() for bound in (torch.min, torch.max))
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        limits = {} if "deviation" in title else {"vmin": low, "vmax": high}
        image = ax.imshow(values.T.numpy(), origin="lower", extent=(0, 1, 0, 1), **limits)
        ax.set_title(title, fontsize=10)
        fig.colorbar(image, ax=ax, shrink=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Sample the posterior, print the table, save the picture; returns the table."""
    logging.getLogger("pyro").setLevel(logging.WARNING)
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    begin, cpu = time.perf_counter(), time.process_time()
    truth, counts = simulate(6 if args.smoke else args.cells, args.seed)
    found = pf.sample_posterior(cox, counts, draws=200 if args.smoke else 1000)
    numbers = {name: found[name] for name in TRUTH}
    f = torch.stack([field(*one, e) for *one, e in zip(*numbers.values(), found["e"], strict=True)])
    rows = [
        (name, f"{value.mean():.3f} +- {value.std():.3f} (truth {TRUTH[name]})")
        for name, value in numbers.items()
    ]
    low, high = f.quantile(torch.tensor([0.05, 0.95]), dim=0)
    inside = ((truth >= low) & (truth <= high)).float().mean().item()
    error = (f.mean(0) - truth).square().mean().sqrt().item()
    plain = ((counts + 0.5).log() - truth).square().mean().sqrt().item()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    rows += [
        ("latent numbers", str(3 + counts.numel())),
        ("cells inside their 90 % bands", f"{100 * inside:.0f} %"),
        ("error of the log-intensity: posterior mean", f"{error:.3f}"),
        ("error of the log-intensity: log of counts", f"{plain:.3f}"),
        ("seconds of the processor", f"{time.process_time() - cpu:.0f}"),
        ("seconds in all", f"{time.perf_counter() - begin:.0f}"),
        ("MiB at most", f"{memory:.0f}"),
    ]
    panels = {
        "log of counts": (counts + 0.5).log(),
        "true log-intensity": truth,
        "posterior mean": f.mean(0),
        "posterior deviation": f.std(0),
    }
    draw(panels, args.out)
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value:>18}" for name, value in rows))
    print(f"\n{found.how}\npicture: {args.out}")
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/log_gaussian_cox.png"))
    parser.add_argument("--cells", type=int, default=24, help="along either side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
