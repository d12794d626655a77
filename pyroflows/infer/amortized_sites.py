"""What an amortised guide learnt of its model, as plain values: enough to set it up without it."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine import Trace
from torch import nn

from pyroflows.distributions.flow import Flow
from pyroflows.infer.amortized import AutoAmortizedFlow
from pyroflows.infer.guides import AutoFlow
from pyroflows.infer.sites import check_set_up, no_model


def facts_of_amortized(guide: AutoAmortizedFlow) -> dict[str, Any]:
    """Local sites, plate and name of a guide that was set up; supports stay objects.

    Args:
        guide: its encoder and the guide over its global sites are not in the facts.

    Raises:
        ValueError: it was not set up yet.
    """
    check_set_up(guide)
    sites = [
        {"name": name, "free_shape": list(shape), "support": guide._supports[name]}
        for name, shape in guide._shapes.items()
    ]
    plate = [guide._plate_name, guide._plate_dim, guide._full_size]
    context = guide.flow.context_shape[0]
    return {"name": guide._pyro_name, "sites": sites, "plate": plate, "context": context}


def amortized_from(
    facts: dict[str, Any],
    inner: Flow,
    encoder: nn.Module,
    global_guide: AutoFlow | None,
    model: Any,
    dtype: torch.dtype,
) -> AutoAmortizedFlow:
    """A guide as ``setup`` leaves it, its weights not yet those that were trained.

    Args:
        facts: of ``facts_of_amortized``.
        inner: a new flow from the guide's builder, with a context.
        encoder: of the saved one's architecture.
        global_guide: over the global sites, if there are any.
        model: None where only draws and scores are wanted.
        dtype: of the flow.
    """
    guide = AutoAmortizedFlow(no_model if model is None else model, encoder, None)
    guide._pyro_name = facts["name"]
    guide._plate_name, guide._plate_dim, guide._full_size = facts["plate"]
    guide._shapes = {site["name"]: torch.Size(site["free_shape"]) for site in facts["sites"]}
    guide._supports = {site["name"]: site["support"] for site in facts["sites"]}
    start = torch.zeros(sum(shape.numel() for shape in guide._shapes.values()))
    guide.flow = guide.around(inner, start, torch.zeros(1, facts["context"], dtype=dtype))
    guide._global_values = {}
    if global_guide is not None:
        name = global_guide._pyro_name
        guide.add_module("global_guide", global_guide)
        global_guide._pyro_name = name  # whole again: Pyro has just given it one without the sites
        # The model is run up to its plate with them, so any values inside the supports will do.
        middle = torch.zeros(1, global_guide.latent_dim, dtype=global_guide.dtype)
        guide._global_values = {k: v[0] for k, v in global_guide._constrained(middle).items()}
    guide.prototype_trace = Trace()  # what was learnt of the model's run is in the facts
    return guide
