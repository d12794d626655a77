"""Many processes at work on one training: how they start, draw, and tell each other."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Placed(Protocol):
    """A tensor, or a flow: what has a dtype and a device."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""

    @property
    def device(self) -> torch.device:
        """Where it is."""


def open_fabric(
    fabric: Fabric | dict[str, Any] | None,
    like: Placed,
    precisions: tuple[str, ...] = ("16-mixed", "bf16-mixed"),
) -> Fabric:
    """A launched Fabric; by default on the device, and in the dtype, of ``like``.

    Args:
        fabric: a ``lightning_fabric.Fabric``, launched or not, the arguments of one by name, or
            None.
        like: what is trained, or a tensor of it.
        precisions: those that may be asked for by name, beside the dtype that ``like`` has.

    Raises:
        ValueError: another kind of thing, an argument or a precision that is not known, several
            nodes that nobody started, or what Lightning Fabric refuses.
    """
    from lightning_fabric import Fabric

    if isinstance(fabric, Fabric):
        made = fabric
        _check_precision(made.strategy.precision.precision, like, precisions)
    elif fabric is None or isinstance(fabric, dict):
        arguments = _with_defaults(fabric or {}, like, precisions)
        try:
            made = Fabric(**arguments)
        except Exception as error:  # it has kinds of its own
            raise ValueError(f"fabric: Lightning Fabric refuses {arguments!r}: {error}") from error
    else:
        raise ValueError(
            "fabric: expected a lightning_fabric.Fabric, a dict of its arguments such as "
            f"{{'devices': 2}}, or None, got {fabric!r}"
        )
    if not getattr(made, "_launched", False):
        _check_nodes(made)
        made.launch()
    return made


def _check_nodes(fabric: Fabric) -> None:
    """See that several nodes can find each other, where a launch would wait for the others."""
    from lightning_fabric.plugins.environments import LightningEnvironment

    nodes = getattr(fabric.strategy, "num_nodes", 1)
    alone = isinstance(getattr(fabric.strategy, "cluster_environment", None), LightningEnvironment)
    if nodes > 1 and alone and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"fabric: expected a process started on each of {nodes} nodes, by torchrun or with "
            "MASTER_ADDR, MASTER_PORT and NODE_RANK set, got none of these; leave num_nodes out "
            "for one machine"
        )


def _with_defaults(
    given: dict[str, Any], like: Placed, precisions: tuple[str, ...]
) -> dict[str, Any]:
    """What Fabric is to be made with, where the rest follows from a tensor."""
    arguments = {"accelerator": None, "devices": 1, "precision": None, **given}
    _check_precision(arguments["precision"], like, precisions)
    if arguments["precision"] not in precisions:
        # No conversions: Fabric's "64-true" would hand the loss back in the default dtype. Of a
        # plugin, which may be a precision itself, nothing is known.
        arguments["precision"] = None if "plugins" in arguments else "32-true"
    if arguments["accelerator"] is None:
        arguments["accelerator"] = like.device.type
        if arguments["devices"] == 1 and like.device.index is not None:
            arguments["devices"] = [like.device.index]
    return arguments


def _check_precision(precision: Any, like: Placed, precisions: tuple[str, ...]) -> None:
    """See that it is one of those, or leaves what is trained as it is."""
    own = "64-true" if like.dtype == torch.float64 else "32-true"
    named = isinstance(precision, str) and precision in (own, "32-true", *precisions)
    if precision is None or named:
        return
    raise ValueError(
        f"precision: expected None or one of {', '.join(map(repr, precisions))} for a flow in "
        f"{like.dtype} (move the flow itself with .to(dtype)), got {precision!r}"
    )


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


def reduced(fabric: Fabric, value: Tensor, how: str) -> Tensor:
    """The ``"sum"`` or the ``"mean"`` of a tensor over all processes."""
    return cast(Tensor, fabric.all_reduce(value, reduce_op=how))


def mean_over(fabric: Fabric, *values: float) -> list[float]:
    """Each number averaged over all processes, so that all decide alike."""
    if fabric.world_size == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=fabric.device)
    return reduced(fabric, total, "mean").tolist()


def random_state(device: torch.device) -> dict[str, Any]:
    """Where the global generators of torch, numpy and Python stand."""
    import numpy as np

    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 (a user's data set may draw from it)
    kind, keys, *rest = numpy_state
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
