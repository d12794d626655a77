"""Tests of the data sets: splits, seeds, file formats and error messages."""

import ast
import gzip
import inspect
import io
import lzma
import os
import pickle
import struct
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pyroflows import datasets
from pyroflows.datasets import LabelledSplit, Split, standardize
from pyroflows.datasets.image_formats import read_cifar_batch, read_idx

VARIABLE = "PYROFLOWS_DATA"
TOYS = ["moons", "circles", "blobs", "checkerboard", "pinwheel", "swiss_roll"]
BUNDLED = {
    "digits": (1439, 179, 179, 64),
    "breast_cancer": (457, 56, 56, 30),
    "wine": (144, 17, 17, 13),
    "diabetes": (354, 44, 44, 10),
}
FILES = {
    "miniboone": "miniboone/miniboone_val_test.npz",
    "power": "power_subset/power_subset.npz",
    "bsds300": "bsds300/bsds300_images.tar",
    "mnist": "mnist/train-images-idx3-ubyte.gz",
    "cifar10": "cifar10/cifar-10-python.tar.gz",
    "freyfaces": "freyfaces/freyfaces.npz",
}
LOADERS = [
    name
    for name in datasets.__all__
    if inspect.isfunction(getattr(datasets, name))
    and inspect.signature(getattr(datasets, name)).return_annotation in ("Split", "LabelledSplit")
]


def load(name: str, **keywords: object) -> Split:
    return getattr(datasets, name)(**keywords)


@pytest.fixture
def real_files() -> Callable[[str], None]:
    """Skip unless the user's folder holds the given file."""

    def need(relative: str) -> None:
        folder = os.environ.get(VARIABLE)
        if not folder or not Path(folder).is_dir():
            pytest.skip(f"{VARIABLE} names no folder")
        if not (Path(folder) / relative).exists():
            pytest.skip(f"{relative} is not in the folder that {VARIABLE} names")

    return need


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, for files that a test writes itself."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


def gaussian_score(train: torch.Tensor, test: torch.Tensor) -> float:
    train, test = train.double(), test.double()
    normal = torch.distributions.MultivariateNormal(train.mean(0), train.T.cov())
    return normal.log_prob(test).mean().item()


def rows_of(part: torch.Tensor) -> set[bytes]:
    return {row.tobytes() for row in part.flatten(1).numpy()}


def assert_disjoint(split: Split) -> None:
    train, val, test = map(rows_of, split)
    assert not train & val
    assert not train & test
    assert not val & test


def same(a: Split, b: Split) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", TOYS)
def test_toy_shapes_and_disjointness(name: str) -> None:
    split = load(name, n=1005)
    assert [tuple(part.shape) for part in split] == [(805, 2), (100, 2), (100, 2)]
    assert all(part.dtype == torch.get_default_dtype() for part in split)
    assert all(part.isfinite().all() for part in split)
    assert_disjoint(split)
    assert len(load(name).train) == 8000


@pytest.mark.parametrize("name", TOYS)
def test_toy_rejects_bad_arguments(name: str) -> None:
    with pytest.raises(ValueError, match="at least 10"):
        load(name, n=9)
    with pytest.raises(ValueError, match="negative"):
        load(name, noise=-0.1)
    with pytest.raises(TypeError, match="floating-point"):
        load(name, n=20, dtype=torch.int64)


def test_toy_geometry() -> None:
    keywords = {"n": 2000, "noise": 0.0, "dtype": torch.float64}
    radius = load("circles", **keywords).train.norm(dim=1)
    assert (torch.minimum((radius - 1).abs(), (radius - 0.5).abs()) < 1e-9).all()
    assert torch.allclose(load("blobs", **keywords).train.norm(dim=1), torch.tensor(2.0).double())
    board = load("checkerboard", **keywords).train
    assert (board.abs() <= 4).all()
    assert ((board / 2).floor().sum(1) % 2 == 0).all()
    assert load("moons", **keywords).train[:, 1].abs().max() <= 1
    # On the noiseless spiral the angle, modulo a turn, is five times the radius.
    spiral = load("swiss_roll", **keywords).train
    turn = spiral[:, 1].atan2(spiral[:, 0]) - 5 * spiral.norm(dim=1)
    assert torch.allclose(turn.cos(), torch.ones_like(turn))


def test_noise_is_in_units_of_the_coordinates() -> None:
    clean = load("swiss_roll", noise=0.0, n=2000, dtype=torch.float64).train
    noisy = load("swiss_roll", noise=0.1, n=2000, dtype=torch.float64).train
    assert (noisy - clean).std().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_shapes_and_disjointness(name: str) -> None:
    split = load(name)
    *sizes, features = BUNDLED[name]
    assert [tuple(part.shape) for part in split] == [(size, features) for size in sizes]
    assert all(part.dtype == torch.get_default_dtype() for part in split)
    assert_disjoint(split)


def test_digits_range() -> None:
    noisy = torch.cat(list(load("digits")))
    assert 0 <= noisy.min() < 0.01
    assert 0.99 < noisy.max() < 1
    levels = torch.cat(list(load("digits", dequantize=False)))
    assert torch.equal(levels.unique(), torch.arange(17.0))


@pytest.mark.parametrize("name", [*TOYS, *BUNDLED])
def test_seed_decides(name: str) -> None:
    assert same(load(name, seed=3), load(name, seed=3))
    assert same(load(name), load(name, seed=0))
    assert not same(load(name, seed=3), load(name, seed=4))


@pytest.mark.parametrize("name", [*TOYS, *BUNDLED])
def test_dtype(name: str) -> None:
    assert all(part.dtype == torch.float64 for part in load(name, dtype=torch.float64))


DRAWLESS = ("mnist", "cifar10")  # official splits, whole: no random number is needed


@pytest.mark.parametrize("name", [*TOYS, *BUNDLED, *(f for f in FILES if f not in DRAWLESS)])
def test_global_random_state_is_untouched(name: str, real_files: Callable[[str], None]) -> None:
    keywords = {}
    if name in FILES:
        real_files(FILES[name])
        if name == "bsds300":
            keywords = {"n_train": 10, "n_val": 10, "n_test": 10}
    before = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    load(name, **keywords)
    after = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1][1], after[1][1])
    assert before[1][2:] == after[1][2:]


def test_split_unpacks_and_is_frozen() -> None:
    split = load("wine")
    train, val, test = split
    assert train is split.train
    assert val is split.val
    assert test is split.test
    with pytest.raises(AttributeError):
        split.train = val


def test_standardize() -> None:
    split = standardize(load("wine"))
    assert torch.allclose(split.train.mean(0), torch.zeros(13), atol=1e-5)
    assert torch.allclose(split.train.std(0), torch.ones(13), atol=1e-5)
    assert split.test.mean(0).abs().max() > 1e-3
    constant = Split(torch.full((4, 1), 7.0), torch.full((1, 1), 9.0), torch.full((1, 1), 7.0))
    assert [part.max().item() for part in standardize(constant)] == [0.0, 2.0, 0.0]
    labels = torch.zeros(4, dtype=torch.int64)
    labelled = LabelledSplit(*constant, labels, labels[:1], labels[:1])
    assert standardize(labelled).train_labels is labels
    with pytest.raises(TypeError, match="floating-point"):
        standardize(Split(labels, labels, labels))
    with pytest.raises(ValueError, match="two training rows"):
        standardize(Split(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1)))


@pytest.mark.parametrize("name", LOADERS)
def test_docstring_names_source_and_licence(name: str) -> None:
    text = inspect.getdoc(getattr(datasets, name))
    assert "Source:" in text
    assert "Licence:" in text
    assert "Returns:" in text


def test_every_loader_is_covered() -> None:
    assert sorted(LOADERS) == sorted([*TOYS, *BUNDLED, *FILES, "uci"])


def test_import_needs_torch_numpy_and_the_standard_library_only() -> None:
    allowed = {"torch", "numpy", "pyroflows", *sys.stdlib_module_names}
    for path in Path(datasets.__file__).parent.glob("*.py"):
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.Import):
                roots = {alias.name.split(".")[0] for alias in statement.names}
            elif isinstance(statement, ast.ImportFrom):
                roots = {statement.module.split(".")[0]}
            else:
                continue
            assert roots <= allowed, path.name


@pytest.mark.parametrize("name", FILES)
def test_missing_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError) as error:
        load(name)
    for word in (VARIABLE, FILES[name], "http"):
        assert word in str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(name: str, folder: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load(name)
    for word in (VARIABLE, FILES[name], "http"):
        assert word in str(error.value)


def test_variable_that_names_no_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(folder / "absent"))
    with pytest.raises(FileNotFoundError, match="not a folder"):
        datasets.data_folder()


def test_uci_errors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"uci_regression or uci_tabular.*https"):
        datasets.uci("yacht")
    write_regression(folder)
    with pytest.raises(ValueError, match="no UCI set named 'abalone'; the names found are tiny"):
        datasets.uci("abalone")
    with pytest.raises(ValueError, match="has splits 0 to 1, got 2"):
        datasets.uci("tiny", split=2)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(FileNotFoundError, match=VARIABLE):
        datasets.uci("tiny")


def write_regression(folder: Path) -> np.ndarray:
    (folder / "uci_regression").mkdir()
    data = np.arange(120.0).reshape(30, 4)
    np.savez(
        folder / "uci_regression" / "tiny.npz",
        data=data,
        index_features=np.array([0, 3]),
        index_target=np.array(1),
        test_0=np.array([4, 2], dtype=np.int32),
        test_1=np.array([0], dtype=np.int32),
    )
    return data


def test_uci_regression_uses_the_splits_of_the_file(folder: Path) -> None:
    data = write_regression(folder)
    split = datasets.uci("tiny")
    assert [tuple(part.shape) for part in split] == [(26, 3), (2, 3), (2, 3)]
    assert np.array_equal(split.test.numpy(), data[[2, 4]][:, [0, 3, 1]])
    assert_disjoint(split)
    assert np.array_equal(datasets.uci("tiny", split=1).test.numpy(), data[[0]][:, [0, 3, 1]])
    assert not same(split, datasets.uci("tiny", seed=1))


def write_table(folder: Path, name: str, text: str) -> None:
    (folder / "uci_tabular").mkdir(exist_ok=True)
    with gzip.open(folder / "uci_tabular" / name, "wt") as file:
        file.write(text)


def test_uci_table_drops_text_and_incomplete_rows(folder: Path) -> None:
    lines = [f"{k},{'' if k == 3 else k / 2},near,{k % 2}" for k in range(21)]
    write_table(folder, "tiny.csv.gz", "\n".join(["depth,width,place,count", *lines]))
    with pytest.warns(UserWarning, match="tiny: dropped 1 of 21 rows with missing values"):
        split = datasets.uci("tiny")
    rows = torch.cat(list(split))
    assert [tuple(part.shape) for part in split] == [(16, 3), (2, 3), (2, 3)]
    assert sorted(rows[:, 0].tolist()) == [k for k in range(21) if k != 3]
    assert datasets.uci_names() == ["tiny"]
    with pytest.raises(ValueError, match="no splits of its own"):
        datasets.uci("tiny", split=1)


def test_uci_table_with_tabs_labels_and_ragged_lines(folder: Path) -> None:
    write_table(folder, "banknote.dat.gz", "\n".join(f"{k}\t{2 * k}\t{k % 2}" for k in range(20)))
    train = datasets.uci("banknote").train
    assert train.shape == (16, 2)
    assert torch.equal(train[:, 1], 2 * train[:, 0])
    write_table(folder, "ragged.csv.gz", "1,2\n3\n")
    with pytest.raises(ValueError, match="different numbers of fields"):
        datasets.uci("ragged")
    for text in ("", "a,b\n"):
        write_table(folder, "empty.csv.gz", text)
        with pytest.raises(ValueError, match="no rows"):
            datasets.uci("empty")


def test_uci_table_keeps_a_column_whose_missing_cells_are_marked(folder: Path) -> None:
    lines = [f"{k},{'?' if k == 3 else k / 2}" for k in range(21)]
    write_table(folder, "marked.csv.gz", "\n".join(["a,b", *lines]))
    with pytest.warns(UserWarning, match="marked: dropped 1 of 21 rows with missing values"):
        assert datasets.uci("marked").train.shape == (16, 2)


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    header = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + array.tobytes())


def write_mnist(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for part, n in (("train", 12), ("t10k", 3)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(folder / "mnist" / f"{part}-images-idx3-ubyte.gz", images)
        labels = np.arange(n, dtype=np.uint8) % 10
        write_idx(folder / "mnist" / f"{part}-labels-idx1-ubyte.gz", labels)


def test_mnist_from_idx_files(folder: Path) -> None:
    write_mnist(folder)
    split = datasets.mnist()
    assert [tuple(part.shape) for part in split] == [(n, 1, 28, 28) for n in (10, 2, 3)]
    assert split.train.dtype == torch.uint8
    assert split.train_labels.tolist() == list(range(10))
    assert split.val_labels.tolist() == [0, 1]
    assert split.test_labels.dtype == torch.int64
    images = read_idx(folder / "mnist" / "train-images-idx3-ubyte.gz")
    assert np.array_equal(split.val[:, 0].numpy(), images[10:])


def test_idx_rejects_other_content(tmp_path: Path) -> None:
    for content in (
        b"",
        b"\x00\x00\x0d\x01\x00\x00\x00\x00",
        b"\x00\x00\x08\x01\x00\x00\x00\x02a",
        b"\x00\x00\x08\x03\x00\x00",
    ):
        path = tmp_path / "wrong.gz"
        path.write_bytes(gzip.compress(content))
        with pytest.raises(ValueError, match=r"wrong\.gz"):
            read_idx(path)


def test_download_is_asked_for_and_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pooch = pytest.importorskip("pooch")
    asked = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path) -> str:
        asked.append((url, known_hash))
        assert path == folder / "mnist"
        write_mnist(folder)
        return str(path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert len(datasets.mnist(download=True).test) == 3
    # The files that the first call wrote are not asked for again.
    assert asked == [
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/train-images-idx3-ubyte.gz",
            "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
        )
    ]


def python2_batch(images: np.ndarray, labels: list[int]) -> bytes:
    """Pickle a batch with the operations that Python 2 wrote, down to its byte strings."""
    values = images.tobytes()
    array = b"".join(
        [
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR",
            b"(K\x01" + b"J" + struct.pack("<i", len(images)) + b"M\x00\x0c\x86",
            b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR",
            b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
            b"\x89T" + struct.pack("<i", len(values)) + values + b"tb",
        ]
    )
    classes = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + classes + b"u."


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def test_cifar10_from_the_archive(folder: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 3072), dtype=np.uint8)
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    (folder / "cifar10").mkdir()
    with tarfile.open(folder / "cifar10" / "cifar-10-python.tar.gz", "w:gz") as archive:
        for k, name in enumerate(names):
            add_member(archive, name, python2_batch(images[4 * k : 4 * k + 4], [k] * 4))
    split = datasets.cifar10()
    assert [tuple(part.shape) for part in split] == [(n, 3, 32, 32) for n in (18, 2, 4)]
    assert split.test_labels.tolist() == [5] * 4
    assert split.val_labels.tolist() == [4] * 2
    assert np.array_equal(torch.cat(list(split)).flatten(1).numpy(), images)


def test_cifar10_pickles_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "archive.tar"
    with tarfile.open(path, "w") as archive:
        add_member(archive, "test_batch", pickle.dumps(os.getcwd))
    with tarfile.open(path) as archive:
        with pytest.raises(pickle.UnpicklingError, match="has no place"):
            read_cifar_batch(archive, "test_batch")
        with pytest.raises(KeyError):
            read_cifar_batch(archive, "data_batch_1")


def packed(images: np.ndarray, labels: np.ndarray) -> bytes:
    """Pack images ``(n, 3, 32, 32)`` pixel by pixel, as the format's description says."""
    red, green, blue = images.astype(int).transpose(1, 0, 2, 3)
    content = bytearray()
    for plane in (green, (red - green) % 256, (blue - green) % 256):
        for image in plane:
            for i, j in np.ndindex(32, 32):
                left = image[i, j - 1] if j else (image[i - 1, j] if i else 0)
                above = image[i - 1, j] if i else left
                corner = image[i - 1, j - 1] if i and j else left
                predicted = sorted([left, above, left + above - corner])[1]
                content.append((image[i, j] - predicted) % 256)
    return lzma.compress(bytes(content) + labels.tobytes())


def test_cifar10_from_packed_files(folder: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(12, dtype=np.uint8) % 10
    (folder / "cifar10_test").mkdir()
    test_file = folder / "cifar10_test" / "cifar10_test.xz"
    test_file.write_bytes(packed(images[10:], labels[10:]))
    with pytest.warns(UserWarning, match="training file is absent"):
        split = datasets.cifar10()
    assert split.train.shape == (0, 3, 32, 32)
    assert split.val_labels.shape == (0,)
    assert np.array_equal(split.test.numpy(), images[10:])
    train_file = folder / "cifar10_test" / "cifar10_train.xz"
    train_file.write_bytes(packed(images[:10], labels[:10]))
    split = datasets.cifar10()
    assert np.array_equal(torch.cat(list(split)).numpy(), images)
    assert split.val_labels.tolist() == [9]
    test_file.write_bytes(lzma.compress(b"short"))
    with pytest.raises(ValueError, match="whole number"):
        datasets.cifar10()


def test_miniboone(real_files: Callable[[str], None]) -> None:
    real_files(FILES["miniboone"])
    split = datasets.miniboone()
    assert [len(part) for part in split] == [2956, 328, 3648]
    assert_disjoint(split)
    assert same(split, datasets.miniboone())
    other = datasets.miniboone(seed=1)
    assert torch.equal(split.test, other.test)
    assert not torch.equal(split.train, other.train)
    fitted = torch.cat([split.train, split.val])
    assert gaussian_score(fitted, split.test) == pytest.approx(-37.72, abs=0.01)


def test_power(real_files: Callable[[str], None]) -> None:
    real_files(FILES["power"])
    split = datasets.power()
    assert [tuple(part.shape) for part in split] == [(43668, 6), (5458, 6), (5458, 6)]
    assert torch.allclose(split.train.mean(0), torch.zeros(6), atol=1e-5)
    assert torch.allclose(split.train.std(0), torch.ones(6), atol=1e-5)
    assert_disjoint(split)
    assert not same(split, datasets.power(seed=1))
    assert gaussian_score(split.train, split.test) == pytest.approx(-7.79, abs=0.1)


def test_bsds300(real_files: Callable[[str], None]) -> None:
    real_files(FILES["bsds300"])
    sizes = {"n_train": 100_000, "n_val": 500, "n_test": 60_000}
    split = datasets.bsds300(**sizes)
    assert [tuple(part.shape) for part in split] == [(n, 63) for n in sizes.values()]
    assert split.train.abs().max() < 1
    assert gaussian_score(split.train, split.test) == pytest.approx(96.5, abs=0.8)
    small = {"n_train": 50, "n_val": 50, "n_test": 50}
    fewer = datasets.bsds300(n_train=20, n_val=0, n_test=50)
    assert torch.equal(fewer.test, datasets.bsds300(**small).test)
    assert same(datasets.bsds300(**small), datasets.bsds300(**small))
    assert_disjoint(datasets.bsds300(**small))
    assert not same(datasets.bsds300(**small), datasets.bsds300(**small, seed=1))
    with pytest.raises(ValueError, match="negative"):
        datasets.bsds300(n_val=-1)


def test_mnist(real_files: Callable[[str], None]) -> None:
    real_files("mnist")
    split = datasets.mnist()
    assert [tuple(part.shape) for part in split] == [(n, 1, 28, 28) for n in (50000, 10000, 10000)]
    assert split.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert split.test.float().mean().item() / 255 == pytest.approx(0.1325, abs=1e-3)


def test_freyfaces(real_files: Callable[[str], None]) -> None:
    real_files(FILES["freyfaces"])
    split = datasets.freyfaces()
    assert [tuple(part.shape) for part in split] == [(n, 1, 28, 20) for n in (1565, 200, 200)]
    assert split.train.dtype == torch.uint8
    assert not same(split, datasets.freyfaces(seed=1))


def test_uci_sets_that_are_there(real_files: Callable[[str], None]) -> None:
    real_files("uci_regression/yacht.npz")
    split = datasets.uci("yacht")
    assert [tuple(part.shape) for part in split] == [(250, 7), (27, 7), (31, 7)]
    real_files("uci_tabular/california_housing.csv.gz")
    with pytest.warns(UserWarning, match="dropped 207 of 20640 rows"):
        split = datasets.uci("california_housing")
    assert [tuple(part.shape) for part in split] == [(16347, 9), (2043, 9), (2043, 9)]
    real_files("uci_tabular/abalone.csv.gz")
    assert datasets.uci("abalone").train.shape == (3343, 8)
