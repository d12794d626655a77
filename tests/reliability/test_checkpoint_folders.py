"""What may be in a folder of checkpoints, and who may be at work there: all of it said in words."""

import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import pyroflows as pf
from pyroflows._files.tensors import pack, unpack
from pyroflows.training.checkpoints import FORMAT, _name, _serial
from pyroflows.training.loop import Run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
X = torch.randn(60, 2, generator=torch.Generator().manual_seed(1))


def fit(checkpoint, seed=0, epochs=4, model=None):
    """A flow on a shuffled loader, so that all generators count."""
    torch.manual_seed(seed)
    model = pf.maf(2, layers=1, hidden=(8,)) if model is None else model
    torch.manual_seed(seed + 3)
    data = DataLoader(TensorDataset(X), batch_size=20, shuffle=True)
    settings = {"max_epochs": epochs, "val": X[:9], "dropout": 0.1, "progress": False}
    history = pf.fit(model, data, checkpoint=checkpoint, **settings)
    return history.train, torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist()


def distil(checkpoint, seed=0):
    torch.manual_seed(5)
    teacher = pf.maf(2, layers=1, hidden=(8,))
    torch.manual_seed(seed)
    student = pf.student_of(teacher)
    settings = {"max_steps": 150, "batch_size": 8, "progress": False, "objective": "mixed"}
    history = pf.distill(teacher, student, checkpoint=checkpoint, **settings)
    return history.train, torch.cat([p.detach().reshape(-1) for p in student.parameters()]).tolist()


def model(data):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", 60, subsample_size=len(data)):
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=data)


def guide(checkpoint, seed=0):
    pyro.clear_param_store()
    torch.manual_seed(seed)
    made = pf.AutoFlow(model, layers=1, hidden=(4,))
    torch.manual_seed(seed + 3)
    batches = DataLoader(TensorDataset(X), batch_size=20, shuffle=True)
    settings = {"particles": 2, "max_steps": 250, "progress": False, "batches": batches}
    history = pf.fit_guide(model, made, checkpoint=checkpoint, **settings)
    return history.train, torch.cat([p.detach().reshape(-1) for p in made.parameters()]).tolist()


TRAINERS = {"fit": fit, "distill": distil, "fit_guide": guide}


def newest(folder):
    return max(folder.glob("checkpoint-*"))


def forge(folder, change):
    """Change what the newest says, and give it the name that goes with it."""
    path = newest(folder)
    state = unpack(path.read_bytes(), "it", FORMAT)
    change(state)
    content = pack(state, FORMAT)
    path.unlink()
    (folder / _name(_serial(path), content)).write_bytes(content)


def place(state, *keys, by):
    """Put another value somewhere inside."""
    for key in keys[:-1]:
        state = state[key]
    state[keys[-1]] = by


SHARED = {
    "a tensor of another shape": (("tensors", 0), torch.zeros(3)),
    "a tensor that would be stretched": (("tensors", 0), torch.zeros(1, 1)),
    "half a tensor": (("tensors", 0), torch.zeros(16, 2, dtype=torch.float16)),
    "a word for a tensor": (("tensors", 0), "0"),
    "no tensors": (("tensors",), []),
    "best weights that are NaN": (("best", 0), None),
    "a buffer that is NaN": (("tensors", -1), None),
    "no average": (("average", "values"), None),
    "a count below zero": (("average", "steps"), -9),
    "a moment of another shape": (("optimiser", 0, "exp_avg"), torch.zeros(3)),
    "a moment of nothing": (("optimiser", 99), {}),
    "a step that is a word": (("optimiser", 0, "step"), "3"),
    "a history of words": (("history", "train"), ["a", "b", "c"]),
    "a history of another length": (("history", "train"), [0.0]),
    "a history that is not finite": (("history", "train"), [float("nan")] * 4),
    "a history without a field": (("history",), {"steps": [1]}),
    "a field that is not known": (("history", "colour"), "red"),
    "a best line that is not there": (("history", "best"), 40),
    "another unit": (("history", "unit"), "bits"),
    "no step size": (("lr",), 0.0),
    "a step size that is infinite": (("lr",), float("inf")),
    "a schedule without a place": (("schedule",), {}),
    "a place beyond all numbers": (("schedule", "done"), 10**400),
    "true for a number": (("schedule", "done"), True),
    "progress beyond all numbers": (("progress",), 1e308),
}
APART = {
    "no passes": (("passes",), {}),
    "a position below zero": (("passes", "position"), -1),
    "a position that is a word": (("passes", "position"), "1"),
    "torch's generator": (("passes", "now", "random", "torch"), torch.zeros(5056).byte()),
    "torch's generator cut": (("passes", "now", "random", "torch"), torch.zeros(3).byte()),
    "numpy's generator": (("passes", "now", "random", "numpy"), ["MT19937", 3]),
    "Python's generator": (("passes", "now", "random", "python"), [3, torch.zeros(3), None]),
}


def damage(state, name):
    """One of those, where the trainer at hand has such a thing."""
    shared, mine = state["shared"], state["processes"][0]
    if name in APART:
        keys, value = APART[name]
        return place(mine, *keys, by=value)
    keys, value = SHARED[name]
    if name.endswith("NaN"):
        value = torch.full_like(shared[keys[0]][keys[1]].float(), float("nan"))
    return place(shared, *keys, by=value)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The course of each training, and a folder with its last two checkpoints."""
    found = {}
    for name, train in TRAINERS.items():
        folder = tmp_path_factory.mktemp(name)
        found[name] = train(folder), {p.name: p.read_bytes() for p in folder.iterdir()}
    return found


def copied(files, folder):
    for name, content in files.items():
        (folder / name).write_bytes(content)


def every_damage_of_each_trainer():
    """Some of them by default."""
    some = {"a tensor that would be stretched", "a schedule without a place", "no passes"}
    for trainer in TRAINERS:
        for name in [*SHARED, *APART]:
            marks = [] if name in some else [pytest.mark.slow]
            yield pytest.param(trainer, name, id=f"{trainer}, {name}", marks=marks)


@pytest.mark.parametrize(("trainer", "name"), [*every_damage_of_each_trainer()])
def test_a_forged_checkpoint_gives_way_to_the_one_before(trainer, name, trained, tmp_path):
    """None of it is put in place: the training ends as if it had never been."""
    expected, files = trained[trainer]
    copied(files, tmp_path)
    forge(tmp_path, lambda state: damage(state, name))
    with pytest.warns(UserWarning, match=r"checkpoint-\d+-.* is damaged: .*one before is tried"):
        assert TRAINERS[trainer](pf.Checkpoint(tmp_path, resume=True), seed=9) == expected


@pytest.mark.parametrize("name", [*SHARED, *APART])
def test_where_it_is_the_only_one_the_flow_stays_as_it_was(name, trained, tmp_path):
    copied(trained["fit"][1], tmp_path)
    min(tmp_path.iterdir()).unlink()
    forge(tmp_path, lambda state: damage(state, name))
    flow = pf.maf(2, layers=1, hidden=(8,))
    before = {key: value.clone() for key, value in flow.state_dict().items()}
    with pytest.raises(ValueError, match=r"checkpoint: .*-\d+-.*safetensors is damaged: ") as told:
        fit(pf.Checkpoint(tmp_path, resume=True), model=flow)
    assert len(str(told.value).splitlines()) == 1
    assert all(torch.equal(value, before[key]) for key, value in flow.state_dict().items())


def no_words(path):
    from safetensors.torch import save

    return save({"0": torch.zeros(1)}, metadata={"format": str(FORMAT)})


def other_words(words):
    from safetensors.torch import save

    return lambda path: save({}, metadata={"format": str(FORMAT), "state": words})


CONTENTS = {
    "no words": no_words,
    "no JSON": other_words("{"),
    "nothing in them": other_words("[]"),
    "a tensor that is not there": other_words('{"items": [["shared", {"tensor": "7"}]]}'),
    "deep": other_words("[" * 100_000 + "]" * 100_000),
    "a long number": other_words('{"items": [["shared", ' + "1" * 5000 + "]]}"),
    "an item without a value": other_words('{"items": [["shared"]]}'),
    "a list for a name": other_words('{"items": [[[1], 2]]}'),
    "no safetensors": lambda path: b"\x10" + bytes(7) + b"{}",
    "a long header": lambda path: (2**63).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_other_content_gives_way_too(name, trained, tmp_path):
    expected, files = trained["fit"]
    copied(files, tmp_path)
    path = newest(tmp_path)
    content = CONTENTS[name](path)
    path.unlink()
    (tmp_path / _name(_serial(path), content)).write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged: .*the one before is tried"):
        assert fit(pf.Checkpoint(tmp_path, resume=True), seed=9) == expected


def huge(path):
    with open(path, "wb") as file:
        file.truncate(2**40)


NO_FILES = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": os.mkdir,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a terabyte": huge,
}


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_is_not_read(name, trained, tmp_path):
    expected, files = trained["fit"]
    copied(files, tmp_path)
    path = newest(tmp_path)
    path.unlink()
    NO_FILES[name](path)
    message = "terabyte" in name and "bytes, where a training like this" or "it is no file"
    with pytest.warns(UserWarning, match=f"is damaged: .*{message}.*the one before is tried"):
        assert fit(pf.Checkpoint(tmp_path, resume=True), seed=9) == expected


def test_one_that_may_not_be_read_says_so(trained, tmp_path, monkeypatch):
    copied(trained["fit"][1], tmp_path)
    read = Path.read_bytes

    def refuse(path):
        if path.name.startswith("checkpoint-"):
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match="cannot be read: permission denied; see to its perm"):
        fit(pf.Checkpoint(tmp_path, resume=True))
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_other_files_in_the_folder_are_left_alone(trained, tmp_path):
    expected, files = trained["fit"]
    copied(files, tmp_path)
    for name in ("checkpoint-x.safetensors", "checkpoint-²-0.safetensors", "notes.txt"):
        (tmp_path / name).write_text("mine")
    assert fit(pf.Checkpoint(tmp_path, resume=True), seed=9, epochs=4) == expected
    assert (tmp_path / "checkpoint-x.safetensors").read_text() == "mine"


AT_WORK = "checkpoint: another training is at work in .*; wait for its end, or give another folder"


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("resume", [True, False])
def test_a_second_training_in_a_thread_is_refused(trainer, resume, tmp_path, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    step = Run._step

    def waits(self, *args):
        begun.set()
        assert go_on.wait(60)
        step(self, *args)

    monkeypatch.setattr(Run, "_step", waits)
    ends = []
    thread = threading.Thread(target=lambda: ends.append(fit(tmp_path)))
    thread.start()
    try:
        assert begun.wait(60)
        with pytest.raises(ValueError, match=AT_WORK):
            TRAINERS[trainer](pf.Checkpoint(tmp_path, resume=resume))
    finally:
        go_on.set()
        thread.join()
    assert [fit(pf.Checkpoint(tmp_path, resume=True))] == ends  # whole, with nothing more to do
    assert all(path.name.startswith("checkpoint-") for path in tmp_path.iterdir())


def apart(do):
    """Do something in a process of its own, whose status is 0 where it was done, 3 if refused."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        do()
        status = 0
    except ValueError as error:
        status = 3 if "another training is at work" in str(error) else 1
    finally:
        if status == 1:
            print(repr(sys.exc_info()[1]), file=sys.stderr)
        os._exit(status)


def test_a_killed_training_leaves_its_folder_free(tmp_path, monkeypatch):
    step = Run._step

    def slow(self, *args):
        time.sleep(0.05)
        step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", slow)
        child = apart(lambda: fit(tmp_path))
        while not list(tmp_path.glob("checkpoint-*")):
            time.sleep(0.01)
        with pytest.raises(ValueError, match=AT_WORK):
            fit(pf.Checkpoint(tmp_path, resume=True))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert fit(pf.Checkpoint(tmp_path, resume=True), seed=9) == fit(None)


def test_a_child_of_a_training_does_not_hold_its_folder(tmp_path, monkeypatch):
    """As the workers of a data loader, which outlive a killed training by some seconds."""
    children = []
    step = Run._step

    def forks(self, *args):
        if not children:
            children.append(apart(lambda: time.sleep(60)))
        step(self, *args)

    monkeypatch.setattr(Run, "_step", forks)
    try:
        fit(tmp_path)
        fit(pf.Checkpoint(tmp_path, resume=True))
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)


@pytest.mark.parametrize(
    "rounds",
    [pytest.param(2, id="2 rounds"), pytest.param(50, id="50 rounds", marks=pytest.mark.slow)],
)
def test_of_four_that_begin_at_once_each_is_whole_or_refused(rounds, tmp_path):
    expected = fit(None)

    def once(folder):
        assert fit(pf.Checkpoint(folder, 0.4, resume=True)) == expected

    refused = 0
    for index in range(rounds):
        children = [apart(lambda i=index: once(tmp_path / str(i))) for _ in range(4)]
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert 0 in ends
        assert set(ends) <= {0, 3}
        refused += ends.count(3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            once(tmp_path / str(index))
    assert refused > 0
    print(f"{rounds} rounds of 4: {refused} refused, {4 * rounds - refused} whole, 0 else")
