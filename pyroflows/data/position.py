"""Going through batches again and again, and back to any place of that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from pyroflows._distributed import random_state, set_random_state


class Passes:
    """Batches gone through pass after pass, and put back to any place in a pass.

    The place is kept as where the global generators stood when the pass began, and how many batches
    of it are gone; to come back, the pass begins again from there and leaves these out. So batches
    that depend on the generators alone (or on a ``state_dict`` of their own) come back the same.

    Args:
        batches: iterated once a pass.
        device: whose generator counts too.
    """

    def __init__(self, batches: Any, device: torch.device) -> None:
        self.batches = batches
        self.device = device
        self.position = 0  # batches gone of a pass that is not over
        self._began: dict[str, Any] = {}
        self._returns = False

    def __iter__(self) -> Iterator[Any]:
        gone = 0
        if self._returns:
            gone, now = self.position, random_state(self.device)
            self._set(self._began)
        else:
            self._began = self._get()
        batches = iter(self.batches)
        for _ in range(gone):
            next(batches, None)
        if self._returns:
            set_random_state(now, self.device)
            self._returns = False
        self.position = gone
        for batch in batches:
            self.position += 1
            yield batch
        self.position = 0

    def _get(self) -> dict[str, Any]:
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
        now = self._get()
        return {"began": self._began, "position": self.position, "now": now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to the place, with the generators as they stood."""
        self._began = state["began"]
        self.position = state["position"]
        self._returns = self.position > 0
        self._set(state["now"])
