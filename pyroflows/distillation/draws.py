"""Draws of a flow and their scores, in chunks and without a graph."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroflows.data.rows import Rows
from pyroflows.distributions.flow import Flow

_CHUNK = 10_000


class Contexts:
    """Contexts to draw under: none, or random ones of these rows."""

    def __init__(self, rows: Tensor | None) -> None:
        self.rows = rows

    def to(self, device: torch.device) -> Contexts:
        """The same on another device."""
        return Contexts(None if self.rows is None else self.rows.to(device))

    def draw(self, n: int) -> Tensor | None:
        """``n`` of the rows, with replacement; None where there are none."""
        if self.rows is None:
            return None
        return self.rows[torch.randint(len(self.rows), (n,), device=self.rows.device)]


@torch.no_grad()
def drawn(flow: Flow, context: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """``n`` draws, one under each context, and their log-densities; in chunks, without a graph."""
    parts = []
    for start in range(0, n, _CHUNK):
        part = None if context is None else context[start : start + _CHUNK]
        shape = (min(_CHUNK, n - start),) if context is None else ()
        parts.append(flow(part, validate_args=False).rsample_and_log_prob(shape))
    x, log_prob = zip(*parts, strict=True)
    return torch.cat(x), torch.cat(log_prob)


@torch.no_grad()
def scored(flow: Flow, x: Tensor, context: Tensor | None) -> Tensor:
    """Log-densities in nats, in chunks, each row like any other value."""
    parts = Rows(x.clone(), context).chunks(_CHUNK)
    return torch.cat([flow(p.context, validate_args=False).log_prob(p.x) for p in parts])


def divergence_on(draws: tuple[Tensor, Tensor], other: Flow, context: Tensor | None) -> Tensor:
    """``log p(x) - log q(x)`` for each draw x of p: its mean is KL(p || q)."""
    x, log_p = draws
    return log_p - scored(other, x, context)
