"""Feature-wise location and scale: fixed from data, or learned, or a scale alone."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows._checks import check_whole
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.limits import farthest, within_limits


def location_and_scale(rows: Tensor, dims: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of ``(*batch, features)``; constant features get scale one.

    Of events with more dimensions, ``(*batch, features, ...)``, they are taken over all but the
    first.

    Warns:
        UserWarning: some features are constant.
    """
    rows = rows.detach().movedim(-dims, -1)
    rows = rows.reshape(-1, rows.shape[-1])
    largest = rows.abs().amax(dim=0)
    unit = _power_of_two(largest)  # dividing by it rounds nothing, and no square is beyond numbers
    mean = (rows / unit).mean(dim=0) * unit
    scale = (rows / unit).std(dim=0, correction=0) * unit
    # Rounding leaves a constant column with a tiny spread relative to its size.
    constant = scale <= 8 * torch.finfo(rows.dtype).eps * largest
    if constant.any():
        columns = constant.nonzero()[:, 0].tolist()
        warnings.warn(
            f"x: {len(columns)} of {rows.shape[1]} columns are constant ({columns[:10]}); "
            "they are only centred, and a density along them has no finite best value: "
            "drop them, or add a little noise",
            stacklevel=2,
        )
    return mean, torch.where(constant, torch.ones_like(scale), scale)


def _power_of_two(size: Tensor) -> Tensor:
    """One near each size, as far as it and its inverse are normal numbers."""
    limit = math.log2(torch.finfo(size.dtype).max) - 8
    return size.frexp().exponent.to(size.dtype).clamp(-limit, limit).exp2()


class _FeatureAffine(FlowTransform):
    """``y = loc + scale * x``, feature by feature, each for all its places in an event."""

    loc: Tensor

    def __init__(self, features: int, dims: int) -> None:
        super().__init__()
        check_whole(1, features=features, dims=dims)
        self.dims = dims

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        """All events."""
        if self.dims == 1:
            return constraints.real_vector
        return constraints.independent(constraints.real, self.dims)

    codomain = domain

    def _across(self, values: Tensor) -> Tensor:
        """``(features,)`` so that it broadcasts against events."""
        return values if self.dims == 1 else values.view(-1, *(1,) * (self.dims - 1))

    def _scaled(self, x: Tensor, scale: Tensor) -> Tensor:
        return torch.addcmul(self._across(self.loc), x, self._across(scale))

    def _centred(self, y: Tensor) -> Tensor:
        return y - self._across(self.loc)

    def _log_det(self, log_scale: Tensor, x: Tensor) -> Tensor:
        """Of x's batch: each scale counts for all its places in an event."""
        places = x.shape[x.dim() - self.dims + 1 :].numel()
        return (log_scale.sum() * places).expand(x.shape[: x.dim() - self.dims])

    def extra_repr(self) -> str:
        """The number of features."""
        return str(len(self.loc))


class Standardize(_FeatureAffine):
    """Data units in, data units out: ``x = loc + scale * z``, fixed by ``pf.initialize``.

    ``loc`` and ``scale`` are buffers: part of the ``state_dict``, never trained. Before they are
    set the map is the identity.

    Both directions cost one multiplication and one addition a number.

    Args:
        features: number of features; of channels where events are images.
        dims: number of dimensions of an event; 3 for images ``(features, height, width)``.

    Raises:
        ValueError: ``features`` or ``dims`` is not a positive integer.

    Example:
        >>> import torch
        >>> layer = Standardize(1)
        >>> layer.initialize(torch.tensor([[10.0], [20.0]]))
        tensor([[-1.],
                [ 1.]])
        >>> layer(torch.tensor([0.0]))
        tensor([15.])
    """

    scale: Tensor

    def __init__(self, features: int, dims: int = 1) -> None:
        super().__init__(features, dims)
        self.register_buffer("loc", torch.zeros(features))
        self.register_buffer("scale", torch.ones_like(self.loc))

    def initialize(
        self, value: Tensor, context: Tensor | None = None, *, inverse: bool = True
    ) -> Tensor:
        """Take location and scale from the data (their inverses with ``inverse=False``)."""
        with torch.no_grad():
            loc, scale = location_and_scale(value, self.dims)
            self.loc.copy_(loc if inverse else -loc / scale)
            self.scale.copy_(scale if inverse else scale.reciprocal())
        return super().initialize(value, context, inverse=inverse)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``loc + scale * x``, in torch's usual layout, since it is what leaves a flow."""
        return self._scaled(x, self.scale).contiguous(), self._log_det(self.scale.log(), x)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(y - loc) / scale``, within what the rest of a flow can carry through."""
        x = within_limits(self._centred(y) / self._across(self.scale))
        return x, -self._log_det(self.scale.log(), y)

    def within_limits(self, y: Tensor) -> Tensor:
        """``y`` itself: what the inverse hands on is within limits."""
        return y


class ActNorm(_FeatureAffine):
    """``y = loc + exp(log_scale) * x``, both learned; data may set the start.

    Kingma & Dhariwal 2018, arXiv:1807.03039, section 3.1. ``pf.initialize`` sets the start once;
    that it was set is part of the ``state_dict``, so a loaded layer is not set again.

    Both directions cost one multiplication and one addition a number.

    Args:
        features: number of features; of channels where events are images.
        dims: number of dimensions of an event; 3 for images ``(features, height, width)``.

    Raises:
        ValueError: ``features`` or ``dims`` is not a positive integer.

    Example:
        >>> import torch
        >>> layer = ActNorm(1)
        >>> layer.initialize(torch.tensor([[10.0], [20.0]]))
        tensor([[-1.0000],
                [ 1.0000]])
    """

    initialized: Tensor

    def __init__(self, features: int, dims: int = 1) -> None:
        super().__init__(features, dims)
        self.loc = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.register_buffer("initialized", torch.tensor(False))

    def initialize(
        self, value: Tensor, context: Tensor | None = None, *, inverse: bool = True
    ) -> Tensor:
        """Make the other side of these data zero-mean and unit-variance, the first time only."""
        if not self.initialized:
            with torch.no_grad():
                loc, scale = location_and_scale(value, self.dims)
                self.loc.copy_(loc if inverse else -loc / scale)
                self.log_scale.copy_(scale.log() if inverse else -scale.log())
                self.initialized.fill_(True)
        return super().initialize(value, context, inverse=inverse)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``loc + exp(log_scale) * x``."""
        return self._scaled(x, self.log_scale.exp()), self._log_det(self.log_scale, x)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(y - loc) exp(-log_scale)``."""
        x = self._centred(y) * self._across((-self.log_scale).exp())
        return x, -self._log_det(self.log_scale, y)

    @torch.no_grad()
    def _borders(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        reach = farthest(dtype) * self.log_scale.exp()
        return self._across(self.loc - reach), self._across(self.loc + reach)

    def within_limits(self, y: Tensor) -> Tensor:
        """``y``, no farther from the location than so many times the scale."""
        return y.clamp(*self._borders(y.dtype))


class DiagonalScale(FlowTransform):
    """``y_i = exp(s_i) x_i``: the last layer of NICE (Dinh et al. 2015, arXiv:1410.8516, 3.3).

    Both directions cost one multiplication a feature.

    Args:
        features: number of features.

    Raises:
        ValueError: ``features`` is not a positive integer.

    Example:
        >>> import torch
        >>> DiagonalScale(2)(torch.tensor([1.0, 2.0]))           # starts as the identity
        tensor([1., 2.], grad_fn=...)
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        check_whole(1, features=features)
        self.log_scale = nn.Parameter(torch.zeros(features))

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``exp(s) x``."""
        return x * self.log_scale.exp(), self.log_scale.sum().expand(x.shape[:-1])

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``exp(-s) y``."""
        return y * (-self.log_scale).exp(), -self.log_scale.sum().expand(y.shape[:-1])

    def extra_repr(self) -> str:
        """The number of features."""
        return str(len(self.log_scale))
