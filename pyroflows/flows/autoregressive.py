"""MAF and IAF: autoregressive flows, each fast in one direction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn
from torch.distributions import Distribution, constraints

from pyroflows.distributions.flow import Flow
from pyroflows.flows.assembly import Example, builder, vector_flow
from pyroflows.nets import MADE
from pyroflows.transforms import Autoregressive, Family
from pyroflows.transforms.families import family_from


def autoregressive_layer(
    features: int,
    family: Family,
    context: int,
    descending: bool,
    *,
    hidden: Sequence[int],
    activation: str,
    residual: bool,
) -> Autoregressive:
    """A MADE that sets the parameters of each feature from those before it (or after it)."""
    net = MADE(
        features,
        family.params,
        hidden=hidden,
        context=context,
        activation=activation,
        residual=residual,
        descending=descending,
    )
    return Autoregressive(net, family)


@builder
def maf(
    features: int,
    context: int = 0,
    *,
    layers: int = 5,
    hidden: Sequence[int] = (128, 128),
    family: str | Family = "affine",
    linear: str = "lu",
    bound: float | None = None,
    activation: str = "relu",
    residual: bool = True,
    base: Distribution | nn.Module | None = None,
    support: constraints.Constraint | None = None,
) -> Flow:
    """Masked autoregressive flow: scoring costs one pass; sampling is exact, at about two.

    Papamakarios et al. 2017, arXiv:1705.07057; residual nets and LU-linear maps between the layers
    as in Durkan et al. 2019, arXiv:1906.04032. Take it as a density model or a teacher.

    Args:
        features: number of features; one will do.
        context: number of context features; 0 for none.
        layers: number of autoregressive layers.
        hidden: widths of each net's hidden layers.
        family: what a layer does to each feature: ``"affine"``, ``"additive"``, ``"spline"``, the
            name of another family, or a ``pf.transforms.Family``.
        linear: what mixes the features between layers: ``"reverse"`` (they are taken ascending
            and descending in turn), ``"lu"`` (the same, and an LU-linear map), ``"lu_inverse"``
            (its inverse, for a flow that another one's inverse is to fit) or ``"permute"``.
        bound: of a family by name: largest absolute log-scale of an affine layer (log 5 by
            default), half-width of a spline's box (5 by default).
        activation: of the nets.
        residual: skips between hidden layers of equal width.
        base: base distribution over the features (standard normal by default).
        support: where the data live, if not in all of R^n.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch, pyroflows as pf
        >>> pf.maf(3).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    return vector_flow(
        partial(autoregressive_layer, hidden=hidden, activation=activation, residual=residual),
        features,
        context,
        family=family_from(family, bound=bound),
        layers=layers,
        linear=linear,
        invert=True,
        base=base,
        support=support,
    )


@builder
def iaf(
    features: int,
    context: int = 0,
    *,
    layers: int = 5,
    hidden: Sequence[int] = (128, 128),
    family: str | Family = "affine",
    linear: str = "lu",
    bound: float | None = None,
    activation: str = "relu",
    residual: bool = True,
    base: Distribution | nn.Module | None = None,
    support: constraints.Constraint | None = None,
) -> Flow:
    """Inverse autoregressive flow: sampling, and scoring own samples, cost one pass.

    Scoring other points is exact, at about two passes. Kingma et al. 2016, arXiv:1606.04934. Take
    it as a variational guide or a student.

    Args:
        features: number of features; one will do.
        context: number of context features; 0 for none.
        layers: number of autoregressive layers.
        hidden: widths of each net's hidden layers.
        family: what a layer does to each feature: ``"affine"``, ``"additive"``, ``"spline"``, the
            name of another family, or a ``pf.transforms.Family``.
        linear: what mixes the features between layers: ``"reverse"`` (they are taken ascending
            and descending in turn), ``"lu"`` (the same, and an LU-linear map), ``"lu_inverse"``
            (its inverse, for a flow that another one's inverse is to fit) or ``"permute"``.
        bound: of a family by name: largest absolute log-scale of an affine layer (log 5 by
            default), half-width of a spline's box (5 by default).
        activation: of the nets.
        residual: skips between hidden layers of equal width.
        base: base distribution over the features (standard normal by default).
        support: where the data live, if not in all of R^n.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import pyroflows as pf
        >>> x, log_q = pf.iaf(3).rsample_and_log_prob((5,))
        >>> x.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """
    return vector_flow(
        partial(autoregressive_layer, hidden=hidden, activation=activation, residual=residual),
        features,
        context,
        family=family_from(family, bound=bound),
        layers=layers,
        linear=linear,
        invert=False,
        base=base,
        support=support,
    )


EXAMPLES = {
    "maf": Example(lambda: maf(3, layers=2, hidden=(16, 16)), fast="log_prob"),
    "maf_conditional": Example(lambda: maf(3, 2, layers=2, hidden=(16,)), fast="log_prob"),
    "maf_one_feature": Example(lambda: maf(1, layers=2, hidden=(8,)), fast="log_prob"),
    "iaf": Example(lambda: iaf(3, layers=2, hidden=(16, 16)), fast="sample"),
    "iaf_conditional": Example(lambda: iaf(3, 2, layers=2, hidden=(16,)), fast="sample"),
    "iaf_reverse": Example(
        lambda: iaf(4, layers=2, hidden=(16, 12), linear="reverse", residual=False), fast="sample"
    ),
    "iaf_simplex": Example(
        lambda: iaf(3, layers=2, hidden=(16,), support=constraints.simplex), fast="sample"
    ),
}
