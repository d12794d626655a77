"""Transforms one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyroflows.transforms.base import FlowTransform, Inverse


class Chain(FlowTransform):
    """Transforms applied one after the other, in the order given (base to data).

    Each direction costs what its parts cost, added up; ``fast`` is what all of them are fast in.

    Args:
        parts: the transforms; a chain among them is taken apart.

    Raises:
        ValueError: a part is no ``FlowTransform``.

    Example:
        >>> import torch, pyroflows as pf
        >>> both = pf.Chain([pf.transforms.Permute([1, 0]), pf.transforms.LULinear(2)])
        >>> both(torch.tensor([1.0, 2.0])), both.fast
        (tensor([2., 1.], grad_fn=...), 'both')
    """

    parts: Sequence[FlowTransform]

    def __init__(self, parts: Iterable[FlowTransform]) -> None:
        super().__init__()
        flat: list[FlowTransform] = []
        for part in parts:
            if not isinstance(part, FlowTransform):
                raise ValueError(f"parts: expected FlowTransforms, got {type(part).__name__}")
            flat.extend(part.parts if isinstance(part, Chain) else [part])
        self.parts = cast("Sequence[FlowTransform]", nn.ModuleList(flat))

    @property
    def fast(self) -> str:
        """The direction that costs one pass in every part."""
        return joint_fast(self.parts)

    @property
    def volume_preserving(self) -> bool:
        """Whether every part is."""
        return all(part.volume_preserving for part in self.parts)

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        """What may go in."""
        return self.parts[0].domain if len(self.parts) else constraints.real_vector

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        """What comes out."""
        return self.parts[-1].codomain if len(self.parts) else constraints.real_vector

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """All parts in order; log-determinants add up."""
        total = None
        for part in self.parts:
            x, log_det = part.forward_and_log_det(x, context)
            total = _plus(total, log_det, part)
        return x, self._total(total, x)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """All inverses in reverse order; log-determinants add up."""
        total = None
        for part in reversed(self.parts):
            y, log_det = part.inverse_and_log_det(y, context)
            total = _plus(total, log_det, part)
        return y, self._total(total, y)

    def forward_with_state(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Any]]:
        """All parts in order, and what the inverse of each can use."""
        total, state = None, []
        for part in self.parts:
            x, log_det, of_part = part.forward_with_state(x, context)
            total = _plus(total, log_det, part)
            state.append(of_part)
        return x, self._total(total, x), state

    def inverse_from_state(
        self, y: Tensor, state: list[Any], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """All inverses in reverse order, each where its part came from."""
        total = None
        for part, of_part in zip(reversed(self.parts), reversed(state), strict=True):
            y, log_det = part.inverse_from_state(y, of_part, context)
            total = _plus(total, log_det, part)
        return y, self._total(total, y)

    def within_limits(self, y: Tensor) -> Tensor:
        """What the last part, which reads them first, makes of it."""
        return self.parts[-1].within_limits(y) if len(self.parts) else y

    def mirror(self, wider: float = 1.0, *, inverse: bool = False) -> FlowTransform:
        """The chain of the parts' mirrors."""
        parts = reversed(self.parts) if inverse else self.parts
        return Chain(part.mirror(wider, inverse=inverse) for part in parts)

    def _total(self, log_det: Tensor | None, value: Tensor) -> Tensor:
        """Zero where there is no part."""
        if log_det is None:
            return value.new_zeros(value.shape[: value.dim() - self.domain.event_dim])
        return log_det

    def initialize(
        self, value: Tensor, context: Tensor | None = None, *, inverse: bool = True
    ) -> Tensor:
        """Initialise the parts one by one, each on its neighbour's output."""
        for part in reversed(self.parts) if inverse else self.parts:
            value = part.initialize(value, context, inverse=inverse)
        return value

    def forward_shape(self, shape: Size) -> Size:
        """The output's shape."""
        for part in self.parts:
            shape = part.forward_shape(shape)
        return shape

    def inverse_shape(self, shape: Size) -> Size:
        """The input's shape."""
        for part in reversed(self.parts):
            shape = part.inverse_shape(shape)
        return shape

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[FlowTransform]:
        return iter(self.parts)

    def __getitem__(self, index: int) -> FlowTransform:
        return self.parts[index]

    def __repr__(self) -> str:
        lines = [f"  {i}: {part!r}" for i, part in enumerate(self.parts)]
        if len(lines) > 24:
            lines = [*lines[:12], f"  ... {len(lines) - 24} more ...", *lines[-12:]]
        return "\n".join(["Chain(", *lines, ")"])


def joint_fast(parts: Iterable[FlowTransform]) -> str:
    """The direction that costs one pass in every part."""
    directions = {part.fast for part in parts} - {"both"}
    return directions.pop() if len(directions) == 1 else "neither" if directions else "both"


def _plus(total: Tensor | None, log_det: Tensor, part: FlowTransform) -> Tensor:
    """The running log-determinant; zeros are not added one by one, unless for their batch."""
    if total is None:
        return log_det
    is_nothing = part.volume_preserving and total.shape == log_det.shape
    return total if is_nothing else total + log_det


def parts_of(transform: FlowTransform) -> list[FlowTransform]:
    """The maps that follow one another, with chains and inverses of chains taken apart."""
    if isinstance(transform, Chain):
        return [inner for part in transform for inner in parts_of(part)]
    if isinstance(transform, Inverse):
        parts = parts_of(transform.transform)
        return [transform] if len(parts) == 1 else [part.inv for part in reversed(parts)]
    return [transform]
