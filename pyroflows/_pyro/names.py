"""The names that guides have in Pyro's parameter store: each its own, unless one is asked for.

Pyro names a guide after its class, and what two guides of one name put into the store is one: the
first silently becomes the second. So a guide takes a name when it is set up, and where another has
it, the name with the next number: ``AutoFlow(a, b)``, ``AutoFlow(a, b)#2``, ...

Another has it while it lives, and while the store holds what it put there in this process. What
came into the store otherwise, loaded from a file, is for whoever takes the name: in a new process
guides that are set up in the same order find what was saved. After ``pyro.clear_param_store()``
numbers begin anew, but for guides that still live.
"""

from __future__ import annotations

import gc
import itertools
import re
import threading
import weakref
from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import Tensor

_NUMBER = re.compile(r"#\d+$")
_lock = threading.RLock()
_held: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()  # by guide
_put: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()  # by full name


def put_in_store(full: str, tensor: Tensor) -> None:
    """Note that a module of this process has put a tensor into the store.

    Args:
        full: the tensor's name there.
        tensor: as it stands there.
    """
    _put[full] = tensor


class Named(PyroModule):
    """A guide that has a name of its own in the store.

    Where it is an attribute of another module, it is named after both, as Pyro's are.

    Args:
        *args: of Pyro's guide.
        name: to have in the store, shared with whatever else has it; None for one of its own.
        **options: of Pyro's guide.
    """

    _asked: str | None = None
    _sites: str | None = None  # as they stand in the name, from when it is set up on

    def __init__(self, *args: Any, name: str | None = None, **options: Any) -> None:
        check_name(name)
        super().__init__(*args, **options)
        self._asked = name
        if name is not None:
            self._hold(name)

    @property
    def pyro_name(self) -> str:
        """The guide's name in Pyro's parameter store."""
        return self._pyro_name

    def name_by(self, sites: str) -> None:
        """Take a name when it is set up: that of its class and its sites, if none was asked for.

        Args:
            sites: its, in words.
        """
        self._sites = sites
        if self._asked is None:
            self._take(self._pyro_name + sites)
        else:
            self._hold(self._asked)

    def name_again(self, name: str, sites: str) -> None:
        """Take the name that it had elsewhere; it brings its values.

        Args:
            name: got with a number, where it is another's.
            sites: as in ``name_by``.

        Raises:
            ValueError: it is no name.
        """
        check_name(name)
        self._sites = sites
        self._take(name, brings_values=True)

    def name_copy(self) -> None:
        """As a copy of another guide, take a name of its own."""
        self._asked = None
        if self._sites is not None:
            self._take(self._pyro_name, brings_values=True)

    def _name_parts(self) -> None:
        for key, part in self._modules.items():
            if isinstance(part, Named):
                part._hold(f"{self._pyro_name}.{key}{part._sites or ''}")

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        super()._pyro_set_supermodule(name, context)
        if self._asked is not None:
            self._hold(self._asked)
        elif self._sites is not None:
            self._take(name + self._sites)

    def _take(self, wanted: str, brings_values: bool = False) -> None:
        root = _NUMBER.sub("", wanted)
        numbered = (f"{root}#{number}" for number in itertools.count(2))
        with _lock:
            names = itertools.chain([wanted], numbered)
            self._hold(next(n for n in names if not _is_taken(n, self, brings_values)))

    def _hold(self, name: str) -> None:
        self._pyro_name = name
        with _lock:
            _held[self] = name
        self._name_parts()


def _is_taken(name: str, guide: object, brings_values: bool) -> bool:
    stored = pyro.get_param_store().named_parameters()
    under = [(full, tensor) for full, tensor in stored if full.startswith(f"{name}.")]
    # Values that are brought along leave to others whatever the store holds.
    if any(brings_values or _put.get(full) is tensor for full, tensor in under):
        return True
    if _is_held(name, guide) and any(full.startswith(f"{name}.") for full in list(_put)):
        # Its guide was in the store, which was cleared since: that must end its name, too, whenever
        # the collector would find that nobody has the guide.
        gc.collect()
    return _is_held(name, guide)


def _is_held(name: str, guide: object) -> bool:
    return any(held == name for other, held in list(_held.items()) if other is not guide)


def check_name(name: object) -> None:
    """See that a guide's entries in the store can begin with a name.

    Raises:
        ValueError: they cannot.
    """
    if name is not None and not (isinstance(name, str) and name and "$$$" not in name):
        raise ValueError(f"name: expected a word for Pyro's parameter store, got {name!r}")
