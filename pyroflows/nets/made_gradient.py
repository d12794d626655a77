"""The gradient of what ``nets.made_inverse`` solved for: the same backwards.

Once the adjoints of the parameters are known for all features after d, those of the units of degree
d are complete. By fixed-point passes where forward is, for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.nets.made_inverse import BlockStep, fixed_point_blocks, sequential_blocks
from pyroflows.nets.masked_linear import weight_gradient
from pyroflows.nets.plan import Plan, PlannedLayer, by_degree

BackwardStep = Callable[[int, Tensor, Tensor], object]


@dataclass(slots=True)
class _Layer:
    """One layer on the way back; units in rows, ``(units, rows of data)``.

    Attributes:
        plan: the layer.
        slopes: those of the activation at its sums; None of the last layer.
        sent: the adjoints of its sums.
        arrived: what has arrived so far at the values it reads.
        slopes_of: ``slopes_of[d + 1]``, those of the units of degree d.
        sent_of: the same of what is sent.
        arrived_of: the same of the values it reads.
        columns_of: the columns of the weight that those values meet, transposed.
    """

    plan: PlannedLayer
    slopes: Tensor | None
    sent: Tensor
    arrived: Tensor
    slopes_of: tuple[Tensor, ...]
    sent_of: tuple[Tensor, ...]
    arrived_of: tuple[Tensor, ...]
    columns_of: tuple[Tensor, ...]


def _layer(plan: PlannedLayer, slopes: Tensor | None, sent: Tensor, arrived: Tensor) -> _Layer:
    return _Layer(
        plan,
        slopes,
        sent,
        arrived,
        () if slopes is None else by_degree(slopes, plan.units),
        by_degree(sent, plan.units),
        by_degree(arrived, plan.reads),
        by_degree(plan.weight.mT, plan.reads),
    )


class _SolveBack:
    """What has arrived at every unit so far.

    Args:
        plan: of the network.
        x: ``(rows, features)``, where the network is taken.
        context: ``(rows, context)`` or None.
    """

    def __init__(self, plan: Plan, x: Tensor, context: Tensor | None) -> None:
        self.plan = plan
        self.values, slopes = _activations(plan, x, context)
        sent = [*map(torch.empty_like, slopes), x.new_empty(x.shape[1] * plan.params, len(x))]
        arrived = [x.new_zeros(x.shape[1], len(x)), *map(torch.zeros_like, slopes)]
        self.layers = list(map(_layer, plan.layers, [*slopes, None], sent, arrived))

    def finish(self, degree: int, stop: int) -> None:
        """The units of one degree, given what was sent by the degrees below ``stop``."""
        layers = self.layers
        for index in range(len(layers) - 1, -1, -1):
            layer = layers[index]
            arrival = layer.arrived_of[degree + 1]
            if not arrival.shape[0]:
                continue
            # A feature's parameters see lower degrees only, a unit its own too.
            a = layer.plan.units[degree + (2 if layer.plan.is_last else 1)]
            count = layer.plan.units[stop + 1] - a
            if count > 0:
                local = layer.columns_of[degree + 1].narrow(1, a, count)
                arrival.addmm_(local, layer.sent.narrow(0, a, count))
            if index:
                below = layers[index - 1]
                adjoint = below.sent_of[degree + 1]
                torch.mul(arrival, below.slopes_of[degree + 1], out=adjoint)
                if layer.plan.skip:
                    adjoint.add_(layer.sent_of[degree + 1])

    def push(self, start: int, stop: int) -> None:
        """Carry what the degrees ``start .. stop - 1`` sent to all lower ones."""
        for layer in self.layers:
            a, b = layer.plan.units[start + 1], layer.plan.units[stop + 1]
            below = layer.plan.reads[start + 1]
            if b > a and below > 0:
                layer.arrived[:below].addmm_(layer.plan.weight[a:b, :below].mT, layer.sent[a:b])

    def feature_by_feature(self, start: int, stop: int, step: BackwardStep) -> None:
        """Go through a block, the last feature first."""
        first, last = self.layers[0], self.layers[-1]
        for i in range(stop - 1, start - 1, -1):
            self.finish(i, stop)
            step(i, first.arrived_of[i + 1][0], last.sent_of[i + 1])

    def by_fixed_point(self, start: int, stop: int, step: BlockStep) -> bool:
        """Go through a block by passes; whether they ended in a proven fixed point."""
        spans = [slice(p.units[start + 1], p.units[stop + 1]) for p in self.plan.layers]
        reads = [slice(p.reads[start + 1], p.reads[stop + 1]) for p in self.plan.layers]
        pairs = list(zip(self.layers, spans, reads, strict=True))
        local = [layer.plan.weight[span, read].mT for layer, span, read in pairs]
        known = [layer.arrived[read] for layer, _, read in pairs]
        bent = [n.slopes[span] for n, span, _ in pairs if n.slopes is not None]
        now = known[0]
        for _ in range(stop - start + 1):
            found = [step(start, stop, now).flatten(0, 1)]
            for index in range(len(self.layers) - 1, 0, -1):
                below = torch.addmm(known[index], local[index], found[-1]).mul_(bent[index - 1])
                found.append(below.add_(found[-1]) if self.layers[index].plan.skip else below)
            before, now = now, torch.addmm(known[0], local[0], found[-1])
            if torch.equal(before, now):
                break
        else:
            return False  # not finite somewhere: one by one, that stays where it belongs
        for (layer, span, _), adjoint in zip(pairs, reversed(found), strict=True):
            layer.sent[span] = adjoint
        return True


@torch.no_grad()
def solve_back(
    plan: Plan,
    step: BackwardStep,
    x: Tensor,
    context: Tensor | None,
    block_step: BlockStep | None = None,
) -> tuple[list[Tensor | None], Tensor | None]:
    """Back through the fixed point: the gradients of weights and context.

    Args:
        plan: of the network.
        step: ``step(i, sent, adjoint)`` writes the adjoint of the parameters of the feature that is
            number i in the network's order, ``(params, rows)``, into ``adjoint``; ``sent``,
            ``(rows,)``, is what the parameters of all later features send to it. The last one
            comes first.
        x: ``(rows, features)``, where the network is taken.
        context: ``(rows, context)`` or None.
        block_step: the same for many features at once: ``block_step(a, b, sent)`` gives the
            adjoints ``(b - a, params, rows)`` for ``(b - a, rows)``. Without it there are no
            fixed-point passes.

    Returns:
        The gradients of ``MADE.weights()`` and of the context.
    """
    state = _SolveBack(plan, x, context)
    wide = None if block_step is None else fixed_point_blocks(plan, len(x))
    for start, stop in reversed(wide or sequential_blocks(plan, len(x))):
        proven = False
        if wide and block_step is not None:
            proven = state.by_fixed_point(start, stop, block_step)
        if not proven:
            state.feature_by_feature(start, stop, step)
        state.push(start, stop)
    state.finish(-1, 0)
    sent = [layer.sent for layer in state.layers]
    sent[-1] = plan.parameters_in_order(sent[-1])
    return _gradients(plan, sent, state.values, context)


def _gradients(
    plan: Plan, sent: list[Tensor], values: list[Tensor], context: Tensor | None
) -> tuple[list[Tensor | None], Tensor | None]:
    """From what each layer read and the adjoints of its sums."""
    found: list[Tensor | None] = []
    for planned, adjoint, value in zip(plan.layers, sent, values, strict=True):
        layer = planned.linear
        wanted = layer.weight.requires_grad
        found.append(weight_gradient(layer, adjoint.mT, value) if wanted else None)
        found.append(adjoint.sum(dim=1) if layer.bias.requires_grad else None)
    if plan.from_context is None:
        return found, None
    return [*found, sent[0] @ plan.context(context)], sent[0].mT @ plan.from_context.weight


def _activations(
    plan: Plan, x: Tensor, context: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """What each layer reads, ``(rows, inputs)``, and each unit's slope, ``(units, rows)``."""
    values: list[Tensor] = [x]
    slopes: list[Tensor] = []
    h = None
    for planned in plan.layers[:-1]:
        new = planned.linear(values[-1])
        if h is None and plan.from_context is not None:
            new = new + plan.from_context(context)
        h = new if h is None or not planned.skip else h + new
        if plan.activation == "relu":
            values.append(h.relu())
            slopes.append((h.mT > 0).to(h.dtype, memory_format=torch.contiguous_format))
            continue
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            value = plan.activate(leaf)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        values.append(value.detach())
        slopes.append(slope.mT.contiguous())
    return values, slopes
