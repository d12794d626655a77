r"""Start a student's nets from the teacher's, which are the answer to first order.

A MAF layer draws x from ``z_i = g(x_i; theta_i(x_<i))``. Where theta is small, x is close to z, so
:math:`x_i \approx g^{-1}(z_i; \theta_i(z_{<i}))`, which is an IAF layer whose net is the teacher's
with its last layer inverted to first order: for an affine map :math:`\theta' = -\theta`. The error
is of second order. A wider net can hold a narrower one: each unit of the teacher's goes to a unit
of the same degree in the student's, and the units that remain start with no effect.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyroflows.distillation.pairs import Pair
from pyroflows.nets import MADE
from pyroflows.nets.masked_linear import MaskedLinear
from pyroflows.transforms import Family


@torch.no_grad()
def inherit(pair: Pair) -> bool:
    """Start the student's net as the teacher's inverted; return whether it is large enough.

    Nets that do not fit (another activation, fewer units of a degree) are left as they are.
    """
    teacher, student = pair.teacher.net, pair.student.net
    family = pair.teacher.family
    if pair.student.family != family:
        return False
    if not (isinstance(teacher, MADE) and isinstance(student, MADE)):
        return False
    places = _places(teacher, student)
    if places is None:
        return False
    read = torch.arange(teacher.features)
    layers: list[MaskedLinear] = [*student.layers]
    for layer, (mine, theirs, place) in enumerate(
        zip(layers, [*teacher.layers], places, strict=False)
    ):
        if layer:  # what the units left over know must not reach the teacher's
            mine.weight[place] = 0.0
        mine.weight[place[:, None], read] = theirs.weight
        mine.bias[place] = theirs.bias
        read = place
    for added in layers[len(teacher.layers) :]:  # passed by, over the skips
        added.weight.zero_()
        added.bias.zero_()
    if teacher.from_context is not None and student.from_context is not None:
        student.from_context.weight[places[0]] = teacher.from_context.weight
    student.last.weight.zero_()
    student.last.weight[:, read] = _inverted(teacher.last.weight, family)
    student.last.bias.copy_(_inverted(teacher.last.bias, family))
    return True


def _inverted(outputs: Tensor, family: Family) -> Tensor:
    """Weight or bias of the last layer with which it gives the parameters of the inverse map."""
    by_feature = outputs.unflatten(0, (-1, family.params)).movedim(1, -1)
    return family.first_order_inverse(by_feature).movedim(-1, 1).flatten(0, 1)


def _places(teacher: MADE, student: MADE) -> list[Tensor] | None:
    """For each hidden layer of the teacher's where its units go in the student's; None if nowhere.

    Units are sorted by degree; ``upto`` has the bounds.
    """
    for name in ("features", "params", "descending", "activation"):
        if getattr(teacher, name) != getattr(student, name):
            return None
    widths = [
        None if n.from_context is None else n.from_context.in_features for n in (teacher, student)
    ]
    depth = len(teacher.layers)
    if widths[0] != widths[1] or len(student.layers) < depth:
        return None
    if any(student.has_skip(n) != teacher.has_skip(n) for n in range(depth)):
        return None
    if not all(map(student.has_skip, range(depth, len(student.layers)))):
        return None
    places = []
    for theirs, mine in zip(teacher.upto[1:], student.upto[1:], strict=False):
        counts = [b - a for a, b in zip(theirs, theirs[1:], strict=False)]
        if any(a + n > b for a, b, n in zip(mine, mine[1:], counts, strict=False)):
            return None
        places.append(
            torch.cat([torch.arange(a, a + n) for a, n in zip(mine, counts, strict=False)])
        )
    return places
