"""Files larger than memory: every row once an epoch, in little memory, from any place in a pass."""

import os
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

import pyroflows as pf
from pyroflows.data import files as tables
from pyroflows.data.files import TableBatches, hold_out, open_table
from pyroflows.data.loaders import sources
from pyroflows.training.loop import Run

COUNT, WIDTH = 1003, 3


def numbered(dtype=np.float32):
    """Rows that say which they are."""
    rows = np.random.default_rng(0).normal(size=(COUNT, WIDTH)).astype(dtype)
    rows[:, 0] = np.arange(COUNT)
    return rows


def write_parquet(path, rows, row_group_size=100):
    import pyarrow as pa
    from pyarrow import parquet

    columns = {f"x{i}": rows[:, i] for i in range(rows.shape[1])}
    parquet.write_table(pa.table(columns), path, row_group_size=row_group_size)


@pytest.fixture(params=["npy", "memmap", "slice", "parquet"])
def file(request, tmp_path, monkeypatch):
    """The rows in a file, in blocks of a few rows."""
    monkeypatch.setattr(tables, "BUFFER", 8 * 10 * WIDTH * 4)
    path = tmp_path / f"x.{'parquet' if request.param == 'parquet' else 'npy'}"
    if request.param == "parquet":
        write_parquet(path, numbered())
    elif request.param == "slice":
        np.save(path, np.concatenate([numbered()[:7] - 1e6, numbered(), numbered()[:5]]))
        return np.load(path, mmap_mode="r")[7 : 7 + COUNT]
    else:
        np.save(path, numbered())
    return np.load(path, mmap_mode="r") if request.param == "memmap" else str(path)


def flow(**settings):
    torch.manual_seed(0)
    return pf.maf(WIDTH, layers=1, hidden=(8,), **settings)


def batches(file, size=64, **settings):
    return TableBatches(flow(), open_table(file), size, 0, **settings)


def test_an_epoch_has_every_row_once_in_a_new_order(file):
    served = batches(file)
    orders = [torch.cat([x for x, _ in served]) for _ in range(2)]
    assert len(list(served)) == len(served) == 16
    for x in orders:
        index = x[:, 0].long()
        assert sorted(index.tolist()) == list(range(COUNT))
        assert torch.equal(x, torch.as_tensor(numbered())[index])
    assert not torch.equal(*orders)
    # Mixed beyond single blocks, not only within them.
    steps = (orders[0][1:, 0] - orders[0][:-1, 0]).abs()
    assert steps.median() > 25


def test_batches_are_full_but_for_the_last(file):
    assert {len(x) for x, _ in list(batches(file))[:-1]} == {64}


def test_processes_share_each_batch(file):
    alone = list(batches(file))
    parts = [list(batches(file, rank=rank, processes=2)) for rank in (0, 1)]
    for (x, _), (first, _), (second, _) in zip(alone, *parts, strict=True):
        assert len(first) == len(second)
        both = torch.cat([first, second])
        assert set(both[:, 0].tolist()) == set(x[:, 0].tolist())
        assert len(both) - len(x) == len(x) % 2


def test_held_out_rows_are_not_trained_on(file):
    train, validation = sources(flow(), file, None, 0.1, 64, 0, (0, 1))
    held = validation.x
    rows = torch.cat([x for x, _ in train])
    assert len(held) == 100
    assert torch.equal(held, torch.as_tensor(numbered())[held[:, 0].long()])
    together = sorted([*held[:, 0].tolist(), *rows[:, 0].tolist()])
    assert together == list(range(COUNT))


def test_of_many_rows_few_are_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_HELD_OUT", 50)
    np.save(tmp_path / "x.npy", numbered())
    index, rows = hold_out(flow(), open_table(tmp_path / "x.npy"), 0.5, 0)
    assert len(index) == len(rows) == 50


def test_fit_learns_from_a_file(file):
    settings = {"max_epochs": 3, "lr": 1e-2, "batch_size": 256, "progress": False}
    course = pf.fit(flow(), file, **settings)
    same = pf.fit(flow(), numbered(), **settings)
    assert course.score == pytest.approx(same.score, abs=0.3)


def test_context_stands_in_the_columns_after_the_features(tmp_path):
    np.save(tmp_path / "x.npy", numbered())
    conditional = pf.maf(1, 2, layers=1, hidden=(8,))
    train, _ = sources(conditional, tmp_path / "x.npy", None, None, 64, 0, (0, 1))
    x, context = next(iter(train))
    expected = torch.as_tensor(numbered())[x[:, 0].long()]
    assert torch.equal(torch.cat([x, context], dim=1), expected)


def test_it_goes_on_within_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BUFFER", 8 * 10 * WIDTH * 4)
    np.save(tmp_path / "x.npy", numbered())
    settings = {"max_epochs": 2, "dropout": 0.0, "progress": False, "batch_size": 128}

    def run(**more):
        return pf.fit(flow(), tmp_path / "x.npy", **settings, **more)

    expected = run()
    step, taken = Run._step, []

    def ends(self, *args):
        taken.append(1)
        if len(taken) == 12:
            raise InterruptedError
        step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", ends)
        with pytest.raises(InterruptedError):
            run(checkpoint=pf.Checkpoint(tmp_path / "run", every=0.3))
    assert run(checkpoint=pf.Checkpoint(tmp_path / "run", resume=True)).train == expected.train


def test_validation_rows_may_be_a_file(tmp_path):
    np.save(tmp_path / "x.npy", numbered())
    np.save(tmp_path / "val.npy", numbered()[:333])
    settings = {"max_epochs": 2, "progress": False}
    files = pf.fit(flow(), tmp_path / "x.npy", val=tmp_path / "val.npy", **settings)
    tensor = torch.as_tensor(numbered()[:333])
    assert files.val == pytest.approx(
        pf.fit(flow(), tmp_path / "x.npy", val=tensor, **settings).val
    )


def resident():
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.filterwarnings("ignore:x. 4 of 4 columns are constant")
@pytest.mark.parametrize("kind", ["path", "memmap"])
def test_twenty_gigabytes_in_little_memory(tmp_path, monkeypatch, kind):
    path = tmp_path / "large.npy"
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (20 * 2**30 // 16, 4)}
        np.lib.format.write_array_header_1_0(file, header)
        os.truncate(path, file.tell() + 20 * 2**30)
    x = str(path) if kind == "path" else np.load(path, mmap_mode="r")
    torch.manual_seed(0)
    small = pf.maf(4, layers=1, hidden=(8,))
    np.save(tmp_path / "small.npy", np.random.default_rng(0).standard_normal((50_000, 4)))
    # Loads what fit needs: libraries, and the heap that any file's batches of this size take.
    pf.fit(small, tmp_path / "small.npy", batch_size=2**15, max_epochs=1, progress=False)
    step, seen = Run._step, []

    def watched(self, *args):
        seen.append(resident())
        if len(seen) == 150:
            raise KeyboardInterrupt
        if len(seen) < 3:  # reading is what this test is about
            step(self, *args)

    monkeypatch.setattr(Run, "_step", watched)
    before = resident()
    # So many batches that the buffer is read and mixed three times.
    history = pf.fit(small, x, batch_size=2**15, dropout=0.0, max_epochs=1, progress=False)
    assert history.stopped == "interrupted"
    grown = (max(seen) - before) / 2**20
    assert grown < 300, f"{grown:.0f} MiB"
    print(f"{kind}: 150 batches of a file of 20 GiB, memory grew by {grown:.0f} MiB")


BAD = {
    "kind": ("x.csv", "", r"x: expected a .npy or .parquet file.*x.csv"),
    "integers": ("x.npy", np.ones((9, 3), dtype=int), r"expected floating-point values.*int64"),
    "width": ("x.npy", np.ones((9, 4)), r"x \(rows held out.*expected shape \(rows, 3\)"),
    "missing": ("x.npy", np.full((9, 3), np.nan), r"x \(rows .*rows are NaN or infinite"),
    "empty": ("x.npy", np.ones((0, 3)), "nothing to train on"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(tmp_path, name):
    file, content, message = BAD[name]
    path = tmp_path / file
    if isinstance(content, str):
        path.write_text(content)
    else:
        np.save(path, content)
    with pytest.raises(ValueError, match=message):
        pf.fit(flow(), path, val=0.3, progress=False)


def test_a_file_that_was_cut_short_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", numbered())
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    os.truncate(tmp_path / "x.npy", 5000)
    with pytest.raises(ValueError, match="ends before row .* cut short"):
        pf.fit(flow(), x, progress=False)


def test_an_array_with_gaps_and_a_context_apart_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", numbered())
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    with pytest.raises(ValueError, match="one after another"):
        pf.fit(flow(), x[::2], progress=False)
    with pytest.raises(ValueError, match="context: a file brings its own"):
        pf.fit(flow(), x, np.ones((COUNT, 1)), progress=False)


def test_columns_of_words_are_refused(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"a": [0.5, 1.5], "name": ["x", "y"], "n": [1, 2]})
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"expected columns of floating-point.*name.*string"):
        pf.fit(flow(), tmp_path / "x.parquet", progress=False)


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(ImportError, match=r"pip install 'pyroflows\[parquet\]'"):
        pf.fit(flow(), tmp_path / "x.parquet", progress=False)


class Stream(IterableDataset):
    def __iter__(self):
        yield from torch.as_tensor(numbered())


def test_a_stream_without_a_length_is_trained_on():
    rows = torch.as_tensor(numbered()[:50])
    history = pf.fit(flow(), Stream(), val=rows, max_epochs=2, progress=False)
    assert len(history.val) == 2
    with pytest.raises(ValueError, match="val: an IterableDataset cannot be split"):
        pf.fit(flow(), Stream(), progress=False)


@pytest.mark.parametrize("kind", ["changed in memory", "a copy", "another precision"])
def test_what_no_file_holds_is_read_from_memory(tmp_path, kind):
    np.save(tmp_path / "x.npy", (np.random.default_rng(0).normal(size=(500, 2)) + 100).astype("f4"))
    x = np.load(tmp_path / "x.npy", mmap_mode="c")
    if kind == "changed in memory":
        x -= 100
    else:
        x = x.copy() if kind == "a copy" else x.astype("f8")
    flow = pf.maf(2, layers=1, hidden=(8,)).to(torch.float32 if x.dtype == "f4" else torch.float64)
    pf.fit(flow, x, max_epochs=1, progress=False)
    assert abs(flow.sample((1000,)).mean() - x.mean()) < 1
