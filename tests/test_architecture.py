"""What keeps the library simple: one direction of imports, a light start, one shape of builders."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyroflows
from pyroflows import flows

ROOT = Path(pyroflows.__file__).parent
PROJECT = ROOT.parent
# A file imports from its own row and from rows above. Names are paths below the package.
ROWS = [
    [
        "version",
        "arguments",
        "memo",
        "nets",
        "datasets",
        "base_distribution",
        "pixel_laws",
        "pixel_distribution",
        "whole_files",
        "text_tables",
    ],
    ["transforms"],
    ["store"],
    ["distribution"],
    ["registry"],
    ["flows"],
    ["plots", "rows", "dequantize", "quantized_distribution", "quantize", "pixelcnn", "latents"],
    [
        "compiling",
        "processes",
        "progress",
        "weights",
        "checkpoint",
        "passes",
        "regularisation",
        "training",
        "history",
        "tables",
        "sources",
    ],
    ["fit", "infer", "initialize"],
    ["distill", "persist", "described", "rebuilt", "stored", "hub"],
    ["export", "testing", "laws"],
    ["cli", "__main__"],
]
OUTSIDE = ["models", "tutorials", "benchmarks"]  # these may import the library, never the reverse
HEAVY = [
    "lightning_fabric",
    "lightning",
    "arviz",
    "matplotlib",
    "sklearn",
    "tqdm",
    "pandas",
    "pooch",
    "typer",
    "safetensors",
    "huggingface_hub",
    "pyarrow",
]
FILES = sorted(ROOT.rglob("*.py"))
MODULES = sorted(
    name
    for _, name, _ in pkgutil.walk_packages(pyroflows.__path__, "pyroflows.")
    if not name.endswith("__main__")
)


def module_name(path):
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def row_of(name):
    """The row of a dotted name below the package: that of its longest listed prefix."""
    best = max(
        (
            (len(entry), index)
            for index, row in enumerate(ROWS)
            for entry in row
            if name == entry or name.startswith(f"{entry}.")
        ),
        default=None,
    )
    return None if best is None else best[1]


def imports_of(tree, importer):
    """Dotted names that a file imports, wherever in it the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}: relative import in line {node.lineno}"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = full in MODULES or full == "pyroflows"
                yield full if is_module else node.module


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path):
    name = module_name(path)
    if name == "pyroflows":
        return  # the list of public names, above all rows
    own = row_of(name.removeprefix("pyroflows."))
    assert own is not None, f"{name} has no row: give it one in ROWS"
    tree = ast.parse(path.read_text())
    for imported in imports_of(tree, name):
        root = imported.split(".")[0]
        assert root not in OUTSIDE, f"{name} imports {imported}"
        if root == "pyroflows":
            assert imported != "pyroflows", f"{name} imports the package, which imports it"
            row = row_of(imported.removeprefix("pyroflows."))
            assert row is not None, f"{imported} has no row: give it one in ROWS"
            assert row <= own, f"{name} imports {imported}, which stands in a later row"


def test_rows_know_an_import_that_goes_the_wrong_way():
    assert row_of("transforms.base") < row_of("distribution") < row_of("flows.coupling")
    assert row_of("flows") < row_of("plots") < row_of("fit") < row_of("testing")
    tree = ast.parse("from pyroflows import fit\nimport torch.nn\nfrom pyroflows.nets import MADE")
    assert set(imports_of(tree, "x")) >= {"torch.nn", "pyroflows.nets"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_library_does_not_print(path):
    if path.name in ("cli.py", "__main__.py"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        is_print = isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print"
        assert not is_print, f"{path.name}:{node.lineno} prints"


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )


def test_import_is_light():
    code = (
        "import sys, torch, pyro\n"
        "before = set(sys.modules)\n"  # Pyro itself loads tqdm
        "import pyroflows\n"
        f"print([m for m in {HEAVY} if m in sys.modules and m not in before])\n"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_import_has_no_side_effect():
    code = (
        "import torch, pyro\n"
        "state = lambda: (torch.get_default_dtype(), torch.distributions.Distribution"
        "._validate_args, pyro.settings.get(), torch.get_num_threads(),"
        " torch.get_rng_state().sum().item(), sorted(pyro.get_param_store().keys()))\n"
        "before = state()\n"
        "import pyroflows\n"
        "assert state() == before, (before, state())\n"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_every_module_imports_alone():
    """In one process, each time after the whole package was forgotten, in both orders."""
    code = (
        "import importlib, sys\n"
        f"for name in {MODULES}:\n"
        "    for loaded in [m for m in sys.modules if m.split('.')[0] == 'pyroflows']:\n"
        "        del sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["pyroflows", *MODULES])
def test_names_in_all_exist(name):
    module = importlib.import_module(name)
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names), "a name is listed twice"
    for public in names:
        assert hasattr(module, public), f"{name}.__all__ lists {public!r}, which is not there"


def builders():
    found = {}
    for module in pkgutil.iter_modules(flows.__path__):
        members = vars(importlib.import_module(f"pyroflows.flows.{module.name}"))
        for name, value in members.items():
            # What ``builder`` marks keeps the function it wraps, defined in a file of flows.
            wrapped = getattr(value, "__wrapped__", None)
            if inspect.isfunction(value) and inspect.isfunction(wrapped):
                found[name] = value
    return found


@pytest.mark.parametrize("name", sorted(builders()))
def test_builders_share_their_first_arguments(name):
    build = builders()[name]
    first, second, *others = inspect.signature(build).parameters.values()
    assert first.name in ("features", "shape")
    assert first.default is inspect.Parameter.empty
    assert second.name in ("context", "classes")
    assert second.default == 0
    for parameter in others:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, parameter
        assert parameter.default is not inspect.Parameter.empty, parameter
    assert getattr(flows, name) is build
    assert getattr(pyroflows, name) is build


def test_builders_were_found():
    assert {"nice", "realnvp", "maf", "iaf", "nsf"} <= set(builders())


@pytest.mark.parametrize("name", sorted(builders()))
def test_builders_remember_their_arguments(name):
    flow = builders()[name](2) if name in ("nice", "realnvp", "maf", "iaf", "nsf") else None
    if flow is not None:
        assert flow.config["builder"] == name
        assert flow.config["arguments"]["features"] == 2


def test_every_builder_has_an_example():
    names = set(flows.examples())
    for name in builders():
        assert any(example == name or example.startswith(f"{name}_") for example in names), name
