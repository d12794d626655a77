"""Folders to and from the Hugging Face hub, through ``huggingface_hub``, an optional extra."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyroflows._files.model_folder import CONFIG, TENSORS

FILES = [CONFIG, TENSORS]


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "huggingface_hub is not installed; run: pip install 'pyroflows[hub]'"
        ) from error
    return huggingface_hub


def upload(write: Callable[[Path], Any], name: str, **options: Any) -> Any:
    """Make the repository if there is none, and upload what ``write`` puts into a folder.

    Args:
        write: fills the folder that it is given.
        name: ``"owner/name"``.
        **options: of ``HfApi.upload_folder``.
    """
    api = _library().HfApi(token=options.pop("token", None))  # for the repository too
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))  # first: what cannot be saved makes no repository
        api.create_repo(name, exist_ok=True)
        options = {"commit_message": "Save a flow", "allow_patterns": FILES, **options}
        return api.upload_folder(repo_id=name, folder_path=folder, **options)


def download(name: str, revision: str | None) -> Path:
    """A local copy of the two files.

    Args:
        name: ``"owner/name"``.
        revision: a branch, a tag or a commit.
    """
    options = {"revision": revision, "allow_patterns": FILES}
    return Path(_library().snapshot_download(name, **options))
