"""Two files in a folder, written so that a killed process leaves either the old pair or the new.

``config.json`` says what was saved and carries the SHA-256 of ``model.safetensors``, the tensors.
New tensors are first written beside the old ones; the renaming of ``config.json`` is the one moment
at which the new pair becomes valid. Whoever reads between that and the last renaming finds the
tensors under their first name.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from pyroflows._files.atomic import sync_folder, write_atomically
from pyroflows._files.tensors import decode_tensors, digest, encode_tensors

FORMAT = 1
CONFIG, TENSORS = "config.json", "model.safetensors"
_NEXT = ".model.safetensors.next"
_LARGEST_CONFIG = 64 * 2**20
_AGAIN = "get the folder again from where it was saved, or save anew"


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files.

    Args:
        folder: made where there is none.
        config: plain values.
        tensors: by name.
    """
    data = encode_tensors(tensors, format="pt")
    config = {"format": FORMAT, **config, "sha256": digest(data)}
    config["checksum"] = _checksum(config)
    text = json.dumps(config, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    _finish_earlier(folder)
    write_atomically(folder / _NEXT, data)
    write_atomically(folder / CONFIG, text.encode())
    os.replace(folder / _NEXT, folder / TENSORS)
    sync_folder(folder)


def _finish_earlier(folder: Path) -> None:
    """Where a save was killed after its config was valid, give its tensors their name."""
    try:
        expected = json.loads((folder / CONFIG).read_bytes())["sha256"]
        if digest((folder / _NEXT).read_bytes()) == expected:
            os.replace(folder / _NEXT, folder / TENSORS)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing there that this save would lose


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Both files, proved to be the ones that were saved together.

    Args:
        folder: of ``write_folder``.

    Raises:
        ValueError: a file is missing, cut short, changed, or of a format not known here.
    """
    config = _read_config(folder)
    data = _read_tensors(folder, config.get("sha256"))
    try:
        return config, decode_tensors(data)
    except ValueError as error:
        raise ValueError(f"folder: {folder / TENSORS} is {error}") from None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"folder: expected one that pf.save wrote, found no file {path}")
    if path.stat().st_size > _LARGEST_CONFIG:
        raise ValueError(f"folder: {path} is too large to be what pf.save wrote; {_AGAIN}")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"folder: {path} is not JSON, or cut short ({error}); {_AGAIN}") from None
    if not isinstance(config, dict) or "format" not in config:
        raise ValueError(f"folder: {path} is not what pf.save wrote: it has no format number")
    if type(config["format"]) is not int or config["format"] != FORMAT:
        raise ValueError(
            f"folder: {path} has format {config['format']!r}, this version of pyroflows reads "
            f"{FORMAT}; update pyroflows (it was written by {config.get('pyroflows')!r})"
        )
    if config.get("checksum") != _checksum(config):
        raise ValueError(f"folder: {path} was changed after it was saved; {_AGAIN}")
    return config


def _read_tensors(folder: Path, expected: Any) -> bytes:
    found = False
    for name in (TENSORS, _NEXT, TENSORS):  # the last for a save that ends in between
        path = folder / name
        if path.is_file():
            found = True
            data = path.read_bytes()
            if digest(data) == expected:
                return data
    path = folder / TENSORS
    if not found:
        raise ValueError(f"folder: found no file {path}; {_AGAIN}")
    raise ValueError(
        f"folder: {path} is not the file that config.json was saved with: cut short, changed, or "
        f"of another save; {_AGAIN}"
    )


def _checksum(config: dict[str, Any]) -> str:
    rest = {k: v for k, v in config.items() if k != "checksum"}
    return digest(json.dumps(rest, sort_keys=True, ensure_ascii=True).encode())
