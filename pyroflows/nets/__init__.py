"""Plain torch networks that know nothing of flows."""

from pyroflows.nets.causal import CausalConv
from pyroflows.nets.conv import ConvNet, ConvResNet, FromContext
from pyroflows.nets.made import MADE
from pyroflows.nets.masked_linear import MaskedLinear
from pyroflows.nets.mlp import MLP
from pyroflows.nets.pixel import PixelNet

__all__ = [
    "MADE",
    "MLP",
    "CausalConv",
    "MaskedLinear",
    "PixelNet",
    "ConvNet",
    "ConvResNet",
    "FromContext",
]
