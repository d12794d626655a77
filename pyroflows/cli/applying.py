"""``sample`` and ``score``: a fitted flow at work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from pyroflows.cli.outliers import count_outliers
from pyroflows.cli.output import Json, command, note, result
from pyroflows.cli.runs import matched, read_run
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
        summary = {"rows": n, "columns": made.columns, "out": str(out)}
        result(summary, [f"{n:,} rows written to {out}"], json)


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

    A row is an outlier if its score is below the given quantile of the training rows' scores, and
    far out if it is even lower than the lowest of so many rows would be by chance, to judge by the
    rows that the run keeps. Rows with missing cells get no score and are counted.

    The exit code is 1 if there are more outliers than [bold]--max-outliers[/]. Without that option
    it is 1 if a row is far out, or if there are more outliers than chance allows 99 times in a
    hundred, to judge by the run's held-out rows.

    Example: pyroflows score run/ data.csv --out scored.csv
    """
    _check_score_options(data, out, quantile)
    made = read_run(run)
    table = read_table(data, header)
    scores = made.scores(matched(made, table))
    facts, allowed = count_outliers(made, scores, quantile)
    lines = _in_words(facts)
    if out is not None:
        _write_scored(data, out, table, scores)
        lines.append(f"written to {out}")
    result({**facts, "out": None if out is None else str(out)}, lines, json)
    by_chance = facts["outliers"] <= allowed and not facts["far_out"]
    if not (by_chance if max_outliers is None else facts["outliers"] <= max_outliers):
        raise typer.Exit(1)


def _check_score_options(data: Path, out: Path | None, quantile: float) -> None:
    if not 0 < quantile < 1:
        raise ValueError(f"--quantile: expected a number in (0, 1), got {quantile}")
    if out is not None:
        kind_of(out)
        if out.resolve() == data.resolve():
            raise ValueError("--out: is the table itself; give another file")


def _in_words(facts: dict[str, Any]) -> list[str]:
    mean = float("nan") if facts["mean"] is None else facts["mean"]
    return [
        f"{facts['rows']:,} rows, {facts['unscored']:,} of them without a score (missing values)",
        f"mean log-density {mean:.3f} nats",
        f"outliers: {facts['outliers']:,}, {facts['far_out']:,} of them far out; below "
        f"{facts['threshold']:.3f} nats, the {facts['quantile']:g} quantile of the training rows",
    ]


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
