"""The plan of a network whose units are sorted by degree: all that solving through it needs.

``MADE.plan`` makes one, ``nets.made_inverse`` solves by it, and ``nets.made_gradient`` goes back.
Features are numbered in the order in which the network takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from pyroflows.nets.masked_linear import MaskedLinear

Piece = tuple[Tensor, int, int]  # part of a weight, and the range (first, count) it multiplies


@dataclass(frozen=True)
class PlannedLayer:
    """One layer, with inputs and outputs sorted by degree.

    Attributes:
        linear: the layer itself, features in their own order.
        weight: its masked weight ``(outputs, inputs)``.
        reads: ``reads[d + 1]`` of its inputs have a degree below d.
        units: ``units[d + 1]`` of its outputs have a degree below d.
        skip: whether it adds the sums of the layer before to its own.
        is_last: whether it gives the parameters: those of feature d see lower degrees only, while a
            hidden unit of degree d also sees its own.
    """

    linear: MaskedLinear
    weight: Tensor
    reads: list[int]
    units: list[int]
    skip: bool = False
    is_last: bool = False


@dataclass(frozen=True)
class Cut:
    """The weights of a plan, cut up for solving in blocks of features.

    Attributes:
        blocks: ranges of features.
        hidden: ``hidden[layer][d + 1]``, what the units of degree d see of their own block; None
            where that is nothing.
        parameters: the same for the parameters of each feature.
    """

    blocks: list[tuple[int, int]]
    hidden: list[list[Piece | None]]
    parameters: list[Piece | None]


@dataclass(frozen=True)
class Plan:
    """What solving through a network takes, and no network.

    Attributes:
        features: number of features.
        params: numbers per feature.
        descending: whether the network takes the last feature first.
        activation: name of what is between the layers.
        activate: the function itself.
        layers: all layers; the last gives the parameters.
        from_context: adds the context to the first layer's sums; None without one.
    """

    features: int
    params: int
    descending: bool
    activation: str
    activate: Callable[[Tensor], Tensor]
    layers: Sequence[PlannedLayer]
    from_context: nn.Linear | None
    _last_cut: list[Cut] = field(default_factory=list, repr=False, compare=False)

    def cut(self, blocks: list[tuple[int, int]]) -> Cut:
        """The weights cut up for these blocks; the last cut is kept."""
        if not self._last_cut or self._last_cut[0].blocks != blocks:
            self._last_cut[:] = [_cut(self, blocks)]
        return self._last_cut[0]

    def in_order(self, x: Tensor) -> Tensor:
        """``(features, ...)`` from their own order to the network's, and back."""
        return x.flip(0) if self.descending else x

    def parameters_in_order(self, outputs: Tensor) -> Tensor:
        """The same for the outputs of the last layer, ``(features * params, ...)``."""
        return flipped(outputs, self.params) if self.descending else outputs

    def context(self, given: Tensor | None) -> Tensor:
        """The context, for a network that needs one.

        Raises:
            TypeError: there is none.
        """
        if given is None:
            raise TypeError("context: this network needs one, got None")
        return given

    def check_masks(self, net: str) -> None:
        """See that no unit looks at what comes after it in the order of the network.

        Args:
            net: what the network is called in the error.

        Raises:
            ValueError: a mask was replaced by one whose units are not sorted by degree.
        """
        masks = in_order([layer.linear.mask for layer in self.layers], self.params, self.descending)
        for index, (layer, mask) in enumerate(zip(self.layers, masks, strict=True)):
            for degree in range(-1, self.features):
                rows = mask[layer.units[degree + 1] : layer.units[degree + 2]]
                if rows[:, layer.reads[degree + (1 if layer.is_last else 2)] :].any():
                    raise ValueError(
                        f"net: expected units sorted by degree, but in layer {index} of {net} "
                        f"units of degree {degree} see units of a higher one; build the masks with "
                        "MADE, or pass the network as a plain function, which is inverted by one "
                        "call a feature"
                    )


def in_order(weights: list[Tensor], params: int, descending: bool) -> list[Tensor]:
    """Weights, or masks, of all layers with the features in the order of the network."""
    if not descending:
        return weights
    return [weights[0].flip(1), *weights[1:-1], flipped(weights[-1], params)]


def flipped(outputs: Tensor, params: int) -> Tensor:
    """Outputs of the last layer with the features in reverse order."""
    return outputs.unflatten(0, (-1, params)).flip(0).flatten(0, 1)


def by_degree(units: Tensor, marks: list[int]) -> tuple[Tensor, ...]:
    """Units in rows, cut where the degree changes; from degree -1 on."""
    return units.split([b - a for a, b in zip(marks, marks[1:], strict=False)])


def _cut(plan: Plan, blocks: list[tuple[int, int]]) -> Cut:
    # The context's own units first, then every degree with the columns of its block so far.
    degrees = [(-1, -1), *((i, start) for start, stop in blocks for i in range(start, stop))]

    def piece(layer: PlannedLayer, degree: int, start: int, end: int) -> Piece | None:
        a, b = layer.units[degree + 1], layer.units[degree + 2]
        c, d = layer.reads[start + 1], layer.reads[end + 1]
        return (layer.weight[a:b, c:d], c, d - c) if b > a and d > c else None

    *hidden, last = plan.layers
    return Cut(
        blocks,
        [
            [piece(layer, degree, start, degree + 1) for degree, start in degrees]
            for layer in hidden
        ],
        [piece(last, degree, start, degree) for degree, start in degrees[1:]],
    )
