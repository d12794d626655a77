"""Finding data files in the folder that the user names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "PYROFLOWS_DATA"


@dataclass(frozen=True)
class Remote:
    """A public address of a file together with the checksum the file must have.

    Attributes:
        url: where the file can be fetched.
        md5: its MD5 checksum in hexadecimal digits.
    """

    url: str
    md5: str


def data_folder() -> Path:
    """Return the folder that holds the data files.

    It is named by the environment variable ``PYROFLOWS_DATA`` and has one
    sub-folder per set; each loader's docstring says which file it reads there.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: if the variable is not set or names no folder.

    Example::

        $ export PYROFLOWS_DATA=~/data     # in the shell, before Python starts
        $ python -c "import pyroflows as pf; print(pf.datasets.data_folder())"
    """
    value = os.environ.get(VARIABLE)
    if not value:
        raise FileNotFoundError(
            f"the environment variable {VARIABLE} is not set; it must name the folder "
            "that holds the data files"
        )
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the environment variable {VARIABLE} names {value!r}, which is not a folder"
        )
    return folder


def find_file(relative: str, *, source: str, remote: Remote | None = None) -> Path:
    """Return the path of one data file, fetching it first where that is asked for.

    Args:
        relative: the file's path inside the data folder, with forward slashes.
        source: where the data can be had, for the error message.
        remote: an address to fetch the file from if it is absent; ``None`` never
            touches the network.

    Returns:
        The path of an existing file.

    Raises:
        FileNotFoundError: if the folder or the file is missing. The message names
            the expected file, the environment variable and the source.
        ValueError: if a fetched file does not have the expected checksum.
    """
    try:
        path = data_folder() / relative
    except FileNotFoundError as error:
        message = f"{error}. Expected the file {relative} in it. Source: {source}"
        raise FileNotFoundError(message) from None
    if path.is_file():
        return path
    if remote is None:
        raise FileNotFoundError(
            f"no file {relative} in the folder that {VARIABLE} names ({path.parent} was "
            f"searched). Source: {source}"
        )
    import pooch

    path.parent.mkdir(parents=True, exist_ok=True)
    fetched = pooch.retrieve(
        remote.url, known_hash=f"md5:{remote.md5}", fname=path.name, path=path.parent
    )
    return Path(fetched)


def has_file(relative: str) -> bool:
    """Say whether the data folder is there and holds the file ``relative``."""
    try:
        return (data_folder() / relative).is_file()
    except FileNotFoundError:
        return False
