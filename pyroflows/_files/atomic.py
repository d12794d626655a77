"""Files that are there as a whole or not at all, whoever writes them and whenever it ends."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"
_held: set[int] = set()  # descriptors of locked files


def write_atomically(path: Path, data: bytes, draft: Path | None = None) -> None:
    """Replace a file by one with other bytes; at no moment is there a part of either.

    Args:
        path: of the file.
        data: all of it.
        draft: what to call it until it is whole, in the same folder; by default a name that nobody
            else uses. One that stays the same, for a writer alone in the folder, is written over
            by the next, where a process was killed in between.

    Raises:
        OSError: it could not be written; the draft is gone, and what was there before is whole.
    """
    draft = draft or path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(draft, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True, file: str = "") -> Iterator[None]:
    """Be the only one in a folder, of all threads and processes that ask so.

    The lock is the system's, on the folder itself, and ends with the process that holds it. Where
    a folder cannot be locked (Windows, some network drives) it is on a file in it that stays.

    Args:
        folder: one that is there.
        wait: for another one to be done.
        file: to lock a file of this name in it instead, there meanwhile; those who lock the folder
            go on.

    Raises:
        TimeoutError: there is another one, and ``wait`` is False.
        OSError: the folder cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        try:
            _lock(folder / file, wait, stack)
        except NotImplementedError:
            from filelock import FileLock

            path = folder / (file or LOCK)
            stack.enter_context(FileLock(path, timeout=-1 if wait else 0))
        yield


def _lock(path: Path, wait: bool, stack: contextlib.ExitStack) -> None:
    """Hold the lock of a folder, or of a file that is there as long as it is locked."""
    if os.name != "posix":
        raise NotImplementedError
    import fcntl

    is_folder = path.is_dir()
    while True:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT, 0o666)
        _held.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            _release(descriptor)
            if isinstance(error, BlockingIOError):
                raise TimeoutError(f"{path}: another process or thread is at work there") from None
            raise NotImplementedError from error
        if is_folder or _is_at(path, descriptor):
            break
        _release(descriptor)  # whoever had it has just removed it
    stack.callback(_release, descriptor, None if is_folder else path)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _release(descriptor: int, file: Path | None = None) -> None:
    if descriptor not in _held:
        return
    if file is not None:
        with contextlib.suppress(OSError):
            file.unlink()
    _held.discard(descriptor)
    os.close(descriptor)


def _release_all() -> None:
    for descriptor in list(_held):
        _release(descriptor)


if hasattr(os, "register_at_fork"):
    # A forked process, such as a data loader's, would hold its parent's locks after the parent.
    os.register_at_fork(after_in_child=_release_all)


def sync_folder(folder: Path) -> None:
    """See that the names in a folder are on the disk too, where the system can."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
