"""Peak memory of scoring and drawing many rows without a graph.

``python tests/reliability/memory.py log_prob 5_000_000 "maf(6)"`` prints MiB beyond the rows and
what comes of them. Names are those of flows over 6 features, with networks by default, or of the
examples; of pictures there are fewer.
"""

import ctypes
import gc
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.testing.cases import contexts, prepared

SIX = {"maf": pf.maf, "iaf": pf.iaf, "realnvp": pf.realnvp, "nsf": pf.nsf}
FLOWS = {f"{name}(6)": lambda build=build: build(6) for name, build in SIX.items()}
FLOWS |= {name: example.make for name, example in pf.flows.examples().items()}
MIB = 2**20


def highest() -> int:
    """The most bytes that were resident at once since ``begin_anew``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def begin_anew() -> int:
    """Let the mark start from what is resident now, and return that."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not given back by itself
    Path("/proc/self/clear_refs").write_text("5")
    return highest()


def again(values: Tensor | None, rows: int) -> Tensor | None:
    """As many rows, by repeating those that there are."""
    return None if values is None else values[torch.arange(rows) % len(values)]


@torch.no_grad()
def measured(name: str, what: str, rows: int) -> tuple[int, float, float]:
    """How many rows, and MiB and seconds of work that they took."""
    flow = prepared(FLOWS[name], torch.float32, 0.2)
    rows = rows if len(flow.event_shape) == 1 else rows // (4 * flow.event_shape.numel())
    few = contexts(flow.context_shape, (500,), torch.float32)
    context, shape = again(few, rows), (rows,) if few is None else ()
    x = flow.sample((500,) if few is None else (), few)  # nothing is set up later
    flow.log_prob(x, few)
    x = again(x, rows) if what == "log_prob" else None
    before, began = begin_anew(), time.process_time()
    found = flow.sample(shape, context) if x is None else flow.log_prob(x, context)
    seconds = time.process_time() - began
    beyond = highest() - before - found.numel() * found.element_size()
    return rows, beyond / MIB, seconds


def main(what: str, rows: str, *names: str) -> None:
    """A line for each flow."""
    for name in names or FLOWS:
        count, mib, seconds = measured(name, what, int(rows))
        print(f"{name:27}{what:9}{count:9} rows{mib:8.0f} MiB{seconds:8.1f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
