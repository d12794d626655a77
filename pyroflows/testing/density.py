"""What a density is: trained by every parameter, over every feature, with total mass one."""

from __future__ import annotations

import copy

import pyro.distributions as dist
import torch
from torch.distributions import biject_to

from pyroflows.testing.cases import (
    USUAL,
    MakeFlow,
    contexts,
    draws_of,
    is_unbounded,
    points,
    prepared,
    randn,
    randomize,
    require,
    require_finite,
    seeded,
    trained,
)
from pyroflows.transforms import ActNorm, DiagonalScale, Standardize


def check_every_parameter_trains(make: MakeFlow, dtype: torch.dtype = torch.float64) -> None:
    """Each named parameter, also the base's, gets a finite gradient from scoring and from drawing.

    Args:
        make: makes the flow.
        dtype: of its tensors.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_every_parameter_trains(lambda: pf.realnvp(2, layers=1, hidden=(8,)))
    """
    flow = prepared(make, dtype)
    x, context = points(flow, (6,), dtype)
    shape, draw_context = draws_of(flow, 6, dtype)
    with seeded():
        losses = {"log_prob(x)": flow.log_prob(x, context).sum()}
        if flow(draw_context).has_rsample:
            draw, log_q = flow.rsample_and_log_prob(shape, draw_context)
            losses["rsample_and_log_prob()"] = log_q.sum() + draw.square().sum()
    parameters = trained(flow)
    for what, loss in losses.items() if parameters else ():
        gradients = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            require(gradient is not None, f"parameter {name!r} gets no gradient from {what}")
            require_finite(gradient, f"gradient of {name!r} from {what}")


@torch.no_grad()
def check_every_feature_moves(make: MakeFlow, dtype: torch.dtype = torch.float64) -> None:
    """No data feature is a copy of a base feature, also without feature-wise scales.

    Args:
        make: makes the flow.
        dtype: of its tensors.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_every_feature_moves(lambda: pf.realnvp(2, layers=2, hidden=(8,)))
    """
    flow = copy.deepcopy(make()).to(dtype).eval()
    kinds = (ActNorm, DiagonalScale, Standardize)
    scales = [m for m in flow.transform.modules() if isinstance(m, kinds)]
    for module in scales:  # the identity again: in a fitted flow they would hide a copy
        for name, values in module.state_dict().items():
            values.fill_(name == "scale")
    randomize(flow, keep=scales)
    context = contexts(flow.context_shape, (64,), dtype)
    z = randn((64, *flow.transform.inverse_shape(flow.event_shape)), dtype, seed=1)
    x = flow.transform.forward_and_log_det(z, context)[0]
    free = x if is_unbounded(flow.support) else biject_to(flow.support).inv(x)
    for index, feature in enumerate(free.flatten(1).T):
        distance = (z.flatten(1) - feature[:, None]).abs().amax(dim=0)
        copied = (distance < 1e-4).nonzero()[:, 0].tolist()
        require(not copied, f"data feature {index} is a copy of base feature {copied}")


@torch.no_grad()
def check_density_integrates_to_one(make: MakeFlow, dtype: torch.dtype = torch.float64) -> None:
    """The integral of the density is 1, to 2%, by importance sampling.

    The proposal is a Student t around the flow's own draws, wider than they are, in the
    unconstrained space behind the support. With more than four features the random weights are
    smaller, or too few points would count.

    Args:
        make: makes the flow.
        dtype: of its tensors.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_density_integrates_to_one(lambda: pf.realnvp(2, layers=1, hidden=(8,)))
    """
    flow = copy.deepcopy(make()).to(dtype).eval()
    shape = flow.transform.inverse_shape(flow.event_shape)
    randomize(flow, USUAL if shape.numel() <= 4 else 0.1)
    context = contexts(flow.context_shape, (), dtype)
    rows = 60_000
    weights = torch.zeros(0, dtype=dtype)
    with seeded():
        to_support = biject_to(flow.support)
        x = flow.sample((4000,), context)
        u = (x if is_unbounded(flow.support) else to_support.inv(x)).flatten(1)
        spread = 1.3 * torch.linalg.cholesky(torch.cov(u.T).reshape(u.shape[1], -1))
        proposal = dist.MultivariateStudentT(torch.tensor(5.0, dtype=dtype), u.mean(0), spread)
        for _ in range(8):  # more points, as long as the estimate is poor
            u = proposal.sample((rows,))
            log_q = proposal.log_prob(u)
            u = u.unflatten(-1, shape)
            if is_unbounded(flow.support):
                x = u
            else:
                x = to_support(u)
                change = to_support.log_abs_det_jacobian(u, x)
                log_q = log_q - (change.sum(-1) if change.dim() > 1 else change)
            weights = torch.cat([weights, (flow.log_prob(x, context) - log_q).exp()])
            error = float(weights.std() / len(weights) ** 0.5)
            if error < 0.005:
                break
    require(error < 0.01, f"the integral is too noisy to judge: standard error {error:.3g}")
    off = abs(float(weights.mean()) - 1)
    require(
        off < min(0.02, 5 * error), f"the density integrates to {weights.mean():.4f} +- {error:.4f}"
    )
