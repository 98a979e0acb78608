"""
The house is as its picture shows it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "connlimit"
TESTS = ROOT / "tests"

#: What can be imported without an extra.
CORE = {"twisted", "zope", "attrs", "attr", "constantly", "incremental", "OpenSSL"}

#: What the modules of an extra import besides.
EXTRAS = {
    "status.metrics": {"prometheus_client"},
    "_redis.client": {"txredisapi"},
    "_redis.connections": {"txredisapi"},
    "_redis.link": {"txredisapi"},
    "_redis.sentinel": {"txredisapi"},
    "_twistd.toml": {"tomli", "tomllib"},
    "_twistd.semaphores.command_line": {"httptools"},
    "semaphores.server.http.reading": {"httptools"},
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


def test_every_logger_has_a_public_name() -> None:
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Logger":
                given = [each.value.value for each in node.keywords if each.arg == "namespace"]
                assert given, f"{name} logs by the name of a module"
                assert re.fullmatch(r"connlimit(\.[a-z]+)+", given[0]), given[0]


def test_every_import_goes_down() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout


def test_no_room_has_more_than_twelve_entries() -> None:
    for room in {file.parent for file in SOURCE.rglob("*.py")}:
        entries = [each.name for each in room.iterdir() if not each.name.startswith("__")]
        assert len(entries) <= 12 or room == SOURCE, f"{room}: {sorted(entries)}"


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


def test_no_test_imports_another() -> None:
    for file in TESTS.rglob("*.py"):
        for name in imports(ast.parse(file.read_text())):
            assert not any(part.startswith("test_") for part in name.split(".")), (
                f"{file.relative_to(ROOT)} imports {name}: what tests share is in tests/support"
            )


def test_tests_stand_in_the_room_of_what_they_are_about() -> None:
    for file in TESTS.rglob("test_*.py"):
        room = SOURCE
        for part in file.relative_to(TESTS).parts[:-1]:
            found = [each for each in (room / part, room / f"_{part}") if each.is_dir()]
            assert found, f"{file.relative_to(ROOT)} is about no room of the source"
            room = found[0]
        mirrored = room / f"{file.stem.removeprefix('test_')}.py"
        assert mirrored.exists() or ast.get_docstring(ast.parse(file.read_text())), (
            f"{file.relative_to(ROOT)} is about no module of its room, and does not say what it is about"
        )
