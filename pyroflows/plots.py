"""Sheets of pictures: rows and columns of images of whole numbers, in one file.

Draws with matplotlib, which is loaded at the call.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def sheet(pictures: Tensor, bins: int = 256) -> Tensor:
    """Rows and columns of images as one image, a pixel of margin between them.

    Args:
        pictures: ``(rows, columns, channels, height, width)`` of 0 to ``bins - 1``; one channel for
            grey, three for red, green and blue.
        bins: number of levels.

    Returns:
        ``(height, width, channels)`` in [0, 1].

    Raises:
        ValueError: another shape.

    Example:
        >>> import torch
        >>> sheet(torch.zeros(2, 3, 1, 8, 8), bins=17).shape
        torch.Size([19, 28, 1])
    """
    if pictures.dim() != 5 or pictures.shape[2] not in (1, 3):
        raise ValueError(
            "pictures: expected shape (rows, columns, 1 or 3, height, width), got "
            f"{tuple(pictures.shape)}"
        )
    shares = pictures.detach().cpu().to(torch.get_default_dtype()) / (bins - 1)
    framed = F.pad(shares, (1, 0, 1, 0), value=0.5)
    grid = framed.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return F.pad(grid, (0, 0, 0, 1, 0, 1), value=0.5).clamp(0, 1)


def save_sheets(panels: dict[str, Tensor], path: str | Path, bins: int = 256) -> None:
    """Several sheets, each with its title, three abreast in one picture.

    Pictures are ``(rows, columns, channels, height, width)``, as in ``sheet``.

    Args:
        panels: pictures by title, each as ``sheet`` takes them.
        path: the picture; its folder is made.
        bins: number of levels.

    Raises:
        ValueError: no panels, or what ``sheet`` raises.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "zeros.png"
        ...     save_sheets({"zeros": torch.zeros(2, 2, 1, 8, 8)}, path, bins=17)
        ...     path.exists()
        True
    """
    if not panels:
        raise ValueError("panels: expected at least one")
    drawn = {title: sheet(pictures, bins).numpy() for title, pictures in panels.items()}
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no screen
    from matplotlib.figure import Figure

    columns = min(len(drawn), 3)
    rows = math.ceil(len(drawn) / columns)
    tallest = max(image.shape[0] / image.shape[1] for image in drawn.values())
    inches = 4.2 * columns, (4.2 * tallest + 0.4) * rows  # room for the titles
    fig = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes[len(drawn) :]:
        ax.set_axis_off()
    for ax, (title, image) in zip(axes, drawn.items(), strict=False):
        ax.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
        ax.set(title=title, xticks=[], yticks=[])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
