"""Fixed permutations of the features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.transforms.base import FlowTransform


class Permute(FlowTransform):
    """``y_i = x_permutation[i]``: volume-preserving, free both ways, no parameters.

    The permutation is a buffer: it moves with ``.to()`` and is part of the ``state_dict``. Random
    ones come from a seed of their own, so equal arguments give equal flows and the global
    generator is left alone.

    Both directions cost one indexing and no arithmetic.

    Args:
        permutation: a permutation of ``0 .. features - 1``.

    Raises:
        ValueError: it is not one.

    Example:
        >>> import torch
        >>> Permute([2, 0, 1])(torch.tensor([10.0, 20.0, 30.0]))
        tensor([30., 10., 20.])
    """

    volume_preserving = True
    permutation: Tensor
    back: Tensor

    def __init__(self, permutation: Tensor | Sequence[int]) -> None:
        super().__init__()
        permutation = torch.as_tensor(permutation, dtype=torch.long)
        wanted = torch.arange(permutation.numel(), device=permutation.device)
        if permutation.dim() != 1 or not torch.equal(permutation.sort().values, wanted):
            raise ValueError(
                f"permutation: expected each of 0 .. {permutation.numel() - 1} once, "
                f"got {permutation.tolist()}"
            )
        self.register_buffer("permutation", permutation)
        self.register_buffer("back", permutation.argsort())

    @classmethod
    def random(cls, features: int, seed: int = 0) -> Permute:
        """A random order, the same for the same ``features`` and ``seed``."""
        return cls(
            torch.randperm(features, generator=torch.Generator().manual_seed(seed), device="cpu")
        )

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Reorder; the log-determinant is zero."""
        return x.index_select(-1, self.permutation), x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Restore the order; the log-determinant is zero."""
        return y.index_select(-1, self.back), y.new_zeros(y.shape[:-1])

    def extra_repr(self) -> str:
        """The permutation, shortened."""
        head = ", ".join(map(str, self.permutation[:8].tolist()))
        return f"[{head}{', ...' if self.permutation.numel() > 8 else ''}]"
