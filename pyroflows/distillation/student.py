"""A student that fits its teacher layer by layer.

A MAF layer draws ``x_i = g^-1(z_i; theta(x_<i))``. As ``x_<i`` is a function of ``z_<i``, an IAF
layer over the same order, ``x_i = h(z_i; theta'(z_<i))``, can be the same map; then the same z
belongs to the same x in both. What stands between the layers costs one pass either way: a student
takes it over from the teacher as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributions import constraints

from pyroflows.data.checks import checked_flow
from pyroflows.distillation.inherit import inherit
from pyroflows.distillation.pairs import matched
from pyroflows.distributions.flow import Flow
from pyroflows.flows import iaf
from pyroflows.flows.assembly import MARKED, rebuilt
from pyroflows.transforms import FlowTransform
from pyroflows.transforms.autoregressive import autoregressive_in

_WIDER = 1.5  # times the teacher's hidden widths


def student_of(teacher: Flow, **changes: Any) -> Flow:
    """An untrained student for a teacher: its architecture, mirrored to sample in one pass.

    The number and the order of the layers are the teacher's, so that each layer of the student has
    one of the teacher's to learn. Its nets are half as wide again, since the inverse of what a net
    computes is harder to represent. They start as the teacher's nets with the last layer inverted
    to first order (``pyroflows.distillation.inherit``). The maps between the layers, the
    standardisation and the base are copied: they cost one pass in both directions.

    For a MAF over 64 features with five layers of 128 units, two cores draw with a student of the
    teacher's width 4.0 to 4.4 times as many rows as by the teacher's fast inversion in batches of
    1,000, and 1.8 to 2.4 times in batches of 10,000 (36 and 39 to 46 times as many as by the plain
    loop); with this one 3.7 and 1.6 times (25 and 37); row by row three times as many with either.

    Args:
        teacher: a flow over vectors. One with autoregressive layers of whatever family, as
            ``pf.maf``, ``pf.wavenet`` or ``pf.nsf(scheme="autoregressive")`` make, is mirrored
            layer by layer (``Flow.mirror``); any other gets an IAF of default size.
        **changes: arguments of the teacher's builder, for an IAF of ``pf.iaf``, to set otherwise.
            Wider nets, as by ``hidden=(256, 256)``, come closer and sample more slowly.

    Raises:
        ValueError: the teacher's events, or its contexts, are not vectors; or changes where no
            builder made the teacher.

    Example:
        >>> import pyroflows as pf
        >>> pf.student_of(pf.maf(3, layers=2)).fast
        'sample'
    """
    checked_flow("teacher", teacher)
    if len(teacher.event_shape) != 1:
        raise ValueError(
            f"teacher: expected a flow over vectors, got events of {tuple(teacher.event_shape)}"
        )
    if len(teacher.context_shape) > 1:
        raise ValueError(
            f"teacher: expected contexts that are vectors, got {tuple(teacher.context_shape)}; "
            "give pf.distill a student of your own that takes such contexts"
        )
    if all(autoregressive_in(part) is None for part in teacher.parts):
        student = _of_no_layers(teacher, changes)
    else:
        same_build = _rebuilt(teacher, changes) if changes else teacher
        student = same_build.mirror(1.0 if "hidden" in changes else _WIDER)
    for pair in matched(teacher, student):
        inherit(pair)
    return student


def _of_no_layers(teacher: Flow, changes: dict[str, Any]) -> Flow:
    """An IAF of default size, with the teacher's standardisation."""
    on_all = teacher.support is constraints.real_vector
    arguments = {
        "features": teacher.event_shape[0],
        "context": sum(teacher.context_shape),
        "support": None if on_all else teacher.support,
    }
    student = iaf(**{**arguments, **changes}).to(teacher.device, teacher.dtype)
    _take_over(teacher, student)
    return student


def _rebuilt(teacher: Flow, changes: dict[str, Any]) -> Flow:
    """A flow as the teacher's builder makes it with changed arguments; maps between are copied.

    Raises:
        ValueError: it was made by no builder, or by one that is not here.
    """
    config = teacher.config
    if config is None or config["builder"] not in MARKED:
        raise ValueError(
            f"{next(iter(changes))}: expected no changes, as the teacher was made by no builder "
            "that could take them; mark the function that makes it with pf.flows.builder"
        )
    with torch.random.fork_rng(devices=[]):  # its nets are thrown away
        flow = rebuilt(config, **changes).to(teacher.device, teacher.dtype)
    _take_over(teacher, flow)
    return flow


def _take_over(teacher: Flow, flow: Flow) -> None:
    """Copy what stands between the layers; where their numbers differ, outside the last alone."""
    same_number = len(teacher.parts) == len(flow.parts)
    for their, my in zip(reversed(teacher.parts), reversed(flow.parts), strict=False):
        if autoregressive_in(their) is None and _shapes(their) == _shapes(my):
            my.load_state_dict(their.state_dict())
        elif not same_number:
            return


def _shapes(part: FlowTransform) -> tuple[type, dict[str, torch.Size]]:
    """What kind of map it is, and of what tensors."""
    return type(part), {name: value.shape for name, value in part.state_dict().items()}
