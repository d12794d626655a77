"""Damage saved files at random, read them again, and count what came of it.

``python tests/reliability/fuzz.py --models 1000 --guides 500 --checkpoints 500 --runs 500``

prints, for each kind of file, how often a reader refused with a clear error, how often it read the
same as before, and how often anything else happened, which is a defect; beside it the largest
memory and time that one reading took. All is drawn from ``--seed``. ``test_fuzz.py`` runs a sample.

Half of the damage is blind: bits, bytes, lengths, files. The other half knows the format: it
changes a value and puts the checksums right again, as someone would who means harm.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import pyroflows as pf
from pyroflows._files import model_folder
from pyroflows.cli import app
from pyroflows.cli.tables import read_table, write_table
from pyroflows.infer import plateau
from pyroflows.training.loop import Run

ERROR, SAME, OTHER = "clear error", "the same", "anything else"
HOSTILE = [
    None, True, -1, 0, 3, 10**6, 10**12, 10**400, -(10**30), 0.5, -1.5, 1e308, "", "maf", "nan",
    "../../etc", "\ud83d", [], [[]], [1, [2]], {}, {"float": "nan"}, {"float": "x"}, {"dict": 1},
    {"constraint": "real"}, {"constraint": "stack", "parts": [], "dim": 0},
    {"constraint": "interval", "lower_bound": 2.0, "upper_bound": 1.0},
    {"constraint": "joined", "parts": [], "lengths": []},
    {"distribution": "Normal", "arguments": {}, "event_dims": 5},
    {"family": "Affine", "arguments": {"bound": -1}}, {"tensor": [[1], [2, 3]], "dtype": "int32"},
    {"flow": {"builder": "maf", "arguments": {"features": 2}}},
]  # fmt: skip


@dataclass
class Tally:
    """What came of all readings of one kind."""

    kind: str
    counts: Counter = field(default_factory=Counter)
    defects: list[str] = field(default_factory=list)
    seconds: float = 0.0
    mebibytes: float = 0.0

    def __str__(self) -> str:
        parts = ", ".join(f"{self.counts[k]} {k}" for k in (ERROR, SAME, OTHER))
        return (
            f"{self.kind}: {parts}; at most {self.seconds:.2f} s and {self.mebibytes:.0f} MiB more"
        )


def peak() -> float:
    """The largest memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def attempt(tally: Tally, what: str, read: Callable[[], bool], names: tuple[str, ...]) -> None:
    """Read once; ``read`` says whether it found the same as before the damage."""
    before, started = peak(), time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = SAME if read() else OTHER
        detail = "read, but not the same"
    except ValueError as error:
        detail = f"{type(error).__name__}: {error}"
        clear = len(str(error)) > 15 and any(name in str(error) for name in names)
        outcome = ERROR if clear else OTHER
    except Exception as error:
        outcome, detail = OTHER, f"{type(error).__name__}: {error}"
    tally.counts[outcome] += 1
    tally.seconds = max(tally.seconds, time.monotonic() - started)
    tally.mebibytes = max(tally.mebibytes, peak() - before)
    if outcome == OTHER:
        tally.defects.append(f"{what}: {detail[:300]}")


def damage(folder: Path, rng: random.Random) -> str:
    """Blind damage to one file of a folder; says what was done."""
    paths = sorted(p for p in folder.iterdir() if p.is_file())
    path = rng.choice(paths)
    data = bytearray(path.read_bytes())
    kind = rng.choice("bit bytes cut grow gone empty swap noise zeros".split())
    if kind == "gone":
        path.unlink()
    elif kind == "swap" and len(paths) > 1:
        other = rng.choice([p for p in paths if p != path])
        theirs = other.read_bytes()
        other.write_bytes(bytes(data))
        path.write_bytes(theirs)
    else:
        path.write_bytes(damaged(data, kind, rng))
    return f"{kind} of {path.name}"


def damaged(data: bytearray, kind: str, rng: random.Random) -> bytes:
    """The bytes of a file after damage of a kind."""
    at = rng.randrange(max(len(data), 1))
    if kind == "bit" and data:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "grow":
        data[at:at] = rng.randbytes(rng.randint(1, 64))
    elif kind == "empty":
        data.clear()
    elif kind == "noise":
        data[:] = rng.randbytes(len(data))
    else:
        size = rng.randint(1, 64)
        data[at : at + size] = bytes(size) if kind == "zeros" else rng.randbytes(size)
    return bytes(data)


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Paths to all values in nested lists and dicts."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, item in items:
        yield from places(item, (*path, key))


def replaced(value: object, path: tuple, by: object) -> object:
    """A copy with another value in one place."""
    if not path:
        return by
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], by)
    return copy


def sign(folder: Path, config: dict) -> None:
    """Put the checksums of a model's folder right."""
    data = (folder / model_folder.TENSORS).read_bytes()
    config = {**config, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    config["checksum"] = model_folder.checksum(config)
    (folder / model_folder.CONFIG).write_text(json.dumps(config))


def forge(folder: Path, rng: random.Random) -> str:
    """Change a word of the config, or the tensors, and sign it anew."""
    config = json.loads((folder / model_folder.CONFIG).read_text())
    if rng.random() < 0.6:
        words = ("arguments", "builder", "dtype", "format", "mirrored", "guide", "model")
        keys = [k for k in words if k in config]
        path = rng.choice([p for p in places({k: config[k] for k in keys}) if p])
        by = rng.choice(HOSTILE)
        sign(folder, replaced(config, path, by))
        return f"{'.'.join(map(str, path))} = {str(by)[:40]}"
    tensors = tensors_of((folder / model_folder.TENSORS).read_bytes())
    name = rng.choice(sorted(tensors))
    kind = rng.choice("nan inf half gone more reshaped integer permuted".split())
    forge_tensor(tensors, name, kind)
    (folder / model_folder.TENSORS).write_bytes(bytes_of(tensors))
    sign(folder, config)
    return f"{kind} in {name}"


def forge_tensor(tensors: dict[str, torch.Tensor], name: str, kind: str) -> None:
    """Make one tensor what no saver would write."""
    value = tensors[name]
    if kind in ("nan", "inf"):
        value = value.clone() if value.is_floating_point() else value.float()
        tensors[name] = value.fill_(float(kind))
    elif kind == "half":
        tensors[name] = value.half() if value.is_floating_point() else value.to(torch.int8)
    elif kind == "gone":
        del tensors[name]
    elif kind == "more":
        tensors[f"{name}_more"] = value.clone()
    elif kind == "reshaped":
        tensors[name] = torch.cat([value.reshape(-1), value.reshape(-1)[:1]])
    elif kind == "integer":
        tensors[name] = value.long() if value.is_floating_point() else value + 10**6
    else:
        tensors[name] = value.reshape(-1).roll(1).reshape(value.shape) + 10**6


def scores(flow: torch.nn.Module, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
    """Log-densities, without gradient."""
    with torch.no_grad():
        return flow(context, validate_args=False).log_prob(x)


def small_models() -> list[torch.nn.Module]:
    """An example of each builder."""
    found = {}
    for _, example in sorted(pf.flows.examples().items()):
        found.setdefault(example.make().config["builder"], example)
    made = [example.make() for example in found.values()]
    return [flow.eval() for flow in [*made, pf.student_of(pf.maf(2, layers=1, hidden=(4,)))]]


def fuzz_models(count: int, rng: random.Random, tally: Tally) -> Tally:
    """Saved flows of every builder."""
    models = small_models()
    with tempfile.TemporaryDirectory() as above:
        for index, flow in enumerate(models):
            pf.save(flow, Path(above) / str(index))
        for _ in range(count):
            index = rng.randrange(len(models))
            flow, folder = models[index], Path(above) / "now"
            shutil.copytree(Path(above) / str(index), folder)
            context = torch.zeros(2, *flow.context_shape) if flow.context_shape else None
            x = flow.sample(() if flow.context_shape else (2,), context)
            what = (damage if rng.random() < 0.5 else forge)(folder, rng)

            def read(folder=folder, flow=flow, x=x, context=context) -> bool:
                again = pf.load(folder)
                # Signed and whole, it may be another flow: then one that scores.
                found = scores(again, x, context) if again.event_shape == flow.event_shape else x
                return not torch.isnan(found).any()

            name = f"{flow.config['builder']}, {what}"
            attempt(tally, name, read, ("folder", "config.json", ".safetensors", "builder:"))
            shutil.rmtree(folder)
    return tally


def model_of(net: torch.nn.Module) -> Callable:
    """A model that learns a parameter and a module."""

    def model() -> None:
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        pyro.module("decoder", net)
        with pyro.plate("rows", 2):
            pyro.sample("z", dist.LogNormal(net.bias.sum(), scale))

    return model


def fuzz_guides(count: int, rng: random.Random, tally: Tally) -> Tally:
    """Saved guides, with what their models have learned."""
    model = model_of(torch.nn.Linear(1, 1))
    guide = pf.AutoFlow(model, layers=1, hidden=(4,), init="init")
    with tempfile.TemporaryDirectory() as above:
        whole, folder = Path(above) / "whole", Path(above) / "now"
        pf.save(guide.setup(), whole)
        for _ in range(count):
            shutil.copytree(whole, folder)
            pyro.clear_param_store()
            what = (damage if rng.random() < 0.5 else forge)(folder, rng)

            def read() -> bool:
                again = pf.load(folder, model=model_of(torch.nn.Linear(1, 1)))
                # Signed and whole, it may be another guide: then one that draws.
                draws = again.sample_posterior(2).values()
                stored = pyro.get_param_store().values()
                return not any(torch.isnan(value).any() for value in (*draws, *stored))

            names = ("folder", "config.json", ".safetensors", "builder:", "model:")
            attempt(tally, what, read, names)
            shutil.rmtree(folder)
    return tally


def commands(*words: object) -> dict:
    """What a command of ours prints; its one line of error is a ``ValueError`` here."""
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    said = json.loads(done.stdout)
    if done.exit_code == 2:
        raise ValueError(said["error"])
    return said


def fitted_run(folder: Path) -> Path:
    """A run of the command over a small table, made in ``folder``."""
    table = folder / "table.csv"
    rows = np.random.default_rng(0).normal(size=(200, 2)).tolist()
    table.write_text("\n".join(["a,b", *(f"{a},{b}" for a, b in rows)]) + "\n")
    quick = ["--flow", "maf", "--layers", 1, "--hidden", 4, "--epochs", 1]
    commands("fit", table, "--out", folder / "run", *quick)
    return table


def forge_run(folder: Path, rng: random.Random) -> str:
    """Another word in the facts of a run, or other rows in it."""
    if rng.random() < 0.5:
        facts = json.loads((folder / "table.json").read_text())
        path, by = rng.choice([p for p in places(facts) if p]), rng.choice(HOSTILE)
        (folder / "table.json").write_text(json.dumps(replaced(facts, path, by)))
        return f"{'.'.join(map(str, path))} = {str(by)[:40]}"
    with np.load(folder / "rows.npz") as rows:
        train, held = rows["train"], rows["held"]
    kind = rng.choice("nan inf empty wide words".split())
    wrong = {
        "nan": np.full_like(held, np.nan),
        "inf": np.full_like(held, np.inf),
        "empty": held[:0],
        "wide": np.ones((5, 7)),
        "words": np.array([["a", "b"]]),
    }[kind]
    which = rng.choice(["train", "held"])
    np.savez(folder / "rows.npz", **{"train": train, "held": held, which: wrong})
    return f"{which} rows: {kind}"


def fuzz_runs(count: int, rng: random.Random, tally: Tally) -> Tally:
    """Folders of the command: what ``score`` says of a table must not change."""
    with tempfile.TemporaryDirectory() as name:
        above = Path(name)
        table = fitted_run(above)
        expected = commands("score", above / "run", table)
        for _ in range(count):
            folder = above / "now"
            shutil.copytree(above / "run", folder)
            what = rng.choice([damage, forge, forge_run])(folder, rng)

            def read(folder=folder) -> bool:
                said = commands("score", folder, table)
                return {**said, "run": ""} == {**expected, "run": ""}

            attempt(tally, what, read, ("folder", "config.json", ".safetensors", str(folder)))
            shutil.rmtree(folder)
    return tally


def fuzz_tables(count: int, rng: random.Random, tally: Tally) -> Tally:
    """Tables in each format: read as numbers, or refused by name."""
    values = np.random.default_rng(0).normal(size=(60, 3))
    with tempfile.TemporaryDirectory() as name:
        above = Path(name)
        for _ in range(count):
            path = above / f"t{rng.choice(['.csv', '.tsv', '.csv.gz', '.npy', '.parquet'])}"
            write_table(path, ["a", "b", "c"], [values])
            kind = rng.choice("bit bytes cut grow empty noise zeros".split())
            path.write_bytes(damaged(bytearray(path.read_bytes()), kind, rng))

            def read(path=path) -> bool:
                table = read_table(path)  # other numbers may stand there now: they are numbers
                return table.values.dtype == np.float64 and table.values.ndim == 2

            attempt(tally, f"{kind} of {path.name}", read, (path.name,))
    return tally


def fit_a_little(checkpoint: object, seed: int, epochs: int = 3) -> list:
    """A small flow of images, whose weights lie in memory in more than one way."""
    torch.manual_seed(seed)
    flow = pf.flows.examples()["multiscale_realnvp"].make()
    x = torch.rand(24, *flow.event_shape, generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(x), batch_size=8, shuffle=True)
    torch.manual_seed(seed)
    settings = {"max_epochs": epochs, "dropout": 0.1, "val": x[:5], "progress": False}
    history = pf.fit(flow, data, checkpoint=checkpoint, **settings)
    return [history.train, [p.detach().clone() for p in flow.parameters()]]


def guide_a_little(checkpoint: object, seed: int, steps: int = 60) -> list:
    """A guide of two normals, in windows of 20 steps."""
    pyro.clear_param_store()
    torch.manual_seed(seed)

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = pf.AutoFlow(model, layers=1, hidden=(4,))
    settings = {"particles": 2, "max_steps": steps, "progress": False, "checkpoint": checkpoint}
    history = pf.fit_guide(model, guide, **settings)
    return [history.train, [p.detach().clone() for p in guide.parameters()]]


def distil_a_little(checkpoint: object, seed: int, steps: int = 150) -> list:
    """A student of a small flow."""
    torch.manual_seed(0)
    teacher = pf.maf(2, layers=1, hidden=(4,))
    torch.manual_seed(seed)
    student = pf.student_of(teacher)
    settings = {"max_steps": steps, "batch_size": 8, "progress": False, "checkpoint": checkpoint}
    history = pf.distill(teacher, student, **settings)
    return [history.train, [p.detach().clone() for p in student.parameters()]]


def stopped_within(train: Callable, folder: Path, steps: int) -> None:
    """Train until a step, as a process that is killed there would."""

    def counted(self: Run, batch: object) -> None:
        nonlocal steps
        steps -= 1
        if steps < 0:
            raise InterruptedError
        step(self, batch)

    step, Run._step = Run._step, counted
    try:
        train(pf.Checkpoint(folder, every=0.7), 0)
    except InterruptedError:
        pass
    finally:
        Run._step = step


def forge_checkpoint(folder: Path, rng: random.Random) -> str:
    """Another word, number or tensor in the newest, with the name that its hash then gives it."""
    path = max(folder.glob("checkpoint-*"))
    serial = int(path.name.split("-")[1])
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])["__metadata__"]
    tensors = tensors_of(content)
    if rng.random() < 0.6:
        words = json.loads(header["state"])
        where, by = rng.choice([p for p in places(words) if p]), rng.choice(HOSTILE)
        header["state"] = json.dumps(replaced(words, where, by))
        what = f"{where} = {str(by)[:40]}"
    else:
        name = rng.choice(sorted(tensors))
        kind = rng.choice("nan inf half gone more reshaped integer permuted".split())
        forge_tensor(tensors, name, kind)
        what = f"{kind} in tensor {name}"
    content = bytes_of(tensors, metadata=header)
    path.unlink()
    digest = hashlib.sha256(content).hexdigest()[:32]
    (folder / f"checkpoint-{serial:08d}-{digest}.safetensors").write_bytes(content)
    return what


def is_same(one: list, other: list) -> bool:
    """Whether two trainings came to the same."""
    pairs = zip(one[1], other[1], strict=True)
    return one[0] == other[0] and all(torch.equal(a, b) for a, b in pairs)


def fuzz_checkpoints(count: int, rng: random.Random, tally: Tally) -> Tally:
    """Folders of trainings that were killed: gone on from to the very same end, or refused."""
    trainers = [(fit_a_little, 7), (guide_a_little, 50), (distil_a_little, 90)]
    with (
        tempfile.TemporaryDirectory() as name,
        patched(plateau, "WINDOW", 20),
        patched(plateau, "_NOTHING_LEFT", -1.0),
    ):
        above = Path(name)
        expected = []
        for index, (train, steps) in enumerate(trainers if count else []):
            expected.append(train(None, 0))
            stopped_within(train, above / str(index), steps)
        for _ in range(count):
            index = rng.randrange(len(trainers))
            train, folder = trainers[index][0], above / "now"
            shutil.copytree(above / str(index), folder)
            if rng.random() < 0.5:
                min(folder.iterdir()).unlink()  # no one before it
            forged = rng.random() < 0.5
            what = (forge_checkpoint if forged else damage)(folder, rng)
            begins = not list(folder.iterdir())

            def read(folder=folder, index=index, forged=forged, begins=begins) -> bool:
                train = trainers[index][0]
                try:
                    found = train(pf.Checkpoint(folder, resume=True), 0 if begins else 9)
                except (pf.DivergedError, FloatingPointError) as error:
                    if not forged:
                        raise
                    # Moments that no training has: said, with what to try.
                    raise ValueError(f"checkpoint signed anew: {error}") from None
                # Signed and whole, it may be another's place: then one that trains to an end.
                ends = forged and all(p.isfinite().all() for p in found[1])
                return is_same(found, expected[index]) or ends

            attempt(tally, f"{train.__name__}, {what}", read, ("checkpoint",))
            shutil.rmtree(folder)
    return tally


@contextmanager
def patched(module: object, name: str, value: object) -> Iterator[None]:
    """Another value of a module's, for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def main() -> None:
    """Count, and end with 1 where anything else than an error or the same came."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    defects = []
    for kind, fuzz in KINDS.items():
        tally = fuzz(getattr(options, kind), random.Random(options.seed), Tally(kind))
        print(tally, *map(ascii, tally.defects), sep="\n  ")
        defects += tally.defects
    raise SystemExit(bool(defects))


KINDS = {
    "models": fuzz_models,
    "guides": fuzz_guides,
    "checkpoints": fuzz_checkpoints,
    "runs": fuzz_runs,
    "tables": fuzz_tables,
}

if __name__ == "__main__":
    main()
