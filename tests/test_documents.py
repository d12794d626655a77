"""What README and CONTRIBUTING show is so."""

import doctest
import re
import sys
from pathlib import Path

import pytest
import torch

import pyroflows as pf
from pyroflows.testing import check_flow

ROOT = Path(__file__).parent.parent


def test_readme_examples_run():
    failed, tried = doctest.testfile(
        str(ROOT / "README.md"), module_relative=False, optionflags=doctest.ELLIPSIS
    )
    assert tried > 10
    assert failed == 0


@pytest.fixture
def flow_of_contributing(tmp_path, monkeypatch):
    """The name of the flow that CONTRIBUTING.md shows, in a file of its own among the flows."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (tmp_path / "sinh_arcsinh.py").write_text(code.group(1))
    monkeypatch.setattr(pf.flows, "__path__", [*pf.flows.__path__, str(tmp_path)])
    yield "sinh_arcsinh"
    sys.modules.pop("pyroflows.flows.sinh_arcsinh")
    del pf.flows.sinh_arcsinh


def test_the_flow_in_contributing_is_found_and_keeps_the_contract(flow_of_contributing):
    example = pf.flows.examples()[flow_of_contributing]
    check_flow(example.make, fast=example.fast)


def test_the_flow_in_contributing_works_with_everything_at_once(flow_of_contributing, tmp_path):
    flow = pf.flows.builders()[flow_of_contributing](2)
    pf.fit(flow, torch.randn(100, 2), max_epochs=1, progress=False)
    again = pf.load(pf.save(flow, tmp_path / "run"))  # no builder= for one of the library's own
    x = torch.randn(5, 2)
    assert torch.equal(again.log_prob(x), flow.eval().log_prob(x))


def test_readme_lists_every_builder():
    text = (ROOT / "README.md").read_text()
    builders = [n for n in pf.flows.__all__ if hasattr(getattr(pf.flows, n), "__wrapped__")]
    assert len(builders) >= 5
    assert [n for n in builders if f"pf.{n}" not in text] == []
