"""The docstring law: what every public name says of itself."""

import ast
import importlib
import inspect
import re
import textwrap

import pytest

from pyroflows.flows import builders
from pyroflows.transforms import FlowTransform

MODULES = (
    "pyroflows",
    "pyroflows.transforms",
    "pyroflows.nets",
    "pyroflows.flows",
    "pyroflows.infer",
    "pyroflows.distillation",
    "pyroflows.latents",
    "pyroflows.plots",
    "pyroflows.datasets",
    "pyroflows.testing",
)


def names_of(module: object) -> list[str]:
    """``__all__``, or what a module without one defines itself."""
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
    return list(getattr(module, "__all__", [n for n in own if not n.startswith("_")]))


def public() -> dict[str, object]:
    """The public functions and classes, by the shortest name that reaches each."""
    found: dict[int, tuple[str, object]] = {}
    for path in MODULES:
        module = importlib.import_module(path)
        for name in names_of(module):
            thing = getattr(module, name)
            if inspect.isfunction(thing) or inspect.isclass(thing):
                found.setdefault(id(thing), (f"{path}.{name}", thing))
    return dict(found.values())


def methods(cls: type) -> dict[str, object]:
    """What a class itself defines for its users: public methods and properties."""
    kinds = (property, classmethod, staticmethod)
    members = {n: m for n, m in vars(cls).items() if not n.startswith("_") and n != "extra_repr"}
    return {n: m for n, m in members.items() if inspect.isfunction(m) or isinstance(m, kinds)}


PUBLIC = public()
METHODS = {
    f"{owner}.{name}": (cls, name, method)
    for owner, cls in PUBLIC.items()
    if inspect.isclass(cls)
    for name, method in methods(cls).items()
}
# test_architecture.py says what to do with a builder that is not public yet.
BUILDERS = [f"pyroflows.{name}" for name in builders() if f"pyroflows.{name}" in PUBLIC]
TRANSFORMS = [
    name
    for name, thing in PUBLIC.items()
    if inspect.isclass(thing) and issubclass(thing, FlowTransform)
]
# Ways to hold transforms together, and textbook maps: nobody's paper.
NO_SOURCE = {
    f"pyroflows.transforms.{name}"
    for name in ("Inverse", "Conditioned", "Permute", "Standardize", "Whiten")
} | {"pyroflows.FlowTransform", "pyroflows.Chain"}
# Their examples need files or an account, so they are shown but not run.
FROM_FILES = ("miniboone", "power", "bsds300", "uci", "uci_names", "mnist", "cifar10", "freyfaces")
NOT_RUN = {f"pyroflows.datasets.{name}" for name in ("data_folder", *FROM_FILES)} | {
    "pyroflows.push_to_hub",
    "pyroflows.from_hub",
}

each = pytest.mark.parametrize("name", PUBLIC)
each_method = pytest.mark.parametrize("name", METHODS)


def text_of(name: str) -> str:
    """The docstring; of a method that has none, the one it inherits."""
    if name in METHODS:
        cls, word, _ = METHODS[name]
        return inspect.getdoc(getattr(cls, word)) or ""
    return inspect.getdoc(PUBLIC[name]) or ""


CHECKS = {"check_whole", "check_positive", "check_not_negative", "check_share"}


def raises_value_error(thing: object) -> bool:
    """Whether the body, not a function within it, raises a ``ValueError`` or checks arguments."""
    thing = getattr(thing, "fget", None) or getattr(thing, "__func__", None) or thing
    thing = inspect.unwrap(thing)
    if not inspect.isfunction(thing):
        return False
    try:
        source = textwrap.dedent(inspect.getsource(thing))
    except OSError:  # a data class writes its methods itself
        return False
    todo = list(ast.parse(source).body[0].body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in CHECKS:
            return True
        raised = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(raised, ast.Call) and getattr(raised.func, "id", "") == "ValueError":
            return True
        todo += ast.iter_child_nodes(node)
    return False


def says_value_error(name: str) -> bool:
    section = re.search(r"^Raises:\n((?: .*\n?|\n)*)", text_of(name), re.MULTILINE)
    return bool(section) and "ValueError:" in section.group(1)


def speaks_of_tensors(thing: object) -> bool:
    """Whether a function takes or gives a plain tensor, by its annotations."""
    notes = getattr(inspect.unwrap(thing), "__annotations__", {}).values()
    return any(re.search(r"\bTensor\b", n if isinstance(n, str) else repr(n)) for n in notes)


@each
def test_begins_with_a_summary(name):
    first = text_of(name).split("\n\n")[0]
    assert first.endswith((".", "?", "...")), f"no sentence: {first!r}"
    assert len(first) <= 200, f"not a summary: {first!r}"


@each
def test_shows_an_example(name):
    # pytest runs those with a prompt: pyproject.toml asks for --doctest-modules.
    prompt = "Example::\n" if name in NOT_RUN else ">>> "
    assert prompt in text_of(name)


@each_method
def test_method_says_what_it_does(name):
    assert len(text_of(name).split()) >= 2


TENSOR_FUNCTIONS = [n for n, f in PUBLIC.items() if inspect.isfunction(f) and speaks_of_tensors(f)]


@pytest.mark.parametrize("name", TENSOR_FUNCTIONS)
def test_says_the_shapes(name):
    # ``(*batch, features)``, or shapes in words, or printed by the example.
    assert re.search(r"\bshape|``\([^()]*\)``|event_shape|scalar", text_of(name))


@each
def test_says_what_it_raises(name):
    thing = PUBLIC[name]
    body = vars(thing).get("__init__") if inspect.isclass(thing) else thing
    assert says_value_error(name) or not raises_value_error(body)


@each_method
def test_method_says_what_it_raises(name):
    assert says_value_error(name) or not raises_value_error(METHODS[name][2])


@pytest.mark.parametrize("name", [*BUILDERS, *TRANSFORMS])
def test_says_the_cost_by_direction(name):
    assert re.search(r"\b(costs?|pass|passes|free)\b", text_of(name))


@pytest.mark.parametrize("name", [n for n in [*BUILDERS, *TRANSFORMS] if n not in NO_SOURCE])
def test_names_its_source(name):
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|\b(19|20)\d\d\b", text_of(name))


# Where numbers come back, in what unit: the name, and the words of which one must be there.
UNITS = {
    **{n: ("nats",) for n in METHODS if n.endswith("log_prob")},
    "pyroflows.FlowDistribution": ("nats",),
    "pyroflows.History": ("nats", "bits/dim"),
    "pyroflows.History.record": ("nats",),
    "pyroflows.Report": ("nats",),
    "pyroflows.Distillation": ("nats", "a second"),
    "pyroflows.bits_per_dim": ("bits", "nats"),
    "pyroflows.importance_weights": ("nats",),
    "pyroflows.infer.WeightedDraws": ("nats",),
    "pyroflows.fit_guide": ("nats",),
    "pyroflows.fit": ("nats", "bits"),
}


@pytest.mark.parametrize("name", UNITS)
def test_says_the_unit(name):
    assert [unit for unit in UNITS[name] if unit not in text_of(name)] == []


def test_the_law_sees_what_is_there():
    assert len(PUBLIC) > 100
    assert len(METHODS) > 100
    assert len(TENSOR_FUNCTIONS) > 15
    assert {"pyroflows.maf", "pyroflows.glow"} <= set(BUILDERS) <= set(PUBLIC)
    assert set(TRANSFORMS) >= NO_SOURCE
    assert set(PUBLIC) >= NOT_RUN
    assert sum(raises_value_error(thing) for thing in PUBLIC.values()) > 20
