"""Whether tensors that were saved are those of the module that was built for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_LOGARITHMS = ("log_scale", "log_diagonal")  # of what is multiplied by, in all our transforms


def check_tensors(built: dict[str, Tensor], saved: dict[str, Tensor], what: str) -> None:
    """See that names, shapes and kinds are the same.

    Args:
        built: of the module.
        saved: of the file.
        what: the error's first words.

    Raises:
        ValueError: one differs.
    """
    missing, extra = sorted(set(built) - set(saved)), sorted(set(saved) - set(built))
    if missing or extra:
        raise ValueError(f"{what}{_listed('missing', missing)}{_listed('not expected', extra)}")
    for name, tensor in built.items():
        there = saved[name]
        if there.shape != tensor.shape:
            raise ValueError(
                f"{what}{name} has shape {tuple(there.shape)}, expected {tuple(tensor.shape)}"
            )
        if there.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{what}{name} is of {there.dtype}, expected {tensor.dtype}")


def check_values(built: dict[str, Tensor], saved: dict[str, Tensor], what: str) -> None:
    """See that numbers are finite, of a precision that computes, and indices those that were built.

    Args:
        built: of the module, untrained.
        saved: of the file, of the same shapes.
        what: the error's first words.

    Raises:
        ValueError: a tensor that is finite when it is built is not, or the scales whose logarithms
            it holds are not; one is in half precision where the module is not; or of whole numbers,
            as permutations are, others are there.
    """
    for name, tensor in built.items():
        there = saved[name]
        if tensor.is_floating_point():
            if tensor.isfinite().all() and not there.isfinite().all():
                bad = int((~there.isfinite()).sum())
                raise ValueError(f"{what}{bad} of {there.numel()} numbers in {name} are not finite")
            limit = math.log(torch.finfo(tensor.dtype).max)
            if name.endswith(_LOGARITHMS) and (there.abs() > limit).any():
                raise ValueError(
                    f"{what}{name} holds the logarithm {there.flatten()[there.abs().argmax()]:g} "
                    f"of a scale, expected from {-limit:.0f} to {limit:.0f}"
                )
            if there.dtype in _HALF and tensor.dtype not in _HALF:
                raise ValueError(f"{what}{name} is of {there.dtype}, expected {tensor.dtype}")
        elif tensor.numel() > 1 and not torch.equal(_sorted(tensor), _sorted(there)):
            raise ValueError(f"{what}{name} does not hold the whole numbers that it is made of")


def _sorted(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).long().sort().values


def _listed(word: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {word} ({shown}) "
