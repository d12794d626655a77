"""Named flows: functions that return a ``Flow``, one file a family, found by themselves."""

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType

from pyroflows.distributions.flow import Flow
from pyroflows.flows.assembly import MARKED, Example, builder, close, vector_flow
from pyroflows.flows.autoregressive import iaf, maf
from pyroflows.flows.coupling import nice, realnvp
from pyroflows.flows.images import glow, mintnet, multiscale_realnvp
from pyroflows.flows.linear_rational import LinearRationalSpline
from pyroflows.flows.signals import wavenet
from pyroflows.flows.spline import nsf


def _files() -> list[ModuleType]:
    """The modules of this folder: a flow or a family dropped into it needs no other mention."""
    found = pkgutil.iter_modules(__path__)
    return [importlib.import_module(f"{__name__}.{module.name}") for module in found]


_files()  # families are known once their file is read


def builders() -> dict[str, Callable[..., Flow]]:
    """The builders of every file in this folder, by name.

    Example:
        >>> import pyroflows as pf
        >>> "maf" in pf.flows.builders()
        True
    """
    names = [name for module in _files() for name in vars(module) if name in MARKED]
    return {name: MARKED[name] for name in names}


def examples() -> dict[str, Example]:
    """The ``EXAMPLES`` of every file in this folder, by name.

    Example:
        >>> import pyroflows as pf
        >>> pf.flows.examples()["maf"].fast
        'log_prob'
    """
    found: dict[str, Example] = {}
    for module in _files():
        found.update(getattr(module, "EXAMPLES", {}))
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
    "LinearRationalSpline",
    "builder",
    "builders",
    "vector_flow",
    "close",
    "Example",
    "examples",
]
