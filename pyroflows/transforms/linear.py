"""Linear maps that mix all features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows._checks import check_whole
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.limits import farthest


class LULinear(FlowTransform):
    r""":math:`y = L U x + b` with unit lower L and upper U whose diagonal is positive.

    Starts as the identity. Forward is two triangular products, the inverse two triangular solves
    or, of many rows, a product with the inverse matrix, each O(D^2) a row;
    ``log|det| = sum_i log U_ii`` costs O(D). Oliva et al. 2018, arXiv:1801.09819; Kingma &
    Dhariwal 2018, arXiv:1807.03039, eq. 10.

    Args:
        features: number of features D.

    Raises:
        ValueError: ``features`` is not a positive integer.

    Example:
        >>> import torch
        >>> LULinear(3)(torch.tensor([1.0, 2.0, 3.0]))
        tensor([1., 2., 3.], grad_fn=...)
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        check_whole(1, features=features)
        self.lower = nn.Parameter(torch.zeros(features, features))
        self.upper = nn.Parameter(torch.zeros(features, features))
        self.log_diagonal = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def _factors(self) -> tuple[Tensor, Tensor]:
        """L without its unit diagonal, and U."""
        return self.lower.tril(-1), self.upper.triu(1) + torch.diag(self.log_diagonal.exp())

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``L U x + b``."""
        lower, upper = self._factors()
        h = F.linear(x, upper)
        return h + F.linear(h, lower, self.bias), self.log_diagonal.sum().expand(x.shape[:-1])

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``U^-1 L^-1 (y - b)``."""
        lower, upper = self._factors()
        rows = (y - self.bias).reshape(-1, y.shape[-1])
        # A triangular solve takes several times a product's time a row: many rows take the inverse.
        many = len(rows) > 2 * len(self.bias)
        right = torch.eye(len(self.bias), dtype=y.dtype, device=y.device) if many else rows
        solve = torch.linalg.solve_triangular
        right = solve(lower.mT, right, upper=True, left=False, unitriangular=True)
        right = solve(upper.mT, right, upper=False, left=False)
        rows = rows @ right if many else right
        return rows.reshape(y.shape), -self.log_diagonal.sum().expand(y.shape[:-1])

    def extra_repr(self) -> str:
        """The number of features."""
        return str(len(self.bias))


class Whiten(FlowTransform):
    r""":math:`y = L x + m` with a fixed location and a fixed lower-triangular L.

    Both are buffers: set once (``set``), part of the ``state_dict``, never trained. The inverse
    whitens what has mean m and covariance :math:`L L^T`. Starts as the identity. Forward costs a
    product, the inverse a triangular solve, each O(D^2) a row.

    Args:
        features: number of features D.

    Raises:
        ValueError: ``features`` is not a positive integer.

    Example:
        >>> import torch
        >>> layer = Whiten(2)
        >>> layer.set(torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        >>> layer(torch.tensor([1.0, 1.0]))
        tensor([3., 4.])
    """

    loc: Tensor
    tril: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        check_whole(1, features=features)
        self.register_buffer("loc", torch.zeros(features))
        self.register_buffer("tril", torch.eye(features))

    @torch.no_grad()
    def set(self, loc: Tensor, tril: Tensor) -> None:
        """Take the location ``(D,)`` and the factor ``(D, D)``."""
        self.loc.copy_(loc)
        self.tril.copy_(tril.tril())

    def _log_det(self, batch: torch.Size) -> Tensor:
        return self.tril.diagonal().log().sum().expand(batch)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``L x + m``."""
        return F.linear(x, self.tril, self.loc), self._log_det(x.shape[:-1])

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``L^-1 (y - m)``."""
        rows = (y - self.loc).reshape(-1, y.shape[-1])
        rows = torch.linalg.solve_triangular(self.tril.mT, rows, upper=True, left=False)
        return rows.reshape(y.shape), -self._log_det(y.shape[:-1])

    def within_limits(self, y: Tensor) -> Tensor:
        """``y``, no farther from the location than so many standard deviations."""
        reach = farthest(y.dtype) * self.tril.norm(dim=1)
        return y.clamp(self.loc - reach, self.loc + reach)

    def extra_repr(self) -> str:
        """The number of features."""
        return str(len(self.loc))
