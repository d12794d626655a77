"""What this library reads of Pyro's guides and samplers that Pyro has no public name for."""

from __future__ import annotations

import torch
from pyro.infer import MCMC
from torch import Tensor


def diverged(mcmc: MCMC, chain: int, draws: int) -> Tensor:
    """Which draws of a chain end a trajectory that diverged, ``(draws,)``.

    Pyro's ``diagnostics()`` reports it only beside an effective size, which takes four draws.

    Args:
        mcmc: that has run.
        chain: number of the chain.
        draws: how many it has.
    """
    found = torch.zeros(draws, dtype=torch.bool)
    diagnostics: dict = mcmc._diagnostics[chain] or {}  # Pyro makes the list of None, then fills it
    found[diagnostics.get("divergences", [])] = True
    return found
