"""Guides as plain values, from which ``pf.load`` makes them again: to write and to read back."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Size, Tensor, nn

from pyroflows._pyro.guides import FreeSite, LatentSite
from pyroflows.distributions.flow import Flow
from pyroflows.infer.amortized import AutoAmortizedFlow
from pyroflows.infer.guides import AutoFlow
from pyroflows.programs.sites import (
    AmortizedSetup,
    Setup,
    bracketed,
    constrained,
    no_model,
    not_set_up,
)


def facts_of(guide: AutoFlow) -> dict[str, Any]:
    """Sites, plates and names of a guide that was set up; supports stay objects.

    Args:
        guide: any ``AutoFlow``.

    Raises:
        ValueError: it was not set up yet.
    """
    if guide.learned is None:
        raise not_set_up()
    groups = [list(size) for size in guide.learned.groups]
    return {
        "name": guide.pyro_name,
        "sites": [
            {
                "name": site.name,
                "batch_shape": list(site.batch_shape),
                "event_shape": list(site.event_shape),
                "free_shape": list(site.free_shape),
                "support": site.support,
                "plates": [
                    [frame.name, frame.dim, int(frame.size), frame.counter, frame.full_size]
                    for frame in site.plates
                ],
            }
            for site in guide.learned.sites
        ],
        "hide": list(guide.hidden),
        "init": guide.init,
        "init_scale": guide.init_scale,
        "plate_nesting": guide.learned.plate_nesting,
        "discrete": list(guide.learned.discrete),
        "moving": guide.learned.moving,
        **({"groups": groups} if groups else {}),
        "modes": guide.modes,
    }


def guide_from(facts: dict[str, Any], inner: Flow, model: Any, dtype: torch.dtype) -> AutoFlow:
    """A guide as ``setup`` leaves it, its parameters not yet those that were trained.

    Args:
        facts: of ``facts_of``.
        inner: a new flow from the guide's builder.
        model: None where only draws and densities are wanted.
        dtype: of the guide.
    """
    arguments = {name: facts[name] for name in ("hide", "init", "init_scale")}
    guide = AutoFlow(no_model if model is None else model, **arguments)
    sites = tuple(
        LatentSite(
            site["name"],
            Size(site["free_shape"]),
            site["support"],
            Size(site["batch_shape"]),
            Size(site["event_shape"]),
            tuple(CondIndepStackFrame(*plate) for plate in site["plates"]),
        )
        for site in facts["sites"]
    )
    discrete, moving = tuple(facts.get("discrete", ())), facts.get("moving", False)
    groups = tuple((n, k) for n, k in facts.get("groups", ()))
    setup = Setup(sites, facts["plate_nesting"], dtype, discrete, moving, groups)
    guide.restore(setup, inner, facts.get("modes", 1))
    guide.name_again(facts["name"], bracketed(site.name for site in sites))
    return guide


def facts_of_amortized(guide: AutoAmortizedFlow) -> dict[str, Any]:
    """Local sites, plate and name of a guide that was set up; supports stay objects.

    Args:
        guide: its encoder and the guide over its global sites are not in the facts.

    Raises:
        ValueError: it was not set up yet.
    """
    learned = guide.learned
    if learned is None:
        raise not_set_up()
    return {
        "name": guide.pyro_name,
        "sites": [
            {"name": site.name, "free_shape": list(site.free_shape), "support": site.support}
            for site in learned.sites
        ],
        "plate": [learned.plate_name, learned.plate_dim, learned.full_size],
        "context": guide.flow.context_shape[0],
    }


def amortized_from(
    facts: dict[str, Any],
    inner: Flow,
    encoder: nn.Module,
    global_guide: AutoFlow | None,
    model: Any,
    dtype: torch.dtype,
) -> AutoAmortizedFlow:
    """A guide as ``setup`` leaves it, its parameters not yet those that were trained.

    Args:
        facts: of ``facts_of_amortized``.
        inner: a new flow from the guide's builder, with a context.
        encoder: of the saved one's architecture.
        global_guide: over the global sites, if there are any.
        model: None where only draws and densities are wanted.
        dtype: of the flow.
    """
    guide = AutoAmortizedFlow(no_model if model is None else model, encoder, None)
    sites = tuple(
        FreeSite(site["name"], Size(site["free_shape"]), site["support"]) for site in facts["sites"]
    )
    values: dict[str, Tensor] = {}
    if global_guide is not None and global_guide.learned is not None:
        learned = global_guide.learned
        guide.add_module("global_guide", global_guide)
        # The model is run up to its plate with them, so any values inside the supports will do.
        middle = torch.zeros(1, global_guide.latent_dim, dtype=learned.dtype)
        values = {k: v[0] for k, v in constrained(learned.sites, middle).items()}
    like = torch.zeros(1, facts["context"], dtype=dtype)
    guide.restore(AmortizedSetup(sites, *facts["plate"]), values, inner, like)
    guide.name_again(facts["name"], bracketed([*values, *(site.name for site in sites)]))
    return guide
