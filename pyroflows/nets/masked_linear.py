"""A linear layer with a mask, which skips the blocks that the mask leaves empty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows._pyro.memo import Kept, traced

# Below this many weights one dense product is faster than several that skip zeros.
_DENSE = 1 << 16
# Up to this many weights their product with the mask takes no longer (2 to 4 microseconds) than to
# see that they are as they were.
_SMALL = 1 << 14
Span = tuple[int, int, int]  # outputs a .. b - 1 see inputs before c only


class _SpannedLinear(torch.autograd.Function):
    """``x (W * mask)^T + b``, span by span, without the products that end in zero."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        layer: MaskedLinear,
    ) -> Tensor:
        masked = layer.masked_weight()
        ctx.save_for_backward(x, weight, masked)
        ctx.layer = layer
        out = x.new_empty(len(x), len(weight))
        for a, b, c in layer.spans:
            torch.addmm(bias[a:b], x[:, :c], masked[a:b, :c].mT, out=out[:, a:b])
        return out

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (x, weight, masked), mask = ctx.saved_tensors, ctx.layer.mask
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if torch.is_grad_enabled():  # a second derivative is asked for: in terms of autograd
            grad_x = grad @ (weight * mask) if of_x else None
            grad_weight = (grad.mT @ x) * mask if of_weight else None
        else:
            if of_x:
                grad_x = torch.zeros_like(x)
                for a, b, c in ctx.layer.spans:
                    grad_x[:, :c].addmm_(grad[:, a:b], masked[a:b, :c])
            if of_weight:
                grad_weight = weight_gradient(ctx.layer, grad, x)
        return grad_x, grad_weight, grad.sum(dim=0) if of_bias else None, None


def weight_gradient(layer: MaskedLinear, grad: Tensor, x: Tensor) -> Tensor:
    """``grad^T x`` where the mask lets something pass, without the products that end in zero.

    Args:
        layer: whose weight it is.
        grad: ``(rows, outputs)``, the gradient of what the layer gave.
        x: ``(rows, inputs)``, what it read.
    """
    if not layer.spans:
        return (grad.mT @ x).mul_(layer.mask)
    found = torch.empty_like(layer.weight)
    for a, b, c in layer.spans:
        torch.mm(grad[:, a:b].mT, x[:, :c], out=found[a:b, :c])
        found[a:b, :c].mul_(layer.mask[a:b, :c])
        found[a:b, c:] = 0
    return found


class MaskedLinear(nn.Linear):
    """``x (W * mask)^T + b``: output o sees input i where ``mask[o, i]``.

    With a mask whose rows see ever more inputs, as MADE's with sorted units, large layers skip the
    blocks of zeros: up to half of all multiplications, in both directions. A small one costs a
    dense product, and all cost a product of weight and mask, in eval mode once.

    Args:
        mask: ``(outputs, inputs)``, boolean.

    Example:
        >>> import torch
        >>> layer = MaskedLinear(torch.tensor([[True, False], [True, True]]))
        >>> x = torch.tensor([[1.0, 2.0], [1.0, 5.0]], requires_grad=True)
        >>> layer(x)[:, 0].sum().backward()
        >>> x.grad[:, 1]                                         # output 0 does not see input 1
        tensor([0., 0.])
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        # In the weight's dtype: a boolean one would be converted at every product.
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)
        self.spans = _spans(mask) if mask.numel() >= _DENSE else []
        self._is_small = mask.numel() <= _SMALL
        self._kept: Kept[Tensor] = Kept()  # see masked_weight
        # Fan-in of what the mask leaves, or the first outputs of a wide layer start too small.
        bound = mask.sum(dim=1, keepdim=True).clamp(min=1).rsqrt()
        with torch.no_grad():
            self.weight.uniform_(-1, 1).mul_(bound)
            self.bias.uniform_(-1, 1).mul_(bound[:, 0])

    def masked_weight(self) -> Tensor:
        """The weight with zeros where nothing may pass.

        In eval mode a large one is made once and kept until the weight was changed, replaced or
        moved, or an optimiser stepped; not where a gradient has to pass. A write to ``weight.data``
        goes unseen until ``eval()`` is called again (see ``pyroflows._pyro.memo``): write under
        ``torch.no_grad()`` instead.
        """
        passes = torch.is_grad_enabled() and self.weight.requires_grad
        if self.training or self._is_small or passes or traced():
            return self.weight * self.mask
        return self._kept.get((self.weight, self.mask), lambda: self.weight * self.mask)

    def train(self, mode: bool = True) -> MaskedLinear:
        """As in torch; what was kept is forgotten."""
        self._kept.clear()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """``(*batch, inputs)`` to ``(*batch, outputs)``."""
        if not self.spans or traced():
            return F.linear(x, self.masked_weight(), self.bias)
        rows = x.reshape(-1, x.shape[-1])
        out = _SpannedLinear.apply(rows, self.weight, self.bias, self)
        return out.reshape(*x.shape[:-1], self.out_features)


def _spans(mask: Tensor) -> list[Span]:
    """Up to eight ranges of outputs, each with the inputs beyond which none of its rows looks."""
    outputs, inputs = mask.shape
    # How far each row looks: one past its last visible input.
    reach = (mask * torch.arange(1, inputs + 1)).amax(dim=1)
    parts = min(8, max(2, outputs // 128))
    marks = [outputs * k // parts for k in range(parts + 1)]
    spans = [(a, b, int(reach[a:b].max())) for a, b in zip(marks, marks[1:], strict=False)]
    saved = 1 - sum((b - a) * c for a, b, c in spans) / mask.numel()
    return spans if saved > 0.1 else []
