"""Feature-wise location and scale that the context sets: a flow of it alone is a Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyroflows._checks import check_bound, check_whole
from pyroflows.transforms.base import FlowTransform


class ContextAffine(FlowTransform):
    r"""``y = loc(c) + exp(log_scale(c)) * x``, both read linearly from the context.

    On a standard normal base it is the diagonal Gaussian of an amortised posterior (Kingma &
    Welling 2014, arXiv:1312.6114, section 3). It starts as the identity, whatever the context. The
    log-scale is :math:`b \tanh(s / b)`, bounded softly.

    Both directions cost one matrix product with the context.

    Args:
        features: number of features.
        context: number of context features.
        bound: the largest absolute log-scale ``b``; the default 7 lets scales differ a
            thousandfold either way.

    Raises:
        ValueError: ``bound`` is not positive and finite, or a width no positive integer.

    Example:
        >>> import torch
        >>> gaussian = ContextAffine(2, context=3)
        >>> gaussian.condition(torch.zeros(5, 3))(torch.ones(2)).shape
        torch.Size([5, 2])
    """

    def __init__(self, features: int, context: int, *, bound: float = 7.0) -> None:
        super().__init__()
        check_whole(1, features=features, context=context)
        check_bound(bound)
        self.bound = bound
        self.linear = nn.Linear(context, 2 * features)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def _loc_and_log_scale(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if context is None:
            raise TypeError(f"context: expected (*batch, {self.linear.in_features}), got None")
        both = self.linear(context).to(x.dtype)  # under autocast the product rounds
        loc, raw = both.chunk(2, dim=-1)
        return loc, self.bound * torch.tanh(raw / self.bound)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``loc(c) + exp(log_scale(c)) * x``."""
        loc, log_scale = self._loc_and_log_scale(x, context)
        y = torch.addcmul(loc, x, log_scale.exp())
        return y, log_scale.sum(dim=-1).expand(y.shape[:-1])

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(y - loc(c)) exp(-log_scale(c))``."""
        loc, log_scale = self._loc_and_log_scale(y, context)
        x = (y - loc) * (-log_scale).exp()
        return x, -log_scale.sum(dim=-1).expand(x.shape[:-1])

    def extra_repr(self) -> str:
        """Features and context."""
        return f"{self.linear.out_features // 2}, context={self.linear.in_features}"
