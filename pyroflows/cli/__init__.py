"""The command ``pyroflows``: from a table to a density and back to a table."""

import typer

from pyroflows.cli import applying, fitting, inspecting

app = typer.Typer(
    name="pyroflows",
    help=(
        "Densities of tables with normalizing flows: [bold]fit[/] one to a table, [bold]sample[/] "
        "new rows, [bold]score[/] rows, [bold]report[/] how good it is.\n\n"
        "Every command takes [bold]--json[/] for machines. Exit codes: 0 done, 1 too many outliers "
        "or a broken law were found, 2 an error: one line, under the usage if an option is wrong; "
        "130 or 143 stopped by Ctrl-C or SIGTERM, where a training keeps the best it came to."
    ),
    epilog=(
        "In three commands: pyroflows fit data.csv --out run/, pyroflows sample run/ -n 1000 "
        "--out new.csv, pyroflows report run/"
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.command("list")(inspecting.list_flows)
app.command("fit")(fitting.fit)
app.command("sample")(applying.sample)
app.command("score")(applying.score)
app.command("distill")(fitting.distill)
app.command("report")(inspecting.report)
app.command("check")(inspecting.check)


def main() -> None:
    """Run the command line."""
    app()


__all__ = ["app", "main"]
