"""
The process's file descriptors, in a process of their own with few of them.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from connlimit import _descriptors

resource = pytest.importorskip("resource")


def run(code: str) -> str:
    """
    What the code prints in another Python.
    """
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def test_the_limit_is_the_soft_one() -> None:
    assert _descriptors.limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_there_is_no_telling_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_descriptors, "resource", None)
    _descriptors.raise_limit()
    assert _descriptors.limit() is None
    assert _descriptors.left_for_waiting()


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    printed = run("""
import resource
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
from connlimit import _descriptors
_descriptors.raise_limit()
print(_descriptors.limit() == hard)
""")
    assert printed == "True"


def test_a_hard_limit_that_is_not_accepted_is_approached(monkeypatch: pytest.MonkeyPatch) -> None:
    accepted = []

    def setrlimit(which: int, limits: tuple[int, int]) -> None:
        if limits[0] != 10240:
            raise ValueError
        accepted.append(limits)

    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    _descriptors.raise_limit()
    assert accepted == [(10240, resource.RLIM_INFINITY)]


def test_those_who_wait_leave_the_reserve_free() -> None:
    printed = run("""
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from connlimit import _descriptors
held = []
while _descriptors.left_for_waiting():
    held.append(os.dup(0))
left = 0
try:
    while True:
        os.dup(0)
        left += 1
except OSError:
    pass
print(left == _descriptors.reserve(256), _descriptors.left_for_waiting())
""")
    assert printed == "True False"


@pytest.mark.parametrize(("limit", "reserve"), [(256, 32), (1024, 128), (1_000_000, 1024)])
def test_the_reserve_is_an_eighth_within_bounds(limit: int, reserve: int) -> None:
    assert _descriptors.reserve(limit) == reserve
