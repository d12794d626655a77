"""Normalizing flows as first-class citizens of Pyro: a flow is a module whose call is a distribution."""

from pyroflows import nets, transforms
from pyroflows.distribution import Flow, FlowConstraint, FlowDistribution
from pyroflows.flows import iaf, maf, nice, nsf, realnvp
from pyroflows.transforms import Chain, FlowTransform

__version__ = "0.1.0"
__all__ = ["Flow","FlowDistribution","FlowConstraint","FlowTransform","Chain","transforms","nets","nice","realnvp","maf","iaf","nsf"]
