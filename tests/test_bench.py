"""
The command that runs the benchmarks; that they run is shown by running them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.patience import PATIENCE

ROOT = Path(__file__).parent.parent

#: Looks for a program that nobody has.
LOOK = """
from bench.harness.processes import Missing, program
try:
    program("nonsense")
except Missing as missing:
    print(missing)
"""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """
    Run Python where it finds the benchmarks.
    """
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        timeout=PATIENCE,
    )


def test_each_benchmark_has_a_name() -> None:
    modules = (
        "overhead",
        "interfaces",
        "proxies",
        "relay",
        "line",
        "memory",
        "overload",
        "burst",
        "start",
        "life",
        "jobs",
    )
    assert ", ".join(modules) in " ".join(python("-m", "bench", "--help").stdout.split())


def test_an_unknown_name_is_one_sentence() -> None:
    done = python("-m", "bench", "line", "nonsense")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "NAME must be one of overhead, " in done.stderr
    assert "not 'nonsense'" in done.stderr


def test_what_is_compared_with_a_program_that_is_missing_is_left_out() -> None:
    done = python("-c", LOOK)
    assert done.stdout == "nonsense is not installed, so what is compared with it is left out.\n"


def test_a_program_that_must_be_there_is_not_left_out() -> None:
    done = python("-c", LOOK, CONNLIMIT_REQUIRE_PROGRAMS="1")
    assert done.returncode == 1
    assert done.stderr == "bench: nonsense is not installed, and CONNLIMIT_REQUIRE_PROGRAMS is set\n"
