"""Keeps a flow and Pyro's parameter store in step: the store wins, whoever registers the flow.

``pyro.module(name, m)`` registers the parameters of ``m`` but, where the store already holds other
tensors under those names (a second guide of one process, a store loaded from disk), leaves ``m``
computing with its own: ``SVI`` then moves tensors that nobody reads, and says nothing. Buffers
(standardisation, permutations) never reach the store at all.

Pyro does not tell a module that it is being registered, but it does go through its tree. So a flow
that is gone through looks for the ``pyro.module`` call that does so, and there first takes over
what the store holds: values are copied into the flow's own tensors, and these take their place in
the store. Optimisers that hold the flow's parameters stay valid.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn

from pyroflows._pyro.names import put_in_store

_MODULE = pyro.primitives.module.__code__
_GETATTR = PyroModule.__getattr__.__code__


class Links:
    """What a module knows of the store's tensors; copies and pickles of it start anew.

    Attributes:
        known: by full name, what it put there itself.
        newer_than: by id, what was there when a ``state_dict`` was loaded. Beside the id a
            reference: when the store is cleared, later tensors may be given the same ids.
    """

    def __init__(self) -> None:
        self.known: dict[str, weakref.ref[Tensor]] = {}
        self.newer_than: dict[int, weakref.ref[Tensor]] = {}

    def __reduce__(self) -> tuple:
        return Links, ()


def _registering_frame() -> FrameType | None:
    """The frame of the ``pyro.module`` or ``PyroModule`` access that goes through the tree."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code not in (_MODULE, _GETATTR):
        frame = frame.f_back
    return frame


class Synced(nn.Module):
    """A module that is kept in step with Pyro's store as flows are, of one dtype, on one device."""

    def __init__(self) -> None:
        super().__init__()
        self._links = Links()
        self.register_load_state_dict_post_hook(_loaded)

    @property
    def dtype(self) -> torch.dtype:
        """Of its floating-point tensors; torch's default where it has none."""
        return self._tensor().dtype

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self._tensor().device

    def _tensor(self) -> Tensor:
        own = (*self.parameters(), *self.buffers())
        return next((t for t in own if t.is_floating_point()), torch.empty(0))

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, nn.Module]]:
        """As in torch; when Pyro goes through the tree, it is brought in step with the store."""
        self._keep_in_step(prefix)
        yield from super().named_modules(memo, prefix, remove_duplicate)

    def _keep_in_step(self, prefix: str) -> None:
        # Under a compiler there are no frames to look at, and Pyro is not traced.
        frame = None if torch.compiler.is_compiling() else _registering_frame()
        if frame is None:
            return
        if frame.f_code is _MODULE:
            _Registration(self, self._links, frame.f_locals["name"], prefix).make()
        elif pyro.settings.get("module_local_params"):
            # SVI asks every parameter for ``unconstrained``, which Pyro does not set in this mode.
            for _, module in nn.Module.named_modules(self):
                for parameter in module._parameters.values():
                    if parameter is not None:
                        vars(parameter)["unconstrained"] = weakref.ref(parameter)

    def __getstate__(self) -> dict:
        for _, module in nn.Module.named_modules(self):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    vars(tensor).pop("unconstrained", None)  # a weak reference cannot be pickled
        return self.__dict__


def _loaded(module: Synced, _incompatible_keys: object) -> None:
    """A ``state_dict`` was loaded: newer than what the store holds at this moment."""
    held = pyro.get_param_store()._params.values()
    module._links.newer_than = {id(t): weakref.ref(t) for t in held}


class InStep(Synced):
    """Another module, say an encoder, kept in step with Pyro's store as flows are.

    Args:
        module: what a call runs.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        return self.module(*args, **kwargs)


class _Registration:
    """A ``pyro.module`` call: a module and the store's entries under one name.

    Parameters are put into the store themselves. Buffers are there as copies: what is in the store
    must be something that takes gradients.
    """

    def __init__(self, module: Synced, links: Links, name: str, prefix: str) -> None:
        self.module = module
        self.start = f"{prefix}." if prefix else ""
        self.name = name
        self.store = pyro.get_param_store()
        self.known = links.known
        self.newer_than, links.newer_than = links.newer_than, {}

    def make(self) -> None:
        """Take over what the store holds, unless the module's values are newer."""
        for path, module in nn.Module.named_modules(self.module):
            dot = f"{self.start}{path}." if path else self.start
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    self._parameter(param_with_module_name(self.name, dot + key), parameter)
            for key, buffer in module._buffers.items():
                if buffer is not None and key not in module._non_persistent_buffers_set:
                    self._buffer(param_with_module_name(self.name, dot + key), buffer)

    def _parameter(self, full: str, tensor: Tensor) -> None:
        stored = self.store._params.get(full)
        if stored is not None and stored is not tensor:
            if not self._is_own_or_older(full, stored):
                self._take(full, stored, tensor)
            self.store._param_to_name.pop(stored, None)
            self.store._params[full] = tensor
            self.store._param_to_name[tensor] = full
        self._note(full, tensor)

    @torch.no_grad()
    def _buffer(self, full: str, tensor: Tensor) -> None:
        stored = self.store._params.get(full)
        if stored is None:
            self.store.setdefault(full, tensor.to(torch.float64, copy=True))
            stored = self.store._params[full]
        elif self._is_own_or_older(full, stored):
            stored.copy_(tensor)
        else:
            self._take(full, stored, tensor)
        self._note(full, stored)

    def _note(self, full: str, stored: Tensor) -> None:
        self.known[full] = weakref.ref(stored)
        put_in_store(full, stored)

    def _is_own_or_older(self, full: str, stored: Tensor) -> bool:
        """Whether the flow put it there, or a ``state_dict`` was loaded over it since."""
        references = self.known.get(full), self.newer_than.get(id(stored))
        return any(known is not None and known() is stored for known in references)

    @torch.no_grad()
    def _take(self, full: str, stored: Tensor, tensor: Tensor) -> None:
        if stored.shape != tensor.shape:
            raise ValueError(
                f"Pyro's parameter store holds {full!r} with shape {tuple(stored.shape)}, but the "
                f"flow's has shape {tuple(tensor.shape)}: another model used this name; give this "
                "one a name of its own, or call pyro.clear_param_store()"
            )
        tensor.copy_(stored)
