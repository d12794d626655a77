"""The laws of a single invertible map: round trip, log-determinant, gradients, structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Size, Tensor
from torch.autograd.functional import jacobian

from pyroflows.testing.cases import (
    as_shape,
    contexts,
    inside,
    is_unbounded,
    randn,
    require,
    require_close,
    require_finite,
    require_shape,
    tolerance,
)
from pyroflows.transforms import FlowTransform

Shape = int | Sequence[int]
Step = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def _directions(
    transform: FlowTransform,
    shape: Size,
    batch: Sequence[int],
    context: Tensor | None,
    dtype: torch.dtype = torch.float64,
) -> list[tuple[str, Step, Tensor]]:
    """Name, method and input of both directions; the inverse's input is the forward's output."""
    x = inside(transform.domain, shape, batch, dtype, seed=1)
    with torch.no_grad():
        y = transform.forward_and_log_det(x, context)[0]
    return [
        ("forward", transform.forward_and_log_det, x),
        ("inverse", transform.inverse_and_log_det, y),
    ]


def _row(context: Tensor | None, index: int) -> Tensor | None:
    return None if context is None else context[index]


def _jacobian(step: Step, value: Tensor, context: Tensor | None) -> Tensor:
    """Of one event: the output's shape, then the input's."""
    return jacobian(lambda v: step(v, context)[0], value)


@torch.no_grad()
def check_round_trip(
    transform: FlowTransform,
    shape: Shape,
    context: Shape = 0,
    dtype: torch.dtype = torch.float64,
) -> None:
    """``f^-1(f(x)) = x`` and ``f(f^-1(y)) = y``, with log-determinants that cancel.

    For batch shapes (), (7,), (3, 4) and (0,); where no side is bounded also for numbers of size
    50, which must come back to a relative error of a hundred times the usual.

    Args:
        transform: the map.
        shape: event shape of its input.
        context: width or shape of its context; 0 for none.
        dtype: of the transform's tensors.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_round_trip(pf.transforms.LULinear(3).double(), 3)
    """
    shape, wanted = as_shape(shape), as_shape(context)
    far_too = is_unbounded(transform.domain) and is_unbounded(transform.codomain)
    for batch in ((), (7,), (3, 4), (0,)):
        c = contexts(wanted, batch, dtype)
        near = inside(transform.domain, shape, batch, dtype, seed=1)
        for x, size in [(near, 1)] + ([(50 * near.sign(), 100)] if far_too else []):
            allowed = size * tolerance(dtype)
            where = f"batch {batch}, {'near the origin' if size == 1 else 'at |x| = 50'}"
            y, forth = transform.forward_and_log_det(x, c)
            require_shape(y, transform.forward_shape(x.shape), f"forward, {where}")
            require_shape(forth, batch, f"log-determinant of forward, {where}")
            require_finite(y, f"forward, {where}")
            valid = y.numel() == 0 or transform.codomain.check(y).all()
            require(valid, f"forward leaves the codomain, {where}")
            back, log_det = transform.inverse_and_log_det(y, c)
            require_close(back, x, allowed, f"inverse(forward(x)) is not x, {where}")
            require_close(-log_det, forth, allowed, f"log-determinants do not cancel, {where}")
            if far_too:  # any y will do, not only one that forward made
                x = x.reshape(y.shape)  # a map may change the event's shape, not its size
                x2, log_det = transform.inverse_and_log_det(x, c)
                require_shape(log_det, batch, f"log-determinant of inverse, {where}")
                require_finite(x2, f"inverse, {where}")
                back, forth = transform.forward_and_log_det(x2, c)
                require_close(back, x, allowed, f"forward(inverse(y)) is not y, {where}")
                require_close(forth, -log_det, allowed, f"log-determinants do not cancel, {where}")


def check_log_det(transform: FlowTransform, shape: Shape, context: Shape = 0) -> None:
    """The log-determinant is ``log|det J|`` of the Jacobian that autograd finds, both ways.

    For a simplex, whose last coordinate follows from the others, J leaves that coordinate out; for
    other maps between spaces of unequal dimension only ``forward = -inverse`` is checked.

    Args:
        transform: the map, in float64.
        shape: event shape of its input.
        context: width or shape of its context; 0 for none.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_log_det(pf.transforms.LULinear(3).double(), 3)
    """
    shape, wanted = as_shape(shape), as_shape(context)
    c = contexts(wanted, (3,), torch.float64)
    log_dets = []
    for name, step, values in _directions(transform, shape, (3,), c):
        log_det = step(values, c)[1].detach()
        log_dets.append(log_det)
        for row, value in enumerate(values):
            matrix = _jacobian(step, value, _row(c, row))
            event = value.numel()
            matrix = matrix.reshape(-1, event)
            outputs = matrix.shape[0]
            if abs(outputs - event) > 1:
                continue
            square = matrix[: min(matrix.shape), : min(matrix.shape)]
            expected = torch.linalg.slogdet(square).logabsdet
            require_close(
                log_det[row], expected, 1e-7, f"log-determinant of {name} against the Jacobian's"
            )
    require_close(log_dets[0], -log_dets[1], 1e-8, "log-determinant of forward against -inverse")


def check_gradients(transform: FlowTransform, shape: Shape, context: Shape = 0) -> None:
    """Gradients agree with finite differences, in both directions.

    With respect to the input and the context (``torch.autograd.gradcheck``) and to each parameter
    along one random direction; a parameter without a gradient is named.

    Args:
        transform: the map, in float64.
        shape: event shape of its input.
        context: width or shape of its context; 0 for none.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_gradients(pf.transforms.LULinear(3).double(), 3)
    """
    shape, wanted = as_shape(shape), as_shape(context)
    c = contexts(wanted, (2,), torch.float64)
    for name, step, value in _directions(transform, shape, (2,), c):
        _check_input_gradients(name, step, value, c)
        _check_parameter_gradients(transform, name, step, value, c)


def _check_input_gradients(name: str, step: Step, value: Tensor, context: Tensor | None) -> None:
    def outputs(x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        result, log_det = step(x, c)
        # A constant log-determinant has no graph, which gradcheck would not accept.
        return result, log_det + 0 * x.sum()

    inputs = [t.clone().requires_grad_() for t in (value, context) if t is not None]
    try:
        torch.autograd.gradcheck(outputs, inputs, atol=1e-5, rtol=1e-4)
    except Exception as error:  # gradcheck has its own kinds; the direction is what matters
        raise AssertionError(f"gradient of {name} in its input or context: {error}") from error


def _check_parameter_gradients(
    transform: FlowTransform, name: str, step: Step, value: Tensor, context: Tensor | None
) -> None:
    def score() -> Tensor:
        result, log_det = step(value, context)
        total = (result * randn(result.shape, result.dtype, 7)).sum()
        return total + (log_det * randn(log_det.shape, log_det.dtype, 8)).sum()

    trained = {n: p for n, p in transform.named_parameters() if p.requires_grad}
    if not trained:
        return
    found = torch.autograd.grad(score(), list(trained.values()), allow_unused=True)
    for index, (label, gradient) in enumerate(zip(trained, found, strict=True)):
        parameter = trained[label]
        require(gradient is not None, f"parameter {label!r} gets no gradient in {name}")
        require_finite(gradient, f"gradient of {label!r} in {name}")
        direction, epsilon = randn(parameter.shape, parameter.dtype, 100 + index), 1e-6
        with torch.no_grad():
            start = parameter.clone()
            parameter.copy_(start + epsilon * direction)
            above = score()
            parameter.copy_(start - epsilon * direction)
            slope = (above - score()) / (2 * epsilon)
            parameter.copy_(start)
        along = (gradient * direction).sum()
        require_close(along, slope, 1e-4, f"gradient of {label!r} in {name}")


def check_structure(transform: FlowTransform, shape: Shape, context: Shape = 0) -> None:
    """What a map declares is so.

    ``fast`` is one of the four words; a volume-preserving map has log-determinant zero; the
    Jacobian of a layer is zero where its ``dependencies()`` say so, as those of autoregressive
    layers and couplings do; ``.inv.inv`` is the map itself, and ``.inv`` has the same parameters.

    Args:
        transform: the map, in float64.
        shape: event shape of its input.
        context: width or shape of its context; 0 for none.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_structure(pf.transforms.Permute([2, 0, 1]), 3)
    """
    shape, wanted = as_shape(shape), as_shape(context)
    words = ("sample", "log_prob", "both", "neither")
    require(transform.fast in words, f"fast: expected one of {words}, got {transform.fast!r}")
    require(transform.inv.inv is transform, "t.inv.inv is not t")
    parameters, of_inverse = ({id(p) for p in t.parameters()} for t in (transform, transform.inv))
    require(parameters == of_inverse, "t.inv does not have the parameters of t")
    c = contexts(wanted, (5,), torch.float64)
    directions = _directions(transform, shape, (5,), c)
    if transform.volume_preserving:
        for name, step, value in directions:
            require(
                (step(value, c)[1] == 0).all(),
                f"declared volume-preserving, but the log-determinant of {name} is not zero",
            )
    for layer in transform.layers():
        allowed = layer.dependencies()
        if allowed is not None:
            x = randn(allowed.shape[1:], torch.float64, 3)
            matrix = _jacobian(layer.forward_and_log_det, x, _row(c, 0))
            bad = int((matrix[~allowed] != 0).sum())
            require(not bad, f"{bad} entries of the Jacobian should be zero: {layer!r}")


@torch.no_grad()
def check_context_rows(
    transform: FlowTransform,
    shape: Shape,
    context: Shape = 0,
    dtype: torch.dtype = torch.float64,
) -> None:
    """A batch equals its rows one by one; a context broadcasts against the batch.

    Args:
        transform: the map.
        shape: event shape of its input.
        context: width or shape of its context; 0 for none.
        dtype: of the transform's tensors.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> layer = pf.transforms.ContextAffine(2, context=3).double()
        >>> pf.testing.check_context_rows(layer, 2, context=3)
    """
    shape, wanted = as_shape(shape), as_shape(context)
    c = contexts(wanted, (4,), dtype)
    for name, step, value in _directions(transform, shape, (4,), c, dtype):
        together = step(value, c)
        rows = [step(v, _row(c, i)) for i, v in enumerate(value)]
        for part, what in enumerate(("value", "log-determinant")):
            alone = torch.stack([row[part] for row in rows])
            require_close(
                together[part], alone, tolerance(dtype), f"{what} of {name}: a batch, row by row"
            )
        if c is None:
            continue
        # One context for a batch, a batch of contexts for one point, and both at once.
        layouts = [(value, c[0]), (value[0], c), (value[:, None], c)]
        for values, some in layouts:
            batch = torch.broadcast_shapes(
                values.shape[: values.dim() - value[0].dim()], some.shape[: -len(wanted)]
            )
            spread = values.expand(*batch, *value.shape[1:]), some.expand(*batch, *wanted)
            for got, full in zip(step(values, some), step(*spread), strict=True):
                require_close(
                    got.broadcast_to(full.shape), full, tolerance(dtype), f"{name}: broadcasting"
                )
