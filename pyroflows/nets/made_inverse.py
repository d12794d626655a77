"""Solving through a MADE feature by feature, computing each hidden unit once.

With hidden units sorted by degree every masked weight is block-triangular: once the features up to
d are known, the units of degree d can be computed and never change. So an inversion that would take
one full pass a feature costs about the arithmetic of two passes in all. Inside a block of features
only the block's own columns are multiplied; one large product a layer then carries the finished
block to all rows still open.

Where calls cost more than arithmetic (few rows, many features) a block is solved by fixed-point
passes instead: all its features at once, again and again until nothing changes. The map from one
pass to the next is strictly triangular, so its fixed point is unique, reached after at most as many
passes as there are features, and proved by one more pass that changes no bit.

Units stand in rows here, ``(units, rows of data)``, so that a range of units is contiguous.
``nets.made_gradient`` does the same backwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows._pyro.memo import traced
from pyroflows.nets.plan import Cut, Piece, Plan, PlannedLayer, by_degree

Step = Callable[[int, Tensor], Tensor]
BlockStep = Callable[[int, int, Tensor], Tensor]

# How wide blocks are. Milliseconds of one inverse of a residual MADE of two hidden layers of 256,
# affine, float32, one core, weights cut already; * marks the width that the figures below choose:
#
#   features, rows      feature by feature         fixed-point passes
#                     8 wide  16     32     64     16     32     64    128 wide
#         64,    1      2.7   2.5    2.2    2.2    1.3    1.0    0.9*
#         64,  100      3.0   2.9    2.9    2.6    2.3    2.6*   3.9
#         64, 1000      5.5   5.2    5.2*   5.7     12     16     30
#        200,    1      9.4   7.9    7.2    7.0    3.1    2.3    1.9    1.4*
#        200,  100     10.2   8.8    8.1    8.1    4.5    3.9*   3.9    4.6
#        200, 1000     15.8  14.3   12.8*  12.6     16     18     25     38
_LOCAL = 512_000  # multiply-adds that take about as long as the call that does them
_PASS = 2_500_000  # multiply-adds that take about as long as the calls of one fixed-point pass
_NARROWEST, _WIDEST = 16, 128  # blocks between which fixed-point passes pay
_SCALAR = 100  # multiply-adds in whose time a family treats one parameter


def sequential_blocks(plan: Plan, rows: int) -> list[tuple[int, int]]:
    """Ranges of features, as wide as keeps a step's local product near the cost of calling it."""
    per_degree = max(layer.weight.shape[1] for layer in plan.layers[1:]) / plan.features
    width = int(_LOCAL / max(rows * per_degree**2, 1))
    return _ranges(plan.features, min(max(width, 8), 32))


def fixed_point_blocks(plan: Plan, rows: int) -> list[tuple[int, int]] | None:
    """Ranges wide enough for fixed-point passes, or None where feature by feature is faster."""
    square = sum(layer.weight.numel() for layer in plan.layers) / plan.features**2
    linear = _SCALAR * plan.params
    # The positive root of rows (square w^2 + linear w) = _PASS.
    budget = _PASS / max(rows, 1)
    width = 2 * budget / (linear + (linear**2 + 4 * square * budget) ** 0.5)
    width = min(int(width), plan.features, _WIDEST)
    return _ranges(plan.features, width) if width >= _NARROWEST else None


def _ranges(features: int, width: int) -> list[tuple[int, int]]:
    return [(a, min(a + width, features)) for a in range(0, features, width)]


@dataclass(slots=True)
class _Layer:
    """What is known of one layer so far; units in rows, ``(units, rows of data)``.

    Attributes:
        plan: the layer.
        reads: the values it multiplies.
        sums: its sums.
        values: what the next layer reads of it: the sums themselves where a rectifier may work in
            place, as it may where no skip needs them.
        sums_of: ``sums_of[d + 1]``, the sums of the units of degree d.
        values_of: the same of the values.
        pieces: the same of the weight, see ``Cut``.
        in_place: whether a rectifier works in place.
    """

    plan: PlannedLayer
    reads: Tensor
    sums: Tensor
    values: Tensor
    sums_of: tuple[Tensor, ...]
    values_of: tuple[Tensor, ...]
    pieces: list[Piece | None]
    in_place: bool


class _Solve:
    """The state of a solve.

    Args:
        plan: of the network.
        cut: its weights, cut up.
        like: ``(rows, features)``.
        context: ``(rows, context)`` or None.
    """

    def __init__(self, plan: Plan, cut: Cut, like: Tensor, context: Tensor | None) -> None:
        self.plan, self.cut, rows = plan, cut, like.shape[0]
        self.x = like.new_empty(plan.features, rows)
        biases: list[Tensor] = [layer.linear.bias for layer in plan.layers]
        biases[-1] = plan.parameters_in_order(biases[-1])
        # A clone also for one row, where .contiguous() would hand out the bias itself.
        whole = torch.contiguous_format
        sums = [b[:, None].expand(-1, rows).clone(memory_format=whole) for b in biases]
        if plan.from_context is not None:
            sums[0].addmm_(plan.from_context.weight, plan.context(context).mT)
        self.hidden: list[_Layer] = []
        reads = self.x
        for index, pieces in enumerate(cut.hidden):
            layer, own = plan.layers[index], sums[index]
            skipped = plan.layers[index + 1].skip
            values = torch.empty_like(own) if skipped else own
            sums_of = by_degree(own, layer.units)
            values_of = by_degree(values, layer.units) if skipped else sums_of
            in_place = plan.activation == "relu" and not skipped
            self.hidden.append(
                _Layer(layer, reads, own, values, sums_of, values_of, pieces, in_place)
            )
            reads = values
        self.top, self.parameters = reads, sums[-1]
        self.parameters_of = sums[-1].split(plan.params)

    def finish(self, degree: int) -> None:
        """The units of one degree, given all before its block and what its block has so far."""
        below = None
        for layer in self.hidden:
            unit, piece = layer.sums_of[degree + 1], layer.pieces[degree + 1]
            if piece is not None:
                weight, first, count = piece
                unit.addmm_(weight, layer.reads.narrow(0, first, count))
            if layer.plan.skip and below is not None:
                unit.add_(below)
            if layer.in_place:
                unit.relu_()
            else:
                layer.values_of[degree + 1].copy_(self.plan.activate(unit))
            below = unit

    def push(self, start: int, stop: int) -> None:
        """Carry the columns of the degrees ``start .. stop - 1`` to all later rows."""
        last = self.plan.layers[-1]
        for layer in self.hidden:
            _push(layer.plan, layer.reads, layer.sums, start, stop)
        _push(last, self.top, self.parameters, start, stop)

    def feature_by_feature(self, start: int, stop: int, step: Step) -> None:
        """Solve a block one feature after the other."""
        plan, rows = self.plan, self.x.unbind()
        for place in range(start, stop):
            theta, piece = self.parameters_of[place], self.cut.parameters[place]
            if piece is not None:
                weight, first, count = piece
                theta.addmm_(weight, self.top.narrow(0, first, count))
            i = plan.features - 1 - place if plan.descending else place
            rows[place].copy_(step(i, theta.mT))
            if place + 1 < plan.features:
                self.finish(place)

    def by_fixed_point(self, start: int, stop: int, now: Tensor, step: BlockStep) -> bool:
        """Solve a block by passes from ``now`` on; whether they ended in a proven fixed point."""
        plan = self.plan
        spans = [slice(p.units[start + 1], p.units[stop + 1]) for p in plan.layers]
        local = [
            p.weight[span, p.reads[start + 1] : p.reads[stop + 1]]
            for p, span in zip(plan.layers, spans, strict=True)
        ]
        known = [layer.sums[span] for layer, span in zip(self.hidden, spans, strict=False)]
        parameters = self.parameters[spans[-1]]
        for _ in range(stop - start + 1):
            read: Tensor = now
            found: list[tuple[Tensor, Tensor]] = []
            for layer, weight, sums in zip(self.hidden, local, known, strict=False):
                h = torch.addmm(sums, weight, read)
                if layer.plan.skip:
                    h += found[-1][0]
                read = plan.activate(h)
                found.append((h, read))
            theta = torch.addmm(parameters, local[-1], read)
            before, now = now, step(start, stop, theta.unflatten(0, (-1, plan.params)).mT)
            if torch.equal(before, now):
                break
        else:
            # Zeros of the mask times infinity are NaN, which equals nothing. Feature by feature,
            # what is not finite reaches only the features that depend on it.
            return False
        self.x[start:stop] = now
        parameters.copy_(theta)
        for layer, (h, read), sums, span in zip(self.hidden, found, known, spans, strict=False):
            sums.copy_(h)
            layer.values[span] = read
        return True


def _push(layer: PlannedLayer, reads: Tensor, sums: Tensor, start: int, stop: int) -> None:
    c, d = layer.reads[start + 1], layer.reads[stop + 1]
    first = layer.units[stop + 1]
    if d > c and first < layer.weight.shape[0]:
        sums[first:].addmm_(layer.weight[first:, c:d], reads[c:d])


@torch.no_grad()
def solve(
    plan: Plan,
    step: Step,
    like: Tensor,
    context: Tensor | None,
    block_step: BlockStep | None = None,
) -> tuple[Tensor, Tensor]:
    """The fixed point ``x_i = step(i, params_i(x_<i))``, features in order. Exact.

    Not differentiable; never uses dropout.

    Args:
        plan: of the network.
        step: gives feature i, ``(rows,)``, from its parameters ``(rows, params)``.
        like: ``(rows, features)``; its number of rows, dtype and device are used, and fixed-point
            passes start from it.
        context: ``(rows, context)`` or None.
        block_step: the same for many features at once, those that are number ``a .. b - 1`` in the
            order in which the network takes them: ``block_step(a, b, parameters)`` gives ``(b - a,
            rows)`` from ``(b - a, rows, params)``. Without it there are no fixed-point passes.

    Returns:
        The fixed point ``(rows, features)`` and its parameters ``(rows, features, params)``.
    """
    rows = like.shape[0]
    wide = None if block_step is None or traced() else fixed_point_blocks(plan, rows)
    cut = plan.cut(wide or sequential_blocks(plan, rows))
    state = _Solve(plan, cut, like, context)
    guess = plan.in_order(like.mT)
    state.finish(-1)  # what depends on the context alone
    state.push(-1, 0)
    for start, stop in cut.blocks:
        proven = False
        if wide and block_step is not None:
            proven = state.by_fixed_point(start, stop, guess[start:stop], block_step)
        if not proven:
            state.feature_by_feature(start, stop, step)
        if stop < plan.features:
            state.push(start, stop)
    theta = state.parameters.unflatten(0, (plan.features, plan.params))
    return plan.in_order(state.x).mT, plan.in_order(theta).permute(2, 0, 1)
