"""Operations on many tensors at once, which torch's own optimisers use under private names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def move_towards(tensors: Sequence[Tensor], targets: Sequence[Tensor], share: float) -> None:
    """Each tensor, in place, by this share of the way to its target."""
    torch._foreach_lerp_(list(tensors), list(targets), share)
