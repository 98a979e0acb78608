"""
Every server of the conformance table in one process: bare, limited with room, or limited so that all wait.

Run as: python conformance_server.py WAY REACTOR FOLDER. Prints where each server listens, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

WAY, REACTOR, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])

if REACTOR == "asyncio":
    from twisted.internet import asyncioreactor as chosen
elif REACTOR == "poll":
    from twisted.internet import pollreactor as chosen
elif REACTOR == "select":
    from twisted.internet import selectreactor as chosen
else:
    from twisted.internet import epollreactor as chosen
chosen.install()

import hashlib
import os
import socket
from contextlib import suppress
from functools import partial

from autobahn.twisted.resource import WebSocketResource
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from klein import Klein
from twisted.conch.avatar import ConchUser
from twisted.conch.checkers import InMemorySSHKeyDB, SSHPublicKeyChecker
from twisted.conch.interfaces import ISession
from twisted.conch.ssh import forwarding, keys
from twisted.conch.ssh.factory import SSHFactory
from twisted.conch.ssh.session import SSHSession
from twisted.conch.telnet import StatefulTelnetProtocol, TelnetTransport
from twisted.cred.checkers import AllowAnonymousAccess, InMemoryUsernamePasswordDatabaseDontUse
from twisted.cred.portal import IRealm, Portal
from twisted.internet import reactor
from twisted.internet.defer import succeed
from twisted.internet.endpoints import (
    AdoptedStreamServerEndpoint,
    serverFromString,
)
from twisted.internet.interfaces import (
    IFileDescriptorReceiver,
    IHalfCloseableProtocol,
    IHandshakeListener,
)
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import DefaultOpenSSLContextFactory, PrivateCertificate
from twisted.mail import imap4, pop3, smtp
from twisted.names import dns
from twisted.names import server as names
from twisted.names.common import ResolverBase
from twisted.protocols import amp, basic, ftp, portforward, socks, stateful
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python import components
from twisted.python.threadpool import ThreadPool
from twisted.spread import pb
from twisted.web import resource, server, static, wsgi, xmlrpc
from twisted.words import service as words
from zope.interface import implementer

from connlimit import Limiter, LimitingFactory
from connlimit.interfaces import ILimit

CERTIFICATE = str(FOLDER / "server.pem")
BLOCK = bytes(range(256)) * 4096


@implementer(ILimit)
class Turnstile:
    """
    Lets everybody through, but only after a moment in the queue.
    """

    def __init__(self) -> None:
        self._asked: set[object] = set()
        self._open: set[object] = set()

    def try_acquire(self, connection: object) -> bool:
        if connection not in self._asked:
            self._asked.add(connection)
            reactor.callLater(0.02, self._let_through, connection)
        return connection in self._open

    def _let_through(self, connection: object) -> None:
        self._open.add(connection)
        self._callback()

    def release(self, connection: object) -> None:
        pass

    def subscribe(self, callback: object) -> None:
        self._callback = callback


# By default nobody would work for a client that has left, as a bare server does.
LIMITER = Limiter(limits=[Turnstile()], departed_on_half_close=False) if WAY == "waited" else Limiter(1000)


class Root(resource.Resource):
    """
    A web site with something of everything.
    """

    def __init__(self) -> None:
        super().__init__()
        for name, child in {
            b"page": static.Data(b"the page", "text/plain"),
            b"block": static.File(str(FOLDER / "block")),
            b"upload": Upload(),
        }.items():
            self.putChild(name, child)


class Upload(resource.Resource):
    """
    Answers with the digest of what it is sent.
    """

    def render_POST(self, request: server.Request) -> bytes:
        return hashlib.sha256(request.content.read()).hexdigest().encode()


class EchoSocket(WebSocketServerProtocol):
    def onMessage(self, payload: bytes, is_binary: bool) -> None:
        self.sendMessage(payload, is_binary)


def autobahn_site() -> server.Site:
    factory = WebSocketServerFactory()
    factory.protocol = EchoSocket
    root = resource.Resource()
    root.putChild(b"ws", WebSocketResource(factory))
    return server.Site(root)


def websocket_site() -> server.Site | None:
    try:
        from twisted.web.websocket import WebSocketResource as TwistedWebSocketResource
    except ImportError:
        return None

    class Transcriber:
        def buildProtocol(self, request: object) -> object:
            return self

        def negotiationStarted(self, transport: object) -> None:
            self.transport = transport

        def negotiationFinished(self) -> None: ...

        def textMessageReceived(self, text: str) -> None:
            self.transport.sendTextMessage(text)

        def bytesMessageReceived(self, data: bytes) -> None: ...

        def pongReceived(self, payload: bytes) -> None: ...

        def connectionLost(self, reason: object) -> None: ...

    root = resource.Resource()
    root.putChild(b"ws", TwistedWebSocketResource(Transcriber()))
    return server.Site(root)


def klein_site() -> server.Site:
    app = Klein()

    @app.route("/page")
    def page(request: object) -> bytes:
        return b"klein's page"

    return server.Site(app.resource())


def wsgi_site() -> server.Site:
    pool = ThreadPool(1, 2)
    reactor.callWhenRunning(pool.start)
    reactor.addSystemEventTrigger("during", "shutdown", pool.stop)

    def application(environ: dict[str, object], start_response: object) -> list[bytes]:
        start_response("200 OK", [("content-type", "text/plain")])
        return [b"from WSGI: ", environ["wsgi.input"].read()]

    return server.Site(wsgi.WSGIResource(reactor, pool, application))


class Adder(xmlrpc.XMLRPC):
    def xmlrpc_add(self, one: int, two: int) -> int:
        return one + two


@implementer(smtp.IMessageDelivery, smtp.IMessage)
class Mailbox:
    def receivedHeader(self, helo: object, origin: object, recipients: object) -> bytes:
        return b"Received: here"

    def validateFrom(self, helo: object, origin: object) -> object:
        return origin

    def validateTo(self, user: object) -> object:
        return lambda: self

    def lineReceived(self, line: bytes) -> None: ...

    def eomReceived(self) -> object:
        return succeed(None)

    def connectionLost(self) -> None: ...


class MailFactory(smtp.SMTPFactory):
    def buildProtocol(self, addr: object) -> object:
        protocol = smtp.ESMTP(contextFactory=DefaultOpenSSLContextFactory(CERTIFICATE, CERTIFICATE))
        protocol.factory = self
        protocol.delivery = Mailbox()
        return protocol


class Pop(pop3.POP3):
    def authenticateUserPASS(self, user: bytes, password: bytes) -> object:
        return succeed((pop3.IMailbox, Letters(), lambda: None))


class Letters(pop3.Mailbox):
    def listMessages(self, index: int | None = None) -> object:
        return [11] if index is None else 11

    def getMessage(self, index: int) -> object:
        import io

        return io.BytesIO(b"the letter\n")


class Greeter(StatefulTelnetProtocol):
    """
    Asks for a name and switches to another protocol.
    """

    state = "Command"

    def connectionMade(self) -> None:
        self.transport.write(b"name? ")

    def telnet_Command(self, line: bytes) -> None:
        self.transport.protocol = Shouter()
        self.transport.protocol.makeConnection(self.transport)


class Shouter(Protocol):
    def connectionMade(self) -> None:
        self.transport.write(b"now shouting\r\n")

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data.upper())


class Adding(pb.Root):
    def remote_add(self, one: int, two: int) -> int:
        return one + two


class Sum(amp.Command):
    arguments = [(b"one", amp.Integer()), (b"two", amp.Integer())]
    response = [(b"total", amp.Integer())]


class Summing(amp.AMP):
    @Sum.responder
    def sum(self, one: int, two: int) -> dict[str, int]:
        return {"total": one + two}


@implementer(ISession)
class Sessions:
    """
    Runs one command, which says what it was asked.
    """

    def __init__(self, avatar: object) -> None: ...

    def execCommand(self, protocol: object, command: bytes) -> None:
        protocol.session.write(b"you said " + command)
        protocol.session.conn.sendRequest(protocol.session, b"exit-status", b"\0\0\0\7")
        protocol.session.conn.sendClose(protocol.session)

    def eofReceived(self) -> None: ...

    def closed(self) -> None: ...


class SshUser(ConchUser):
    def __init__(self) -> None:
        super().__init__()
        self.channelLookup.update(
            {b"session": SSHSession, b"direct-tcpip": forwarding.openConnectForwardingClient}
        )


components.registerAdapter(Sessions, SshUser, ISession)


@implementer(IRealm)
class SshRealm:
    def requestAvatar(self, avatar: bytes, mind: object, *interfaces: object) -> object:
        return interfaces[0], SshUser(), lambda: None


def ssh_factory() -> SSHFactory:
    factory = SSHFactory()
    key = keys.Key.fromFile(str(FOLDER / "ssh"))
    factory.publicKeys = {key.sshType(): key.public()}
    factory.privateKeys = {key.sshType(): key}
    known = InMemorySSHKeyDB({b"somebody": [key.public()]})
    factory.portal = Portal(SshRealm(), [SSHPublicKeyChecker(known)])
    return factory


class StartTls(amp.AMP):
    """
    An AMP server that starts TLS when it is asked.
    """

    @amp.StartTLS.responder
    def start(self) -> dict[str, object]:
        with open(CERTIFICATE) as file:
            return {"tls_localCertificate": PrivateCertificate.loadPEM(file.read())}

    @Sum.responder
    def sum(self, one: int, two: int) -> dict[str, int]:
        return {"total": one + two}


class Fixed(ResolverBase):
    def _lookup(self, name: object, cls: int, kind: int, timeout: object) -> object:
        return succeed(([dns.RRHeader(name, dns.A, dns.IN, 60, dns.Record_A("192.0.2.7"))], [], []))


class Switching(basic.LineReceiver):
    """
    A line with a number, then so many raw bytes, then lines again.
    """

    def connectionMade(self) -> None:
        self.sendLine(b"ready")

    def lineReceived(self, line: bytes) -> None:
        if line.isdigit():
            self.wanted, self.got = int(line), b""
            self.setRawMode()
        else:
            self.sendLine(b"line " + line)

    def rawDataReceived(self, data: bytes) -> None:
        self.got += data
        if len(self.got) >= self.wanted:
            self.sendLine(b"raw " + hashlib.sha256(self.got[: self.wanted]).hexdigest().encode())
            self.setLineMode(self.got[self.wanted :])


class Stateful(stateful.StatefulProtocol):
    def getInitialState(self) -> object:
        return self.gotFirst, 3

    def gotFirst(self, data: bytes) -> object:
        self.transport.write(b"first " + data + b"\n")
        return self.gotSecond, 5

    def gotSecond(self, data: bytes) -> object:
        self.transport.write(b"second " + data + b"\n")
        self.transport.loseConnection()


@implementer(IFileDescriptorReceiver)
class Descriptors(Protocol):
    """
    Answers with what can be read from the descriptors that it is sent.
    """

    def fileDescriptorReceived(self, descriptor: int) -> None:
        with os.fdopen(descriptor, "rb") as file:
            self.transport.write(b"descriptor holds " + file.read())

    def dataReceived(self, data: bytes) -> None: ...


class Echo(Protocol):
    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)


@implementer(IHandshakeListener)
class HandshakeEcho(Echo):
    """
    Echoes after it has said so when the handshake was done.
    """

    def handshakeCompleted(self) -> None:
        self.transport.write(b"shaken ")


@implementer(IHalfCloseableProtocol)
class HalfClosing(Protocol):
    """
    Answers when its client has said all.
    """

    said = b""

    def dataReceived(self, data: bytes) -> None:
        self.said += data

    def readConnectionLost(self) -> None:
        self.transport.write(hashlib.sha256(self.said).hexdigest().encode())
        self.transport.loseWriteConnection()

    def writeConnectionLost(self) -> None:
        self.transport.loseConnection()


@implementer(IRealm)
class MailRealm:
    def requestAvatar(self, avatar: bytes, mind: object, *interfaces: object) -> object:
        account = imap4.MemoryAccount(avatar)
        account.addMailbox("INBOX", EmptyMailbox())
        return imap4.IAccount, account, lambda: None


@implementer(imap4.IMailbox)
class EmptyMailbox:
    def getFlags(self) -> list[str]:
        return ["\\Seen"]

    def getUIDValidity(self) -> int:
        return 7

    def getUIDNext(self) -> int:
        return 1

    def getMessageCount(self) -> int:
        return 0

    def getRecentCount(self) -> int:
        return 0

    def isWriteable(self) -> bool:
        return True

    def getHierarchicalDelimiter(self) -> str:
        return "/"

    def addListener(self, listener: object) -> None: ...

    def removeListener(self, listener: object) -> None: ...


class Imap(imap4.IMAP4Server):
    portal = Portal(MailRealm(), [InMemoryUsernamePasswordDatabaseDontUse(somebody=b"secret")])

    def __init__(self) -> None:
        super().__init__()
        self.portal = Imap.portal


def ftp_factory() -> ftp.FTPFactory:
    return ftp.FTPFactory(Portal(ftp.FTPRealm(str(FOLDER)), [AllowAnonymousAccess()]))


def irc_factory() -> words.IRCFactory:
    realm = words.InMemoryWordsRealm("irc.example")
    return words.IRCFactory(
        realm, Portal(realm, [InMemoryUsernamePasswordDatabaseDontUse(somebody=b"secret")])
    )


def of(protocol: type[Protocol]) -> Factory:
    return Factory.forProtocol(protocol)


SERVERS: dict[str, object] = {
    "web": server.Site(Root()),
    "websocket": websocket_site(),
    "autobahn": autobahn_site(),
    "klein": klein_site(),
    "wsgi": wsgi_site(),
    "xmlrpc": server.Site(Adder()),
    "smtp": MailFactory(),
    "imap": of(Imap),
    "pop3": of(Pop),
    "ftp": ftp_factory(),
    "telnet": of(lambda: TelnetTransport(Greeter)),
    "pb": pb.PBServerFactory(Adding()),
    "amp": of(Summing),
    "amp with TLS": of(StartTls),
    "ssh": ssh_factory(),
    "irc": irc_factory(),
    "dns": names.DNSServerFactory(clients=[Fixed()]),
    "socks": socks.SOCKSv4Factory(None),
    "linereceiver": of(Switching),
    "stateful": of(Stateful),
    "echo": of(Echo),
}


def recorded(name: str, factory: object) -> object:
    """
    The factory, its protocols' callbacks written down by name.
    """
    build = factory.buildProtocol

    def build_recorded(address: object) -> object:
        protocol = build(address)
        events = RECORDS.setdefault(name, [])
        mine: list[str] = ["built"]
        events.append(mine)

        def wrap(method: str) -> None:
            original = getattr(protocol, method)

            def recording(*arguments: object) -> object:
                if mine[-1] != method:
                    mine.append(method)
                return original(*arguments)

            setattr(protocol, method, recording)

        for method in CALLBACKS:
            if hasattr(protocol, method):
                wrap(method)
        return protocol

    factory.buildProtocol = build_recorded
    return factory


RECORDS: dict[str, list[list[str]]] = {}

#: What a protocol may be told.
CALLBACKS = (
    "makeConnection",
    "dataReceived",
    "handshakeCompleted",
    "fileDescriptorReceived",
    "readConnectionLost",
    "writeConnectionLost",
    "connectionLost",
)


class Records(Protocol):
    """
    Tells how many connections have waited, and a server's callbacks connection by connection.
    """

    def dataReceived(self, data: bytes) -> None:
        callbacks = RECORDS.get(data.decode(), [])
        self.transport.write(json.dumps([LIMITER.snapshot().waits, callbacks]).encode())
        self.transport.loseConnection()


def main() -> None:
    """
    Listen on everything, and tell where.
    """
    where: dict[str, object] = {}

    def listen_bare(name: str, endpoint: object, factory: object) -> None:
        def listening(port: object) -> None:
            host = port.getHost()
            where[name] = getattr(host, "port", None) or host.name.decode()

        endpoint.listen(factory).addCallback(listening)

    def listen(name: str, endpoint: object, factory: object, inside: object = lambda each: each) -> None:
        """
        Listen the way that is asked for, with *inside* between the limiter and the server.
        """
        factory = inside(recorded(name, factory))
        listen_bare(name, endpoint, factory if WAY == "bare" else LimitingFactory(factory, LIMITER))

    def local(description: str = "tcp:0:interface=127.0.0.1") -> object:
        return serverFromString(reactor, description)

    for name, factory in SERVERS.items():
        if factory is not None:
            listen(name, local(), factory)
    context = DefaultOpenSSLContextFactory(CERTIFICATE, CERTIFICATE)
    on_ssl = f"ssl:0:privateKey={CERTIFICATE}:interface=127.0.0.1"
    listen("h2", local(on_ssl), server.Site(Root()))
    listen("h2 around TLS", local(), server.Site(Root()), partial(TLSMemoryBIOFactory, context, False))
    listen("autobahn on ssl", local(on_ssl), autobahn_site())
    listen("portforward", local(), portforward.ProxyFactory("127.0.0.1", where["web"]))
    listen("echo on tcp6", local(r"tcp6:0:interface=\:\:1"), of(Echo))
    listen("echo on unix", local(f"unix:{FOLDER}/{WAY}-{REACTOR}.socket"), of(Echo))
    listen("descriptors", local(f"unix:{FOLDER}/{WAY}-{REACTOR}-fd.socket"), of(Descriptors))
    listen("echo on ssl", local(on_ssl), of(HandshakeEcho))
    with suppress(ValueError):  # older Twisteds know no such endpoint
        listen("echo on tls", local(f"tls:{FOLDER}/sites:0:interface=127.0.0.1"), of(HandshakeEcho))
    listen("echo behind haproxy", local("haproxy:tcp:0:interface=127.0.0.1"), of(Echo))
    listen("half-close", local(), of(HalfClosing))
    adopted = socket.create_server(("127.0.0.1", 0))
    adopted.setblocking(False)
    listen(
        "echo on an adopted socket",
        AdoptedStreamServerEndpoint(reactor, adopted.detach(), socket.AF_INET),
        of(Echo),
    )
    listen_bare("records", local(), of(Records))
    print(json.dumps(where), flush=True)


reactor.callWhenRunning(main)
reactor.run()
