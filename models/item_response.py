"""10,000 people answer 25 questions: 10,050 unknowns, all of them in one posterior.

The item-response model of two parameters an item (Birnbaum 1968, in Lord & Novick, "Statistical
Theories of Mental Test Scores"): ability theta of a person, discrimination a and difficulty b of an
item, second arguments standard deviations::

    theta_i ~ N(0, 1),  a_j ~ LogNormal(0, 0.5),  b_j ~ N(0, 2),
    y_ij ~ Bernoulli(sigmoid(a_j (theta_i - b_j)))

Answers are simulated with seed 0, so that the truth is known. Nothing tells the guide that people
are independent given the items, the 50 globals: ``pf.AutoFlow`` finds it in the model, starts at
the mode of the globals with every person integrated by Laplace's approximation, and trains one flow
that all people share. The report integrates each person by importance weights.

The table holds the item parameters against the truth and, at the full size, against a long run of
NUTS over all 10,050 unknowns, ``item_response_reference.json`` (made by the script of that name);
differences are in its posterior standard deviations::

    python models/item_response.py [--out runs/item_response.png] [--smoke]
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyroflows as pf

SIZE = 10_000, 25  # people, items
SEED = 0  # of the simulated answers
REFERENCE = Path(__file__).with_name("item_response_reference.json")
CHUNK = 200  # draws at a time, which have two million abilities


def simulate(people: int, items: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Answers ``(people, items)`` in {0, 1}, and the true parameters of all sites."""
    generator = torch.Generator().manual_seed(SEED)
    theta = torch.randn(people, generator=generator)
    a = (0.3 * torch.randn(items, generator=generator)).exp()
    b = torch.randn(items, generator=generator)
    right = torch.sigmoid(a * (theta[:, None] - b))
    y = (torch.rand(people, items, generator=generator) < right).float()
    return y, {"a": a, "b": b, "theta": theta}


def two_parameters(y: Tensor) -> None:
    """Discrimination and difficulty of each item, ability of each person, and their answers."""
    people, items = y.shape
    with pyro.plate("of_items", items):
        a = pyro.sample("a", dist.LogNormal(0.0, 0.5))
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("of_people", people):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    logits = a * (theta[:, None] - b)
    pyro.sample("y", dist.Bernoulli(logits=logits).to_event(2), obs=y)


class Stopwatch:
    """Seconds of the processor, stage by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.process_time()

    def lap(self, stage: str) -> None:
        """End a stage."""
        now = time.process_time()
        self.seconds[stage], self.last = now - self.last, now
        print(f"{stage}: {self.seconds[stage]:.0f} CPU s", flush=True)


def peak_gigabytes() -> float:
    """The largest memory this process has had, in GB of 10^9 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def plain_means(guide: pf.AutoFlow, draws: int) -> dict[str, Tensor]:
    """Means of the guide's own draws, without weights."""
    parts = [guide.sample_posterior(CHUNK) for _ in range(draws // CHUNK)]
    return {name: torch.stack([part[name].mean(0) for part in parts]).mean(0) for name in parts[0]}


def reference_for(y: Tensor) -> dict[str, Any] | None:
    """What NUTS found, where it was run at this size."""
    if not REFERENCE.exists():
        return None
    found = json.loads(REFERENCE.read_text())
    return found if [found["people"], found["items"]] == list(y.shape) else None


def item_table(
    truth: dict[str, Tensor], found: dict[str, Tensor], reference: dict[str, Any] | None
) -> str:
    """A line an item: truth, the guide's weighted mean and sd, and NUTS's."""
    columns = ["truth", "guide", *(["NUTS"] if reference else [])]
    lines = ["item  " + "    ".join(f"{f'{k}, {c}':>15}" for k in "ab" for c in columns)]
    for j in range(len(truth["a"])):
        cells = []
        for k in "ab":
            draws = found[k][:, j]
            cells += [f"{truth[k][j]:.3f}", f"{draws.mean():.3f} +- {draws.std():.3f}"]
            if reference:
                moments = reference["parameters"][k]
                cells += [f"{moments['mean'][j]:.3f} +- {moments['sd'][j]:.3f}"]
        lines.append(f"{j + 1:>4}  " + "    ".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def farthest(means: dict[str, Tensor], reference: dict[str, Any]) -> str:
    """The largest difference of a mean from NUTS's, in its sd, with the item's name."""
    off = {}
    for k, moments in reference["parameters"].items():
        mean, sd = (torch.tensor(moments[m]) for m in ("mean", "sd"))
        differences = (means[k] - mean) / sd
        off |= {f"{k} of item {j + 1}": d.item() for j, d in enumerate(differences)}
    name = max(off, key=lambda key: abs(off[key]))
    return f"{abs(off[name]):.3f} sd ({name})"


def draw(
    truth: dict[str, Tensor],
    found: dict[str, Tensor],
    reference: dict[str, Any] | None,
    path: Path,
) -> None:
    """90 % intervals of the items beside truth and NUTS, and abilities against the true ones."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(13, 4.8), layout="constrained")
    for ax, k, name in zip(axes, "ab", ("discrimination a", "difficulty b"), strict=False):
        order = truth[k].argsort()
        low, mid, high = (found[k].quantile(q, dim=0)[order] for q in (0.05, 0.5, 0.95))
        place = torch.arange(len(order))
        ax.vlines(place, low - mid, high - mid, color="tab:blue", lw=3, alpha=0.4, label="90 %")
        ax.plot(place, truth[k][order] - mid, "k_", ms=9, mew=2, label="truth")
        if reference:
            mean = torch.tensor(reference["parameters"][k]["mean"])[order]
            ax.plot(place, mean - mid, "x", color="tab:red", ms=5, label="NUTS, mean")
        ax.axhline(0, color="grey", lw=0.8, zorder=0)
        ax.set(title=f"{name}, less the guide's median", xlabel="item, in order of its true value")
        ax.margins(y=0.15)
        ax.legend(fontsize=8, ncols=3, loc="lower left")
    mean = found["theta"].mean(0)
    shown = axes[2].hexbin(truth["theta"], mean, gridsize=45, mincnt=1, cmap="Blues", bins="log")
    axes[2].axline((0, 0), slope=1, color="k", lw=0.7, ls="--")
    axes[2].set(title="abilities", xlabel="truth", ylabel="posterior mean")
    fig.colorbar(shown, ax=axes[2], label="people")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Simulate, infer, judge, print both tables, save the picture; returns the second table."""
    logging.getLogger("pyro").setLevel(logging.WARNING)
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    y, truth = simulate(*((500, 10) if args.smoke else SIZE))
    watch = Stopwatch()
    guide = pf.AutoFlow(two_parameters).setup(y)
    watch.lap("set-up")
    history = pf.fit_guide(two_parameters, guide, y, max_steps=20 if args.smoke else 4000)
    watch.lap("training")
    judged = pf.report(two_parameters, guide, y, num_samples=200 if args.smoke else 10_000)
    watch.lap("report")
    peak = peak_gigabytes()
    found = judged.resample(1000)
    low, high = (found["theta"].quantile(q, dim=0) for q in (0.05, 0.95))
    inside = ((low < truth["theta"]) & (truth["theta"] < high)).float().mean().item()
    groups = guide.learned.groups
    rows = [
        ("unknowns", f"{guide.latent_dim}"),
        ("globals found", f"{guide.latent_dim - sum(n * k for n, k in groups)}"),
        ("rows found", ", ".join(f"{n} of size {k}" for n, k in groups) or "none"),
        *((f"CPU seconds, {stage}", f"{spent:.0f}") for stage, spent in watch.seconds.items()),
        ("peak memory", f"{peak:.1f} GB"),
        ("ELBO", f"{history.score:.1f} nats"),
        ("k-hat, ESS", f"{judged.khat:.2f}, {judged.ess:.0f} of {len(judged.log_weights)}"),
        ("true abilities inside their 90 % intervals", f"{100 * inside:.1f} %"),
    ]
    reference = reference_for(y)
    if reference:
        rows += [
            ("farthest mean from NUTS, weighted", farthest(judged.means(), reference)),
            ("farthest mean from NUTS, plain", farthest(plain_means(guide, 2000), reference)),
            ("CPU seconds, NUTS", f"{reference['cpu_seconds']:.0f}"),
        ]
    draw(truth, found, reference, args.out)
    width = max(len(name) for name, _ in rows)
    print("\n" + item_table(truth, found, reference))
    print("\n" + "\n".join(f"{name:<{width}}  {value:>24}" for name, value in rows))
    print(f"\n{judged}\n\n{history.stopped}; picture: {args.out}")
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/item_response.png"), help="picture")
    parser.add_argument("--seed", type=int, default=0, help="of the guide; the data have their own")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
