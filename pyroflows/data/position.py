"""Iterate over batches epoch by epoch; can resume inside an epoch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from pyroflows._distributed import random_state, set_random_state


class Passes:
    """Batches gone through pass after pass, and put back to any place in a pass.

    The place is where the generators stood when the pass began, and how many batches of it are
    gone. To come back, the pass begins again from there without these batches. A source that draws
    from generators of its own alone starts at a batch (``starting_at``). Any other, such as a
    user's loader, may draw from the global generators of torch, numpy and Python: these are set to
    where they stood while the batches that are gone are drawn again, and then put back.

    Args:
        batches: iterated once a pass.
        device: whose generator counts too.
    """

    def __init__(self, batches: Any, device: torch.device) -> None:
        self.batches = batches
        self.device = device
        self.position = 0  # batches gone of a pass that is not over
        self._began: dict[str, Any] = {}
        self._resumes = False

    def __iter__(self) -> Iterator[Any]:
        if self._resumes:
            batches = self._interrupted_pass()
        else:
            self._began = self._state()
            self.position = 0
            batches = iter(self.batches)
        for batch in batches:
            self.position += 1
            yield batch
        self.position = 0

    def _interrupted_pass(self) -> Iterator[Any]:
        """What is left of it."""
        self._resumes = False
        if hasattr(self.batches, "starting_at"):
            self.batches.load_state_dict(self._began["batches"])
            return self.batches.starting_at(self.position)
        with _generators_put_back(self.device):
            self._set(self._began)
            batches = iter(self.batches)
            for _ in range(self.position):
                next(batches, None)
        return batches

    def _state(self) -> dict[str, Any]:
        has = hasattr(self.batches, "state_dict")
        return {
            "random": random_state(self.device),
            "batches": self.batches.state_dict() if has else {},
        }

    def _set(self, state: dict[str, Any]) -> None:
        set_random_state(state["random"], self.device)
        if state["batches"]:
            self.batches.load_state_dict(state["batches"])

    def state_dict(self) -> dict[str, Any]:
        """The place, and where the generators stand now."""
        return {"began": self._began, "position": self.position, "now": self._state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to the place, with the generators as they stood."""
        self._began = state["began"]
        self.position = state["position"]
        self._resumes = self.position > 0
        self._set(state["now"])


@contextlib.contextmanager
def _generators_put_back(device: torch.device) -> Iterator[None]:
    """Leave the global generators as they are, whatever is drawn or raised inside."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)
