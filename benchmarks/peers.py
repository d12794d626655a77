"""The same flows in other libraries: affine and spline autoregressive, no residuals, no mixing.

Each function takes ``(features, hidden, layers)`` and returns a ``Contender`` or None where the
library has no such flow. ``scores_fast`` is the MAF's orientation, the other the IAF's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
from torch import Tensor, nn

import pyroflows as pf

BINS = 8


@dataclass
class Contender:
    """A flow of some library.

    Attributes:
        module: holds the parameters.
        log_prob: scores ``(rows, features)``.
        sample: draws ``n`` rows.
        compiled: runs under ``torch.compile``, and trains with one kernel for all parameters, as
            ``pf.fit(compile=True)`` does.
    """

    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]
    compiled: bool = False

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.module.parameters())


def pyroflows(
    features: int, hidden: int, layers: int, spline: bool, scores_fast: bool
) -> Contender:
    """This project, with the peers' architecture."""
    arguments = {"layers": layers, "hidden": (hidden, hidden), "linear": "reverse"}
    arguments["residual"] = False
    if spline:
        fast = "log_prob" if scores_fast else "sample"
        flow = pf.nsf(features, scheme="autoregressive", fast=fast, bins=BINS, **arguments)
    else:
        flow = (pf.maf if scores_fast else pf.iaf)(features, **arguments)
    return Contender(flow, flow.log_prob, lambda n: flow.sample((n,)))


def pyroflows_residual(
    features: int, hidden: int, layers: int, spline: bool, scores_fast: bool
) -> Contender | None:
    """The same with its parameter-free skips, which a builder adds unless told not to."""
    if spline:
        return None
    sizes = {"layers": layers, "hidden": (hidden, hidden)}
    flow = (pf.maf if scores_fast else pf.iaf)(features, linear="reverse", **sizes)
    return Contender(flow, flow.log_prob, lambda n: flow.sample((n,)))


def pyroflows_default(
    features: int, hidden: int, layers: int, spline: bool, scores_fast: bool
) -> Contender | None:
    """This project as its users get it: LU-linear maps and residual nets of default width."""
    if spline:
        return None
    flow = (pf.maf if scores_fast else pf.iaf)(features, layers=layers)
    return Contender(flow, flow.log_prob, lambda n: flow.sample((n,)))


def pyroflows_compiled(
    features: int, hidden: int, layers: int, spline: bool, scores_fast: bool
) -> Contender | None:
    """The first again, under ``torch.compile``, which unrolls solves of few features only."""
    made = pyroflows(features, hidden, layers, spline, scores_fast)
    score = torch.compile(lambda x: made.module(validate_args=False).log_prob(x))
    sample = torch.compile(lambda n: made.module(validate_args=False).sample((n,)))
    return Contender(made.module, score, sample, compiled=True)


def pyro(features: int, hidden: int, layers: int, spline: bool, scores_fast: bool) -> Contender:
    """Pyro's own layers, inverted for the MAF as its users do, caches cleared before each use."""

    def layer() -> nn.Module:
        if spline:
            return pyro_transforms.spline_autoregressive(features, [hidden] * 2, count_bins=BINS)
        return pyro_transforms.affine_autoregressive(features, [hidden] * 2)

    made = nn.ModuleList(layer() for _ in range(layers))
    base = dist.Normal(torch.zeros(features), torch.ones(features)).to_event(1)

    def flow() -> dist.TransformedDistribution:
        for part in made:
            part.clear_cache()
        return dist.TransformedDistribution(base, [t.inv if scores_fast else t for t in made])

    return Contender(made, lambda x: flow().log_prob(x), lambda n: flow().sample((n,)))


def zuko(features: int, hidden: int, layers: int, spline: bool, scores_fast: bool) -> Contender:
    """The same by zuko."""
    from zuko.distributions import NormalizingFlow
    from zuko.flows import MAF, NSF

    arguments = {"transforms": layers, "hidden_features": (hidden, hidden)}
    made = NSF(features, bins=BINS, **arguments) if spline else MAF(features, **arguments)

    def flow() -> NormalizingFlow:
        forward = made()
        if scores_fast:
            return forward
        return NormalizingFlow(forward.transform.inv, forward.base)

    return Contender(made, lambda x: flow().log_prob(x), lambda n: flow().sample((n,)))


def nflows(
    features: int, hidden: int, layers: int, spline: bool, scores_fast: bool
) -> Contender | None:
    """The same by nflows."""
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import (
        CompositeTransform,
        InverseTransform,
        MaskedAffineAutoregressiveTransform,
        MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
        ReversePermutation,
    )

    nets = {"hidden_features": hidden, "num_blocks": 1, "use_residual_blocks": False}

    def layer() -> nn.Module:
        if spline:
            return MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                features, num_bins=BINS, tails="linear", tail_bound=5.0, **nets
            )
        return MaskedAffineAutoregressiveTransform(features, **nets)

    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [ReversePermutation(features), layer()]
    transform = CompositeTransform(parts)
    flow = Flow(
        transform if scores_fast else InverseTransform(transform), StandardNormal([features])
    )
    return Contender(flow, flow.log_prob, lambda n: flow.sample(n))


def normflows(
    features: int, hidden: int, layers: int, spline: bool, scores_fast: bool
) -> Contender | None:
    """The same by normflows; what it calls a MAF samples fast, its splines score fast."""
    if scores_fast != spline:
        return None
    import normflows as nf

    nets = {"num_blocks": 1}
    if spline:
        parts = [
            nf.flows.AutoregressiveRationalQuadraticSpline(
                features, 1, hidden, num_bins=BINS, tail_bound=5.0
            )
            for _ in range(layers)
        ]
    else:
        parts = [
            nf.flows.MaskedAffineAutoregressive(features, hidden, use_residual_blocks=False, **nets)
            for _ in range(layers)
        ]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(features, trainable=False), parts)
    return Contender(flow, flow.log_prob, lambda n: flow.sample(n)[0])


def available() -> dict[str, Callable[..., Contender | None]]:
    """What is installed, this project first."""
    others = {"zuko": zuko, "nflows": nflows, "normflows": normflows}
    return {
        "pyroflows": pyroflows,
        "pyroflows (residual)": pyroflows_residual,
        "pyroflows (default)": pyroflows_default,
        "pyroflows (compiled)": pyroflows_compiled,
        "pyro": pyro,
        **{name: make for name, make in others.items() if importlib.util.find_spec(name)},
    }
