"""Which of 24 questions say that a loan goes bad? Logistic regression under a horseshoe prior.

The regularised horseshoe of Piironen & Vehtari 2017 (arXiv:1707.01694), after Carvalho, Polson &
Scott 2010 (Biometrika 97): most coefficients are near 0, a few are free, and none is above a few
units. Written non-centred, C+ the half-Cauchy law::

    tau ~ C+(0, tau_0),  lambda_j ~ C+(0, 1),  c^2 ~ InverseGamma(2, 8),  z_j ~ N(0, 1)
    beta_j = z_j tau l_j,  l_j^2 = c^2 lambda_j^2 / (c^2 + tau^2 lambda_j^2)
    y_i ~ Bernoulli(sigmoid(alpha + x_i beta)),  alpha ~ N(0, 5)

tau_0 = p_0 / (D - p_0) * 2 / sqrt(n) expects p_0 = 5 of the D coefficients to matter. A coefficient
and its two scales form a funnel each, 2 D + 3 unknowns in all: a flow guide stands beside Pyro's
mean-field AutoNormal. Predictions on held-out rows are scored by log E p(y | unknowns), in nats a
row, beside the share of bad loans among the training rows.

Data: Statlog German credit, numeric version (H. Hofmann, UCI; 1,000 rows, 24 features, CC BY 4.0),
read from ``uci_tabular/german_numeric.txt.gz`` in the folder that ``PYROFLOWS_DATA`` names.
``--data breast_cancer``, which ``--smoke`` implies, needs no folder: 569 tumours, 30 features,
from scikit-learn::

    python models/horseshoe_logistic.py [--out runs/horseshoe_logistic.png] [--smoke]
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoNormal
from torch import Tensor

import pyroflows as pf
from pyroflows.datasets.uci_tables import read_table

EXPECTED = 5  # p_0, coefficients thought to matter
# The file has no header; the order is that of the original attributes, the rest are indicators.
GERMAN_NAMES = (
    "checking account, duration, credit history, amount, savings, employment, personal status, "
    "residence since, property, age, other plans, credits here, dependants, telephone, foreign"
).split(", ")


def load(name: str) -> tuple[Tensor, Tensor, list[str]]:
    """Features ``(n, D)``, labels in {0, 1} ``(n,)`` and the features' names."""
    if name == "german":
        path = pf.datasets.data_folder() / "uci_tabular" / "german_numeric.txt.gz"
        table = torch.from_numpy(read_table(path)).float()
        features, bad = table[:, :-1], table[:, -1] - 1  # 1 a good loan, 2 a bad one
        others = [f"indicator {k + 1}" for k in range(len(GERMAN_NAMES), features.shape[1])]
        return features, bad, [*GERMAN_NAMES, *others]
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    malignant = 1 - torch.from_numpy(bunch.target).float()
    return torch.from_numpy(bunch.data).float(), malignant, list(bunch.feature_names)


def split(x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A fifth of the rows held out; features in units of the training rows' spread."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held, seen = order[: len(x) // 5], order[len(x) // 5 :]
    loc, scale = x[seen].mean(0), x[seen].std(0)
    return (x[seen] - loc) / scale, y[seen], (x[held] - loc) / scale, y[held]


def horseshoe(x: Tensor, y: Tensor | None = None) -> None:
    """Sparse logistic regression; ``beta`` and ``logits`` are recorded, shapes from the right."""
    rows, features = x.shape
    tau_0 = EXPECTED / (features - EXPECTED) * 2 / rows**0.5
    one = x.new_ones(features)
    alpha = pyro.sample("alpha", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(tau_0))
    slab = pyro.sample("slab", dist.InverseGamma(2.0, 8.0))
    local = pyro.sample("lambda", dist.HalfCauchy(one).to_event(1))
    z = pyro.sample("z", dist.Normal(0 * one, one).to_event(1))
    free = tau.unsqueeze(-1) * local
    scale = free / (1 + free**2 / slab.unsqueeze(-1)).sqrt()  # never above the slab's
    beta = pyro.deterministic("beta", z * scale, event_dim=1)
    logits = pyro.deterministic("logits", alpha.unsqueeze(-1) + beta @ x.T, event_dim=1)
    pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)


@torch.no_grad()
def predict(guide: AutoGuide, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Draws of the coefficients ``(n, D)`` and of the rows' logits ``(n, rows)``."""
    with pyro.plate("draws", n, dim=-1):
        drawn = poutine.trace(guide).get_trace(x)
        nodes = poutine.trace(poutine.replay(horseshoe, trace=drawn)).get_trace(x).nodes
    return nodes["beta"]["value"], nodes["logits"]["value"]


def held_out_nats(logits: Tensor, y: Tensor) -> tuple[float, float]:
    """Log predictive density of the labels under draws of logits: mean and standard error."""
    each = dist.Bernoulli(logits=logits).log_prob(y)  # (draws, rows)
    row = each.logsumexp(0) - torch.tensor(float(len(each))).log()
    return row.mean().item(), row.std().item() / len(row) ** 0.5


def draw(betas: dict[str, Tensor], names: list[str], path: Path) -> None:
    """Medians, 50 % and 90 % intervals of the coefficients, the largest on top."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    quantiles = {label: beta.quantile(levels, dim=0).numpy() for label, beta in betas.items()}
    order = abs(next(iter(quantiles.values()))[2]).argsort()
    fig, ax = plt.subplots(figsize=(8, 0.28 * len(names) + 1.2), layout="constrained")
    for k, (label, q) in enumerate(quantiles.items()):
        q, height = q[:, order], torch.arange(len(names)).numpy() + 0.15 - 0.3 * k
        ax.hlines(height, q[0], q[4], color=f"C{k}", lw=1)
        ax.hlines(height, q[1], q[3], color=f"C{k}", lw=3)
        ax.plot(q[2], height, "o", color=f"C{k}", ms=4, label=label)
    ax.axvline(0, color="grey", lw=0.8, zorder=0)
    ax.set_yticks(range(len(names)), [names[j] for j in order])
    ax.set(xlabel="coefficient, a standard deviation of the feature", ylim=(-0.7, len(names) - 0.3))
    ax.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Fit both guides, print the table, save the picture; returns the table."""
    logging.getLogger("pyro").setLevel(logging.WARNING)
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    begin = time.perf_counter()
    features, labels, names = load("breast_cancer" if args.smoke else args.data)
    x, y, x_held, y_held = split(features, labels, args.seed)
    share = y.mean().logit().expand(1, len(y_held))
    rows = [
        ("held-out nats a row: share of training rows", f"{held_out_nats(share, y_held)[0]:.3f}")
    ]
    guides = {
        "AutoFlow": pf.AutoFlow(horseshoe, layers=3),
        "AutoNormal": AutoNormal(horseshoe, init_scale=0.1),
    }
    betas = {}
    for label, guide in guides.items():
        history = pf.fit_guide(horseshoe, guide, x, y, max_steps=20 if args.smoke else 2000)
        betas[label], logits = predict(guide, x_held, 200 if args.smoke else 4000)
        nats, error = held_out_nats(logits, y_held)
        right = ((logits.sigmoid().mean(0) > 0.5) == (y_held > 0.5)).float().mean().item()
        rows += [
            (f"held-out nats a row: {label}", f"{nats:.3f} +- {error:.3f}"),
            (f"held-out rows called right: {label}", f"{100 * right:.1f} %"),
            (f"ELBO, nats: {label}", f"{history.score:.2f}"),
            (f"seconds to fit: {label}", f"{history.seconds:.0f}"),
        ]
    largest = betas["AutoFlow"].median(0).values.abs().argsort(descending=True)[:6]
    rows += [
        (
            f"coefficient of {names[j]}: {label}",
            f"{beta[:, j].mean():.2f} +- {beta[:, j].std():.2f}",
        )
        for j in largest
        for label, beta in betas.items()
    ]
    draw(betas, names, args.out)
    rows.append(("seconds in all", f"{time.perf_counter() - begin:.0f}"))
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value:>18}" for name, value in rows))
    print(f"\npicture: {args.out}")
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/horseshoe_logistic.png"), help="picture"
    )
    parser.add_argument("--data", choices=["german", "breast_cancer"], default="german")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
