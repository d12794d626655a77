"""Files that are there as a whole or not at all, whenever the process that writes them ends."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_atomically(path: Path, data: bytes, draft: Path | None = None) -> None:
    """Replace a file by one with other bytes; at no moment is there a part of either.

    Args:
        path: of the file.
        data: all of it.
        draft: what to call it until it is whole, in the same folder: a name that stays the same is
            written over by the next, where a process was killed in between.

    Raises:
        OSError: it could not be written; the draft is gone, and what was there before is whole.
    """
    draft = draft or path.with_name(f"{path.name}.{os.getpid()}.tmp")
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


def sync_folder(folder: Path) -> None:
    """See that the names in a folder are on the disk too, where the system can."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
