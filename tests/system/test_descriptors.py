"""
The process's file descriptors, in a process of their own with few of them.
"""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from twisted.internet import reactor
from twisted.internet.endpoints import clientFromString
from twisted.internet.protocol import Factory
from twisted.protocols.policies import WrappingFactory

from connlimit import Limiter, LimitingFactory
from connlimit._system import descriptors
from connlimit._twistd.targets.relay import RelayFactory

resource = pytest.importorskip("resource")


def run(code: str) -> str:
    """
    What the code prints in another Python.
    """
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def test_the_limit_is_the_soft_one() -> None:
    assert descriptors.limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_there_is_no_telling_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "resource", None)
    descriptors.raise_limit()
    assert descriptors.limit() is None
    assert descriptors.left_for_waiting()


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    printed = run("""
import resource
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
from connlimit._system import descriptors
descriptors.raise_limit()
print(descriptors.limit() == hard)
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
    descriptors.raise_limit()
    assert accepted == [(10240, resource.RLIM_INFINITY)]


def test_those_who_wait_leave_the_reserve_free_and_those_who_are_served_half_of_it() -> None:
    printed = run("""
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from connlimit._system import descriptors

def take_while(allowed):
    while allowed():
        descriptors.saw(os.dup(0))

def left():
    held = []
    try:
        while True:
            held.append(os.dup(0))
    except OSError:
        for each in held:
            os.close(each)
        return len(held)

for allowed in (
    lambda: descriptors.left_for_waiting(20),
    descriptors.left_for_waiting,
    lambda: descriptors.left_for_serving(5),
    descriptors.left_for_serving,
    descriptors.left_in_reserve,
    descriptors.REFUSALS.has_room,
):
    take_while(allowed)
    print(left())
""")
    # Who waits, and who is served at once, is seen when its descriptor has been opened: here one too many.
    assert list(map(int, printed.split())) == [84, 63, 36, 31, 8, 8]


def test_what_is_about_to_be_opened_is_counted() -> None:
    printed = run("""
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from twisted.internet.defer import Deferred
from connlimit._system import descriptors

class Endpoint:
    def connect(self, factory):
        return connecting.pop()

first = min(set(range(256)) - set(map(int, os.listdir("/dev/fd"))))
connecting = [Deferred() for _ in range(256)]
all_of_them = list(connecting)
endpoint = descriptors.counted(Endpoint())
allowed = 0
while descriptors.left_for_serving(1):
    endpoint.connect(None)
    allowed += 1
print(abs(first + allowed - 224) <= 1)
for each in all_of_them[len(connecting):]:
    each.callback(None)
print(descriptors.left_for_serving(1))

# One low number is free, and all that is above it is taken.
held = [os.dup(0)]
while held[-1] < 220:
    held.append(os.dup(0))
os.close(held[0])
connecting[:] = [Deferred() for _ in range(256)]
allowed = 0
while descriptors.left_for_serving(1):
    endpoint.connect(None)
    allowed += 1
print(allowed < 12)
""")
    assert printed.split() == ["True", "True", "True"]


def test_a_short_table_is_looked_at_until_it_is_not_short_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "limit", lambda: 100_000)
    descriptors.saw(99_000)
    assert descriptors.is_short
    assert descriptors.left_for_waiting()
    assert not descriptors.is_short


@pytest.fixture
def hears_all(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """
    A limit of 10,000 descriptors; the numbers of all that are opened are told. What was looked at is noted.
    """
    looks: list[int] = []

    class Probe(socket.socket):
        def __init__(self) -> None:
            super().__init__()
            looks.append(self.fileno())

    monkeypatch.setattr(descriptors, "limit", lambda: 10_000)
    monkeypatch.setattr(descriptors, "_hears_all", True)
    monkeypatch.setattr(descriptors, "_last_seen", None)
    monkeypatch.setattr(descriptors, "told_from", 0)
    monkeypatch.setattr(descriptors.socket, "socket", Probe)
    return looks


def test_the_number_of_a_new_socket_tells_whether_it_may_wait(hears_all: list[int]) -> None:
    for number in range(50, 1000):
        descriptors.saw(number)
        assert descriptors.left_for_waiting(100)
    assert hears_all == []


def test_before_one_is_turned_away_the_table_is_looked_at(hears_all: list[int]) -> None:
    descriptors.saw(8_700)  # the reserve begins at 8,752
    assert descriptors.left_for_waiting(100)  # those before it are gone
    assert len(hears_all) == 1
    assert descriptors.left_for_waiting(100)
    assert len(hears_all) == 1


def test_what_is_opened_for_those_who_are_served_counts_as_seen(hears_all: list[int]) -> None:
    descriptors.saw(50)
    assert descriptors.left_for_serving(8_000)
    assert len(hears_all) == 1
    assert descriptors.left_for_waiting(4_000)  # looked at again, since nothing was opened after all
    assert len(hears_all) == 2


def test_the_budget_of_a_limiter_knows_what_its_factories_open() -> None:
    limiter = Limiter(1)
    LimitingFactory(Factory(), limiter)
    assert limiter.admission.budget.opens == 0
    relay = RelayFactory(clientFromString(reactor, "tcp:127.0.0.1:1"), "a backend")
    LimitingFactory(WrappingFactory(relay), limiter)
    LimitingFactory(Factory(), limiter)
    assert limiter.admission.budget.opens == 1


@pytest.mark.parametrize(
    ("limit", "reserve"), [(64, 16), (256, 64), (1024, 128), (8192, 1024), (1_000_000, 4096)]
)
def test_the_reserve_is_an_eighth_within_bounds(limit: int, reserve: int) -> None:
    assert descriptors.reserve(limit) == reserve
