"""Stochastic volatility: 203 correlated unknowns from 200 returns, with the truth known.

Kim, Shephard & Chib 1998, "Stochastic volatility: likelihood inference and comparison with ARCH
models", Review of Economic Studies 65. The log-variance h of a return y is an AR(1) process::

    h_1 ~ N(mu, sigma / sqrt(1 - phi^2)),  h_t ~ N(mu + phi (h_{t-1} - mu), sigma),
    y_t ~ N(0, exp(h_t / 2))

(second arguments are standard deviations), with their priors (phi + 1) / 2 ~ Beta(20, 1.5) and
sigma^2 ~ InverseGamma(2.5, 0.025), and mu ~ N(0, 5). The returns are simulated from
mu = -1, phi = 0.95, sigma = 0.3 with seed 0, so that the table can set the posterior beside the
truth and the picture can set the inferred volatilities exp(h_t / 2) beside the true ones.

The process is written non-centred, in innovations that are standard normal a priori: little is
known of any single h_t, and the flow then only has to learn what the data add::

    python models/stochastic_volatility.py [--out runs/stochastic_volatility.png] [--smoke]
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyroflows as pf

TRUTH = {"mu": -1.0, "phi": 0.95, "sigma": 0.3}
SEED = 0  # of the simulated returns


def log_variances(mu: Tensor, phi: Tensor, sigma: Tensor, innovations: Tensor) -> Tensor:
    """The stationary AR(1) path of unit innovations, without a loop over time.

    h - mu = sum_k phi^k L^k (sigma e), L the lag, and the sum over k < 2^m is the product of
    (1 + phi^s L^s) over s = 1, 2, 4, ..., 2^(m-1): log2(T) shifts instead of T steps.

    Args:
        mu: level, ``(*batch)``.
        phi: persistence in (-1, 1), ``(*batch)``.
        sigma: sd of an innovation, ``(*batch)``.
        innovations: standard normals e, ``(*batch, T)``.

    Returns:
        Log-variances h, ``(*batch, T)``.
    """
    mu, phi, sigma = (v.unsqueeze(-1) for v in (mu, phi, sigma))
    first = innovations[..., :1] / (1 - phi**2).sqrt()  # the spread of the stationary law
    path = sigma * torch.cat([first, innovations[..., 1:]], dim=-1)
    shift = 1
    while shift < path.shape[-1]:
        late = path[..., shift:] + phi**shift * path[..., :-shift]
        path = torch.cat([path[..., :shift], late], dim=-1)
        shift *= 2
    return mu + path


def volatility_model(returns: Tensor) -> None:
    """Level, persistence and spread, an innovation a day, and the returns."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    half = pyro.sample("half_phi", dist.Beta(20.0, 1.5))
    variance = pyro.sample("sigma_squared", dist.InverseGamma(2.5, 0.025))
    days = returns.shape[-1]
    innovations = pyro.sample("innovations", dist.Normal(0.0, 1.0).expand([days]).to_event(1))
    h = log_variances(mu, 2 * half - 1, variance.sqrt(), innovations)
    pyro.sample("returns", dist.Normal(0.0, (h / 2).exp()).to_event(1), obs=returns)


def simulate(days: int) -> tuple[Tensor, Tensor]:
    """Returns and true log-variances at ``TRUTH``."""
    generator = torch.Generator().manual_seed(SEED)
    innovations, noise = torch.randn(2, days, generator=generator)
    h = log_variances(*(torch.tensor(v) for v in TRUTH.values()), innovations)
    return (h / 2).exp() * noise, h


def posterior(guide: pf.AutoFlow, n: int) -> dict[str, Tensor]:
    """Draws of mu, phi, sigma and the path h, on the scales of the model's equations."""
    drawn = guide.sample_posterior(n)
    mu, phi, sigma = drawn["mu"], 2 * drawn["half_phi"] - 1, drawn["sigma_squared"].sqrt()
    h = log_variances(mu, phi, sigma, drawn["innovations"])
    return {"mu": mu, "phi": phi, "sigma": sigma, "h": h}


def draw(returns: Tensor, truth: Tensor, bands: Tensor, history: pf.History, path: Path) -> None:
    """Returns, true and inferred volatility with its 50 % and 90 % bands, and the training."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplot_mosaic("ab;cc", figsize=(11, 6.5), layout="constrained")
    days = torch.arange(1, len(returns) + 1).numpy()
    bands = bands.numpy()
    axes["a"].bar(days, returns.numpy(), color="0.4", width=1.0)
    axes["a"].set(title="returns", xlabel="day")
    history.plot(axes["b"]).set_title("training of the guide")
    ax = axes["c"]
    ax.fill_between(days, bands[0], bands[4], color="tab:blue", alpha=0.2, lw=0, label="90 %")
    ax.fill_between(days, bands[1], bands[3], color="tab:blue", alpha=0.35, lw=0, label="50 %")
    ax.plot(days, bands[2], color="tab:blue", lw=1.5, label="posterior median")
    ax.plot(days, truth.numpy(), color="black", lw=1.2, label="truth")
    ax.set(title="volatility exp(h / 2)", xlabel="day", xlim=(1, len(returns)), ylim=(0, None))
    ax.legend(ncols=4, loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Simulate, infer, print the table, save the picture; returns the table."""
    logging.getLogger("pyro").setLevel(logging.WARNING)
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    returns, h = simulate(40 if args.smoke else 200)
    guide = pf.AutoFlow(volatility_model, layers=3)
    history = pf.fit_guide(volatility_model, guide, returns, max_steps=20 if args.smoke else 3000)
    found = posterior(guide, 500 if args.smoke else 4000)
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    bands = (found["h"] / 2).exp().quantile(levels, dim=0)
    truth = (h / 2).exp()
    inside = ((bands[0] < truth) & (truth < bands[4])).float().mean().item()
    distance = (bands[2] - truth).abs().mean().item()
    rows = [
        (f"{name}, truth {value:.2f}", f"{found[name].mean():.2f} +- {found[name].std():.2f}")
        for name, value in TRUTH.items()
    ]
    rows += [
        ("ELBO, nats", f"{history.score:.2f}"),
        ("true volatilities inside the 90 % bands", f"{100 * inside:.0f} %"),
        ("mean distance of median from truth", f"{distance:.3f}"),
        ("the same of a constant volatility", f"{(returns.std() - truth).abs().mean():.3f}"),
        ("seconds to fit", f"{history.seconds:.0f}"),
    ]
    draw(returns, truth, bands, history, args.out)
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value:>16}" for name, value in rows))
    print(f"\n{history.stopped}; picture: {args.out}")
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/stochastic_volatility.png"), help="picture"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the guide; the data have their own")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
