"""Times and peak memory of alternating contenders."""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    synchronise()
    begin = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - begin


def alternate(
    works: dict[str, Callable[[], object]], seconds: float, most: int
) -> dict[str, list[float]]:
    """Seconds of each call, the contenders taking turns.

    Args:
        works: what to run, by contender.
        seconds: how long all may take together, after one call each to warm up.
        most: repeats at the most. There are at least two, or one where two would take ten times as
            long as they may.
    """
    first = {name: timed(work) for name, work in works.items()}
    round_ = sum(first.values())
    least = 2 if 2 * round_ < 10 * seconds else 1
    repeats = int(min(max(seconds / round_, least), most))
    taken: dict[str, list[float]] = {name: [] for name in works}
    order = list(works)
    for _ in range(repeats):
        random.shuffle(order)  # what runs before whom decides what the caches hold
        for name in order:
            taken[name].append(timed(works[name]))
    return taken


def spread(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 4:
        return min(values), statistics.median(values), max(values)
    low, mid, high = statistics.quantiles(values, n=4)
    return low, mid, high


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that one call holds at a time, beyond what was held before it.

    On a GPU by its allocator; on a CPU by the process's resident peak, which Linux lets us reset
    (after handing free memory back, or the call would hide in it).
    """
    work()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        synchronise()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return max(_status("VmHWM") - before, 1)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def multiply_adds_per_second(rows: int = 1000, width: int = 512) -> float:
    """The rate of a plain matrix product on this machine, in this run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(rows, width, device=device), torch.randn(width, width, device=device)
    return rows * width * width / statistics.median(timed(lambda: a @ b) for _ in range(30))


def multiply_adds(features: int, hidden: int, layers: int, params: int) -> float:
    """What one pass of autoregressive nets must do for one row: half of each matrix is zero."""
    return layers * 0.5 * (features * hidden + hidden * hidden + hidden * features * params)
