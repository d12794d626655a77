"""Probability density distillation: a flow that samples fast, trained on one that scores fast."""

from pyroflows.distillation.comparison import compare
from pyroflows.distillation.report import Distillation
from pyroflows.distillation.student import student_of
from pyroflows.distillation.training import distill

__all__ = ["Distillation", "compare", "distill", "student_of"]
