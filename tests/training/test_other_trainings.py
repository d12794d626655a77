"""A checkpoint of another training is refused by what differs: data, settings, teacher, model."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyroflows as pf
from pyroflows.data import fingerprint
from pyroflows.data.fingerprint import facts_of, facts_of_file, facts_of_loader


def rows(count=60, seed=1, width=2):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def one_other(x):
    """The same rows but for one number."""
    x = x.clone()
    x[-1, -1] += 1
    return x


def flow(**changes):
    torch.manual_seed(0)
    return pf.maf(2, **{"context": 1, "layers": 1, "hidden": (8,), **changes})


BASE = {"x": rows(), "context": rows(width=1), "val": (rows(9, 2), rows(9, 3, 1))}


def fit(checkpoint, model=None, **changes):
    settings = {"max_epochs": 1, "batch_size": 16, "progress": False, **BASE, **changes}
    model = flow() if model is None else model
    return pf.fit(model, settings.pop("x"), checkpoint=checkpoint, **settings)


FITS = {
    "rows": (lambda: {"x": one_other(rows())}, "data x values differ"),
    "context": (lambda: {"context": one_other(rows(width=1))}, "data context values differ"),
    "validation": (
        lambda: {"val": (one_other(rows(9, 2)), rows(9, 3, 1))},
        "validation x values differ",
    ),
    "its context": (lambda: {"val": (rows(9, 2), rows(9, 4, 1))}, "validation context values"),
    "no validation": (lambda: {"val": None}, "val is given there, None here"),
    "a share": (lambda: {"val": 0.2}, "val is given there, 0.2 here"),
    "count": (
        lambda: {"x": rows(61), "context": rows(61, width=1)},
        "data rows is 60 there, 61 here",
    ),
    "lr": (lambda: {"lr": 0.5}, "lr is 0.001 there, 0.5 here"),
    "clip": (lambda: {"clip": 0.5}, "clip is 5.0 there, 0.5 here"),
    "average": (lambda: {"average": 0.5}, "average is 0.99 there, 0.5 here"),
    "patience": (lambda: {"patience": 3}, "patience is 30 there, 3 here"),
    "weight_decay": (lambda: {"weight_decay": 0.0}, "weight_decay is 1.0 there, 0.0 here"),
    "dropout": (lambda: {"dropout": 0.5}, "dropout is 0.2 there, 0.5 here"),
    "batch_size": (lambda: {"batch_size": 8}, "batch_size is 16 there, 8 here"),
    "seed": (lambda: {"seed": 2}, "seed is 0 there, 2 here"),
    "precision": (lambda: {"fabric": {"precision": "bf16-mixed"}}, "precision is 32-true there"),
    "activation": (lambda: {"model": flow(activation="tanh")}, "relu.* there, .*tanh.* here"),
    "dtype": (
        lambda: {"model": flow().double()},
        r"flow .* is \(.*\) torch.float32 there, .* torch.float64 here",
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_another_fit_is_refused_by_name(name, tmp_path):
    fit(tmp_path)
    changes, message = FITS[name]
    with pytest.raises(ValueError, match=f"of another training: .*{message}"):
        fit(pf.Checkpoint(tmp_path, resume=True), **changes())


def test_more_epochs_and_other_words_are_the_same_training(tmp_path):
    fit(tmp_path)
    history = fit(pf.Checkpoint(tmp_path, 0.5, resume=True), max_epochs=2, start=False)
    assert history.steps == [0, 1]


class Own(Dataset):
    """Rows of a data set of the user's."""

    def __init__(self, x, noise=0.0):
        self.x, self.noise = x, noise

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + self.noise * torch.randn(2)


def saved(x, folder):
    np.save(folder / "x.npy", x.numpy())
    return str(folder / "x.npy")


SOURCES = {
    "tensors": lambda x, _: TensorDataset(x),
    "own": lambda x, _: Own(x),
    "own with noise": lambda x, _: Own(x, 0.1),
    "loader": lambda x, _: DataLoader(TensorDataset(x), batch_size=16, shuffle=True),
    "file": saved,
    "mapped": lambda x, folder: np.load(saved(x, folder), mmap_mode="r"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_other_values_of_each_source_are_refused(name, tmp_path):
    def run(x, checkpoint):
        settings = {} if name == "loader" else {"batch_size": 16}
        source = SOURCES[name](x, tmp_path)
        model = flow(context=0)
        torch.manual_seed(5)
        return pf.fit(
            model, source, max_epochs=1, val=None, progress=False, checkpoint=checkpoint, **settings
        )

    plain = run(rows(), None)
    assert run(rows(), tmp_path / "run").train == plain.train  # looking at it changes no draw
    again = pf.Checkpoint(tmp_path / "run", resume=True)
    run(rows(), again)
    with pytest.raises(ValueError, match=r"of another training: data .*values differ"):
        run(one_other(rows()), again)


def teacher(seed=0):
    torch.manual_seed(seed)
    return pf.maf(2, context=1, layers=1, hidden=(8,))


def distil(checkpoint, the_teacher=None, **changes):
    the_teacher = teacher() if the_teacher is None else the_teacher
    settings = {"max_steps": 50, "batch_size": 8, "progress": False, **changes}
    settings = {"data": (rows(), rows(width=1)), "objective": "mixed", **settings}
    torch.manual_seed(3)
    student = pf.student_of(the_teacher, **settings.pop("student", {}))
    return pf.distill(the_teacher, student, checkpoint=checkpoint, **settings)


DISTILLATIONS = {
    "teacher": (lambda: {"the_teacher": teacher(4)}, "teacher values differ"),
    "data": (lambda: {"data": (one_other(rows()), rows(width=1))}, "data x values differ"),
    "their context": (lambda: {"data": (rows(), rows(60, 4, 1))}, "data context values differ"),
    "contexts": (lambda: {"context": rows(60, 4, 1)}, "contexts values differ"),
    "objective": (lambda: {"objective": "reverse_kl"}, "objective is mixed there, reverse_kl here"),
    "path": (lambda: {"path": False}, "path is True there, False here"),
    "batch_size": (lambda: {"batch_size": 9}, "batch_size is 8 there, 9 here"),
    "lr": (lambda: {"lr": 0.5}, "lr is 0.003 there, 0.5 here"),
    "clip": (lambda: {"clip": 0.5}, "clip is 5.0 there, 0.5 here"),
    "average": (lambda: {"average": 0.5}, "average is 0.99 there, 0.5 here"),
    "patience": (lambda: {"patience": 3}, "patience is 20 there, 3 here"),
    "student": (
        lambda: {"student": {"hidden": (9,)}},
        r"student .* is \(12, 2\) .* there, \(9, 2\) .* here",
    ),
}


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    distil(folder)
    return folder


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_another_distillation_is_refused_by_name(name, distilled):
    changes, message = DISTILLATIONS[name]
    with pytest.raises(ValueError, match=f"of another training: .*{message}"):
        distil(pf.Checkpoint(distilled, resume=True), **changes())


def model(data, scale=1.0):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", 60, subsample_size=len(data)):
        pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=data)


def guide(checkpoint, *args, width=4, **changes):
    pyro.clear_param_store()
    torch.manual_seed(0)
    made = pf.AutoFlow(model, layers=1, hidden=(width,), **changes.pop("made", {}))
    settings = {"particles": 2, "max_steps": 2, "progress": False, **changes}
    return pf.fit_guide(model, made, *args, checkpoint=checkpoint, **settings)


def loader(x, size=20):
    return DataLoader(TensorDataset(x), batch_size=size)


GUIDES = {
    "args": (lambda: ((one_other(rows()),), {}), "args 0 values differ"),
    "kwargs": (lambda: ((rows(),), {"scale": 2.0}), "kwargs scale is nothing there, 2.0 here"),
    "batches": (lambda: ((), {"batches": [(rows(20),)]}), "args length is 1 there, 0 here"),
    "particles": (lambda: ((rows(),), {"particles": 3}), "particles is 2 there, 3 here"),
    "lr": (lambda: ((rows(),), {"lr": 0.5}), "lr is 0.01 there, 0.5 here"),
    "clip": (lambda: ((rows(),), {"clip": 0.5}), "clip is 10.0 there, 0.5 here"),
    "average": (lambda: ((rows(),), {"average": 0.5}), "average is 0.99 there, 0.5 here"),
    "objective": (lambda: ((rows(),), {"objective": "elbo"}), "objective is auto there, elbo here"),
    "vectorize": (lambda: ((rows(),), {"vectorize": False}), "vectorize is True there, False here"),
    "guide": (lambda: ((rows(),), {"width": 5}), r"guide .*\(4,.* there, \(5,.* here"),
    "activation": (
        lambda: ((rows(),), {"made": {"activation": "tanh"}}),
        "silu.* there, .*tanh.* here",
    ),
}


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guided")
    guide(folder, rows())
    return folder


@pytest.mark.parametrize("name", GUIDES)
def test_another_guide_is_refused_by_name(name, guided):
    (args, changes), message = GUIDES[name][0](), GUIDES[name][1]
    with pytest.raises(ValueError, match=f"of another training: .*{message}"):
        guide(pf.Checkpoint(guided, resume=True), *args, **changes)


@pytest.mark.parametrize("kind", ["loader", "list"])
def test_other_batches_of_a_guide_are_refused(kind, tmp_path):
    def batches(x):
        return loader(x) if kind == "loader" else [(part,) for part in x.split(20)]

    guide(tmp_path, batches=batches(rows()))
    again = pf.Checkpoint(tmp_path, resume=True)
    guide(again, batches=batches(rows()))
    with pytest.raises(ValueError, match=r"of another training: batches .*values differ"):
        guide(again, batches=batches(one_other(rows())))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int16, torch.complex64])
@pytest.mark.parametrize("place", [0, 77_777, -1])
def test_one_number_changes_the_fingerprint_of_a_large_array(monkeypatch, dtype, place):
    monkeypatch.setattr(fingerprint, "_PIECE", 64)  # bytes: most of it is in no piece
    x = torch.zeros(100_000, 3).to(dtype)
    y = x.clone()
    y.view(-1)[place] += 1
    for a, b in [(x, y), (x.t(), y.t()), (x[:, :2], y[:, :2] if place else y[:, :2])]:
        assert facts_of(a)["values"] != facts_of(b)["values"] or torch.equal(a, b)
    if dtype in (torch.float64, torch.int16):
        assert facts_of(x.numpy())["values"] != facts_of(y.numpy())["values"]


def test_a_fingerprint_reads_a_bounded_part_of_a_file(tmp_path):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(2**40)  # which takes no space
    facts = facts_of_file(path)
    assert facts["bytes"] == str(2**40)
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert facts_of_file(path)["values"] != facts["values"]


def test_what_is_not_known_is_left_out():
    class Unordered(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise KeyError(index)

    class Counts(Unordered):
        calls = 0

        def __getitem__(self, index):
            self.calls += 1
            return torch.tensor(self.calls)

    assert facts_of_loader(DataLoader(Unordered()))["items"] == "unknown"
    assert facts_of_loader(DataLoader(Counts()))["items"] == "random"
    workers = DataLoader(Counts(), num_workers=2)
    assert facts_of_loader(workers)["items"] == "Counts"
    assert workers.dataset.calls == 0
    assert facts_of(object()) == "a object"
