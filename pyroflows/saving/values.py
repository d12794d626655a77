"""Arguments of builders as JSON, and back: numbers, supports, families, base distributions, flows.

What JSON has no word for becomes an object with one tag that names its kind. Only kinds in the
tables below are read or written, so a file can ask for nothing else.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Independent

from pyroflows.distributions.base import arguments_of
from pyroflows.programs.circles import Circle
from pyroflows.programs.supports import bijection
from pyroflows.transforms import Additive, Affine, RationalQuadraticSpline
from pyroflows.transforms.families import Family, families, kinds
from pyroflows.transforms.support import JoinedSupport, check_room

constraints = dist.constraints  # torch's, and Pyro's own

PLAIN = (
    "real",
    "simplex",
    "lower_cholesky",
    "corr_cholesky",
    "positive_definite",
    "softplus_positive",
    "softplus_lower_cholesky",
    "unit_lower_cholesky",
    "corr_matrix",
    "ordered_vector",
    "positive_ordered_vector",
    "sphere",
)
BOUNDED = {
    "greater_than": ("lower_bound",),
    "greater_than_eq": ("lower_bound",),
    "less_than": ("upper_bound",),
    "interval": ("lower_bound", "upper_bound"),
    "half_open_interval": ("lower_bound", "upper_bound"),
    "integer_interval": ("lower_bound", "upper_bound"),
}
BASES = (
    "Normal",
    "Laplace",
    "Cauchy",
    "StudentT",
    "Logistic",
    "Gumbel",
    "Uniform",
    "Exponential",
    "Gamma",
    "Beta",
    "Dirichlet",
    "MultivariateNormal",
)
CLASS_NAMES = {kind.__name__: kind for kind in (Additive, Affine, RationalQuadraticSpline)}
DTYPES = ("float16", "bfloat16", "float32", "float64", "int32", "int64", "bool")

_UNREADABLE = (
    AssertionError,  # of torch's constraints
    AttributeError,
    KeyError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)

Build = Callable[[Any], nn.Module]


def encode(value: Any, name: str) -> Any:
    """A value in words that JSON has.

    Args:
        value: of an argument.
        name: the argument's, for errors.

    Raises:
        ValueError: a kind that is not in the tables.

    Example:
        >>> from torch.distributions import constraints
        >>> encode((8, constraints.interval(-1.0, 2.0)), "x")
        [8, {'constraint': 'interval', 'lower_bound': -1.0, 'upper_bound': 2.0}]
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, (tuple, list)):
        return [encode(v, name) for v in value]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"dict": {k: encode(v, name) for k, v in value.items()}}
    if isinstance(value, Tensor):
        return _encode_tensor(value, name)
    if isinstance(value, torch.distributions.constraints.Constraint):
        return _encode_constraint(value, name)
    if isinstance(value, Distribution):
        return _encode_base(value, name)
    if type(value) in set(kinds()):
        return _encode_family(value, name)
    config = getattr(value, "config", None)
    if isinstance(value, nn.Module) and isinstance(config, dict):
        return {"flow": encode_config(config)}
    raise _refused(value, name)


def encode_config(config: dict[str, Any]) -> dict[str, Any]:
    """A flow's config with its arguments as JSON."""
    arguments = {k: encode(v, k) for k, v in config["arguments"].items()}
    mirrored = {"mirrored": config["mirrored"]} if "mirrored" in config else {}
    return {"builder": config["builder"], "arguments": arguments, **mirrored}


def _refused(value: Any, name: str) -> ValueError:
    return ValueError(
        f"{name}: cannot write a {type(value).__module__}.{type(value).__qualname__} to "
        "config.json; write a function marked with pf.flows.builder that makes it from numbers and "
        "words, and build the flow with that"
    )


def _encode_tensor(value: Tensor, name: str) -> dict[str, Any]:
    kind = str(value.dtype).removeprefix("torch.")
    if kind not in DTYPES or value.numel() > 10_000:
        raise ValueError(
            f"{name}: cannot write a tensor of {value.dtype} with {value.numel()} elements to "
            "config.json; make it in a builder of your own"
        )
    return {"tensor": encode(value.detach().cpu().tolist(), name), "dtype": kind}


def _encode_constraint(value: Any, name: str) -> dict[str, Any]:
    kind, own = type(value), vars(value)
    for plain in PLAIN:
        known = getattr(constraints, plain)
        if kind is type(known) and own == vars(known):
            return {"constraint": plain}
    for bounded, names in BOUNDED.items():
        if kind is getattr(constraints, bounded):
            return {"constraint": bounded, **{n: encode(own[n], name) for n in names}}
    if kind is Circle:
        return {"constraint": "circle", "center": encode(value.center, name)}
    if kind is constraints.independent:
        base = _encode_constraint(value.base_constraint, name)
        dims = value.reinterpreted_batch_ndims
        return {"constraint": "independent", "base": base, "dims": dims}
    if kind is constraints.cat:
        parts = [_encode_constraint(c, name) for c in value.cseq]
        lengths = list(value.lengths)
        return {"constraint": "cat", "parts": parts, "lengths": lengths, "dim": value.dim}
    if kind is constraints.stack:
        parts = [_encode_constraint(c, name) for c in value.cseq]
        return {"constraint": "stack", "parts": parts, "dim": value.dim}
    if kind is JoinedSupport:
        parts = [_encode_constraint(part, name) for part, _ in value.parts]
        lengths = [length for _, length in value.parts]
        return {"constraint": "joined", "parts": parts, "lengths": lengths}
    raise _refused(value, name)


def _encode_base(value: Distribution, name: str) -> dict[str, Any]:
    if isinstance(value, Independent):
        inner = _encode_base(value.base_dist, name)
        return {**inner, "event_dims": inner["event_dims"] + value.reinterpreted_batch_ndims}
    kind = type(value).__name__
    home = type(value).__module__.partition(".")[0]
    if kind not in BASES or home not in ("torch", "pyro"):
        raise _refused(value, name)
    arguments = {n: encode(v, name) for n, v in arguments_of(value).items()}
    return {"distribution": kind, "arguments": arguments, "event_dims": 0}


def _encode_family(value: Family, name: str) -> dict[str, Any]:
    """Ours by name, any other by where to import its class from."""
    kind = type(value)
    try:
        arguments = {n: getattr(value, n) for n in inspect.signature(kind).parameters}
    except AttributeError as error:
        raise ValueError(
            f"{name}: cannot tell the arguments of {kind.__qualname__} ({error}); make it a frozen "
            "dataclass, or keep each argument under its own name"
        ) from None
    is_ours = families().get(kind.name) is kind and kind.__module__.startswith("pyroflows.")
    word = kind.name if is_ours else _path(kind)
    return {"family": word, "arguments": encode(arguments, name)["dict"]}


def _path(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _decode_family(value: dict[str, Any], name: str, build: Build | None) -> Family:
    word = value["family"]
    known = {**{_path(k): k for k in kinds()}, **families(), **CLASS_NAMES}
    if word not in known and isinstance(word, str) and ":" in word:
        raise ValueError(
            f"{name}: the family {word!r} is not defined; import {word.partition(':')[0]} first"
        )
    kind = known[_known(word, known, name)]
    return kind(**{k: _decode(v, name, build) for k, v in value["arguments"].items()})


def decode(value: Any, name: str, build: Build | None = None) -> Any:
    """The value that ``encode`` wrote; a list becomes a tuple.

    Args:
        value: from JSON.
        name: the argument's, for errors.
        build: makes a flow from its config, where flows may be arguments.

    Raises:
        ValueError: a kind that is not in the tables, or of another form.
    """
    try:
        return _decode(value, name, build)
    except _UNREADABLE as error:
        named = str(error).startswith((f"{name}:", "config.json:"))  # of a flow in a flow
        if isinstance(error, ValueError) and (named or type(error) is not ValueError):
            raise
        raise ValueError(f"{name}: cannot read {_short(value)} ({error!r})") from None


def site_from(words: dict[str, Any]) -> dict[str, Any]:
    """A latent site of a guide from the words of a file, its support an object that has room.

    Raises:
        ValueError: the support is none, or nothing is inside.
    """
    support = decode(words["support"], "support")
    try:
        check_room(support, bijection(support), Size(words["free_shape"]))
    except (NotImplementedError, *_UNREADABLE) as error:
        raise ValueError(
            f"support: expected a constraint with room for the site {words['name']!r}, got "
            f"{support!r} ({error})"
        ) from None
    return {**words, "support": support}


def _decode(value: Any, name: str, build: Build | None) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return tuple(_decode(v, name, build) for v in value)
    if "float" in value:
        return float(value["float"])
    if "dict" in value:
        return {k: _decode(v, name, build) for k, v in value["dict"].items()}
    if "tensor" in value:
        dtype = getattr(torch, _known(value["dtype"], DTYPES, name))
        return torch.tensor(_decode(value["tensor"], name, build), dtype=dtype)
    if "constraint" in value:
        return _decode_constraint(value, name)
    if "distribution" in value:
        kind = getattr(dist, _known(value["distribution"], BASES, name))
        made = kind(**{k: _decode(v, name, build) for k, v in value["arguments"].items()})
        return made.to_event(value["event_dims"]) if value["event_dims"] else made
    if "family" in value:
        return _decode_family(value, name, build)
    if "flow" in value and build is not None:
        return build(value["flow"])
    raise ValueError(f"{name}: expected a known kind, got {_short(value)}")


def _decode_constraint(value: dict[str, Any], name: str) -> Any:
    kind = value["constraint"]
    if kind in PLAIN:
        return getattr(constraints, kind)
    if kind in BOUNDED:
        bounds = (_decode(value[n], name, None) for n in BOUNDED[kind])
        return getattr(constraints, kind)(*bounds)
    if kind == "circle":
        return Circle(_decode(value["center"], name, None))
    if kind == "independent":
        base, dims = _decode_constraint(value["base"], name), value["dims"]
        if base is constraints.real and dims == 1:
            return constraints.real_vector  # callers compare with this very object
        return constraints.independent(base, dims)
    _known(kind, ("cat", "stack", "joined"), name)
    parts = [_decode_constraint(part, name) for part in value["parts"]]
    if kind == "cat":
        return constraints.cat(parts, dim=value["dim"], lengths=value["lengths"])
    if kind == "stack":
        return constraints.stack(parts, dim=value["dim"])
    return JoinedSupport(list(zip(parts, value["lengths"], strict=True)))


def _known(word: Any, table: Any, name: str) -> str:
    if word not in table:
        raise ValueError(f"{name}: expected one of {', '.join(table)}, got {_short(word)}")
    return word


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
