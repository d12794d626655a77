"""One training step of a MAF beside Pyro's and zuko's, same sizes, in one process.

A step is the loss, its gradient and Adam. The contenders take turns, so that whatever else the
machine does hits all alike; the table gives medians and quartiles, and ratios to pyroflows::

    python benchmarks/training_step.py [--repeats 30] [--batch 256]

zuko is measured when it is installed (``pip install pyroflows[benchmarks]``).
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import affine_autoregressive
from torch import Tensor, nn

import pyroflows as pf

SIZES = ((6, 64), (21, 128), (64, 512))
LAYERS = 5


def pyroflows_maf(features: int, hidden: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The flow and its loss."""
    flow = pf.maf(features, layers=LAYERS, hidden=(hidden, hidden), linear="reverse")
    return flow, lambda x: -flow().log_prob(x).mean()


def pyro_maf(features: int, hidden: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Pyro's layers, inverted as its users do; the caches are cleared after each step."""
    layers = [affine_autoregressive(features, [hidden, hidden]) for _ in range(LAYERS)]
    base = dist.Normal(torch.zeros(features), torch.ones(features)).to_event(1)

    def loss(x: Tensor) -> Tensor:
        for layer in layers:
            layer.clear_cache()
        return -dist.TransformedDistribution(base, [t.inv for t in layers]).log_prob(x).mean()

    return nn.ModuleList(layers), loss


def zuko_maf(features: int, hidden: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The same by zuko."""
    import zuko

    flow = zuko.flows.MAF(features, transforms=LAYERS, hidden_features=(hidden, hidden))
    return flow, lambda x: -flow().log_prob(x).mean()


def contenders() -> dict[str, Callable]:
    """What is installed; zuko last, since importing it turns validation off for everyone."""
    found = {"pyroflows": pyroflows_maf, "pyro": pyro_maf}
    if importlib.util.find_spec("zuko"):
        found["zuko"] = zuko_maf
    return found


def measure(features: int, hidden: int, batch: int, repeats: int) -> dict[str, Tensor]:
    """Milliseconds of each repeat, by contender."""
    x = torch.randn(batch, features)
    steps = {}
    for name, make in contenders().items():
        module, loss = make(features, hidden)
        optimiser = torch.optim.Adam(module.parameters(), lr=1e-4)

        def step(loss: Callable = loss, optimiser: torch.optim.Optimizer = optimiser) -> None:
            optimiser.zero_grad()
            loss(x).backward()
            optimiser.step()

        steps[name] = (step, sum(p.numel() for p in module.parameters()))
    # Validation off for all: zuko's import does so for the whole process anyway.
    torch.distributions.Distribution.set_default_validate_args(False)
    taken = {name: [] for name in steps}
    for repeat in range(repeats + 3):
        for name, (step, _) in steps.items():
            begin = time.perf_counter()
            step()
            if repeat >= 3:
                taken[name].append(1e3 * (time.perf_counter() - begin))
    for name, (_, parameters) in steps.items():
        print(f"    {name}: {parameters:,} parameters")
    return {name: torch.tensor(values) for name, values in taken.items()}


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    print(f"{LAYERS} layers, batch {args.batch}, {torch.get_num_threads()} threads")
    for features, hidden in SIZES:
        print(f"D={features}, hidden {hidden}x{hidden}")
        taken = measure(features, hidden, args.batch, args.repeats)
        ours = taken["pyroflows"].median()
        for name, values in taken.items():
            low, mid, high = values.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            ratio = mid / ours
            print(f"  {name:10s} {mid:8.2f} ms  [{low:.2f}, {high:.2f}]  {ratio:.2f}x ours")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--batch", type=int, default=256)
    main(parser.parse_args())
