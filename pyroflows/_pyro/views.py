"""Views of modules: torch keeps a module's tensors in tables that have no public name."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from pyroflows._pyro.memo import Forgetful

M = TypeVar("M", bound=nn.Module)


def detached_view(module: M) -> M:
    """A copy of the tree of modules that shares all tensors, with its parameters detached.

    Later in-place changes of the tensors show in it; what else is set on it stays there.
    """
    view = object.__new__(type(module))
    tables = {
        "_parameters": {k: p if p is None else p.detach() for k, p in module._parameters.items()},
        "_buffers": dict(module._buffers),
        "_modules": {k: m if m is None else detached_view(m) for k, m in module._modules.items()},
    }
    for name, value in module.__dict__.items():
        view.__dict__[name] = copy.copy(value) if isinstance(value, Forgetful) else value
    view.__dict__.update(tables)
    return view
