"""
What a server does to its transport as soon as it has it has the same effect bare, limited, and after a wait.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from support.patience import PATIENCE
from support.sockets import patiently, until
from twisted.internet import interfaces, reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import ClientFactory, Factory, Protocol
from twisted.internet.threads import deferToThread
from zope.interface import implementer
from zope.interface.interface import InterfaceClass

from connlimit import Limiter, LimitingFactory
from connlimit._system.sockets import lowest

pytest.importorskip("OpenSSL")
from twisted.internet.ssl import DefaultOpenSSLContextFactory

WAYS = ("bare", "room", "waited")


class Acting(Protocol):
    """
    Does what its factory says as soon as it is connected, and echoes with a mark.
    """

    def connectionMade(self) -> None:
        self.factory.events.append("made")
        self.factory.act(self)

    def dataReceived(self, data: bytes) -> None:
        self.factory.events.append("data")
        self.transport.write(b"<" + data + b">")

    def connectionLost(self, reason: Any) -> None:
        self.factory.events.append(reason.type.__name__)


@implementer(interfaces.IPushProducer, interfaces.IPullProducer)
class Producer:
    """
    Produces three pieces and a mark, and then unregisters.
    """

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self.left = 3

    def resumeProducing(self) -> None:
        if self.left:
            self.left -= 1
            self.transport.write(b"piece ")
        else:
            self.transport.unregisterProducer()
            self.transport.write(b"all")

    def pauseProducing(self) -> None: ...

    def stopProducing(self) -> None: ...


def pause_for_a_moment(protocol: Acting) -> None:
    protocol.transport.pauseProducing()

    def resume() -> None:
        protocol.factory.events.append("resumed")
        protocol.transport.resumeProducing()

    reactor.callLater(0.1, resume)


def push(protocol: Acting) -> None:
    producer = Producer(protocol.transport)
    protocol.transport.registerProducer(producer, True)
    while protocol.transport.producer is producer:
        producer.resumeProducing()


def write_much_and_close(protocol: Acting) -> None:
    protocol.transport.write(b"0123456789" * 200_000)
    protocol.transport.loseConnection()


def start_tls(protocol: Acting) -> None:
    file = str(protocol.factory.certificate)
    protocol.transport.startTLS(DefaultOpenSSLContextFactory(file, file), protocol.factory)
    protocol.transport.write(b"inside, all")


def set_options(protocol: Acting) -> None:
    transport = protocol.transport
    transport.setTcpNoDelay(True)
    transport.setTcpKeepAlive(True)
    peer, host = transport.getPeer(), transport.getHost()
    facts = transport.getTcpNoDelay(), transport.getTcpKeepAlive(), peer.host, host.host, transport.logstr[:6]
    transport.write(repr(facts).encode() + b"all")


def name_interfaces(protocol: Acting) -> None:
    names = sorted(
        name
        for name, interface in vars(interfaces).items()
        if isinstance(interface, InterfaceClass) and interface.providedBy(protocol.transport)
    )
    protocol.transport.write(" ".join([*names, "all"]).encode())


ACTS: dict[str, Callable[[Acting], object]] = {
    "pauses for a moment": pause_for_a_moment,
    "pauses and resumes": lambda protocol: (
        protocol.transport.pauseProducing(),
        protocol.transport.resumeProducing(),
    ),
    "stops producing": lambda protocol: protocol.transport.stopProducing(),
    "closes": lambda protocol: protocol.transport.loseConnection(),
    "closes its direction": lambda protocol: protocol.transport.loseWriteConnection(),
    "aborts": lambda protocol: protocol.transport.abortConnection(),
    "writes": lambda protocol: protocol.transport.write(b"hello all"),
    "writes a sequence": lambda protocol: protocol.transport.writeSequence([b"hello ", b"all"]),
    "writes much and closes": write_much_and_close,
    "registers a pull producer": lambda protocol: protocol.transport.registerProducer(
        Producer(protocol.transport), False
    ),
    "registers a push producer": push,
    "starts TLS": start_tls,
    "sets TCP options": set_options,
    "looks at its interfaces": name_interfaces,
}


#: The acts that end with a word to the client.
GREETING = {
    "writes",
    "writes a sequence",
    "registers a pull producer",
    "registers a push producer",
    "starts TLS",
    "sets TCP options",
    "looks at its interfaces",
}

#: The acts after which the server answers nothing.
ENDING = {"stops producing", "closes", "closes its direction", "aborts", "writes much and closes"}


def talk(port: int, act: str) -> tuple[bytes, str]:
    """
    What a client receives that hears the greeting, if there is one, and says hello, unless that would
    come too late; and how it ended.
    """
    received = b""
    try:
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as raw:
            client = ssl._create_unverified_context().wrap_socket(raw) if act == "starts TLS" else raw
            for end in (b"all" if act in GREETING else b"", b">"):
                while not received.endswith(end):
                    chunk = client.recv(65536)
                    if not chunk:
                        return received, "closed"
                    received += chunk
                if end != b">" and act not in ENDING:
                    client.sendall(b"hello")
            client.close()
    except OSError as error:
        return received, type(error).__name__
    return received, "answered"


async def conversation(act: str, way: str, certificate: Path) -> object:
    """
    What the client received, and what the server was told.
    """
    server = Factory.forProtocol(Acting)
    server.act, server.events, server.certificate = ACTS[act], [], certificate
    limiter = Limiter(0 if way == "waited" else 1)
    factory = server if way == "bare" else LimitingFactory(server, limiter)
    port = await serverFromString(reactor, "tcp:0:interface=127.0.0.1").listen(factory)
    client = deferToThread(talk, port.getHost().port, act)
    if way == "waited":
        await until(lambda: limiter.waiting == 1)
        limiter.max_connections = 1
    seen = await patiently(client)
    await until(lambda: server.events[-1].startswith("Connection"))
    await patiently(port.stopListening())
    assert (limiter.active, limiter.snapshot().reclaimed) == (0, 0)
    return seen, server.events


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("act", ACTS)
@ensureDeferred
async def test_what_a_server_does_when_it_is_connected_has_the_same_effect(
    act: str, way: str, certificate: Path
) -> None:
    bare = await conversation(act, "bare", certificate)
    assert await conversation(act, way, certificate) == bare


class Recording(ClientFactory):
    """
    Records what a factory can be told.
    """

    noisy = False
    protocol = Protocol

    def __init__(self) -> None:
        self.told: list[object] = []

    def doStart(self) -> None:
        self.told.append("doStart")
        super().doStart()

    def doStop(self) -> None:
        self.told.append("doStop")
        super().doStop()

    def startFactory(self) -> None:
        self.told.append("startFactory")

    def stopFactory(self) -> None:
        self.told.append("stopFactory")

    def startedConnecting(self, connector: object) -> None:
        self.told.append(("startedConnecting", connector))

    def clientConnectionFailed(self, connector: object, reason: object) -> None:
        self.told.append(("clientConnectionFailed", connector, reason))

    def clientConnectionLost(self, connector: object, reason: object) -> None:
        self.told.append(("clientConnectionLost", connector, reason))


@ensureDeferred
async def test_a_factory_is_started_and_stopped_as_often_and_in_the_same_order() -> None:
    told = []
    for limited in (False, True):
        server = Recording()
        factory = LimitingFactory(server, Limiter(1)) if limited else server
        endpoint = serverFromString(reactor, "tcp:0:interface=127.0.0.1")
        ports = [await endpoint.listen(factory), await endpoint.listen(factory)]
        server.told.append(server.numPorts)
        for port in ports:
            await patiently(port.stopListening())
        assert factory.numPorts == 0
        assert factory.noisy is False
        told.append(server.told)
    assert told[0] == told[1]
    assert told[1] == ["doStart", "startFactory", "doStart", 2, "doStop", "doStop", "stopFactory"]


@ensureDeferred
async def test_a_client_factory_is_told_of_its_connections() -> None:
    server = Recording()
    factory = LimitingFactory(server, Limiter(1))
    listening = await serverFromString(reactor, "tcp:0:interface=127.0.0.1").listen(
        Factory.forProtocol(Protocol)
    )
    connector = reactor.connectTCP("127.0.0.1", listening.getHost().port, factory)
    await until(lambda: factory.limiter.active == 1)
    connector.disconnect()
    await until(lambda: "stopFactory" in server.told)
    assert [each if isinstance(each, str) else each[0] for each in server.told] == [
        "doStart",
        "startFactory",
        "startedConnecting",
        "clientConnectionLost",
        "doStop",
        "stopFactory",
    ]
    assert factory.limiter.snapshot().finished == 1
    await patiently(listening.stopListening())


@pytest.mark.parametrize("way", WAYS)
@ensureDeferred
async def test_a_clients_certificate_is_seen(way: str, certificate: Path) -> None:
    from twisted.internet.ssl import Certificate, PrivateCertificate

    private = PrivateCertificate.loadPEM(certificate.read_text())
    options = private.options(Certificate.loadPEM(certificate.read_text()))
    seen = []

    class Looking(Protocol):
        def dataReceived(self, data: bytes) -> None:
            seen.append(self.transport.getPeerCertificate().digest("sha256"))
            self.transport.loseConnection()

    server: Any = Factory.forProtocol(Looking)
    limiter = Limiter(0 if way == "waited" else 1)
    if way != "bare":
        server = LimitingFactory(server, limiter)
    port = reactor.listenSSL(0, server, options, interface="127.0.0.1")

    def show() -> bytes:
        context = ssl.create_default_context(cafile=str(certificate))
        context.load_cert_chain(str(certificate))
        with (
            socket.create_connection(("127.0.0.1", port.getHost().port), PATIENCE) as raw,
            context.wrap_socket(raw, server_hostname="localhost") as client,
        ):
            client.sendall(b"look")
            return client.recv(1)

    client = deferToThread(show)
    if way == "waited":
        await until(lambda: limiter.waiting == 1)
        limiter.max_connections = 1
    assert await patiently(client) == b""
    assert seen == [private.original.digest("sha256")]
    await patiently(port.stopListening())


class Greedy(Protocol):
    """
    Reads nothing for a while in mid-stream, and keeps what it gets.
    """

    def connectionMade(self) -> None:
        self.factory.received = []

    def dataReceived(self, data: bytes) -> None:
        self.factory.received.append(data)
        if sum(map(len, self.factory.received)) == self.factory.expected:
            self.transport.write(b".")
        if len(self.factory.received) == 1:
            self.transport.pauseProducing()
            reactor.callLater(0.2, self.transport.resumeProducing)


@pytest.mark.parametrize("way", WAYS)
@ensureDeferred
async def test_tls_that_is_paused_in_mid_stream_loses_nothing_and_keeps_order(
    way: str, certificate: Path
) -> None:
    server = Factory.forProtocol(Greedy)
    limiter = Limiter(0 if way == "waited" else 1)
    endpoint = serverFromString(reactor, f"ssl:0:privateKey={certificate}:interface=127.0.0.1")
    port = await endpoint.listen(server if way == "bare" else LimitingFactory(server, limiter))
    sent = b"".join(b"%08d" % number for number in range(100_000))
    server.expected = len(sent)

    def send() -> None:
        context = ssl.create_default_context(cafile=str(certificate))
        with (
            socket.create_connection(("127.0.0.1", port.getHost().port), PATIENCE) as raw,
            context.wrap_socket(raw, server_hostname="localhost") as client,
        ):
            client.sendall(sent)
            assert client.recv(1) == b"."

    client = deferToThread(send)
    if way == "waited":
        await until(lambda: limiter.waiting == 1)
        limiter.max_connections = 1
    await patiently(client)
    assert b"".join(server.received) == sent
    await patiently(port.stopListening())


@ensureDeferred
async def test_a_tls_connection_that_waits_has_not_begun_its_handshake(certificate: Path) -> None:
    limiter = Limiter(0)
    endpoint = serverFromString(reactor, f"ssl:0:privateKey={certificate}:interface=127.0.0.1")
    port = await endpoint.listen(LimitingFactory(Factory.forProtocol(Protocol), limiter))

    def shake_hands() -> bytes:
        context = ssl._create_unverified_context()
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = context.wrap_bio(incoming, outgoing)
        with suppress(ssl.SSLWantReadError):
            session.do_handshake()
        with socket.create_connection(("127.0.0.1", port.getHost().port), 0.3) as client:
            client.sendall(outgoing.read())
            try:
                return client.recv(1)
            except TimeoutError:
                return b"no answer"

    assert await patiently(deferToThread(shake_hands)) == b"no answer"
    assert limiter.snapshot().accepted == 1
    await patiently(port.stopListening())
    await patiently(limiter.drain(0))


class Naming(Protocol):
    """
    Tells its factory what the transports below it are called.
    """

    def connectionMade(self) -> None:
        transport = lowest(self.transport)
        names = f"{transport!r} {transport.logstr} {transport.logPrefix()}"
        self.factory.names = names.replace(str(transport.getHost().port), "PORT")
        self.transport.loseConnection()


@pytest.mark.parametrize("kind", ["tcp", "ssl"])
@ensureDeferred
async def test_transports_are_called_as_without_a_limiter(kind: str, certificate: Path) -> None:
    names = set()
    for way in WAYS:
        server = Factory.forProtocol(Naming)
        limiter = Limiter(0 if way == "waited" else 1)
        where = f"ssl:0:privateKey={certificate}" if kind == "ssl" else "tcp:0"
        endpoint = serverFromString(reactor, f"{where}:interface=127.0.0.1")
        port = await endpoint.listen(server if way == "bare" else LimitingFactory(server, limiter))
        client = socket.create_connection(("127.0.0.1", port.getHost().port))
        if way == "waited":
            await until(lambda limiter=limiter: limiter.waiting == 1)
            limiter.max_connections = 1
        await until(lambda server=server: hasattr(server, "names"))
        client.close()
        names.add(server.names)
        await patiently(port.stopListening())
        await until(lambda limiter=limiter: limiter.active == 0)
    assert len(names) == 1, names
    assert "Naming" in names.pop()
