"""What is behind a ``PixelCNN``: network and likelihood, for rows of images that were checked."""

from __future__ import annotations

import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from pyroflows._pyro.store import Synced
from pyroflows.discrete.levels import levels, to_level, to_unit
from pyroflows.discrete.pixel_likelihoods import Categorical, LogisticMixture
from pyroflows.nets import PixelNet


class PixelScores(Synced):
    """Scores images and draws their pixels, ``(n, colours, height, width)`` at once, unchecked.

    Args:
        shape: (colours, height, width).
        bins: number of grey levels.
        net: ``(n, colours, height, width)`` to features of each pixel, ``channels`` wide.
        likelihood: of one level.
        channels: width of the features.
    """

    def __init__(
        self,
        shape: Size,
        bins: int,
        net: PixelNet,
        likelihood: Categorical | LogisticMixture,
        channels: int,
    ) -> None:
        super().__init__()
        self.event_shape = Size(shape)
        self.bins = bins
        self.likelihood = likelihood
        self.net = net
        colours = shape[0]
        self.hidden = nn.Linear(channels, channels)
        self.earlier = nn.ModuleList(
            nn.Linear(known, channels, bias=False) for known in range(1, colours)
        )
        out = [nn.Linear(channels, likelihood.params) for _ in range(colours)]
        self.out = nn.ModuleList(out)
        with torch.no_grad():
            for layer in out:
                layer.bias.copy_(likelihood.start())

    @property
    def support(self) -> constraints.Constraint:
        """Whole numbers 0 to bins - 1."""
        return levels(self.bins, 3)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.hidden.weight.device

    def score(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-probability ``(n,)`` of ``(n, colours, height, width)``, unchecked.

        What distributions call; ``log_prob`` takes any batch shape and checks.
        """
        u = to_unit(x.to(self.hidden.weight.dtype), self.bins)
        features = self.hidden(self.net(u, context).movedim(1, -1))  # (n, height, width, channels)
        pixels = u.movedim(1, -1)
        log_prob = u.new_zeros(len(u))
        for colour in range(self.event_shape[0]):
            params = self._likelihood_at(features, pixels, colour).to(u.dtype)
            log_prob = log_prob + self.likelihood.log_prob(params, x[:, colour]).sum(dim=(1, 2))
        return log_prob

    def _likelihood_at(self, features: Tensor, pixels: Tensor, colour: int) -> Tensor:
        """Parameters of a colour's likelihood, from the pixel's features and its colours before."""
        if colour:
            features = features + self.earlier[colour - 1](pixels[..., :colour])
        return self.out[colour](F.elu(features))

    @torch.no_grad()
    def fill(
        self,
        x: Tensor,
        known: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw the pixels of ``(n, colours, height, width)`` that are not known, unchecked.

        What ``sample`` and ``complete`` call. The uniform numbers of all pixels are drawn first.
        """
        colours, height, width = self.event_shape
        u = to_unit(x.to(self.hidden.weight.dtype), self.bins)
        uniforms = torch.rand(
            (height, width, colours, len(x), self.likelihood.uniforms),
            dtype=u.dtype,
            device=u.device,
            generator=generator,
        )

        def step(features: Tensor, i: int, j: int) -> None:
            features = self.hidden(features)
            for colour in range(colours):
                params = self._likelihood_at(features, u[:, :, i, j], colour)
                level = self.likelihood.draw(params, uniforms[i, j, colour])
                pixel = u[:, colour, i, j]
                pixel.copy_(torch.where(known[:, colour, i, j], pixel, to_unit(level, self.bins)))

        rows = (~known).any(dim=3).any(dim=1).any(dim=0).nonzero()[:, 0].tolist()
        self.net.step_through(u, step, context, rows)
        return to_level(u, self.bins).long()
