#!/usr/bin/env -S uv run --script
# /// script
# dependencies = ["nox >= 2025.2.9"]
# ///
"""
What can be run in an environment of its own: ``nox -l`` lists it, ``nox`` runs lint, types and tests.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
GROUPS = nox.project.load_toml("pyproject.toml")


def install(session: nox.Session, *groups: str, project: bool = True) -> None:
    """
    Install dependency groups and, unless told otherwise, connlimit itself.
    """
    needed = nox.project.dependency_groups(GROUPS, *groups)
    session.install(*([".", *needed] if project else needed))


@nox.session(default=True)
def lint(session: nox.Session) -> None:
    """
    Check style and layout.
    """
    install(session, "lint", project=False)
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session(default=True)
def types(session: nox.Session) -> None:
    """
    Check the types, with all the packages at hand that these come from.
    """
    install(session, "lint", "test")
    session.run("mypy", *session.posargs)
    session.run("lint-imports")


@nox.session(python=PYTHONS, default=True)
def tests(session: nox.Session) -> None:
    """
    Run the tests; those of a program that is not installed are skipped.
    """
    install(session, "test")
    session.run("python", "-m", "pytest", *(session.posargs or ["-n", "2"]))


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """
    Build the documentation, where a warning is an error.
    """
    install(session, "docs")
    session.run("sphinx-build", "-q", "-W", "--keep-going", "-b", "html", "docs", "docs/_build")


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """
    Build what a release consists of, in dist/.
    """
    install(session, "release", project=False)
    shutil.rmtree(Path("dist"), ignore_errors=True)
    session.run("python", "-m", "build")
    session.run("twine", "check", "--strict", *map(str, Path("dist").iterdir()))


if __name__ == "__main__":
    nox.main()
