"""MADE: a masked network whose i-th output sees only inputs before the i-th.

Germain et al. 2015, arXiv:1502.03509. Hidden units are sorted by degree, which makes every masked
weight matrix block-triangular; ``solve`` uses this to evaluate the network feature by feature while
computing each hidden unit once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.nets.mlp import activation_named, check_widths


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is masked: output o sees input i where ``mask[o, i]``."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask, persistent=False)
        # Fan-in of what the mask leaves, or the first outputs of a wide layer start too small.
        bound = mask.sum(dim=1, keepdim=True).clamp(min=1).rsqrt()
        with torch.no_grad():
            self.weight.uniform_(-1, 1).mul_(bound)
            self.bias.uniform_(-1, 1).mul_(bound[:, 0])

    def masked_weight(self) -> Tensor:
        """The weight with zeros where nothing may pass."""
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b``."""
        return F.linear(x, self.masked_weight(), self.bias)


class MADE(nn.Module):
    """Parameters ``(*batch, features, params)``; those of feature i see ``x_<i`` and the context.

    Hidden layers of equal width are joined by parameter-free skips (a residual MADE). Units see the
    context through the first layer; with one there are units that see nothing else, so the first
    feature's parameters depend on it too. The last layer starts at zero: a flow starts as the
    identity.

    Args:
        features: number of features D.
        params: numbers per feature.
        hidden: widths, one per hidden layer; any width will do, also below D.
        context: number of context features.
        activation: a name from ``pyroflows.nets.mlp.ACTIVATIONS``.
        residual: skips between hidden layers of equal width.

    Raises:
        ValueError: widths that are not positive integers, or an unknown activation.

    Example:
        >>> import torch
        >>> MADE(5, 2, hidden=(32, 32))(torch.ones(7, 5)).shape
        torch.Size([7, 5, 2])
    """

    def __init__(
        self,
        features: int,
        params: int,
        *,
        hidden: Sequence[int] = (128, 128),
        context: int = 0,
        activation: str = "relu",
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.features = features
        self.params = params
        self.hidden = check_widths(hidden)
        self.activation = activation
        self._activate = activation_named(activation)
        self.residual = residual
        self.dropout = 0.0  # a share of hidden units, set by whoever trains, for the time it does

        # A unit of degree d sees x_0 .. x_d, one of degree -1 the context alone.
        least = -1 if context or features == 1 else 0
        count = max(features - 1 - least, 1)
        inputs = torch.arange(features)
        self._degrees = [least + torch.arange(w) * count // w for w in self.hidden]
        sees = [inputs, *self._degrees]
        self.layers = nn.ModuleList(
            MaskedLinear(above[:, None] >= below)
            for below, above in zip(sees, self._degrees, strict=False)
        )
        outputs = inputs.repeat_interleave(params)
        self.last = MaskedLinear(outputs[:, None] > self._degrees[-1])
        self.from_context = nn.Linear(context, self.hidden[0], bias=False) if context else None
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def _has_skip(self, layer: int) -> bool:
        return self.residual and layer > 0 and self.hidden[layer] == self.hidden[layer - 1]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """All features' parameters in one pass; ``context`` broadcasts against the batch."""
        h = self.layers[0](x)
        if self.from_context is not None:
            h = h + self.from_context(context)
        for index, layer in enumerate(self.layers[1:], start=1):
            a = F.dropout(self._activate(h), self.dropout, self.training)
            h = h + layer(a) if self._has_skip(index) else layer(a)
        out = self.last(F.dropout(self._activate(h), self.dropout, self.training))
        return out.unflatten(-1, (self.features, self.params))

    @torch.no_grad()
    def solve(
        self,
        step: Callable[[int, Tensor], Tensor],
        like: Tensor,
        context: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The fixed point ``x_i = step(i, params_i(x_<i))``, features in order.

        Each hidden unit is computed once, when the features it sees are known, so the whole walk
        costs about the arithmetic of two passes. Inside a block of features only the block's own
        columns are multiplied; one large product a layer then carries the finished block to all
        later rows. Not differentiable; never uses dropout.

        Args:
            step: gives feature i, ``(rows,)``, from its parameters ``(rows, params)``.
            like: ``(rows, features)``; its number of rows, dtype and device are used.
            context: ``(rows, context)`` or None.

        Returns:
            The fixed point ``(rows, features)`` and its parameters ``(rows, features, params)``.
        """
        rows, params = like.shape[0], self.params
        weights = [layer.masked_weight() for layer in (*self.layers, self.last)]
        # Units stand in rows here: (units, rows), so that a range of units is contiguous.
        sums = [layer.bias[:, None].repeat(1, rows) for layer in (*self.layers, self.last)]
        if self.from_context is not None:
            sums[0] += self.from_context.weight @ context.mT
        x = like.new_empty(self.features, rows)
        values = [x, *(like.new_empty(w, rows) for w in self.hidden)]  # what each layer reads
        width = max(1, math.isqrt(self.features))
        upto = [self._ends(d) for d in (torch.arange(self.features), *self._degrees)]

        def finish(degree: int, start: int) -> None:
            """The units of one degree, given the columns from degree ``start`` on."""
            for layer, weight in enumerate(weights[:-1]):
                a, b = upto[layer + 1][degree], upto[layer + 1][degree + 1]
                if a == b:
                    continue
                c, d = upto[layer][start], upto[layer][degree + 1]
                unit = sums[layer][a:b]
                if d > c:
                    unit.addmm_(weight[a:b, c:d], values[layer][c:d])
                if self._has_skip(layer):
                    unit += sums[layer - 1][a:b]
                values[layer + 1][a:b] = self._activate(unit)

        def push(start: int, stop: int) -> None:
            """Carry the columns of the degrees ``start .. stop - 1`` to all later rows."""
            for layer, weight in enumerate(weights):
                c, d = upto[layer][start], upto[layer][stop]
                rows_from = stop * params if layer == len(self.layers) else upto[layer + 1][stop]
                if d > c and rows_from < weight.shape[0]:
                    sums[layer][rows_from:].addmm_(weight[rows_from:, c:d], values[layer][c:d])

        last, out = weights[-1], sums[-1]
        # Position 0 is degree -1: what depends on the context alone.
        finish(-1, -1)
        push(-1, 0)
        for start in range(0, self.features, width):
            stop = min(start + width, self.features)
            for i in range(start, stop):
                theta = out[i * params : (i + 1) * params]
                c, d = upto[-1][start], upto[-1][i]
                if d > c:
                    theta.addmm_(last[i * params : (i + 1) * params, c:d], values[-1][c:d])
                x[i] = step(i, theta.mT)
                finish(i, start)
            push(start, stop)
        return x.mT, out.unflatten(0, (self.features, params)).permute(2, 0, 1)

    def _ends(self, degrees: Tensor) -> dict[int, int]:
        """For each degree d, how many units have a lower one: where the units of d begin."""
        marks = torch.arange(-1, self.features + 1)
        return dict(zip(marks.tolist(), torch.searchsorted(degrees, marks).tolist(), strict=True))

    def __repr__(self) -> str:
        context = f", context={self.from_context.in_features}" if self.from_context else ""
        residual = ", residual" if any(map(self._has_skip, range(len(self.hidden)))) else ""
        return (
            f"MADE({self.features} -> {self.features} x {self.params}, hidden={self.hidden}, "
            f"{self.activation}{residual}{context})"
        )
