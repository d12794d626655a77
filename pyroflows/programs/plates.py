"""The plate of an amortised guide: what the model makes of it, and what may be in it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.distributions import biject_to, constraints

from pyroflows._pyro.guides import FreeSite
from pyroflows.programs.circles import is_angle


class Plate(NamedTuple):
    """The arguments of a ``pyro.plate``; ``subsample`` may be indices or the batch itself."""

    size: int
    subsample_size: int | None
    subsample: Tensor | Sequence | None
    device: torch.device

    @property
    def items(self) -> int:
        """How many items the (sub)sample has."""
        if self.subsample is not None:
            return len(self.subsample)
        return self.size if self.subsample_size is None else min(self.subsample_size, self.size)

    @property
    def takes_a_part(self) -> bool:
        """Whether the plate may see fewer items than ``size``."""
        return self.subsample is not None or self.subsample_size is not None


class _Found(Exception):
    def __init__(self, plate: Plate) -> None:
        super().__init__("the model has reached its plate")
        self.plate = plate


class _PlateFinder(Messenger):
    """Stops a model where it makes the plate of that name, before anything is drawn for it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name and site_is_subsample(msg):
            fn = msg["fn"]
            raise _Found(Plate(fn.size, fn.subsample_size, msg["value"], fn.device))


def plate_of(model: Callable[..., Any], name: str, args: tuple, kwargs: dict) -> Plate:
    """What plate of that name the model makes of these arguments; it runs no further.

    Args:
        model: conditioned, so that it draws nothing before its plate.
        name: the plate's.
        args: the model's arguments.
        kwargs: its keyword arguments.

    Raises:
        ValueError: the model has run to its end without making one.
    """
    with torch.no_grad(), poutine.block():
        try:
            with _PlateFinder(name):
                model(*args, **kwargs)
        except _Found as found:
            return found.plate
    raise ValueError(
        f"model: expected a pyro.plate({name!r}, size) made where the model runs, "
        "got one made outside of it or without a size"
    )


def plate_of_rows(name: str, dim: int, size: int | None, rows: Tensor) -> pyro.plate:
    """A plate for an encoder's rows where there is no model to run.

    Its indices are no site of the guide: they are not those of the model's items.

    Args:
        name: the plate's.
        dim: its dimension.
        size: of the full plate, of which the rows are a part; None for as many as there are rows.
        rows: ``(items, context)``.

    Raises:
        ValueError: there are more rows than the full plate has items.
    """
    items = len(rows)
    size = items if size is None else size
    if items > size:
        raise ValueError(
            f"encoder: expected at most {size} rows, the size of the plate {name!r} when the guide "
            f"was set up, got {items}; for a plate of another size pass model= to pf.load"
        )
    indices = torch.arange(items, device=rows.device)
    with poutine.block():
        return pyro.plate(name, size, subsample=indices, dim=dim, device=str(rows.device))


def plate_with_latents(latents: dict[str, Any]) -> tuple[str, int]:
    """Name and dimension of the one plate that has latent sites in it.

    Args:
        latents: the model's latent sites, by name.

    Raises:
        ValueError: there is none, there are several, or a site is discrete or an angle.
    """
    found: dict[str, tuple[str, int]] = {}
    for name, site in latents.items():
        if is_angle(site["fn"]):
            raise ValueError(
                f"model: latent site {name!r} is an angle, whose chart of the line has its seam "
                "elsewhere for each item; use ProjectedNormal of two numbers with "
                f"poutine.reparam(config={{{name!r}: ProjectedNormalReparam()}}), or pf.AutoFlow"
            )
        if site["fn"].has_enumerate_support or site["fn"].support.is_discrete:
            raise ValueError(
                f"model: expected continuous latent sites, got {name!r}, a discrete "
                f"{type(site['fn']).__name__}; sum it out, or hide it with poutine.block and "
                "enumerate it"
            )
        frames = site["cond_indep_stack"]
        if len(frames) > 1 or any(not frame.vectorized for frame in frames):
            kinds = [f.name if f.vectorized else f"{f.name} (sequential)" for f in frames]
            raise ValueError(
                f"model: expected latent site {name!r} in one vectorised plate at most, got "
                f"plates {', '.join(kinds)}; inside the outer plate, make it one event with "
                ".to_event(1)"
            )
        for frame in frames:
            found[name] = frame.name, frame.dim
    if not found:
        raise ValueError(
            "model: expected latent sites inside a plate, found none; for global latent variables "
            "alone use pf.AutoFlow"
        )
    (first, plate), *others = found.items()
    for name, other in others:
        if other != plate:
            raise ValueError(
                f"model: expected one plate with latent sites, got {first!r} in plate "
                f"{plate[0]!r} and {name!r} in plate {other[0]!r}; where one of them has a fixed "
                "size, give its site .to_event(1) in place of the plate"
            )
    return plate


def local_sites(nodes: dict[str, Any], plate_dim: int) -> tuple[tuple[FreeSite, ...], Tensor]:
    """One item's part of the sites in a plate, and where it starts: at the mean over the items.

    Args:
        nodes: the sites, as in a trace.
        plate_dim: dimension of their plate.

    Returns:
        The sites, and their stacked unconstrained start ``(size,)``.

    Raises:
        ValueError: bounds that differ from item to item, or a site with other batch dimensions.
    """
    sites, starts = [], []
    for name, node in nodes.items():
        free = biject_to(node["fn"].support).inv(node["value"])
        shape = free.shape[len(node["fn"].batch_shape) :]
        sites.append(FreeSite(name, shape, _support_of_any_item(name, node, plate_dim)))
        starts.append(free.reshape(-1, shape.numel()).mean(dim=0))
    return tuple(sites), torch.cat(starts)


def _support_of_any_item(name: str, site: Any, plate_dim: int) -> constraints.Constraint:
    """The site's support without the plate's size: its bounds once, not once an item.

    Args:
        name: the site's.
        site: as in a trace.
        plate_dim: dimension of its plate.

    Raises:
        ValueError: the bounds differ from item to item, or the site has another batch dimension.
    """

    def narrowed(support: constraints.Constraint, axis: int) -> constraints.Constraint:
        support = copy.copy(support)
        if isinstance(support, constraints.independent):
            inner = axis - support.reinterpreted_batch_ndims
            support.base_constraint = narrowed(support.base_constraint, inner)
            return support
        for key, bound in vars(support).items():
            if isinstance(bound, Tensor) and bound.dim() >= -axis:
                once = bound.narrow(axis, 0, 1)
                if not (bound == once).all():
                    raise ValueError(
                        f"model: expected latent site {name!r} to have the same support for every "
                        f"item of the plate, got {key} from {bound.min():g} to {bound.max():g}"
                    )
                setattr(support, key, once)
        return support

    fn = site["fn"]
    if len(fn.batch_shape) != -plate_dim or fn.batch_shape[1:] != Size([1] * (-plate_dim - 1)):
        raise ValueError(
            f"model: expected latent site {name!r} to have no batch dimension but the plate's, "
            f"got batch shape {tuple(fn.batch_shape)}; declare the others with .to_event()"
        )
    return narrowed(fn.support, plate_dim)


def check_rows(rows: Any, plate: Plate | None) -> None:
    """The encoder's output has a row for each item of the plate, or of its subsample.

    Args:
        rows: what the encoder returned.
        plate: None for any number of rows.

    Raises:
        ValueError: it has not.
    """
    if not isinstance(rows, Tensor) or rows.dim() != 2:
        came = f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"encoder: expected a tensor (items, context), got {came}")
    if plate is None:
        return
    indexed = plate.subsample is None or (
        isinstance(plate.subsample, Tensor)
        and plate.subsample.dim() == 1
        and not plate.subsample.is_floating_point()
    )
    if len(rows) != plate.items and not (indexed and len(rows) == plate.size):
        full = f", or {plate.size} for the full plate" if indexed else ""
        raise ValueError(
            f"encoder: expected {plate.items} rows, one for each item of the plate{full}, "
            f"got {len(rows)}"
        )
