"""Codes made of other codes: between two, a mix of four, the direction of an attribute."""

from __future__ import annotations

import torch
from torch import Tensor


def interpolate(
    a: Tensor, b: Tensor, steps: int = 8, kind: str = "linear", *, event_dim: int | None = None
) -> Tensor:
    r"""Codes between two codes, both ends included.

    Half-way between two draws of a Gaussian a straight line is shorter than either, by
    :math:`\sqrt 2`: in many dimensions its picture is too plain. The great circle,
    :math:`(\sin((1 - t) \omega)\, a + \sin(t \omega)\, b) / \sin \omega` for codes at an angle
    :math:`\omega`, keeps the length (Shoemake 1985; White 2016, arXiv:1609.04468). Between codes on
    one line through the origin it is that line.

    Args:
        a: a code, or with ``event_dim`` a batch of codes.
        b: the other, of the same shape.
        steps: how many, at least two.
        kind: ``"linear"`` or ``"spherical"``.
        event_dim: how many of the last dimensions make up one code; by default all.

    Returns:
        Codes of shape ``(steps, *a.shape)``.

    Raises:
        ValueError: shapes that differ, an unknown kind, or less than two steps.

    Example:
        >>> import torch
        >>> interpolate(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 3, "spherical")[1]
        tensor([0.7071, 0.7071])
    """
    if a.shape != b.shape:
        raise ValueError(f"a, b: expected one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if kind not in ("linear", "spherical"):
        raise ValueError(f"kind: expected 'linear' or 'spherical', got {kind!r}")
    if steps < 2:
        raise ValueError(f"steps: expected at least 2, for both ends are included, got {steps}")
    event_dim = a.dim() if event_dim is None else event_dim
    if not 0 < event_dim <= max(a.dim(), 1):
        raise ValueError(f"event_dim: expected 1 to {a.dim()} for these codes, got {event_dim}")
    t = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device)
    t = t.reshape(steps, *(1 for _ in a.shape))
    if kind == "linear":
        return (1 - t) * a + t * b
    omega = _angle(a, b, event_dim)
    sine = omega.sin()
    flat = sine < 1e-3  # there the circle is a line, or is not determined
    sine, omega = (torch.where(flat, torch.ones_like(v), v) for v in (sine, omega))
    weight_a = torch.where(flat, 1 - t, ((1 - t) * omega).sin() / sine)
    weight_b = torch.where(flat, t, (t * omega).sin() / sine)
    return weight_a * a + weight_b * b


def mix(
    z1: Tensor, z2: Tensor, z3: Tensor, z4: Tensor, alpha: float | Tensor, beta: float | Tensor
) -> Tensor:
    r"""Four codes mixed by two angles in radians.

    .. math::

        z = \cos\alpha\, (z_1 \cos\beta + z_2 \sin\beta)
          + \sin\alpha\, (z_3 \cos\beta + z_4 \sin\beta)

    Of four independent draws of a standard normal it is again one, at any angles (Dinh et al. 2017,
    arXiv:1605.08803, appendix E).

    Args:
        z1: the code at angles 0 and 0.
        z2: the code at 0 and pi/2.
        z3: the code at pi/2 and 0.
        z4: the code at pi/2 and pi/2.
        alpha: between the pairs; a number, or a tensor of angles.
        beta: within the pairs; a number, or a tensor that broadcasts against ``alpha``.

    Returns:
        Codes of shape ``(*angles, *z1.shape)``: a sheet for angles ``(n, 1)`` and ``(m,)``.

    Raises:
        ValueError: codes of different shapes.

    Example:
        >>> import torch
        >>> angles = torch.linspace(0, torch.pi / 2, 5)
        >>> mix(*torch.randn(4, 64), angles[:, None], angles).shape
        torch.Size([5, 5, 64])
    """
    shapes = {tuple(z.shape) for z in (z1, z2, z3, z4)}
    if len(shapes) > 1:
        raise ValueError(f"z1, z2, z3, z4: expected one shape, got {sorted(shapes)}")
    alpha, beta = (torch.as_tensor(v, dtype=z1.dtype, device=z1.device) for v in (alpha, beta))
    alpha, beta = (v.reshape(*v.shape, *(1 for _ in z1.shape)) for v in (alpha, beta))
    first, second = beta.cos(), beta.sin()
    return alpha.cos() * (z1 * first + z2 * second) + alpha.sin() * (z3 * first + z4 * second)


def attribute(z_with: Tensor, z_without: Tensor) -> Tensor:
    """The direction of an attribute: the mean code with it minus the mean code without.

    Add a multiple of it to a code to see more of the attribute (Kingma & Dhariwal 2018,
    arXiv:1807.03039, section 6).

    Args:
        z_with: ``(rows, *event)`` codes of data that have it.
        z_without: ``(other rows, *event)`` codes of data that do not.

    Returns:
        A code, of shape ``event``.

    Raises:
        ValueError: no rows, or codes of different shapes.

    Example:
        >>> import torch
        >>> attribute(torch.tensor([[2.0, 1.0], [4.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([3., 0.])
    """
    for name, z in (("z_with", z_with), ("z_without", z_without)):
        if z.dim() < 1 or len(z) == 0:
            raise ValueError(f"{name}: expected at least one row, got shape {tuple(z.shape)}")
    if z_with.shape[1:] != z_without.shape[1:]:
        raise ValueError(
            "z_with, z_without: expected rows of one shape, got "
            f"{tuple(z_with.shape[1:])} and {tuple(z_without.shape[1:])}"
        )
    return z_with.mean(dim=0) - z_without.mean(dim=0)


def _angle(a: Tensor, b: Tensor, event_dim: int) -> Tensor:
    """Between codes, in radians, their event dimensions kept as ones; exact also near 0 and pi."""
    dims = tuple(range(-event_dim, 0))

    def length(v: Tensor) -> Tensor:
        return torch.linalg.vector_norm(v, dim=dims, keepdim=True)  # its gradient at zero is zero

    tiny = torch.finfo(a.dtype).tiny
    a, b = a / length(a).clamp_min(tiny), b / length(b).clamp_min(tiny)
    return 2 * torch.atan2(length(a - b), length(a + b))
