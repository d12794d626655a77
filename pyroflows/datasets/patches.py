"""Patches of natural images, the high-dimensional benchmark of density estimation."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pyroflows.datasets.folder import find_file
from pyroflows.datasets.split import Split, resolved_dtype

_SIDE = 8
_VALIDATION_IMAGES = 20
# Bounds the memory of the double-precision intermediates.
_CHUNK = 100_000


def bsds300(
    *,
    n_train: int = 100_000,
    n_val: int = 10_000,
    n_test: int = 20_000,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Split:
    """Grey patches of 8 x 8 pixels from the Berkeley segmentation images, 63 features.

    Reads ``bsds300/bsds300_images.tar`` in the folder that ``PYROFLOWS_DATA`` names:
    members ``train/*.jpg`` (200) and ``test/*.jpg`` (100), of 481 x 321 pixels. Patches
    are drawn at uniform places of uniformly drawn grey images; uniform noise on [0, 1)
    is added to each pixel, the sum is divided by 256, the patch's mean is subtracted
    and the last pixel, which the others then determine, is left out.

    Training and validation patches come from the 200 training images, 20 of which are
    set aside for validation: patches of one image overlap, so that drawing both parts
    from the same images would not hold anything back. Images differ much, and 20 are
    few: the validation score can lie several nats from the test score and serves to
    compare models and stopping times only. Test patches come from the 100 test images.
    The rows follow the distribution of the published ``BSDS300.hdf5``; they are not
    its rows.

    Source: D. Martin, C. Fowlkes, D. Tal and J. Malik, "A Database of Human Segmented
    Natural Images" (2001), https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/;
    the same images are in the GitHub repository BIDS/BSDS500, folder BSDS500/data/images.
    Licence: non-commercial research and education.

    Args:
        n_train: number of training patches.
        n_val: number of validation patches.
        n_test: number of test patches.
        seed: fixes the images set aside, the places and the noise.
        dtype: floating-point type of the result; torch's default if ``None``.

    Returns:
        Rows of shape ``(n, 63)``.

    Raises:
        FileNotFoundError: if the variable is not set or the file is missing.
        TypeError: if ``dtype`` is not floating-point.
        ValueError: if a number of patches or the seed is negative.

    Example::

        patches = pf.datasets.bsds300().train                 # (n, 63)
    """
    dtype = resolved_dtype(dtype)
    if min(n_train, n_val, n_test) < 0:
        raise ValueError(f"negative number of patches: {(n_train, n_val, n_test)}")
    path = find_file(
        "bsds300/bsds300_images.tar",
        source=(
            "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/, packed as "
            "train/*.jpg and test/*.jpg"
        ),
    )
    # One stream for each part: the test rows do not depend on how many others are drawn.
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(4)]
    images = _grey_images(path, "train")
    order = streams[0].permutation(len(images))
    return Split(
        _patches(images[order[_VALIDATION_IMAGES:]], n_train, streams[1], dtype),
        _patches(images[order[:_VALIDATION_IMAGES]], n_val, streams[2], dtype),
        _patches(_grey_images(path, "test"), n_test, streams[3], dtype),
    )


def _grey_images(path: Path, part: str) -> npt.NDArray[np.uint8]:
    """Decode the images of one part as an array ``(images, height, width)``."""
    from PIL import Image

    images = []
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            content = archive.extractfile(member)
            if content is None or not member.name.startswith(f"{part}/"):
                continue
            with Image.open(io.BytesIO(content.read())) as image:
                pixels = np.asarray(image.convert("L"))
            # Upright images are transposed, so that all of them fit in one array.
            images.append(pixels if pixels.shape[0] <= pixels.shape[1] else pixels.T)
    return np.stack(images)


def _patches(
    images: npt.NDArray[np.uint8], n: int, rng: np.random.Generator, dtype: torch.dtype
) -> torch.Tensor:
    """Draw ``n`` patches of the images as rows ``(n, 63)``."""
    windows = np.lib.stride_tricks.sliding_window_view(images, (_SIDE, _SIDE), axis=(1, 2))
    rows = torch.empty(n, _SIDE * _SIDE - 1, dtype=dtype)
    for start in range(0, n, _CHUNK):
        size = min(_CHUNK, n - start)
        place = tuple(rng.integers(0, bound, size) for bound in windows.shape[:3])
        levels = windows[place].reshape(size, -1)
        chunk = (levels + rng.random(levels.shape)) / 256
        chunk -= chunk.mean(axis=1, keepdims=True)
        rows[start : start + size] = torch.from_numpy(chunk[:, :-1])
    return rows
