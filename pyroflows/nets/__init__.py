"""Plain torch networks that know nothing of flows."""

from pyroflows.nets.conv import ConvNet, ConvResNet, FromContext
from pyroflows.nets.made import MADE
from pyroflows.nets.masked_linear import MaskedLinear
from pyroflows.nets.mlp import MLP

__all__ = ["MADE", "MLP", "MaskedLinear", "ConvNet", "ConvResNet", "FromContext"]
