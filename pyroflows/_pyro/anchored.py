"""Fresh tensors of a batched run, batched themselves, so that a model may write draws into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MAKERS = frozenset(
    (
        *(torch.zeros, torch.ones, torch.empty, torch.full, torch.eye, torch.tensor, torch.clone),
        *(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like),
        *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.clone),
    )
)


class Anchored(TorchFunctionMode):
    """Under ``torch.func.vmap``, makes every new floating tensor one of the batch.

    ``x = torch.zeros(3); x[0] = z``, with z a draw, fails there otherwise: x is one for all draws.
    Pyro's own ``OrderedLogistic`` does so. Costs a copy of each such tensor for each draw.

    ``x.data[mask] = 1``, with a mask made of draws, fails there too, and is made a fill: Pyro's
    ``ProjectedNormalReparam`` does so.

    Args:
        like: a tensor of the batch.
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.zero = like.detach().isnan().sum() * 0

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """The function, its result moved into the batch where it is a new tensor."""
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()  # shares its numbers too
        if func is Tensor.__setitem__ and _is_fill(*args):
            tensor, mask, value = args
            rows = mask.reshape((*mask.shape, *[1] * (tensor.dim() - mask.dim())))
            return tensor.masked_fill_(rows, value)
        made = func(*args, **(kwargs or {}))
        if func in _MAKERS and made.is_floating_point():
            return made + self.zero.to(made.dtype)
        return made


def _is_fill(_tensor: Tensor, at: Any, value: Any) -> bool:
    """Whether one number is written where a mask is true."""
    is_mask = isinstance(at, Tensor) and at.dtype == torch.bool
    return is_mask and not (isinstance(value, Tensor) and value.dim())
