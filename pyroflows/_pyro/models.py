"""What a Pyro model learns: in modules that it refers to, and in Pyro's parameter store."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import pyro
from pyro.poutine.messenger import _bound_partial
from torch import Tensor, nn
from torch.distributions.constraints import Constraint


def modules_of(model: Any) -> dict[str, nn.Module]:
    """The modules that a model refers to, by the name that it has for them.

    A module that is the model itself, or that has it as a method, goes by ``""``. Handlers, partial
    functions and decorators around a model are looked through, and functions beside it that it
    calls; but not lists and other containers.

    Args:
        model: a Pyro model.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> modules_of(lambda x: pyro.module("decoder", net)(x))
        {'net': Linear(in_features=1, out_features=1, bias=True)}
    """
    return {k: v for k, v in _referred(model, set()) if isinstance(v, nn.Module)}


def _referred(model: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Everything that a model refers to by a name."""
    if id(model) in seen:
        return
    seen.add(id(model))
    if isinstance(model, nn.Module):
        yield "", model
    elif isinstance(model, _bound_partial):  # of a handler of Pyro's: partial(run, handler, model)
        inner: Any = model.func
        yield from _referred(inner.args[1], seen)
    elif isinstance(model, functools.partial):
        yield from _referred(model.func, seen)
        yield from ((str(number), value) for number, value in enumerate(model.args))
        yield from model.keywords.items()
    elif hasattr(model, "__wrapped__"):
        yield from _referred(model.__wrapped__, seen)
    elif isinstance(model, FunctionType):
        yield from _referred_by(model, seen)
    elif inspect.ismethod(model):
        yield from _referred(model.__func__, seen)
        owner = model.__self__
        yield from [("", owner)] if isinstance(owner, nn.Module) else vars(owner).items()
    elif hasattr(model, "__dict__"):
        yield from _referred(type(model).__call__, seen)
        yield from vars(model).items()


def _referred_by(function: FunctionType, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Defaults, globals and variables outside that a function refers to, its inner ones too."""
    defaults = inspect.signature(function).parameters.values()
    found = {p.name: p.default for p in defaults}
    found |= {n: v for n, v in function.__globals__.items() if n in set(_names(function.__code__))}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # nothing there yet
            found[name] = cell.cell_contents
    for name, value in found.items():
        yield name, value
        if isinstance(value, FunctionType) and value.__globals__ is function.__globals__:
            yield from ((f"{name}.{inner}", v) for inner, v in _referred(value, seen))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def stored_parameters() -> dict[str, tuple[Tensor, Constraint]]:
    """What Pyro's store holds: unconstrained values and their constraints, by name."""
    store = pyro.get_param_store()
    return {name: (t, store._constraints[name]) for name, t in store.named_parameters()}


def put_parameter(name: str, unconstrained: Tensor, constraint: Constraint) -> None:
    """Put a parameter into Pyro's store, in the place of what is there under its name.

    Args:
        name: of the ``pyro.param`` statement.
        unconstrained: its value; the tensor becomes the store's.
        constraint: on what it stands for.
    """
    drop_parameter(name)
    unconstrained.requires_grad_(True)
    pyro.get_param_store().set_state(
        {"params": {name: unconstrained}, "constraints": {name: constraint}}
    )


def drop_parameter(name: str) -> None:
    """Let the next statement of that name begin with its own value.

    Args:
        name: may be none that the store holds.
    """
    store = pyro.get_param_store()
    held = store._params.pop(name, None)
    store._constraints.pop(name, None)
    if held is not None:
        store._param_to_name.pop(held, None)
