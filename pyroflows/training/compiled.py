"""Running a training step under ``torch.compile``, where there is a compiler."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.distributions import Distribution

from pyroflows._pyro.validation import validates_args
from pyroflows.transforms.base import DIRECTIONS


def prepare_compiler(device: torch.device) -> None:
    """See that ``torch.compile`` has what it needs for code on a CPU, and keep it to itself.

    Its first use switches the validation of all distributions off; here that is undone.

    Raises:
        ValueError: there is no C++ compiler.
    """
    names = (os.environ.get("CXX"), "g++", "clang++", "cl")
    if device.type == "cpu" and not any(name and shutil.which(name) for name in names):
        raise ValueError(
            "compile: expected a C++ compiler (g++ or clang++ on the PATH, or CXX), found none; "
            "install one, or pass compile=False"
        )
    validates = validates_args()
    torch.compile(lambda: None, backend="eager")
    Distribution.set_default_validate_args(validates)


@contextlib.contextmanager
def compiled_transforms(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Both directions of the outermost transforms in these modules compiled, for the time being.

    Detached views and copies made meanwhile run as they are: what is compiled holds the parameters.
    For steps whose outside cannot be compiled, as Pyro's effect handlers.
    """
    found = list(dict.fromkeys(t for module in modules for t in _outermost(module)))
    try:
        for transform in found:
            for name in DIRECTIONS:
                transform.__dict__[name] = torch.compile(getattr(transform, name))
        yield
    finally:
        for transform in found:
            for name in DIRECTIONS:
                transform.__dict__.pop(name, None)


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    if all(hasattr(module, name) for name in DIRECTIONS):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)
