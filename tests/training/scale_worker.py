"""What ``test_scale.py`` runs, in one process or, under ``torchrun``, in several.

``torchrun --nproc-per-node 2 tests/training/scale_worker.py OUT CASE ...`` writes the answers of
each process to ``OUT/RANK.json``.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch.utils.data import IterableDataset

import pyroflows as pf
from pyroflows.training.loop import Run

FLOWS = {
    "nice": lambda: pf.nice(4, hidden=(16,)),
    "realnvp": lambda: pf.realnvp(4, layers=4, hidden=(16,)),
    "maf": lambda: pf.maf(4, layers=2, hidden=(16,), linear="lu"),
    "nsf": lambda: pf.nsf(4, layers=2, hidden=(16,), bins=4),
    "glow": lambda: pf.glow((1, 2, 2), levels=1, steps=2, channels=4),
}
STEPS = 50


def rows(count, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return (x.cumsum(dim=1) + 0.3 * x.square()).to(dtype)


def digest(module):
    state = b"".join(t.detach().numpy().tobytes() for t in module.state_dict().values())
    return hashlib.sha256(state).hexdigest()


def fitted(flow, x, where, **settings):
    """Course and final state of a fit without dropout, whose draws no two runs would share."""
    defaults = {"batch_size": 64, "dropout": 0.0, "max_epochs": STEPS, "patience": STEPS}
    begin = time.perf_counter()
    history = pf.fit(flow, x, progress=False, **{**defaults, **settings}, **where)
    seconds = time.perf_counter() - begin
    return {
        "train": history.train,
        "val": history.val,
        "state": digest(flow),
        "rows_a_second": 64 * STEPS / seconds,
    }


def flow_case(name, where, rank):
    """One batch an epoch, so that the history has the loss of each of 50 steps."""
    kind, dtype = name.split(":")
    dtype = getattr(torch, dtype)
    torch.manual_seed(rank)  # the processes build different flows; the first one's counts
    flow = FLOWS[kind]().to(dtype)
    # More held-out rows than are scored at once: each process scores a part of them.
    x, held = rows(64, dtype=dtype), rows(9001, 2, dtype)
    x, held = (part.unflatten(1, flow.event_shape) for part in (x, held))
    return fitted(flow, x, where, val=held)


def uneven_case(count, where):
    torch.manual_seed(0)
    flow = pf.maf(4, hidden=(8,)).double()
    return fitted(flow, rows(count), where, batch_size=32, max_epochs=4)


def resume_case(where, rank, folder):
    """Both processes end in the third epoch, and go on from the checkpoint."""
    settings = {"batch_size": 32, "max_epochs": 5, "dropout": 0.1}

    def run(**more):
        torch.manual_seed(0)
        return fitted(pf.maf(4, hidden=(8,)).double(), rows(100), where, **settings, **more)

    whole, do_period = run(), Run._do_period

    def ends(self, shown):
        if self.schedule.done == 3:
            raise InterruptedError
        do_period(self, shown)

    Run._do_period = ends
    try:
        run(checkpoint=folder)
    except InterruptedError:
        pass
    finally:
        Run._do_period = do_period
    again = run(checkpoint=pf.Checkpoint(folder, resume=True))
    files = len(list(Path(folder).iterdir()))
    return {"same": again["train"] == whole["train"], "state": again["state"], "files": files}


class Stream(IterableDataset):
    """Rows one by one, how many it does not say."""

    def __iter__(self):
        yield from rows(101)


def stream_case(where, rank):
    torch.manual_seed(0)
    flow = pf.maf(4, hidden=(8,)).double()
    return fitted(flow, Stream(), where, val=rows(20), batch_size=32, max_epochs=2)


def guide_case(where, rank):
    def model():
        pyro.sample("z", dist.Normal(torch.tensor(3.0), 0.5))

    torch.manual_seed(rank)
    guide = pf.AutoFlow(model, layers=1, hidden=(4,))
    settings = {"particles": 8, "max_steps": 40, "progress": False}
    history = pf.fit_guide(model, guide, **settings, **where)
    return {"train": history.train, "state": digest(guide), "draw": torch.rand(()).item()}


def distill_case(where, rank):
    torch.manual_seed(0)
    teacher = pf.maf(2, layers=1, hidden=(8,))
    torch.manual_seed(rank)
    student = pf.student_of(teacher)
    history = pf.distill(teacher, student, max_steps=100, batch_size=32, progress=False, **where)
    return {"train": history.train, "val": history.val, "state": digest(student)}


def answer(case, where, rank, folder):
    cases = {"distill": distill_case, "stream": stream_case, "guide": guide_case}
    if case in ("uneven", "odd"):
        return uneven_case({"uneven": 78, "odd": 79}[case], where)
    if case == "resume":
        return resume_case(where, rank, folder)
    return cases[case](where, rank) if case in cases else flow_case(case, where, rank)


def main(out, *cases):
    import os

    torch.set_num_threads(1)
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    fabric = {"accelerator": "cpu", "devices": processes, "strategy": "ddp"}
    where = {"fabric": fabric}
    answers = {case: answer(case, where, rank, Path(out) / "checkpoints") for case in cases}
    (Path(out) / f"{rank}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
