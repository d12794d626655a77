"""Space to depth: 2 x 2 blocks of pixels become channels, and back."""

from __future__ import annotations

from torch import Size, Tensor

from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.images.masks import IMAGE


def squeeze(x: Tensor) -> Tensor:
    """``(*batch, C, H, W)`` to ``(*batch, 4 C, H / 2, W / 2)``: 2 x 2 blocks become channels.

    Dinh et al. 2017, arXiv:1605.08803, section 3.6. The result is laid out channels last.

    Raises:
        ValueError: height or width is odd.

    Example:
        >>> import torch
        >>> squeeze(torch.arange(4.0).view(1, 2, 2)).flatten()
        tensor([0., 1., 2., 3.])
    """
    *batch, channels, height, width = squeezed_shape(x.shape)
    blocks = x.reshape(-1, channels // 4, height, 2, width, 2)
    flat = blocks.permute(0, 2, 4, 1, 3, 5).reshape(*batch, height, width, channels)
    return flat.movedim(-1, -3)


def unsqueeze(x: Tensor) -> Tensor:
    """The inverse of ``squeeze``: ``(*batch, 4 C, H, W)`` to ``(*batch, C, 2 H, 2 W)``.

    Args:
        x: a picture or a batch of them, as ``squeeze`` gives.

    Raises:
        ValueError: the number of channels is not divisible by four.

    Example:
        >>> import torch
        >>> x = torch.arange(16.0).view(1, 4, 4)
        >>> torch.equal(unsqueeze(squeeze(x)), x)
        True
    """
    *batch, channels, height, width = unsqueezed_shape(x.shape)
    blocks = x.movedim(-3, -1).reshape(-1, height // 2, width // 2, channels, 2, 2)
    flat = blocks.permute(0, 1, 4, 2, 5, 3).reshape(*batch, height, width, channels)
    return flat.movedim(-1, -3)


def squeezed_shape(shape: Size) -> Size:
    """The shape that ``squeeze`` gives.

    Raises:
        ValueError: height or width is odd.
    """
    *batch, channels, height, width = shape
    if height % 2 or width % 2:
        raise ValueError(f"x: expected an even height and width to squeeze, got {height} x {width}")
    return Size([*batch, 4 * channels, height // 2, width // 2])


def unsqueezed_shape(shape: Size) -> Size:
    """The shape that ``unsqueeze`` gives.

    Raises:
        ValueError: the number of channels is not divisible by four.
    """
    *batch, channels, height, width = shape
    if channels % 4:
        raise ValueError(f"x: expected a number of channels divisible by 4, got {channels}")
    return Size([*batch, channels // 4, 2 * height, 2 * width])


class Squeeze(FlowTransform):
    """Space to depth, ``(C, H, W)`` to ``(4 C, H / 2, W / 2)``: volume-preserving.

    At a call it raises a ``ValueError`` where height or width is odd, and its ``.inv`` where
    channels do not come in fours.

    Both directions cost one copy. Dinh et al. 2017, arXiv:1605.08803, section 3.6.

    Example:
        >>> import torch
        >>> Squeeze()(torch.ones(3, 8, 8)).shape
        torch.Size([12, 4, 4])
    """

    domain = codomain = IMAGE
    volume_preserving = True

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """2 x 2 blocks to channels."""
        return squeeze(x), x.new_zeros(x.shape[:-3])

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Channels to 2 x 2 blocks."""
        return unsqueeze(y), y.new_zeros(y.shape[:-3])

    def forward_shape(self, shape: Size) -> Size:
        """A quarter of the pixels, four times the channels."""
        return squeezed_shape(shape)

    def inverse_shape(self, shape: Size) -> Size:
        """Four times the pixels, a quarter of the channels."""
        return unsqueezed_shape(shape)
