"""A memory of log-densities that never lies and keeps nothing alive.

Pyro's ELBO draws from a distribution and later asks the same object to score the very tensor it
drew. For an inverse autoregressive flow the second call would cost an inversion, so the value is
remembered here: weakly, and only for as long as nothing it was computed from has changed.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

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


def _mark(tensor: Tensor) -> tuple[int, int, int]:
    return id(tensor), tensor.data_ptr(), tensor._version


def _stamp(module: nn.Module, given: tuple[Tensor, ...]) -> tuple:
    """What differs as soon as a parameter or a buffer was stepped, loaded, replaced or moved."""
    state = [
        _mark(t)
        for m in module.modules()
        for table in (m._parameters, m._buffers)
        for t in table.values()
        if t is not None
    ]
    return _steps, module.training, torch.is_grad_enabled(), *state, *map(_mark, given)


def _can_remember(tensors: tuple[Tensor, ...]) -> bool:
    """Not while compiling or under ``torch.func``, nor for tensors without a version."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(t.is_inference() for t in tensors)
    )


class _Entry(NamedTuple):
    output: weakref.ref
    state: tuple[int, bool]
    stamp: tuple
    value: Tensor


class Memo:
    """Values that belong to exact tensors, valid only while their sources stand unchanged.

    Args:
        size: how many of the latest entries are kept. Each dies with its tensor.
    """

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._entries: dict[int, _Entry] = {}

    def put(self, output: Tensor, value: Tensor, module: nn.Module, *given: Tensor) -> None:
        """Remember ``value`` for ``output``, computed by ``module`` from ``given``."""
        global _hook
        if not _can_remember((output, *given)):
            return
        if _hook is None:
            _hook = register_optimizer_step_post_hook(_count_step)
        entries, key = self._entries, id(output)
        reference = weakref.ref(output, lambda _: entries.pop(key, None))
        state = (output._version, output.requires_grad)
        entries[key] = _Entry(reference, state, _stamp(module, given), value)
        while len(entries) > self.size:
            entries.pop(next(iter(entries)), None)

    def get(self, output: Tensor, module: nn.Module, *given: Tensor) -> Tensor | None:
        """The value remembered for ``output``, or None where it could be out of date."""
        entry = self._entries.get(id(output))
        if entry is None or entry.output() is not output or not _can_remember((output, *given)):
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
