"""An invertible 1 x 1 convolution: one matrix that mixes the channels of every pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.memo import mark, steps_taken
from pyroflows.nets.masked_linear import traced
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.images import IMAGE, rows_of


class _Product(torch.autograd.Function):
    """``L U`` of one triangle each and a diagonal ``d``, as one step of the graph.

    Both matrices are small, so what a step costs is its number of operations.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, lower: Tensor, upper: Tensor, d: Tensor
    ) -> Tensor:
        ctx.save_for_backward(lower, upper, d)
        left, right = _triangles(lower, upper, d)
        return left @ right

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        left, right = _triangles(*ctx.saved_tensors)
        grad_right = left.mT @ grad
        return (grad @ right.mT).tril(-1), grad_right.triu(1), grad_right.diagonal()


def _triangles(lower: Tensor, upper: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """L with a diagonal of one, and U with the diagonal ``d``."""
    ones = torch.ones_like(d)
    return (
        lower.tril(-1).diagonal_scatter(ones),
        upper.triu(1).diagonal_scatter(d),
    )


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
        # What matrix gives, and what it was made from.
        self._kept: dict[bool, tuple[tuple, tuple[Tensor, Tensor]]] = {}
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

    def matrix(self, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """``W`` or its inverse, ``(channels, channels)``, and its log-determinant.

        In eval mode both are made once and kept until a parameter was changed, replaced or moved,
        or an optimiser stepped; not where a gradient has to pass.
        """
        parameters = list(self._parameters.values())
        passes = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        if self.training or passes or traced() or any(p.is_inference() for p in parameters):
            return self._made(inverse)
        source = steps_taken(), *map(mark, parameters)
        kept = self._kept.get(inverse)
        if kept is None or kept[0] != source:
            with torch.inference_mode(False), torch.no_grad():
                kept = source, self._made(inverse)
            self._kept[inverse] = kept
        return kept[1]

    def _made(self, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.lu:
            log_det = self.log_diagonal.sum()
        else:
            log_det = torch.linalg.slogdet(self.weight).logabsdet
        return (self._inverse_matrix(), -log_det) if inverse else (self._matrix(), log_det)

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What L and U are made of."""
        return self.lower, self.upper, self.signs * self.log_diagonal.exp()

    def _matrix(self) -> Tensor:
        if not self.lu:
            return self.weight
        if traced():
            left, right = _triangles(*self._factors())
            return (left @ right).index_select(0, self.permutation)
        return _Product.apply(*self._factors()).index_select(0, self.permutation)

    def _inverse_matrix(self) -> Tensor:
        if not self.lu:
            return torch.linalg.inv(self.weight)
        lower, upper = _triangles(*self._factors())
        eye = torch.eye(len(lower)).to(lower)[self.permutation]  # P^T is this matrix transposed
        solved = torch.linalg.solve_triangular(lower, eye.mT, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, solved, upper=True)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_kept": {}}

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``W x``, one convolution."""
        return _mixed(x, *self.matrix())

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``W^-1 y``, one convolution."""
        return _mixed(y, *self.matrix(inverse=True))

    def extra_repr(self) -> str:
        """Channels and parametrisation."""
        return f"{len(self.lower if self.lu else self.weight)}, lu={self.lu}"


def _mixed(x: Tensor, matrix: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix on the channels of every pixel, and the log-determinant of that."""
    rows, _, batch = rows_of(x)
    y = F.conv2d(rows, matrix[:, :, None, None])
    y = y if len(batch) == 1 else y.reshape(*batch, *y.shape[1:])
    return y, (x.shape[-2] * x.shape[-1] * log_det).expand(batch)
