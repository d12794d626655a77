"""Invertible maps: what a flow is made of."""

from pyroflows.transforms.autoregressive import Autoregressive
from pyroflows.transforms.base import Conditioned, FlowTransform, Inverse
from pyroflows.transforms.chain import Chain
from pyroflows.transforms.context_affine import ContextAffine
from pyroflows.transforms.coupling import Coupling
from pyroflows.transforms.families import Additive, Affine, Family
from pyroflows.transforms.images.conv1x1 import Conv1x1
from pyroflows.transforms.images.coupling import ImageCoupling
from pyroflows.transforms.images.masked_conv import MaskedConv
from pyroflows.transforms.images.masks import (
    all_but_channel,
    checkerboard,
    even_columns,
    even_rows,
    first_half,
)
from pyroflows.transforms.images.multiscale import MultiScale
from pyroflows.transforms.images.squeeze import Squeeze, squeeze, unsqueeze
from pyroflows.transforms.linear import LULinear, Whiten
from pyroflows.transforms.normalize import ActNorm, DiagonalScale, Standardize
from pyroflows.transforms.permute import Permute
from pyroflows.transforms.rows import RowsGivenGlobals, WhitenRows
from pyroflows.transforms.splines import RationalQuadraticSpline, Spline
from pyroflows.transforms.support import ToSupport

__all__ = [
    "FlowTransform",
    "Inverse",
    "Conditioned",
    "Chain",
    "Family",
    "Additive",
    "Affine",
    "Spline",
    "RationalQuadraticSpline",
    "Coupling",
    "Autoregressive",
    "Permute",
    "RowsGivenGlobals",
    "WhitenRows",
    "LULinear",
    "Whiten",
    "ActNorm",
    "Standardize",
    "DiagonalScale",
    "ContextAffine",
    "ToSupport",
    # of images
    "Squeeze",
    "squeeze",
    "unsqueeze",
    "MultiScale",
    "ImageCoupling",
    "checkerboard",
    "even_rows",
    "even_columns",
    "first_half",
    "all_but_channel",
    "Conv1x1",
    "MaskedConv",
]
