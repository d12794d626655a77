"""Save what was trained in a folder and load it: words and numbers in JSON, tensors, no pickle."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows import hub
from pyroflows.described import decode, encode, encode_config
from pyroflows.flows import builders
from pyroflows.infer.guides import AutoFlow
from pyroflows.infer.sites import facts_of, guide_from
from pyroflows.pixelcnn import pixelcnn
from pyroflows.quantize import quantized
from pyroflows.stored import read_folder, write_folder
from pyroflows.version import __version__

Builder = Callable[..., nn.Module]


class _OutsideError(ValueError):
    """A builder that is not part of pyroflows, and that was not given."""


def save(flow: nn.Module, folder: str | Path) -> Path:
    """Write a flow, a student, a guide, a ``pf.quantized`` or a ``pf.pixelcnn`` to a folder.

    ``config.json`` holds the builder's name and arguments, versions, and checksums;
    ``model.safetensors`` holds parameters and buffers. A process killed while saving leaves what
    was there before. The device is not kept; the dtype is.

    Args:
        flow: made by a builder of ``pf``, or by a function of your own that
            ``pf.flows.builder`` marks; or a ``pf.AutoFlow`` that was set up.
        folder: where; made if there is none, and an earlier save in it is replaced.

    Returns:
        The folder.

    Raises:
        ValueError: what could not be loaded again: no builder is known, an argument has no words in
            JSON, the guide was not set up, or the flow is no longer what its builder makes.
        OSError: it cannot be written.

    Example:
        >>> import tempfile, pyroflows as pf
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     same = pf.load(pf.save(pf.maf(2, layers=1), folder))
        >>> same.config["builder"], same.event_shape
        ('maf', torch.Size([2]))
    """
    _check_folder(folder)
    module, extra = _parts(flow)
    config = {"pyroflows": __version__, "torch": torch.__version__, **extra}
    config |= encode_config(module.config)
    config["dtype"] = str(_dtype(module)).removeprefix("torch.")
    tensors = module.state_dict()
    with contextlib.suppress(_OutsideError):  # only whoever has the function can make it again
        again = _parts(_build(config, None, None, False))[0]
        _check_tensors(again.state_dict(), tensors, "flow: it is not what its builder makes: ")
    folder = Path(folder)
    write_folder(folder, config, tensors)
    return folder


def load(
    folder: str | Path,
    *,
    model: Callable[..., Any] | None = None,
    builder: Builder | None = None,
    trust: bool = False,
) -> Any:
    """What ``save`` wrote, in eval mode, on the CPU, in its dtype: it scores bit for bit the same.

    Nothing from the folder is executed. The global random state stays as it is.

    Args:
        folder: a folder, or ``"hf://owner/name"`` for one on the Hugging Face hub.
        model: of a guide, to train it further; without one it draws and scores.
        builder: the function that made the flow, where it is your own.
        trust: import your own builder by the name in the folder. Importing runs code: only for
            folders whose origin you know.

    Raises:
        ValueError: files that are missing, cut short or changed, another format, an unknown
            builder, one of your own that is neither given nor trusted, tensors that do not fit.

    Example:
        >>> import tempfile, pyroflows as pf
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     flow = pf.load(pf.save(pf.nsf(3, layers=1).double(), folder))
        >>> flow.sample((4,)).dtype
        torch.float64
    """
    _check_folder(folder)
    if isinstance(folder, str) and folder.startswith("hf://"):
        name = folder.removeprefix("hf://")
        return from_hub(name, model=model, builder=builder, trust=trust)
    config, tensors = read_folder(Path(folder))
    if model is not None and "guide" not in config:
        raise ValueError("model: expected None, the folder holds no guide")
    loaded = _build(config, model, builder, trust)
    module = _parts(loaded)[0]
    _cast(module, tensors)
    _check_tensors(module.state_dict(), tensors, "folder: the tensors do not fit config.json: ")
    module.load_state_dict(tensors)
    return loaded.eval()


def push_to_hub(flow: nn.Module, name: str, **options: Any) -> Any:
    """Save to a model repository on the Hugging Face hub; needs ``pip install pyroflows[hub]``.

    Args:
        flow: as in ``pf.save``.
        name: ``"owner/name"``; made if there is none.
        **options: of ``huggingface_hub.HfApi.upload_folder``: ``commit_message``, ``revision``, ...

    Raises:
        ValueError: as in ``pf.save``.
        ImportError: ``huggingface_hub`` is not installed.

    Example::

        pf.push_to_hub(flow, "owner/name", commit_message="A MAF of the digits")
    """
    return hub.upload(lambda folder: save(flow, folder), name, **options)


def from_hub(name: str, *, revision: str | None = None, **options: Any) -> Any:
    """Load from a model repository on the Hugging Face hub; needs ``pip install pyroflows[hub]``.

    Args:
        name: ``"owner/name"``.
        revision: a branch, a tag or a commit.
        **options: of ``pf.load``.

    Raises:
        ValueError: as in ``pf.load``.
        ImportError: ``huggingface_hub`` is not installed.

    Example::

        flow = pf.from_hub("owner/name", revision="main")
    """
    return load(hub.download(name, revision), **options)


def _check_folder(folder: Any) -> None:
    if not isinstance(folder, (str, os.PathLike)):
        raise ValueError(f"folder: expected a path, got a {type(folder).__name__}")


def _parts(flow: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The module that holds the tensors, and what of a guide the builder does not know."""
    extra: dict[str, Any] = {}
    module = flow
    if isinstance(flow, AutoFlow):
        facts = facts_of(flow)
        sites = [{**s, "support": encode(s["support"], s["name"])} for s in facts["sites"]]
        extra["guide"] = {**facts, "sites": sites}
        module = flow.flow
    if not isinstance(module, nn.Module) or not getattr(module, "config", None):
        raise ValueError(
            f"flow: cannot save a {type(flow).__name__} that no builder made; mark the function "
            "that makes it with pf.flows.builder, or keep its state_dict"
        )
    return module, extra


def _dtype(module: nn.Module) -> torch.dtype:
    tensors = (*module.parameters(), *module.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())


def _own_builders() -> dict[str, Builder]:
    return {**builders(), "pixelcnn": pixelcnn, "quantized": quantized}


def _build(config: dict[str, Any], model: Any, given: Builder | None, trust: bool) -> Any:
    """The module of a config, untrained; the global generator is left alone."""
    dtype = getattr(torch, str(config.get("dtype")), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"config.json: expected a floating-point dtype, got {config.get('dtype')}")
    with torch.random.fork_rng(devices=[]):
        inner = _make(config, given, trust).to(dtype)
        if "guide" not in config:
            return inner
        try:
            facts = dict(config["guide"])
            facts["sites"] = [
                {**s, "support": decode(s["support"], "support")} for s in facts["sites"]
            ]
            return guide_from(facts, inner, model, dtype)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"config.json: the guide cannot be read ({error!r})") from None


def _make(config: dict[str, Any], given: Builder | None, trust: bool) -> nn.Module:
    name, arguments = config.get("builder"), config.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("config.json: expected a builder's name and its arguments")
    build = _builder(name, given, trust)
    values = {
        k: decode(v, k, lambda inner: _make(inner, given, trust)) for k, v in arguments.items()
    }
    try:
        made = build(**values)
    except Exception as error:  # whatever a builder of one's own may raise
        raise ValueError(
            f"config.json: {name} cannot be built with the saved arguments: {error}; was it saved "
            f"by another version? This is pyroflows {__version__}"
        ) from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"builder: expected a module from {name}, got {type(made).__name__}")
    return made


def _builder(name: str, given: Builder | None, trust: bool) -> Builder:
    own = _own_builders()
    if name in own:
        return own[name]
    if given is not None:
        return given
    module, colon, path = name.partition(":")
    if not colon:
        raise _OutsideError(
            f"config.json: unknown builder {name!r}, this version has {', '.join(sorted(own))}; "
            "update pyroflows, or pass builder="
        )
    if not trust:
        raise _OutsideError(
            f"builder: this flow was made by {name!r}, which is not part of pyroflows; pass the "
            "function as builder=, or trust=True to import it (that runs its code)"
        )
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"builder: cannot import {name!r} ({error}); pass the function as builder="
        ) from None
    return found


def _cast(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give each parameter and buffer the dtype it was saved in, where that is not the module's."""
    for name, own in module.state_dict(keep_vars=True).items():
        kept = tensors.get(name)
        if kept is not None and kept.is_floating_point() and own.is_floating_point():
            own.data = own.data.to(kept.dtype)


def _check_tensors(own: dict[str, Tensor], kept: dict[str, Tensor], what: str) -> None:
    missing, extra = sorted(set(own) - set(kept)), sorted(set(kept) - set(own))
    if missing or extra:
        raise ValueError(f"{what}{_listed('missing', missing)}{_listed('not expected', extra)}")
    for name, tensor in own.items():
        there = kept[name]
        if there.shape != tensor.shape:
            raise ValueError(
                f"{what}{name} has shape {tuple(there.shape)}, expected {tuple(tensor.shape)}"
            )
        if there.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{what}{name} is of {there.dtype}, expected {tensor.dtype}")


def _listed(word: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {word} ({shown}) "
