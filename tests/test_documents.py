"""What README and CONTRIBUTING show is so."""

import doctest
import re
import sys
import types
from pathlib import Path

import pyroflows as pf
from pyroflows.testing import check_flow

ROOT = Path(__file__).parent.parent


def test_readme_examples_run():
    failed, tried = doctest.testfile(
        str(ROOT / "README.md"), module_relative=False, optionflags=doctest.ELLIPSIS
    )
    assert tried > 10
    assert failed == 0


def test_the_flow_in_contributing_keeps_the_contract(monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    module = types.ModuleType("shown_in_contributing")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # or pickle cannot find the class
    exec(code.group(1), module.__dict__)
    for example in module.EXAMPLES.values():
        check_flow(example.make, fast=example.fast)


def test_readme_lists_every_builder():
    text = (ROOT / "README.md").read_text()
    builders = [n for n in pf.flows.__all__ if hasattr(getattr(pf.flows, n), "__wrapped__")]
    assert len(builders) >= 5
    assert [n for n in builders if f"pf.{n}" not in text] == []
