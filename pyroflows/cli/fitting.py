"""``fit``: a flow from a table. ``distill``: a faster sampler from a fitted flow."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from pyroflows.cli import columns as cols
from pyroflows.cli.output import Json, command, end_as, note, result
from pyroflows.cli.runs import TEST_ROWS, TRAIN_ROWS, Run, check_out, log_prob, read_run
from pyroflows.cli.tables import BINARY, kind_of, read_table
from pyroflows.data.rows import shuffled
from pyroflows.distillation import compare, student_of
from pyroflows.distillation import distill as distill_flow
from pyroflows.distributions.flow import Flow
from pyroflows.flows import builders
from pyroflows.training.history import History
from pyroflows.training.likelihood import fit as fit_flow

Out = Annotated[Path, typer.Option("--out", help="Folder to write the run to.")]
Overwrite = Annotated[bool, typer.Option(help="Write into a folder that is not empty.")]
Seed = Annotated[int, typer.Option(help="Fixes everything random.", min=0)]


@dataclass(frozen=True)
class FitOptions:
    """What ``pyroflows fit`` takes on the command line."""

    data: Annotated[Path, typer.Argument(help="A .csv (or .csv.gz), .npy or .parquet file.")]
    out: Out
    flow: Annotated[str, typer.Option(help="One that pyroflows list shows to take features.")] = (
        "nsf"
    )
    columns: Annotated[
        list[str] | None, typer.Option(help="a,b,c: columns to use; by default those of numbers.")
    ] = None
    positive: Annotated[
        list[str] | None, typer.Option(help="a,b: columns whose values are all above zero.")
    ] = None
    bounded: Annotated[
        list[str] | None, typer.Option(help="a=0:1: a column with values inside. Repeatable.")
    ] = None
    header: Annotated[
        bool | None,
        typer.Option(
            "--header/--no-header", help="Whether the first line names the columns; else seen."
        ),
    ] = None
    missing: Annotated[str, typer.Option(help="Rows with missing values: 'drop' or 'refuse'.")] = (
        "drop"
    )
    layers: Annotated[
        int | None, typer.Option(help="Layers of the flow; by default the builder's.", min=1)
    ] = None
    hidden: Annotated[
        str | None, typer.Option(help="128,128: widths of its networks; by default the builder's.")
    ] = None
    epochs: Annotated[
        int | None,
        typer.Option(help="Most epochs; by default 20 to 300, about 8,000 steps.", min=1),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(help="Rows a step; by default 64 to 1,024 by the number of rows.", min=1),
    ] = None
    lr: Annotated[float, typer.Option(help="First step size.")] = 1e-3
    patience: Annotated[
        int, typer.Option(help="Epochs without a better validation score before it stops.", min=1)
    ] = 30
    test: Annotated[float, typer.Option(help="Share of rows never trained on.")] = 0.1
    seed: Seed = 0
    overwrite: Overwrite = False
    json: Json = False


@dataclass(frozen=True)
class Chosen:
    """The part of a table that a flow is fitted to.

    Attributes:
        header: whether the file names its columns.
        names: of the columns in use.
        left_out: names of the columns of words.
        values: ``(rows, columns)``: the rows that can be used.
        counts: of rows and of what is missing in them.
        bounds: of each column.
    """

    header: bool
    names: list[str]
    left_out: list[str]
    values: np.ndarray
    counts: dict[str, Any]
    bounds: dict[str, tuple[float, float] | None]

    def facts(self) -> dict[str, Any]:
        """What a run keeps of it, in words that JSON has."""
        bounds = {
            name: ends and [ends[0], ends[1] if math.isfinite(ends[1]) else None]
            for name, ends in self.bounds.items()
        }
        return {
            "columns": self.names,
            "header": self.header,
            "counts": self.counts,
            "left_out": self.left_out,
            "bounds": bounds,
        }


@command
def fit(options: FitOptions) -> None:
    """Fit a flow to the rows of a table, and keep it in a folder.

    Rows with missing or infinite cells are counted and left out, and so are rows far outside all
    others, which are named. Columns of words are left out unless they are named. A share of the
    rows is held out: the score on it is what the fit is worth in nats, in the units of the table.
    The folder also keeps up to 12,000 rows, for [bold]score[/] and [bold]report[/].

    Example: pyroflows fit houses.csv --out run/ --positive income --bounded latitude=32:42
    """
    make = _builder(options.flow)
    _check_options(options)
    sizes = _sizes(make, options.layers, options.hidden)
    check_out(options.out, options.overwrite)
    chosen = _read(options)
    torch.manual_seed(options.seed)
    dtype = cols.dtype_for(chosen.values, chosen.bounds)
    train, test = _split(chosen.values, options)
    flow = make(len(chosen.names), support=cols.support_of(chosen.bounds), **sizes)
    flow = flow.to(getattr(torch, dtype))
    note(f"fitting {options.flow} to {len(train):,} rows of {len(chosen.names)} columns in {dtype}")
    history = _train(flow, train, options)
    facts = {"source": options.data.name, "history": dataclasses.asdict(history), **chosen.facts()}
    run = Run(options.out, flow, facts, train[:TRAIN_ROWS], test[:TEST_ROWS])
    _score_test_rows(run, test)
    run.write()
    summary = {
        "flow": options.flow,
        "out": str(options.out),
        "dtype": dtype,
        "epochs": len(history.steps),
        **chosen.counts,
        "columns": chosen.names,
        "left_out": chosen.left_out,
        "held_out": facts["held_out"],
        "seconds": history.seconds,
        "stopped": history.stopped,
    }
    result(summary, [*_fitted(facts, history), f"written to {options.out}"], options.json)
    end_as(history)


def _check_options(options: FitOptions) -> None:
    if options.missing not in ("drop", "refuse"):
        raise ValueError(f"--missing: expected 'drop' or 'refuse', got {options.missing!r}")
    if not 0 < options.test < 1 or not (options.lr > 0 and math.isfinite(options.lr)):
        raise ValueError(
            f"--test, --lr: expected a share in (0, 1) and lr > 0, got {options.test}, {options.lr}"
        )


def _read(options: FitOptions) -> Chosen:
    """Read the table, choose columns and rows, and note what was left out."""
    table = read_table(options.data, options.header)
    if options.header is None and kind_of(options.data) not in BINARY:
        note(cols.header_note(table))
    names, left_out = cols.choose(table, options.columns or [])
    values = cols.values_of(table, names)
    usable, counts = cols.usable(values, names)
    values = values[usable]
    for line in cols.report_rows(counts):
        note(line)
    if left_out:
        note(f"left out, no numbers in them: {cols.listed(left_out)}")
    if options.missing == "refuse" and counts["used"] < counts["rows"]:
        where = cols.listed([*counts["missing"], *counts["infinite"]])
        raise ValueError(
            f"{counts['rows'] - counts['used']} rows have missing or infinite values, in columns "
            f"{where}; correct them, choose others with --columns, or use --missing drop"
        )
    bounds = cols.bounds_of(names, options.positive or [], options.bounded or [])
    values = cols.without_wild(values, bounds, np.flatnonzero(usable) + 1, options.data.name)
    counts["far_out"], counts["used"] = counts["used"] - len(values), len(values)
    for line in cols.check_values(values, bounds):
        note(f"note: {line}")
    return Chosen(table.header, names, left_out, values, counts, bounds)


def _split(values: np.ndarray, options: FitOptions) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on, and rows never trained on."""
    order = shuffled(len(values), torch.Generator().manual_seed(options.seed)).numpy()
    count = max(2, round(options.test * len(values)))
    if len(values) - count < 10:
        raise ValueError(
            f"--test: {options.test} of {len(values)} rows leaves less than 10 to train on"
        )
    return values[order[count:]], values[order[:count]]


def _train(flow: Flow, values: np.ndarray, options: FitOptions) -> History:
    return fit_flow(
        flow,
        torch.tensor(values, dtype=flow.dtype),
        max_epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        patience=options.patience,
        seed=options.seed,
        progress=not options.json,
    )


def _builder(name: str) -> Any:
    found = builders()
    rows = [k for k, v in found.items() if next(iter(signature(v).parameters)) == "features"]
    if name not in rows:
        why = "makes images, not rows" if name in found else "is unknown"
        raise ValueError(f"--flow: {name!r} {why}; expected one of {', '.join(rows)}")
    return found[name]


def _sizes(make: Any, layers: int | None, hidden: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {} if layers is None else {"layers": layers}
    if hidden is not None:
        try:
            options["hidden"] = tuple(int(width) for width in hidden.split(","))
        except ValueError:
            raise ValueError(f"--hidden: expected widths like 128,128, got {hidden!r}") from None
    for option in options:
        if option not in signature(make).parameters:
            raise ValueError(f"--{option}: {make.__name__} has no such size; leave it out")
    return options


def _score_test_rows(run: Run, test_rows: np.ndarray) -> None:
    """Add to the run's facts what the flow scores on rows that it was not trained on."""
    scores = log_prob(run.flow, run.tensor(test_rows))
    run.facts["held_out"] = {
        "rows": len(scores),
        "nats": float(scores.mean()),
        "error": float(scores.std() / math.sqrt(len(scores))),
    }


def _fitted(facts: dict[str, Any], history: History) -> list[str]:
    score = facts["held_out"]
    return [
        f"{len(history.steps)} epochs in {history.seconds:.1f} s, {history.stopped}",
        f"held out: {score['nats']:.3f} +- {score['error']:.3f} nats a row, {score['rows']:,} rows",
    ]


@command
def distill(
    run: Annotated[Path, typer.Argument(help="A folder of pyroflows fit.")],
    out: Out,
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 3000,
    batch_size: Annotated[int, typer.Option(help="Draws a step.", min=1)] = 256,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Train a student that samples in one pass on a fitted flow, and keep it in a folder.

    Worth it for flows whose samples are the slow direction: maf and wavenet. Learns from training
    rows too. Says both KL divergences, what is lost on held-out rows, and the speeds.

    Example: pyroflows distill run/ --out fast/
    """
    check_out(out, overwrite)
    teacher = read_run(run)
    if teacher.flow.fast != "log_prob":
        note(f"note: this flow already samples in one pass (fast: {teacher.flow.fast})")
    torch.manual_seed(seed)
    student: Flow = student_of(teacher.flow)
    history = distill_flow(
        teacher.flow,
        student,
        data=teacher.tensor(teacher.train),
        max_steps=steps,
        batch_size=batch_size,
        progress=not json,
    )
    facts = {**teacher.facts, "history": dataclasses.asdict(history)}
    facts["teacher"] = teacher.builder
    made = Run(out, student, facts, teacher.train, teacher.test)
    _score_test_rows(made, made.test)
    made.write()
    report = compare(teacher.flow, student, teacher.tensor(teacher.test), history=history)
    # What repr shows: numbers, no draws.
    summary = {f.name: getattr(report, f.name) for f in dataclasses.fields(report) if f.repr}
    result({**summary, "out": str(out)}, [str(report), f"written to {out}"], json)
    end_as(history)
