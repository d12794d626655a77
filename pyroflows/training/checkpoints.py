"""Training that can be picked up where it stopped: checkpoints, whole at any moment.

A checkpoint is one safetensors file (``_files.tensors``), written beside the old ones, flushed to
the disk and only then given its name, which carries the hash of its content; the last two are kept.
What ends a process while it writes leaves the ones before as they were, and a damaged file is known
by its name.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyroflows._checks import check_positive, to_builtin
from pyroflows._distributed import gathered
from pyroflows._files.atomic import locked, write_atomically
from pyroflows._files.reading import UnreadableError, content_of, status_of
from pyroflows._files.tensors import VersionError, digest, pack, unpack
from pyroflows.training.identity import OtherTrainingError, check_same
from pyroflows.training.state import ANY, Many, check_like

if TYPE_CHECKING:
    from lightning_fabric import Fabric


FORMAT = 4
_NAME = re.compile(r"checkpoint-[0-9]{8,18}-[0-9a-f]{32}\.safetensors")
_LOCK = ".training.lock"
_COPIES, _BESIDE = 16, 2**30  # bytes of a checkpoint are less: so often what is trained, and these
_PARTS = {"identity": ANY, "shared": ANY, "processes": Many(ANY)}


@dataclass(frozen=True)
class Checkpoint:
    """Where, and how often, a training is kept, and whether to go on from what is there.

    ``pf.fit``, ``pf.distill`` and ``pf.fit_guide`` take one, or a folder alone, as ``checkpoint=``.
    A checkpoint holds all that training depends on, written so that a process may end at any
    moment; the last two are kept. Ctrl-C and SIGTERM end a training after the step at hand (several
    processes after the epoch) with one more; a second one ends it at once, without.

    Args:
        folder: where; made if it is not there.
        every: epochs from one checkpoint to the next (windows of 50 steps in a distillation, of 100
            for a guide); 0.1 for ten in each epoch.
        resume: go on from the last checkpoint in the folder, if there is one, to the very losses of
            a training that was never interrupted (on a CPU). The number of epochs or steps is a
            total. Data and the other arguments are to be the same, and are known by hashes: all of
            an array up to 16 MiB; of a larger one, and of a file, 256 pieces of it; of a data set
            of your own its length and three items. What is not seen (a model's code, a stream) is
            for you to keep the same. Data sets draw from the global generators of torch, numpy and
            Python, or are the same in each pass.

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
    """The checkpoints of one training in a folder, which nobody else trains into meanwhile.

    Args:
        wanted: where and how often, and whether to go on from the last.
        identity: what must be the same for a checkpoint to be gone on from, by name.
        fabric: the processes; the first one writes and reads.
        size: bytes of what is trained.

    Attributes:
        found: whether there are any to go on from.

    Raises:
        ValueError: the folder is a file, another training is at work in it, or it holds checkpoints
            and ``resume`` is False.
        OSError: the folder cannot be made or read.
    """

    def __init__(
        self, wanted: Checkpoint, identity: dict[str, Any], fabric: Fabric, size: int
    ) -> None:
        self.folder = Path(wanted.folder)
        self.every = wanted.every
        self.identity = json.loads(json.dumps(identity, default=to_builtin))
        self.fabric = fabric
        self.largest = _BESIDE + _COPIES * size
        self._lock = contextlib.ExitStack()
        self._last: Path | None = None
        self._done = 0
        self.found: bool = self._first_alone(self._open, wanted.resume)

    def close(self) -> None:
        """Let others train into the folder."""
        self._lock.close()

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

    def load(self, check: Callable[[dict[str, Any]], None]) -> tuple[dict[str, Any], Any]:
        """What all processes had alike, and what this one had of its own: None if it was not there.

        Args:
            check: raises a ``ValueError`` where a state, with what all have (``"shared"``) and each
                has of its own (``"processes"``), is none to go on from.

        Raises:
            ValueError: the last one is of another training, of a format that this version does not
                know, or may not be read; or all are damaged.
        """
        state = self._first_alone(self._read, check)
        rank, each = self.fabric.global_rank, state["processes"]
        return state["shared"], each[rank] if rank < len(each) else None

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
        found = (path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))
        return sorted(found, key=_serial, reverse=True)

    def _open(self, resume: bool) -> bool:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"checkpoint: expected a folder, {self.folder} is a file")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.enter_context(locked(self.folder, wait=False, file=_LOCK))
        except TimeoutError:
            raise ValueError(
                f"checkpoint: another training is at work in {self.folder}; wait for its end, or "
                "give another folder"
            ) from None
        files = self._files()
        if files and not resume:
            self.close()
            raise ValueError(
                f"checkpoint: {self.folder} holds {len(files)} already, which a new training would "
                "replace; say pf.Checkpoint(folder, resume=True) to go on from the last, or give "
                "another folder"
            )
        return bool(files)

    def _read(self, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        files = self._files()
        for path in files:
            try:
                state = self._state_in(path)
                check_same(self.identity, state["identity"], f"checkpoint: {path}")
                check(state)
            except (VersionError, OtherTrainingError, UnreadableError):
                raise
            except ValueError as error:
                why = f"checkpoint: {path} is damaged: {error}"
            else:
                self._last = path
                return state
            if path != files[-1]:
                warnings.warn(f"{why}; the one before is tried", stacklevel=6)
        all_of = "" if len(files) == 1 else f"all {len(files)} are; "
        raise ValueError(f"{why}; {all_of}restore a copy, or begin anew in another folder")

    def _state_in(self, path: Path) -> dict[str, Any]:
        """What a file holds.

        Raises:
            ValueError: it is damaged, or no file.
        """
        status = status_of(path, "checkpoint")
        if status is None:
            raise ValueError("it is no file (a folder, a pipe, a device, a link to nothing)")
        if status.st_size > self.largest:
            raise ValueError(
                f"it has {status.st_size:,} bytes, where a training like this one writes less than "
                f"{self.largest:,}"
            )
        content = content_of(path, "checkpoint")
        if _name(_serial(path), content) != path.name:
            raise ValueError(f"its {len(content):,} bytes have another hash than its name says")
        state = unpack(content, f"checkpoint: {path}", FORMAT)
        check_like(state, _PARTS, "it")
        return state

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


@contextlib.contextmanager
def open_checkpoints(
    wanted: str | Path | Checkpoint | None,
    identity: Callable[[], dict[str, Any]],
    fabric: Fabric,
    tensors: Iterable[Tensor],
) -> Iterator[Checkpoints | None]:
    """``Checkpoints`` of a training of these tensors; None where none are asked for."""
    if wanted is None:
        yield None
        return
    if not isinstance(wanted, Checkpoint):
        wanted = Checkpoint(wanted)
    precision = fabric.strategy.precision.precision
    same = {**identity(), "precision": str(precision)}
    made = Checkpoints(wanted, same, fabric, sum(tensor.nbytes for tensor in tensors))
    with contextlib.closing(made):
        yield made


def _name(serial: int, content: bytes) -> str:
    return f"checkpoint-{serial:08d}-{digest(content)[:32]}.safetensors"


def _serial(path: Path) -> int:
    return int(path.name.split("-")[1])
