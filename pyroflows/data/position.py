"""Iterate over batches epoch by epoch; can resume inside an epoch."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from pyroflows._distributed import random_state, set_random_state


class Repeated:
    """One batch again and again."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self.batch)

    def starting_at(self, _position: int) -> Iterator[Any]:
        """The same from any place."""
        return iter(self)

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes in it."""
        return {}

    def load_state_dict(self, _state: dict[str, Any]) -> None:
        """It goes on as ever."""


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
        self._origin: dict[str, Any] = {}  # where the first pass began
        self._resumes = False

    def __iter__(self) -> Iterator[Any]:
        if self._resumes:
            batches = self._interrupted_pass()
        else:
            self._began = self._state()
            self._origin = self._origin or self._began
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
        with generators_put_back(self.device):
            self._set(self._began)
            batches = iter(self.batches)
            for _ in zip(range(self.position), batches, strict=False):
                pass
        return batches

    def first(self, count: int) -> list[Any]:
        """The first batches of the first pass once more; nothing is drawn for them.

        Args:
            count: how many at most.

        Raises:
            ValueError: the batches can be gone through only once, and are begun.
        """
        if self.once:
            raise ValueError(
                "batches: expected some that can be gone through again, got an iterator"
            )
        now = self._state()
        try:
            self._set(self._origin)
            return list(itertools.islice(self.batches, count))
        finally:
            self._set(now)

    @property
    def once(self) -> bool:
        """Whether the batches can be gone through only once, as a generator's."""
        return isinstance(self.batches, Iterator)

    def _state(self) -> dict[str, Any]:
        batches: Any = self.batches
        if hasattr(batches, "state_dict"):
            state = batches.state_dict()
        elif isinstance(batches, DataLoader):
            state = {"generators": [g.get_state() for g in generators_of(batches)]}
        else:
            state = {}
        return {"random": random_state(self.device), "batches": state}

    def _set(self, state: dict[str, Any]) -> None:
        set_random_state(state["random"], self.device)
        if hasattr(self.batches, "load_state_dict"):
            self.batches.load_state_dict(state["batches"])
        elif isinstance(self.batches, DataLoader):
            pairs = zip(generators_of(self.batches), state["batches"]["generators"], strict=True)
            for generator, value in pairs:
                generator.set_state(value)

    def state_dict(self) -> dict[str, Any]:
        """The place, and where the generators stand now."""
        places = {"origin": self._origin, "began": self._began, "now": self._state()}
        return {**places, "position": self.position}

    def check(self, state: dict[str, Any]) -> None:
        """See that this is a place, and leave all as it is.

        Args:
            state: what may be one.

        Raises:
            ValueError: it is none: a generator does not take its part of it, or there is more.
        """
        before = self._state()
        try:
            began, position = state["began"], state["position"]
            for place in ("origin", "now"):
                self._set(state[place])
            if type(position) is not int or position < 0 or set(state) != {*self.state_dict()}:
                raise ValueError(f"position {position!r}")
            if position or began:
                self._set(began)
        except Exception as error:  # of the libraries whose generators these are
            raise ValueError(f"the place in the data is none ({error!r})") from None
        finally:
            self._set(before)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to the place, with the generators as they stood."""
        self._origin, self._began = state["origin"], state["began"]
        self.position = state["position"]
        self._resumes = self.position > 0
        self._set(state["now"])


def generators_of(loader: DataLoader) -> list[torch.Generator]:
    """Those that a loader draws from alone, each once.

    Args:
        loader: a user's.
    """
    owners = (loader, loader.sampler)
    found = [getattr(owner, "generator", None) for owner in owners]
    return list(dict.fromkeys(g for g in found if g is not None))


@contextlib.contextmanager
def generators_put_back(device: torch.device) -> Iterator[None]:
    """Leave the global generators as they are, whatever is drawn or raised inside.

    Args:
        device: whose generator counts too.
    """
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)


def seed_generators(seed: int) -> None:
    """Begin the global generators of torch (on the CPU), numpy and Python anew.

    Args:
        seed: where.
    """
    import numpy as np

    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (a user's data set may draw from it)
    random.seed(seed)
