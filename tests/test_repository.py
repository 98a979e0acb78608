"""
What is told to tools in more than one place is told the same.
"""

from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest

from connlimit._twistd.toml import document

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
GROUPS: dict[str, Any] = document(ROOT / "pyproject.toml")["dependency-groups"]


def group(name: str) -> set[str]:
    """
    What a dependency group consists of, in the spelling of setup.cfg, with the groups that it includes.
    """
    found: set[str] = set()
    for each in GROUPS[name]:
        found |= group(each["include-group"]) if isinstance(each, dict) else {each}
    return found


def extra(name: str) -> set[str]:
    """
    What an extra consists of.
    """
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return {line for line in parser["options.extras_require"][name].splitlines() if line}


@pytest.mark.parametrize("name", ["test", "bench", "dev"])
def test_a_dependency_group_is_the_extra_of_its_name(name: str) -> None:
    assert group(name) == extra(name)


def test_the_workflow_tests_the_pythons_that_the_sessions_are_for() -> None:
    pattern = re.compile(r"^ *(?:PYTHONS =|python:) (\[.*\])$", re.MULTILINE)
    sessions, workflow = (
        pattern.findall((ROOT / file).read_text()) for file in ("noxfile.py", ".github/workflows/ci.yml")
    )
    assert len(sessions) == 1
    assert sessions == workflow


def test_workflows_run_actions_by_commit_and_not_by_a_name_that_can_be_moved() -> None:
    used = [line for file in WORKFLOWS for line in file.read_text().splitlines() if "uses:" in line]
    assert used
    for line in used:
        assert re.search(r"uses: [\w./-]+@[0-9a-f]{40} # v\d", line)
