"""
What becomes of a waiting client that has sent something and closed its direction: what is spoken tells.
"""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from pytest_twisted import ensureDeferred
from support.sockets import listening, until
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol
from twisted.protocols.basic import LineReceiver
from twisted.protocols.policies import TimeoutFactory
from twisted.python.reflect import namedAny
from zope.interface import implementer

from connlimit import Limiter, LimitingFactory, refusals
from connlimit._connection import known_protocols


def connect(where: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(where.rpartition(":")[2])))


async def send_and_close(limiter: Limiter, where: str, data: bytes, count: int) -> None:
    """
    So many clients send something while they wait, and close.
    """
    before = limiter.snapshot().accepted
    clients = [connect(where) for _ in range(count)]
    await until(lambda: limiter.snapshot().accepted == before + count)
    for client in clients:
        client.sendall(data)
        client.close()


class Lines(LineReceiver):
    """
    Keeps the lines that it is sent, as a server for logs does.
    """

    delimiter = b"\n"

    def lineReceived(self, line: bytes) -> None:
        self.factory.lines.append(line)


class LinesFactory(Factory):
    """
    Has all lines.
    """

    protocol = Lines

    def __init__(self) -> None:
        self.lines: list[bytes] = []


REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("around", [False, True], ids=["bare", "in TimeoutFactory"])
@ensureDeferred
async def test_http_clients_that_ask_and_leave_are_not_worked_for(around: bool) -> None:
    web = pytest.importorskip("twisted.web.server")
    from twisted.web.resource import Resource

    requests = []

    class Page(Resource):
        isLeaf = True

        def render_GET(self, request: object) -> bytes:
            requests.append(request)
            return b"the page"

    limiter, site = Limiter(0), web.Site(Page())
    async with listening(limiter, server=TimeoutFactory(site, 60) if around else site) as (_, where):
        await send_and_close(limiter, where, REQUEST, 20)
        await until(lambda: limiter.waiting == 0)
        assert limiter.snapshot().departed == 20
        living = connect(where)
        living.sendall(REQUEST)
        await until(lambda: limiter.waiting == 1)
        limiter.max_connections = 1
        await until(lambda: requests)
        assert len(requests) == 1
        living.close()


@ensureDeferred
async def test_lines_of_a_log_are_kept_though_their_clients_have_left() -> None:
    limiter, server = Limiter(0), LinesFactory()
    async with listening(limiter, server=server) as (_, where):
        await send_and_close(limiter, where, b"one\ntwo\n", 20)
        gone = connect(where)
        await until(lambda: limiter.waiting == 21)
        gone.close()
        await until(lambda: limiter.snapshot().departed == 1)
        limiter.max_connections = 1
        await until(lambda: limiter.snapshot().finished == 20)
        assert server.lines == [b"one", b"two"] * 20


@pytest.mark.parametrize("setting", [True, False])
@ensureDeferred
async def test_the_setting_decides_for_all_if_it_is_not_auto(setting: bool) -> None:
    web = pytest.importorskip("twisted.web.server")
    for server in (web.Site(None), LinesFactory()):
        limiter = Limiter(0, departed_on_half_close=setting)
        async with listening(limiter, server=server) as (_, where):
            await send_and_close(limiter, where, b"something\n", 3)
            gone = connect(where)
            await until(lambda limiter=limiter: limiter.snapshot().accepted == 4)
            gone.close()
            await until(lambda limiter=limiter: limiter.snapshot().departed == (4 if setting else 1))


@ensureDeferred
async def test_the_first_protocol_that_is_built_tells_also_for_those_who_have_closed_before() -> None:
    http = pytest.importorskip("twisted.web.http")

    class Secretive(Factory):
        def buildProtocol(self, addr: object) -> Protocol:
            return http.HTTPChannel()

    limiter = Limiter(0)
    async with listening(limiter, server=Secretive()) as (_, where):
        first = connect(where)
        await until(lambda: limiter.waiting == 1)
        await send_and_close(limiter, where, REQUEST, 5)
        gone = connect(where)
        await until(lambda: limiter.waiting == 7)
        gone.close()
        await until(lambda: limiter.snapshot().departed == 1)
        assert limiter.waiting == 6
        limiter.max_connections = 1
        await until(lambda: limiter.snapshot().departed == 6)
        assert (limiter.active, limiter.waiting) == (1, 0)
        first.close()


@ensureDeferred
async def test_a_change_of_the_setting_is_for_those_who_wait_too() -> None:
    limiter = Limiter(0)
    async with listening(limiter, server=LinesFactory()) as (_, where):
        await send_and_close(limiter, where, b"something\n", 5)
        gone = connect(where)
        await until(lambda: limiter.waiting == 6)
        gone.close()
        await until(lambda: limiter.snapshot().departed == 1)
        limiter.departed_on_half_close = True
        await until(lambda: limiter.waiting == 0)


@implementer(IHalfCloseableProtocol)
class HalfCloseable(Protocol):
    """
    Goes on when its client has closed its direction.
    """

    def readConnectionLost(self) -> None: ...

    def writeConnectionLost(self) -> None: ...


class Secret(Factory):
    """
    Builds protocols of a class that it does not tell before.
    """

    def __init__(self, protocol: type[Protocol]) -> None:
        self._protocol = protocol

    def buildProtocol(self, addr: object) -> Protocol:
        return self._protocol()


def answers(factory: object, *, build: bool = False, **settings: object) -> bool:
    limited = LimitingFactory(factory, Limiter(**settings))
    if build:
        limited.buildProtocol(None)
    return limited.departs_on_half_close()


def test_protocols_of_many_kinds_answer() -> None:
    irc = pytest.importorskip("twisted.words.protocols.irc")
    smtp = pytest.importorskip("twisted.mail.smtp")
    protocol = type("Own", (irc.IRC,), {})
    assert answers(Factory.forProtocol(protocol))
    assert not answers(Secret(protocol))
    assert answers(Secret(protocol), build=True)
    assert answers(smtp.SMTPFactory())
    assert answers(LimitingFactory(Factory.forProtocol(protocol), Limiter()))
    assert not answers(Factory.forProtocol(Lines))
    assert not answers(Factory.forProtocol(Lines), build=True)


def test_a_refusal_in_words_of_a_protocol_that_answers_says_what_is_spoken() -> None:
    assert answers(Secret(Protocol), refusal="http")
    assert answers(Secret(Protocol), build=True, refusal="ssh")
    assert not answers(Secret(Protocol), refusal="close")
    assert not answers(Secret(Protocol), refusal="say http")


def test_a_protocol_that_can_be_half_closed_is_never_judged() -> None:
    http = pytest.importorskip("twisted.web.http")
    both = implementer(IHalfCloseableProtocol)(type("Both", (http.HTTPChannel,), {}))
    assert not answers(Factory.forProtocol(both), refusal="http")
    assert not answers(Secret(both), build=True, refusal="http")
    assert not answers(Secret(HalfCloseable), build=True, refusal="http")
    assert answers(Factory.forProtocol(HalfCloseable), departed_on_half_close=True)


def test_a_factory_that_fails_when_it_is_asked_is_of_no_kind() -> None:
    class Odd(Factory):
        @property
        def protocol(self) -> object:
            raise OSError

        wrappedFactory = protocol

    assert not answers(Odd())


@pytest.mark.parametrize("name", [name for kind in known_protocols.KINDS for name in kind.classes])
def test_every_class_of_the_table_is_there_and_of_its_kind(name: str) -> None:
    package = name.partition(".")[0]
    pytest.importorskip(package)
    if package == "autobahn":
        namedAny("autobahn.twisted.websocket")
    cls = namedAny(name)
    assert known_protocols.kind_of(cls) is not None
    assert f"{cls.__module__}.{cls.__qualname__}" == name


def test_every_refusal_of_the_table_is_there() -> None:
    assert {name for kind in known_protocols.KINDS for name in kind.refusals} <= set(refusals.NAMED)


def test_nothing_is_imported_to_find_out() -> None:
    script = """
import sys
from twisted.internet.protocol import Factory, Protocol
from connlimit import Limiter, LimitingFactory
before = set(sys.modules)
factory = LimitingFactory(Factory.forProtocol(Protocol), Limiter())
assert not factory.departs_on_half_close()
factory.buildProtocol(None)
assert not factory.departs_on_half_close()
new = {name for name in set(sys.modules) - before if name.startswith(("twisted.", "autobahn"))}
assert not new, new
assert "twisted.web.http" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
