"""Image flows beside normflows' own: one process, contenders taking turns.

A training step (loss, gradient, Adam), ``log_prob`` without a graph, drawing, and the most memory a
training step holds; and the 1x1 convolution beside a plain ``conv2d``. Prints a table of medians,
quartiles and ratios to pyroflows, and writes the same as JSON::

    OMP_NUM_THREADS=1 python benchmarks/images.py
    python benchmarks/images.py --works image_train_step --sizes cifar --seconds 60
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from image_peers import KINDS
from measure import alternate, peak_bytes, spread
from run import sampling, scoring, show, training
from torch import nn
from torch.nn import functional as F

import pyroflows as pf

# shape, levels, steps, hidden channels, rows
SIZES = {
    "mnist": ((1, 28, 28), 2, 4, 64, 32),
    "cifar": ((3, 32, 32), 3, 4, 64, 32),
}
WORKS = {"image_train_step": training, "image_sample": sampling, "image_log_prob": scoring}


def run_work(name: str, kind: str, size: str, seconds: float) -> dict:
    """One line of the table: both contenders at one work, one flow and one size."""
    shape, levels, steps, channels, rows = SIZES[size]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(rows, *shape, device=device)
    works, parameters = {}, {}
    for contender, build in KINDS[kind].items():
        torch.manual_seed(0)
        made = build(shape, levels, steps, channels)
        made.module.to(device)
        with torch.no_grad():
            made.log_prob(x)  # normflows sets its activation norms at the first call
        parameters[contender] = made.parameters
        works[contender] = WORKS[name](made, x)
    torch.distributions.Distribution.set_default_validate_args(False)
    memory = {}
    if name == "image_train_step":
        memory = {contender: peak_bytes(work) for contender, work in works.items()}
    taken = alternate(works, seconds, most=200)
    return {
        "work": f"{name} {kind}",
        "size": [*shape, levels, steps, channels, rows],
        "milliseconds": {c: [1e3 * s for s in spread(values)] for c, values in taken.items()},
        "repeats": len(taken["pyroflows"]),
        "parameters": parameters,
        "peak_megabytes": {c: b / 1e6 for c, b in memory.items()},
        "limit": None,
    }


def run_conv1x1(size: str, seconds: float) -> dict:
    """The 1x1 convolution's step, forward and backward, beside a plain ``conv2d``'s."""
    (channels, height, width), _, _, _, rows = SIZES[size]
    channels, height, width = 4 * channels, height // 2, width // 2
    x = torch.randn(rows, channels, height, width).to(memory_format=torch.channels_last)
    layer = pf.transforms.Conv1x1(channels)
    weight = nn.Parameter(torch.randn(channels, channels, 1, 1))

    def step(apply: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        def work() -> None:
            apply(x.clone().requires_grad_()).sum().backward()

        return work

    works = {
        "pyroflows": step(lambda v: layer.forward_and_log_det(v)[0]),
        "conv2d": step(lambda v: F.conv2d(v, weight)),
    }
    taken = alternate(works, seconds, most=2000)
    return {
        "work": "image_conv1x1",
        "size": [channels, height, width, rows],
        "milliseconds": {c: [1e3 * s for s in spread(values)] for c, values in taken.items()},
        "repeats": len(taken["pyroflows"]),
        "parameters": dict.fromkeys(works, channels**2),
        "peak_megabytes": {},
        "limit": None,
    }


def main(args: argparse.Namespace) -> None:
    """Run what is asked for; print and write the table."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {where or 'CPU'}")
    lines = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for size in args.sizes:
        for name in args.works:
            kinds = [""] if name == "image_conv1x1" else args.kinds
            for kind in kinds:
                made = run_work(name, kind, size, args.seconds) if kind else None
                lines.append(made or run_conv1x1(size, args.seconds))
                show(lines[-1])
        args.out.write_text(json.dumps(lines, indent=1))
    print(f"\nJSON: {args.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--works", nargs="+", default=[*WORKS, "image_conv1x1"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--seconds", type=float, default=20.0, help="for each line of the table")
    parser.add_argument("--out", type=Path, default=Path("runs/image_benchmarks.json"))
    main(parser.parse_args())
