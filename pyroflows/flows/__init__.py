"""Named flows: functions that return a ``Flow``, one file a family, found by themselves."""

import importlib
import pkgutil

from pyroflows.flows.autoregressive import iaf, maf
from pyroflows.flows.building import Example, builder
from pyroflows.flows.causal import wavenet
from pyroflows.flows.coupling import nice, realnvp
from pyroflows.flows.images import glow, mintnet, multiscale_realnvp
from pyroflows.flows.spline import nsf


def examples() -> dict[str, Example]:
    """The ``EXAMPLES`` of every file in this folder, by name."""
    found: dict[str, Example] = {}
    for module in pkgutil.iter_modules(__path__):
        found.update(getattr(importlib.import_module(f"{__name__}.{module.name}"), "EXAMPLES", {}))
    return found


__all__ = [
    "nice",
    "realnvp",
    "maf",
    "iaf",
    "nsf",
    "wavenet",
    "multiscale_realnvp",
    "glow",
    "mintnet",
    "builder",
    "Example",
    "examples",
]
