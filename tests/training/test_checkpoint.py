"""Training picked up from a checkpoint goes on as if it had never stopped."""

import errno
import os
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyroflows as pf
from pyroflows._files.tensors import pack, unpack
from pyroflows.data import position
from pyroflows.data.batches import Batches
from pyroflows.data.files import TableBatches, open_table
from pyroflows.data.position import Passes
from pyroflows.data.rows import Rows
from pyroflows.infer import plateau
from pyroflows.training import checkpoints as checkpoints
from pyroflows.training.checkpoints import FORMAT
from pyroflows.training.epochs import Epochs
from pyroflows.training.loop import Run

CPU = torch.device("cpu")
EPOCHS = 4


class Stopped(Exception):
    """A process that ends."""


def rows(count=150):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(1))


def small(seed=0):
    torch.manual_seed(seed)
    return pf.maf(2, layers=2, hidden=(12,), linear="lu")


def train(flow, data=None, *, seed=3, **settings):
    """A run whose global generators stand where a seed says, as in any process."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    data = rows() if data is None else data
    base = {"max_epochs": EPOCHS, "dropout": 0.1, "progress": False, "lr": 1e-2}
    if not isinstance(data, DataLoader):
        base["batch_size"] = 32
    return pf.fit(flow, data, **{**base, **settings})


def steps_until(monkeypatch, last):
    """End training before the step with this number, as a process that is killed would."""
    taken = 0
    step = Run._step

    def counted(self, *args):
        nonlocal taken
        if taken == last:
            raise Stopped
        taken += 1
        step(self, *args)

    monkeypatch.setattr(Run, "_step", counted)


def same(one, other):
    return all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def picked_up(monkeypatch, tmp_path, last, **settings):
    """One run in one go, and one that ends at a step and is picked up by another process."""
    whole, again = small(), small()
    every = settings.pop("every", 1)
    expected = train(whole, **settings)
    with monkeypatch.context() as patch:
        steps_until(patch, last)
        with pytest.raises(Stopped):
            train(again, checkpoint=pf.Checkpoint(tmp_path, every), **settings)
    again = small(seed=5)  # nothing of the first process but its files
    checkpoint = pf.Checkpoint(tmp_path, every, resume=True)
    history = train(again, seed=99, checkpoint=checkpoint, **settings)
    assert history.train == expected.train
    assert history.val == expected.val
    assert history.lr == expected.lr
    assert (history.best, history.stopped) == (expected.best, expected.stopped)
    assert same(whole, again)
    return history


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"val": None},
        {"average": 0.0, "dropout": 0.0},
        {"average": 0.9},
        {"every": 0.4},
        {"every": 2},
        {"batch_size": 150, "every": 0.01},
    ],
    ids=str,
)
def test_resumed_it_equals_a_run_in_one_go(monkeypatch, tmp_path, settings):
    last = 3 if settings.get("batch_size") == 150 else 14
    picked_up(monkeypatch, tmp_path, last, **settings)


def test_a_run_ended_within_an_epoch_loses_only_steps_since_the_last(monkeypatch, tmp_path):
    steps_until(monkeypatch, 9)  # five steps an epoch
    with pytest.raises(Stopped):
        train(small(), checkpoint=pf.Checkpoint(tmp_path, every=0.2))
    newest = max(tmp_path.iterdir())
    state = unpack(newest.read_bytes(), "it", FORMAT)
    assert state["shared"]["schedule"]["done"] == 1
    assert state["shared"]["history"]["stopped"] == ""  # it is not over
    assert state["processes"][0]["passes"]["position"] == 4


class Noisy(Dataset):
    """Rows that depend on all three global generators."""

    def __len__(self):
        return 60

    def __getitem__(self, index):
        shift = random.random() + np.random.rand()  # noqa: NPY002
        return rows(60)[index] + 0.1 * torch.randn(2) + shift


LOADERS = {
    "shuffled": lambda: DataLoader(TensorDataset(rows()), batch_size=30, shuffle=True),
    "own_generator": lambda: DataLoader(
        TensorDataset(rows()),
        batch_size=30,
        shuffle=True,
        generator=torch.Generator().manual_seed(8),
    ),
    "random_rows": lambda: DataLoader(Noisy(), batch_size=20),
}


@pytest.mark.parametrize("name", LOADERS)
def test_resumed_in_the_middle_of_a_loader(monkeypatch, tmp_path, name):
    loader = LOADERS[name]
    settings = {"val": rows(20), "max_epochs": 3}
    whole, again = small(), small()
    expected = train(whole, loader(), **settings)
    with monkeypatch.context() as patch:
        steps_until(patch, 5)
        with pytest.raises(Stopped):
            train(again, loader(), checkpoint=pf.Checkpoint(tmp_path, 0.5), **settings)
    again = small(seed=5)
    history = train(
        again, loader(), seed=99, checkpoint=pf.Checkpoint(tmp_path, resume=True), **settings
    )
    assert history.train == expected.train
    assert same(whole, again)


def test_a_rollback_is_kept(monkeypatch, tmp_path):
    judge = Epochs.judge

    def spoiled(self):
        if self.done == 1:
            self._sums.total = self._sums.total * float("nan")
        return judge(self)

    monkeypatch.setattr(Epochs, "judge", spoiled)
    warnings.filterwarnings("ignore", message="fit: 1 time back")
    history = picked_up(monkeypatch, tmp_path, 14)
    assert history.rollbacks == 1
    assert history.lr[-1] < 0.3 * 1e-2


def test_nothing_more_to_do(tmp_path):
    flow = small()
    expected = train(flow, checkpoint=tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    again = small(seed=5)
    history = train(again, checkpoint=pf.Checkpoint(tmp_path, resume=True))
    assert history.val == expected.val
    assert history.steps == list(range(EPOCHS))
    assert same(flow, again)
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_max_epochs_is_a_total(tmp_path):
    train(small(), max_epochs=2, checkpoint=tmp_path)
    history = train(small(), checkpoint=pf.Checkpoint(tmp_path, resume=True))
    assert history.steps == list(range(EPOCHS))


def test_stopped_early_it_stays_stopped(tmp_path):
    settings = {"max_epochs": 60, "patience": 2, "lr": 0.2}
    expected = train(small(), checkpoint=pf.Checkpoint(tmp_path, every=50), **settings)
    assert "no better score" in expected.stopped
    history = train(small(), checkpoint=pf.Checkpoint(tmp_path, resume=True), **settings)
    assert history.val == expected.val
    assert history.stopped == expected.stopped


def test_a_fresh_start_where_there_is_none(tmp_path):
    history = train(small(), checkpoint=pf.Checkpoint(tmp_path / "deep" / "er", resume=True))
    assert history.train == train(small()).train
    assert len(list((tmp_path / "deep" / "er").iterdir())) == 2


def test_a_checkpoint_is_not_a_pickle_and_reads_as_safetensors(tmp_path):
    from safetensors import safe_open

    train(small(), checkpoint=tmp_path)
    with safe_open(max(tmp_path.iterdir()), "pt") as file:
        assert file.metadata()["format"] == str(FORMAT)
        assert len(list(file.keys())) > 10


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage):
    whole = small()
    expected = train(whole)
    train(small(), max_epochs=EPOCHS, checkpoint=tmp_path)
    newest = max(tmp_path.iterdir())
    spoil(newest, damage)
    again = small(seed=5)
    with pytest.warns(
        UserWarning,
        match="is damaged: .* another hash .*; the one before is tried",
    ):
        history = train(again, checkpoint=pf.Checkpoint(tmp_path, resume=True))
    assert history.train == expected.train
    assert same(whole, again)
    assert not newest.exists()


def spoil(path, damage):
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[:-100], "flipped": content, "empty": b""}[damage])


def test_where_all_are_damaged_it_says_so(tmp_path):
    train(small(), checkpoint=tmp_path)
    for path in tmp_path.iterdir():
        spoil(path, "cut")
    before = small()
    flow = small()
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match="is damaged: .*; all 2 are; restore a copy"),
    ):
        train(flow, checkpoint=pf.Checkpoint(tmp_path, resume=True))
    assert same(flow, before)


def test_an_unknown_format_is_refused():
    content = pack({"a": 1}).replace(b'"format":"1"', b'"format":"9"')
    with pytest.raises(ValueError, match="format '9', this version reads 1"):
        unpack(content, "it")


OTHERS = {
    "wider": (lambda: pf.maf(2, layers=2, hidden=(13,), linear="lu"), {}, r"\(12, 2\).*\(13, 2\)"),
    "deeper": (lambda: pf.maf(2, layers=3, hidden=(12,), linear="lu"), {}, "nothing here"),
    "double": (lambda: small().double(), {}, "float32 there, .*float64 here"),
    "rows": (small, {"x": rows(151)}, "rows is 150 there, 151 here"),
    "seed": (small, {"seed": 4}, "seed is 0 there, 4 here"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_training_is_refused(tmp_path, name):
    train(small(), max_epochs=1, val=None, checkpoint=tmp_path)
    build, settings, message = OTHERS[name]
    flow = build()
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    call = {"x": rows(), "val": None, "progress": False, **settings}
    with pytest.raises(ValueError, match=f"of another training: .*{message}"):
        pf.fit(flow, checkpoint=pf.Checkpoint(tmp_path, resume=True), **call)
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())


def test_a_folder_with_checkpoints_is_not_overwritten(tmp_path):
    train(small(), max_epochs=1, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"holds 1 already.*resume=True"):
        train(small(), checkpoint=tmp_path)


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"resume: say checkpoint=pf.Checkpoint\(folder, resume"):
        train(small(), resume=True)
    with pytest.raises(ValueError, match="every: expected a positive number, got 0"):
        train(small(), checkpoint=pf.Checkpoint(tmp_path, every=0))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="checkpoint: expected a folder"):
        train(small(), checkpoint=tmp_path / "file")


def full_disk(patch, after):
    """A disk with room for so many files."""
    flush = os.fsync
    left = [2 * after]  # a file and its folder

    def fsync(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(handle)

    patch.setattr(checkpoints.os, "fsync", fsync)


def test_a_full_disk_is_said_and_loses_nothing(monkeypatch, tmp_path):
    expected = train(small())
    flow = small()
    with monkeypatch.context() as patch:
        full_disk(patch, after=2)
        with pytest.raises(OSError, match=r"No space left.*best so far.*00000002-.* is whole"):
            train(flow, checkpoint=tmp_path)
    assert all(p.isfinite().all() for p in flow.parameters())
    assert not flow.training
    assert flow.log_prob(rows()).mean() > small().log_prob(rows()).mean()
    assert sorted(p.name[:19] for p in tmp_path.iterdir()) == [
        "checkpoint-00000001",
        "checkpoint-00000002",
    ]
    history = train(small(), checkpoint=pf.Checkpoint(tmp_path, resume=True))
    assert history.train == expected.train


def test_a_full_disk_at_the_first_checkpoint(monkeypatch, tmp_path):
    full_disk(monkeypatch, after=0)
    with pytest.raises(OSError, match="none is there yet"):
        train(small(), checkpoint=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_it_keeps_the_best_and_goes_on_later(monkeypatch, tmp_path):
    whole = small()
    expected = train(whole)
    flow = small()
    with monkeypatch.context() as patch:
        step = Run._step

        def interrupts(self, *args):
            if self.schedule.done == 3:
                raise KeyboardInterrupt
            step(self, *args)

        patch.setattr(Run, "_step", interrupts)
        history = train(flow, checkpoint=tmp_path)
    assert history.stopped == "interrupted"
    assert len(history.val) == 3
    assert flow.log_prob(rows()).isfinite().all()
    again = small(seed=5)
    assert train(again, checkpoint=pf.Checkpoint(tmp_path, resume=True)).train == expected.train
    assert same(whole, again)


def test_passes_come_back_to_their_place():
    class Draws:
        def __iter__(self):
            for _ in range(4):
                yield torch.randn(()).item()

    def taken(passes, count):
        found = []
        while len(found) < count:
            for batch in passes:
                found.append((batch, torch.rand(()).item()))
                if len(found) == count:
                    break
        return found

    torch.manual_seed(1)
    expected = taken(Passes(Draws(), CPU), 10)
    for place in range(9):
        torch.manual_seed(1)
        passes = Passes(Draws(), CPU)
        steps = iter([])
        found = []
        while len(found) < place:
            for batch in steps:
                found.append((batch, torch.rand(()).item()))
                break
            else:
                steps = iter(passes)
        state = unpack(pack(passes.state_dict()), "it")
        torch.manual_seed(77)
        later = Passes(Draws(), CPU)
        later.load_state_dict(state)
        assert found + taken(later, 10 - place) == expected


def interrupted(batches, gone):
    """A pass over these batches, and others that are to take it up after some of them."""
    begun = Passes(batches, CPU)
    steps = iter(begun)
    for _ in range(gone):
        next(steps)
    later = Passes(batches, CPU)
    later.load_state_dict(unpack(pack(begun.state_dict()), "it"))
    return steps, later


@pytest.mark.parametrize("name", ["memory", "file"])
def test_rows_that_draw_alone_are_taken_up_without_the_global_generators(
    monkeypatch, tmp_path, name
):
    x = torch.arange(100.0)[:, None].expand(-1, 2)
    if name == "memory":
        batches = Batches(Rows(x), 8, seed=3)
    else:
        np.save(tmp_path / "x.npy", x.numpy())
        batches = TableBatches(small(), open_table(tmp_path / "x.npy"), 8, seed=3)
    steps, later = interrupted(batches, 5)
    expected = [x[:, 0].tolist() for x, _ in steps]
    monkeypatch.setattr(position, "set_random_state", None)  # not to be called
    assert [x[:, 0].tolist() for x, _ in later] == expected


def test_drawing_again_leaves_the_global_generators_where_they_were():
    class Fails:
        failing = False

        def __iter__(self):
            while True:
                if self.failing:
                    raise OSError("the disk is gone")
                yield torch.rand(2, 1), None

    batches = Fails()
    _, later = interrupted(batches, 3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    batches.failing = True
    with pytest.raises(OSError, match="the disk is gone"):
        next(iter(later))
    assert torch.equal(before, torch.get_rng_state())


def test_a_student_is_picked_up(monkeypatch, tmp_path):
    teacher = small()

    def run(seed, **settings):
        torch.manual_seed(seed)
        student = pf.student_of(teacher)
        history = pf.distill(
            teacher,
            student,
            objective="mixed",
            max_steps=100,
            batch_size=16,
            progress=False,
            **settings,
        )
        return student, history

    whole, expected = run(0)
    with monkeypatch.context() as patch:
        steps_until(patch, 60)
        with pytest.raises(Stopped):
            run(0, checkpoint=pf.Checkpoint(tmp_path, every=0.5))
    again, history = run(4, checkpoint=pf.Checkpoint(tmp_path, resume=True))
    assert history.train == expected.train
    assert history.curves == expected.curves
    assert same(whole, again)
    with pytest.raises(ValueError, match="of another training: teacher values differ"):
        pf.distill(
            small(seed=6), whole, objective="mixed", checkpoint=pf.Checkpoint(tmp_path, resume=True)
        )


def model(data=None):
    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def with_rows(data):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", 60, subsample_size=len(data)):
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=data)


def loader():
    return DataLoader(TensorDataset(rows(60)), batch_size=7, shuffle=True)


@pytest.mark.parametrize("kind", ["arguments", "batches"])
def test_a_guide_is_picked_up(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(plateau, "WINDOW", 10)
    monkeypatch.setattr(plateau, "_NOTHING_LEFT", -1.0)  # it goes on to the last step

    def run(seed, **settings):
        pyro.clear_param_store()
        torch.manual_seed(seed)
        target = model if kind == "arguments" else with_rows
        guide = pf.AutoFlow(target, layers=1, hidden=(4,))
        if kind == "batches":
            settings["batches"] = loader()
        history = pf.fit_guide(target, guide, particles=2, max_steps=35, progress=False, **settings)
        return history, guide

    expected, whole = run(0)
    with monkeypatch.context() as patch:
        batches = plateau.Plateau.batches

        def ends(self):
            if self.done == 20:
                raise Stopped
            return batches(self)

        patch.setattr(plateau.Plateau, "batches", ends)
        with pytest.raises(Stopped):
            run(0, checkpoint=tmp_path)
    for _ in range(2):  # the second time nothing is left to do
        history, again = run(5, checkpoint=pf.Checkpoint(tmp_path, resume=True))
        assert history.train == expected.train
        assert history.stopped == expected.stopped
        assert same(whole, again)
    saved = unpack(max(tmp_path.iterdir()).read_bytes(), "it", FORMAT)["shared"]["history"]
    assert 0 < saved["seconds"] < history.seconds
    full_disk(monkeypatch, after=0)
    with pytest.raises(OSError, match="No space left"):
        run(0, checkpoint=tmp_path / "other")
