"""What the laws are tried on: flows with random weights, points, contexts, and comparisons."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Size, Tensor, nn
from torch.distributions import biject_to, constraints

from pyroflows.distributions.flow import Flow
from pyroflows.transforms.base import FlowTransform

MakeFlow = Callable[[], Flow]
USUAL = 0.5  # the size of random weights; larger ones make flows that no float32 can invert

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 5e-3}


def tolerance(dtype: torch.dtype) -> float:
    """How far two ways to compute one number may be apart, relative to one plus its size."""
    return _TOLERANCE[dtype]


def randn(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Standard normal numbers from a generator of their own, the same for a seed in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)


@torch.no_grad()
def randomize(
    module: nn.Module, gain: float = USUAL, seed: int = 0, keep: Sequence[nn.Module] = ()
) -> None:
    """Add noise to all parameters, since an untrained flow is the identity and hides its faults.

    Args:
        module: whose parameters are changed in place.
        gain: standard deviation of the noise, in units of 1 / sqrt(fan-in) for matrices.
        seed: equal seeds give equal noise in every dtype.
        keep: modules whose own parameters stay as they are.

    Example:
        >>> import pyroflows as pf
        >>> layer = pf.transforms.LULinear(3)
        >>> pf.testing.randomize(layer)
        >>> any((value != 0).any().item() for value in layer.parameters())
        True
    """
    unchanged = {id(p) for m in keep for p in m.parameters(recurse=False)}
    for index, parameter in enumerate(module.parameters()):
        if id(parameter) in unchanged:
            continue
        scale = 0.5 if parameter.dim() < 2 else 1 / math.sqrt(max(1, parameter[0].numel()))
        noise = randn(parameter.shape, parameter.dtype, 1000 * seed + index)
        parameter.add_(gain * scale * noise)


def prepared(make: MakeFlow, dtype: torch.dtype, gain: float = USUAL) -> Flow:
    """A flow with random weights whose data-dependent layers are set from data."""
    flow = copy.deepcopy(make()).to(dtype).eval()  # it may be the caller's own
    randomize(flow, gain)
    context = contexts(flow.context_shape, (256,), dtype)
    # Off the origin and not of unit size, so that standardisation is no identity.
    u = 0.3 + 0.7 * randn((256, *flow.transform.inverse_shape(flow.event_shape)), dtype, 5)
    x = u if is_unbounded(flow.support) else biject_to(flow.support)(u)
    flow.transform.initialize(x, context)
    return flow


def trained(flow: Flow) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: p for name, p in flow.named_parameters() if p.requires_grad}


def as_shape(size: int | Sequence[int]) -> Size:
    """A width as a shape; zero is no dimension at all."""
    return Size(([size] if size else []) if isinstance(size, int) else size)


def is_unbounded(constraint: constraints.Constraint) -> bool:
    """Whether every coordinate may be any real number."""
    return isinstance(getattr(constraint, "base_constraint", constraint), type(constraints.real))


def inside(
    constraint: constraints.Constraint,
    shape: Size,
    batch: Sequence[int],
    dtype: torch.dtype,
    seed: int,
) -> Tensor:
    """Random points ``(*batch, *shape)`` that satisfy the constraint."""
    if is_unbounded(constraint):
        return randn((*batch, *shape), dtype, seed)
    to_support = biject_to(constraint)
    return to_support(randn((*batch, *to_support.inverse_shape(shape)), dtype, seed))


def contexts(shape: Size, batch: Sequence[int], dtype: torch.dtype, seed: int = 2) -> Tensor | None:
    """Random contexts ``(*batch, *shape)``, or None where no context is taken."""
    return randn((*batch, *shape), dtype, seed) if shape else None


@torch.no_grad()
def points(
    flow: Flow, batch: Sequence[int], dtype: torch.dtype, seed: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Data points ``(*batch, *event)`` in the flow's support, and a context for each."""
    context = contexts(flow.context_shape, batch, dtype)
    z = randn((*batch, *flow.transform.inverse_shape(flow.event_shape)), dtype, seed)
    return flow.transform.forward_and_log_det(z, context)[0], context


def draws_of(flow: Flow, rows: int, dtype: torch.dtype) -> tuple[Size, Tensor | None]:
    """A sample shape and a context that together give ``rows`` draws."""
    context = contexts(flow.context_shape, (rows,), dtype)
    return (Size([rows]) if context is None else Size()), context


def require(condition: object, message: str) -> None:
    """Raise ``AssertionError`` with the message unless the condition holds, also under ``-O``."""
    if not condition:
        raise AssertionError(message)


def require_finite(value: Tensor, what: str) -> None:
    """Every number is finite."""
    bad = int((~value.isfinite()).sum())
    require(bad == 0, f"{what}: {bad} of {value.numel()} numbers are not finite")


def require_shape(value: Tensor, shape: Sequence[int], what: str) -> None:
    """The shape is the expected one."""
    require(
        value.shape == tuple(shape),
        f"{what}: expected shape {tuple(shape)}, got {tuple(value.shape)}",
    )


def require_close(actual: Tensor, expected: Tensor, allowed: float, what: str) -> None:
    """Equal shapes, and ``|actual - expected| <= allowed * (1 + |expected|)`` everywhere."""
    require_shape(actual, expected.shape, what)
    error = ((actual - expected).abs() / (1 + expected.abs())).detach()
    worst = float(error.max()) if error.numel() else 0.0
    require(
        worst <= allowed,  # also false for NaN
        f"{what}: off by {worst:.3g} relative to one plus the size, {allowed:.3g} is allowed",
    )


def conditioners(transform: FlowTransform) -> dict[str, nn.Module]:
    """The networks that layers hold as ``net``, by name."""
    names = {module: name for name, module in transform.named_modules()}
    nets = ((names[layer], getattr(layer, "net", None)) for layer in transform.layers())
    return {f"{name}.net": net for name, net in nets if isinstance(net, nn.Module)}


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Draws from a seed, torch's generator as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
