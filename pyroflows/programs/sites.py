"""What a guide learned of its model: enough to set the guide up again without the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyroflows._pyro.guides import FreeSite, LatentSite
from pyroflows.programs.supports import bijection
from pyroflows.programs.vectorize import ChangedModelError, is_subsampled, sample_sites


@dataclass(frozen=True)
class Setup:
    """What a guide over one vector learned.

    Attributes:
        sites: the latent ones, in the order in which the vector stacks them.
        plate_nesting: how many dimensions to the left the model's plates reach.
        dtype: of the guide, the widest among the model's sites.
        discrete: names of the latent sites that are summed out.
        moving: whether a site's support depends on other sites, so that only a run of the model
            tells it.
        groups: of rows that are independent given all other numbers, where the guide has such a
            structure: how many, and how many numbers each has.
    """

    sites: tuple[LatentSite, ...]
    plate_nesting: int
    dtype: torch.dtype
    discrete: tuple[str, ...] = ()
    moving: bool = False
    groups: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class AmortizedSetup:
    """What an amortised guide learned.

    Attributes:
        sites: the local ones, in the order in which an item's vector stacks them.
        plate_name: of the plate that they stand in.
        plate_dim: its dimension.
        full_size: its size, where an encoder's rows are a part of it; else None.
    """

    sites: tuple[FreeSite, ...]
    plate_name: str
    plate_dim: int
    full_size: int | None


def no_model(*_args: Any, **_kwargs: Any) -> NoReturn:
    """Stands for the model of a guide that was loaded without one.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "model: this guide was loaded without its model, so it can draw and score but not train; "
        "use pf.load(folder, model=...)"
    )


def prior_of(model: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    """The model with its global sites alone, whose density does not depend on the local ones.

    Args:
        model: of all sites.
        names: of the global ones.
    """
    return poutine.block(model, expose=list(names))


def not_set_up() -> ValueError:
    """The error for a guide whose parameters are needed before ``setup``."""
    return ValueError(
        "guide: it has no parameters yet; call guide.setup(*args) with the model's arguments"
    )


def split(sites: Sequence[FreeSite], latent: Tensor) -> dict[str, Tensor]:
    """Stacked unconstrained sites ``(*batch, size)``, each in its unconstrained shape.

    Args:
        sites: in the order in which they are stacked.
        latent: the vectors.
    """
    pieces = latent.split([site.free_shape.numel() for site in sites], dim=-1)
    return {
        site.name: piece.reshape(latent.shape[:-1] + site.free_shape)
        for site, piece in zip(sites, pieces, strict=True)
    }


def constrained(sites: Sequence[FreeSite], latent: Tensor) -> dict[str, Tensor]:
    """Each site of stacked vectors ``(*batch, size)`` mapped onto its support.

    Args:
        sites: in the order in which they are stacked.
        latent: the vectors.
    """
    free = split(sites, latent)
    return {site.name: bijection(site.support)(free[site.name]) for site in sites}


def is_moving(sites: Sequence[FreeSite], others: Mapping[str, Constraint]) -> bool:
    """Whether a site has another support in another run of the model, or after a step of training.

    Args:
        sites: as one run had them.
        others: the supports of a run at other values, by name; with gradients to the model's
            parameters.
    """
    return any(_differ(site.support, others[site.name]) for site in sites)


def _differ(one: Constraint, other: Constraint) -> bool:
    """Whether two supports have other bounds."""
    if type(one) is not type(other):
        return True
    for key, value in vars(one).items():
        same = vars(other)[key]
        if isinstance(value, Constraint):
            if _differ(value, same):
                return True
        elif isinstance(value, Tensor) or isinstance(same, Tensor):
            value, same = torch.as_tensor(value), torch.as_tensor(same)
            if same.requires_grad or value.shape != same.shape:
                return True
            if not torch.equal(value, same.to(value)):
                return True
    return False


def bracketed(sites: Iterable[str]) -> str:
    """The sites as a part of the name that a guide's parameters have in Pyro's store.

    So guides of two models in one process do not share parameters.

    Args:
        sites: the names of the guide's latent sites.
    """
    # Pyro parts the name of a module from its parameters' by $$$ (of random_module's sites too).
    sites = [site.replace("$$$", ".") for site in sites]
    return f"({', '.join(sites[:4])}{', ...' if len(sites) > 4 else ''})"


def check_builder(builder: Any) -> None:
    """See that it can make a flow: a flow itself is what it would have made.

    Args:
        builder: a function of the number of features, or None.

    Raises:
        ValueError: it is a flow, or no function.
    """
    is_flow = hasattr(builder, "log_prob")
    if builder is not None and (is_flow or not callable(builder)):
        came = f"a {type(builder).__name__}" if is_flow else repr(builder)
        raise ValueError(
            "builder: expected a function that makes a flow of so many features, such as pf.iaf, "
            f"got {came}"
        )


def widest_dtype(trace: Trace) -> torch.dtype:
    """The dtype to which those of all sites, observed ones too, are promoted.

    Args:
        trace: of a model.
    """
    values = [site["value"] for site in trace.nodes.values() if site["type"] == "sample"]
    kinds = [v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return functools.reduce(torch.promote_types, kinds)


def check_latent(name: str, node: Any) -> None:
    """See that a guide over one vector can draw a latent site.

    Args:
        name: the site's.
        node: as in a trace.

    Raises:
        ValueError: its plate is subsampled.
    """
    for frame in node["cond_indep_stack"]:
        if is_subsampled(frame):
            raise ValueError(
                f"model: latent site {name!r} is inside the plate {frame.name!r}, of which "
                f"{frame.size} of {frame.full_size} rows are seen at a time; use "
                "pf.AutoAmortizedFlow, which has an encoder for such sites"
            )


def check_same_sites(trace: Trace, sites: Iterable[str], hidden: Iterable[str]) -> None:
    """See that a run of a model has the latent sites that its guide was set up for.

    Args:
        trace: of the model.
        sites: those of the guide.
        hidden: further ones, which may be there or not.

    Raises:
        ChangedModelError: a site has appeared or is gone.
    """
    found = {name for name, site in sample_sites(trace).items() if not site["is_observed"]}
    changed = found.symmetric_difference(sites).difference(hidden)
    if changed:
        raise changed_model(changed)


def changed_model(names: Iterable[str]) -> ChangedModelError:
    """The error for a model that has other latent sites than when its guide was set up.

    Args:
        names: of the sites that have appeared or are gone.
    """
    return ChangedModelError(
        f"model: latent site {', '.join(map(repr, sorted(names)))} comes and goes from call to "
        "call; a guide needs the same sites in every call. Sum the choice out, or always sample "
        "every site"
    )
