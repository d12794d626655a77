"""What keeps the library simple: one direction of imports, a light start, one shape of builders."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import house
import pytest
from house import FILES, MODULES, TREES, imports_of, module_name

import pyroflows
from pyroflows import flows

# A file imports from folders of lower numbers, or from its own.
LAYERS = {
    "_version": 0,
    "_checks": 0,
    "_distributed": 0,
    "_files": 0,
    "_pyro": 0,
    "plots": 0,
    "datasets": 1,
    "nets": 1,
    "transforms": 2,
    "distributions": 3,
    "flows": 4,
    "testing": 4,
    "data": 4,
    "discrete": 5,
    "programs": 5,
    "training": 6,
    "latents": 6,
    "structured": 6,
    "infer": 7,
    "distillation": 8,
    "saving": 8,
    "arviz_export": 8,
    "cli": 9,
    "__main__": 10,
}
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


def layer_of(name):
    """The number of the folder, or of the file at the root, that a dotted name lies in."""
    return LAYERS[name.split(".")[1]]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path):
    name = module_name(path)
    if name == "pyroflows":
        return  # the list of public names, above all folders
    for imported in imports_of(TREES[path], name):
        root = imported.split(".")[0]
        assert root not in OUTSIDE, f"{name} imports {imported}"
        if root == "pyroflows":
            assert imported != "pyroflows", f"{name} imports the package, which imports it"
            own, other = name.split(".")[1], imported.split(".")[1]
            lower = own == other or layer_of(imported) < layer_of(name)
            assert lower, f"{name} imports {imported}, which lies no lower"


def test_layers_know_an_import_that_goes_the_wrong_way():
    assert layer_of("pyroflows.transforms.base") < layer_of("pyroflows.flows.coupling")
    tree = ast.parse("from pyroflows import fit\nimport torch.nn\nfrom pyroflows.nets import MADE")
    assert set(imports_of(tree, "x")) >= {"torch.nn", "pyroflows.nets"}


def test_every_folder_has_a_layer():
    assert set(LAYERS) == {n.split(".")[1] for n in MODULES} | {"__main__"}


def test_no_files_import_each_other():
    assert house.circles() == []


def test_circles_are_seen(monkeypatch):
    graph = {"p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": {"p.a"}, "p.d": {"p.a"}}
    monkeypatch.setattr(house, "edges", lambda: graph)
    assert house.circles() == [["p.a", "p.b", "p.c"]]


def test_no_public_name_hides_a_module():
    assert house.shadowed() == []


def test_functions_and_classes_stay_readable():
    assert house.longer_than("function", 60) == []
    assert house.longer_than("class", 200) == []
    assert house.most_arguments().arguments <= 14, house.most_arguments()


def test_root_and_folders_stay_small():
    assert len(house.root_modules()) <= 14
    for folder in {path.parent for path in FILES} - {house.ROOT}:
        assert len(list(folder.glob("*.py"))) <= 16, folder


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_library_does_not_print(path):
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


@pytest.mark.integration
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


@pytest.mark.parametrize("name", sorted(builders()))
def test_builders_are_public(name):
    for module in (flows, pyroflows):
        public = getattr(module, name, None) is builders()[name] and name in module.__all__
        path = Path(module.__file__).relative_to(house.PROJECT)
        assert public, f"{path}: import {name!r} there and add it to __all__"


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
