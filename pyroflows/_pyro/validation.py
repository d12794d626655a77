"""Whether distributions check their arguments, which torch keeps in a private name."""

from __future__ import annotations

from torch.distributions import Distribution


def validates_args() -> bool:
    """What ``Distribution.set_default_validate_args`` was set to last, or torch's own default."""
    return Distribution._validate_args
