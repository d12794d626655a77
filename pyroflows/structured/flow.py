"""The flow of a structured guide: globals by an IAF, rows given them by one shared IAF."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from pyroflows._checks import check_whole
from pyroflows.distributions.flow import Flow
from pyroflows.flows import builder, iaf
from pyroflows.transforms import ActNorm, Chain, RationalQuadraticSpline
from pyroflows.transforms.rows import Arrow, RowsGivenGlobals, WhitenRows


@builder
def rows_flow(
    features: int,
    context: int = 0,
    *,
    groups: Sequence[Sequence[int]],
    layers: int = 4,
    hidden: Sequence[int] = (64, 64),
    row_layers: int = 1,
    row_hidden: Sequence[int] = (16,),
    width: int = 4,
) -> Flow:
    """Globals by an IAF, then the rows of each group given them by an IAF that they share.

    Sampling, and scoring own samples, cost one pass of each, of the shared one at as many points as
    there are rows. Rows of one number have splines, longer ones affine steps.

    Args:
        features: of all, globals first, then the rows of each group.
        context: number of context features; 0 for none.
        groups: for each the number of rows and of each row's numbers.
        layers: of the globals' flow.
        hidden: widths of its nets.
        row_layers: of the shared one.
        row_hidden: widths of its nets.
        width: numbers by which the shared one knows a row, and the globals.

    Raises:
        ValueError: a size is out of range, or the groups have more numbers than the flow.

    Example:
        >>> rows_flow(7, groups=[(5, 1)]).sample((2,)).shape
        torch.Size([2, 7])
    """
    check_whole(1, width=width)
    globals_ = features - sum(n * k for n, k in groups)
    if globals_ < 0:
        raise ValueError(f"groups: expected at most {features} numbers, got {features - globals_}")
    outer = None
    if globals_:
        # A trained location and scale too: not every layer can move a whole density.
        affine = ActNorm(globals_)
        affine.initialized.fill_(True)
        inner = iaf(globals_, context, layers=layers, hidden=hidden, activation="silu")
        outer = Chain([inner.transform, affine])
    told = width + (width if globals_ else 0) + context
    shared = [
        iaf(
            k,
            told,
            layers=row_layers,
            hidden=row_hidden,
            family=RationalQuadraticSpline(bins=4) if k == 1 else "affine",
            activation="silu",
        ).transform
        for _, k in groups
    ]
    transform = RowsGivenGlobals(outer, shared, globals_, groups, width=width)
    return Flow(transform, shape=features, context=context)


def around_rows(inner: Flow, like: Tensor) -> Flow:
    """A guide's flow: rows given globals, and outside it their fixed Gaussians.

    Args:
        inner: of ``rows_flow``.
        like: a tensor of the flow's dtype and device.
    """
    rows = cast(RowsGivenGlobals, inner.transform)
    whiten = WhitenRows(rows.layout.globals, rows.layout.groups)
    flow = Flow(Chain([p.to(like) for p in (rows, whiten)]), inner.base, shape=inner.event_shape)
    flow.config = inner.config
    return flow.to(like)


@torch.no_grad()
def start_rows(flow: Flow, arrow: Arrow) -> None:
    """Put Gaussians in place, and tell the shared map how each row's differs from the others'.

    Args:
        flow: of ``around_rows``.
        arrow: the Gaussians.
    """
    rows, whiten = cast(Chain, flow.transform)
    cast(WhitenRows, whiten).set(arrow)
    for features, gaussian in zip(
        cast(RowsGivenGlobals, rows).row_features, arrow.rows, strict=True
    ):
        log_scale = gaussian.tril.diagonal(dim1=-2, dim2=-1).log()
        seen = torch.stack([gaussian.loc, log_scale], dim=-1).flatten(1)[:, : features.shape[1]]
        spread = seen.std(0, correction=0)
        seen = (seen - seen.mean(0)) / torch.where(spread > 0, spread, 1.0)
        features[:, : seen.shape[1]] = seen
