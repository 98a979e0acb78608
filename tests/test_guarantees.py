"""
Each promise of the documentation is held by tests that there are.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from support.guarantees import ROOT, place, places, promises
from support.patience import PATIENCE

PROMISES = promises()


def test_every_promise_is_there_and_in_order() -> None:
    assert [name for name in PROMISES if name != "R10a"] == [f"R{number}" for number in range(1, 29)]
    assert "R10a" in PROMISES


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_is_held_by_tests_that_exist(promise: str) -> None:
    names = PROMISES[promise]
    assert names, f"no test holds {promise}"
    assert len(names) == len(set(names)), f"{promise} names a test twice"
    for name in names:
        assert place(name)


def test_a_name_that_no_test_has_or_two_have_is_told() -> None:
    with pytest.raises(LookupError, match="test_of_nothing, and there is no such test"):
        place("test_of_nothing")
    twice = next(name for name, found in places().items() if len(found) > 1)
    with pytest.raises(LookupError, match=f"{twice}, and there are several: tests/"):
        place(twice)


def collected(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE)


def test_the_tests_of_a_promise_can_be_run_by_its_number() -> None:
    expected = {place(name) for promise in ("R6", "R15") for name in PROMISES[promise]}
    files = {each.partition("::")[0] for each in expected} | {"tests/test_limits.py"}
    done = collected("--guarantee", "R6", "--guarantee", "R15", *sorted(files))
    assert done.returncode == 0, done.stdout
    found = {re.sub(r"\[.*", "", line) for line in done.stdout.splitlines() if "::" in line}
    assert {each.replace("TestEveryOrder::runTest", "TestEveryOrder") for each in found} == expected


def test_a_number_that_is_none_gets_one_sentence() -> None:
    done = collected("--guarantee", "R99", "tests/test_limits.py")
    assert done.returncode != 0
    assert "--guarantee must be one of R1, R2, " in done.stderr
    assert "not R99" in done.stderr
