"""Walking a MADE feature by feature, computing each hidden unit once.

With hidden units sorted by degree every masked weight is block-triangular: once the features up to
d are known, the units of degree d can be computed and never change. So an inversion that would take
one full pass a feature costs about the arithmetic of two passes in all. Inside a block of features
only the block's own columns are multiplied; one large product a layer then carries the finished
block to all rows still open.

Where calls cost more than arithmetic (few rows, many features) a block is swept instead: all its
features at once, again and again until nothing changes. The map from one sweep to the next is
strictly triangular, so its fixed point is unique, reached after at most as many sweeps as there are
features, and proved by one more sweep that changes no bit.

Units stand in rows here, ``(units, rows of data)``, so that a range of units is contiguous.
``walk_back`` does the same backwards, for the gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pyroflows._pyro.memo import traced

if TYPE_CHECKING:
    from pyroflows.nets.made import MADE

_LOCAL = 512_000  # multiply-adds that take about as long as the call that does them
_SWEEP = 2_500_000  # multiply-adds that take about as long as the calls of one sweep
_NARROWEST, _WIDEST = 16, 128  # blocks between which sweeps were measured to pay
_SCALAR = 100  # multiply-adds in whose time a family treats one parameter


def walked_blocks(net: MADE, rows: int) -> list[tuple[int, int]]:
    """Ranges of features, as wide as keeps a step's local product near the cost of calling it."""
    per_degree = max(net.hidden) / net.features
    width = int(_LOCAL / max(rows * per_degree**2, 1))
    return _ranges(net.features, min(max(width, 8), 32))


def swept_blocks(net: MADE, rows: int) -> list[tuple[int, int]] | None:
    """Ranges wide enough to be swept, or None where walking is faster."""
    widths = [net.features, *net.hidden, net.features * net.params]
    square = sum(a * b for a, b in zip(widths, widths[1:], strict=False)) / net.features**2
    linear = _SCALAR * net.params
    # The positive root of rows (square w^2 + linear w) = _SWEEP.
    budget = _SWEEP / max(rows, 1)
    width = 2 * budget / (linear + (linear**2 + 4 * square * budget) ** 0.5)
    width = min(int(width), net.features, _WIDEST)
    return _ranges(net.features, width) if width >= _NARROWEST else None


def _ranges(features: int, width: int) -> list[tuple[int, int]]:
    return [(a, min(a + width, features)) for a in range(0, features, width)]


def sizes_of(marks: list[int]) -> list[int]:
    """How many units there are of each degree, from -1 on."""
    return [b - a for a, b in zip(marks, marks[1:], strict=False)]


def check_masks(net: MADE) -> None:
    """See that no unit looks at what comes after it in the order of the walk.

    Raises:
        ValueError: a mask was replaced by one whose units are not sorted by degree.
    """
    masks = in_order(net, [layer.mask for layer in (*net.layers, net.last)])
    outputs = [0, *range(0, net.features * net.params + 1, net.params)]
    for layer, (mask, reads) in enumerate(zip(masks, net.upto, strict=True)):
        last = layer == len(net.layers)
        above = outputs if last else net.upto[layer + 1]
        for degree in range(-1, net.features):
            rows = mask[above[degree + 1] : above[degree + 2]]
            if rows[:, reads[degree + (1 if last else 2)] :].any():
                raise ValueError(
                    f"net: expected units sorted by degree, but in layer {layer} of {net} units of "
                    f"degree {degree} see units of a higher one; build the masks with MADE, or "
                    "pass the network as a plain function, which is inverted by one call a feature"
                )


class Way(NamedTuple):
    """A net's weights, cut up for a walk in these blocks of features.

    Attributes:
        source: the masked weights it was made from.
        blocks: ranges of features.
        weights: the masked weights, features in the order of the walk.
        units: ``units[layer][degree + 1]``, what a degree's units see of their own block: a piece
            of the weight, and the range of the values that it reads; None where there is nothing.
        outputs: the same for the parameters of each feature.
    """

    source: list[Tensor]
    blocks: list[tuple[int, int]]
    weights: list[Tensor]
    units: list[list[tuple[Tensor, int, int] | None]]
    outputs: list[tuple[Tensor, int, int] | None]


def _way(net: MADE, blocks: list[tuple[int, int]]) -> Way:
    """The way through the net; in eval mode kept until a weight changes."""
    source = [layer.masked_weight() for layer in (*net.layers, net.last)]
    kept = net._way
    if kept is not None and kept.blocks == blocks and all(map(operator.is_, kept.source, source)):
        return kept
    weights, upto, params = in_order(net, source), net.upto, net.params
    # The context's own units first, then every degree with the columns of its block so far.
    degrees = [(-1, -1), *((i, start) for start, stop in blocks for i in range(start, stop))]

    def piece(layer: int, a: int, b: int, c: int, d: int) -> tuple[Tensor, int, int] | None:
        return (weights[layer][a:b, c:d], c, d - c) if b > a and d > c else None

    way = Way(
        source,
        blocks,
        weights,
        [
            [piece(n, above[k + 1], above[k + 2], reads[s + 1], reads[k + 2]) for k, s in degrees]
            for n, (reads, above) in enumerate(zip(upto, upto[1:], strict=False))
        ],
        [
            piece(-1, i * params, (i + 1) * params, upto[-1][start + 1], upto[-1][i + 1])
            for i, start in degrees[1:]
        ],
    )
    net._way = None if net.training else way
    return way


class _Walk:
    """The state of a walk: what is known of every unit's sum so far.

    Args:
        net: the network.
        way: its weights, cut up.
        like: ``(rows, features)``.
        context: ``(rows, context)`` or None.
    """

    def __init__(self, net: MADE, way: Way, like: Tensor, context: Tensor | None) -> None:
        self.net, self.way, rows = net, way, like.shape[0]
        biases = [layer.bias for layer in (*net.layers, net.last)]
        if net.descending:
            biases[-1] = flipped(net, biases[-1])
        # A clone also for one row, where .contiguous() would hand out the bias itself.
        whole = torch.contiguous_format
        self.sums = [b[:, None].expand(-1, rows).clone(memory_format=whole) for b in biases]
        if net.from_context is not None:
            self.sums[0].addmm_(net.from_context.weight, context.mT)
        self.x = like.new_empty(net.features, rows)
        # What each layer reads: activations take the sums' place where no skip needs those.
        self.skips = [*map(net.has_skip, range(len(net.layers))), False]
        self.values = [self.x]
        for above, skipped in zip(self.sums[:-1], self.skips[1:], strict=True):
            self.values.append(torch.empty_like(above) if skipped else above)
        counts = [sizes_of(marks) for marks in net.upto[1:]]
        units = [above.split(count) for above, count in zip(self.sums, counts, strict=False)]
        results = [
            own if value is above else value.split(count)
            for own, value, above, count in zip(
                units, self.values[1:], self.sums, counts, strict=False
            )
        ]
        # Whether a rectifier may work in place.
        in_place = [net.activation == "relu" and not skipped for skipped in self.skips[1:]]
        self.hidden = list(
            zip(way.units, self.values, units, results, self.skips, in_place, strict=False)
        )
        self.parameters = self.sums[-1].split(net.params)

    def finish(self, degree: int) -> None:
        """The units of one degree, given all before its block and what its block has so far."""
        below = None
        for pieces, read, above, value, skip, in_place in self.hidden:
            unit, piece = above[degree + 1], pieces[degree + 1]
            if piece is not None:
                weight, first, count = piece
                unit.addmm_(weight, read.narrow(0, first, count))
            if skip:
                unit.add_(below)
            if in_place:
                unit.relu_()
            else:
                value[degree + 1].copy_(self.net.activate(unit))
            below = unit

    def push(self, start: int, stop: int) -> None:
        """Carry the columns of the degrees ``start .. stop - 1`` to all later rows."""
        net, upto = self.net, self.net.upto
        for layer, weight in enumerate(self.way.weights):
            c, d = upto[layer][start + 1], upto[layer][stop + 1]
            last = layer == len(net.layers)
            first = stop * net.params if last else upto[layer + 1][stop + 1]
            if d > c and first < weight.shape[0]:
                self.sums[layer][first:].addmm_(weight[first:, c:d], self.values[layer][c:d])

    def through(self, start: int, stop: int, step: Callable[[int, Tensor], Tensor]) -> None:
        """Walk a block, feature by feature."""
        net, top, rows = self.net, self.values[-1], self.x.unbind()
        for place in range(start, stop):
            theta, piece = self.parameters[place], self.way.outputs[place]
            if piece is not None:
                weight, first, count = piece
                theta.addmm_(weight, top.narrow(0, first, count))
            i = net.features - 1 - place if net.descending else place
            rows[place].copy_(step(i, theta.mT))
            if place + 1 < net.features:
                self.finish(place)

    def swept(
        self, start: int, stop: int, now: Tensor, sweep: Callable[[int, int, Tensor], Tensor]
    ) -> bool:
        """Sweep a block from ``now`` on; whether that ended in a proven fixed point."""
        net = self.net
        spans = [(marks[start + 1], marks[stop + 1]) for marks in net.upto]
        spans.append((start * net.params, stop * net.params))
        local = [
            weight[a:b, c:d]
            for weight, (a, b), (c, d) in zip(self.way.weights, spans[1:], spans, strict=False)
        ]
        sums = [t[a:b] for t, (a, b) in zip(self.sums, spans[1:], strict=True)]
        for _ in range(stop - start + 1):
            read, h, found = now, None, []
            for above, weight, skip in zip(sums[:-1], local, self.skips, strict=False):
                below, h = h, torch.addmm(above, weight, read)
                if skip:
                    h += below
                read = net.activate(h)
                found.append((h, read))
            theta = torch.addmm(sums[-1], local[-1], read)
            before, now = now, sweep(start, stop, theta.unflatten(0, (-1, net.params)).mT)
            if torch.equal(before, now):
                break
        else:
            # Zeros of the mask times infinity are NaN, which equals nothing. In the walk what is
            # not finite reaches only the features that depend on it.
            return False
        self.x[start:stop] = now
        sums[-1].copy_(theta)
        for (h, read), above, value, (a, b) in zip(
            found, sums, self.values[1:], spans[1:], strict=False
        ):
            above.copy_(h)
            value[a:b] = read
        return True


@torch.no_grad()
def solve(
    net: MADE,
    step: Callable[[int, Tensor], Tensor],
    like: Tensor,
    context: Tensor | None,
    sweep: Callable[[int, int, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The fixed point ``x_i = step(i, params_i(x_<i))``, features in order. Exact.

    Not differentiable; never uses dropout.

    Args:
        net: the network.
        step: gives feature i, ``(rows,)``, from its parameters ``(rows, params)``.
        like: ``(rows, features)``; its number of rows, dtype and device are used, and sweeps start
            from it.
        context: ``(rows, context)`` or None.
        sweep: the same for many features at once, those that are number ``a .. b - 1`` in the order
            in which the net takes them: ``sweep(a, b, parameters)`` gives ``(b - a, rows)`` from
            ``(b - a, rows, params)``. Without it there are no sweeps.

    Returns:
        The fixed point ``(rows, features)`` and its parameters ``(rows, features, params)``.
    """
    swept = None if sweep is None or traced() else swept_blocks(net, like.shape[0])
    way = _way(net, swept or walked_blocks(net, like.shape[0]))
    walk = _Walk(net, way, like, context)
    guess = like.flip(1).mT if net.descending else like.mT
    walk.finish(-1)  # what depends on the context alone
    walk.push(-1, 0)
    for start, stop in way.blocks:
        if not (swept and walk.swept(start, stop, guess[start:stop], sweep)):
            walk.through(start, stop, step)
        if stop < net.features:
            walk.push(start, stop)
    x, theta = walk.x, walk.sums[-1].unflatten(0, (net.features, net.params))
    if net.descending:
        x, theta = x.flip(0), theta.flip(0)
    return x.mT, theta.permute(2, 0, 1)


def in_order(net: MADE, weights: list[Tensor]) -> list[Tensor]:
    """The weights with features in the order of the walk."""
    if not net.descending:
        return weights
    return [weights[0].flip(1), *weights[1:-1], flipped(net, weights[-1])]


def flipped(net: MADE, outputs: Tensor) -> Tensor:
    """Rows, or units, of the parameters with the features in reverse order."""
    return outputs.unflatten(0, (net.features, net.params)).flip(0).flatten(0, 1)
