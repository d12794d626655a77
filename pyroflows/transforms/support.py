"""The last map of a flow over bounded data: from all of R^n onto the data's support."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
from pyro.distributions import transforms as of_pyro
from torch import Size, Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    IndependentTransform,
    SoftplusTransform,
    StackTransform,
    Transform,
)

from pyroflows._checks import check_whole
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.limits import off_zero

# What torch raises for bounds that are no numbers, or of another shape than the vectors.
_REFUSED = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)


class JoinedSupport(constraints.Constraint):
    """Vectors whose consecutive pieces satisfy one constraint each.

    Args:
        parts: pairs of a constraint and the number of features it governs.

    Raises:
        ValueError: a number of features is no integer, or below zero.
    """

    event_dim = 1

    def __init__(self, parts: list[tuple[constraints.Constraint, int]]) -> None:
        for _, length in parts:
            check_whole(0, **{"support: length of a part": length})
        self.parts = parts

    def check(self, value: Tensor) -> Tensor:
        """Whether each vector of ``(*batch, features)`` is inside."""
        pieces = value.split([length for _, length in self.parts], dim=-1)
        checks = [
            _vector(constraint).check(piece)
            for (constraint, _), piece in zip(self.parts, pieces, strict=True)
        ]
        return torch.stack(checks).all(dim=0)

    def __repr__(self) -> str:
        return f"JoinedSupport({self.parts})"


def _moved(
    constraint: constraints.Constraint, fn: Callable[[Tensor], Tensor]
) -> constraints.Constraint:
    """The constraint with ``fn`` applied to its tensors; itself if it has none."""
    own = vars(constraint)
    changed: dict[str, object] = {k: fn(v) for k, v in own.items() if isinstance(v, Tensor)}
    changed |= {
        k: new
        for k, v in own.items()
        if isinstance(v, constraints.Constraint) and (new := _moved(v, fn)) is not v
    }
    if not changed:
        return constraint
    moved = copy.copy(constraint)
    vars(moved).update(changed)
    return moved


def _bounds(constraint: constraints.Constraint) -> Iterator[Tensor]:
    """Those given as tensors."""
    for value in vars(constraint).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, constraints.Constraint):
            yield from _bounds(value)


@torch.no_grad()
def check_room(constraint: constraints.Constraint, bijection: Transform, shape: Size) -> None:
    """See that something gets inside: bounds may leave no room, or be no numbers.

    Args:
        constraint: to be met.
        bijection: onto it.
        shape: of what the bijection takes.

    Raises:
        ValueError: the image of the origin is outside, infinitely far or squeezed to nothing;
            torch raises other errors where bounds are no numbers.

    Example:
        >>> support = constraints.interval(2.0, 1.0)
        >>> check_room(support, biject_to(support), Size([3]))
        Traceback (most recent call last):
            ...
        ValueError: nothing gets inside
    """
    z = torch.zeros(shape, device="cpu")
    for bound in _bounds(constraint):
        z = z.to(bound.device).expand(torch.broadcast_shapes(z.shape, bound.shape))
    for parameter in getattr(bijection, "parameters", list)():  # of a flow that is the constraint
        z = z.to(parameter)
    x = bijection(z)
    bijection.inv(x)
    log_det = bijection.log_abs_det_jacobian(z, x)
    if z.is_meta:
        return
    if not (constraint.check(x).all() and x.isfinite().all() and log_det.isfinite().all()):
        raise ValueError("nothing gets inside")


def _within(transform: Transform, x: Tensor) -> Tensor:
    """``x`` where ``transform`` stays on its support; clamped only where it has an exponential.

    exp and its kind leave the support beyond some eighty, to infinity or onto its edge. What is
    linear far out, as a softplus to the right or the first of ordered numbers, goes on for ever.
    """
    if isinstance(transform, IndependentTransform):
        return _within(transform.base_transform, x)
    if isinstance(transform, StackTransform):
        pieces = zip(transform.transforms, x.unbind(transform.dim), strict=True)
        return torch.stack([_within(t, piece) for t, piece in pieces], transform.dim)
    bent = [t for t in _leaves(transform) if not isinstance(t, (AffineTransform, FlowTransform))]
    if not bent:
        return x
    limit = 0.98 * math.log(torch.finfo(x.dtype).max)
    if len(bent) == 1 and isinstance(bent[0], (SoftplusTransform, of_pyro.SoftplusTransform)):
        return x.clamp(min=-limit)
    if len(bent) == 1 and isinstance(bent[0], of_pyro.OrderedTransform):
        return torch.cat([x[..., :1], x[..., 1:].clamp(-limit, limit)], dim=-1)
    return x.clamp(-limit, limit)


def _off_edges(transform: Transform, y: Tensor) -> Tensor:
    """``y``, a little off an edge at zero where the inverse of ``transform`` has a logarithm.

    Away from zero a float cannot come so close to an edge that the slope there overflows. Ordered
    numbers stay: what counts with them is how far they are apart.
    """
    kinds = AffineTransform, FlowTransform, of_pyro.OrderedTransform
    return y if all(isinstance(t, kinds) for t in _leaves(transform)) else off_zero(y)


def _leaves(transform: Transform) -> Iterator[Transform]:
    """The maps that a transform is composed of."""
    if isinstance(transform, ComposeTransform):
        for part in transform.parts:
            yield from _leaves(part)
    elif isinstance(transform, IndependentTransform):
        yield from _leaves(transform.base_transform)
    else:
        yield transform


def _vector(constraint: constraints.Constraint) -> constraints.Constraint:
    """The constraint on whole vectors."""
    if constraint.event_dim:
        return constraint
    if biject_to(constraint).codomain.event_dim:
        # Pyro's positive_ordered_vector is one of vectors and does not say so.
        whole = copy.copy(constraint)
        whole.event_dim = 1
        return whole
    return constraints.independent(constraint, 1)


class ToSupport(FlowTransform):
    """The bijection from R^n onto a constrained set of vectors: ``biject_to(support)``.

    Each direction costs one elementwise map, on a simplex a cumulative sum besides. The bijections
    are torch's (Dillon et al. 2017, arXiv:1711.10604, describes their like). Inputs of an
    exponential are clamped to where it is finite and positive; nothing else is.

    Args:
        support: a constraint of torch or Pyro: ``positive``, ``interval(a, b)``, ``simplex``, ...,
            or a ``cat`` of several along the last dimension, with ``lengths`` counted in the data.
        features: length of a data vector.

    Raises:
        ValueError: the lengths of a ``cat`` do not add up to ``features``, its dimension is not
            the last, there is no bijection onto the support, or no vector is inside.

    Example:
        >>> import torch
        >>> from torch.distributions import constraints
        >>> ToSupport(constraints.positive, 2)(torch.zeros(2))
        tensor([1., 1.])
    """

    def __init__(self, support: constraints.Constraint, features: int) -> None:
        super().__init__()
        parts = [(support, features)]
        if isinstance(support, constraints.cat):
            if support.dim not in (-1, 0):
                raise ValueError(
                    "support: expected a cat along the last dimension, got one along dimension "
                    f"{support.dim}"
                )
            support = JoinedSupport(list(zip(support.cseq, support.lengths, strict=True)))
        if isinstance(support, JoinedSupport):
            parts = support.parts
            lengths = [length for _, length in parts]
            if sum(lengths) != features:
                raise ValueError(
                    f"support: expected parts with lengths that add up to {features} features, got "
                    f"{lengths}"
                )
        self.features = features
        try:
            self._set(support, parts)
            self.inputs = sum(inputs for _, inputs, _ in self._parts)
            for (transform, inputs, _), (constraint, _) in zip(self._parts, parts, strict=True):
                check_room(constraint, transform, Size([1, inputs]))
        except _REFUSED as error:
            raise ValueError(
                f"support: expected a constraint with room for vectors of {features} features, got "
                f"{support!r} ({error})"
            ) from None

    def _set(
        self, support: constraints.Constraint, parts: list[tuple[constraints.Constraint, int]]
    ) -> None:
        self.support = support
        self._constraints = parts
        self._parts: list[tuple[Transform, int, int]] = []
        for constraint, length in parts:
            transform = self._bijection(constraint)
            inputs = transform.inverse_shape(Size([length]))[-1]
            self._parts.append((transform, inputs, length))
        self.codomain = _vector(support)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ToSupport:
        """Bounds given as tensors move with the module."""
        parts = [(_moved(constraint, fn), length) for constraint, length in self._constraints]
        self._set(JoinedSupport(parts) if len(parts) > 1 else parts[0][0], parts)
        return super()._apply(fn, recurse)

    @staticmethod
    def _bijection(constraint: constraints.Constraint) -> Transform:
        try:
            transform = biject_to(constraint)
        except NotImplementedError:
            raise ValueError(
                f"torch knows no bijection onto {constraint}; give one that "
                "torch.distributions.biject_to accepts, or register yours"
            ) from None
        if max(transform.domain.event_dim, transform.codomain.event_dim) > 1:
            raise ValueError("expected a constraint on vectors")
        return transform

    def _map(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        sizes = [n if inverse else i for _, i, n in self._parts]
        outputs, log_det = [], value.new_zeros(value.shape[:-1])
        for (transform, _, _), piece in zip(self._parts, value.split(sizes, dim=-1), strict=True):
            piece = _off_edges(transform, piece) if inverse else _within(transform, piece)
            image = transform.inv(piece) if inverse else transform(piece)
            x, y = (image, piece) if inverse else (piece, image)
            part = transform.log_abs_det_jacobian(x, y)
            part = part.sum(dim=-1) if transform.domain.event_dim == 0 else part
            outputs.append(image)
            log_det = log_det - part if inverse else log_det + part
        return torch.cat(outputs, dim=-1), log_det

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Onto the support."""
        return self._map(x, inverse=False)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Back to R^n."""
        return self._map(y, inverse=True)

    def within_limits(self, y: Tensor) -> Tensor:
        """``y`` itself: a logarithm of any number is small."""
        return y

    def forward_shape(self, shape: Size) -> Size:
        """``(*batch, inputs)`` to ``(*batch, features)``."""
        return Size([*shape[:-1], self.features])

    def inverse_shape(self, shape: Size) -> Size:
        """``(*batch, features)`` to ``(*batch, inputs)``."""
        return Size([*shape[:-1], self.inputs])

    def extra_repr(self) -> str:
        """The support."""
        return f"{self.support}, {self.features}"


@biject_to.register(JoinedSupport)
@transform_to.register(JoinedSupport)
def _to_joined_support(support: JoinedSupport) -> ToSupport:
    return ToSupport(support, sum(length for _, length in support.parts))
