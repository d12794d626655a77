"""Files read whole, or refused in words: never a pipe, a device or what may not be read."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class UnreadableError(ValueError):
    """A file that is there, and may not be read."""


def status_of(path: Path, name: str) -> os.stat_result | None:
    """Size and time of a file that ends; None for no file, a pipe, a device or a folder.

    Args:
        path: of the file, or of a link to one.
        name: what it belongs to, to begin errors with.

    Raises:
        UnreadableError: the system does not let it be looked at.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, name, error) from None
    return status if stat.S_ISREG(status.st_mode) else None


def content_of(path: Path, name: str) -> bytes:
    """All of a file; nothing where it is gone.

    Args:
        path: of one that ``status_of`` has a status of.
        name: as there.

    Raises:
        UnreadableError: the system does not let it be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise _unreadable(path, name, error) from None


def _unreadable(path: Path, name: str, error: OSError) -> UnreadableError:
    why = (error.strerror or str(error)).lower()
    return UnreadableError(f"{name}: {path} cannot be read: {why}; see to its permissions")
