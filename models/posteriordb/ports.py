"""Which Pyro model stands for which posterior of posteriordb.

Latent sites have Stan's names, scales and priors. Densities equal Stan's up to a constant factor.
"""

from __future__ import annotations

import with_draws
import without_draws
from data import load_data
from port import Port
from regressions import Data

WITH_DRAWS: dict[str, Port] = with_draws.PORTS
WITHOUT_DRAWS: dict[str, Port] = without_draws.PORTS
MODELS: dict[str, Port] = {**WITH_DRAWS, **WITHOUT_DRAWS}


def load(name: str) -> tuple[Port, Data]:
    """A posterior's port and prepared data.

    Args:
        name: one of ``MODELS``.

    Returns:
        ``port, data``: ``port.model(data)`` runs.

    Raises:
        ValueError: there is no such port.
        FileNotFoundError: ``PYROFLOWS_DATA`` is not set, or its folder lacks a file.
    """
    if name not in MODELS:
        raise ValueError(f"name: expected one of {', '.join(MODELS)}, got {name!r}")
    port = MODELS[name]
    return port, port.prepare(load_data(name))
