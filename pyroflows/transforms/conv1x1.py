"""An invertible 1 x 1 convolution: one matrix that mixes the channels of every pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.images import IMAGE, rows_of


class Conv1x1(FlowTransform):
    r"""``y = W x`` at every pixel; :math:`\log|\det| = H W \log|\det W|`.

    Kingma & Dhariwal 2018, arXiv:1807.03039, sections 3.2 and 3.3. With ``lu`` the matrix is
    :math:`W = P L U` with P fixed, L unit lower, and the signs on U's diagonal fixed: it stays
    invertible, its determinant costs nothing, and its inverse takes two triangular solves of the
    size of W. Starts as a random rotation, which leaves what is white white; from a seed of its
    own, so equal arguments give equal layers and the global generator is left alone.

    Args:
        channels: number of channels.
        lu: whether W is kept in factors; the plain matrix costs O(channels^3) a call.
        seed: of the rotation.

    Example:
        >>> import torch
        >>> layer = Conv1x1(3)
        >>> layer.inv(layer(torch.ones(3, 4, 4))).allclose(torch.ones(3, 4, 4), atol=1e-5)
        True
    """

    domain = codomain = IMAGE

    def __init__(self, channels: int, *, lu: bool = True, seed: int = 0) -> None:
        super().__init__()
        self.lu = lu
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
        rotation = torch.linalg.qr(start).Q
        dtype = torch.get_default_dtype()
        if not lu:
            self.weight = nn.Parameter(rotation.to(dtype))
            return
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.register_buffer("permutation", permutation.argmax(dim=1))  # y_i = (L U x)_p(i)
        self.register_buffer("signs", diagonal.sign().to(dtype))
        self.lower = nn.Parameter(lower.tril(-1).to(dtype))
        self.upper = nn.Parameter(upper.triu(1).to(dtype))
        self.log_diagonal = nn.Parameter(diagonal.abs().log().to(dtype))

    def _factors(self) -> tuple[Tensor, Tensor]:
        """L and U."""
        lower = self.lower.tril(-1) + torch.eye(len(self.lower)).to(self.lower)
        return lower, self.upper.triu(1) + torch.diag(self.signs * self.log_diagonal.exp())

    def matrix(self) -> Tensor:
        """``W``, of shape ``(channels, channels)``."""
        if not self.lu:
            return self.weight
        lower, upper = self._factors()
        return (lower @ upper).index_select(0, self.permutation)

    def inverse_matrix(self) -> Tensor:
        """``W^-1``, of shape ``(channels, channels)``."""
        if not self.lu:
            return torch.linalg.inv(self.weight)
        lower, upper = self._factors()
        eye = torch.eye(len(lower)).to(lower)[self.permutation]  # P^T is this matrix transposed
        solved = torch.linalg.solve_triangular(lower, eye.mT, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, solved, upper=True)

    def _log_det(self, x: Tensor) -> Tensor:
        one = self.log_diagonal.sum() if self.lu else torch.linalg.slogdet(self.weight).logabsdet
        return (x.shape[-2] * x.shape[-1] * one).expand(x.shape[:-3])

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``W x``, one convolution."""
        return _mixed(x, self.matrix()), self._log_det(x)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``W^-1 y``, one convolution."""
        return _mixed(y, self.inverse_matrix()), -self._log_det(y)

    def extra_repr(self) -> str:
        """Channels and parametrisation."""
        return f"{len(self.lower if self.lu else self.weight)}, lu={self.lu}"


def _mixed(x: Tensor, matrix: Tensor) -> Tensor:
    """The matrix on the channels of every pixel."""
    rows, _, batch = rows_of(x)
    y = F.conv2d(rows, matrix[:, :, None, None])
    return y if len(batch) == 1 else y.reshape(*batch, *y.shape[1:])
