"""The walk of ``walk`` backwards, for the gradient of what it solved for.

Once the adjoints of the parameters are known for all features after d, those of the units of degree
d are complete. Swept where forward is, for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyroflows.nets.made_inverse import flipped, in_order, sizes_of, swept_blocks, walked_blocks
from pyroflows.nets.masked_linear import weight_gradient

if TYPE_CHECKING:
    from pyroflows.nets.made import MADE


class _WalkBack:
    """The state of a walk back: what has arrived at every unit so far.

    Args:
        net: the network.
        x: ``(rows, features)``, where the network is taken.
        context: ``(rows, context)`` or None.
    """

    def __init__(self, net: MADE, x: Tensor, context: Tensor | None) -> None:
        self.net, self.upto, rows = net, net.upto, len(x)
        self.weights = in_order(net, [layer.masked_weight() for layer in (*net.layers, net.last)])
        self.values, self.slopes = _activations(net, x, context)
        slopes, outputs = self.slopes, self.weights[-1].shape[0]
        # What each layer sends back, the adjoints of its sums, and what arrives at what it reads.
        self.sent = [*map(torch.empty_like, slopes), x.new_empty(outputs, rows)]
        self.arrived = [x.new_zeros(net.features, rows), *map(torch.zeros_like, slopes)]
        self.skips = [*map(net.has_skip, range(len(net.layers))), False]
        # ends[l][d + 1]: how many of layer l's sums have a degree below d.
        self.ends = [*net.upto[1:], [0, *range(0, net.features * net.params + 1, net.params)]]
        # All of one degree at a time.
        reads, sums = net.upto, net.upto[1:]
        self.columns = _by_degree([w.mT for w in self.weights], reads)
        self.arrivals = _by_degree(self.arrived, reads)
        self.bends = _by_degree(slopes, sums)
        self.adjoints = _by_degree(self.sent, self.ends)

    def finish(self, degree: int, stop: int) -> None:
        """The units of one degree, given what was sent by the degrees below ``stop``."""
        top = len(self.weights) - 1
        for layer in range(top, -1, -1):
            arrival = self.arrivals[layer][degree + 1]
            if not arrival.shape[0]:
                continue
            # A feature's parameters see lower degrees only, a unit its own too.
            ends = self.ends[layer]
            a = ends[degree + (2 if layer == top else 1)]
            count = ends[stop + 1] - a
            if count > 0:
                local = self.columns[layer][degree + 1].narrow(1, a, count)
                arrival.addmm_(local, self.sent[layer].narrow(0, a, count))
            if layer:
                adjoint = self.adjoints[layer - 1][degree + 1]
                torch.mul(arrival, self.bends[layer - 1][degree + 1], out=adjoint)
                if self.skips[layer]:
                    adjoint.add_(self.adjoints[layer][degree + 1])

    def push(self, start: int, stop: int) -> None:
        """Carry what the degrees ``start .. stop - 1`` sent to all lower ones."""
        for layer, weight in enumerate(self.weights):
            a, b = self.ends[layer][start + 1], self.ends[layer][stop + 1]
            below = self.upto[layer][start + 1]
            if b > a and below > 0:
                self.arrived[layer][:below].addmm_(weight[a:b, :below].mT, self.sent[layer][a:b])

    def through(self, start: int, stop: int, step: Callable[[int, Tensor, Tensor], object]) -> None:
        """Walk a block, the last feature first."""
        for i in range(stop - 1, start - 1, -1):
            self.finish(i, stop)
            step(i, self.arrivals[0][i + 1][0], self.adjoints[-1][i + 1])

    def swept(self, start: int, stop: int, sweep: Callable[[int, int, Tensor], Tensor]) -> bool:
        """Sweep a block; whether that ended in a proven fixed point."""
        params = self.net.params
        spans = [(marks[start + 1], marks[stop + 1]) for marks in self.upto]
        spans.append((start * params, stop * params))
        local = [
            weight[a:b, c:d].mT
            for weight, (a, b), (c, d) in zip(self.weights, spans[1:], spans, strict=False)
        ]
        known = [t[a:b] for t, (a, b) in zip(self.arrived, spans, strict=False)]
        bent = [t[a:b] for t, (a, b) in zip(self.slopes, spans[1:], strict=False)]
        now = known[0]
        for _ in range(stop - start + 1):
            found = [sweep(start, stop, now).flatten(0, 1)]
            for layer in range(len(self.weights) - 1, 0, -1):
                below = torch.addmm(known[layer], local[layer], found[-1]).mul_(bent[layer - 1])
                found.append(below.add_(found[-1]) if self.skips[layer] else below)
            before, now = now, torch.addmm(known[0], local[0], found[-1])
            if torch.equal(before, now):
                break
        else:
            return False  # not finite somewhere: the walk keeps that to where it belongs
        for own, adjoint, (a, b) in zip(self.sent, reversed(found), spans[1:], strict=True):
            own[a:b] = adjoint
        return True


@torch.no_grad()
def solve_back(
    net: MADE,
    step: Callable[[int, Tensor, Tensor], object],
    x: Tensor,
    context: Tensor | None,
    sweep: Callable[[int, int, Tensor], Tensor] | None = None,
) -> tuple[list[Tensor | None], Tensor | None]:
    """Back through the fixed point: the gradients of weights and context.

    Args:
        net: the network.
        step: ``step(i, sent, adjoint)`` writes the adjoint of the parameters of the feature that is
            number i in the net's order, ``(params, rows)``, into ``adjoint``; ``sent``,
            ``(rows,)``, is what the parameters of all later features send to it. The last one
            comes first.
        x: ``(rows, features)``, where the network is taken.
        context: ``(rows, context)`` or None.
        sweep: the same for many features at once: ``sweep(a, b, sent)`` gives the adjoints ``(b -
            a, params, rows)`` for ``(b - a, rows)``. Without it there are no sweeps.

    Returns:
        The gradients of ``parameters(net)`` and of the context.
    """
    walk = _WalkBack(net, x, context)
    swept = None if sweep is None else swept_blocks(net, len(x))
    for start, stop in reversed(swept or walked_blocks(net, len(x))):
        if not (swept and walk.swept(start, stop, sweep)):
            walk.through(start, stop, step)
        walk.push(start, stop)
    walk.finish(-1, 0)
    sent = walk.sent
    if net.descending:
        sent[-1] = flipped(net, sent[-1])
    return _gradients(net, sent, walk.values, context)


def parameters(net: MADE) -> list[Tensor]:
    """All weights and biases, in the order of ``solve_back``'s gradients."""
    found = [t for layer in (*net.layers, net.last) for t in (layer.weight, layer.bias)]
    return found if net.from_context is None else [*found, net.from_context.weight]


def _gradients(
    net: MADE, sent: list[Tensor], values: list[Tensor], context: Tensor | None
) -> tuple[list[Tensor | None], Tensor | None]:
    """From what each layer read and the adjoints of its sums."""
    found: list[Tensor | None] = []
    for layer, adjoint, value in zip((*net.layers, net.last), sent, values, strict=True):
        wanted = layer.weight.requires_grad
        found.append(weight_gradient(layer, adjoint.mT, value) if wanted else None)
        found.append(adjoint.sum(dim=1) if layer.bias.requires_grad else None)
    if net.from_context is None:
        return found, None
    return [*found, sent[0] @ context], sent[0].mT @ net.from_context.weight


def _activations(net: MADE, x: Tensor, context: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """What each layer reads, ``(rows, inputs)``, and each unit's slope, ``(units, rows)``."""
    values, slopes, h = [x], [], None
    for index, layer in enumerate(net.layers):
        new = layer(values[-1])
        if index == 0 and net.from_context is not None:
            new = new + net.from_context(context)
        h = h + new if net.has_skip(index) else new
        if net.activation == "relu":
            values.append(h.relu())
            slopes.append((h.mT > 0).to(h.dtype, memory_format=torch.contiguous_format))
            continue
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            value = net.activate(leaf)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        values.append(value.detach())
        slopes.append(slope.mT.contiguous())
    return values, slopes


def _by_degree(tensors: list[Tensor], marks: list[list[int]]) -> list[tuple[Tensor, ...]]:
    """Each tensor cut where the degree changes: along its rows, by its own marks."""
    return [t.split(sizes_of(m)) for t, m in zip(tensors, marks, strict=True)]
