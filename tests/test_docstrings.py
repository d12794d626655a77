"""The docstring law: what every public name says of itself."""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import pyroflows as pf
from pyroflows.transforms import FlowTransform

MODULES = (
    "pyroflows",
    "pyroflows.transforms",
    "pyroflows.nets",
    "pyroflows.flows",
    "pyroflows.infer",
    "pyroflows.distill",
    "pyroflows.latents",
    "pyroflows.plots",
    "pyroflows.datasets",
    "pyroflows.testing",
)


def public() -> dict[str, object]:
    """The public functions and classes, by the shortest name that reaches each."""
    found: dict[int, tuple[str, object]] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for word in getattr(module, "__all__", ()):
            thing = getattr(module, word)
            if inspect.isfunction(thing) or inspect.isclass(thing):
                found.setdefault(id(thing), (f"{name}.{word}", thing))
    return dict(found.values())


def methods(cls: type) -> dict[str, object]:
    """What a class itself defines for its users: its public methods, class methods, properties."""
    return {
        name: inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))
        for name, member in vars(cls).items()
        if not name.startswith("_")
        and (
            inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod)
        )
    }


PUBLIC = public()
METHODS = {
    f"{owner}.{name}": (cls, name, method)
    for owner, cls in PUBLIC.items()
    if inspect.isclass(cls)
    for name, method in methods(cls).items()
}
BUILDERS = {name: thing for name, thing in PUBLIC.items() if hasattr(thing, "__wrapped__")}
TRANSFORMS = {
    name: thing
    for name, thing in PUBLIC.items()
    if inspect.isclass(thing) and issubclass(thing, FlowTransform)
}
# Ways to hold transforms together, and textbook maps: nobody's paper.
NO_SOURCE = {
    f"pyroflows.transforms.{name}"
    for name in ("Inverse", "Conditioned", "Permute", "Standardize", "DiagonalScale", "Whiten")
} | {"pyroflows.FlowTransform", "pyroflows.Chain"}

each = pytest.mark.parametrize("name", PUBLIC)
each_method = pytest.mark.parametrize("name", METHODS)


def text_of(name: str) -> str:
    """The docstring; of a method that has none, the one it inherits."""
    if name in METHODS:
        cls, word, _ = METHODS[name]
        return inspect.getdoc(getattr(cls, word)) or ""
    return inspect.getdoc(PUBLIC[name]) or ""


def tree_of(thing: object) -> ast.AST | None:
    """The definition's syntax tree; of a data class's generated methods there is none."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))).body[0]
    except (OSError, TypeError):
        return None


def raises_value_error(tree: ast.AST | None) -> bool:
    """Whether the body itself, not a function within it, raises a ``ValueError``."""
    todo = list(getattr(tree, "body", ()))
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if getattr(node.exc.func, "id", "") == "ValueError":
                return True
        todo += ast.iter_child_nodes(node)
    return False


def speaks_of_tensors(thing: object) -> bool:
    """Whether a function takes or gives a plain tensor, by its annotations."""
    notes = getattr(inspect.unwrap(thing), "__annotations__", {}).values()
    return any(re.search(r"\bTensor\b", note if isinstance(note, str) else repr(note)) for note in notes)


@each
def test_begins_with_a_summary(name):
    first = text_of(name).split("\n\n")[0]
    assert first.rstrip().endswith((".", "?", ":", "::")), f"no summary: {first!r}"
    assert len(first) <= 200


@each
def test_shows_an_example(name):
    # doctest itself runs it: pyproject.toml asks pytest for --doctest-modules.
    assert ">>> " in text_of(name)


@each_method
def test_method_says_what_it_does(name):
    assert len(text_of(name).split()) >= 3


@pytest.mark.parametrize(
    "name",
    [n for n, thing in PUBLIC.items() if inspect.isfunction(thing) and speaks_of_tensors(thing)],
)
def test_says_the_shapes(name):
    assert re.search(r"shape|\(\*|\(\w+, [^()]*\)|scalar|tensor\(", text_of(name).lower())


@each
def test_says_what_it_raises(name):
    thing = PUBLIC[name]
    body = vars(thing).get("__init__") if inspect.isclass(thing) else thing
    told = re.search(r"Raises:\n(.*\n)*? +ValueError:", text_of(name))
    assert told or body is None or not raises_value_error(tree_of(body))


@each_method
def test_method_says_what_it_raises(name):
    _, _, method = METHODS[name]
    told = re.search(r"Raises:\n(.*\n)*? +ValueError:", text_of(name))
    assert told or not raises_value_error(tree_of(method))


@pytest.mark.parametrize("name", [*BUILDERS, *TRANSFORMS])
def test_says_the_cost_by_direction(name):
    assert re.search(r"\b(cost|costs|pass|passes)\b", text_of(name))


@pytest.mark.parametrize("name", [n for n in [*BUILDERS, *TRANSFORMS] if n not in NO_SOURCE])
def test_names_its_source(name):
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|\b(19|20)\d\d\b", text_of(name))


@pytest.mark.parametrize("name", [n for n in [*PUBLIC, *METHODS] if "log_prob" in n.rsplit(".")[-1]])
def test_says_the_unit_of_a_log_density(name):
    assert "nats" in text_of(name)


def test_the_law_sees_what_is_there():
    assert len(PUBLIC) > 100
    assert {"pyroflows.maf", "pyroflows.glow"} <= set(BUILDERS)
    assert NO_SOURCE <= set(TRANSFORMS)
