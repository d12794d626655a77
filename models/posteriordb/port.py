"""What a port is: a posterior of posteriordb as a Pyro model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from regressions import Data

CHUNK = 500  # draws run at once: 12,573 rows at 10,000 draws would be 1 GB a tensor


def as_they_are(draws: Data, data: Data | None = None) -> Data:
    """Change nothing."""
    return draws


def from_zero(*keys: str) -> Callable[[Data], Data]:
    """Change Stan's indices, which count from 1, to integers that count from 0."""

    def prepared(d: Data) -> Data:
        return {**d, **{key: d[key].long() - 1 for key in keys}}

    return prepared


def each(program: Callable[[Data], Any], draws: Data) -> Any:
    """Run a program at every draw at once, as if at each alone.

    Args:
        program: a function of one draw; it may run a Pyro model that it conditions on the draw.
        draws: ``(draws, *shape)`` each.

    Returns:
        What the program returns, stacked.
    """
    with pyro.validation_enabled(False):  # checks of values cannot look into a batch
        return torch.func.vmap(program, chunk_size=CHUNK)(draws)


@dataclass(frozen=True)
class Port:
    """A posterior as a Pyro model.

    Attributes:
        model: the model, a function of the prepared data.
        parameters: names of the reference parameters; each is a latent or a deterministic site.
        prepare: makes the model's data from Stan's, once.
        to_latents: the model's latent sites from reference draws and prepared data.
    """

    model: Callable[[Data], None]
    parameters: tuple[str, ...] = ("beta", "sigma")
    prepare: Callable[[Data], Data] = as_they_are
    to_latents: Callable[[Data, Data], Data] = as_they_are

    def parameters_of(self, latents: Data, data: Data) -> Data:
        """The reference parameters that belong to latent sites.

        Args:
            latents: ``(draws, *event_shape)`` for each latent site.
            data: the prepared data.

        Returns:
            ``(draws, *event_shape)`` for each of ``parameters``.
        """

        def of_one(values: Data) -> Data:
            trace = poutine.trace(poutine.condition(self.model, data=values)).get_trace(data)
            return {name: trace.nodes[name]["value"] for name in self.parameters}

        return each(of_one, latents)
