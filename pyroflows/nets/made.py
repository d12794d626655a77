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

from pyroflows._checks import check_whole, checked_ints
from pyroflows._pyro.memo import Kept, traced
from pyroflows.nets import made_gradient, made_inverse
from pyroflows.nets.masked_linear import MaskedLinear
from pyroflows.nets.mlp import ResidualNet, activation_named
from pyroflows.nets.plan import Plan, PlannedLayer, in_order


class MADE(ResidualNet):
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
        descending: take the features in reverse order: feature i's parameters see ``x_>i``.

    Raises:
        ValueError: a size that is not a positive integer, or an unknown activation.

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
        descending: bool = False,
    ) -> None:
        super().__init__()
        check_whole(1, features=features, params=params)
        check_whole(0, context=context)
        self.features = features
        self.params = params
        self.hidden = checked_ints("hidden", hidden)
        self.activation = activation
        self.activate = activation_named(activation)
        self.residual = residual
        self.descending = descending

        # A unit of degree d sees x_0 .. x_d, one of degree -1 the context alone.
        least = -1 if context or features == 1 else 0
        count = max(features - 1 - least, 1)
        inputs = torch.arange(features)  # a feature's degree: its place in the order
        degrees = [least + torch.arange(w) * count // w for w in self.hidden]
        sees = [inputs.flip(0) if descending else inputs, *degrees]
        self.layers = nn.ModuleList(
            MaskedLinear(above[:, None] >= below)
            for below, above in zip(sees, degrees, strict=False)
        )
        outputs = sees[0].repeat_interleave(params)
        self.last = MaskedLinear(outputs[:, None] > degrees[-1])
        # upto[l][d + 1]: how many of the units that layer l reads have a degree below d.
        marks = torch.arange(-1, features + 1)
        self.upto = [torch.searchsorted(d, marks).tolist() for d in (inputs, *degrees)]
        self.from_context = nn.Linear(context, self.hidden[0], bias=False) if context else None
        self._kept: Kept[Plan] = Kept()  # see plan
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def untrained(self, wider: float = 1.0) -> MADE:
        """A new net of the same build, each hidden layer wider by a factor."""
        return MADE(
            self.features,
            self.params,
            hidden=[math.ceil(wider * width) for width in self.hidden],
            context=0 if self.from_context is None else self.from_context.in_features,
            activation=self.activation,
            residual=self.residual,
            descending=self.descending,
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """All features' parameters in one pass; ``context`` broadcasts against the batch."""
        out = self.last(self.through_hidden(x, context))
        return out.unflatten(-1, (self.features, self.params))

    def plan(self) -> Plan:
        """What solving through the network takes; in eval mode kept until a weight changes.

        A write to a weight's ``.data`` goes unseen until ``eval()`` is called again.
        """
        if self.training or traced():
            return self._planned()
        linear: list[MaskedLinear] = [*self.layers, self.last]
        return self._kept.get([t for m in linear for t in (m.weight, m.mask)], self._planned)

    def train(self, mode: bool = True) -> MADE:
        """As in torch; what was kept is forgotten."""
        self._kept.clear()
        return super().train(mode)

    def _planned(self) -> Plan:
        linear: list[MaskedLinear] = [*self.layers, self.last]
        weights = [layer.masked_weight() for layer in linear]
        # The parameters of feature d stand where a unit of degree d would.
        outputs = [0, *range(0, self.features * self.params + 1, self.params)]
        ordered = in_order(weights, self.params, self.descending)
        layers = [
            PlannedLayer(layer, weight, reads, units, self.has_skip(index))
            for index, (layer, weight, reads, units) in enumerate(
                zip(linear, ordered, self.upto, self.upto[1:], strict=False)
            )
        ]
        layers.append(PlannedLayer(self.last, ordered[-1], self.upto[-1], outputs, is_last=True))
        return Plan(
            self.features,
            self.params,
            self.descending,
            self.activation,
            self.activate,
            layers,
            self.from_context,
        )

    def check_masks(self) -> None:
        """Raise a ``ValueError`` where replaced masks make solving through the net impossible."""
        self.plan().check_masks(repr(self))

    def weights(self) -> list[Tensor]:
        """All weights and biases, in the order of ``solve_back``'s gradients."""
        found = [t for layer in (*self.layers, self.last) for t in (layer.weight, layer.bias)]
        return found if self.from_context is None else [*found, self.from_context.weight]

    def solve(
        self,
        step: Callable[[int, Tensor], Tensor],
        like: Tensor,
        context: Tensor | None = None,
        block_step: Callable[[int, int, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The fixed point ``x_i = step(i, params_i(x_<i))``; see ``nets.made_inverse``."""
        return made_inverse.solve(self.plan(), step, like, context, block_step)

    def solve_back(
        self,
        step: Callable[[int, Tensor, Tensor], object],
        x: Tensor,
        context: Tensor | None = None,
        block_step: Callable[[int, int, Tensor], Tensor] | None = None,
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Gradients back through the fixed point; see ``nets.made_gradient``."""
        return made_gradient.solve_back(self.plan(), step, x, context, block_step)

    def __repr__(self) -> str:
        context = f", context={self.from_context.in_features}" if self.from_context else ""
        order = ", descending" if self.descending else ""
        residual = ", residual" if any(map(self.has_skip, range(len(self.hidden)))) else ""
        return (
            f"MADE({self.features} -> {self.features} x {self.params}, hidden={self.hidden}, "
            f"{self.activation}{residual}{order}{context})"
        )
