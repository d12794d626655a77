"""What the package is made of, counted: modules, arguments, lengths, circles, shadowed names.

``python tests/house.py`` prints the table; tests/test_architecture.py holds its limits.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyroflows

ROOT = Path(pyroflows.__file__).parent
PROJECT = ROOT.parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
MODULES = sorted(
    name
    for _, name, _ in pkgutil.walk_packages(pyroflows.__path__, "pyroflows.")
    if not name.endswith("__main__")
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def module_name(path: Path) -> str:
    """The dotted name of a file; a folder's for its ``__init__``."""
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, importer: str) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{importer}: relative import in line {node.lineno}")
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = full in MODULES or full == "pyroflows"
                yield full if is_module else str(node.module)


def edges() -> dict[str, set[str]]:
    """For each module those of the package that it imports, ``TYPE_CHECKING`` counted."""
    found = {}
    for path, tree in TREES.items():
        name = module_name(path)
        found[name] = {m for m in imports_of(tree, name) if m in MODULES} - {name}
    return found


def circles() -> list[list[str]]:
    """Groups of modules that import each other (Tarjan 1972): none where imports go one way.

    The package's own ``__init__``, which nothing may import, is left out.
    """
    graph = {name: to for name, to in edges().items() if name != "pyroflows"}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return found


@dataclass(frozen=True)
class Definition:
    """A function or a class, by where it stands, and how long it is without its docstrings."""

    where: str
    kind: str
    lines: int
    arguments: int


def docstring_lines(node: ast.AST) -> int:
    """Lines of the docstrings in a function, a class or a module, those inside it counted."""
    total = 0
    for inner in ast.walk(node):
        if isinstance(inner, (*FUNCTIONS, ast.ClassDef, ast.Module)) and ast.get_docstring(inner):
            first = inner.body[0]
            total += first.end_lineno - first.lineno + 1
    return total


def definitions() -> list[Definition]:
    """All functions and classes of the package."""
    found = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                continue
            arguments = 0
            if isinstance(node, FUNCTIONS):
                a = node.args
                arguments = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            lines = node.end_lineno - node.lineno + 1 - docstring_lines(node)
            where = f"{module_name(path)}.{node.name}"
            found.append(Definition(where, kind, lines, arguments))
    return found


def longer_than(kind: str, limit: int) -> list[Definition]:
    """The functions or classes over so many lines, the longest first."""
    over = [d for d in definitions() if d.kind == kind and d.lines > limit]
    return sorted(over, key=lambda d: -d.lines)


def most_arguments() -> Definition:
    """The function with the most arguments, ``*args`` and ``**kwargs`` not counted."""
    return max(definitions(), key=lambda d: d.arguments)


def shadowed() -> list[str]:
    """Modules that ``import a.b as m`` does not give, since a name of ``a`` hides them."""
    found = []
    for name in MODULES:
        module = importlib.import_module(name)
        parent, _, last = name.rpartition(".")
        seen = getattr(sys.modules[parent], last)
        if seen is not module and not inspect.ismodule(seen):
            found.append(name)
    return found


def flow_classes() -> set[str]:
    """Names of the classes of flows: flows, what they return, their transforms and families."""
    import pyroflows.discrete.pixel_model
    import pyroflows.discrete.quantization
    import pyroflows.distributions.flow
    from pyroflows.distributions.flow_distribution import FlowDistribution
    from pyroflows.transforms import Family, FlowTransform

    kinds = (pyroflows.Flow, FlowDistribution, FlowTransform, Family)
    names = {"Quantized", "PixelCNN"}
    for module in map(importlib.import_module, MODULES):
        for name, value in vars(module).items():
            if inspect.isclass(value) and issubclass(value, kinds):
                names.add(name)
    return names


def asked_for() -> list[str]:
    """Where a layer outside of flows and distributions asks what kind of flow it was given."""
    classes, found = flow_classes(), []
    for path, tree in TREES.items():
        folder = path.relative_to(ROOT).parts[0]
        if folder in ("distributions", "flows", "transforms"):
            continue
        for node in ast.walk(tree):
            called = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"
            if called and classes & {
                getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node.args[1])
            }:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    return found


def root_modules() -> list[str]:
    """The files beside the folders."""
    return sorted(path.stem for path in ROOT.glob("*.py"))


def code_lines() -> int:
    """Lines that are no docstring, no comment and not blank."""
    total = 0
    for path, tree in TREES.items():
        lines = path.read_text().splitlines()
        code = sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)
        blank = 0
        for inner in ast.walk(tree):
            if isinstance(inner, (*FUNCTIONS, ast.ClassDef, ast.Module)) and ast.get_docstring(
                inner
            ):
                first = inner.body[0]
                text = lines[first.lineno - 1 : first.end_lineno]
                blank += sum(bool(t.strip()) and not t.strip().startswith("#") for t in text)
        total += code - blank
    return total


def type_errors() -> str:
    """What mypy says at its end."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary"]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    return str(sum(": error:" in line for line in result.stdout.splitlines()))


def main() -> None:
    """Print the table."""
    most = most_arguments()
    rows = [
        ("modules at the root", str(len(root_modules())), "14"),
        ("most arguments", f"{most.arguments} ({most.where})", "14"),
        ("functions over 60 lines", _named(longer_than("function", 60)), "0"),
        ("classes over 200 lines", _named(longer_than("class", 200)), "0"),
        ("import circles", str(len(circles())), "0"),
        ("shadowed modules", str(len(shadowed())), "0"),
        ("isinstance on flows elsewhere", str(len(asked_for())), "5"),
        ("mypy errors", type_errors(), "0"),
        ("modules", str(len(FILES)), ""),
        ("lines of code proper", f"{code_lines():,}", ""),
    ]
    for name, value, limit in rows:
        print(f"{name:32}{value}" + (f"   (at most {limit})" if limit else ""))
    for group in circles():
        print("circle:", ", ".join(group))
    for place in asked_for():
        print("asks:", place)


def _named(over: list[Definition]) -> str:
    return f"{len(over)} " + ", ".join(f"{d.where} {d.lines}" for d in over)


if __name__ == "__main__":
    main()
