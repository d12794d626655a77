"""Keeps a flow and Pyro's parameter store in step: the store wins, whoever registers the flow.

``pyro.module(name, m)`` registers the parameters of ``m`` but, where the store already holds other
tensors under those names (a second guide of one process, a store loaded from disk), leaves ``m``
computing with its own: ``SVI`` then moves tensors that nobody reads, and says nothing. Buffers
(standardisation, permutations) never reach the store at all.

Pyro does not tell a module that it is being registered, but it does walk the module's tree. So a
flow, when walked, looks for the ``pyro.module`` call it is walked by, and there first takes over
what the store holds: values are copied into the flow's own tensors, and these take their place in
the store. Optimisers that hold the flow's parameters stay valid.
"""

from __future__ import annotations

import sys
import weakref
from types import FrameType

import pyro
import torch
from pyro.nn import PyroModule
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn
from torch.distributions import constraints

_MODULE = pyro.primitives.module.__code__
_GETATTR = PyroModule.__getattr__.__code__
_DEPTH = 12  # frames between a flow's walk and the call that caused it


def _registering_frame() -> FrameType | None:
    """The frame of the ``pyro.module`` or ``PyroModule`` access that walks the caller's tree."""
    frame = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame is None or frame.f_code in (_MODULE, _GETATTR):
            return frame
        frame = frame.f_back
    return None


def keep_in_step(flow: nn.Module, prefix: str) -> None:
    """Called when ``flow``'s tree is walked; acts only if Pyro is the one who walks it."""
    frame = _registering_frame()
    if frame is None:
        return
    if frame.f_code is _MODULE:
        _take_over(flow, frame.f_locals["name"], prefix)
    elif pyro.settings.get("module_local_params"):
        # SVI asks every parameter for ``unconstrained``, which Pyro forgets to set in this mode.
        for parameter in flow.transform.parameters():
            parameter.unconstrained = weakref.ref(parameter)


def _take_over(flow: nn.Module, name: str, prefix: str) -> None:
    """Make the store's entries under ``name`` and the flow's own tensors one and the same."""
    store = pyro.get_param_store()
    linked = flow.__dict__.setdefault("_linked", {})
    for key, tensor, is_parameter in _own_tensors(flow):
        full = param_with_module_name(name, f"{prefix}.{key}" if prefix else key)
        held = store._params.get(full)
        if held is tensor:
            continue
        previous = linked.get(full)
        moved = previous is not None and held is previous()  # e.g. by .to(): the flow is newer
        if held is not None and not moved:
            if held.shape != tensor.shape:
                raise ValueError(
                    f"Pyro's parameter store holds {full!r} with shape {tuple(held.shape)}, but "
                    f"the flow's has shape {tuple(tensor.shape)}: another model used this name; "
                    "give this one a name of its own, or call pyro.clear_param_store()"
                )
            with torch.no_grad():
                tensor.copy_(held)
        if not is_parameter or held is not None:
            _put(store, full, tensor)
        linked[full] = weakref.ref(tensor)


def _own_tensors(flow: nn.Module) -> list[tuple[str, Tensor, bool]]:
    """Trained parameters and persistent buffers, by name."""
    found = []
    for path, module in nn.Module.named_modules(flow):
        dot = f"{path}." if path else ""
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                found.append((dot + key, parameter, True))
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                found.append((dot + key, buffer, False))
    return found


def _put(store: pyro.params.param_store.ParamStoreDict, full: str, tensor: Tensor) -> None:
    """Put the very tensor into the store (its public setter would ask a buffer for gradients)."""
    held = store._params.get(full)
    if held is not None:
        store._param_to_name.pop(held, None)
    store._params[full] = tensor
    store._param_to_name[tensor] = full
    store._constraints[full] = constraints.real
