"""What a guide learnt of its model, as plain values: enough to set it up without the model."""

from __future__ import annotations

from typing import Any, NoReturn

import pyro.distributions as dist
import torch
from pyro.infer.autoguide.guides import AutoGuide
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame

from pyroflows.distributions.flow import Flow
from pyroflows.infer.guides import AutoFlow


def no_model(*args: Any, **kwargs: Any) -> NoReturn:
    """Stands for the model of a guide that was loaded without one.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "model: this guide was loaded without its model, so it can draw and score but not train; "
        "use pf.load(folder, model=...)"
    )


def check_set_up(guide: AutoGuide) -> None:
    """See that a guide has parameters.

    Args:
        guide: of any kind.

    Raises:
        ValueError: it was not set up yet.
    """
    if guide.prototype_trace is None:
        raise ValueError(
            "guide: it has no parameters yet; call guide.setup(*args) with the model's arguments"
        )


def facts_of(guide: AutoFlow) -> dict[str, Any]:
    """Sites, plates and names of a guide that was set up; supports stay objects.

    Args:
        guide: any ``AutoFlow``.

    Raises:
        ValueError: it was not set up yet.
    """
    sites = []
    for name, site in guide.latent_sites().items():
        fn, frames = site["fn"], site["cond_indep_stack"]
        sites.append(
            {
                "name": name,
                "batch_shape": list(fn.batch_shape),
                "event_shape": list(fn.event_shape),
                "free_shape": list(guide._unconstrained_shapes[name]),
                "support": fn.support,
                "plates": [[f.name, f.dim, int(f.size), f.counter, f.full_size] for f in frames],
            }
        )
    return {
        "name": guide._pyro_name,
        "sites": sites,
        "hide": list(guide.hidden),
        "init": guide.init,
        "init_scale": guide.init_scale,
        "plate_nesting": guide.plate_nesting,
    }


def guide_from(facts: dict[str, Any], inner: Flow, model: Any, dtype: torch.dtype) -> AutoFlow:
    """A guide as ``setup`` leaves it, its weights not yet those that were trained.

    Args:
        facts: of ``facts_of``.
        inner: a new flow from the guide's builder.
        model: None where only draws and scores are wanted.
        dtype: of the guide.
    """
    words = {name: facts[name] for name in ("hide", "init", "init_scale")}
    guide = AutoFlow(no_model if model is None else model, **words)
    trace, frames, shapes, stacks = Trace(), {}, {}, {}
    for site in facts["sites"]:
        name = site["name"]
        stack = tuple(CondIndepStackFrame(*plate) for plate in site["plates"])
        batch, event = torch.Size(site["batch_shape"]), torch.Size(site["event_shape"])
        # A flat density with the site's support and shapes: a guide asks for no more.
        fn = dist.ImproperUniform(site["support"], batch, event)
        trace.add_node(
            name,
            type="sample",
            name=name,
            fn=fn,
            value=torch.zeros(batch + event, dtype=dtype),
            is_observed=False,
            cond_indep_stack=stack,
            infer={},
        )
        shapes[name], stacks[name] = torch.Size(site["free_shape"]), stack
        frames.update({frame.name: frame for frame in stack})
    guide.prototype_trace = trace
    guide._prototype_frames = frames
    guide._unconstrained_shapes, guide._cond_indep_stacks = shapes, stacks
    guide.latent_dim = sum(shape.numel() for shape in shapes.values())
    guide._pyro_name = facts["name"]
    guide.plate_nesting = facts["plate_nesting"]
    guide.dtype = dtype
    guide._create_plates()
    guide.flow = guide.around(inner, torch.zeros(guide.latent_dim, dtype=dtype))
    return guide
