"""What a training is of: by this a checkpoint knows whether it may be gone on from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import nn

from pyroflows.data.loaders import Source, Validation


class OtherTrainingError(ValueError):
    """A checkpoint is of another training."""


def facts_of_module(module: nn.Module) -> dict[str, Any]:
    """Shape and dtype of each tensor in a module's state, and what it prints as, line by line."""
    lines = re.sub(r" at 0x[0-9a-f]+", "", repr(module)).splitlines()
    return {
        **{name: f"{tuple(v.shape)} {v.dtype}" for name, v in module.state_dict().items()},
        **{f"line {number}": line.strip() for number, line in enumerate(lines)},
    }


def facts_of_fit(
    model: nn.Module,
    batches: Source,
    validation: Validation | None,
    settings: Mapping[str, Any],
    dropout: float,
    *,
    val: Any,
    seed: int,
) -> dict[str, Any]:
    """What a maximum-likelihood training is of: all but how long it may take, and where it runs."""
    recipe = ("lr", "clip", "average", "patience", "weight_decay")
    return {
        "trainer": "fit",
        "seed": seed,
        "val": val if val is None or isinstance(val, Real) else "given",
        "flow": facts_of_module(model),
        "data": batches.facts(),
        "validation": None if validation is None else validation.facts(),
        "batch_size": batches.asked,
        **{name: settings[name] for name in recipe},
        "dropout": dropout,
    }


def digest_of(module: nn.Module) -> str:
    """A hash of the values in a module's state."""
    hashed = hashlib.sha256()
    for name, value in module.state_dict().items():
        hashed.update(name.encode())
        hashed.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:32]


def check_same(mine: dict[str, Any], saved: Any, name: str) -> None:
    """See that a checkpoint is of the training at hand.

    Args:
        mine: what that is of, names to plain values or to more of these.
        saved: what the checkpoint says.
        name: what to begin errors with.

    Raises:
        OtherTrainingError: something differs; the first thing is named.
        ValueError: the checkpoint says nothing of the kind.

    Example:
        >>> check_same({"data": {"rows": 10}}, {"data": {"rows": 11}}, "checkpoint: it")
        Traceback (most recent call last):
        pyroflows.training.identity.OtherTrainingError: checkpoint: it is of another training: ...
    """
    if not isinstance(saved, dict):
        raise ValueError("it does not say what it is of")
    here, there = dict(_flat(mine)), dict(_flat(saved))
    for key in [*there, *here]:
        theirs, ours = there.get(key, "nothing"), here.get(key, "nothing")
        if type(theirs) is type(ours) and theirs == ours:
            continue
        if key.endswith(" values"):
            what = f"{key} differ (by their hash, {theirs} there, {ours} here)"
        else:
            what = f"{key} is {theirs} there, {ours} here"
        raise OtherTrainingError(
            f"{name} is of another training: {what}; give what it was made with, or another folder"
        )


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", item
