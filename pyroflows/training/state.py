"""What the state in a checkpoint has to look like, seen to before any of it is put in place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MOST = 2**53  # of a count


@dataclass(frozen=True)
class Maybe:
    """None or nothing, or like this."""

    like: Any


@dataclass(frozen=True)
class Many:
    """A list of any length, of things like this."""

    like: Any


@dataclass(frozen=True)
class Named:
    """A dict of any names, with values like this."""

    like: Any


@dataclass(frozen=True)
class Finite:
    """A tensor as this, with finite numbers alone."""

    like: Tensor


@dataclass(frozen=True)
class Number:
    """A tensor of one number, in any dtype."""


@dataclass(frozen=True)
class Anything:
    """What is looked at elsewhere."""


ANY = Anything()


def check_like(found: Any, like: Any, name: str) -> None:
    """See that something read is like what is to take its place.

    Args:
        found: what was read.
        like: tensors of its shapes and dtypes, numbers of its kinds, its words, in dicts and lists;
            or what stands for several.
        name: what to call it.

    Raises:
        ValueError: it is not.

    Example:
        >>> check_like({"steps": [1, 2]}, {"steps": Many(0), "left": Maybe(0.0)}, "state")
        >>> check_like({"steps": [1, "two"]}, {"steps": Many(0)}, "state")
        Traceback (most recent call last):
        ValueError: state's steps 1 is 'two', where a number like 0 was expected
    """
    if isinstance(like, Anything):
        return
    if isinstance(like, Maybe):
        if found is not None:
            check_like(found, like.like, name)
    elif isinstance(like, dict):
        _check_dict(found, like, name)
    elif isinstance(like, (list, tuple, Many)):
        _check_list(found, like, name)
    elif isinstance(like, Named):
        _require(isinstance(found, dict) and all(type(k) is str for k in found), name, found)
        for key, item in found.items():
            check_like(item, like.like, _inside(name, key))
    elif isinstance(like, (Tensor, Finite, Number)):
        _check_tensor(found, like, name)
    else:
        _check_plain(found, like, name)


def _check_dict(found: Any, like: dict[Any, Any], name: str) -> None:
    _require(isinstance(found, dict), name, found, "names")
    for key in found:
        if key not in like:
            raise ValueError(f"{name} has a part {key!r} that is not known")
    for key, part in like.items():
        if key not in found and not isinstance(part, Maybe):
            raise ValueError(f"{name} lacks its part {key!r}")
        check_like(found.get(key), part, _inside(name, key))


def _check_list(found: Any, like: Any, name: str) -> None:
    _require(isinstance(found, list), name, found, "a list")
    each = [like.like] * len(found) if isinstance(like, Many) else like
    if len(found) != len(each):
        raise ValueError(f"{name} has {len(found)} parts, where {len(each)} were expected")
    for index, (item, part) in enumerate(zip(found, each, strict=True)):
        check_like(item, part, _inside(name, index))


def _check_tensor(found: Any, like: Any, name: str) -> None:
    _require(isinstance(found, Tensor), name, found, "a tensor")
    if isinstance(like, Number):
        if found.dim() or not found.is_floating_point():
            raise ValueError(f"{name} is {_words(found)}, where one number was expected")
        return
    shape, finite = (like.like, True) if isinstance(like, Finite) else (like, False)
    if found.shape != shape.shape or found.dtype != shape.dtype:
        raise ValueError(f"{name} is {_words(found)}, where {_words(shape)} was expected")
    if finite and not bool(torch.isfinite(found).all()):
        raise ValueError(f"{name} has numbers that are not finite")


def _check_plain(found: Any, like: Any, name: str) -> None:
    if isinstance(like, str) or like is None:
        _require(found == like, name, found, repr(like))
        return
    fits = type(found) is type(like)
    if fits and isinstance(like, float):
        fits = math.isfinite(found)
    elif fits and not isinstance(like, bool):
        fits = 0 <= found < _MOST
    _require(fits, name, found, f"a number like {like!r}")


def _require(fits: bool, name: str, found: Any, expected: str = "names and numbers") -> None:
    if not fits:
        raise ValueError(f"{name} is {_words(found)}, where {expected} was expected")


def _words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} of shape {tuple(value.shape)}"
    return repr(value)[:60]


def _inside(name: str, key: Any) -> str:
    return f"{name}'s {key}" if "'s " not in name else f"{name} {key}"
