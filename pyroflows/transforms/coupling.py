"""Coupling: some features stay and decide what happens to the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.families import Family

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # a family's forward or inverse


class CouplingLayer(FlowTransform):
    """What couplings of vectors and of images share; each says how it splits its events.

    Both directions cost one network call.

    Args:
        net: a module or any callable, of what is kept and of the context.
        family: what is done to each moved number.
    """

    fast = "both"

    def __init__(self, net: Callable[[Tensor, Tensor | None], Tensor], family: Family) -> None:
        super().__init__()
        self.net = net
        self.family = family

    @property
    def volume_preserving(self) -> bool:
        """Whether the family is."""
        return self.family.volume_preserving

    def apply_family(
        self, step: Step, value: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One of the family's directions on what is moved, and the log-determinant."""
        raise NotImplementedError(f"{type(self).__name__}.apply_family")

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One network call."""
        return self.apply_family(self.family.forward, x, context)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One network call: what is kept is the same on both sides."""
        return self.apply_family(self.family.inverse, y, context)


class Coupling(CouplingLayer):
    r"""``y = x`` where the mask holds; elsewhere :math:`y_i = g(x_i; \theta_i(x_{mask}, c))`.

    Both directions cost one network call. Dinh et al. 2015, arXiv:1410.8516, section 3.2.

    Args:
        net: ``net(kept, context)`` gives ``(*batch, moved * family.params)`` from
            ``(*batch, kept)``; a module or any callable.
        family: what is done to each moved feature.
        mask: ``(features,)``, True where a feature is kept.

    Raises:
        ValueError: the mask is not one-dimensional, or keeps all features or none.

    Example:
        >>> import torch, pyroflows as pf
        >>> mask = torch.tensor([True, False])
        >>> layer = pf.transforms.Coupling(lambda kept, c: kept, pf.transforms.Additive(), mask)
        >>> layer(torch.tensor([1.0, 2.0]))
        tensor([1., 3.])
    """

    kept: Tensor
    moved: Tensor
    order: Tensor

    def __init__(
        self, net: Callable[[Tensor, Tensor | None], Tensor], family: Family, mask: Tensor
    ) -> None:
        super().__init__(net, family)
        mask = torch.as_tensor(mask, dtype=torch.bool)
        if mask.dim() != 1 or mask.all() or not mask.any():
            raise ValueError(
                f"mask: expected one dimension with features kept and features moved, "
                f"got shape {tuple(mask.shape)} with {int(mask.sum())} kept; "
                "a coupling needs at least two features"
            )
        kept, moved = mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]
        self.register_buffer("kept", kept)
        self.register_buffer("moved", moved)
        self.register_buffer("order", torch.cat([kept, moved]).argsort())

    def dependencies(self) -> Tensor:
        """Each feature on itself, and those moved on those kept."""
        features = len(self.order)
        found = torch.eye(features, dtype=torch.bool, device=self.kept.device)
        found[self.moved[:, None], self.kept] = True
        return found

    def apply_family(
        self, step: Step, value: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The family's step on the moved features, by what the net makes of those kept."""
        kept = value.index_select(-1, self.kept)
        theta = self.net(kept, context).to(value.dtype)  # under autocast the net rounds
        theta = theta.unflatten(-1, (len(self.moved), self.family.params))
        moved, log_derivative = step(value.index_select(-1, self.moved), theta)
        kept = kept.expand(*moved.shape[:-1], len(self.kept))  # where the context has more rows
        joined = torch.cat([kept, moved], dim=-1).index_select(-1, self.order)
        return joined, log_derivative.sum(dim=-1)

    def extra_repr(self) -> str:
        """Family, net and how many features are kept."""
        return f"{self.family}, {self.net}, kept={len(self.kept)}"
