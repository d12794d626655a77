"""Probability density distillation: a flow that samples fast, trained on one that scores fast."""

from pyroflows.distill.report import Distillation
from pyroflows.distill.student import student_of
from pyroflows.distill.train import distill

__all__ = ["Distillation", "distill", "student_of"]
