"""A training killed at random moments, fifty times, and picked up each time."""

import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch

import pyroflows as pf
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
