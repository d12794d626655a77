"""The same image flows in normflows: Glow and RealNVP of equal levels, steps and channels.

Each function takes ``(shape, levels, steps, channels)``. Both sides have the same nets and the same
base, a standard normal; composed priors are off, since normflows has none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peers import Contender
from torch import Tensor, nn

import pyroflows as pf

Shape = tuple[int, int, int]
BLOCKS = 1  # residual blocks of RealNVP's nets


def glow(shape: Shape, levels: int, steps: int, channels: int) -> Contender:
    """This project's."""
    flow = pf.glow(shape, levels=levels, steps=steps, channels=channels, prior=False)
    return Contender(flow, flow.log_prob, lambda n: flow.sample((n,)))


def realnvp(shape: Shape, levels: int, steps: int, channels: int) -> Contender:
    """This project's."""
    sizes = {"levels": levels, "steps": steps, "channels": channels, "blocks": BLOCKS}
    flow = pf.multiscale_realnvp(shape, prior=False, **sizes)
    return Contender(flow, flow.log_prob, lambda n: flow.sample((n,)))


def normflows_glow(shape: Shape, levels: int, steps: int, channels: int) -> Contender:
    """As in normflows' own example of Glow, without classes."""
    import normflows as nf

    def level(here: int) -> list[nn.Module]:
        return [nf.flows.GlowBlock(here, channels) for _ in range(steps)]

    return _multiscale(shape, levels, level, lambda here: [])


def normflows_realnvp(shape: Shape, levels: int, steps: int, channels: int) -> Contender:
    """Its masked couplings take a net for the scale and one for the shift.

    Its sums of log-determinants cannot start with an activation norm's, so that comes second.
    """
    import normflows as nf

    def net(inputs: int, outputs: int) -> nn.Module:
        made = pf.nets.ConvResNet(inputs, outputs, channels=channels, blocks=BLOCKS)
        return made.to(memory_format=torch.contiguous_format)  # torch's layout, as normflows has it

    def masked(here: Shape, many: int) -> list[nn.Module]:
        board = pf.transforms.checkerboard(here).expand(here)
        parts: list[nn.Module] = []
        for index in range(many):
            mask = (board ^ (index % 2 == 1)).float()
            nets = net(here[0], here[0]), net(here[0], here[0])
            parts += [nf.flows.ActNorm((here[0], 1, 1)), nf.flows.MaskedAffineFlow(mask, *nets)]
        return parts

    def level(here: int) -> list[nn.Module]:
        parts: list[nn.Module] = []
        for index in range(steps):
            mode = "channel_inv" if index % 2 else "channel"
            block = nf.flows.AffineCouplingBlock(net(here // 2, here), split_mode=mode)
            parts += [nf.flows.ActNorm((here, 1, 1)), block]
        return parts

    last = shape[0] * 2**levels, shape[1] // 2**levels, shape[2] // 2**levels
    return _multiscale(
        shape, levels, level, lambda here: masked(here, steps), first=masked(last, steps + 1)
    )


def _multiscale(
    shape: Shape,
    levels: int,
    level: Callable[[int], list[nn.Module]],
    fine: Callable[[Shape], list[nn.Module]],
    first: list[nn.Module] | None = None,
) -> Contender:
    """A multi-scale flow of normflows.

    Args:
        shape: of an image.
        levels: how often it is squeezed.
        level: the layers for images of so many channels, after a squeeze.
        fine: the layers for images of a shape, before the squeeze.
        first: the layers of one scale more, which half of the last level's numbers go through.
    """
    import normflows as nf

    bases, flows, merges = [], [], []
    for index in reversed(range(levels)):
        above = shape[0] * 2**index, shape[1] // 2**index, shape[2] // 2**index
        below = 4 * above[0], above[1] // 2, above[2] // 2
        ends = index == levels - 1 and first is None
        done = below if ends else (below[0] // 2, *below[1:])
        if index == levels - 1 and first is not None:
            bases.append(nf.distributions.DiagGaussian(done, trainable=False))
            flows.append(first)
        if not ends:
            merges.append(nf.flows.Merge())
        bases.append(nf.distributions.DiagGaussian(done, trainable=False))
        flows.append([*level(below[0]), nf.flows.Squeeze(), *fine(above)])
    flow = nf.MultiscaleFlow(bases, flows, merges, class_cond=False)

    def log_prob(x: Tensor) -> Tensor:
        return flow.log_prob(x, None)

    return Contender(flow, log_prob, lambda n: flow.sample(n)[0])


KINDS: dict[str, dict[str, Callable[..., Contender]]] = {
    "glow": {"pyroflows": glow, "normflows": normflows_glow},
    "realnvp": {"pyroflows": realnvp, "normflows": normflows_realnvp},
}
