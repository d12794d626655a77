"""What a network has to offer for an autoregressive map to be inverted by one sequential solve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeGuard

from torch import Tensor


class SolvableNet(Protocol):
    """A network that is solved through feature by feature at about the cost of one or two passes.

    ``MADE`` and ``CausalConv`` are; any other is called once a feature. Rows are rows of data. One
    that takes the last feature first says so by an attribute ``descending = True``.
    """

    def __call__(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The parameters ``(*batch, features, params)``; the i-th row sees ``x_<i`` alone."""

    def weights(self) -> list[Tensor]:
        """All weights and biases, in the order of ``solve_back``'s gradients."""

    def solve(
        self,
        step: Callable[[int, Tensor], Tensor],
        like: Tensor,
        context: Tensor | None = None,
        block_step: Callable[[int, int, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The fixed point ``x_i = step(i, params_i(x_<i))``; see ``nets.made_inverse``."""

    def solve_back(
        self,
        step: Callable[[int, Tensor, Tensor], object],
        x: Tensor,
        context: Tensor | None = None,
        block_step: Callable[[int, int, Tensor], Tensor] | None = None,
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Gradients back through it; see ``nets.made_gradient``."""


def is_solvable(net: object) -> TypeGuard[SolvableNet]:
    """Whether the network offers all that ``SolvableNet`` lists."""
    return all(hasattr(net, name) for name in ("solve", "solve_back", "weights"))


def is_descending(net: object) -> bool:
    """Whether the network takes the last feature first."""
    return getattr(net, "descending", False)
