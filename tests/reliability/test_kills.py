"""Trainings of six kinds killed at random moments, and picked up each time."""

import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import pyroflows as pf
from pyroflows.infer import plateau
from pyroflows.training.checkpoints import Checkpoints
from pyroflows.training.loop import Run

KILLS = 50
EPOCHS = 250


def train(folder, record):
    """In a process of its own: go on, and note each epoch that is on the disk."""
    torch.set_num_threads(1)
    handle = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    load, save = Run._load, Checkpoints.save

    def noted_load(self, *args):
        load(self, *args)
        os.write(handle, f"from {self.schedule.done}\n".encode())

    def noted_save(self, progress, *args):
        save(self, progress, *args)
        os.write(handle, f"done {progress}\n".encode())

    Run._load, Checkpoints.save = noted_load, noted_save
    torch.manual_seed(0)
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    flow = pf.maf(2, layers=1, hidden=(8,))
    os.write(handle, b"start\n")
    history = pf.fit(
        flow,
        x,
        max_epochs=EPOCHS,
        patience=EPOCHS,
        batch_size=64,
        dropout=0.1,
        checkpoint=pf.Checkpoint(folder, resume=True),
        progress=False,
    )
    weights = [p.tolist() for p in flow.parameters()]
    curve = {name: getattr(history, name) for name in ("train", "val", "lr", "best", "seconds")}
    Path(f"{record}.end").write_text(json.dumps([curve, weights]))


def lines(record):
    return record.read_text().splitlines() if record.exists() else []


def started(processes, folder, record):
    """A new process that trains, once it has begun to."""
    before = lines(record).count("start")
    process = processes.Process(target=train, args=(folder, record))
    process.start()
    while process.is_alive() and lines(record).count("start") == before:
        time.sleep(0.002)
    return process


@pytest.mark.slow
def test_fifty_kills_lose_no_finished_epoch(tmp_path):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["pyroflows", "lightning_fabric", "tqdm.auto"])
    whole, record = tmp_path / "whole.log", tmp_path / "record.log"
    started(processes, tmp_path / "whole", whole).join()
    curve, weights = json.loads(Path(f"{whole}.end").read_text())
    an_epoch = curve.pop("seconds") / EPOCHS
    chance = random.Random(4)
    resumes = []
    for _ in range(KILLS):
        process = started(processes, tmp_path / "killed", record)
        time.sleep(chance.uniform(0, 6 * an_epoch))
        assert process.is_alive(), "it ended before it could be killed: raise EPOCHS"
        process.kill()
        process.join()
        done = [float(line.split()[1]) for line in lines(record) if line.startswith("done")]
        resumes.append(done[-1] if done else 0.0)
    last = started(processes, tmp_path / "killed", record)
    last.join()
    assert last.exitcode == 0
    check_none_lost(lines(record))
    again, same_weights = json.loads(Path(f"{record}.end").read_text())
    again.pop("seconds")
    assert again == curve
    assert same_weights == weights
    print(
        f"{KILLS} kills at epochs {[int(epoch) for epoch in resumes]}, {EPOCHS} epochs of "
        f"{1e3 * an_epoch:.1f} ms; curve and weights identical"
    )


def check_none_lost(record):
    """Each start was from the last epoch known to be on the disk, or from the one after."""
    done = 0.0
    for line in record:
        word, *number = line.split()
        if word == "done":
            assert float(number[0]) == done + 1  # no epoch is done twice
            done += 1
        elif word == "from":
            # Killed between the checkpoint and its note: one more is on the disk.
            assert float(number[0]) in (done, done + 1)
            done = float(number[0])


def table(folder, count=120):
    path = Path(folder).parent / "x.npy"
    if not path.exists():
        np.save(path, numbers(count, 2).numpy())
    return path


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def example(name, bins=0):
    """An example flow of images, its rows and its contexts."""
    flow = pf.flows.examples()[name].make()
    x = numbers(48, *flow.event_shape)
    context = numbers(48, *flow.context_shape) if flow.context_shape else None
    if bins:
        return pf.quantized(flow, bins), (x.sigmoid() * bins).long(), context
    return flow, x, context


def fitted(flow, x, context=None, **settings):
    base = {"max_epochs": 15, "batch_size": 24, "patience": 60, "lr": 1e-3, "progress": False}
    return pf.fit(flow, x, context, **{**base, **settings}), flow


def model(data):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", 60, subsample_size=len(data)):
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=data)


def guided(**settings):
    plateau.WINDOW = 10  # in a process of its own
    plateau._NOTHING_LEFT = -1.0  # which goes on to the last step
    batches = DataLoader(TensorDataset(numbers(60, 2)), batch_size=20, shuffle=True)
    guide = pf.AutoFlow(model, layers=1, hidden=(4,))
    base = {"particles": 2, "max_steps": 200, "lr": 1e-3, "progress": False}
    return pf.fit_guide(model, guide, batches=batches, **base, **settings), guide


def distilled(**settings):
    teacher = pf.maf(2, layers=1, hidden=(8,))
    student = pf.student_of(teacher)
    base = {"max_steps": 200, "batch_size": 16, "objective": "mixed", "progress": False}
    return pf.distill(teacher, student, data=numbers(60, 2), **base, **settings), student


KINDS = {
    "vectors": lambda **s: fitted(pf.maf(2, layers=1, hidden=(8,)), numbers(120, 2), **s),
    "images": lambda **s: fitted(*example("glow"), **s),
    "integers": lambda **s: fitted(*example("multiscale_realnvp_image", 8), **s),
    "a file": lambda **s: fitted(
        pf.nsf(2, layers=1, hidden=(8,), bins=4), table(s["checkpoint"].folder), **s
    ),
    "a guide": guided,
    "a student": distilled,
}
EVERY = {"a guide": 1, "a student": 0.1}


def newest(folder):
    """The number of the last checkpoint."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)


def train_kind(kind, folder, record):
    """In a process of its own: go on, and write down what it came to."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with open(record, "a") as file:
        file.write("start\n")
    checkpoint = pf.Checkpoint(folder, every=EVERY.get(kind, 0.5), resume=True)
    history, trained = KINDS[kind](checkpoint=checkpoint)
    fields = ("steps", "train", "val", "lr", "best", "stopped", "curves", "skipped", "rollbacks")
    weights = {name: value.tolist() for name, value in trained.state_dict().items()}
    result = [{name: getattr(history, name) for name in fields}, weights]
    Path(f"{record}.end").write_text(json.dumps(result))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_kills_of_each_kind_end_as_one_run(kind, tmp_path):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["pyroflows", "lightning_fabric", "tqdm.auto"])

    def begun(folder, record):
        process = processes.Process(target=train_kind, args=(kind, folder, record))
        process.start()
        while process.is_alive() and not lines(record):
            time.sleep(0.002)
        return process

    whole = tmp_path / "whole.log"
    process, start = begun(tmp_path / "whole", whole), time.monotonic()
    process.join()
    assert process.exitcode == 0
    seconds = time.monotonic() - start
    expected = json.loads(Path(f"{whole}.end").read_text())
    chance, found, last = random.Random(4), [], newest(tmp_path / "whole")
    for index in range(10):
        folder, record = tmp_path / str(index), tmp_path / f"{index}.log"
        process = begun(folder, record)
        until = chance.randrange(last * 3 // 4)
        while process.is_alive() and newest(folder) < until:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 2 * seconds / last))
        process.kill()
        process.join()
        assert not Path(f"{record}.end").exists(), "it ended before it could be killed"
        found.append(newest(folder))
        process = begun(folder, record)
        process.join()
        assert process.exitcode == 0
        assert json.loads(Path(f"{record}.end").read_text()) == expected
    print(f"{kind}: 10 of 10 kills in {seconds:.1f} s of training bit-equal; at {found} of {last}")
