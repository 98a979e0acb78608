"""
The house is as its picture shows it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from connlimit._twistd.toml import document

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "connlimit"

LAYERS = document(ROOT / "docs" / "architecture.toml")["layer"]

#: What can be imported without an extra.
CORE = {"twisted", "zope", "attrs", "attr", "constantly", "incremental", "OpenSSL"}

#: What the modules of an extra import besides.
EXTRAS = {
    "metrics": {"prometheus_client"},
    "_redis": {"txredisapi"},
    "_redis_link": {"txredisapi"},
    "_sentinel": {"txredisapi"},
    "_toml": {"tomli", "tomllib"},
    "semaphores._tap": {"httptools"},
    "semaphores.server.http": {"httptools"},
}


def name_of(file: Path) -> str:
    """
    The name of a module within the package; that of the package itself is its own.
    """
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "connlimit"


MODULES = {name_of(file): ast.parse(file.read_text()) for file in SOURCE.rglob("*.py")}


def imports(node: ast.AST) -> Iterator[str]:
    """
    The modules and names that are imported, also within functions, but not for type checkers alone.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (each.name for each in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0
            yield from (f"{child.module}.{each.name}" for each in child.names)
        yield from imports(child)


def of_the_house(name: str) -> str | None:
    """
    The module of ours in which something is that is imported.
    """
    if name.split(".")[0] != "connlimit":
        return None
    name = name.removeprefix("connlimit").removeprefix(".") or "connlimit"
    while name not in MODULES:
        name = name.rpartition(".")[0] or "connlimit"
    return name


def test_every_module_has_its_place() -> None:
    placed = [module for layer in LAYERS for module in layer["modules"]]
    assert sorted(placed) == sorted(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_upwards(module: str) -> None:
    height = {name: -index for index, layer in enumerate(LAYERS) for name in layer["modules"]}
    for name in imports(MODULES[module]):
        imported = of_the_house(name)
        assert imported is None or height[imported] <= height[module], f"{module} imports {imported}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {
        module: {each for name in imports(tree) if (each := of_the_house(name)) and each != module}
        for module, tree in MODULES.items()
    }
    while graph:
        leaves = {module for module, imported in graph.items() if not imported & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {module: imported for module, imported in graph.items() if module not in leaves}


@pytest.mark.parametrize("module", MODULES)
def test_the_core_needs_twisted_zope_interface_and_attrs_alone(module: str) -> None:
    for name in imports(MODULES[module]):
        top = name.split(".")[0]
        allowed = {"connlimit"} | set(sys.stdlib_module_names) | CORE | EXTRAS.get(module, set())
        assert top in allowed, f"{module} imports {top}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_in_one_sentence_what_it_does(module: str) -> None:
    text = ast.get_docstring(MODULES[module])
    assert text is not None
    first = text.split("\n\n")[0]
    assert first.endswith((".", ":"))
    assert ". " not in first.replace("``", "")


def test_the_package_itself_has_no_code() -> None:
    for statement in MODULES["connlimit"].body:
        assert isinstance(statement, (ast.Expr, ast.ImportFrom, ast.Assign)), ast.unparse(statement)


def test_nobody_outside_imports_what_begins_with_an_underscore() -> None:
    files = [*ROOT.glob("docs/examples/*"), *ROOT.glob("docs/*.rst"), ROOT / "README.rst"]
    for file in files:
        text = file.read_text() if file.suffix in (".py", ".tac", ".rst") else ""
        for line in text.splitlines():
            words = line.split()
            if words[:1] in (["from"], ["import"]) and words[1:2] and words[1].startswith("connlimit"):
                assert "._" not in words[1], f"{file.name}: {line}"
