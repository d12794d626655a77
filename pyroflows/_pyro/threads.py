"""One thread at a time runs models: Pyro's handlers and parameter store are one for the process.

A run in another thread would be recorded by this one's handlers. Distributions, and fits that run
no model, have no part in it: they go on side by side.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_turn = threading.RLock()
_long: list[str] = []  # who has the turn now and will not give it back soon


def runs_models(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run by one thread at a time, together with all others marked so.

    Threads wait for each other; but where one is in a training or among chains, which take minutes,
    they are refused.

    Args:
        function: runs a model, or uses Pyro's parameter store.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        _take(function.__qualname__)
        try:
            return function(*args, **kwargs)
        finally:
            _turn.release()

    return call


def runs_models_long(function: Callable[P, T]) -> Callable[P, T]:
    """The same of what takes long: other threads are refused meanwhile, by a ``RuntimeError``.

    Args:
        function: runs a model again and again.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        _long.append(function.__qualname__)
        try:
            return function(*args, **kwargs)
        finally:
            _long.pop()

    return runs_models(call)


def _take(name: str) -> None:
    while not _turn.acquire(timeout=0.05):
        if _long:
            raise RuntimeError(
                f"{name}: another thread is in {_long[-1]}, and Pyro's handlers and parameter "
                "store are one for the process; run one after the other, or in processes of their "
                "own (multiprocessing's 'spawn')"
            )
