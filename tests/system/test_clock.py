"""
Time: timers by the kernel's monotonic clock, in the reactor that the connections are in.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from time import monotonic

import pytest
from pytest_twisted import ensureDeferred
from support.patience import PATIENCE
from support.sockets import until
from twisted.internet import reactor
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import Clock
from zope.interface.verify import verifyObject

from connlimit._system import clock as clock_module
from connlimit._system.clock import ReactorClock, clock_of

#: A server with a limiter, in a reactor that what is put in makes and changes; prints what its clients saw.
SERVER = """
import sys, time
from twisted.internet import protocol, endpoints, defer
{reactor}

from connlimit import Limiter, LimitingFactory

class Hello(protocol.Protocol):
    def connectionMade(self):
        self.transport.write(b"hello")

class Client(protocol.Protocol):
    def connectionMade(self):
        clients.append(self)
    def dataReceived(self, data):
        seen.append(data)
        if len(seen) == expected:
            reactor.stop()
    def connectionLost(self, reason):
        seen.append(b"lost")
        if len(seen) == expected:
            reactor.stop()

clients, seen = [], []
settings, expected = {settings}, {expected}
factory = LimitingFactory(protocol.Factory.forProtocol(Hello), Limiter(**settings))
{listen}
for _ in range(3):
    endpoints.TCP4ClientEndpoint(reactor, "127.0.0.1", port.getHost().port).connect(
        protocol.Factory.forProtocol(Client))
{then}
reactor.run()
print(b",".join(seen[:expected]).decode())
"""

ANOTHER_REACTOR = """
from twisted.internet.selectreactor import SelectReactor
reactor = SelectReactor()
"""
SET_BACK = """
def set_back():
    if len(clients) < 3:
        reactor.callLater(0.05, set_back)
        return
    wall = reactor.seconds
    reactor.seconds = lambda: wall() - 3600
reactor.callWhenRunning(set_back)
"""
SET_FORWARD = """
def set_forward():
    if len(clients) < 3:
        reactor.callLater(0.01, set_forward)
        return
    wall, began = reactor.seconds, time.monotonic()
    reactor.seconds = lambda: wall() + 3600
    reactor.addSystemEventTrigger(
        "after", "shutdown", lambda: seen.insert(0, b"%f" % (time.monotonic() - began)))
reactor.callWhenRunning(set_forward)
"""


def outcome(
    *,
    settings: str,
    expected: int,
    count: int = 3,
    reactor: str = ANOTHER_REACTOR,
    listen: str = "",
    then: str = "",
) -> list[str]:
    script = SERVER.format(
        reactor=reactor,
        settings=settings,
        expected=expected,
        listen=listen or 'port = reactor.listenTCP(0, factory, interface="127.0.0.1")',
        then=then,
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    return done.stdout.strip().split(",")


def test_timers_run_in_the_reactor_that_the_connections_are_in() -> None:
    assert outcome(settings="dict(max_connections=1, wait_timeout=0.3)", expected=3) == [
        "hello",
        "lost",
        "lost",
    ]


def test_who_waits_for_the_rate_is_served_in_whichever_reactor() -> None:
    assert outcome(settings="dict(max_rate=10, max_burst=1)", expected=3) == ["hello"] * 3


def test_a_notice_is_given_in_whichever_reactor() -> None:
    seen = outcome(settings='dict(max_connections=1, notice=(0.2, b"wait"))', expected=3)
    assert seen == ["hello", "wait", "wait"]


def test_an_endpoint_string_runs_its_timers_in_the_reactor_that_it_was_parsed_for() -> None:
    listen = """
from twisted.internet.defer import Deferred
ports = []
endpoint = endpoints.serverFromString(
    reactor, "connlimit:tcp:0:interface=127.0.0.1:max_connections=1:wait_timeout=0.3")
endpoint.listen(factory.wrappedFactory).addCallback(ports.append)
(port,) = ports
"""
    assert outcome(settings="{}", listen=listen, expected=3) == ["hello", "lost", "lost"]


@pytest.mark.parametrize("reactor", ["from twisted.internet import reactor", ANOTHER_REACTOR])
def test_a_wall_clock_that_is_set_back_delays_nobody(reactor: str) -> None:
    """
    The reactor's own timers are an hour late then.
    """
    began = monotonic()
    seen = outcome(
        settings="dict(max_connections=1, wait_timeout=1)", expected=3, reactor=reactor, then=SET_BACK
    )
    assert seen == ["hello", "lost", "lost"]
    seen = outcome(settings="dict(max_rate=2, max_burst=1)", expected=3, reactor=reactor, then=SET_BACK)
    assert seen == ["hello"] * 3
    assert monotonic() - began < PATIENCE


@pytest.mark.parametrize("reactor", ["from twisted.internet import reactor", ANOTHER_REACTOR])
@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ("dict(max_connections=1, wait_timeout=1)", ["hello", "lost"]),
        ("dict(max_rate=2, max_burst=1)", ["hello", "hello"]),
    ],
)
def test_a_wall_clock_that_is_set_forward_refuses_and_serves_nobody_early(
    reactor: str, settings: str, seen: list[str]
) -> None:
    """
    The reactor's own timers are an hour early then.
    """
    seconds, *before = outcome(settings=settings, expected=3, reactor=reactor, then=SET_FORWARD)
    assert before == seen
    assert 0.8 < float(seconds) < PATIENCE


@ensureDeferred
async def test_timers_come_in_the_order_of_their_times_and_not_before_them() -> None:
    clock = ReactorClock(reactor)
    verifyObject(IReactorTime, clock)
    began, came = clock.seconds(), []
    for delay in (0.2, 0.05, 0.1, 0, 0.05):
        clock.callLater(delay, lambda delay=delay: came.append((delay, clock.seconds() - began)))
    assert len(clock.getDelayedCalls()) == 5
    await until(lambda: len(came) == 5)
    assert [delay for delay, _ in came] == [0, 0.05, 0.05, 0.1, 0.2]
    assert all(after >= delay for delay, after in came)
    assert clock.getDelayedCalls() == []


@ensureDeferred
async def test_timers_can_be_cancelled_put_off_and_brought_forward() -> None:
    clock, came = ReactorClock(reactor), []
    cancelled, put_off, brought_forward, last = (
        clock.callLater(delay, came.append, name)
        for delay, name in ((0.05, "cancelled"), (0.05, "put off"), (60, "brought forward"), (0.1, "last"))
    )
    cancelled.cancel()
    put_off.reset(0.3)
    brought_forward.reset(0.01)
    await until(lambda: len(came) == 3)
    assert came == ["brought forward", "last", "put off"]
    assert not last.active()


@ensureDeferred
async def test_one_that_fails_is_logged_and_the_others_come() -> None:
    clock, came = ReactorClock(reactor), []
    clock.callLater(0, lambda: 1 / 0)
    clock.callLater(0, came.append, "next")
    await until(lambda: came == ["next"])


@ensureDeferred
async def test_without_timers_the_reactor_has_no_reader_of_ours() -> None:
    clock = ReactorClock(reactor)
    calls = [clock.callLater(60, lambda: None) for _ in range(200)]
    assert any(isinstance(each, clock_module._Timers) for each in reactor.getReaders())
    for each in calls:
        each.cancel()
    assert not any(isinstance(each, clock_module._Timers) for each in reactor.getReaders())


@ensureDeferred
async def test_cancelled_timers_are_not_kept() -> None:
    clock = ReactorClock(reactor)
    timers = clock_module._timers_of(reactor)
    kept = clock.callLater(60, lambda: None)
    for _ in range(10_000):
        clock.callLater(60, lambda: None).cancel()
    assert len(timers._calls) < 200
    kept.cancel()


@ensureDeferred
async def test_where_the_kernel_has_no_timer_that_of_the_reactor_will_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clock_module, "_new_alarm", lambda: None)
    monkeypatch.setattr(clock_module, "_of_reactors", {})
    clock, came = ReactorClock(reactor), []
    clock.callLater(0.1, came.append, "later")
    clock.callLater(0.02, came.append, "sooner")
    clock.callLater(0.01, came.append, "never").cancel()
    await until(lambda: len(came) == 2)
    assert came == ["sooner", "later"]
    clock.callLater(60, came.append, "never").cancel()
    assert not [call for call in reactor.getDelayedCalls() if "_Timers" in repr(call)]


class FakeKqueue:
    """
    As much of a kqueue as the alarm uses; rings at once.
    """

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.set: list[object] = []

    def fileno(self) -> int:
        return self.reader

    def control(self, changes: list[object] | None, maximum: int, timeout: int) -> list[object]:
        if changes:
            self.set += changes
            os.write(self.writer, b".")
        else:
            os.read(self.reader, 100)
        return []


@ensureDeferred
async def test_macos_and_the_bsds_have_a_timer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"KQ_FILTER_TIMER": -7, "KQ_EV_ADD": 1, "KQ_EV_ONESHOT": 16}.items():
        monkeypatch.setattr(select, name, value, raising=False)
    monkeypatch.setattr(select, "kqueue", FakeKqueue, raising=False)
    monkeypatch.setattr(select, "kevent", lambda ident, **facts: (ident, facts), raising=False)
    monkeypatch.setattr(clock_module, "_of_reactors", {})
    clock, came = ReactorClock(reactor), []
    clock.callLater(0, came.append, "now")
    await until(lambda: came == ["now"])
    (_, facts), *_ = clock_module._timers_of(reactor)._alarm._kqueue.set
    assert facts == {"filter": -7, "flags": 17, "data": 1}


FORK = """
import os, sys
from twisted.internet import reactor
from connlimit._system.clock import ReactorClock

clock = ReactorClock(reactor)
def fork():
    child = os.fork()
    if not child:
        clock.callLater(0, lambda: None)
        clock.callLater(60, lambda: None).cancel()
        os._exit(0)
    os.waitpid(child, 0)
clock.callLater(0.3, print, "parent")
clock.callLater(0.1, fork)
clock.callLater(0.5, reactor.stop)
reactor.callLater(20, os._exit, 1)
reactor.run()
"""


def test_a_child_leaves_the_timers_of_its_parent_alone() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "parent\n"), done.stderr


def test_what_is_no_real_reactor_is_its_own_clock() -> None:
    clock = Clock()
    assert clock_of(clock) is clock
    assert isinstance(clock_of(reactor), ReactorClock)
