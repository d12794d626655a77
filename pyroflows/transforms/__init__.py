"""Invertible maps: what a flow is made of."""

from pyroflows.transforms.autoregressive import Autoregressive
from pyroflows.transforms.base import Conditioned, FlowTransform, Inverse
from pyroflows.transforms.chain import Chain
from pyroflows.transforms.context_affine import ContextAffine
from pyroflows.transforms.coupling import Coupling
from pyroflows.transforms.elementwise import Additive, Affine, Family, RationalQuadraticSpline
from pyroflows.transforms.linear import LULinear, Whiten
from pyroflows.transforms.normalize import ActNorm, DiagonalScale, Standardize
from pyroflows.transforms.permute import Permute
from pyroflows.transforms.support import ToSupport

__all__ = [
    "FlowTransform",
    "Inverse",
    "Conditioned",
    "Chain",
    "Family",
    "Additive",
    "Affine",
    "RationalQuadraticSpline",
    "Coupling",
    "Autoregressive",
    "Permute",
    "LULinear",
    "Whiten",
    "ActNorm",
    "Standardize",
    "DiagonalScale",
    "ContextAffine",
    "ToSupport",
]
