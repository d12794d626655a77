"""Noise that fills the gaps between integers: uniform, or drawn by a flow given the picture."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Size, Tensor
from torch.distributions import constraints

from pyroflows.data.checks import checked_flow
from pyroflows.distributions.flow import Flow
from pyroflows.flows import iaf
from pyroflows.flows.images import image_coupling, squeezed
from pyroflows.nets import ConvNet
from pyroflows.transforms import Affine, Chain, MultiScale, first_half

NOISE_STEPS, NOISE_CHANNELS = 4, 32


def noise_flow(dequantizer: str | Flow, shape: Size) -> Flow | None:
    """The flow that draws noise given a picture; None for uniform noise.

    Args:
        dequantizer: ``"uniform"``, ``"variational"``, or a user's flow.
        shape: of a picture.

    Raises:
        ValueError: another word, or a flow that does not fit the picture or is slow to draw from.
    """
    if dequantizer == "uniform":
        return None
    features = shape.numel()
    if dequantizer == "variational":
        is_image = len(shape) == 3 and shape[1] % 2 == 0 and shape[2] % 2 == 0
        return _image_noise(shape) if is_image else _vector_noise(features)
    choices = "'uniform', 'variational' or a Flow"
    if isinstance(dequantizer, str):
        raise ValueError(f"dequantizer: expected {choices}, got {dequantizer!r}")
    checked_flow("dequantizer", dequantizer, choices)
    found = dequantizer.event_shape.numel(), Size(dequantizer.context_shape).numel()
    if not dequantizer.context_shape or found != (features, features):
        raise ValueError(
            f"dequantizer: expected a flow over {features} elements given as many, the image; got "
            f"shape {tuple(dequantizer.event_shape)}, context {tuple(dequantizer.context_shape)}"
        )
    if dequantizer.fast not in ("sample", "both"):
        raise ValueError(
            "dequantizer: expected a flow that draws in one pass, as every score draws (pf.iaf or "
            f"a coupling flow), got fast={dequantizer.fast!r}"
        )
    return dequantizer


def _vector_noise(features: int) -> Flow:
    """An IAF, given the picture."""
    hidden = (max(64, min(256, 2 * features)),)
    base = _logistic(Size([features]))
    return iaf(features, features, layers=2, hidden=hidden, linear="reverse", base=base)


def _image_noise(shape: Size) -> Flow:
    """Couplings of the upper and the lower row of each 2 x 2 block by turns, given the picture."""
    colours, height, width = shape
    here = squeezed((colours, height, width))

    def net(inputs: int, outputs: int, size: tuple[int, int]) -> ConvNet:
        return ConvNet(inputs, outputs, channels=NOISE_CHANNELS, size=size, context=shape)

    masks = [first_half(here) ^ (index % 2 == 1) for index in range(NOISE_STEPS)]
    couplings = [image_coupling(here, mask, Affine(), net, shape) for mask in masks]
    return Flow(MultiScale(Chain(couplings)), _logistic(shape), shape=shape, context=shape)


def _logistic(shape: Size) -> dist.TorchDistribution:
    """A base of which a sigmoid makes uniform noise: training starts from there."""
    return dist.Logistic(torch.zeros(shape), torch.ones(shape)).to_event(len(shape))


def noise(
    dequantizer: Flow | None, squash: bool, x: Tensor, bins: int, event_dim: int, draws: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws of the noise and their log-density given the picture.

    Args:
        dequantizer: what ``noise_flow`` gives.
        squash: whether its draws still have to be brought into the unit interval by a sigmoid.
        x: pictures of integers ``(*batch, *event)``, as floats.
        bins: number of levels.
        event_dim: dimensions of a picture.
        draws: how many for each picture.

    Returns:
        ``u`` and ``1 - u``, each exact near its own zero, of shape ``(draws, *x.shape)``, and
        ``log q(u | x)`` of shape ``(draws, *batch)``.
    """
    batch = x.shape[: x.dim() - event_dim]
    shape = (draws, *x.shape)
    if dequantizer is None:
        wide = torch.promote_types(x.dtype, torch.float32)  # half precision has few numbers
        u = torch.rand(shape, dtype=wide, device=x.device)
        return u, 1 - u, x.new_zeros(draws, *batch)
    context = ((2 * x + 1) / bins - 1).reshape(*batch, *dequantizer.context_shape)
    e, log_q = dequantizer(context, validate_args=False).rsample_and_log_prob(draws)
    if not squash:
        return e.reshape(shape), (1 - e).reshape(shape), log_q
    below, above = F.logsigmoid(e), F.logsigmoid(-e)
    log_q = log_q - (below + above).flatten(1 + len(batch)).sum(-1)
    return below.exp().reshape(shape), above.exp().reshape(shape), log_q


def within_the_unit_interval(support: constraints.Constraint) -> bool:
    """Whether the support's bounds keep every element there; False where it has no bounds."""
    if isinstance(support, constraints.independent):
        return within_the_unit_interval(support.base_constraint)
    if isinstance(support, (constraints.cat, constraints.stack)):
        return all(map(within_the_unit_interval, support.cseq))
    low = torch.as_tensor(getattr(support, "lower_bound", -math.inf))
    high = torch.as_tensor(getattr(support, "upper_bound", math.inf))
    return bool((low >= 0).all() and (high <= 1).all())


@contextlib.contextmanager
def fixed_noise(seed: int | None, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators of the CPU and of ``device`` start at ``seed``; after, as before.

    Args:
        seed: None to leave them alone.
        device: where noise is drawn.
    """
    if seed is None:
        yield
        return
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if on_cuda else []):
        # Not torch.manual_seed: it would also seed the devices that nobody draws on.
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
