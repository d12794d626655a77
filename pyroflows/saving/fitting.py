"""Whether tensors that were saved are those of the module that was built for them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

ENCODER = "encoder.module."  # what the names of an encoder's tensors start with in a guide
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


def check_state(module: nn.Module, what: str) -> None:
    """See that a module's state is tensors, with values.

    Args:
        module: one that a user built.
        what: the error's first words.

    Raises:
        ValueError: it is something else, or of a module that was not built yet.
    """
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{what}: expected a state_dict of tensors, got a {type(value).__name__} under "
                f"{name!r}; keep it in a buffer"
            )
        if is_lazy(value) or value.is_meta:
            raise ValueError(
                f"{what}: expected tensors with values, got none yet in {name!r}; run a lazy "
                "module once, build one from the meta device on the CPU"
            )


def check_encoder(encoder: Any, wanted: Any, tensors: dict[str, Tensor]) -> None:
    """See that an encoder is there if it is wanted, and built as the one that was saved.

    Args:
        encoder: what came.
        wanted: whether the folder has an encoder's tensors.
        tensors: of the folder.

    Raises:
        ValueError: it is not.
    """
    if wanted is None:
        if encoder is not None:
            raise ValueError("encoder: expected None, the folder holds no pf.AutoAmortizedFlow")
        return
    if not isinstance(encoder, nn.Module):
        raise ValueError(
            "encoder: expected a torch.nn.Module built as the saved guide's encoder was, since the "
            f"folder holds its tensors alone, got {type(encoder).__name__}; use "
            "pf.load(folder, encoder=...)"
        )
    check_state(encoder, "encoder")
    kept = {k.removeprefix(ENCODER): t for k, t in tensors.items() if k.startswith(ENCODER)}
    what = "encoder: it is not built as the saved one was; of the tensors in the folder "
    check_tensors(encoder.state_dict(), kept, what)


def cast(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give each parameter and buffer the dtype it was saved in, where that is not the module's.

    Args:
        module: to hold them.
        tensors: that were saved.
    """
    for name, own in module.state_dict(keep_vars=True).items():
        kept = tensors.get(name)
        if kept is not None and kept.is_floating_point() and own.is_floating_point():
            own.data = own.data.to(kept.dtype)


def _sorted(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).long().sort().values


def _listed(word: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {word} ({shown}) "
