"""What README and CONTRIBUTING show is so."""

import doctest
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from test_docstrings import MODULES, names_of

import pyroflows as pf
from pyroflows.testing import check_flow

ROOT = Path(__file__).parent.parent


def test_readme_examples_run():
    failed, tried = doctest.testfile(
        str(ROOT / "README.md"), module_relative=False, optionflags=doctest.ELLIPSIS
    )
    assert tried > 10
    assert failed == 0


def test_what_can_go_wrong_runs():
    page = ROOT / "docs" / "what_can_go_wrong.md"
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert tried > 5
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


PAGES = sorted((ROOT / "docs").glob("*.md"))
MARKDOWN = [
    path
    for folder in ("", "docs", "models", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.md") if folder else ROOT.glob("*.md"))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_of_the_site_run(page):
    failed, _ = doctest.testfile(
        str(page),
        module_relative=False,
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert failed == 0


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^()\s]+)\)", text)
    local = [target.split("#")[0] for target in targets if "://" not in target]
    assert [target for target in local if not _leads_somewhere(page, target)] == []


def _leads_somewhere(page: Path, target: str) -> bool:
    """Whether a link finds its file; the site has a copy of each notebook of the tutorials."""
    copied = page.parent == ROOT / "docs" and target.endswith(".ipynb")
    return (page.parent / target).exists() or (copied and (ROOT / target).exists())


def referenced() -> list[str]:
    """What the sources of the API reference name."""
    text = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.rst"))
    named = re.findall(
        r"^\.\. (?:auto\w+|py:data|py:module):: (\S+)$(?:\n +:members: (.+))?", text, re.MULTILINE
    )
    members = [f"{name}.{m}" for name, more in named for m in more.split(", ") if m]
    return [name for name, _ in named] + members


def public_names() -> set[str]:
    """Every public name, by the shortest path that reaches it; constants too."""
    found: dict[int, str] = {}
    for path in MODULES:
        module = importlib.import_module(path)
        for name in names_of(module):
            found.setdefault(id(getattr(module, name)), f"{path}.{name}")
    return set(found.values())


def test_the_reference_has_every_public_name_once():
    named = referenced()
    assert sorted(public_names() - set(named)) == []
    assert sorted({name for name in named if named.count(name) > 1}) == []


def test_the_table_of_models_has_every_script():
    text = (ROOT / "models" / "README.md").read_text()
    scripts = [p for p in (ROOT / "models").rglob("*.py") if "__main__" in p.read_text()]
    assert len(scripts) >= 14
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    linked = [re.search(r"\]\(\./(.+?)\)", row).group(1) for row in rows]
    assert sorted(linked) == sorted(str(p.relative_to(ROOT / "models")) for p in scripts)
    for path, row in zip(linked, rows, strict=True):
        assert f"`python models/{path}" in row
        assert row.count(" | ") == 4
        assert not re.search(r"\|\s*\|", row), f"an empty cell: {row}"
