"""Step time against batch, features, layers and processes: one table, in Markdown.

``python benchmarks/scale.py`` measures this machine with one process and two; with ``--processes 1
2 4 8`` others. A step is a loss, its gradient, their average over all processes, and an update.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import pyroflows as pf

BATCHES, FEATURES, LAYERS = (64, 512, 4096), (4, 32), (2, 8)
BASE = {"batch": 512, "features": 8, "layers": 4}


def cases(quick: bool) -> list[dict[str, int]]:
    """One thing varied at a time around a middle case."""
    batches, features, layers = BATCHES, FEATURES, LAYERS
    if quick:
        batches, features, layers = BATCHES[:2], FEATURES[:1], LAYERS[:1]
    return [
        BASE,
        *({**BASE, "batch": batch} for batch in batches if batch != BASE["batch"]),
        *({**BASE, "features": count} for count in features),
        *({**BASE, "layers": count} for count in layers),
    ]


def milliseconds(case: dict[str, int], steps: int, where: dict[str, object]) -> float:
    """Time from one step's end to the next one's, the lower quartile of many.

    So that what else the machine does then matters little.
    """
    torch.manual_seed(0)
    x = torch.randn(steps * case["batch"], case["features"])
    flow = pf.maf(case["features"], layers=case["layers"], hidden=(64, 64))
    settings = {"val": None, "dropout": 0.0, "start": False, "progress": False}
    settings |= {"batch_size": case["batch"], "max_epochs": 1}
    ends: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    try:
        pf.fit(flow, x, **settings, **where)
    finally:
        hook.remove()
    taken = sorted(after - before for before, after in itertools.pairwise(ends))
    return 1e3 * taken[len(taken) // 4]


def measured(processes: int, steps: int, quick: bool) -> list[float]:
    """The times of all cases, under ``torchrun``."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", str(processes), __file__, "--steps", str(steps)]
    command += ["--worker", *(["--quick"] if quick else [])]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def work(steps: int, quick: bool) -> None:
    """One process's part; the first one reports."""
    torch.set_num_threads(1)
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    fabric = {"accelerator": "cpu", "devices": processes, "strategy": "ddp"}
    where = {"fabric": fabric}
    times = [milliseconds(case, steps, where) for case in cases(quick)]
    if rank == 0:
        print(json.dumps(times))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work(asked.steps, asked.quick)
        return
    columns = [measured(count, asked.steps, asked.quick) for count in asked.processes]
    heads = [f"{count} process{'es' if count > 1 else ''}" for count in asked.processes]
    print(f"| batch | features | layers | {' | '.join(heads)} |")
    print("|--:" * (3 + len(heads)) + "|")
    for case, *times in zip(cases(asked.quick), *columns, strict=True):
        numbers = [*map(str, case.values()), *(f"{ms:.1f} ms" for ms in times)]
        print(f"| {' | '.join(numbers)} |")


if __name__ == "__main__":
    main()
