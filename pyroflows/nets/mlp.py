"""A plain multilayer perceptron with an optional context, for coupling layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows._checks import check_whole, checked_ints


class Dropping(nn.Module):
    """A network with dropout (Srivastava et al. 2014, JMLR 15) by a share that is no part of it.

    Whoever trains sets it, for the time it does: no state and no argument has it.

    Attributes:
        dropout: share of the hidden numbers to drop while training.
    """

    dropout: float = 0.0

    def drop(self, h: Tensor) -> Tensor:
        """Some of a hidden layer's numbers set to zero, while training and if that is asked for."""
        return F.dropout(h, self.dropout) if self.dropout and self.training else h


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": F.tanh,
}


def activation_named(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function of that name.

    Raises:
        ValueError: the name is not in ``ACTIVATIONS``.
    """
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


class ResidualNet(Dropping):
    """Hidden layers, those of equal width joined by parameter-free skips; the context enters first.

    Attributes:
        hidden: widths, one per hidden layer.
        residual: whether there are skips.
        activation: a name from ``ACTIVATIONS``.
        activate: that function.
        layers: the hidden layers.
        from_context: what is added to the first one's output; None without a context.
    """

    hidden: tuple[int, ...]
    residual: bool
    activation: str
    activate: Callable[[Tensor], Tensor]
    layers: nn.ModuleList
    from_context: nn.Linear | None

    def has_skip(self, layer: int) -> bool:
        """Whether hidden layer number ``layer`` adds its input to its output."""
        return self.residual and layer > 0 and self.hidden[layer] == self.hidden[layer - 1]

    def through_hidden(self, x: Tensor, context: Tensor | None) -> Tensor:
        """What the last hidden layer hands on, ``(*batch, width)``."""
        first, *others = self.layers
        h = first(x)
        if self.from_context is not None:
            h = h + self.from_context(context)
        for index, layer in enumerate(others, start=1):
            skip = self.has_skip(index)
            new = layer(self._activated(h, reuse=not skip))
            h = new.add_(h) if skip else new
        return self._activated(h, reuse=True)

    def _activated(self, h: Tensor, reuse: bool) -> Tensor:
        """The activation and, while training, dropout; ``reuse`` if ``h`` is needed no more."""
        return self.drop(h.relu_() if reuse and self.activation == "relu" else self.activate(h))


class MLP(ResidualNet):
    """``(*batch, inputs)`` and a context ``(*batch, context)`` to ``(*batch, outputs)``.

    Hidden layers of equal width are joined by parameter-free skips. The last layer starts at
    zero, so a flow starts as the identity.

    Args:
        inputs: number of inputs.
        outputs: number of outputs.
        hidden: widths, one per hidden layer.
        context: number of context features; they enter the first hidden layer.
        activation: a name from ``ACTIVATIONS``.
        residual: skips between hidden layers of equal width.

    Raises:
        ValueError: a size that is not a positive integer, or an unknown activation.

    Example:
        >>> import torch
        >>> MLP(3, 4, hidden=(16, 16))(torch.ones(7, 3)).shape
        torch.Size([7, 4])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        hidden: Sequence[int] = (128, 128),
        context: int = 0,
        activation: str = "relu",
        residual: bool = True,
    ) -> None:
        super().__init__()
        check_whole(1, inputs=inputs, outputs=outputs)
        check_whole(0, context=context)
        self.hidden = checked_ints("hidden", hidden)
        self.activation = activation
        self.activate = activation_named(activation)
        self.residual = residual
        widths = (inputs, *self.hidden)
        self.layers = nn.ModuleList(
            nn.Linear(i, o) for i, o in zip(widths, self.hidden, strict=False)
        )
        self.from_context = nn.Linear(context, self.hidden[0], bias=False) if context else None
        self.last = nn.Linear(self.hidden[-1], outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The outputs; ``context`` broadcasts against the batch of ``x``."""
        return self.last(self.through_hidden(x, context))

    def __repr__(self) -> str:
        widths = (self.layers[0].in_features, *self.hidden, self.last.out_features)
        context = f", context={self.from_context.in_features}" if self.from_context else ""
        return f"MLP({' -> '.join(map(str, widths))}, {self.activation}{context})"
