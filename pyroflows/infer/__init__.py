"""Variational inference with flows."""

from pyroflows.infer.fit_guide import fit_guide
from pyroflows.infer.guides import AutoFlow
from pyroflows.infer.neutra import NeuTra

__all__ = ["AutoFlow", "fit_guide", "NeuTra"]
