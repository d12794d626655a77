"""What all builders share: mixing layers, closing a flow, and recording how it was built."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import nn
from torch.distributions import Distribution, constraints

from pyroflows._checks import checked_int, to_builtin
from pyroflows.distributions.flow import Flow
from pyroflows.transforms import (
    Chain,
    DiagonalScale,
    Family,
    FlowTransform,
    LULinear,
    Permute,
    Standardize,
    ToSupport,
)

MIXING = ("lu", "lu_inverse", "permute", "reverse")

# What makes one layer: of features, a family, a context, and whether they are taken descending.
Layer = Callable[[int, Family, int, bool], FlowTransform]


class Built(Protocol):
    """What a builder returns: a module with room for a record of how it was built."""

    config: dict[str, Any] | None


P = ParamSpec("P")
B = TypeVar("B", bound=Built)
# All that ``builder`` has marked, by the name that ``flow.config`` has.
MARKED: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class Example:
    """A small flow that the contract is tested on, and the direction it promises to be fast in.

    Args:
        make: builds it.
        fast: ``"sample"``, ``"log_prob"`` or ``"both"``.

    Example:
        >>> import pyroflows as pf
        >>> example = Example(lambda: pf.iaf(2, layers=1, hidden=(8,)), fast="sample")
        >>> example.make().fast == example.fast
        True
    """

    make: Callable[[], Flow]
    fast: str


def builder(function: Callable[P, B]) -> Callable[P, B]:
    """Mark a function as a builder: its flows carry its name and arguments as ``flow.config``.

    One from outside the package is named by where to import it from, ``"module:function"``.

    Args:
        function: takes ``features`` or ``shape`` first and returns a flow.

    Raises:
        ValueError: an argument of the function cannot be given by name.

    Example:
        >>> import pyroflows as pf
        >>> @pf.flows.builder
        ... def small_maf(features: int, context: int = 0) -> pf.Flow:
        ...     return pf.maf(features, context, layers=1, hidden=(8,))
        >>> small_maf(2).config["arguments"]["features"]
        2
    """
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    for parameter in parameters:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise ValueError(
                f"function: {function.__qualname__} has the argument {str(parameter)!r} without a "
                "name; a flow is loaded by its builder's arguments' names, so give it one"
            )
    options = [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
    is_ours = function.__module__.partition(".")[0] == __name__.partition(".")[0]
    name = function.__name__ if is_ours else f"{function.__module__}:{function.__qualname__}"

    @functools.wraps(function)
    def build(*args: P.args, **kwargs: P.kwargs) -> B:
        numbers = {name: to_builtin(value) for name, value in kwargs.items()}
        arguments = signature.bind(*map(to_builtin, args), **numbers)
        arguments.apply_defaults()
        recorded = {name: _recorded(value) for name, value in arguments.arguments.items()}
        for option in options:
            recorded |= recorded.pop(option)
        context = recorded.get("context", 0)
        of_vectors = is_ours and "features" in recorded
        if of_vectors or not isinstance(context, (tuple, list)):
            checked_int("context", context, least=0)
        flow = function(*args, **kwargs)
        flow.config = {"builder": name, "arguments": recorded}
        return flow

    MARKED[name] = build
    return build


def rebuilt(config: dict[str, Any], **changes: Any) -> Flow:
    """Build a flow again from its config, untrained.

    Args:
        config: of a flow.
        **changes: arguments of the builder to set otherwise; ``hidden`` is not widened again.

    Raises:
        ValueError: no builder of that name is defined.

    Example:
        >>> import pyroflows as pf
        >>> rebuilt(pf.maf(2, layers=3).config, layers=1).config["arguments"]["layers"]
        1
    """
    build = MARKED.get(config["builder"])
    if build is None:
        raise ValueError(f"config: no builder {config['builder']!r} is defined")
    flow = build(**copy.deepcopy({**config["arguments"], **changes}))
    if "mirrored" not in config:
        return flow
    return flow.mirror(1.0 if "hidden" in changes else config["mirrored"])


def _recorded(value: Any) -> Any:
    """A copy that nobody else can change: sequences as tuples, numbers as built-in types."""
    if isinstance(value, (list, tuple)):
        return tuple(_recorded(v) for v in value)
    if isinstance(value, dict):
        return {k: _recorded(v) for k, v in value.items()}
    return to_builtin(value)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    """``value``, if it is one of the choices.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")
    return value


def free_features(features: int, support: constraints.Constraint | None) -> int:
    """The dimension of the unconstrained space behind ``features`` constrained ones."""
    return features if support is None else ToSupport(support, features).inputs


def shuffle(features: int, seed: int) -> Permute:
    """A random order that brings the first half of the features into the last half.

    The features that one coupling leaves as they are, the next one transforms.
    """
    generator = torch.Generator().manual_seed(seed)
    first = features // 2
    slots = first + torch.randperm(features - first, generator=generator, device="cpu")[:first]
    permutation = torch.full((features,), -1)
    permutation[slots] = torch.randperm(first, generator=generator, device="cpu")
    rest = first + torch.randperm(features - first, generator=generator, device="cpu")
    permutation[permutation < 0] = rest
    return Permute(permutation)


def stack(
    make_layer: Callable[[bool], FlowTransform],
    features: int,
    *,
    layers: int,
    linear: str,
    invert: bool,
) -> list[FlowTransform]:
    """Layers with something between them that mixes features, base to data.

    Args:
        make_layer: makes one layer, for features in ascending or (given True) in descending order.
        features: number of features.
        layers: how many.
        linear: ``"reverse"`` takes the features in turn ascending and descending; ``"lu"`` adds an
            LU-linear map after each layer, the last one towards the data too; ``"lu_inverse"`` adds
            its inverse, which is what an inverted stack has there; ``"permute"`` puts a random
            order between layers.
        invert: whether each map is replaced by its inverse, so that what was cheap in sampling is
            cheap in scoring.
    """
    one_of("linear", linear, MIXING)
    parts: list[FlowTransform] = []
    for index in range(checked_int("layers", layers)):
        parts.append(make_layer(index % 2 == 1 and linear != "permute"))
        if linear == "lu":
            parts.append(LULinear(features))
        elif linear == "lu_inverse":
            parts.append(LULinear(features).inv)
        elif linear == "permute" and index < layers - 1:
            parts.append(shuffle(features, index))
    return [part.inv for part in parts] if invert else parts


def vector_flow(
    layer: Layer,
    features: int,
    context: int,
    *,
    family: Family,
    layers: int,
    linear: str,
    invert: bool,
    scale: bool = False,
    base: Distribution | nn.Module | None,
    support: constraints.Constraint | None,
) -> Flow:
    """A flow over vectors: layers of one family, mixed, scaled and closed.

    Args:
        layer: makes a layer of ``(features, family, context, descending)``.
        features: number of features of the data.
        context: number of context features; 0 for none.
        family: of the layers.
        layers: how many.
        linear: what mixes the features between layers, see ``stack``.
        invert: whether each layer, and what mixes, is inverted.
        scale: whether one learnt scale a feature follows the layers.
        base: base distribution; standard normal by default.
        support: where the data live, if not in all of R^n.

    Example:
        >>> import pyroflows as pf
        >>> def layer(features, family, context, descending):
        ...     net = pf.nets.MADE(features, family.params, context=context, descending=descending)
        ...     return pf.transforms.Autoregressive(net, family)
        >>> options = {"layers": 2, "linear": "lu", "invert": False, "base": None, "support": None}
        >>> vector_flow(layer, 3, 0, family=pf.transforms.Additive(), **options).fast
        'sample'
    """
    features = checked_int("features", features)
    free = free_features(features, support)
    parts = stack(
        lambda descending: layer(free, family, context, descending),
        free,
        layers=layers,
        linear=linear,
        invert=invert,
    )
    if scale:
        parts.append(DiagonalScale(free))
    return close(parts, features, context, base, support)


def close(
    parts: list[FlowTransform],
    features: int,
    context: int,
    base: Distribution | nn.Module | None,
    support: constraints.Constraint | None,
) -> Flow:
    """A flow from its inner layers: standardisation outside, then the support's bijection.

    Args:
        parts: the inner layers, base to data; they may be none.
        features: number of features of the data.
        context: number of context features; 0 for none.
        base: base distribution; standard normal by default.
        support: where the data live, if not in all of R^n.

    Example:
        >>> import torch, pyroflows as pf
        >>> positive = torch.distributions.constraints.positive
        >>> flow = close([pf.transforms.LULinear(2)], 2, 0, base=None, support=positive)
        >>> bool((flow.sample((100,)) > 0).all())
        True
    """
    outer: list[FlowTransform] = [Standardize(free_features(features, support))]
    if support is not None:
        outer.append(ToSupport(support, features))
    return Flow(Chain([*parts, *outer]), base, shape=features, context=context)
