"""The one codec of tensors, for checkpoints and for models: safetensors files, no pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class VersionError(ValueError):
    """A file of another version than this one reads."""


def encode_tensors(tensors: Mapping[str, Tensor], **metadata: str) -> bytes:
    """A safetensors file of tensors on any device, with words in its header.

    Args:
        tensors: by name.
        **metadata: the words.
    """
    from safetensors.torch import save

    # Copies: the format has no word for tensors that share memory, nor for strides.
    plain = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    return save(plain, metadata=metadata)


def decode_tensors(content: bytes) -> dict[str, Tensor]:
    """The tensors of such a file, on the CPU.

    Raises:
        ValueError: it is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"not a safetensors file ({error})") from None


def metadata_of(content: bytes) -> dict[str, str]:
    """The words in the header of such a file; none where it has none."""
    size = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + size])
    except (ValueError, RecursionError):
        return {}
    words = header.get("__metadata__") if isinstance(header, dict) else None
    return words if isinstance(words, dict) else {}


def digest(content: bytes) -> str:
    """The SHA-256 by which a file is known."""
    return hashlib.sha256(content).hexdigest()


def pack(state: dict[str, Any], version: int = 1) -> bytes:
    """A safetensors file of nested dicts and lists of tensors, numbers, words and None.

    All but the tensors is JSON in the header.

    Args:
        state: to write.
        version: of what the state is made of; ``unpack`` asks for it.

    Example:
        >>> import torch
        >>> state = {"weights": [torch.ones(2)], "epochs": {1: 0.5}, "stopped": None}
        >>> unpack(pack(state), "state")
        {'weights': [tensor([1., 1.])], 'epochs': {1: 0.5}, 'stopped': None}
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, dict):
            return {"items": [[key, plain(item)] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"state: expected tensors, numbers or words, got {type(value)}")

    rest = json.dumps(plain(state))
    return encode_tensors(tensors, format=str(version), state=rest)


def unpack(content: bytes, name: str, version: int = 1) -> dict[str, Any]:
    """What ``pack`` was given; tuples come back as lists.

    Args:
        content: of the file.
        name: what to call it in errors.
        version: as in ``pack``.

    Raises:
        VersionError: it was written with another version.
        ValueError: it is damaged: ``pack`` did not write it.
    """
    header = metadata_of(content)
    tensors = decode_tensors(content)
    if header.get("format") != str(version):
        raise VersionError(
            f"{name} has format {header.get('format')!r}, this version reads {version}; "
            "update pyroflows, or begin anew"
        )

    def nested(value: Any) -> Any:
        if isinstance(value, dict):
            if "tensor" in value:
                return tensors[value["tensor"]]
            return {key: nested(item) for key, item in value["items"]}
        return [nested(item) for item in value] if isinstance(value, list) else value

    try:
        state = nested(json.loads(header["state"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"its words are not what was written ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise ValueError(f"its words are not what was written (a {type(state).__name__})")
    return state
