"""What all networks here have in common that can drop hidden numbers while they are trained."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Dropping(nn.Module):
    """A network with dropout (Srivastava et al. 2014, JMLR 15) by a share that is no part of it.

    Whoever trains sets it, for the time it does: no state and no argument has it.

    Attributes:
        dropout: share of the hidden numbers to drop while training.
    """

    dropout: float = 0.0

    def drop(self, h: Tensor) -> Tensor:
        """Some of a hidden layer's numbers set to zero, while training and if that is asked for."""
        return F.dropout(h, self.dropout) if self.dropout and self.training else h
