"""Neural spline flows: rational-quadratic splines by coupling or autoregressively."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn
from torch.distributions import Distribution, constraints

from pyroflows.distributions.flow import Flow
from pyroflows.flows.assembly import Example, builder, one_of, vector_flow
from pyroflows.flows.autoregressive import autoregressive_layer
from pyroflows.flows.coupling import coupling_layer
from pyroflows.transforms import Family
from pyroflows.transforms.families import family_from


@builder
def nsf(
    features: int,
    context: int = 0,
    *,
    scheme: str = "coupling",
    fast: str = "log_prob",
    layers: int = 5,
    hidden: Sequence[int] = (128, 128),
    family: str | Family = "spline",
    bins: int | None = None,
    bound: float | None = None,
    linear: str = "lu",
    activation: str = "relu",
    residual: bool = True,
    base: Distribution | nn.Module | None = None,
    support: constraints.Constraint | None = None,
) -> Flow:
    """Neural spline flow: by coupling one pass both ways, autoregressively one pass one way.

    Durkan et al. 2019, arXiv:1906.04032.

    Args:
        features: number of features; at least two for coupling.
        context: number of context features; 0 for none.
        scheme: ``"coupling"`` or ``"autoregressive"``.
        fast: the one-pass direction of the autoregressive scheme, ``"log_prob"`` or ``"sample"``;
            the other is exact, at about two passes.
        layers: number of spline layers.
        hidden: widths of each net's hidden layers.
        family: the splines: ``"spline"`` (rational-quadratic), the name of another family, or a
            ``pf.transforms.Family``.
        bins: bins of a spline by name (8 by default).
        bound: half-width of its box (5 by default); the standardised data should lie mostly inside.
        linear: what mixes the features between layers: ``"reverse"`` (they are taken ascending
            and descending in turn), ``"lu"`` (the same, and an LU-linear map), ``"lu_inverse"``
            (its inverse, for a flow that another one's inverse is to fit) or ``"permute"``.
        activation: of the nets.
        residual: skips between hidden layers of equal width.
        base: base distribution over the features (standard normal by default).
        support: where the data live, if not in all of R^n.

    Raises:
        ValueError: one feature for coupling, or an argument out of range.

    Example:
        >>> import torch, pyroflows as pf
        >>> pf.nsf(3, scheme="autoregressive", fast="sample").fast
        'sample'
    """
    one_of("scheme", scheme, ("coupling", "autoregressive"))
    one_of("fast", fast, ("log_prob", "sample"))
    make = coupling_layer if scheme == "coupling" else autoregressive_layer
    return vector_flow(
        partial(make, hidden=hidden, activation=activation, residual=residual),
        features,
        context,
        family=family_from(family, bins=bins, bound=bound),
        layers=layers,
        linear=linear,
        invert=fast == "log_prob",
        base=base,
        support=support,
    )


EXAMPLES = {
    "nsf": Example(lambda: nsf(3, layers=2, hidden=(16, 16), bins=4), fast="both"),
    "nsf_conditional": Example(lambda: nsf(3, 2, layers=2, hidden=(16,), bins=4), fast="both"),
    "nsf_autoregressive": Example(
        lambda: nsf(3, scheme="autoregressive", layers=2, hidden=(16, 16), bins=4),
        fast="log_prob",
    ),
    "nsf_autoregressive_sample": Example(
        lambda: nsf(3, 2, scheme="autoregressive", fast="sample", layers=2, hidden=(16,), bins=4),
        fast="sample",
    ),
    "nsf_interval": Example(
        lambda: nsf(2, layers=2, hidden=(16,), bins=4, support=constraints.interval(-1.0, 2.0)),
        fast="both",
    ),
}
