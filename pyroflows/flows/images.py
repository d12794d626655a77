"""Flows over images: multi-scale RealNVP, Glow and MintNet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.distributions import Distribution

from pyroflows._checks import context_shape
from pyroflows.distributions.flow import Flow
from pyroflows.flows.assembly import Example, builder, checked_int, one_of
from pyroflows.nets import ConvNet, ConvResNet
from pyroflows.transforms import (
    ActNorm,
    Additive,
    Affine,
    Chain,
    Conv1x1,
    Family,
    FlowTransform,
    ImageCoupling,
    MaskedConv,
    MultiScale,
    Squeeze,
    Standardize,
    all_but_channel,
    checkerboard,
    even_columns,
    even_rows,
    first_half,
)
from pyroflows.transforms.images.coupling import channels_of

Shape = tuple[int, int, int]
Net = Callable[[int, int, tuple[int, int]], nn.Module]  # channels in, channels out, size
MASKS = {"checkerboard": checkerboard, "rows": even_rows, "columns": even_columns}


def image_shape(shape: Sequence[int], levels: int) -> Shape:
    """``shape``, if it is one of images that can be halved ``levels`` times.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(shape, Sequence) or len(shape) != 3:
        raise ValueError(f"shape: expected (channels, height, width), got {shape!r}")
    for name, number in zip(("channels", "height", "width"), shape, strict=True):
        checked_int(f"shape: {name}", number)
    channels, height, width = shape
    if height % 2**levels or width % 2**levels:
        most = 0
        while height % 2 ** (most + 1) == 0 and width % 2 ** (most + 1) == 0:
            most += 1
        raise ValueError(
            f"levels: {levels} of them squeeze 2 x 2 blocks {levels} times, so height and width "
            f"must be divisible by {2**levels}, got {height} x {width}, which takes {most} at most"
        )
    return channels, height, width


def family_named(name: str, bound: float) -> Family:
    """``"additive"`` or ``"affine"`` with the largest log-scale ``bound``.

    Raises:
        ValueError: another name.
    """
    one_of("family", name, ("additive", "affine"))
    return Additive() if name == "additive" else Affine(bound)


def squeezed(shape: Shape) -> Shape:
    """The shape at half the resolution."""
    return 4 * shape[0], shape[1] // 2, shape[2] // 2


def image_coupling(
    shape: Shape, mask: Tensor, family: Family, net: Net, context: int | Sequence[int]
) -> ImageCoupling:
    """A coupling of images of this shape, with a net that fits the mask."""
    seen, moved = channels_of(mask, shape[0])
    made = net(seen, moved * family.params, shape[1:])
    return ImageCoupling(made, family, mask, context_dim=len(context_shape(context)) or 1)


def close_images(
    parts: list[FlowTransform],
    shape: Shape,
    context: int | Sequence[int],
    base: Distribution | nn.Module | None,
) -> Flow:
    """A flow from its inner maps, standardisation by channel outside."""
    return Flow(Chain([*parts, Standardize(shape[0], dims=3)]), base, shape=shape, context=context)


@builder
def glow(
    shape: Sequence[int],
    context: int | Sequence[int] = 0,
    *,
    levels: int = 3,
    steps: int = 8,
    channels: int = 128,
    family: str = "affine",
    linear: str = "lu",
    prior: bool = True,
    bound: float = math.log(5.0),
    base: Distribution | nn.Module | None = None,
) -> Flow:
    """Glow: activation norm, 1x1 convolution and coupling, repeated at every level of resolution.

    Sampling and scoring cost one pass each. Kingma & Dhariwal 2018, arXiv:1807.03039. The base is
    a Gaussian over the image's own shape.

    Args:
        shape: ``(channels, height, width)`` of an image.
        context: number of context features (a class goes in one-hot), or the shape of an image
            whose size is that of ours or a multiple; every coupling sees it. 0 for none.
        levels: how often the resolution is halved; after each but the last, half of the numbers
            are done.
        steps: steps at each level.
        channels: width of the coupling nets' hidden layers.
        family: of the couplings, ``"affine"`` or ``"additive"``.
        linear: parametrisation of the 1x1 convolutions, ``"lu"`` or ``"plain"``.
        prior: whether the numbers that are done at a level are Gaussian with mean and scale from a
            net of those that go on.
        bound: largest absolute log-scale of one coupling.
        base: base distribution over images (standard normal by default).

    Raises:
        ValueError: height or width is odd at one of the levels, or an argument out of range.

    Example:
        >>> import torch, pyroflows as pf
        >>> digits = pf.glow((1, 8, 8), 10, levels=2, steps=2, channels=16)
        >>> digits(torch.eye(10)).sample().shape
        torch.Size([10, 1, 8, 8])
    """
    shape = image_shape(shape, checked_int("levels", levels))
    checked_int("channels", channels)
    kind = family_named(family, bound)
    one_of("linear", linear, ("lu", "plain"))

    def net(inputs: int, outputs: int, size: tuple[int, int]) -> ConvNet:
        return ConvNet(inputs, outputs, channels=channels, size=size, context=context)

    def step(here: Shape, index: int) -> list[FlowTransform]:
        # Scoring, which training does, applies each convolution's matrix and not its inverse.
        mixing = Conv1x1(here[0], lu=linear == "lu", seed=index).inv
        coupling = image_coupling(here, first_half(here), kind, net, context)
        return [coupling, mixing, ActNorm(here[0], dims=3)]

    def level(above: Shape, left: int) -> MultiScale:
        here = squeezed(above)
        parts = [part for index in range(steps) for part in step(here, 100 * left + index)]
        if left == 1:
            return MultiScale(Chain(parts))
        if prior:
            parts.insert(0, image_coupling(here, first_half(here), Affine(bound), net, context))
        return MultiScale(Chain(parts), level((here[0] // 2, *here[1:]), left - 1))

    checked_int("steps", steps)
    return close_images([level(shape, levels)], shape, context, base)


@builder
def multiscale_realnvp(
    shape: Sequence[int],
    context: int | Sequence[int] = 0,
    *,
    levels: int = 2,
    steps: int = 3,
    channels: int = 64,
    blocks: int = 2,
    family: str = "affine",
    masks: Sequence[str] = ("checkerboard",),
    prior: bool = True,
    bound: float = math.log(5.0),
    base: Distribution | nn.Module | None = None,
) -> Flow:
    """RealNVP over images: masked couplings at every scale, channel couplings between scales.

    Sampling and scoring cost one pass each. Dinh et al. 2017, arXiv:1605.08803, section 3.6, with
    activation norms for batch norms. The base is a Gaussian over the image's own shape.

    Args:
        shape: ``(channels, height, width)`` of an image.
        context: number of context features (a class goes in one-hot), or the shape of an image
            whose size is that of ours or a multiple; every coupling sees it. 0 for none.
        levels: how often the resolution is halved, and half of the numbers are done.
        steps: masked couplings at each scale (one more at the last), and as many couplings of
            channels after each squeeze.
        channels: width of the residual nets.
        blocks: residual blocks of each net.
        family: of the couplings, ``"affine"`` or ``"additive"``.
        masks: which masks the masked couplings take in turn, each followed by its opposite:
            ``"checkerboard"``, ``"rows"``, ``"columns"``, and ``"channels"``, by which one channel
            after the other is set from all others.
        prior: whether the numbers that are done at a level are Gaussian with mean and scale from a
            net of those that go on.
        bound: largest absolute log-scale of one coupling.
        base: base distribution over images (standard normal by default).

    Raises:
        ValueError: height or width is odd at one of the levels, or an argument out of range.

    Example:
        >>> import torch, pyroflows as pf
        >>> flow = pf.multiscale_realnvp((3, 8, 8), steps=2, channels=8, masks=("channels", "rows"))
        >>> flow.sample((2,)).shape
        torch.Size([2, 3, 8, 8])
    """
    shape = image_shape(shape, checked_int("levels", levels))
    checked_int("channels", channels)
    checked_int("blocks", blocks, least=0)
    checked_int("steps", steps)
    kind = family_named(family, bound)
    _check_masks(masks, shape[0])

    def net(inputs: int, outputs: int, size: tuple[int, int]) -> ConvResNet:
        return ConvResNet(
            inputs, outputs, channels=channels, blocks=blocks, size=size, context=context
        )

    def couple(here: Shape, mask: Tensor, kind: Family = kind) -> list[FlowTransform]:
        return [image_coupling(here, mask, kind, net, context), ActNorm(here[0], dims=3)]

    def scale(here: Shape, left: int) -> Chain:
        many = steps if left else steps + 1
        pattern = (_mask(masks, here, index) for index in range(many))
        fine = [part for mask in pattern for part in couple(here, mask)]
        if not left:
            return Chain(fine)
        below = squeezed(here)
        half = first_half(below)
        coarse = [part for index in range(steps) for part in couple(below, half ^ (index % 2 == 1))]
        if prior:
            coarse = [*couple(below, half, Affine(bound)), *coarse]
        inner = scale((below[0] // 2, *below[1:]), left - 1)
        return Chain([MultiScale(Chain(coarse), inner), *fine])

    return close_images([scale(shape, levels)], shape, context, base)


def _check_masks(masks: Sequence[str], channels: int) -> None:
    if isinstance(masks, str) or not masks:
        raise ValueError(f"masks: expected a tuple of names, got {masks!r}")
    for name in masks:
        one_of("masks", name, (*MASKS, "channels"))
    if channels == 1 and "channels" in masks:
        raise ValueError("masks: 'channels' needs at least 2 channels, got shape with 1")


def _mask(masks: Sequence[str], here: Shape, index: int) -> Tensor:
    """The one of the coupling with this index; each is followed by its opposite."""
    name = masks[index // 2 % len(masks)]
    if name == "channels" or here[1] * here[2] == 1:  # a single pixel has channels alone
        return all_but_channel(here, index)
    return MASKS[name](here) ^ (index % 2 == 1)


@builder
def mintnet(
    shape: Sequence[int],
    context: int | Sequence[int] = 0,
    *,
    levels: int = 1,
    steps: int = 4,
    channels: int = 8,
    tolerance: float | None = None,
    base: Distribution | nn.Module | None = None,
) -> Flow:
    """MintNet: convolutions masked to triangular Jacobians, in both reading orders by turns.

    Scoring costs one pass; sampling inverts each layer by iteration, in a few dozen passes, to a
    tolerance. Song, Meng & Ermon 2019, arXiv:1907.07945.

    Args:
        shape: ``(channels, height, width)`` of an image.
        context: number of context features (a class goes in one-hot), or the shape of an image
            whose size is that of ours or a multiple; every layer sees it. 0 for none.
        levels: how often 2 x 2 blocks of pixels become channels on the way to the base; may be 0.
        steps: pairs of layers, one for each reading order, before the first squeeze and after each.
        channels: hidden channels of a layer for each channel of its image.
        tolerance: of the inverse, see ``transforms.MaskedConv``, which warns where it is not met.
        base: base distribution over images (standard normal by default).

    Raises:
        ValueError: height or width is odd at one of the levels, or an argument out of range.

    Example:
        >>> import torch, pyroflows as pf
        >>> flow = pf.mintnet((1, 4, 4), steps=1, channels=2)
        >>> flow.fast, flow.log_prob(torch.zeros(3, 1, 4, 4)).shape
        ('log_prob', torch.Size([3]))
    """
    shape = image_shape(shape, checked_int("levels", levels, least=0))
    checked_int("channels", channels)
    checked_int("steps", steps)

    def layer(here: Shape, descending: bool, concave: bool) -> FlowTransform:
        return MaskedConv(
            here[0],
            channels,
            context=context,
            size=here[1:],
            descending=descending,
            concave=concave,
            tolerance=tolerance,
        ).inv

    def resolution(here: Shape, left: int) -> list[FlowTransform]:
        coarse = []
        if left:
            coarse = [Squeeze(), *resolution(squeezed(here), left - 1), Squeeze().inv]
        own: list[FlowTransform] = []
        for index in range(steps):
            odd = index % 2 == 1
            own += [layer(here, False, odd), layer(here, True, not odd), ActNorm(here[0], dims=3)]
        return [*coarse, *own]

    return close_images(resolution(shape, levels), shape, context, base)


EXAMPLES = {
    "glow": Example(lambda: glow((1, 4, 4), levels=2, steps=1, channels=4), fast="both"),
    "glow_class": Example(
        lambda: glow((2, 2, 2), 3, levels=1, steps=2, channels=4, family="additive"), fast="both"
    ),
    "multiscale_realnvp": Example(
        lambda: multiscale_realnvp((1, 2, 4), levels=1, steps=2, channels=4, blocks=1), fast="both"
    ),
    "multiscale_realnvp_image": Example(
        lambda: multiscale_realnvp(
            (2, 2, 2), (1, 2, 2), levels=1, steps=2, channels=4, blocks=1, masks=("channels",)
        ),
        fast="both",
    ),
    "mintnet": Example(lambda: mintnet((1, 2, 2), levels=1, steps=1, channels=2), fast="log_prob"),
}
