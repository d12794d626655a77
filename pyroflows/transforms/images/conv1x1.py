"""An invertible 1 x 1 convolution: one matrix that mixes the channels of every pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows._checks import check_whole
from pyroflows._pyro.memo import Kept, traced
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.images.masks import IMAGE


class _Product(torch.autograd.Function):
    """``P L U`` and ``log|det|`` as one step of the graph.

    The matrices are small, so what a step costs is its number of operations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        lower: Tensor,
        upper: Tensor,
        log_diagonal: Tensor,
        signs: Tensor,
        permutation: Tensor,
    ) -> tuple[Tensor, Tensor]:
        left, right = lower.tril(-1), upper.triu(1)
        torch.mul(signs, log_diagonal.exp(), out=right.diagonal())
        ctx.save_for_backward(lower, upper, log_diagonal, signs, permutation, left, right)
        product = torch.addmm(right, left, right)  # L is 1 + left
        return product.index_select(0, permutation), log_diagonal.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        lower, upper, log_diagonal, signs, permutation, left, right = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for: in terms of autograd
            left, right = lower.tril(-1), upper.triu(1) + (signs * log_diagonal.exp()).diag()
        grad = torch.empty_like(grad).index_copy_(0, permutation, grad)
        of_lower, of_upper, of_diagonal, *_ = ctx.needs_input_grad
        grad_upper = grad_diagonal = None
        if of_upper or of_diagonal:
            grad_right = torch.addmm(grad, left.mT, grad)
            grad_upper = grad_right.triu(1) if of_upper else None
            grad_diagonal = torch.addcmul(grad_log_det, grad_right.diagonal(), right.diagonal())
        return (
            (grad @ right.mT).tril(-1) if of_lower else None,
            grad_upper,
            grad_diagonal if of_diagonal else None,
            None,
            None,
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

    Raises:
        ValueError: ``channels`` is not a positive integer.

    Example:
        >>> import torch
        >>> layer = Conv1x1(3)
        >>> layer.inv(layer(torch.ones(3, 4, 4))).allclose(torch.ones(3, 4, 4), atol=1e-5)
        True
    """

    domain = codomain = IMAGE
    permutation: Tensor
    signs: Tensor

    def __init__(self, channels: int, *, lu: bool = True, seed: int = 0) -> None:
        super().__init__()
        check_whole(1, channels=channels)
        self.lu = lu
        # What matrix gives without a graph.
        self._matrix: Kept[tuple[Tensor, Tensor | float]] = Kept()
        self._inverse_matrix: Kept[tuple[Tensor, Tensor | float]] = Kept()
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
        """``W`` or its inverse, ``(channels, channels)``, and its log-determinant."""
        if not self.lu:
            log_det = torch.linalg.slogdet(self.weight).logabsdet
            matrix = torch.linalg.inv(self.weight) if inverse else self.weight
        elif inverse or traced():
            log_det = self.log_diagonal.sum()
            matrix = self._solved() if inverse else torch.matmul(*self._factors())
            matrix = matrix.index_select(1 if inverse else 0, self.permutation)
        else:
            parameters = self.lower, self.upper, self.log_diagonal
            return _Product.apply(*parameters, self.signs, self.permutation)
        return matrix, -log_det if inverse else log_det

    def _factors(self) -> tuple[Tensor, Tensor]:
        """L with a diagonal of one, and U with the signs."""
        diagonal = self.signs * self.log_diagonal.exp()
        return self.lower.tril(-1) + torch.ones_like(diagonal).diag(), (
            self.upper.triu(1) + diagonal.diag()
        )

    def _solved(self) -> Tensor:
        """The inverse of ``L U``."""
        lower, upper = self._factors()
        eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        solved = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, solved, upper=True)

    def _mixed(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """The matrix on the channels of every pixel, and the log-determinant of that."""
        batch, pixels = x.shape[:-3], x.shape[-2] * x.shape[-1]
        matrix, log_det = self._without_graph(inverse) or self.matrix(inverse)
        log_det = pixels * log_det
        if isinstance(log_det, Tensor):
            log_det = log_det.expand(batch)
        else:
            log_det = matrix.new_full(batch, log_det)
        # Channels last, as images lie in a flow: this is one product, without a copy.
        return F.linear(x.movedim(-3, -1), matrix).movedim(-1, -3), log_det

    def _without_graph(self, inverse: bool) -> tuple[Tensor, Tensor | float] | None:
        """What ``matrix`` gives, in eval mode made once and kept until a parameter changes.

        None in training, where a gradient has to pass, or operations are traced. A write to a
        parameter's ``.data`` goes unseen until ``eval()`` is called again.
        """
        if self.training or traced():
            return None
        tensors: tuple[Tensor, ...] = (
            (self.lower, self.upper, self.log_diagonal, self.signs, self.permutation)
            if self.lu
            else (self.weight,)
        )
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return None

        def make() -> tuple[Tensor, Tensor | float]:
            matrix, log_det = self.matrix(inverse)
            return matrix.clone(), float(log_det) if log_det.is_cpu else log_det

        return (self._inverse_matrix if inverse else self._matrix).get(tensors, make)

    def train(self, mode: bool = True) -> Conv1x1:
        """As in torch; what was kept is forgotten."""
        self._matrix.clear()
        self._inverse_matrix.clear()
        return super().train(mode)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``W x`` at every pixel."""
        return self._mixed(x, inverse=False)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``W^-1 y`` at every pixel."""
        return self._mixed(y, inverse=True)

    def extra_repr(self) -> str:
        """Channels and parametrisation."""
        return f"{len(self.lower if self.lu else self.weight)}, lu={self.lu}"
