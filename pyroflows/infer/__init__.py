"""Variational inference with flows."""

from pyroflows.infer.amortized import AutoAmortizedFlow
from pyroflows.infer.guides import AutoFlow
from pyroflows.infer.importance import (
    WeightedDraws,
    effective_size,
    importance_weights,
    khat,
    khat_threshold,
    psis,
)
from pyroflows.infer.neutra import NeuTra
from pyroflows.infer.objectives import DensityELBO, ForwardKL, ImportanceELBO, PathELBO
from pyroflows.infer.posterior import Posterior, sample_posterior
from pyroflows.infer.training import fit_guide
from pyroflows.infer.verdict import Report, report
from pyroflows.programs.log_density import LogDensity

__all__ = [
    "AutoFlow",
    "AutoAmortizedFlow",
    "LogDensity",
    "fit_guide",
    "NeuTra",
    "PathELBO",
    "DensityELBO",
    "ImportanceELBO",
    "ForwardKL",
    "importance_weights",
    "WeightedDraws",
    "psis",
    "khat",
    "khat_threshold",
    "effective_size",
    "report",
    "Report",
    "sample_posterior",
    "Posterior",
]
