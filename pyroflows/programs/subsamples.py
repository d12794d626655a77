"""The log-density of all rows, of a model that sees a part of them at a time.

A plate of N rows with ``subsample_size=n`` scales what it sees by N / n. Averaged over subsamples
that together have every row equally often, that is exactly the density of all rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pyroflows.programs.log_density import LogDensity, Ran, Subsampled


def runs_of_all_rows(log_density: LogDensity, latent: Tensor) -> Ran:
    """Run a model at vectors ``(n, latent_dim)``; where it draws subsamples, over all rows.

    One run for a model that sees all rows; else as many as the least common multiple of N and n
    has subsamples, N / n where that is whole.

    Args:
        log_density: of the model.
        latent: the vectors.

    Raises:
        ValueError: the model gets a part of its rows by its arguments, so the others are unknown;
            or several plates draw subsamples.
    """
    plates = log_density.subsampled(latent[0])
    if not plates:
        return log_density.run(latent)
    if len(plates) > 1:
        raise ValueError(
            f"model: plates {', '.join(repr(p.name) for p in plates)} draw subsamples, each of its "
            "own; a guide is judged by all rows, so pass them and no subsample_size"
        )
    (plate,) = plates
    total, runs, ran = latent.new_zeros(len(latent)), 0, None
    seen: set[float] = set()
    for rows in _parts(plate):
        ran = log_density.with_rows({plate.name: rows}).run(latent)
        total, runs = total + ran.log_p, runs + 1
        seen.add(ran.log_p[0].item())
        if runs == 2 and len(seen) == 1:
            raise _part_by_arguments(plate)
    assert ran is not None
    return ran._replace(log_p=total / runs)


@torch.no_grad()
def sees_all_rows(log_density: LogDensity, latent: Tensor) -> bool:
    """Whether a model that draws subsamples can be run at all its rows, by three runs of it.

    Args:
        log_density: of the model.
        latent: a vector where it can be run, ``(latent_dim,)``.
    """
    plates = log_density.subsampled(latent)
    if len(plates) != 1 or plates[0].given:
        return False
    (plate,) = plates
    parts = itertools.islice(_parts(plate), 2)
    seen = [log_density.with_rows({plate.name: rows}).run(latent).log_p for rows in parts]
    return bool(seen[0] != seen[-1])


def _parts(plate: Subsampled) -> Iterator[Tensor]:
    """Subsamples that together have every row equally often."""
    if plate.given:
        raise _part_by_arguments(plate)
    size, part = plate.full_size, plate.size
    for start in range(0, math.lcm(size, part), part):
        yield (torch.arange(part) + start) % size


def _part_by_arguments(plate: Subsampled) -> ValueError:
    return ValueError(
        f"model: it sees {plate.size} of the {plate.full_size} rows of the plate {plate.name!r}, "
        "and which ones its arguments say; a guide is judged by all rows, so pass the whole data "
        "and no subsample"
    )
