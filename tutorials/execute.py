"""Execute the tutorials: each percent script beside this file becomes a notebook with its outputs.

::

    python tutorials/execute.py                # all, in full, written beside their scripts
    python tutorials/execute.py 00 07          # these alone
    python tutorials/execute.py --smoke        # small sizes, nothing written

The scripts are the source: edit one, then execute it. ``SMOKE`` in its environment makes it small.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def scripts(numbers: list[str] | None = None) -> list[Path]:
    """The tutorials' scripts, in order; of ``numbers`` alone where any are given."""
    found = sorted(HERE.glob("[0-9][0-9]_*.py"))
    return [path for path in found if not numbers or path.name[:2] in numbers]


def executed(script: Path, smoke: bool) -> nbformat.NotebookNode:
    """The script as a notebook with the outputs of a fresh kernel.

    Raises:
        CellExecutionError: a cell raised.
    """
    notebook = jupytext.read(script)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = nbformat.NotebookNode(kernelspec=kernel)
    for place, cell in enumerate(notebook.cells):
        cell.id = f"cell-{place}"  # random ones would change with every run
        cell.metadata = nbformat.NotebookNode()
    os.environ["SMOKE"] = "1" if smoke else ""
    client = NotebookClient(
        notebook,
        timeout=None,
        record_timing=False,
        coalesce_streams=True,  # what is printed in one cell is one output, whatever the load
        resources={"metadata": {"path": str(HERE)}},
    )
    notebook = client.execute()
    notebook.metadata = nbformat.NotebookNode(kernelspec=kernel)
    return notebook


def main(args: argparse.Namespace) -> None:
    """Execute them one after the other."""
    for script in scripts(args.numbers):
        begin = time.perf_counter()
        notebook = executed(script, args.smoke)
        if not args.smoke:
            nbformat.write(notebook, script.with_suffix(".ipynb"))
        print(f"{script.stem:<40} {time.perf_counter() - begin:6.1f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("numbers", nargs="*", help="such as 00 07; all by default")
    parser.add_argument("--smoke", action="store_true", help="small sizes, nothing written")
    main(parser.parse_args())
