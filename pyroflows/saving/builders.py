"""Build an untrained flow from the builder's name and arguments in a saved config."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from pyroflows._checks import check_positive
from pyroflows._version import __version__
from pyroflows.discrete.pixel_model import pixelcnn
from pyroflows.discrete.quantization import quantized
from pyroflows.flows import builders
from pyroflows.infer.amortized import no_flow
from pyroflows.saving.values import decode
from pyroflows.structured.flow import rows_flow

Builder = Callable[..., nn.Module]


class OutsideError(ValueError):
    """A builder that is not part of pyroflows, and that was not given."""


def _builders_here() -> dict[str, Builder]:
    of_guides: dict[str, Builder] = {"no_flow": no_flow, "rows_flow": rows_flow}
    return {**builders(), "pixelcnn": pixelcnn, "quantized": quantized, **of_guides}


def flow_from(config: dict[str, Any], given: Builder | None, trust: bool) -> nn.Module:
    """The module that a builder makes of saved arguments, untrained.

    Args:
        config: with the builder's name and its arguments in words that JSON has.
        given: the builder, where it is not part of pyroflows.
        trust: import a builder that is not part of pyroflows.

    Raises:
        ValueError: there is no such builder, or it cannot do with the arguments.
        OutsideError: the builder is not part of pyroflows, and neither given nor trusted.
    """
    name, arguments = config.get("builder"), config.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("config.json: expected a builder's name and its arguments")
    build = _builder(name, given, trust)
    try:
        values = {
            k: decode(v, k, lambda inner: flow_from(inner, given, trust))
            for k, v in arguments.items()
        }
    except OutsideError:
        raise
    except ValueError as error:
        raise ValueError(f"config.json: the arguments of {name} cannot be read: {error}") from None
    try:
        made = build(**values)
    except Exception as error:  # whatever a builder of one's own may raise
        raise ValueError(
            f"config.json: {name} cannot be built with the saved arguments: {error}; was it saved "
            f"by another version? This is pyroflows {__version__}"
        ) from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"builder: expected a module from {name}, got {type(made).__name__}")
    return _mirrored(made, config["mirrored"]) if "mirrored" in config else made


def _mirrored(made: nn.Module, wider: Any) -> nn.Module:
    mirror = getattr(made, "mirror", None)
    if mirror is None:
        raise ValueError(f"config.json: a {type(made).__name__} cannot be mirrored")
    try:
        check_positive(mirrored=wider)
        return mirror(wider)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"config.json: the flow cannot be mirrored: {error}") from error


def _builder(name: str, given: Builder | None, trust: bool) -> Builder:
    own = _builders_here()
    if name in own:
        return own[name]
    if given is not None:
        return given
    if ":" not in name:
        raise OutsideError(
            f"config.json: unknown builder {name!r}, this version has {', '.join(sorted(own))}; "
            "update pyroflows, or pass builder="
        )
    if not trust:
        raise OutsideError(
            f"builder: this flow was made by {name!r}, which is not part of pyroflows; pass the "
            "function as builder=, or trust=True to import it (that runs its code)"
        )
    try:
        return import_by_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"builder: cannot import {name!r} ({error}); pass the function as builder="
        ) from None


def import_by_name(name: str) -> Any:
    """What ``"module:path"`` names.

    Raises:
        ImportError: there is no such module.
        AttributeError: the module has no such thing.
        ValueError: the name is not of that form.
    """
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found
