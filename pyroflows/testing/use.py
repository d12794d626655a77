"""Flows at work in Pyro: in plates, as priors, under NUTS."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyroflows.testing.cases import (
    MakeFlow,
    contexts,
    prepared,
    require,
    require_close,
    require_finite,
    require_shape,
    seeded,
    tolerance,
)


def check_pyro(make: MakeFlow, dtype: torch.dtype = torch.float64) -> None:
    """The distribution goes wherever a Pyro distribution goes.

    Expanded, masked, ``to_event``, in a plate, and as a prior under ``AutoNormal``.

    Args:
        make: makes the flow.
        dtype: of its tensors.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_pyro(lambda: pf.realnvp(2, layers=1, hidden=(8,)))
    """
    flow = prepared(make, dtype)
    event = len(flow.event_shape)
    context = contexts(flow.context_shape, (4,), dtype)
    d = flow(context)
    if context is None:
        d = d.expand((4,))
    require(isinstance(d, dist.TransformedDistribution), f"not a distribution of Pyro's: {type(d)}")
    require(d.event_dim == event == d.support.event_dim, "event_dim of distribution and support")
    require(d.batch_shape == (4,), f"batch shape: expected (4,), got {tuple(d.batch_shape)}")
    with seeded(), pyro.get_param_store().scope():
        x = d.sample((3,))
        require_shape(x, (3, 4, *flow.event_shape), "draws")
        require(d.support.check(x).all(), "draws outside the support")
        wanted = d.log_prob(x.clone()).detach()
        allowed = tolerance(dtype)
        wide = d.expand((2, 4))
        require_shape(wide.sample((5,)), (5, 2, 4, *flow.event_shape), "draws, expanded")
        require_close(
            wide.log_prob(x[:2].clone()), wanted[:2], allowed, "log_prob of an expanded copy"
        )
        require_close(
            d.to_event(1).log_prob(x.clone()), wanted.sum(-1), allowed, "log_prob after to_event(1)"
        )
        mask = torch.tensor([True, False, True, True])
        require_close(
            d.mask(mask).log_prob(x.clone()), wanted * mask, allowed, "log_prob after mask"
        )

        def model() -> Tensor:
            with pyro.plate("rows", 4):
                value = pyro.sample("x", flow(context))
            pyro.sample("seen", dist.Normal(value.sum(), 10.0), obs=torch.tensor(1.0, dtype=dtype))
            return value

        trace = pyro.poutine.trace(model).get_trace()
        trace.compute_log_prob()
        require_shape(trace.nodes["x"]["log_prob"], (4,), "log_prob in a plate")
        value = torch.as_tensor(trace.nodes["x"]["value"]).clone()
        require_close(
            trace.nodes["x"]["log_prob"], flow.log_prob(value, context), allowed, "in a plate"
        )
        guide = pyro.infer.autoguide.AutoNormal(model)
        optimizer = pyro.optim.ClippedAdam({"lr": 0.01})
        svi = pyro.infer.SVI(model, guide, optimizer, pyro.infer.Trace_ELBO())
        losses = torch.tensor([svi.step() for _ in range(3)])
        require_finite(losses, "loss of AutoNormal with the flow as a prior")
        drawn = guide()["x"]
        require(flow.support.check(drawn).all(), "AutoNormal leaves the support")


def check_nuts(make: MakeFlow, dtype: torch.dtype = torch.float64) -> None:
    """As a prior under NUTS: with small steps the chain moves, and stays in the support.

    Args:
        make: makes the flow.
        dtype: of its tensors.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_nuts(lambda: pf.realnvp(2, layers=1, hidden=(8,)))
    """
    flow = prepared(make, dtype)
    context = contexts(flow.context_shape, (), dtype)

    def model() -> None:
        value = pyro.sample("x", flow(context))
        pyro.sample("seen", dist.Normal(value.sum(), 10.0), obs=torch.tensor(1.0, dtype=dtype))

    for parameter in flow.parameters():
        parameter.requires_grad_(False)
    with seeded(), pyro.get_param_store().scope():
        # A fixed small step: what is tested is the density's gradient, not the adaptation.
        kernel = pyro.infer.NUTS(
            model,
            step_size=0.1,
            adapt_step_size=False,
            adapt_mass_matrix=False,
            max_tree_depth=4,
        )
        sampler = pyro.infer.MCMC(kernel, 20, warmup_steps=1, disable_progbar=True)
        sampler.run()
        drawn = sampler.get_samples()["x"]
    require_shape(drawn, (20, *flow.event_shape), "draws of NUTS")
    require_finite(drawn, "draws of NUTS")
    require(flow.support.check(drawn).all(), "NUTS leaves the support")
    different = len(drawn.flatten(1).unique(dim=0))
    require(different > 14, f"NUTS hardly moves: {different} different draws of 20")
