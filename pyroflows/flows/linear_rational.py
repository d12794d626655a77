"""Linear rational splines, a family for ``pf.nsf``, ``pf.maf`` and the others in one file."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyroflows.flows.assembly import Example
from pyroflows.flows.autoregressive import iaf, maf
from pyroflows.flows.coupling import realnvp
from pyroflows.transforms.splines import Bin, Spline


@dataclass(frozen=True)
class LinearRationalSpline(Spline):
    r"""Two linear rational pieces in each bin: the inverse is one of the same kind, without roots.

    The pieces meet at a fraction :math:`\lambda` of the bin's width, learnt within (0.025, 0.975).
    Dolatabadi, Erfani & Leckie 2020, arXiv:2001.05168, algorithm 1 and eqs. 5-7.

    Example:
        >>> import pyroflows as pf
        >>> pf.maf(2, family="linear_rational_spline").fast
        'log_prob'
    """

    name = "linear_rational_spline"
    per_bin = 1

    def bin_forward(self, x: Tensor, at: Bin) -> tuple[Tensor, Tensor]:
        """A ratio of linear functions of the fraction of the bin (eq. 5)."""
        fraction = ((x - at.x) / at.width).clamp(0, 1)
        middle, height, above, last, inner = _weights(at)
        below = fraction <= middle
        rest, past = 1 - fraction, fraction - middle
        top = torch.where(below, inner * height * fraction, inner * height * rest + last * past)
        bottom = torch.where(below, inner * fraction - past, inner * rest + last * past)
        slope = torch.where(below, middle * height, (1 - middle) * last * above) * inner
        log_derivative = (slope * at.height / at.width).log() - 2 * bottom.log()
        return at.y + at.height * top / bottom, log_derivative

    def bin_inverse(self, y: Tensor, at: Bin) -> tuple[Tensor, Tensor]:
        """The same ratio, solved for the fraction of the width (eq. 7)."""
        share = ((y - at.y) / at.height).clamp(0, 1)
        middle, height, _, last, inner = _weights(at)
        below = share <= height
        rest, past = last * (1 - share), inner * (share - height)
        top = torch.where(below, middle * share, middle * rest + past)
        x = at.x + at.width * top / torch.where(below, share - past, rest + past)
        return x, -self.bin_forward(x, at)[1]


def _weights(at: Bin) -> tuple[Tensor, ...]:
    """Where the pieces meet: shares of width, of height and of what is above; then the weights.

    Those are of the upper knot and of where the pieces meet.
    """
    middle = 0.025 + 0.95 * at.raw[..., 0].sigmoid()
    last = (at.first / at.last).sqrt()  # the lower knot's weight is one
    whole = 1 - middle + middle * last
    height, above = middle * last / whole, (1 - middle) / whole
    inner = (middle * at.first + (1 - middle) * last * at.last) * at.width / at.height
    return middle, height, above, last, inner


SMALL: dict[str, Any] = {"family": LinearRationalSpline(bins=4), "layers": 2, "hidden": (16,)}
EXAMPLES = {
    "maf_linear_rational": Example(lambda: maf(3, **SMALL), fast="log_prob"),
    "iaf_linear_rational": Example(lambda: iaf(3, 2, **SMALL), fast="sample"),
    "realnvp_linear_rational": Example(lambda: realnvp(3, **SMALL), fast="both"),
}
