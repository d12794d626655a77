"""Stan's log-densities written out once more, without Pyro: what the ports are compared with.

``LOG_DENSITIES`` maps a Stan model's name to a function of its parameters, as Stan constrains them,
and of its data, as posteriordb keeps them. The functions follow Stan's text line by line, constants
left out and Jacobians not counted.
"""

from transcribed import (  # they register what they hold
    counted,
    grouped,
    items,
    lines,
    logits,
    radon,
    states,
    structures,
)
from transcribed.numerics import LOG_DENSITIES

FAMILIES = (counted, grouped, items, lines, logits, radon, states, structures)

__all__ = ["FAMILIES", "LOG_DENSITIES"]
