"""A flow used before a process is started, and again in that process.

``python tests/reliability/processes.py fork 1`` forks after use with one thread, ``fork 2`` with
two, whose child then takes one, and ``spawn 2`` begins a new process.
"""

import multiprocessing
import sys

import torch

import pyroflows as pf


def score(flow: pf.Flow, x: torch.Tensor, one_thread: bool) -> float:
    """A training step and a mean log-density, over enough rows for more than one thread."""
    if one_thread:
        torch.set_num_threads(1)
    flow.log_prob(x).mean().backward()
    with torch.no_grad():
        return flow.log_prob(x).mean().item()


def main(method: str, threads: str) -> None:
    """Print the mean log-density here and there."""
    torch.set_num_threads(int(threads))
    flow, x = pf.maf(6), torch.randn(20_000, 6)
    here = score(flow, x, one_thread=False)
    flow.zero_grad(set_to_none=True)  # a gradient may not travel
    with multiprocessing.get_context(method).Pool(1) as pool:
        there = pool.apply_async(score, (flow, x, method == "fork")).get(timeout=120)
    print(here, there)


if __name__ == "__main__":
    main(*sys.argv[1:])
