"""Nested values with tensors in them as one safetensors file: the rest is JSON in its header."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

FORMAT = 2


def pack(state: dict[str, Any]) -> bytes:
    """A safetensors file of nested dicts and lists of tensors, numbers, words and None.

    Example:
        >>> import torch
        >>> state = {"weights": [torch.ones(2)], "epochs": {1: 0.5}, "stopped": None}
        >>> unpack(pack(state), "state")
        {'weights': [tensor([1., 1.])], 'epochs': {1: 0.5}, 'stopped': None}
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            # A copy: tensors that share memory are refused.
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {"tensor": name}
        if isinstance(value, dict):
            return {"items": [[key, plain(item)] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"state: expected tensors, numbers or words, got {type(value)}")

    rest = json.dumps(plain(state))
    return save(tensors, metadata={"format": str(FORMAT), "state": rest})


def unpack(content: bytes, name: str) -> dict[str, Any]:
    """What ``pack`` was given; tuples come back as lists.

    Args:
        content: of the file.
        name: what to call it in errors.

    Raises:
        ValueError: another format than this version writes.
    """
    from safetensors.torch import load

    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size]).get("__metadata__", {})
    if header.get("format") != str(FORMAT):
        raise ValueError(
            f"checkpoint: {name} has format {header.get('format')!r}, this version reads {FORMAT}"
        )
    tensors = load(content)

    def nested(value: Any) -> Any:
        if isinstance(value, dict):
            if "tensor" in value:
                return tensors[value["tensor"]]
            return {key: nested(item) for key, item in value["items"]}
        return [nested(item) for item in value] if isinstance(value, list) else value

    return nested(json.loads(header["state"]))
