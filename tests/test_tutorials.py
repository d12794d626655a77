"""The tutorials run, and their notebooks are what their scripts say."""

import importlib.util
from pathlib import Path

import jupytext
import nbformat
import pytest

HERE = Path(__file__).parents[1] / "tutorials"
spec = importlib.util.spec_from_file_location("execute", HERE / "execute.py")
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)
SCRIPTS = execute.scripts()
each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def notebook_of(script):
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4)


def outputs(notebook):
    return [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]


@pytest.mark.integration
@each
def test_runs_when_small(script):
    shown = outputs(execute.executed(script, smoke=True))
    assert any("image/png" in out.get("data", {}) for out in shown)
    warned = [out.text for out in shown if out.output_type == "stream" and out.name == "stderr"]
    assert not [text for text in warned if "Warning" in text]


@each
def test_notebook_is_its_script_executed(script):
    notebook = notebook_of(script)
    told = [(cell.cell_type, cell.source) for cell in jupytext.read(script).cells]
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == told
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # from top to bottom, in a fresh kernel


@each
def test_notebook_reads_well(script):
    notebook = notebook_of(script)
    assert len(notebook.cells) <= 25
    assert any("image/png" in out.get("data", {}) for out in outputs(notebook))
    assert not [out for out in outputs(notebook) if out.output_type == "error"]
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert "What to read next" in notebook.cells[-1].source
    assert script.with_suffix(".ipynb").stat().st_size < 1_500_000


def test_every_notebook_has_a_script():
    assert {path.stem for path in HERE.glob("*.ipynb")} == {path.stem for path in SCRIPTS}
