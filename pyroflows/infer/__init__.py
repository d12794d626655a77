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
from pyroflows.infer.objectives import ForwardKL, ImportanceELBO, PathELBO
from pyroflows.infer.training import fit_guide
from pyroflows.infer.verdict import Report, report

__all__ = [
    "AutoFlow",
    "AutoAmortizedFlow",
    "fit_guide",
    "NeuTra",
    "PathELBO",
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
]
