"""Two-dimensional densities for pictures and quick checks.

Each function draws ``n`` points and splits them 80/10/10. ``noise`` is a standard
deviation in the units of the returned coordinates.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from pyroflows.datasets.split import Split, resolved_dtype, seeded, shuffled_split


def moons(
    n: int = 10_000, *, noise: float = 0.1, seed: int = 0, dtype: torch.dtype | None = None
) -> Split:
    """Two interleaved half circles of radius 1.

    Source: drawn by ``sklearn.datasets.make_moons``.
    Licence: none applies, the points are generated.

    Args:
        n: number of points in the three parts together, at least 10.
        noise: standard deviation of the normal noise around the arcs.
        seed: fixes the points and the shuffle.
        dtype: floating-point type of the result; torch's default if ``None``.

    Returns:
        Rows of shape ``(n, 2)``.

    Raises:
        TypeError: if ``dtype`` is not floating-point.
        ValueError: if ``n`` is below 10 or ``noise`` is negative.

    Example:
        >>> moons(1000).train.shape
        torch.Size([800, 2])
    """
    from sklearn.datasets import make_moons

    _check(n, noise)
    return _split(make_moons(n, noise=noise, random_state=seed)[0], seed, dtype)


def circles(
    n: int = 10_000, *, noise: float = 0.05, seed: int = 0, dtype: torch.dtype | None = None
) -> Split:
    """Two circles around the origin, of radius 1 and 1/2.

    Source: drawn by ``sklearn.datasets.make_circles``.
    Licence: none applies, the points are generated.

    Args:
        n: number of points in the three parts together, at least 10.
        noise: standard deviation of the normal noise around the circles.
        seed: fixes the points and the shuffle.
        dtype: floating-point type of the result; torch's default if ``None``.

    Returns:
        Rows of shape ``(n, 2)``.

    Raises:
        TypeError: if ``dtype`` is not floating-point.
        ValueError: if ``n`` is below 10 or ``noise`` is negative.

    Example:
        >>> circles(1000).val.shape
        torch.Size([100, 2])
    """
    from sklearn.datasets import make_circles

    _check(n, noise)
    points = make_circles(n, noise=noise, factor=0.5, random_state=seed)[0]
    return _split(points, seed, dtype)


def blobs(
    n: int = 10_000, *, noise: float = 0.2, seed: int = 0, dtype: torch.dtype | None = None
) -> Split:
    """Eight round Gaussians with their means evenly spaced on a circle of radius 2.

    Source: drawn by ``sklearn.datasets.make_blobs``.
    Licence: none applies, the points are generated.

    Args:
        n: number of points in the three parts together, at least 10.
        noise: standard deviation of each Gaussian.
        seed: fixes the points and the shuffle.
        dtype: floating-point type of the result; torch's default if ``None``.

    Returns:
        Rows of shape ``(n, 2)``.

    Raises:
        TypeError: if ``dtype`` is not floating-point.
        ValueError: if ``n`` is below 10 or ``noise`` is negative.

    Example:
        >>> blobs(1000).test.shape
        torch.Size([100, 2])
    """
    from sklearn.datasets import make_blobs

    _check(n, noise)
    angles = np.arange(8) * (math.pi / 4)
    centers = 2 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points = make_blobs(n, centers=centers, cluster_std=noise, random_state=seed)[0]
    return _split(points, seed, dtype)


def checkerboard(
    n: int = 10_000, *, noise: float = 0.0, seed: int = 0, dtype: torch.dtype | None = None
) -> Split:
    """Every second of the 16 squares of side 2 that tile the square from -4 to 4.

    The density is uniform on the filled squares, 1/32, where ``noise`` is 0.

    Source: drawn here with torch.
    Licence: none applies, the points are generated.

    Args:
        n: number of points in the three parts together, at least 10.
        noise: standard deviation of normal noise that blurs the edges.
        seed: fixes the points and the shuffle.
        dtype: floating-point type of the result; torch's default if ``None``.

    Returns:
        Rows of shape ``(n, 2)``.

    Raises:
        TypeError: if ``dtype`` is not floating-point.
        ValueError: if ``n`` is below 10 or ``noise`` is negative.

    Example:
        >>> bool((checkerboard(1000).train.abs() <= 4).all())
        True
    """
    _check(n, noise)
    generator = seeded(seed)
    column = torch.randint(0, 4, (n,), generator=generator)
    # Filled squares have an even sum of column and row: two rows for each column.
    row = 2 * torch.randint(0, 2, (n,), generator=generator) + column % 2
    inside = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    points = 2 * (torch.stack([column, row], dim=1) + inside) - 4
    points += noise * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return shuffled_split(points.to(resolved_dtype(dtype)), generator)


def pinwheel(
    n: int = 10_000, *, noise: float = 0.2, seed: int = 0, dtype: torch.dtype | None = None
) -> Split:
    """Five Gaussian arms around the origin, twisted into a spiral.

    Each arm is a Gaussian at distance 2 with standard deviation 0.6 along its radius
    and ``noise`` across it; a point at distance ``r`` along its arm is then turned by
    ``0.25 * exp(r / 2)`` radians.

    Source: drawn here with torch, after M. Johnson et al., "Composing Graphical
    Models with Neural Networks" (2016).
    Licence: none applies, the points are generated.

    Args:
        n: number of points in the three parts together, at least 10.
        noise: standard deviation across an arm, before the twist.
        seed: fixes the points and the shuffle.
        dtype: floating-point type of the result; torch's default if ``None``.

    Returns:
        Rows of shape ``(n, 2)``.

    Raises:
        TypeError: if ``dtype`` is not floating-point.
        ValueError: if ``n`` is below 10 or ``noise`` is negative.

    Example:
        >>> pinwheel(1000).train.shape
        torch.Size([800, 2])
    """
    _check(n, noise)
    generator = seeded(seed)
    arm = torch.randint(0, 5, (n,), generator=generator)
    normal = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    along, across = 2 + 0.6 * normal[:, 0], noise * normal[:, 1]
    angle = 2 * math.pi / 5 * arm + 0.25 * torch.exp(along / 2)
    cos, sin = angle.cos(), angle.sin()
    points = torch.stack([along * cos - across * sin, along * sin + across * cos], dim=1)
    return shuffled_split(points.to(resolved_dtype(dtype)), generator)


def swiss_roll(
    n: int = 10_000, *, noise: float = 0.1, seed: int = 0, dtype: torch.dtype | None = None
) -> Split:
    """A spiral: the cross-section of the three-dimensional Swiss roll, divided by 5.

    Source: drawn by ``sklearn.datasets.make_swiss_roll``.
    Licence: none applies, the points are generated.

    Args:
        n: number of points in the three parts together, at least 10.
        noise: standard deviation of the normal noise around the spiral.
        seed: fixes the points and the shuffle.
        dtype: floating-point type of the result; torch's default if ``None``.

    Returns:
        Rows of shape ``(n, 2)``.

    Raises:
        TypeError: if ``dtype`` is not floating-point.
        ValueError: if ``n`` is below 10 or ``noise`` is negative.

    Example:
        >>> swiss_roll(1000).train.shape
        torch.Size([800, 2])
    """
    from sklearn.datasets import make_swiss_roll

    _check(n, noise)
    points = make_swiss_roll(n, noise=5 * noise, random_state=seed)[0]
    return _split(points[:, [0, 2]] / 5, seed, dtype)


def _check(n: int, noise: float) -> None:
    if n < 10:
        raise ValueError(f"n must be at least 10, got {n}")
    if noise < 0:
        raise ValueError(f"noise is a standard deviation and cannot be negative, got {noise}")


def _split(points: npt.NDArray[np.float64], seed: int, dtype: torch.dtype | None) -> Split:
    return shuffled_split(torch.from_numpy(points).to(resolved_dtype(dtype)), seeded(seed))
