"""What is kept of earlier computations, and how a change that makes it untrue is noticed.

A fingerprint of tensors is what each of them is (its identity), where its numbers lie, its version,
which counts torch's writes to it, and how many steps optimisers took: fused ones, and those that
write to ``.data``, change no version. A write behind torch's back leaves none of these traces: to
``tensor.data`` outside of an optimiser, or through a view that NumPy shares. Autograd overlooks
those too. So write to parameters under ``torch.no_grad()``, not to their ``.data``; what a flow
keeps beyond one distribution's life, it keeps in eval mode only, and ``flow.eval()`` drops it.

``Kept`` is a value made from tensors, ``Memo`` one that belongs to a result. Pyro's ELBO draws from
a distribution and later asks the same object to score the very tensor it drew; for an inverse
autoregressive flow that would cost an inversion. The memo keeps it weakly: it holds no draw alive.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

T = TypeVar("T")

_version = operator.attrgetter("_version")
_steps = 0
_hook = None  # registered when steps are first asked for


def _count_step(_optimizer: Optimizer, _args: tuple, _kwargs: dict) -> None:
    global _steps
    _steps += 1


def optimiser_steps() -> int:
    """How many steps optimisers took since this was first asked for."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_count_step)
    return _steps


def transformed() -> bool:
    """Under a compiler or ``torch.func``, where tensors are stand-ins for others."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def traced() -> bool:
    """Under a compiler, ``torch.func`` or autocast, which see plain operations only."""
    return transformed() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


class Fingerprint(NamedTuple):
    """Equal keys mean equal numbers.

    Attributes:
        key: what is compared.
        tensors: held, so that none of their identities is given to another tensor.
    """

    key: tuple
    tensors: Sequence[Tensor]


def fingerprint(tensors: Sequence[Tensor], *state: object) -> Fingerprint | None:
    """That of some tensors, and of other ``state`` besides.

    None where it cannot be told: for stand-ins of tensors, and those without a version.
    """
    if transformed():
        return None
    try:
        versions = tuple(map(_version, tensors))
    except RuntimeError:  # of a tensor made in inference mode
        return None
    places = map(Tensor.data_ptr, tensors)
    return Fingerprint((optimiser_steps(), state, *map(id, tensors), *places, *versions), tensors)


class Forgetful:
    """What starts empty in copies and pickles of the object that holds it."""

    def __reduce__(self) -> tuple:
        return type(self), ()


class Kept(Forgetful, Generic[T]):
    """A value made from tensors without a graph, kept until one of them changes.

    Example:
        >>> doubled, x = Kept(), torch.ones(2)
        >>> first = doubled.get([x], lambda: 2 * x)
        >>> doubled.get([x], lambda: 2 * x) is first
        True
        >>> doubled.get([x.add_(1)], lambda: 2 * x)
        tensor([4., 4.])
    """

    def __init__(self) -> None:
        self._found: tuple[Fingerprint, T] | None = None

    def get(self, sources: Sequence[Tensor], make: Callable[[], T]) -> T:
        """What ``make()`` gives, made again only if one of the sources was changed or replaced."""
        source = fingerprint(sources)
        if source is None:
            return make()
        if self._found is None or self._found[0].key != source.key:
            with torch.inference_mode(False), torch.no_grad():
                self._found = source, make()
        return self._found[1]

    def clear(self) -> None:
        """Forget the value."""
        self._found = None

    def __bool__(self) -> bool:
        return self._found is not None


def _tensors_of(module: nn.Module) -> list[Tensor] | None:
    """All parameters and buffers in a module; None if it may depend on anything else."""
    modules: list[nn.Module | None] = [module]
    found: list[Tensor | None] = []
    for m in modules:  # grows on the way
        if m is None:
            continue
        state = m.__dict__
        if "net" in state:  # sub-modules are not in __dict__: a network that is a plain function
            return None
        found += state["_parameters"].values()
        found += state["_buffers"].values()
        modules += state["_modules"].values()
    return [t for t in found if t is not None]


def _source_of(module: nn.Module, given: Iterable[Tensor]) -> Fingerprint | None:
    """What differs as soon as a parameter or buffer was stepped, loaded, replaced or moved."""
    tensors = None if transformed() else _tensors_of(module)
    if tensors is None:
        return None
    return fingerprint([*tensors, *given], module.training, torch.is_grad_enabled())


class _Entry(NamedTuple):
    output: weakref.ref
    state: tuple[int, bool]
    source: Fingerprint
    value: Any


class Memo(Forgetful):
    """Values that belong to exact tensors, valid only while their sources stand unchanged.

    Args:
        size: how many of the latest entries are kept. Each dies with its tensor.
    """

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._entries: dict[int, _Entry] = {}

    def put(self, output: Tensor, value: Any, module: nn.Module, *given: Tensor) -> None:
        """Remember ``value`` for ``output``, computed by ``module`` from ``given``."""
        source = _source_of(module, given)
        if source is None or output.is_inference():
            return
        entries, key = self._entries, id(output)
        reference = weakref.ref(output, lambda _: entries.pop(key, None))
        state = (output._version, output.requires_grad)
        entries[key] = _Entry(reference, state, source, value)
        while len(entries) > self.size:
            entries.pop(next(iter(entries)), None)

    def get(self, output: Tensor, module: nn.Module, *given: Tensor) -> Any:
        """The value remembered for ``output``, or None where it could be out of date."""
        entry = self._entries.get(id(output))
        if entry is None or entry.output() is not output or output.is_inference():
            return None
        if entry.state != (output._version, output.requires_grad):
            return None
        source = _source_of(module, given)
        return entry.value if source is not None and source.key == entry.source.key else None

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple:
        return Memo, (self.size,)
