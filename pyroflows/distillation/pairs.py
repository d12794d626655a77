"""Layers of a teacher and of a student that stand for each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyroflows.distributions.flow import Flow
from pyroflows.transforms import Autoregressive, FlowTransform
from pyroflows.transforms.autoregressive import autoregressive_in

_POINTS = 16  # at which two maps are compared


@dataclass(frozen=True)
class Pair:
    """A layer of the teacher, whose inverse it samples by, and the student's.

    Args:
        index: where in both flows they are.
        teacher: cheap from data to base.
        student: cheap from base to data.
    """

    index: int
    teacher: Autoregressive
    student: Autoregressive

    @property
    def gaussian(self) -> bool:
        """Whether both are conditional Gaussians where Gaussian noise goes in."""
        return self.teacher.family.keeps_gaussian and self.student.family.keeps_gaussian


@torch.no_grad()
def matched(teacher: Flow, student: Flow) -> list[Pair]:
    """The pairs of autoregressive layers, if the flows are the same but for these.

    Empty where the numbers or orders of their layers differ, what stands between them, or the base.
    """
    theirs, mine = teacher.parts, student.parts
    if len(theirs) != len(mine) or teacher.context_shape != student.context_shape:
        return []
    if not _same_base(teacher.base, student.base):
        return []
    pairs = []
    points, context = _points(teacher)
    for index, (their, my) in enumerate(zip(theirs, mine, strict=True)):
        slow, fast = autoregressive_in(their), autoregressive_in(my)
        if slow is None and fast is None:
            moved = their.forward_and_log_det(points, context)[0]
            if not _same_at(points, moved, my, context):
                return []
            points = moved
        elif slow is None or fast is None or not _fits(their, slow, my, fast):
            return []
        else:
            pairs.append(Pair(index, slow, fast))
    return pairs


def _fits(
    their: FlowTransform, slow: Autoregressive, my: FlowTransform, fast: Autoregressive
) -> bool:
    """Whether the one is a MAF layer, the other an IAF layer, over the same order of features."""
    if (their.fast, my.fast) != ("log_prob", "sample") or type(slow.family) is not type(
        fast.family
    ):
        return False
    wanted = ("features", "descending")
    return all(getattr(fast.net, n, None) == getattr(slow.net, n, n) for n in wanted)


def _points(flow: Flow) -> tuple[Tensor, Tensor | None]:
    """A few points of the base's space, and contexts, the same at each call."""
    shapes = flow.transform.inverse_shape(flow.event_shape), flow.context_shape
    generator = torch.Generator().manual_seed(0)
    z, context = (
        torch.randn(_POINTS, *shape, generator=generator, dtype=torch.float64).to(
            flow.device, flow.dtype
        )
        for shape in shapes
    )
    return z, context if flow.context_shape else None


def _same_at(points: Tensor, moved: Tensor, my: FlowTransform, context: Tensor | None) -> bool:
    """Whether a map takes the points to where they were moved."""
    own = next((t for t in (*my.parameters(), *my.buffers()) if t.is_floating_point()), points)
    context = None if context is None else context.to(own)
    found = my.forward_and_log_det(points.to(own), context)[0].to(moved)
    return found.shape == moved.shape and torch.allclose(found, moved, equal_nan=True)


def _same_base(their: nn.Module, my: nn.Module) -> bool:
    """Whether both are one distribution; by their tensors, of which some are no state to save."""
    if type(their) is not type(my) or getattr(their, "kind", None) is not getattr(my, "kind", None):
        return False
    state, other = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (their, my))
    return {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in other.items()} and all(
        torch.equal(value, other[name].to(value)) for name, value in state.items()
    )
