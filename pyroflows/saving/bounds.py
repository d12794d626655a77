"""A builder that is run for a file may use no more than the file's own tensors account for."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

# A flow's tensors are made from others (masks, degrees, the draws of an initialisation): a few
# times as many, and a few small ones beside.
TIMES, ELEMENTS, TENSORS = 4, 2**20, 256

_TOO_LARGE = "the arguments ask for more than the tensors in the folder hold"
_MAKE = {
    torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint,
    torch.randperm, torch.arange, torch.linspace, torch.logspace,
    Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.repeat,
}  # fmt: skip
_SQUARE = {torch.eye, torch.tril_indices, torch.triu_indices, torch.diag}
_OUTER = {torch.outer, torch.ger, torch.kron, Tensor.outer, Tensor.ger}


class TooLargeError(ValueError):
    """What the words of a file ask for is larger than its tensors."""


@contextmanager
def bounded_by(tensors: dict[str, Tensor]) -> Iterator[None]:
    """Stop whoever builds a module as soon as that outgrows the tensors meant for it.

    A word of a file may ask for 10^12 layers or a matrix with 10^18 cells. Nothing is allocated
    beyond a few times what ``tensors`` hold: each call of torch is looked at before it is made, and
    each parameter, buffer and module counted as it is registered.

    Args:
        tensors: those of the file.

    Raises:
        TooLargeError: inside, where building asks for more.
    """
    elements = TIMES * sum(t.numel() for t in tensors.values()) + ELEMENTS
    count = _Count(elements, TIMES * len(tensors) + TENSORS)
    with ExitStack() as stack:
        for register in (
            torch_module.register_module_parameter_registration_hook,
            torch_module.register_module_buffer_registration_hook,
            torch_module.register_module_module_registration_hook,
        ):
            stack.callback(register(count).remove)
        stack.enter_context(_Calls(elements))
        yield


def check_numbers(value: Any, tensors: dict[str, Tensor], name: str) -> None:
    """See that no whole number in a file's words is larger than its tensors can mean.

    Raises:
        TooLargeError: one is.
    """
    most = sum(t.numel() for t in tensors.values()) + ELEMENTS
    if isinstance(value, dict):
        for key, item in value.items():
            check_numbers(item, tensors, f"{name}.{key}")
    elif isinstance(value, list):
        for item in value:
            check_numbers(item, tensors, name)
    elif isinstance(value, int) and abs(value) > most:
        raise TooLargeError(
            f"{name}: expected a number that fits the {most - ELEMENTS:,} elements of the tensors "
            f"in the folder, got one of {value.bit_length()} bits"
        )


class _Count:
    """Counts what is registered in this thread; the hooks of torch are for all."""

    def __init__(self, elements: int, things: int) -> None:
        self.elements, self.things = elements, things
        self.thread = threading.get_ident()

    def __call__(self, _module: Any, _name: str, value: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        self.things -= 1
        if isinstance(value, Tensor):
            self.elements -= value.numel()
        if self.things < 0 or self.elements < 0:
            raise TooLargeError(_TOO_LARGE)


class _Calls(TorchFunctionMode):
    """Looks at each call of torch, first at what goes in and then at what comes out."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        sizes = _whole_numbers((*args, *kwargs.values())) if func in _MAKE else []
        if max(_broadcast(args), _product(func, args), math.prod(sizes)) > self.most:
            raise TooLargeError(_TOO_LARGE)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.numel() > self.most:
            raise TooLargeError(_TOO_LARGE)
        return result


def _broadcast(args: tuple[Any, ...]) -> int:
    """Elements of the shape that all tensors among the arguments broadcast to."""
    shapes = [a.shape for a in args if isinstance(a, Tensor)]
    longest = max(map(len, shapes), default=0)
    padded = [(1,) * (longest - len(s)) + tuple(s) for s in shapes]
    return math.prod(max(sizes) for sizes in zip(*padded, strict=True)) if padded else 0


def _product(func: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """Elements of a result whose sizes do not broadcast: n x n of n, or n x m of n and m."""
    if func in _SQUARE:
        return max(_whole_numbers(args), default=0) ** 2
    if func in _OUTER:
        return math.prod(a.numel() for a in args if isinstance(a, Tensor))
    return 0


def _whole_numbers(args: tuple[Any, ...]) -> list[int]:
    """Those that may be sizes, also in lists."""
    flat = [n for a in args for n in (a if isinstance(a, (tuple, list)) else (a,))]
    return [n for n in flat if isinstance(n, int) and not isinstance(n, bool) and n > 0]
