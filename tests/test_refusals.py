"""
What a refused client gets, as real clients report it.
"""

from __future__ import annotations

import ftplib
import http.client
import imaplib
import poplib
import smtplib
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred
from support.clients import port_of, read_all
from support.fakes import ApplicationError, RecordingFactory
from support.logs import Log
from support.patience import PATIENCE
from support.programs import require_program
from support.sockets import Client, connected, listening, patiently, until
from support.tls import wrap_server_tls
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import StringTransport
from twisted.internet.threads import deferToThread
from twisted.logger import Logger
from zope.interface import implementer
from zope.interface.verify import verifyObject

from connlimit import Limiter, refusals
from connlimit._connection import refused
from connlimit._system import descriptors
from connlimit._system.bounded_log import BoundedLog
from connlimit.interfaces import IRefusal


@asynccontextmanager
async def full(refusal: object, **settings: object) -> AsyncIterator[tuple[Limiter, int]]:
    """
    A server that refuses everybody, and its port.
    """
    limiter = Limiter(0, refusal=refusal, **{"max_waiting": 0, **settings})
    async with listening(limiter) as (_, where):
        yield limiter, port_of(where)


def output_of(*command: str, data: bytes | None = None) -> str:
    """
    What a program prints on both of its outputs.
    """
    done = subprocess.run(
        [require_program(command[0]), *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        input=data or b"",
        timeout=PATIENCE,
    )
    return done.stdout.decode(errors="replace")


# One real client for each preset: what it reports.


def by_smtplib(port: int) -> str:
    with pytest.raises(smtplib.SMTPConnectError) as caught:
        smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE)
    return f"{caught.value.smtp_code} {caught.value.smtp_error.decode()}"


def by_ftplib(port: int) -> str:
    with ftplib.FTP(timeout=PATIENCE) as client, pytest.raises(ftplib.error_temp) as caught:
        client.connect("127.0.0.1", port)
    return str(caught.value)


def by_poplib(port: int) -> str:
    client = poplib.POP3.__new__(poplib.POP3)  # one that cannot be made does not close its socket
    with pytest.raises(poplib.error_proto) as caught:
        client.__init__("127.0.0.1", port, PATIENCE)
    client.close()
    return str(caught.value)


def by_imaplib(port: int) -> str:
    with pytest.raises(imaplib.IMAP4.error) as caught:
        imaplib.IMAP4("127.0.0.1", port, PATIENCE)
    return str(caught.value)


def by_curl(port: int) -> str:
    return output_of("curl", "-si", f"http://127.0.0.1:{port}/")


def by_redis_cli(port: int) -> str:
    return output_of("redis-cli", "-h", "127.0.0.1", "-p", str(port), "ping")


def by_mysql(port: int) -> str:
    return output_of("mariadb", "--no-defaults", "-h", "127.0.0.1", "-P", str(port), "-u", "x", "--skip-ssl")


def by_psql(port: int) -> str:
    return output_of("psql", f"postgresql://somebody@127.0.0.1:{port}/db?connect_timeout=10")


def by_ssh(port: int) -> str:
    options = ["-F", "none", "-v", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"]
    return output_of("ssh", *options, "-p", str(port), "somebody@127.0.0.1")


def by_socket(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        return read_all(client).decode()


CLIENTS: dict[str, tuple[Callable[[int], str], str]] = {
    "http": (by_curl, "HTTP/1.1 503 Service Unavailable"),
    "smtp": (by_smtplib, "421 4.3.2 Too many connections, try again later"),
    "ftp": (by_ftplib, "421 Too many connections, try again later"),
    "pop3": (by_poplib, "-ERR [SYS/TEMP] Too many connections, try again later"),
    "imap": (by_imaplib, "BYE Too many connections, try again later"),
    "irc": (by_socket, "ERROR :Too many connections, try again later\r\n"),
    "nntp": (by_socket, "400 Too many connections, try again later\r\n"),
    "redis": (by_redis_cli, "Too many connections, try again later"),
    "mysql": (by_mysql, "ERROR 1040"),
    "postgresql": (by_psql, "FATAL:  Too many connections, try again later"),
    "ssh": (by_ssh, "Too many connections, try again later"),
}


def test_each_preset_has_a_client() -> None:
    assert set(CLIENTS) == set(refusals.NAMED) - {"close", "reset"}


@pytest.mark.parametrize("name", CLIENTS)
@ensureDeferred
async def test_a_real_client_reports_the_reason(name: str) -> None:
    client, words = CLIENTS[name]
    async with full(name) as (limiter, port):
        assert words in await patiently(deferToThread(client, port))
        assert sum(limiter.snapshot().refused.values()) >= 1


@pytest.mark.parametrize("name", CLIENTS)
@ensureDeferred
async def test_it_reports_it_after_a_wait_too(name: str) -> None:
    client, words = CLIENTS[name]
    words = words.replace("Too many connections", "Too busy") if name != "mysql" else words
    async with full(name, max_waiting=10, wait_timeout=0.2) as (limiter, port):
        assert words in await patiently(deferToThread(client, port))
        assert limiter.snapshot().refused["timeout"] >= 1


@ensureDeferred
async def test_http_tells_when_to_come_again() -> None:
    async with full("http") as (_, port):
        assert "Retry-After: 1\r\n" in await patiently(deferToThread(by_curl, port))


@ensureDeferred
async def test_http_2_is_refused_in_http_2(certificate: Path) -> None:
    pytest.importorskip("h2")
    from twisted.web.resource import Resource
    from twisted.web.server import Site

    endpoint = serverFromString(reactor, f"ssl:0:privateKey={certificate}:interface=127.0.0.1")
    async with listening(Limiter(0, max_waiting=0, refusal="http"), endpoint, Site(Resource())) as (_, where):
        command = ["curl", "-ski", "--http2", f"https://127.0.0.1:{port_of(where)}/"]
        answer = await patiently(deferToThread(output_of, *command))
    assert answer.startswith("HTTP/2 503")
    assert "retry-after: 1" in answer


def upload(port: int) -> tuple[int, str]:
    """
    The answer to a large upload that is sent to its end, whatever comes meanwhile.
    """
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        size = 20_000_000
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // 100_000):
            client.sendall(b"x" * 100_000)
        response = http.client.HTTPResponse(client)
        response.begin()
        return response.status, response.read().decode()


@pytest.mark.parametrize("settings", [{}, {"max_waiting": 10, "wait_timeout": 0.2}], ids=["full", "timeout"])
@ensureDeferred
async def test_the_sentence_arrives_in_the_middle_of_a_large_upload(settings: dict[str, object]) -> None:
    async with full("http", **settings) as (_, port):
        status, body = await patiently(deferToThread(upload, port))
        assert (status, body[:4]) == (503, "Too ")
        answer = await patiently(
            deferToThread(
                output_of, "curl", "-s", "-T", "-", f"http://127.0.0.1:{port}/", data=b"x" * 3_000_000
            )
        )
        assert answer.startswith("Too ")


@pytest.mark.parametrize("place", ["inside TLS", "next to TCP"])
@pytest.mark.parametrize("settings", [{}, {"max_waiting": 10, "wait_timeout": 0.2}], ids=["full", "timeout"])
@ensureDeferred
async def test_to_a_tls_client_it_is_said_after_the_handshake(
    settings: dict[str, object], place: str, certificate: Path
) -> None:
    twisted_ssl = pytest.importorskip("twisted.internet.ssl")
    from twisted.protocols.tls import TLSMemoryBIOFactory

    context = twisted_ssl.DefaultOpenSSLContextFactory(str(certificate), str(certificate))
    server: object = RecordingFactory()
    endpoint = serverFromString(reactor, "tcp:0:interface=127.0.0.1")
    if place == "inside TLS":
        endpoint = wrap_server_tls(context, endpoint)
    else:
        server = TLSMemoryBIOFactory(context, False, server)
    limiter = Limiter(0, refusal="smtp", **{"max_waiting": 0, **settings})

    def talk(port: int) -> bytes:
        unverified = ssl._create_unverified_context()
        with (
            socket.create_connection(("127.0.0.1", port), PATIENCE) as raw,
            unverified.wrap_socket(raw) as client,
        ):
            return read_all(client)

    async with listening(limiter, endpoint, server) as (_, where):
        said = await patiently(deferToThread(talk, port_of(where)))
    assert said.startswith(b"421 4.3.2 Too ")


@ensureDeferred
async def test_a_reset_is_a_reset() -> None:
    for settings in ({}, {"max_waiting": 1, "wait_timeout": 0.1}):
        async with full("reset", **settings) as (_, port):

            def talk(port: int = port) -> None:
                with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
                    client.recv(1)

            with pytest.raises(ConnectionResetError):
                await patiently(deferToThread(talk))


@ensureDeferred
async def test_a_sentence_of_ones_own_is_said() -> None:
    for refusal in (refusals.Say(b"go\r\n"), r"say go\r\n"):
        async with full(refusal) as (_, port):
            assert await patiently(deferToThread(by_socket, port)) == "go\r\n"


class Rude(Protocol):
    """
    Says something, and does not close.
    """

    def connectionMade(self) -> None:
        self.transport.write(b"no")


@ensureDeferred
async def test_any_factory_can_refuse_and_is_cut_off_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refused, "LINGER", 0.3)
    async with full(Factory.forProtocol(Rude)) as (limiter, port):
        client: Client = await connected(f"tcp:127.0.0.1:{port}")
        await client.receives(b"no")
        await client.is_closed()
        assert limiter.snapshot().refused["full"] == 1


@ensureDeferred
async def test_who_never_reads_or_never_closes_is_cut_off_and_counts_against_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await until(lambda: descriptors.REFUSALS.taken == 0)
    monkeypatch.setattr(refused, "LINGER", 0.5)
    monkeypatch.setattr(descriptors.REFUSALS, "has_room", lambda: descriptors.REFUSALS.taken < 3)
    async with full(refusals.Say(b"x" * 5_000_000)) as (limiter, port):
        silent = [socket.create_connection(("127.0.0.1", port), PATIENCE) for _ in range(5)]
        await until(lambda: limiter.snapshot().refused["full"] == 5)
        # Three are being told, the others are closed without a word.
        assert [client.recv(1) for client in silent].count(b"") == 2
        await until(lambda: descriptors.REFUSALS.taken == 0)
        for client in silent:
            client.close()


@ensureDeferred
async def test_a_refusal_that_fails_closes_the_connection() -> None:
    class Failing(Factory):
        noisy = False

        def buildProtocol(self, addr: object) -> Protocol:
            raise ApplicationError

    async with full(Failing()) as (_, port):
        assert await patiently(deferToThread(by_socket, port)) == ""


@ensureDeferred
async def test_a_waiting_client_hears_its_notice_once_and_then_its_server() -> None:
    limiter = Limiter(0, notice=(0.1, b"220-please wait\r\n"))
    async with listening(limiter) as (_, where):
        client = await connected(where)
        client.transport.write(b"hello")
        await client.receives(b"220-please wait\r\n")
        limiter.max_connections = 1
        await client.receives(b"220-please wait\r\nhello")


@ensureDeferred
async def test_a_drained_line_is_told() -> None:
    limiter = Limiter(0, refusal="smtp")
    async with listening(limiter) as (_, where):
        client = await connected(where)
        await until(lambda: limiter.waiting == 1)
        limiter.drain()
        await client.is_closed()
        assert client.received == b"421 4.3.2 Shutting down, try again later\r\n"


def spoken_to(name: str, *chunks: bytes) -> bytes:
    """
    What a refusal says to a client that sends this.
    """
    protocol = refusals.NAMED[name].build_protocol(None, "full", 1)
    transport = StringTransport()
    protocol.makeConnection(transport)
    for chunk in chunks:
        protocol.dataReceived(chunk)
    return transport.value()


SSL_REQUEST = bytes.fromhex("0000000804d2162f")
GSS_REQUEST = bytes.fromhex("0000000804d21630")


def test_postgresql_clients_may_ask_for_each_encryption_once() -> None:
    start = b"\0\0\0\x09\0\3\0\0\0"
    for asks in ([SSL_REQUEST], [GSS_REQUEST], [SSL_REQUEST, GSS_REQUEST], [GSS_REQUEST, SSL_REQUEST]):
        said = spoken_to("postgresql", *asks, start)
        assert said.startswith(b"N" * len(asks) + b"E")
        assert said == spoken_to("postgresql", b"".join(asks) + start)
        assert spoken_to("postgresql", *asks) == b"N" * len(asks)
    assert spoken_to("postgresql", SSL_REQUEST, SSL_REQUEST).startswith(b"NE")


@pytest.mark.parametrize("name", ["postgresql", "http"])
def test_an_opening_may_come_in_pieces(name: str) -> None:
    opening = SSL_REQUEST + GSS_REQUEST + SSL_REQUEST if name == "postgresql" else b"PRI * HTTP/2.0\r\n\r\n"
    pieces = [opening[at : at + 1] for at in range(len(opening))]
    assert spoken_to(name, *pieces) == spoken_to(name, opening)


@pytest.mark.parametrize("name", CLIENTS)
def test_what_a_client_sends_costs_next_to_nothing(name: str) -> None:
    flood = SSL_REQUEST * 100_000
    began = time.process_time()
    said = spoken_to(name, *[flood] * 3)
    assert time.process_time() - began < 1
    assert len(said) < 1000


@pytest.mark.parametrize("method", ["connectionMade", "dataReceived", "connectionLost"])
@ensureDeferred
async def test_a_refusal_that_fails_while_it_speaks_is_ended_and_does_not_fill_the_log(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise ApplicationError

    Failing = type("Failing", (Protocol,), {method: fail})
    monkeypatch.setattr(refused, "_log", BoundedLog(Logger()))
    with Log() as log:
        async with full(Factory.forProtocol(Failing)) as (limiter, port):
            for number in range(5):
                client = await connected(f"tcp:127.0.0.1:{port}")
                client.transport.write(b"hello")
                await until(lambda number=number: limiter.snapshot().refused["full"] == number + 1)
                if method == "connectionLost":
                    await client.close()
                else:
                    await client.is_closed()
            await until(lambda: descriptors.REFUSALS.taken == 0)
    assert len([event for event in log.events if "log_failure" in event]) == 1


@implementer(IRefusal)
class Own:
    """
    A refusal of one's own.
    """

    def build_protocol(self, address: object, reason: str, retry_after: float) -> Protocol:
        return refusals.Speaking(lambda received: f"{reason} {retry_after:.0f}".encode())


@ensureDeferred
async def test_a_refusal_of_ones_own_is_asked() -> None:
    verifyObject(IRefusal, Own())
    async with full(Own()) as (_, port):
        assert await patiently(deferToThread(by_socket, port)) == "full 1"


@pytest.mark.parametrize("wrong", ["htpp", "", 5, None, object()])
def test_what_is_no_refusal_is_an_error_of_one_sentence(wrong: object) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^refusal must be close, reset, .*, not "):
        Limiter(refusal=wrong)
