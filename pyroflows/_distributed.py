"""Many processes at work on one training: how they start, draw, and tell each other."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def open_fabric(
    like: Tensor,
    *,
    accelerator: str | None,
    devices: int | str | list[int],
    strategy: str,
    precision: str | None,
    num_nodes: int,
) -> Fabric:
    """A launched Fabric; by default on the device, and in the dtype, of ``like``."""
    from lightning_fabric import Fabric

    own = "64-true" if like.dtype == torch.float64 else "32-true"
    known = isinstance(precision, str) and precision in (own, "16-mixed", "bf16-mixed")
    if precision is not None and not known:
        raise ValueError(
            f"precision: expected None, '16-mixed' or 'bf16-mixed' for a flow in {like.dtype} "
            f"(move the flow itself with .to(dtype)), got {precision!r}"
        )
    if accelerator is None and devices == 1 and like.device.index is not None:
        devices = [like.device.index]
    if precision in (None, own):
        # No conversions: Fabric's "64-true" would hand the loss back in the default dtype.
        precision = "32-true"
    try:
        fabric = Fabric(
            accelerator=accelerator or like.device.type,
            devices=devices,
            strategy=strategy,
            precision=precision,
            num_nodes=num_nodes,
        )
    except Exception as error:  # it has kinds of its own
        raise ValueError(
            "accelerator, devices, strategy, precision, num_nodes: Lightning Fabric refuses "
            f"{accelerator!r}, {devices!r}, {strategy!r}, {precision!r}, {num_nodes!r}: {error}"
        ) from error
    fabric.launch()
    return fabric


def draw_apart(fabric: Fabric) -> None:
    """Give each process random numbers of its own, however each was seeded; alone, do nothing."""
    if fabric.world_size > 1:
        seed = fabric.broadcast(torch.randint(2**62, ()).item())
        torch.manual_seed(seed + fabric.global_rank)


@torch.no_grad()
def make_same(fabric: Fabric, tensors: Iterable[Tensor]) -> None:
    """Give all processes the values that the first one has, in place."""
    if fabric.world_size > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor.detach(), src=0)


def gathered(fabric: Fabric, value: Any) -> list[Any]:
    """What each process has, in the order of their ranks."""
    if fabric.world_size == 1:
        return [value]
    values: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def mean_over(fabric: Fabric, *values: float) -> list[float]:
    """Each number averaged over all processes, so that all decide alike."""
    if fabric.world_size == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=fabric.device)
    return fabric.all_reduce(total, reduce_op="mean").tolist()


def random_state(device: torch.device) -> dict[str, Any]:
    """Where the global generators of torch, numpy and Python stand."""
    import numpy as np

    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (a user's data set may draw from it)
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, torch.tensor(words), gauss],
        "numpy": [kind, torch.tensor(keys.tolist()), *rest],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the global generators back to where they stood."""
    import numpy as np

    torch.set_rng_state(state["torch"].cpu())
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype("uint32"), *rest))  # noqa: NPY002
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
