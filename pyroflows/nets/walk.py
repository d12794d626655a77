"""Walking a MADE feature by feature, computing each hidden unit once.

With hidden units sorted by degree every masked weight is block-triangular: once the features up to
d are known, the units of degree d can be computed and never change. So an inversion that would take
one full pass a feature costs about the arithmetic of two passes in all. Inside a block of features
only the block's own columns are multiplied; one large product a layer then carries the finished
block to all rows still open.

Units stand in rows here, ``(units, rows of data)``, so that a range of units is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyroflows.nets.made import MADE

_LOCAL = 512_000  # multiply-adds that take about as long as the call that does them


def _blocks(net: MADE, rows: int) -> list[tuple[int, int]]:
    """Ranges of features, as wide as keeps a step's local product near the cost of calling it."""
    per_degree = max(net.hidden) / net.features
    width = int(_LOCAL / max(rows * per_degree**2, 1))
    width = min(max(width, 8), 32)
    return [(a, min(a + width, net.features)) for a in range(0, net.features, width)]


@torch.no_grad()
def solve(
    net: MADE, step: Callable[[int, Tensor], Tensor], like: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The fixed point ``x_i = step(i, params_i(x_<i))``, features in order. Exact.

    Not differentiable; never uses dropout.

    Args:
        net: the network.
        step: gives feature i, ``(rows,)``, from its parameters ``(rows, params)``.
        like: ``(rows, features)``; its number of rows, dtype and device are used.
        context: ``(rows, context)`` or None.

    Returns:
        The fixed point ``(rows, features)`` and its parameters ``(rows, features, params)``.
    """
    rows, params, upto = like.shape[0], net.params, net.upto
    weights, biases = _in_order(net)
    # A clone also for one row, where .contiguous() would hand out the bias itself.
    whole = torch.contiguous_format
    sums = [b[:, None].expand(-1, rows).clone(memory_format=whole) for b in biases]
    if net.from_context is not None:
        sums[0] += net.from_context.weight @ context.mT
    x = like.new_empty(net.features, rows)
    # What each layer reads. Where no skip needs the sums any more, activations take their place.
    skips = [*map(net.has_skip, range(len(net.layers))), False]
    values = [x]
    for layer, above in enumerate(sums[:-1]):
        values.append(torch.empty_like(above) if skips[layer + 1] else above)

    def finish(degree: int, start: int) -> None:
        """The units of one degree, given the columns from degree ``start`` on."""
        for layer, weight in enumerate(weights[:-1]):
            ends, reads = upto[layer + 1], upto[layer]
            a, b = ends[degree + 1], ends[degree + 2]
            if a == b:
                continue
            c, d = reads[start + 1], reads[degree + 2]
            unit = sums[layer][a:b]
            if d > c:
                unit.addmm_(weight[a:b, c:d], values[layer][c:d])
            if skips[layer]:
                unit += sums[layer - 1][a:b]
            if net.activation == "relu":
                torch.clamp_min(unit, 0, out=values[layer + 1][a:b])
            else:
                values[layer + 1][a:b] = net.activate(unit)

    def push(start: int, stop: int) -> None:
        """Carry the columns of the degrees ``start .. stop - 1`` to all later rows."""
        for layer, weight in enumerate(weights):
            c, d = upto[layer][start + 1], upto[layer][stop + 1]
            last = layer == len(net.layers)
            first = stop * params if last else upto[layer + 1][stop + 1]
            if d > c and first < weight.shape[0]:
                sums[layer][first:].addmm_(weight[first:, c:d], values[layer][c:d])

    finish(-1, -1)  # what depends on the context alone
    push(-1, 0)
    out, weight, hidden = sums[-1], weights[-1], values[-1]
    for start, stop in _blocks(net, rows):
        c = upto[-1][start + 1]
        for i in range(start, stop):
            mine = out[i * params : (i + 1) * params]
            d = upto[-1][i + 1]
            if d > c:
                mine.addmm_(weight[i * params : (i + 1) * params, c:d], hidden[c:d])
            x[i] = step(net.features - 1 - i if net.descending else i, mine.mT)
            if i + 1 < net.features:
                finish(i, start)
        if stop < net.features:
            push(start, stop)
    theta = out.unflatten(0, (net.features, params))
    if net.descending:
        x, theta = x.flip(0), theta.flip(0)
    return x.mT, theta.permute(2, 0, 1)


@torch.no_grad()
def transposed_solve(
    net: MADE, x: Tensor, context: Tensor | None, grad: Tensor, slope: Tensor, pull: Tensor
) -> Tensor:
    """``v`` with ``J^T v = grad`` for ``J = dy/dx`` of ``y_i = g(x_i; params_i(x_<i))``.

    The same walk backwards: once ``v`` is known for all features after d, the adjoints of the units
    of degree d are complete.

    Args:
        net: the network.
        x: ``(rows, features)``, where J is taken.
        context: ``(rows, context)`` or None.
        grad: ``(rows, features)``.
        slope: ``dy_i/dx_i`` at fixed parameters, ``(rows, features)``.
        pull: ``dy_i/dparams_i``, ``(rows, features, params)``.

    Returns:
        ``v``, ``(rows, features)``.
    """
    params, upto = net.params, net.upto
    weights, _ = _in_order(net)
    slopes = _activation_slopes(net, x, context)
    grad, slope, pull = grad.mT, slope.mT, pull.permute(1, 2, 0)
    if net.descending:
        grad, slope, pull = grad.flip(0), slope.flip(0), pull.flip(0)
    grad, slope, pull = grad.contiguous(), slope.contiguous(), pull.contiguous()
    v = torch.empty_like(grad)
    # What each layer sends back: adjoints of its sums, (units above, rows).
    sent = [s.new_empty(s.shape) for s in slopes] + [v.new_empty(weights[-1].shape[0], len(x))]
    # What arrives at the values each layer reads: inputs, then the activations.
    arrived = [torch.zeros_like(grad), *(torch.zeros_like(s) for s in slopes)]

    def finish(degree: int, stop: int) -> None:
        """The units of one degree, given what was sent by the degrees below ``stop``."""
        for layer in reversed(range(len(weights))):
            c, d = upto[layer][degree + 1], upto[layer][degree + 2]
            if c == d:
                continue
            last = layer == len(net.layers)
            above = [n * params for n in range(net.features + 1)] if last else None
            a = above[degree + 1] if last else upto[layer + 1][degree + 1]
            b = above[stop] if last else upto[layer + 1][stop + 1]
            if b > a:
                arrived[layer][c:d].addmm_(weights[layer][a:b, c:d].mT, sent[layer][a:b])
            if layer > 0:
                sums = arrived[layer][c:d] * slopes[layer - 1][c:d]
                if layer < len(net.layers) and net.has_skip(layer):
                    sums += sent[layer][c:d]
                sent[layer - 1][c:d] = sums

    def push(start: int, stop: int) -> None:
        """Carry what the degrees ``start .. stop - 1`` sent to all lower ones."""
        for layer, weight in enumerate(weights):
            last = layer == len(net.layers)
            a = start * params if last else upto[layer + 1][start + 1]
            b = stop * params if last else upto[layer + 1][stop + 1]
            below = upto[layer][start + 1]
            if b > a and below > 0:
                arrived[layer][:below].addmm_(weight[a:b, :below].mT, sent[layer][a:b])

    for start, stop in reversed(_blocks(net, len(x))):
        for i in reversed(range(start, stop)):
            finish(i, stop)
            v[i] = (grad[i] - arrived[0][i]) / slope[i]
            sent[-1][i * params : (i + 1) * params] = pull[i] * v[i]
        push(start, stop)
    return (v.flip(0) if net.descending else v).mT


def _in_order(net: MADE) -> tuple[list[Tensor], list[Tensor]]:
    """All layers' masked weights and biases, features in the order of the walk."""
    weights = [layer.masked_weight() for layer in (*net.layers, net.last)]
    biases = [layer.bias for layer in (*net.layers, net.last)]
    if net.descending:

        def flipped(rows: Tensor) -> Tensor:
            return rows.unflatten(0, (net.features, net.params)).flip(0).flatten(0, 1)

        weights[0] = weights[0].flip(1)
        weights[-1], biases[-1] = flipped(weights[-1]), flipped(biases[-1])
    return weights, biases


def _activation_slopes(net: MADE, x: Tensor, context: Tensor | None) -> list[Tensor]:
    """The activation's derivative at every hidden unit, ``(units, rows)`` for each layer."""
    slopes, h = [], None
    for index, layer in enumerate(net.layers):
        reads = x if index == 0 else net.activate(h)
        new = layer(reads)
        if index == 0 and net.from_context is not None:
            new = new + net.from_context(context)
        h = h + new if net.has_skip(index) else new
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            (slope,) = torch.autograd.grad(net.activate(leaf).sum(), leaf)
        slopes.append(slope.mT.contiguous())
    return slopes
