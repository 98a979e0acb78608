"""
The promises of the documentation, and where the tests are that hold them.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


def promises() -> dict[str, list[str]]:
    """
    By the number of each promise, in the order of the page: the names of the tests that hold it.
    """
    held: dict[str, list[str]] = {}
    names: list[str] | None = None
    for line in (ROOT / "docs" / "guarantees.rst").read_text().splitlines():
        heading = re.match(r"(R\d+a?): ", line)
        if heading:
            assert heading[1] not in held, f"{heading[1]} is promised twice"
            names = held[heading[1]] = []
            listed = False
        elif names is not None and line == ".. held-by::":
            listed = True
        elif names is not None and listed and line.startswith("   "):
            names.append(line.strip())
    return held


@cache
def places() -> dict[str, list[str]]:
    """
    By the name of each test, or class of tests: what pytest calls it, wherever there is one of that name.
    """
    found: dict[str, list[str]] = {}

    def visit(body: list[ast.stmt], path: str) -> None:
        for node in body:
            if isinstance(node, ast.Assign):  # a class of tests that another class has
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names = [node.name]
            else:
                continue
            for name in names:
                if name.startswith(("test_", "Test")):
                    found.setdefault(name, []).append(f"{path}::{name}")
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{path}::{node.name}")

    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        visit(ast.parse(file.read_text()).body, file.relative_to(ROOT).as_posix())
    return found


def place(name: str) -> str:
    """
    What pytest calls the one test of this name.
    """
    found = places().get(name, [])
    if not found:
        raise LookupError(f"docs/guarantees.rst names {name}, and there is no such test: was it renamed?")
    if len(found) > 1:
        raise LookupError(f"docs/guarantees.rst names {name}, and there are several: {', '.join(found)}")
    return found[0]
