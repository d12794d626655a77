"""NICE and RealNVP: coupling flows, one pass in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.distributions import Distribution, constraints

from pyroflows._checks import checked_int
from pyroflows.distributions.flow import Flow
from pyroflows.flows.assembly import Example, builder, vector_flow
from pyroflows.nets import MLP
from pyroflows.transforms import Additive, Coupling, Family
from pyroflows.transforms.families import family_from


def coupling_layer(
    features: int,
    family: Family,
    context: int,
    descending: bool,
    *,
    hidden: Sequence[int],
    activation: str,
    residual: bool,
) -> Coupling:
    """A coupling that keeps the first half of the features (or the last) and moves the others.

    Raises:
        ValueError: there is one feature.
    """
    why = " for a coupling flow, which splits them (pf.maf or pf.iaf takes one)"
    features = checked_int("features", features, 2, why)
    mask = torch.arange(features) < features // 2
    mask = mask.flip(0) if descending else mask
    kept = int(mask.sum())
    net = MLP(
        kept,
        (features - kept) * family.params,
        hidden=hidden,
        context=context,
        activation=activation,
        residual=residual,
    )
    return Coupling(net, family, mask)


@builder
def nice(
    features: int,
    context: int = 0,
    *,
    layers: int = 6,
    hidden: Sequence[int] = (128, 128),
    linear: str = "permute",
    activation: str = "relu",
    residual: bool = True,
    base: Distribution | nn.Module | None = None,
    support: constraints.Constraint | None = None,
) -> Flow:
    """NICE: additive couplings, then one scale a feature. Volume-preserving up to that scale.

    Sampling and scoring cost one pass each. Dinh et al. 2015, arXiv:1410.8516.

    Args:
        features: number of features, at least two.
        context: number of context features; 0 for none.
        layers: number of couplings.
        hidden: widths of each net's hidden layers.
        linear: what mixes the features between couplings: ``"reverse"`` (the halves swap roles),
            ``"lu"`` (the same, and an LU-linear map) or ``"permute"``.
        activation: of the nets.
        residual: skips between hidden layers of equal width.
        base: base distribution over the features (standard normal by default). The paper's prior
            for images, flattened to 784 pixels, is
            ``dist.Logistic(torch.zeros(784), torch.ones(784)).to_event(1)`` of ``pyro``.
        support: where the data live, if not in all of R^n.

    Raises:
        ValueError: one feature, or an argument out of range.

    Example:
        >>> import torch, pyroflows as pf
        >>> pf.nice(3).sample((5,)).shape
        torch.Size([5, 3])
    """
    return vector_flow(
        partial(coupling_layer, hidden=hidden, activation=activation, residual=residual),
        features,
        context,
        family=Additive(),
        layers=layers,
        linear=linear,
        invert=False,
        scale=True,
        base=base,
        support=support,
    )


@builder
def realnvp(
    features: int,
    context: int = 0,
    *,
    layers: int = 8,
    hidden: Sequence[int] = (128, 128),
    family: str | Family = "affine",
    linear: str = "lu",
    bound: float | None = None,
    activation: str = "relu",
    residual: bool = True,
    base: Distribution | nn.Module | None = None,
    support: constraints.Constraint | None = None,
) -> Flow:
    """RealNVP: affine couplings. Sampling and scoring cost one pass each.

    Dinh et al. 2017, arXiv:1605.08803; LU-linear maps between the layers as in Glow.

    Args:
        features: number of features, at least two.
        context: number of context features; 0 for none.
        layers: number of couplings.
        hidden: widths of each net's hidden layers.
        family: what a layer does to each feature: ``"affine"``, ``"additive"``, ``"spline"``, the
            name of another family, or a ``pf.transforms.Family``.
        linear: what mixes the features between couplings: ``"reverse"`` (the halves swap roles),
            ``"lu"`` (the same, and an LU-linear map) or ``"permute"``.
        bound: of a family by name: largest absolute log-scale of an affine layer (log 5 by
            default), half-width of a spline's box (5 by default).
        activation: of the nets.
        residual: skips between hidden layers of equal width.
        base: base distribution over the features (standard normal by default).
        support: where the data live, if not in all of R^n.

    Raises:
        ValueError: one feature, or an argument out of range.

    Example:
        >>> import torch, pyroflows as pf
        >>> pf.realnvp(3, context=2)(torch.zeros(5, 2)).batch_shape
        torch.Size([5])
    """
    return vector_flow(
        partial(coupling_layer, hidden=hidden, activation=activation, residual=residual),
        features,
        context,
        family=family_from(family, bound=bound),
        layers=layers,
        linear=linear,
        invert=True,
        base=base,
        support=support,
    )


EXAMPLES = {
    "nice": Example(lambda: nice(3, layers=3, hidden=(16, 16)), fast="both"),
    "nice_conditional": Example(lambda: nice(3, 2, layers=3, hidden=(16,)), fast="both"),
    "realnvp": Example(lambda: realnvp(3, layers=2, hidden=(16, 16)), fast="both"),
    "realnvp_conditional": Example(lambda: realnvp(4, 2, layers=2, hidden=(16,)), fast="both"),
    "realnvp_positive": Example(
        lambda: realnvp(2, layers=2, hidden=(16,), support=constraints.positive), fast="both"
    ),
}
