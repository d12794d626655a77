"""Training that can be picked up where it stopped: checkpoints, whole at any moment.

A checkpoint is one safetensors file (tensors, and the rest as JSON in its header: no pickle). It is
written beside the old ones, flushed to the disk and only then given its name, which carries the
hash of its content; the last two are kept. What ends a process while it writes leaves the ones
before as they were, and a damaged file is known by its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyroflows._checks import check_positive
from pyroflows._distributed import gathered
from pyroflows._files.atomic import write_atomically

if TYPE_CHECKING:
    from lightning_fabric import Fabric

FORMAT = 1


class Checkpoints:
    """The checkpoints of one training in a folder.

    Args:
        folder: where; made if it is not there.
        every: how much training lies between two, in the caller's unit (epochs).
        resume: go on from the last one, where there is one.
        identity: what must be the same for a checkpoint to be gone on from, by name.
        fabric: the processes; the first one writes and reads.

    Raises:
        ValueError: ``every`` is not positive, ``folder`` is a file, or holds checkpoints and
            ``resume`` is False; or the last checkpoint is of another training, or of a format that
            this version does not know; or all are damaged.
        OSError: the folder cannot be made or read.
    """

    def __init__(
        self,
        folder: str | Path,
        every: float,
        resume: bool,
        identity: dict[str, Any],
        fabric: Fabric,
    ) -> None:
        check_positive(every=every)
        if not isinstance(folder, (str, os.PathLike)):
            raise ValueError(f"checkpoint: expected a folder, got a {type(folder).__name__}")
        self.folder = Path(folder)
        self.every = every
        self.identity = json.loads(json.dumps(identity))
        self.fabric = fabric
        self._last: Path | None = None
        self._done = 0
        self.found: dict[str, Any] | None = self._first_alone(self._open, resume)

    def due(self, progress: float) -> bool:
        """Whether to save, as much of the training being done."""
        return math.floor(progress / self.every + 1e-9) > self._done

    def save(self, progress: float, shared: dict[str, Any], own: dict[str, Any]) -> None:
        """Write a checkpoint.

        Args:
            progress: how much of the training is done, in the unit of ``every``.
            shared: the state that all processes have alike: tensors, numbers, words, lists, dicts.
            own: the state of each process.

        Raises:
            OSError: it could not be written (no space, no right); the ones before are whole.
        """
        state = {"identity": self.identity, "shared": shared, "own": gathered(self.fabric, own)}
        self._first_alone(self._write, state)
        self.restart(progress)

    def restart(self, progress: float) -> None:
        """Count from here to the next."""
        self._done = math.floor(progress / self.every + 1e-9)

    @property
    def own(self) -> dict[str, Any] | None:
        """What was found of this process's own; None where there were fewer then."""
        rank = self.fabric.global_rank
        return self.found["own"][rank] if rank < len(self.found["own"]) else None

    def _first_alone(self, do: Any, argument: Any) -> Any:
        """Let the first process do something for all; what it raises, all raise."""
        result = error = None
        if self.fabric.is_global_zero:
            try:
                result = do(argument)
            except (OSError, ValueError) as raised:
                error = raised
        result, error = self.fabric.broadcast((result, error))
        if error is not None:
            raise error
        return result

    def _files(self) -> list[Path]:
        """All checkpoints, the newest first."""
        return sorted(self.folder.glob("checkpoint-*.safetensors"), reverse=True)

    def _open(self, resume: bool) -> dict[str, Any] | None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"checkpoint: expected a folder, {self.folder} is a file")
        self.folder.mkdir(parents=True, exist_ok=True)
        files = self._files()
        if not files:
            return None
        if not resume:
            raise ValueError(
                f"checkpoint: {self.folder} holds {len(files)} already, which a new training would "
                "replace; pass resume=True to go on from the last, or another folder"
            )
        for path in files:
            content = path.read_bytes()
            if _name(_serial(path), content) == path.name:
                self._last = path
                state = unpack(content, str(path))
                _check_same(self.identity, state["identity"], str(path))
                return state
            warnings.warn(
                f"checkpoint: {path} is damaged ({len(content)} bytes, with another hash than its "
                "name says); the one before is tried",
                stacklevel=5,
            )
        raise ValueError(
            f"checkpoint: all {len(files)} in {self.folder} are damaged (their hashes differ from "
            "their names); restore them from a copy, or begin anew in another folder"
        )

    def _write(self, state: dict[str, Any]) -> None:
        content = pack(state)
        serial = max(map(_serial, self._files()), default=0) + 1
        path = self.folder / _name(serial, content)
        try:
            write_atomically(path, content, self.folder / ".checkpoint.writing")
        except OSError as error:
            kept = "none is there yet" if self._last is None else f"{self._last.name} is whole"
            raise OSError(
                error.errno,
                f"checkpoint: {len(content):,} bytes could not be written ("
                f"{error.strerror or error}); the weights in place are the best so far, and of the "
                f"checkpoints before {kept}. "
                "Make room and go on with resume=True",
                str(self.folder),
            ) from error
        for old in self._files():
            if old not in (path, self._last):
                with contextlib.suppress(OSError):
                    old.unlink()
        self._last = path


def open_checkpoints(
    folder: str | Path | None,
    every: float,
    resume: bool,
    identity: dict[str, Any],
    fabric: Fabric,
) -> Checkpoints | None:
    """``Checkpoints``, or None where none are asked for."""
    if folder is None:
        if resume:
            raise ValueError("resume: expected checkpoint= too, the folder to go on from; got None")
        return None
    return Checkpoints(folder, every, resume, identity, fabric)


def shapes_of(module: nn.Module) -> dict[str, str]:
    """Shape and dtype of each tensor in a module's state, in words."""
    return {
        name: f"{tuple(value.shape)} {value.dtype}" for name, value in module.state_dict().items()
    }


def digest_of(module: nn.Module) -> str:
    """A hash of the values in a module's state."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


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


def _check_same(mine: dict[str, Any], saved: dict[str, Any], name: str) -> None:
    """Raise a ``ValueError`` at the first thing that differs."""
    flat_mine, flat_saved = dict(_flat(mine)), dict(_flat(saved))
    for key in [*flat_saved, *flat_mine]:
        there, here = flat_saved.get(key, "nothing"), flat_mine.get(key, "nothing")
        if there != here:
            raise ValueError(
                f"checkpoint: {name} is of another training: {key} is {there} there, {here} here; "
                "give the flow and data it was made with, or another folder"
            )


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", item


def _name(serial: int, content: bytes) -> str:
    return f"checkpoint-{serial:08d}-{hashlib.sha256(content).hexdigest()[:32]}.safetensors"


def _serial(path: Path) -> int:
    words = path.name.split("-")
    return int(words[1]) if words[1].isdigit() else 0
