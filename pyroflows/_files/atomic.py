"""Files that are there as a whole or not at all, whoever writes them and whenever it ends."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"


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
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Be the only writer in a folder, of all threads and processes that ask so.

    The lock is the system's, on the folder itself, and ends with the process that holds it. Where
    a folder cannot be locked (Windows, some network drives) it is on a file in it that stays.

    Args:
        folder: one that is there.
        wait: for another writer to be done.

    Raises:
        TimeoutError: there is another writer, and ``wait`` is False.
        OSError: the folder cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        try:
            _lock_folder(folder, wait, stack)
        except NotImplementedError:
            from filelock import FileLock

            stack.enter_context(FileLock(folder / LOCK, timeout=-1 if wait else 0))
        yield


def _lock_folder(folder: Path, wait: bool, stack: contextlib.ExitStack) -> None:
    if os.name != "posix":
        raise NotImplementedError
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise TimeoutError(f"{folder}: another process or thread is writing to it") from None
    except OSError as error:
        raise NotImplementedError from error


def sync_folder(folder: Path) -> None:
    """See that the names in a folder are on the disk too, where the system can."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
