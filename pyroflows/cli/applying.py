"""``sample`` and ``score``: a fitted flow at work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from pyroflows.cli.output import Json, command, note, result
from pyroflows.cli.runs import Run, matched, read_run
from pyroflows.cli.tables import (
    BINARY,
    Table,
    csv_lines,
    csv_writer,
    kind_of,
    read_table,
    write_table,
)

RunFolder = Annotated[Path, typer.Argument(help="A folder of pyroflows fit.")]


@command
def sample(
    run: RunFolder,
    n: Annotated[int, typer.Option("-n", "--rows", help="How many rows.", min=1)] = 1000,
    out: Annotated[
        Path | None, typer.Option(help="A .csv, .npy or .parquet file; by default stdout, as CSV.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Gives the same rows again; by default new ones.", min=0)
    ] = None,
    json: Json = False,
) -> None:
    """Draw new rows from a fitted flow, with the table's column names and units.

    Example: pyroflows sample run/ -n 1000 --out new.csv
    """
    if out is not None:
        kind_of(out)
    if json and out is None:
        raise ValueError("--json: give --out too, the rows would be between its lines")
    made = read_run(run)
    if seed is None:
        torch.seed()
    else:
        torch.manual_seed(seed)
    write_table(out, made.columns, made.draws(n), made.facts["header"])
    if out is not None:
        said = {"rows": n, "columns": made.columns, "out": str(out)}
        result(said, [f"{n:,} rows written to {out}"], json)


@command
def score(
    run: RunFolder,
    data: Annotated[Path, typer.Argument(help="A table with the columns of the run.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write the table with a column of log-densities.")
    ] = None,
    quantile: Annotated[
        float, typer.Option(help="Rows below this quantile of the training rows are outliers.")
    ] = 0.001,
    max_outliers: Annotated[
        int | None,
        typer.Option(
            help="Exit code 1 where there are more outliers; by default than chance allows.", min=0
        ),
    ] = None,
    header: Annotated[
        bool | None,
        typer.Option("--header/--no-header", help="Whether the first line names the columns."),
    ] = None,
    json: Json = False,
) -> None:
    """Log-density of each row, in nats, and which rows are outliers.

    An outlier scores below a quantile of the rows that the flow was trained on: of rows like those,
    about that share is below it. One that is further below all rows that the run keeps than these
    are apart, and than chance puts one of so many rows, is far out. Rows with missing cells get no
    score and are counted. The exit code is 1 if there are more outliers than
    [bold]--max-outliers[/]; without it if one is far out, or if there are more than the run's
    held-out rows let expect 99 times in a hundred.

    Example: pyroflows score run/ data.csv --out scored.csv
    """
    if not 0 < quantile < 1:
        raise ValueError(f"--quantile: expected a number in (0, 1), got {quantile}")
    if out is not None:
        kind_of(out)
        if out.resolve() == data.resolve():
            raise ValueError("--out: is the table itself; give another file")
    made = read_run(run)
    table = read_table(data, header)
    scores = made.scores(matched(made, table))
    facts, allowed = _judged(made, scores, quantile)
    lines = _in_words(facts)
    if out is not None:
        _write_scored(data, out, table, scores)
        lines.append(f"written to {out}")
    result({**facts, "out": None if out is None else str(out)}, lines, json)
    if max_outliers is not None:
        broken = facts["outliers"] > max_outliers
    else:
        broken = facts["outliers"] > allowed or facts["far_out"] > 0
    if broken:
        raise typer.Exit(1)


def _judged(made: Run, scores: np.ndarray, quantile: float) -> tuple[dict[str, Any], int]:
    """What the scores of a table show, and how many outliers chance allows among them."""
    trained, unseen = made.scores(made.train), made.scores(made.held)
    threshold = float(np.quantile(trained, quantile, method="lower"))
    scored = int((~np.isnan(scores)).sum())
    outliers = scores < threshold  # a NaN is not
    far = scores < _least(np.concatenate([trained, unseen]), scored)
    finite = scores[np.isfinite(scores)]
    facts = {
        "rows": len(scores),
        "scored": scored,
        "unscored": len(scores) - scored,
        "mean": float(finite.mean()) if len(finite) else None,
        "threshold": threshold,
        "quantile": quantile,
        "outliers": int(outliers.sum()),
        "far_out": int(far.sum()),
    }
    return facts, _by_chance(scored, int((unseen < threshold).sum()), len(unseen))


def _in_words(facts: dict[str, Any]) -> list[str]:
    mean = float("nan") if facts["mean"] is None else facts["mean"]
    return [
        f"{facts['rows']:,} rows, {facts['unscored']:,} of them without a score (missing values)",
        f"mean log-density {mean:.3f} nats",
        f"outliers: {facts['outliers']:,}, {facts['far_out']:,} of them far out; below "
        f"{facts['threshold']:.3f} nats, the {facts['quantile']:g} quantile of the training rows",
    ]


def _least(known: np.ndarray, rows: int) -> float:
    """Where no score of ``rows`` new rows is below, 99 times in a hundred, by those of known rows.

    A log-density's tail is at most exponential: ``exp`` of it is what falls off. The lowest of n
    such scores is about log(n) of its scales below the highest, so that the lowest of ``100 rows``
    is less than log(100 rows) of them further down.
    """
    lowest, highest = known.min(), known.max()
    times = max(1.0, math.log(100 * max(rows, 1)) / math.log(len(known)))
    return float(lowest - times * (highest - lowest))


def _by_chance(rows: int, below: int, known: int) -> int:
    """How many of new rows are outliers at most, 99 times in a hundred.

    Rows like ``known`` others, ``below`` of which were outliers: their number is at most
    beta-binomial, of ``rows`` trials with Beta(below + 1, known - below).
    """
    a, b = below + 1.0, max(known - below, 1.0)
    count = torch.arange(rows + 1.0, dtype=torch.float64)
    log_probability = (
        math.lgamma(rows + 1)
        - torch.lgamma(count + 1)
        - torch.lgamma(rows - count + 1)
        + torch.lgamma(count + a)
        + torch.lgamma(rows - count + b)
        - math.lgamma(rows + a + b)
        - (math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))
    )
    return int((log_probability.exp().cumsum(0) < 0.99).sum())


def _write_scored(data: Path, out: Path, table: Table, scores: np.ndarray) -> None:
    """The table as it was, and one column more."""
    extra = "log_density"
    while extra in table.names:
        extra += "_"
    if kind_of(data) in BINARY or kind_of(out) in BINARY:
        if table.words:
            note("note: columns of words are empty in this kind of file")
        values = np.column_stack([table.values, scores])
        write_table(out, [*table.names, extra], [values])
        return
    texts = ["" if np.isnan(score) else repr(float(score)) for score in scores]
    with csv_lines(data) as lines, csv_writer(out) as writer:
        rows = (cells for cells in lines if cells)
        if table.header:
            writer.writerow([*_on_one_line(next(rows)), extra])
        for cells, text in zip(rows, texts, strict=True):
            writer.writerow([*_on_one_line(cells), text])


def _on_one_line(cells: list[str]) -> list[str]:
    """A carriage return inside a cell as a line feed: Python's writer quotes only that."""
    return [cell.replace("\r\n", "\n").replace("\r", "\n") for cell in cells]
