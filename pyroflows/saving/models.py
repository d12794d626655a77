"""Save what was trained in a folder and load it: words and numbers in JSON, tensors, no pickle."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows._files.model_folder import read_folder, write_folder
from pyroflows._pyro.guides import Guide
from pyroflows._version import __version__
from pyroflows.infer.amortized import AutoAmortizedFlow
from pyroflows.infer.guides import AutoFlow
from pyroflows.programs.sites import prior_of
from pyroflows.saving import hub
from pyroflows.saving.bounds import bounded_by, check_numbers
from pyroflows.saving.builders import Builder, OutsideError, flow_from
from pyroflows.saving.facts import amortized_from, facts_of, facts_of_amortized, guide_from
from pyroflows.saving.fitting import (
    ENCODER,
    cast,
    check_encoder,
    check_state,
    check_tensors,
    check_values,
)
from pyroflows.saving.learned import PREFIX, Restoration, learned_by_model
from pyroflows.saving.values import encode, encode_config, site_from


def save(flow: nn.Module, folder: str | Path) -> Path:
    """Write a flow, a student, a guide, a ``pf.quantized`` or a ``pf.pixelcnn`` to a folder.

    ``config.json`` holds the builder's name and arguments, versions, and checksums;
    ``model.safetensors`` holds parameters and buffers. A process killed while saving leaves what
    was there before. The device is not kept; the dtype is.

    With a guide goes what its model has learned: the ``pyro.param``s that the model has met in the
    guide's ``setup`` or in ``pf.fit_guide``, and the state of the module that the model is, or is a
    method of, and of those that it registers and refers to by a variable, an argument or an
    attribute; of others a warning says that their parameters alone are kept.

    Args:
        flow: made by a builder of ``pf``, or by a function of your own that
            ``pf.flows.builder`` marks; or a ``pf.AutoFlow`` or ``pf.AutoAmortizedFlow`` that was
            set up; the latter's encoder is kept as tensors only.
        folder: where; made if there is none, and an earlier save in it is replaced.

    Returns:
        The folder.

    Raises:
        ValueError: what could not be loaded again: no builder is known, an argument has no words in
            JSON, the guide was not set up, the flow is no longer what its builder makes, or a
            parameter of the model is not finite.
        OSError: it cannot be written.

    Example:
        >>> import tempfile, pyroflows as pf
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     same = pf.load(pf.save(pf.maf(2, layers=1), folder))
        >>> same.config["builder"], same.event_shape
        ('maf', torch.Size([2]))
    """
    _check_folder(folder)
    config = {"pyroflows": __version__, "torch": torch.__version__, **_config(flow)}
    tensors = _holder(flow).state_dict()
    encoder = flow.encoder.module if isinstance(flow, AutoAmortizedFlow) else None
    if encoder is not None:
        check_state(encoder, "encoder")
    with contextlib.suppress(OutsideError):  # only whoever has the function can make it again
        again = _holder(_build(config, None, encoder, None, False))
        what = "flow: it is not what its builder makes: "
        check_tensors(again.state_dict(), tensors, what)
        check_values(_own(again), tensors, what)
    learned = learned_by_model(flow) if isinstance(flow, Guide) else None
    if learned is not None:
        config, tensors = {**config, "model": learned.words}, {**tensors, **learned.tensors}
    folder = Path(folder)
    write_folder(folder, config, tensors)
    return folder


def load(
    folder: str | Path,
    *,
    model: Callable[..., Any] | None = None,
    encoder: nn.Module | None = None,
    builder: Builder | None = None,
    trust: bool = False,
) -> Any:
    """What ``save`` wrote, in eval mode, on the CPU, in its dtype: it scores bit for bit the same.

    Nothing from the folder is executed. The global random state stays as it is.

    Args:
        folder: a folder, or ``"hf://owner/name"`` for one on the Hugging Face hub.
        model: of a guide, to train it further; without one it draws and scores. What the saved
            guide's model had learned is put in place: in this one's modules, and in Pyro's store,
            where the folder's values win over what is there.
        encoder: of a ``pf.AutoAmortizedFlow``, and only of one: a module built as the saved one
            was. It becomes the guide's, and its tensors those that were saved.
        builder: the function that made the flow, where it is your own.
        trust: import your own builder by the name in the folder. Importing runs code: only for
            folders whose origin you know.

    Raises:
        ValueError: files that are missing, cut short or changed, another format, an unknown
            builder, one of your own that is neither given nor trusted, tensors that do not fit, an
            encoder that is missing or built otherwise, a model without the modules of the saved
            one, a name under which Pyro's store holds another shape (all is left as it was).

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
        return from_hub(name, model=model, encoder=encoder, builder=builder, trust=trust)
    config, tensors = read_folder(Path(folder))
    if model is not None and "guide" not in config:
        raise ValueError("model: expected None, the folder holds no guide")
    restoration = None
    if "guide" in config and "model" in config:
        of_model = {name: tensors.pop(name) for name in list(tensors) if name.startswith(PREFIX)}
        restoration = Restoration(config["model"], of_model, model)
    check_encoder(encoder, config.get("amortized"), tensors)
    for key in ("arguments", "guide", "amortized"):
        check_numbers(config.get(key), tensors, f"config.json: {key}")
    with bounded_by(tensors):
        loaded = _build(config, model, encoder, builder, trust)
    module = _holder(loaded)
    what = "folder: the tensors do not fit config.json: "
    check_tensors(module.state_dict(), tensors, what)
    check_values(_own(module), tensors, what)
    if encoder is not None:
        encoder.cpu()
    cast(module, tensors)
    module.load_state_dict(tensors)
    if restoration is not None:
        restoration.put(loaded)
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


def _holder(flow: Any) -> Any:
    """The module whose tensors are kept."""
    return flow.flow if isinstance(flow, AutoFlow) else flow


def _config(flow: Any) -> dict[str, Any]:
    """What is needed to build a flow or a guide again, but for an encoder."""
    extra: dict[str, Any] = {}
    module = flow
    if isinstance(flow, AutoFlow):
        extra["guide"] = _encoded_sites(facts_of(flow))
        module = flow.flow
    elif isinstance(flow, AutoAmortizedFlow):
        extra["guide"] = _encoded_sites(facts_of_amortized(flow))
        over_globals = flow.global_guide
        extra["amortized"] = {"globals": None if over_globals is None else _config(over_globals)}
        module = flow.flow
    config = getattr(module, "config", None)
    if not isinstance(module, nn.Module) or not isinstance(config, dict):
        raise ValueError(
            f"flow: cannot save a {type(flow).__name__} that no builder made; mark the function "
            "that makes it with pf.flows.builder, or keep its state_dict"
        )
    dtype = str(_dtype(module)).removeprefix("torch.")
    return {**extra, **encode_config(config), "dtype": dtype}


def _encoded_sites(facts: dict[str, Any]) -> dict[str, Any]:
    sites = [{**s, "support": encode(s["support"], s["name"])} for s in facts["sites"]]
    return {**facts, "sites": sites}


def _dtype(module: nn.Module) -> torch.dtype:
    tensors = (*module.parameters(), *module.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())


def _build(
    config: dict[str, Any],
    model: Any,
    encoder: nn.Module | None,
    builder: Builder | None,
    trust: bool,
) -> Any:
    """The flow or guide of a config, untrained; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        dtype = getattr(torch, str(config.get("dtype")), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(
                f"config.json: expected a floating-point dtype, got {config.get('dtype')}"
            )
        flow: Any = flow_from(config, builder, trust).to(dtype)
        if "guide" not in config:
            return flow
        try:
            return _guide(
                config, flow, model, encoder, partial(_build, builder=builder, trust=trust)
            )
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"config.json: the guide cannot be read ({error!r})") from None


def _guide(
    config: dict[str, Any],
    flow: Any,
    model: Any,
    encoder: nn.Module | None,
    build: Callable[[dict[str, Any], Any, None], Any],
) -> AutoFlow | AutoAmortizedFlow:
    """A guide around an untrained flow."""
    sites = [site_from(site) for site in config["guide"]["sites"]]
    facts = {**config["guide"], "sites": sites}
    if "amortized" not in config:
        return guide_from(facts, flow, model, flow.dtype)
    over_globals = config["amortized"]["globals"]
    if over_globals is not None:
        names = [site["name"] for site in over_globals["guide"]["sites"]]
        over_globals = build(over_globals, None if model is None else prior_of(model, names), None)
    if encoder is None:
        raise ValueError("encoder: expected a module, got None")
    return amortized_from(facts, flow, encoder, over_globals, model, flow.dtype)


def _own(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a builder made: an encoder's may hold what they like."""
    return {k: t for k, t in module.state_dict().items() if not k.startswith(ENCODER)}
