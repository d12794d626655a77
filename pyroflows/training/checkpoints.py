"""Training that can be picked up where it stopped: checkpoints, whole at any moment.

A checkpoint is one safetensors file (``_files.tensors``), written beside the old ones, flushed to
the disk and only then given its name, which carries the hash of its content; the last two are kept.
What ends a process while it writes leaves the ones before as they were, and a damaged file is known
by its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pyroflows._checks import check_positive, to_builtin
from pyroflows._distributed import gathered
from pyroflows._files.atomic import write_atomically
from pyroflows._files.tensors import digest, pack, unpack

if TYPE_CHECKING:
    from lightning_fabric import Fabric


FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """Where, and how often, a training is kept, and whether to go on from what is there.

    ``pf.fit``, ``pf.distill`` and ``pf.fit_guide`` take one, or a folder alone, as ``checkpoint=``.
    A checkpoint holds all that training depends on, written so that a process may end at any
    moment; the last two are kept.

    Args:
        folder: where; made if it is not there.
        every: epochs from one checkpoint to the next (windows of 50 steps in a distillation, of 100
            for a guide); 0.1 for ten in each epoch.
        resume: go on from the last checkpoint in the folder, if there is one, to the very losses of
            a training that was never interrupted (on a CPU). The number of epochs or steps is a
            total. The other arguments are to be the same; data sets draw from the global generators
            of torch, numpy and Python, or are the same in each pass.

    Raises:
        ValueError: no folder, or an ``every`` that is not positive.

    Example:
        >>> import pyroflows as pf
        >>> pf.Checkpoint("runs/one", every=5, resume=True)
        Checkpoint(folder='runs/one', every=5, resume=True)
    """

    folder: str | Path
    every: float = 1
    resume: bool = False

    def __post_init__(self) -> None:
        """See that all are of their kind."""
        check_positive(every=self.every)
        if not isinstance(self.folder, (str, os.PathLike)):
            raise ValueError(
                f"checkpoint: expected a folder, got a {type(self.folder).__name__}; or "
                "pf.Checkpoint(folder, every=..., resume=...)"
            )
        if not isinstance(self.resume, bool):
            raise ValueError(f"resume: expected True or False, got {self.resume!r}")
        object.__setattr__(self, "every", to_builtin(self.every))


class Checkpoints:
    """The checkpoints of one training in a folder.

    Args:
        wanted: where and how often, and whether to go on from the last.
        identity: what must be the same for a checkpoint to be gone on from, by name.
        fabric: the processes; the first one writes and reads.

    Raises:
        ValueError: the folder is a file, or holds checkpoints and ``resume`` is False; or the last
            checkpoint is of another training, or of a format that this version does not know; or
            all are damaged.
        OSError: the folder cannot be made or read.
    """

    def __init__(self, wanted: Checkpoint, identity: dict[str, Any], fabric: Fabric) -> None:
        self.folder = Path(wanted.folder)
        self.every = wanted.every
        self.identity = json.loads(json.dumps(identity))
        self.fabric = fabric
        self._last: Path | None = None
        self._done = 0
        self.found: dict[str, Any] | None = self._first_alone(self._open, wanted.resume)

    def due(self, progress: float) -> bool:
        """Whether to save, as much of the training being done."""
        return math.floor(progress / self.every + 1e-9) > self._done

    def save(self, progress: float, shared: dict[str, Any], apart: dict[str, Any]) -> None:
        """Write a checkpoint.

        Args:
            progress: how much of the training is done, in the unit of ``every``.
            shared: the state that all processes have alike: tensors, numbers, words, lists, dicts.
            apart: what this process has of its own.

        Raises:
            OSError: it could not be written (no space, no right); the ones before are whole.
        """
        each = gathered(self.fabric, apart)
        state = {"identity": self.identity, "shared": shared, "processes": each}
        self._first_alone(self._write, state)
        self.restart(progress)

    def restart(self, progress: float) -> None:
        """Count from here to the next."""
        self._done = math.floor(progress / self.every + 1e-9)

    @property
    def of_this_process(self) -> dict[str, Any] | None:
        """What was found of this process's own; None where there were fewer then."""
        rank, each = self.fabric.global_rank, self.found["processes"] if self.found else []
        return each[rank] if rank < len(each) else None

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
                "replace; say pf.Checkpoint(folder, resume=True) to go on from the last, or give "
                "another folder"
            )
        for path in files:
            content = path.read_bytes()
            if _name(_serial(path), content) == path.name:
                self._last = path
                state = unpack(content, f"checkpoint: {path}", FORMAT)
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
        content = pack(state, FORMAT)
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
                "Make room and go on with pf.Checkpoint(folder, resume=True)",
                str(self.folder),
            ) from error
        for old in self._files():
            if old not in (path, self._last):
                with contextlib.suppress(OSError):
                    old.unlink()
        self._last = path


def open_checkpoints(
    wanted: str | Path | Checkpoint | None, identity: dict[str, Any], fabric: Fabric
) -> Checkpoints | None:
    """``Checkpoints``, or None where none are asked for."""
    if wanted is None:
        return None
    if not isinstance(wanted, Checkpoint):
        wanted = Checkpoint(wanted)
    return Checkpoints(wanted, identity, fabric)


def shapes_of(module: nn.Module) -> dict[str, str]:
    """Shape and dtype of each tensor in a module's state, in words."""
    return {
        name: f"{tuple(value.shape)} {value.dtype}" for name, value in module.state_dict().items()
    }


def digest_of(module: nn.Module) -> str:
    """A hash of the values in a module's state."""
    hashed = hashlib.sha256()
    for name, value in module.state_dict().items():
        hashed.update(name.encode())
        hashed.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:32]


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
    return f"checkpoint-{serial:08d}-{digest(content)[:32]}.safetensors"


def _serial(path: Path) -> int:
    words = path.name.split("-")
    return int(words[1]) if words[1].isdigit() else 0
