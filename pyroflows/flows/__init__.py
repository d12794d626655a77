"""Named flows: functions that return a ``Flow``, one file a family, found by themselves."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable

from pyroflows.distributions.flow import Flow
from pyroflows.flows.assembly import Example, builder, close
from pyroflows.flows.autoregressive import iaf, maf
from pyroflows.flows.coupling import nice, realnvp
from pyroflows.flows.images import glow, mintnet, multiscale_realnvp
from pyroflows.flows.signals import wavenet
from pyroflows.flows.spline import nsf


def builders() -> dict[str, Callable[..., Flow]]:
    """The builders of every file in this folder, by name.

    Example:
        >>> import pyroflows as pf
        >>> "maf" in pf.flows.builders()
        True
    """
    found: dict[str, Callable[..., Flow]] = {}
    for module in pkgutil.iter_modules(__path__):
        members = vars(importlib.import_module(f"{__name__}.{module.name}")).items()
        marked = {k: v for k, v in members if getattr(v, "is_builder", False) is True}
        found.update({k: v for k, v in marked.items() if inspect.isfunction(v)})
    return found


def examples() -> dict[str, Example]:
    """The ``EXAMPLES`` of every file in this folder, by name.

    Example:
        >>> import pyroflows as pf
        >>> pf.flows.examples()["maf"].fast
        'log_prob'
    """
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
    "builders",
    "close",
    "Example",
    "examples",
]
