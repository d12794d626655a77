"""Small images as unsigned bytes, to be dequantised by whoever models them.

The tensors are ``uint8`` of shape ``(n, channels, height, width)`` with values 0..255:
noise drawn anew in each epoch needs the integers.
"""

from __future__ import annotations

import tarfile
import warnings

import numpy as np
import numpy.typing as npt
import torch

from pyroflows.datasets.folder import Remote, find_file, has_file
from pyroflows.datasets.image_formats import read_cifar_batch, read_idx, read_packed_cifar
from pyroflows.datasets.split import LabelledSplit, Split

_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
_CIFAR10 = Remote(
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"
)

Bytes = npt.NDArray[np.uint8]


def mnist(*, download: bool = False) -> LabelledSplit:
    """Handwritten digits of 28 x 28 grey pixels, 70,000 images in ten classes.

    Reads, in the folder that ``PYROFLOWS_DATA`` names, ``mnist/mnist.npz`` (arrays
    ``x_train``, ``y_train``, ``x_test`` and ``y_test``) or else the four published files
    ``mnist/train-images-idx3-ubyte.gz`` and so on. The test part is the official one;
    validation is the last sixth of the official training part, in its order.

    Source: Y. LeCun, C. Cortes and C. Burges, "The MNIST database of handwritten digits";
    files at https://ossci-datasets.s3.amazonaws.com/mnist/.
    Licence: CC BY-SA 3.0, as usually given.

    Args:
        download: whether to fetch missing files into the folder; needs pooch.

    Returns:
        ``uint8`` images of shape ``(n, 1, 28, 28)`` with labels: 50,000 training, 10,000
        validation and 10,000 test.

    Raises:
        FileNotFoundError: if the variable is not set or the files are missing.
        ValueError: if a file is not in the expected format or fails its checksum.

    Example::

        pictures = pf.datasets.mnist()
        pictures.train.shape, pictures.train_labels.shape
    """
    if has_file("mnist/mnist.npz"):
        path = find_file("mnist/mnist.npz", source=_MNIST_URL)
        with np.load(path, allow_pickle=False) as arrays:
            train, test = arrays["x_train"], arrays["x_test"]
            train_labels, test_labels = arrays["y_train"], arrays["y_test"]
    else:
        train, train_labels, test, test_labels = (
            read_idx(
                find_file(
                    f"mnist/{name}",
                    source=f"{_MNIST_URL}{name}, fetched by download=True",
                    remote=Remote(_MNIST_URL + name, md5) if download else None,
                )
            )
            for name, md5 in _MNIST_FILES.items()
        )
    return _held_out(
        train[:, None], train_labels, test[:, None], test_labels, n_val=len(train) // 6
    )


def cifar10(*, download: bool = False) -> LabelledSplit:
    """Photographs of 32 x 32 colour pixels, 60,000 images in ten classes.

    Reads, in the folder that ``PYROFLOWS_DATA`` names, the published archive
    ``cifar10/cifar-10-python.tar.gz`` or else the packed files
    ``cifar10_test/cifar10_train.xz`` and ``cifar10_test/cifar10_test.xz``, described at
    ``image_formats.read_packed_cifar``. Where only the packed test file is there, the
    training and validation parts are empty and a warning says so. The test part is the
    official one; validation is the last tenth of the official training part, in the
    order of the file. The packed files have an order of their own.

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009);
    archive at https://www.cs.toronto.edu/~kriz/cifar.html.
    Licence: none stated.

    Args:
        download: whether to fetch the archive into the folder if neither it nor the
            packed training file is there; needs pooch.

    Returns:
        ``uint8`` images of shape ``(n, 3, 32, 32)``, red first, with labels: 45,000
        training, 5,000 validation and 10,000 test.

    Raises:
        FileNotFoundError: if the variable is not set or the files are missing.
        KeyError: if the archive lacks a batch.
        ValueError: if a packed file is not in the expected format, or the fetched archive
            fails its checksum.
        pickle.UnpicklingError: if a batch asks for anything but an array.

    Warns:
        UserWarning: if there is no training file.

    Example::

        pictures = pf.datasets.cifar10()
        pictures.test.shape                                   # (10000, 3, 32, 32)
    """
    packed_train, packed_test = (f"cifar10_test/cifar10_{part}.xz" for part in ("train", "test"))
    archive_name = "cifar10/cifar-10-python.tar.gz"
    source = f"{_CIFAR10.url}, fetched by download=True"
    unpacked = not has_file(archive_name) and has_file(packed_test)
    if unpacked and (has_file(packed_train) or not download):
        test, test_labels = read_packed_cifar(find_file(packed_test, source=source))
        if has_file(packed_train):
            train, train_labels = read_packed_cifar(find_file(packed_train, source=source))
        else:
            warnings.warn(
                "the CIFAR-10 training file is absent: train and val are empty. "
                f"Expected {packed_train} or {archive_name}; source: {source}",
                UserWarning,
                stacklevel=2,
            )
            train, train_labels = test[:0], test_labels[:0]
    else:
        path = find_file(archive_name, source=source, remote=_CIFAR10 if download else None)
        with tarfile.open(path) as archive:
            batches = [read_cifar_batch(archive, f"data_batch_{k}") for k in range(1, 6)]
            test, test_labels = read_cifar_batch(archive, "test_batch")
        train = np.concatenate([images for images, _ in batches])
        train_labels = np.concatenate([labels for _, labels in batches])
    return _held_out(train, train_labels, test, test_labels, n_val=len(train) // 10)


def freyfaces(*, seed: int = 123) -> Split:
    """Faces of one person in 1,965 frames of a film, 28 x 20 grey pixels.

    Reads ``freyfaces/freyfaces.npz`` in the folder that ``PYROFLOWS_DATA`` names: the
    array ``x`` (1965, 28, 20), in the order of the film. Neighbouring frames are nearly
    equal, and the split of the Sylvester-flow experiments shuffles them: with the default
    seed the parts are those of that paper. A test frame thus has near-copies among the
    training frames.

    Source: B. Frey and S. Roweis, https://cs.nyu.edu/~roweis/data.html; also in the GitHub
    repository riannevdberg/sylvester-flows, folder data/Freyfaces.
    Licence: none stated.

    Args:
        seed: fixes the shuffle.

    Returns:
        ``uint8`` images of shape ``(n, 1, 28, 20)``: 1,565 training, 200 validation and
        200 test.

    Raises:
        FileNotFoundError: if the variable is not set or the file is missing.

    Example::

        faces = pf.datasets.freyfaces().train                 # (n, 1, 28, 20)
    """
    path = find_file(
        "freyfaces/freyfaces.npz",
        source="array x from data/Freyfaces of https://github.com/riannevdberg/sylvester-flows",
    )
    with np.load(path, allow_pickle=False) as arrays:
        frames = arrays["x"]
    # The legacy generator is what the published split was made with, here as an
    # object of its own instead of the global one.
    np.random.RandomState(seed).shuffle(frames)  # noqa: NPY002
    images = torch.from_numpy(frames)[:, None]
    return Split(images[:-400], images[-400:-200], images[-200:])


def _held_out(
    train: Bytes, train_labels: Bytes, test: Bytes, test_labels: Bytes, *, n_val: int
) -> LabelledSplit:
    """Set the last ``n_val`` training images aside for validation."""
    cut = len(train) - n_val
    # Copies: arrays that were read from a buffer are read-only, tensors cannot be.
    images, labels = torch.tensor(train), torch.tensor(train_labels, dtype=torch.int64)
    return LabelledSplit(
        images[:cut],
        images[cut:],
        torch.tensor(test),
        labels[:cut],
        labels[cut:],
        torch.tensor(test_labels, dtype=torch.int64),
    )
