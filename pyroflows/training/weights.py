"""Copies of weights: the best so far, and an average over the steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyroflows._pyro.tensors import move_towards


class Snapshot:
    """A copy of parameters and buffers that can be put back in place."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self.copies = [t.detach().clone() for t in tensors]

    @torch.no_grad()
    def take(self) -> None:
        """Copy them as they are."""
        for copy, tensor in zip(self.copies, self._tensors, strict=True):
            copy.copy_(tensor)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copy back."""
        for copy, tensor in zip(self.copies, self._tensors, strict=True):
            tensor.copy_(copy)

    @torch.no_grad()
    def load(self, copies: list[Tensor]) -> None:
        """Hold these from now on."""
        for copy, value in zip(self.copies, copies, strict=True):
            copy.copy_(value)


class Average:
    """An exponential average of the parameters; its early steps weigh all weights so far alike."""

    def __init__(self, parameters: list[Tensor], decay: float) -> None:
        self._parameters = parameters
        self._decay = decay
        self.restart()

    def restart(self) -> None:
        """Forget the weights so far."""
        self._steps = 0
        self._values = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are."""
        self._steps += 1
        decay = min(self._decay, self._steps / (9 + self._steps))
        move_towards(self._values, self._parameters, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The averaged weights in the module, for as long as the context lasts."""
        if not self._decay:
            yield
            return
        raw = [p.detach().clone() for p in self._parameters]
        self._put(self._values)
        try:
            yield
        finally:
            self._put(raw)

    def put(self) -> None:
        """Leave the averaged weights in the module."""
        if self._decay:
            self._put(self._values)

    def state_dict(self) -> dict[str, Any]:
        """The average so far."""
        return {"steps": self._steps, "values": self._values}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from an average, laid out in memory as the parameters."""
        self._steps = state["steps"]
        for mine, value in zip(self._values, state["values"], strict=True):
            mine.copy_(value)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
