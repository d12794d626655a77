"""Variational inference with flows."""

from pyroflows.infer.amortized import AutoAmortizedFlow
from pyroflows.infer.fit_guide import fit_guide
from pyroflows.infer.guides import AutoFlow

__all__ = ["AutoFlow", "AutoAmortizedFlow", "fit_guide"]
