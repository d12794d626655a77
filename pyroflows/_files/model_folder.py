"""Two files in a folder, written so that a killed process leaves either the old pair or the new.

``config.json`` says what was saved and carries size and SHA-256 of ``model.safetensors``, the
tensors. New tensors are first written beside the old ones; the renaming of ``config.json`` is the
one moment at which the new pair becomes valid. Whoever reads between that and the last renaming
finds the tensors under their first name. Of several who write into one folder each waits for the
one before, so the last that ends is what is read; who reads meanwhile and finds tensors of another
save than the config's reads both again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from pyroflows._files.atomic import locked, sync_folder, write_atomically
from pyroflows._files.reading import content_of, status_of
from pyroflows._files.tensors import decode_tensors, digest, encode_tensors

FORMAT = 1
CONFIG, TENSORS = "config.json", "model.safetensors"
_NEXT = ".model.safetensors.next"
_DRAFTS = {CONFIG: ".config.json.draft", _NEXT: ".model.safetensors.draft"}
_LARGEST_CONFIG = 64 * 2**20
_READS = 100  # of a folder that others write into; each but the last found a save in between
_AGAIN = "get the folder again from where it was saved, or save anew"


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files, alone in the folder meanwhile.

    Args:
        folder: made where there is none.
        config: plain values.
        tensors: by name.

    Raises:
        OSError: it cannot be written; what was there before is whole.
    """
    data = encode_tensors(tensors, format="pt")
    config = {"format": FORMAT, **config, "bytes": len(data), "sha256": digest(data)}
    config["checksum"] = checksum(config)
    text = json.dumps(config, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _finish_earlier(folder)
        write_atomically(folder / _NEXT, data, folder / _DRAFTS[_NEXT])
        write_atomically(folder / CONFIG, text.encode(), folder / _DRAFTS[CONFIG])
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
    config, data = _read_pair(folder)
    try:
        return config, decode_tensors(data)
    except ValueError as error:
        raise ValueError(f"folder: {folder / TENSORS} is {error}") from None


def _read_pair(folder: Path) -> tuple[dict[str, Any], bytes]:
    """A config and the bytes that it was saved with, whatever is saved meanwhile."""
    stamp = None
    for _ in range(_READS):
        before, stamp = stamp, status_of(folder / CONFIG, "folder")
        if before and stamp and _moment(before) == _moment(stamp):
            break  # no save came in between: they do not belong together
        config = _read_config(folder)
        data = _read_tensors(folder, config)
        if data is not None:
            return config, data
    path = folder / TENSORS
    if status_of(path, "folder") is None:
        raise ValueError(f"folder: found no file {path}; {_AGAIN}")
    raise ValueError(
        f"folder: {path} is not the file that config.json was saved with: cut short, changed, or "
        f"of another save; {_AGAIN}"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    status = status_of(path, "folder")
    if status is None:
        raise ValueError(f"folder: expected one that pf.save wrote, found no file {path}")
    if status.st_size > _LARGEST_CONFIG:
        raise ValueError(f"folder: {path} is too large to be what pf.save wrote; {_AGAIN}")
    try:
        config = json.loads(content_of(path, "folder"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"folder: {path} is not JSON, or cut short ({error}); {_AGAIN}") from None
    if not isinstance(config, dict) or "format" not in config:
        raise ValueError(f"folder: {path} is not what pf.save wrote: it has no format number")
    if type(config["format"]) is not int or config["format"] != FORMAT:
        raise ValueError(
            f"folder: {path} has format {config['format']!r}, this version of pyroflows reads "
            f"{FORMAT}; update pyroflows (it was written by {config.get('pyroflows')!r})"
        )
    if config.get("checksum") != checksum(config):
        raise ValueError(f"folder: {path} was changed after it was saved; {_AGAIN}")
    return config


def _read_tensors(folder: Path, config: dict[str, Any]) -> bytes | None:
    """The tensors that a config was saved with; None where they are not there (any more)."""
    for name in (TENSORS, _NEXT, TENSORS):  # the last for a save that ends in between
        path = folder / name
        status = status_of(path, "folder")
        if status is None or status.st_size != config.get("bytes", status.st_size):
            continue
        data = content_of(path, "folder")
        if digest(data) == config.get("sha256"):
            return data
    return None


def _moment(status: os.stat_result) -> tuple[int, int]:
    """When which file got its name: no two saves have the same."""
    return status.st_ino, status.st_mtime_ns


def checksum(config: dict[str, Any]) -> str:
    """The SHA-256 of plain values by name, but for that under ``"checksum"``."""
    rest = {k: v for k, v in config.items() if k != "checksum"}
    return digest(json.dumps(rest, sort_keys=True, ensure_ascii=True).encode())
