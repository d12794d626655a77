"""PixelCNN: an autoregressive distribution over images of whole numbers, one class or many.

It is a module whose call is a Pyro distribution, as a ``Flow`` is, but no flow: its images are
integers, drawn pixel by pixel, and there is no base space behind them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor

from pyroflows._checks import check_shape, checked_int, common_batch
from pyroflows._pyro.validation import validates_args
from pyroflows.discrete.levels import check_levels
from pyroflows.discrete.pixel_distribution import PixelDistribution, rows_of
from pyroflows.discrete.pixel_likelihoods import Categorical, LogisticMixture
from pyroflows.discrete.pixel_scores import PixelScores
from pyroflows.flows.assembly import builder
from pyroflows.nets import PixelNet
from pyroflows.transforms.limits import within_limits

ROWS_AT_ONCE = 512  # of ``classify``


class PixelCNN(PixelScores):
    """Images whose pixels are drawn one by one, each given those before it: ``pf.pixelcnn``.

    Colours of a pixel are drawn in turn, each given the ones before it. The call, ``model()`` or
    ``model(context)``, is a Pyro distribution at the parameters as they are. A class is given in
    one-hot (floating point), or as an integer.

    Scoring costs one pass of the net; drawing goes pixel by pixel and computes only what the last
    one changes. Van den Oord et al. 2016, arXiv:1606.05328.

    Args:
        shape: (colours, height, width).
        classes: number of classes; 0 for none.
        bins: number of grey levels.
        net: ``(n, colours, height, width)`` to features of each pixel, ``channels`` wide.
        likelihood: of one level.
        channels: width of the features.

    Example:
        >>> import torch, pyroflows as pf
        >>> model = pf.pixelcnn((1, 4, 4), bins=5, channels=8)
        >>> type(model).__name__, model().log_prob(torch.zeros(3, 1, 4, 4)).shape   # nats a picture
        ('PixelCNN', torch.Size([3]))
    """

    fast = "log_prob"

    def __init__(
        self,
        shape: Size,
        classes: int,
        bins: int,
        net: PixelNet,
        likelihood: Categorical | LogisticMixture,
        channels: int,
    ) -> None:
        super().__init__(shape, bins, net, likelihood, channels)
        self.context_shape = Size([classes] if classes else [])
        self.classes = classes
        self.config: dict[str, Any] | None = None

    def forward(
        self, context: Tensor | None = None, *, validate_args: bool | None = None
    ) -> PixelDistribution:
        """The distribution at the present parameters; its batch shape is the context's.

        Args:
            context: ``(*batch, classes)`` in floating point, or labels ``(*batch)`` as integers.
            validate_args: as everywhere in torch.

        Raises:
            ValueError: the context is missing, unwanted, of the wrong width, or no label.
        """
        if context is not None or self.classes:
            check = validates_args() if validate_args is None else validate_args
            context = self.one_hot(context, check).to(self.device)
        return PixelDistribution(self, context, validate_args=validate_args)

    def one_hot(self, context: Tensor | None, check: bool = True) -> Tensor:
        """A context in the model's dtype: integer labels ``(*batch)`` become ``(*batch, classes)``.

        Args:
            context: labels, or rows in floating point.
            check: refuse labels out of range, which waits for the device they are on.

        Raises:
            ValueError: it is missing, unwanted, of the wrong width, or out of range.
        """
        classes = self.classes
        if not classes:
            raise ValueError(
                "context: this model takes none, got one of shape "
                f"{tuple(torch.as_tensor(context).shape)}; build it with classes="
            )
        if context is None:
            raise ValueError(
                f"context: this model needs labels 0 to {classes - 1} of shape (*batch), or "
                f"one-hot rows of shape (*batch, {classes}), got None"
            )
        context = torch.as_tensor(context)
        if not context.is_floating_point():
            if context.dim() > 1 and context.shape[-1] == classes:
                raise ValueError(
                    f"context: integers of shape {tuple(context.shape)} may be labels or one-hot "
                    "rows; give one-hot rows in floating point"
                )
            if check and ((context < 0) | (context >= classes)).any():
                raise ValueError(
                    f"context: expected labels 0 to {classes - 1}, got "
                    f"{context.min().item()} to {context.max().item()}"
                )
            # Not F.one_hot, which looks at the labels again.
            context = context[..., None] == torch.arange(classes, device=context.device)
        else:
            check_shape("context", context, (classes,))
        return within_limits(context.to(self.hidden.weight.dtype))

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-probability of ``(*batch, colours, height, width)`` in nats; one pass."""
        return self(context).log_prob(x)

    def sample(self, shape: int | Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        """Integer images ``(*shape, *context batch, colours, height, width)``; about one pass."""
        return self(context).sample(shape)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """The start that depends on data, which ``pf.initialize`` asks for: there is none."""

    @torch.no_grad()
    def complete(
        self, x: Tensor, known: Tensor, context: Tensor | None = None, *, seed: int | None = None
    ) -> Tensor:
        """Keep the known pixels and draw the others in raster order, each given all before it.

        What is drawn follows from the pixels before it alone: a known pixel further down does not
        pull at it.

        Args:
            x: images ``(*batch, colours, height, width)``; unknown pixels may hold anything.
            known: which pixels to keep, booleans that broadcast to ``x``.
            context: labels or one-hot rows, as in a call; their batch broadcasts with x's.
            seed: of the drawing; by default torch's global generator is used.

        Raises:
            ValueError: shapes that do not fit, or known pixels that are no level.

        Example:
            >>> import torch, pyroflows as pf
            >>> model = pf.pixelcnn((1, 4, 4), bins=4, channels=8, layers=2)
            >>> x = torch.full((1, 4, 4), 3)
            >>> known = torch.arange(4)[:, None] < 2  # the upper half
            >>> model.complete(x, known, seed=0)[0, :2]
            tensor([[3, 3, 3, 3],
                    [3, 3, 3, 3]])
        """
        if known.dtype != torch.bool:
            raise ValueError(f"known: expected booleans, got {known.dtype}")
        check_shape("x", x, self.event_shape)
        try:
            known = known.to(self.device).expand(x.shape)
        except RuntimeError:
            raise ValueError(
                f"known: {tuple(known.shape)} does not broadcast to x's {tuple(x.shape)}"
            ) from None
        x = x.to(self.device)
        x = torch.where(known, x, torch.zeros_like(x))
        check_levels("x", x, self.bins)
        distribution = self(context)
        batch = common_batch("x", x.shape[:-3], distribution.batch_shape)
        context = rows_of(distribution.context, batch)
        x, known = (
            t.expand(batch + self.event_shape).reshape(batch.numel(), *self.event_shape)
            for t in (x, known)
        )
        generator = None
        if seed is not None:
            generator = torch.Generator(self.device).manual_seed(seed)
        return self.fill(x, known, context, generator).reshape(batch + self.event_shape)

    @torch.no_grad()
    def classify(self, x: Tensor, prior: Tensor | Sequence[float] | None = None) -> Tensor:
        """p(class | x) by Bayes, ``(*batch, classes)`` from ``(*batch, colours, height, width)``.

        One pass a class, without a graph.

        Args:
            x: images.
            prior: weight of each class; equal by default.

        Raises:
            ValueError: the model has no classes, or the prior does not fit.

        Example:
            >>> import torch, pyroflows as pf
            >>> model = pf.pixelcnn((1, 4, 4), 3, bins=4, channels=8, layers=2)
            >>> model.classify(torch.zeros(5, 1, 4, 4)).sum(dim=-1)
            tensor([1., 1., 1., 1., 1.])
        """
        if not self.classes:
            raise ValueError("classify: this model has no classes; build it with classes=")
        check_shape("x", x, self.event_shape)
        check_levels("x", x, self.bins)
        weights = self.hidden.weight.new_ones(self.classes)
        if prior is not None:
            weights = torch.as_tensor(prior).to(weights)
            right = weights.shape == (self.classes,) and (weights >= 0).all()
            if not right or not 0 < weights.sum() < math.inf:
                raise ValueError(
                    f"prior: expected {self.classes} finite weights >= 0, not all zero, got {prior}"
                )
        eye = torch.eye(self.classes, dtype=weights.dtype, device=self.device)
        batch = x.shape[:-3]
        rows = x.reshape(batch.numel(), *self.event_shape).to(self.device)
        joint = weights.log() + torch.cat(
            [
                torch.stack([self.score(part, c.expand(len(part), -1)) for c in eye], dim=-1)
                for part in rows.split(ROWS_AT_ONCE)
            ]
        )
        return joint.softmax(dim=-1).reshape(*batch, self.classes)

    def __repr__(self) -> str:
        classes = f", classes={self.classes}" if self.classes else ""
        layers, channels = len(self.net.layers), self.hidden.in_features
        return (
            f"PixelCNN(shape={tuple(self.event_shape)}{classes}, layers={layers}, "
            f"channels={channels}, likelihood={self.likelihood})"
        )


@builder
def pixelcnn(
    shape: Sequence[int],
    classes: int = 0,
    *,
    bins: int = 256,
    channels: int = 64,
    layers: int = 6,
    kernel: int = 5,
    mixture: int | str = 10,
) -> PixelCNN:
    """Gated PixelCNN over images of whole numbers 0 to bins - 1: scoring costs one pass.

    Van den Oord et al. 2016, arXiv:1606.05328, with the discretised mixture of logistics of
    Salimans et al. 2017, arXiv:1701.05517. Drawing goes pixel by pixel, but computes each
    activation once: about the arithmetic of one pass.

    A pixel sees the ones before it within ``layers * (kernel // 2)`` rows and columns.

    Args:
        shape: (colours, height, width).
        classes: number of classes that condition it; 0 for none.
        bins: number of grey levels.
        channels: width of the two stacks of convolutions.
        layers: number of gated layers.
        kernel: odd width of the convolutions.
        mixture: number of logistics in each pixel's mixture, or ``"categorical"`` for a logit a
            level: the more flexible where levels are few, and without a notion of their order.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch, pyroflows as pf
        >>> model = pf.pixelcnn((1, 4, 4), classes=10, bins=16, channels=8, layers=2)
        >>> x = model.sample((), context=torch.tensor([3, 3, 7]))
        >>> x.shape, model.log_prob(x, torch.tensor([3, 3, 7])).shape
        (torch.Size([3, 1, 4, 4]), torch.Size([3]))
    """
    if not isinstance(shape, Sequence) or len(shape) != 3:
        raise ValueError(f"shape: expected (colours, height, width), got {shape!r}")
    for size in shape:
        checked_int("shape", size)
    checked_int("classes", classes, least=0)
    checked_int("bins", bins, least=2)
    checked_int("channels", channels)
    checked_int("layers", layers)
    if checked_int("kernel", kernel, least=3) % 2 == 0:
        raise ValueError(f"kernel: expected an odd number, got {kernel}")
    if isinstance(mixture, str):
        if mixture != "categorical":
            raise ValueError(f"mixture: expected a number or 'categorical', got {mixture!r}")
        likelihood: Categorical | LogisticMixture = Categorical(bins)
    else:
        likelihood = LogisticMixture(bins, checked_int("mixture", mixture))
    net = PixelNet(shape[0], channels=channels, layers=layers, kernel=kernel, context=classes)
    return PixelCNN(Size(shape), classes, bins, net, likelihood, channels)
