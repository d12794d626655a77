"""MintNet's layer: convolutions masked to a triangular Jacobian, inverted by iteration."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows._checks import check_positive, check_whole, context_shape
from pyroflows.nets.conv import from_context
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.images.masks import IMAGE, rows_of
from pyroflows.transforms.implicit import with_implicit_gradient


class MaskedConv(FlowTransform):
    r""":math:`y = t \odot x + V_3\, h(V_2\, h(V_1 x + b_1 + c) + b_2) + b_3`, J triangular.

    Song, Meng & Ermon 2019, arXiv:1907.07945, section 3. Each V is a 3x3 convolution masked to
    pixels before (in reading order, channel by channel), ``width`` such for each channel of the
    image, and with positive weights on the diagonal; h increases. So the Jacobian is triangular
    with the diagonal

    .. math:: t + V_3^d h'(\cdot) V_2^d h'(\cdot) V_1^d \ge t > 0,

    where :math:`V^d` are the weights on the diagonal. Forward costs one pass.

    The inverse is the paper's fixed-point iteration with a step of one,
    :math:`x \leftarrow x + (y - f(x)) / \mathrm{diag} J(x)`, on the rows that have not converged
    yet. Each number's own map is convex and increasing (h is the ELU; with ``concave``,
    :math:`-\mathrm{elu}(-x)`, it is concave), so it is Newton's method where that converges from
    anywhere: pixel after pixel, in practice a few dozen passes together. Its gradient comes from
    the implicit function theorem and is exact to first order.

    Args:
        channels: number of channels C of the image.
        width: hidden channels for each channel of the image.
        context: width or shape of the context, added to the first hidden layer; 0 for none.
        size: height and width of the images; needed with an image as context alone.
        descending: pixels after instead of pixels before.
        concave: see above.
        tolerance: the inverse stops where ``|y - f(x)|`` is below this times the size of what is
            added up in it; by default ``eps ** 0.7`` of the dtype (1e-11 in double precision, 1e-5
            in single).
        iterations: passes at the most.

    Raises:
        ValueError: ``tolerance`` is not positive, or a size or ``iterations`` no positive integer.

    Warns:
        UserWarning: the inverse of some rows is not within the tolerance after ``iterations``
            passes; it says how many and how far off.

    Example:
        >>> import torch
        >>> layer = MaskedConv(1)
        >>> x = torch.randn(2, 1, 4, 4)
        >>> layer.inv(layer(x)).allclose(x, atol=1e-4)
        True
    """

    domain = codomain = IMAGE
    fast = "sample"

    def __init__(
        self,
        channels: int,
        width: int = 8,
        *,
        context: int | Sequence[int] = 0,
        size: tuple[int, int] = (1, 1),
        descending: bool = False,
        concave: bool = False,
        tolerance: float | None = None,
        iterations: int = 1000,
    ) -> None:
        super().__init__()
        check_whole(1, channels=channels, width=width, iterations=iterations)
        if tolerance is not None:
            check_positive(tolerance=tolerance)
        self.channels, self.width = channels, width
        self.descending, self.concave = descending, concave
        self.tolerance, self.iterations = tolerance, iterations
        self.context_dim = len(context_shape(context))
        self.from_context = from_context(context, width * channels, size)
        self.log_t = nn.Parameter(torch.zeros(channels))
        groups = (1, width, width, 1)
        pairs = list(zip(groups[1:], groups[:-1], strict=True))  # groups out, groups in
        self.weights = nn.ParameterList(
            torch.empty(o * channels, i * channels, 3, 3) for o, i in pairs
        )
        self.biases = nn.ParameterList(torch.zeros(o * channels) for o, _ in pairs)
        # Through a softplus, and averaged over the groups in: the last adds little at the start.
        self.diagonals = nn.ParameterList(
            torch.full((o, i, channels), start)
            for (o, i), start in zip(pairs, (0.5, 0.5, -3.0), strict=True)
        )
        mask = _mask(channels, descending)
        for index, (o, i) in enumerate(pairs):
            self.register_buffer(f"mask{index}", mask.repeat(o, i, 1, 1), persistent=False)
        nn.init.kaiming_uniform_(self.weights[0], a=5**0.5)
        nn.init.kaiming_uniform_(self.weights[1], a=5**0.5)
        nn.init.zeros_(self.weights[2])

    def _assembled(self) -> list[tuple[Tensor, Tensor]]:
        """Of each convolution its masked weight, and what of it stands on the diagonal."""
        result = []
        for index, (weight, raw) in enumerate(zip(self.weights, self.diagonals, strict=True)):
            diagonal = F.softplus(raw) / raw.shape[1]  # (groups out, groups in, channels)
            center = torch.diag_embed(diagonal).transpose(1, 2).reshape(weight.shape[:2])
            center = F.pad(center[:, :, None, None], (1, 1, 1, 1))
            result.append((weight * getattr(self, f"mask{index}") + center, diagonal))
        return result

    def _activated(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """``h(a)`` and ``h'(a)``."""
        if self.concave:
            return -F.elu(-a), a.clamp(min=0).neg().exp()
        return F.elu(a), a.clamp(max=0).exp()

    def _evaluate(
        self, x: Tensor, shift: Tensor | None, assembled: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows: what the convolutions give, ``t``'s share and the Jacobian's diagonal."""
        (weight, diagonal), *others = assembled
        first_bias, *biases = self.biases
        h = F.conv2d(x, weight, first_bias, padding=1)
        h = h if shift is None else h + shift
        slope = diagonal[:, 0, :, None, None]
        for (weight, diagonal), bias in zip(others, biases, strict=True):
            h, own = self._activated(h)
            slope = slope * own.unflatten(1, (self.width, self.channels))
            h = F.conv2d(h, weight, bias, padding=1)
            slope = torch.einsum("oic,nichw->nochw", diagonal, slope)
        t = self.log_t.exp()[:, None, None]
        return h, t * x, t + slope[:, 0]

    def _shift(self, context: Tensor | None) -> Tensor | None:
        return None if self.from_context is None else self.from_context(context)

    def _rows(
        self, value: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None, torch.Size]:
        used = None if self.from_context is None else context
        return rows_of(value, used, self.context_dim)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One pass."""
        rows, context, batch = self._rows(x, context)
        added, scaled, slope = self._evaluate(rows, self._shift(context), self._assembled())
        y, log_det = scaled + added, slope.log().sum(dim=(1, 2, 3))
        return y.reshape(*batch, *y.shape[1:]), log_det.reshape(batch)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """To the tolerance; see the class for what it costs."""
        rows, context, batch = self._rows(y, context)
        x = self._solve(rows, context)
        if torch.is_grad_enabled():

            def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                added, scaled, slope = self._evaluate(x, self._shift(context), self._assembled())
                return scaled + added, slope.log().sum(dim=(1, 2, 3)), slope

            x, log_det = with_implicit_gradient(rows, x, forward)
        else:
            slope = self._evaluate(x, self._shift(context), self._assembled())[2]
            log_det = -slope.log().sum(dim=(1, 2, 3))
        return x.reshape(*batch, *x.shape[1:]), log_det.reshape(batch)

    @torch.no_grad()
    def _solve(self, y: Tensor, context: Tensor | None) -> Tensor:
        """``x`` with ``f(x) = y``, row by row until each has converged."""
        shift, assembled = self._shift(context), self._assembled()
        tolerance = self.tolerance or torch.finfo(y.dtype).eps ** 0.7
        x = y.clone()
        open_rows = (~y.flatten(1).isnan().any(dim=1)).nonzero()[:, 0]
        off = y.new_zeros(())
        for _ in range(self.iterations):
            some = None if shift is None else shift[open_rows]
            at = x[open_rows]
            added, scaled, slope = self._evaluate(at, some, assembled)
            residual = y[open_rows] - scaled - added
            size = 1 + y[open_rows].abs() + scaled.abs() + added.abs()
            off = (residual.abs() / size).flatten(1).amax(dim=1)
            x[open_rows] = at + residual / slope  # also of what has converged: its last digits
            unmet = ~(off <= tolerance)  # also true of NaN, which then is reported
            if not unmet.any():
                return x
            open_rows, off = open_rows[unmet], off[unmet]
        if len(open_rows):
            warnings.warn(
                f"MaskedConv: the inverse of {len(open_rows)} of {len(y)} rows is off by "
                f"{float(off.max()):.3g} after {self.iterations} passes, {tolerance:.3g} was asked "
                "for: raise iterations or tolerance",
                stacklevel=2,
            )
        return x

    def extra_repr(self) -> str:
        """Channels, width and order."""
        flags = "".join(f", {f}" for f in ("descending", "concave") if getattr(self, f))
        return f"{self.channels}, width={self.width}{flags}"


def _mask(channels: int, descending: bool) -> Tensor:
    """``(C, C, 3, 3)``: one for what comes strictly before in reading order, channel by channel."""
    mask = torch.zeros(channels, channels, 3, 3)
    mask[:, :, 0] = 1
    mask[:, :, 1, 0] = 1
    mask[:, :, 1, 1] = torch.ones(channels, channels).tril(-1)
    return mask.flip(0, 1, 2, 3) if descending else mask
