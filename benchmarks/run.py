"""pyroflows beside Pyro, zuko, nflows and normflows: one process, contenders taking turns.

Same architecture for all (``linear="reverse"``, no residuals; parameter counts are printed), eval
mode where nothing trains, validation of arguments off for all (importing zuko turns it off for the
whole process). Prints a table of medians, quartiles and ratios to pyroflows, and writes the same as
JSON::

    make bench                                  # all works, all sizes
    python benchmarks/run.py --sizes 64 --works sample train_step --seconds 20

A ratio of 25 says that the contender takes 25 times as long as pyroflows. The arithmetic limit is
the time of the multiply-adds that must be done, at the matrix-product rate measured in this run.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from measure import alternate, multiply_adds, multiply_adds_per_second, peak_bytes, spread
from peers import BINS, Contender, available
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal

import pyroflows as pf

# features, hidden width, layers, rows
SIZES = {
    6: (6, 64, 5, 1000),
    21: (21, 128, 5, 1000),
    64: (64, 512, 5, 1000),
    784: (784, 1024, 5, 100),
}
Work = Callable[[], object]


def scoring(contender: Contender, x: torch.Tensor) -> Work:
    """Score fresh points without a graph."""
    contender.module.eval()

    @torch.no_grad()
    def work() -> None:
        contender.log_prob(x)

    return work


def sampling(contender: Contender, x: torch.Tensor) -> Work:
    """Draw as many rows as x has."""
    contender.module.eval()

    @torch.no_grad()
    def work() -> None:
        contender.sample(len(x))

    return work


def training(contender: Contender, x: torch.Tensor) -> Work:
    """Loss, gradient and a step of Adam."""
    contender.module.train()
    kind = {"fused": True} if contender.compiled else {}
    optimiser = torch.optim.Adam(contender.module.parameters(), lr=1e-5, **kind)

    def work() -> None:
        optimiser.zero_grad()
        (-contender.log_prob(x).mean()).backward()
        optimiser.step()

    return work


def differentiating(contender: Contender, x: torch.Tensor) -> Work:
    """The gradient of the slow direction's log-density: by x and by all parameters."""
    contender.module.train()

    def work() -> None:
        point = x.clone().requires_grad_()
        contender.module.zero_grad()
        contender.log_prob(point).sum().backward()

    return work


@dataclass(frozen=True)
class Measure:
    """A line of the table.

    Attributes:
        make: what is done.
        spline: splines instead of affine maps.
        scores_fast: the MAF's orientation, not the IAF's.
        sizes: numbers of features at which it is measured.
        rows: instead of the size's own.
        compiled: up to how many features it is also measured under ``torch.compile``.
    """

    make: Callable[[Contender, torch.Tensor], Work]
    spline: bool = False
    scores_fast: bool = True
    sizes: tuple[int, ...] = (6, 21, 64, 784)
    rows: int | None = None
    compiled: int = 0


WORKS = {
    "log_prob": Measure(scoring, compiled=784),
    "train_step": Measure(training, compiled=784),
    "sample": Measure(sampling, compiled=6),
    "sample_one": Measure(sampling, rows=1),
    "iaf_log_prob": Measure(scoring, scores_fast=False),
    "iaf_log_prob_one": Measure(scoring, scores_fast=False, rows=1),
    "inverse_gradient": Measure(differentiating, scores_fast=False, sizes=(6, 21, 64)),
    "spline_log_prob": Measure(scoring, spline=True, sizes=(6, 21, 64)),
    "spline_train_step": Measure(training, spline=True, sizes=(6, 21, 64), compiled=21),
    "spline_sample": Measure(sampling, spline=True, sizes=(6, 21, 64)),
    "spline_inverse_gradient": Measure(
        differentiating, spline=True, scores_fast=False, sizes=(6, 21)
    ),
}


def run_work(name: str, size: int, batch: int | None, seconds: float) -> dict:
    """One line of the table: all contenders at one work and size."""
    torch.compiler.reset()  # what was compiled for another line counts against a limit
    measure = WORKS[name]
    spline = measure.spline
    features, hidden, layers, rows = SIZES[size]
    rows = batch or measure.rows or rows
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(rows, features, device=device)
    works, parameters, memory = {}, {}, {}
    for contender, build in available().items():
        torch.manual_seed(0)
        made = build(features, hidden, layers, spline, measure.scores_fast)
        too_large = made is not None and made.compiled and features > measure.compiled
        if made is None or too_large or (device == "cuda" and contender == "pyro"):
            continue
        made.module.to(device)
        parameters[contender] = made.parameters
        works[contender] = measure.make(made, x)
        if made.compiled:
            works[contender]()  # once more than the others: the first call compiles
    torch.distributions.Distribution.set_default_validate_args(False)
    if measure.make is differentiating:
        memory = {contender: peak_bytes(work) for contender, work in works.items()}
    taken = alternate(works, seconds, most=200)
    needed = rows * multiply_adds(features, hidden, layers, 3 * BINS - 1 if spline else 2)
    return {
        "work": name,
        "size": [features, hidden, layers, rows],
        "milliseconds": {c: [1e3 * s for s in spread(values)] for c, values in taken.items()},
        "repeats": len(taken["pyroflows"]),
        "parameters": parameters,
        "peak_megabytes": {c: b / 1e6 for c, b in memory.items()},
        "limit": spread(taken["pyroflows"])[1] / (needed / multiply_adds_per_second()),
    }


def run_guide(size: int, seconds: float) -> dict:
    """A step of ``Trace_ELBO`` with an IAF guide, beside ``AutoIAFNormal`` of the same sizes."""
    features, hidden, layers, _ = SIZES[size]
    particles = 64

    def model() -> None:
        with pyro.plate("sites", features):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    pyro.clear_param_store()
    guides = {
        "pyroflows": pf.AutoFlow(
            model, layers=layers, hidden=(hidden, hidden), linear="reverse", residual=False
        ),
        "pyro": AutoIAFNormal(model, hidden_dim=[hidden, hidden], num_transforms=layers),
    }
    works = {}
    for name, guide in guides.items():
        guide()
        optimiser = torch.optim.Adam(guide.parameters(), lr=1e-4)
        elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)

        def step(
            guide: Callable = guide,
            elbo: Trace_ELBO = elbo,
            optimiser: torch.optim.Optimizer = optimiser,
        ) -> None:
            optimiser.zero_grad()
            elbo.differentiable_loss(model, guide).backward()
            optimiser.step()

        works[name] = step
    taken = alternate(works, seconds, most=200)
    return {
        "work": "guide_step",
        "size": [features, hidden, layers, particles],
        "milliseconds": {c: [1e3 * s for s in spread(values)] for c, values in taken.items()},
        "repeats": len(taken["pyroflows"]),
        "parameters": {n: sum(p.numel() for p in g.parameters()) for n, g in guides.items()},
        "peak_megabytes": {},
        "limit": None,
    }


def show(line: dict) -> None:
    """Print a line of the table."""
    times = line["milliseconds"]
    ours = times["pyroflows"][1]
    limit = "" if line["limit"] is None else f", {line['limit']:.1f} x the arithmetic limit"
    print(f"\n{line['work']} {tuple(line['size'])}, {line['repeats']} repeats{limit}")
    for name, (low, mid, high) in times.items():
        memory = line["peak_megabytes"].get(name)
        held = f"  peak {memory:9.1f} MB" if memory else ""
        print(
            f"  {name:21s} {mid:10.2f} ms [{low:.2f}, {high:.2f}]  {mid / ours:8.2f}x"
            f"  {line['parameters'][name]:>10,} parameters{held}",
            flush=True,
        )


def main(args: argparse.Namespace) -> None:
    """Run what is asked for; print and write the table."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {where or 'CPU'}")
    lines = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.works:
        measured_at = (6, 21, 64) if name == "guide_step" else WORKS[name].sizes
        for size in (s for s in args.sizes if s in measured_at):
            if name == "guide_step":
                lines.append(run_guide(size, args.seconds))
            else:
                lines.append(run_work(name, size, args.batch, args.seconds))
            show(lines[-1])
            args.out.write_text(json.dumps(lines, indent=1))
    print(f"\nJSON: {args.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--works", nargs="+", default=[*WORKS, "guide_step"])
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--batch", type=int, help="rows, instead of each size's own")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each line of the table")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks.json"))
    main(parser.parse_args())
