"""A memory of log-densities that keeps nothing alive and forgets what a change made untrue.

Pyro's ELBO draws from a distribution and later asks the same object to score the very tensor it
drew. For an inverse autoregressive flow the second call would cost an inversion, so the value is
remembered here: weakly, and only for as long as nothing it was computed from has changed.

A change is seen by torch's version counters and by the steps of optimisers. A write to
``tensor.data`` moves neither: on a CPU it is seen where it changes the first or the last element,
and anywhere else not at all. So write to parameters under ``torch.no_grad()``, not to ``.data``.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

# Fused optimisers and those that write to ``p.data`` do not bump ``Tensor._version``, so
# optimiser steps are counted. The hook is registered when the first value is remembered.
_steps = 0
_hook = None


def _count_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    global _steps
    _steps += 1


_WORDS = {
    torch.float16: ctypes.c_uint16,
    torch.bfloat16: ctypes.c_uint16,
    torch.float32: ctypes.c_uint32,
    torch.int32: ctypes.c_uint32,
    torch.float64: ctypes.c_uint64,
    torch.int64: ctypes.c_uint64,
}


def steps_taken() -> int:
    """How many steps optimisers took since this was first asked for or a value remembered."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_count_step)
    return _steps


def mark(tensor: Tensor) -> tuple[int, ...]:
    """Identity, place and version; on a CPU also the bits of the first and the last element.

    Writing to ``tensor.data`` bumps no version and leaves no trace but the bits.
    """
    place, word = tensor.data_ptr(), _WORDS.get(tensor.dtype)  # the place of no elements is 0
    if not (place and word and tensor.is_cpu and tensor.is_contiguous()):
        return id(tensor), place, tensor._version
    last = place + tensor.nbytes - ctypes.sizeof(word)
    first, last = word.from_address(place).value, word.from_address(last).value
    return id(tensor), place, tensor._version, first, last


def contents(tensor: Tensor) -> tuple:
    """All that a small tensor holds: equal only while not a bit was changed, whoever wrote it.

    Where it lies on another device, its mark and the count of steps; never equal where it has none.
    """
    if tensor.is_cpu:
        held = tensor if tensor.is_contiguous() else tensor.detach().contiguous()
        return held.dtype, ctypes.string_at(held.data_ptr(), held.nbytes)
    return (object(),) if tensor.is_inference() else (steps_taken(), mark(tensor))


def transformed() -> bool:
    """Under a compiler or ``torch.func``, where tensors are stand-ins for others."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def traced() -> bool:
    """Under a compiler, ``torch.func`` or autocast, which see plain operations only."""
    return transformed() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def _stamp(module: nn.Module, given: tuple[Tensor, ...]) -> tuple | None:
    """What differs as soon as a parameter or a buffer was stepped, loaded, replaced or moved.

    None where that cannot be told: while compiling or under ``torch.func``, for tensors without a
    version, and for networks that are plain functions and may depend on anything.
    """
    if transformed() or any(t.is_inference() for t in given):
        return None
    state = [steps_taken(), module.training, torch.is_grad_enabled(), *map(mark, given)]
    for m, _ in _members(module):
        if "net" in m.__dict__:  # sub-modules are not in __dict__: a plain function
            return None
        for table in (m._parameters, m._buffers):
            for t in table.values():
                if t is not None:
                    if t.is_inference():
                        return None
                    state.append(mark(t))
    return tuple(state)


def _members(module: nn.Module) -> list[tuple[nn.Module, tuple]]:
    """A module and all below it, each with its children; walked again only where those changed."""
    own = module, tuple(module._modules.values())
    children, below = module.__dict__.get("_members", (None, []))
    if own[1] != children or any(tuple(m._modules.values()) != c for m, c in below):
        below = [(m, tuple(m._modules.values())) for m in module.modules() if m is not module]
        # Without the module: in its own __dict__ it would be a cycle, which keeps what it holds
        # in memory until the collector comes by.
        module.__dict__["_members"] = own[1], below
    return [own, *below]


class _Entry(NamedTuple):
    output: weakref.ref
    state: tuple[int, bool]
    stamp: tuple
    value: Any


class Memo:
    """Values that belong to exact tensors, valid only while their sources stand unchanged.

    Args:
        size: how many of the latest entries are kept. Each dies with its tensor.
    """

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._entries: dict[int, _Entry] = {}

    def put(self, output: Tensor, value: Any, module: nn.Module, *given: Tensor) -> None:
        """Remember ``value`` for ``output``, computed by ``module`` from ``given``."""
        compiling = torch.compiler.is_compiling()
        stamp = None if compiling or output.is_inference() else _stamp(module, given)
        if stamp is None:
            return
        entries, key = self._entries, id(output)
        reference = weakref.ref(output, lambda _: entries.pop(key, None))
        state = (output._version, output.requires_grad)
        entries[key] = _Entry(reference, state, stamp, value)
        while len(entries) > self.size:
            entries.pop(next(iter(entries)), None)

    def get(self, output: Tensor, module: nn.Module, *given: Tensor) -> Any:
        """The value remembered for ``output``, or None where it could be out of date."""
        entry = self._entries.get(id(output))
        if entry is None or entry.output() is not output or output.is_inference():
            return None
        if entry.state != (output._version, output.requires_grad):
            return None
        if entry.stamp != _stamp(module, given):
            return None
        return entry.value

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple:
        return Memo, (self.size,)  # copies and pickles start empty
