"""Readers of the file formats in which small images are handed round."""

from __future__ import annotations

import gzip
import io
import lzma
import math
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def read_idx(path: Path) -> Bytes:
    """Read a gzip file in the idx format, the one MNIST is published in.

    The format is two zero bytes, a type code (8 for unsigned bytes), the number of
    axes, each length as a big-endian 32-bit integer, then the values in C order.

    Args:
        path: the file.

    Returns:
        The array, of the shape that the header states.

    Raises:
        ValueError: if the header is not that of unsigned bytes, or the content is
            not as long as the header states.
    """
    with gzip.open(path) as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path.name} is not an idx file of unsigned bytes")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"{path.name} ends within its header")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path.name} does not hold the {shape} values its header states")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_cifar_batch(archive: tarfile.TarFile, name: str) -> tuple[Bytes, Bytes]:
    """Read one pickled batch of the CIFAR-10 archive for Python.

    Args:
        archive: the open archive.
        name: the batch, such as ``test_batch``.

    Returns:
        Images of shape ``(n, 3, 32, 32)`` and labels of shape ``(n,)``.

    Raises:
        KeyError: if the archive has no such member.
        pickle.UnpicklingError: if the pickle asks for anything but an array.
    """
    member = archive.extractfile(f"cifar-10-batches-py/{name}")
    if member is None:
        raise KeyError(f"{name} is not a file in the archive")
    # The pickles were written by Python 2, whose strings are read as latin-1.
    batch = _ArrayUnpickler(io.BytesIO(member.read()), encoding="latin1").load()
    images = np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
    return images, np.asarray(batch["labels"], dtype=np.uint8)


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that can build arrays and nothing else, so that no file can run code."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if name == "_reconstruct" and module.endswith("core.multiarray"):
            return lambda _, shape, code: np.ndarray(shape, np.dtype(code))
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            # Old pickles pass the flags as 0 and 1, which numpy no longer likes.
            return lambda code, align=False, copy=False: np.dtype(code, bool(align), bool(copy))
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR-10 batch")


def read_packed_cifar(path: Path) -> tuple[Bytes, Bytes]:
    """Read images in a lossless packing that is small enough to keep beside code.

    The file is xz-compressed. It holds three planes of ``n`` images of 32 x 32 bytes,
    then ``n`` labels. The planes are green, red minus green and blue minus green, all
    modulo 256; each byte is the difference, again modulo 256, between a pixel and its
    prediction by the median-edge detector of LOCO-I from the pixels to the left (a),
    above (b) and above left (c): the median of a, b and a + b - c.

    Args:
        path: the file.

    Returns:
        Images of shape ``(n, 3, 32, 32)``, red first, and labels of shape ``(n,)``.

    Raises:
        ValueError: if the content is no whole number of images with labels.
    """
    with lzma.open(path) as file:
        content = np.frombuffer(file.read(), np.uint8)
    n, rest = divmod(len(content), 3 * 32 * 32 + 1)
    if rest:
        raise ValueError(f"{path.name} does not hold a whole number of 32 x 32 images")
    planes = content[: n * 3 * 32 * 32].reshape(3 * n, 32, 32)
    green, red, blue = _undo_prediction(planes).reshape(3, n, 32, 32)
    # Bytes wrap around on addition, which is the sum modulo 256 that is wanted.
    return np.stack([red + green, green, blue + green], axis=1), content[n * 3 * 32 * 32 :].copy()


def _undo_prediction(residuals: Bytes) -> Bytes:
    """Rebuild planes ``(n, height, width)`` from what their prediction left over."""
    n, height, width = residuals.shape
    # Pixels depend on earlier ones: scan the pixels, and take all images at once.
    step = np.ascontiguousarray(residuals.transpose(1, 2, 0)).astype(np.int16)
    plane = np.zeros((height, width, n), np.int16)
    for i in range(height):
        for j in range(width):
            if i and j:
                left, above, corner = plane[i, j - 1], plane[i - 1, j], plane[i - 1, j - 1]
                low, high = np.minimum(left, above), np.maximum(left, above)
                predicted = np.clip(left + above - corner, low, high)
            elif i or j:
                predicted = plane[i - 1, 0] if i else plane[0, j - 1]
            else:
                predicted = np.int16(0)
            plane[i, j] = (step[i, j] + predicted) % 256
    return plane.transpose(2, 0, 1).astype(np.uint8)
