"""The three things people come for, end to end on real data, in six minutes on two cores.

1. A density: fit a MAF to 8x8 handwritten digits (64 dimensions), beside a full Gaussian.
2. A fast sampler: distil it into an IAF, which draws all pixels in one pass.
3. A posterior: train an IAF guide on the eight-schools data and compare it with NUTS.

Prints one table, saves one picture::

    python models/quickstart.py [--out runs/quickstart.png] [--smoke]

Data: digits from scikit-learn (UCI, Alpaydin & Kaynak 1998); eight schools from ArviZ (Rubin 1981).
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor
from torch.distributions import MultivariateNormal

import pyroflows as pf

# Standard errors of the eight schools' effects (Rubin 1981, table 1); ArviZ ships the effects.
STANDARD_ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def gaussian_nats(data: pf.datasets.Split) -> float:
    """Held-out nats of the Gaussian with the training rows' mean and covariance."""
    seen = torch.cat([data.train, data.val]).double()
    # Some pixels are always blank but for the noise: a small ridge keeps the covariance regular.
    covariance = torch.cov(seen.T) + 1e-6 * torch.eye(seen.shape[1], dtype=seen.dtype)
    gaussian = MultivariateNormal(seen.mean(dim=0), covariance)
    return gaussian.log_prob(data.test.double()).mean().item()


def digits(smoke: bool) -> tuple[list[tuple[str, str]], dict[str, Tensor]]:
    """Fit a MAF, distil it into an IAF; rows of the table and pictures to show."""
    data = pf.datasets.digits()
    quick = {"max_epochs": 2} if smoke else {}
    teacher = pf.maf(data.train.shape[1])
    history = pf.fit(teacher, data.train, val=data.val, **quick)
    student = pf.student_of(teacher)
    steps = {"max_steps": 50 if smoke else 1500}
    course = pf.distill(teacher, student, data=data.train, **steps)
    report = pf.compare(teacher, student, data.test)
    rows = [
        ("digits: Gaussian, held-out nats", f"{gaussian_nats(data):.2f}"),
        ("digits: MAF, held-out nats", f"{report.teacher_nats:.2f}"),
        ("digits: IAF distilled from it", f"{report.student_nats:.2f}"),
        ("KL(IAF || MAF), nats", f"{report.reverse_kl[0]:.2f} +- {report.reverse_kl[1]:.2f}"),
        ("KL(MAF || IAF), nats", f"{report.forward_kl[0]:.2f} +- {report.forward_kl[1]:.2f}"),
        ("MAF samples / s, batches of 1,000", f"{report.speeds['teacher'][1000]:,.0f}"),
        ("IAF samples / s, batches of 1,000", f"{report.speeds['student'][1000]:,.0f}"),
        ("seconds to fit, to distil", f"{history.seconds:.0f}, {course.seconds:.0f}"),
    ]
    pictures = {
        "real digits": data.test[:32],
        "MAF (teacher)": teacher.sample((32,)),
        "IAF (student)": student.sample((32,)),
    }
    return rows, pictures


def eight_schools(effects: Tensor) -> None:
    """Rubin's hierarchical model, schools' deviations in units of their spread."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(effects)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("effect", dist.Normal(mu + tau * eta, STANDARD_ERRORS), obs=effects)


def schools(smoke: bool) -> list[tuple[str, str]]:
    """An IAF guide beside NUTS: mean and sd of the population's parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.x announces ArviZ 1
        import arviz as az

        observed = az.load_arviz_data("centered_eight")["observed_data"]["obs"].values
    effects = torch.as_tensor(observed, dtype=torch.float32)
    guide = pf.AutoFlow(eight_schools, layers=3, hidden=(32,))
    history = pf.fit_guide(eight_schools, guide, effects, max_steps=20 if smoke else 2000)
    begin = time.perf_counter()
    draws = 10 if smoke else 500
    nuts = MCMC(
        NUTS(eight_schools),
        num_samples=draws,
        warmup_steps=draws,
        disable_progbar=not sys.stderr.isatty(),
    )
    nuts.run(effects)
    seconds = time.perf_counter() - begin
    posteriors = {"IAF guide": guide.sample_posterior(10_000), "NUTS": nuts.get_samples()}
    rows = [
        (f"eight schools: {name}, {method}", f"{d[name].mean():.2f} +- {d[name].std():.2f}")
        for name in ("mu", "tau")
        for method, d in posteriors.items()
    ]
    return [*rows, ("seconds: guide, NUTS", f"{history.seconds:.0f}, {seconds:.0f}")]


def draw(pictures: dict[str, Tensor], path: Path) -> None:
    """Each set of digits as a 4 x 8 sheet, side by side, a pixel of margin between them."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(pictures), figsize=(12, 2.4), layout="constrained")
    for ax, (title, digits) in zip(axes, pictures.items(), strict=True):
        sheet = pf.plots.sheet(digits.reshape(4, 8, 1, 8, 8), bins=2)  # grey levels from 0 to 1
        ax.imshow(sheet.squeeze(-1).numpy(), cmap="gray_r", vmin=0, vmax=1)
        ax.set(title=title, xticks=[], yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Run all three, print the table, save the picture; returns the table."""
    logging.getLogger("pyro").setLevel(logging.WARNING)
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    begin = time.perf_counter()
    rows, pictures = digits(args.smoke)
    rows += schools(args.smoke)
    draw(pictures, args.out)
    rows.append(("seconds in all", f"{time.perf_counter() - begin:.0f}"))
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value:>18}" for name, value in rows))
    print(f"\npicture: {args.out}")
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart.png"), help="picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
