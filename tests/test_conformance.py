"""
A limited server cannot be told from a bare one: the same conversations, and the same callbacks.
"""

from __future__ import annotations

import array
import ftplib
import hashlib
import http.client
import imaplib
import inspect
import json
import os
import poplib
import smtplib
import socket
import ssl
import struct
import subprocess
import sys
import xmlrpc.client
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from support.clients import read_all
from support.patience import PATIENCE
from support.programs import require_program
from support.sockets import patiently
from support.tls import make_certificate, talk_tls
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.threads import deferToThread
from twisted.protocols.amp import AMP, Box, Command, Integer, StartTLS, parseString
from twisted.spread import pb

pytest.importorskip("autobahn")
pytest.importorskip("klein")
pytest.importorskip("OpenSSL")

REACTORS = ("epoll", "poll", "select", "asyncio")
WAYS = ("bare", "room", "waited")


class Servers:
    """
    The processes that run every server, one for each way and reactor, started when they are needed.
    """

    def __init__(self, folder: Path, certificate: Path) -> None:
        self.folder = folder
        self.certificate = certificate
        (folder / "sites").mkdir()
        (folder / "sites" / "localhost.pem").write_bytes(certificate.read_bytes())
        (folder / "block").write_bytes(bytes(range(256)) * 4096)
        self.bare: dict[tuple[str, str], object] = {}
        self._running: dict[tuple[str, str], tuple[subprocess.Popen[str], dict[str, Any]]] = {}

    def where(self, way: str, reactor_name: str) -> dict[str, Any]:
        """
        Where each server listens in that way and on that reactor.
        """
        if (way, reactor_name) not in self._running:
            script = Path(__file__).with_name("conformance_server.py")
            with (self.folder / f"{way}-{reactor_name}.log").open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, str(script), way, reactor_name, str(self.folder)],
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            self._running[way, reactor_name] = process, json.loads(process.stdout.readline())
        return self._running[way, reactor_name][1]

    def stop(self) -> None:
        """
        End all of them.
        """
        for process, _ in self._running.values():
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("conformance")
    subprocess.run(
        [require_program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "ssh")],
        check=True,
    )
    running = Servers(folder, make_certificate(folder))
    yield running
    running.stop()


def connect(where: int | str) -> socket.socket:
    """
    A connection to a port, or to a path.
    """
    if isinstance(where, str):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(PATIENCE)
        connection.connect(where)
        return connection
    return socket.create_connection(("127.0.0.1", where), PATIENCE)


def receive(connection: socket.socket, count: int) -> bytes:
    """
    Exactly so many bytes, or fewer if the connection ends before.
    """
    received = b""
    while len(received) < count and (chunk := connection.recv(count - len(received))):
        received += chunk
    return received


def receive_until(connection: socket.socket, end: bytes) -> bytes:
    """
    Everything up to these bytes, or to the end of the connection.
    """
    received = b""
    while not received.endswith(end) and (chunk := connection.recv(1)):
        received += chunk
    return received


def without_date(response: bytes) -> bytes:
    return b"\r\n".join(
        line for line in response.split(b"\r\n") if not line.lower().startswith((b"date:", b"last-m"))
    )


# One conversation for each row: what the client saw.


def web_keep_alive(port: int) -> object:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    seen = []
    for path in ("/page", "/nothing", "/page"):
        connection.request("GET", path)
        response = connection.getresponse()
        seen.append((response.status, response.read()))
    connection.close()
    return seen


def web_pipelining(port: int) -> object:
    with connect(port) as client:
        client.sendall(b"GET /page HTTP/1.1\r\nhost: x\r\n\r\n" * 3 + b"GET /page HTTP/1.0\r\n\r\n")
        return without_date(read_all(client))


def web_100_continue(port: int) -> object:
    with connect(port) as client:
        client.sendall(
            b"POST /upload HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n"
        )
        go_on = receive_until(client, b"\r\n\r\n")
        client.sendall(b"hello")
        return go_on, without_date(receive_until(client, b"\r\n\r\n")), receive(client, 64)


def web_large_upload(port: int) -> object:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("POST", "/upload", b"0123456789" * 300_000)
    answer = connection.getresponse().read()
    connection.close()
    return answer


def web_streaming_producer(port: int) -> object:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("GET", "/block")
    digest = hashlib.sha256(connection.getresponse().read()).hexdigest()
    connection.close()
    return digest


def web_vanishing_client(port: int) -> object:
    with connect(port) as client:
        client.sendall(b"POST /upload HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\nnot all")
    return web_keep_alive(port)


def http2(port: int) -> object:
    done = subprocess.run(
        [
            require_program("curl"),
            "-sk",
            "--http2",
            "-w",
            " %{http_version}",
            f"https://localhost:{port}/page",
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return done.stdout, done.returncode


def websocket_echo(port: int, wrap: Callable[[socket.socket], socket.socket] = lambda raw: raw) -> object:
    with wrap(connect(port)) as client:
        client.sendall(
            b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        upgraded = receive_until(client, b"\r\n\r\n").split(b"\r\n")[0]
        frames = []
        for text in (b"hello", b"again"):
            client.sendall(bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text)
            frames.append(receive(client, 2 + len(text)))
        client.sendall(bytes([0x88, 0x82, 0, 0, 0, 0]) + struct.pack(">H", 1000))
        return upgraded, frames, read_all(client)


def websocket_echo_on_tls(port: int) -> object:
    context = ssl._create_unverified_context()
    return websocket_echo(port, lambda raw: context.wrap_socket(raw))


def page(port: int) -> object:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("GET", "/page")
    response = connection.getresponse()
    seen = response.status, response.read()
    connection.close()
    return seen


def wsgi(port: int) -> object:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("POST", "/", b"the body")
    seen = connection.getresponse().read()
    connection.close()
    return seen


def xml_rpc(port: int) -> object:
    with xmlrpc.client.ServerProxy(f"http://127.0.0.1:{port}/") as proxy:
        return proxy.add(2, 3)


def smtp_starttls(port: int) -> object:
    with smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE, local_hostname="client.example") as client:
        seen = [
            client.ehlo()[0],
            client.starttls(context=ssl._create_unverified_context())[0],
            client.ehlo()[0],
        ]
        seen.append(
            client.sendmail("a@example.com", ["b@example.com"], "Subject: x\r\n\r\n" + "text\r\n" * 500)
        )
        return seen


def imap(port: int) -> object:
    client = imaplib.IMAP4("127.0.0.1", port, PATIENCE)
    return [client.login("somebody", "secret")[0], client.select("INBOX"), client.logout()[0]]


def pop3(port: int) -> object:
    client = poplib.POP3("127.0.0.1", port, PATIENCE)
    return client.capa(), client.quit()


def ftp_pasv(port: int) -> object:
    client = ftplib.FTP(timeout=PATIENCE)
    client.connect("127.0.0.1", port)
    blocks: list[bytes] = []
    seen = [client.login(), client.pwd(), client.retrbinary("RETR block", blocks.append)]
    seen.append(hashlib.sha256(b"".join(blocks)).hexdigest())
    seen.append(client.quit())
    return seen


def telnet(port: int) -> object:
    with connect(port) as client:
        asked = receive_until(client, b"? ")
        client.sendall(b"somebody\r\n")
        switched = receive_until(client, b"\n")
        client.sendall(b"quiet")
        return asked, switched, receive(client, 5)


async def perspective_broker(port: int) -> object:
    factory = pb.PBClientFactory()
    factory.noisy = False
    await patiently(TCP4ClientEndpoint(reactor, "127.0.0.1", port).connect(factory))
    root = await patiently(factory.getRootObject())
    total = await patiently(root.callRemote("add", 2, 3))
    factory.disconnect()
    return total


def amp(port: int) -> object:
    with connect(port) as client:
        client.sendall(Box({b"_command": b"Sum", b"_ask": b"1", b"one": b"2", b"two": b"3"}).serialize())
        return parseString(receive_until(client, b"\0\0"))[0].get(b"total")


async def amp_starttls(port: int) -> object:
    factory = Factory.forProtocol(ClosingAMP)
    client = await patiently(TCP4ClientEndpoint(reactor, "127.0.0.1", port).connect(factory))
    await patiently(client.callRemote(StartTLS, tls_verifyAuthorities=()))
    answer = await patiently(client.callRemote(Sum, one=2, two=3))
    client.transport.loseConnection()
    await patiently(client.closed)
    return answer


class ClosingAMP(AMP):
    """
    An AMP client that tells when its connection is over.
    """

    def __init__(self) -> None:
        super().__init__()
        self.closed: Deferred[None] = Deferred()

    def connectionLost(self, reason: object) -> None:
        super().connectionLost(reason)
        self.closed.callback(None)


class Sum(Command):
    """
    The command of the AMP servers.
    """

    arguments = [(b"one", Integer()), (b"two", Integer())]
    response = [(b"total", Integer())]


def ssh_command(port: int, folder: Path) -> list[str]:
    """
    The command line of an OpenSSH client that logs in.
    """
    options = ["BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
    command = [require_program("ssh"), "-F", "none", "-i", str(folder / "ssh"), "-p", str(port)]
    return [*command, *(part for option in options for part in ("-o", option)), "somebody@127.0.0.1"]


def ssh_exec(port: int, folder: Path) -> object:
    done = subprocess.run(
        [*ssh_command(port, folder), "who goes there"],
        capture_output=True,
        timeout=PATIENCE,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout, done.stderr, done.returncode


def ssh_forward(port: int, folder: Path, web: int) -> object:
    command = ssh_command(port, folder)
    done = subprocess.run(
        [*command[:-1], "-W", f"127.0.0.1:{web}", command[-1]],
        input=b"GET /page HTTP/1.0\r\n\r\n",
        capture_output=True,
        timeout=PATIENCE,
    )
    return without_date(done.stdout), done.returncode


def irc(port: int) -> object:
    with connect(port) as client:
        client.sendall(b"NICK somebody\r\n")
        return receive_until(client, b"Password?\r\n").rpartition(b":")[2]


def dns_over_tcp(port: int) -> object:
    question = struct.pack(">HHHHHH", 5, 0x0100, 1, 0, 0, 0) + b"\3www\7example\0" + struct.pack(">HH", 1, 1)
    with connect(port) as client:
        seen = []
        for _ in range(2):
            client.sendall(struct.pack(">H", len(question)) + question)
            (length,) = struct.unpack(">H", receive(client, 2))
            seen.append(receive(client, length))
        return seen


def socks(port: int, web: int) -> object:
    with connect(port) as client:
        client.sendall(struct.pack(">BBH", 4, 1, web) + socket.inet_aton("127.0.0.1") + b"somebody\0")
        granted = receive(client, 8)[:2]
        client.sendall(b"GET /page HTTP/1.0\r\n\r\n")
        return granted, without_date(read_all(client))


def line_receiver(port: int) -> object:
    raw = os.urandom(100_000)
    with connect(port) as client:
        seen = [receive_until(client, b"\n")]
        client.sendall(b"one\r\n100000\r\n" + raw + b"two\r\n")
        seen += [receive_until(client, b"\n") for _ in range(3)]
        return seen[:2], seen[2].strip() == b"raw " + hashlib.sha256(raw).hexdigest().encode(), seen[3]


def stateful(port: int) -> object:
    with connect(port) as client:
        client.sendall(b"abc12")
        client.sendall(b"345")
        return read_all(client)


def echo(where: int | str) -> object:
    with connect(where) as client:
        client.sendall(b"hello" * 1000)
        return receive(client, 5000)


def echo_tcp6(port: int) -> object:
    with socket.create_connection(("::1", port), PATIENCE) as client:
        client.sendall(b"hello")
        return receive(client, 5)


def echo_haproxy(port: int) -> object:
    with connect(port) as client:
        client.sendall(b"PROXY TCP4 192.0.2.1 127.0.0.1 5 6\r\nhello")
        return receive(client, 5)


def half_close(port: int) -> object:
    with connect(port) as client:
        client.sendall(b"all of it" * 50_000)
        client.shutdown(socket.SHUT_WR)
        return read_all(client)


def descriptors(path: str) -> object:
    reading, writing = os.pipe()
    os.write(writing, b"the word")
    os.close(writing)
    with connect(path) as client:
        client.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [reading]))])
        os.close(reading)
        return receive(client, len(b"descriptor holds the word"))


CONVERSATIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "web: keep-alive": ("web", web_keep_alive),
    "web: pipelining": ("web", web_pipelining),
    "web: 100-continue": ("web", web_100_continue),
    "web: large upload": ("web", web_large_upload),
    "web: streaming producer": ("web", web_streaming_producer),
    "web: client vanishes": ("web", web_vanishing_client),
    "HTTP/2 inside TLS": ("h2", http2),
    "HTTP/2, TLS inside": ("h2 around TLS", http2),
    "twisted.web.websocket": ("websocket", websocket_echo),
    "Autobahn WebSocketResource": ("autobahn", websocket_echo),
    "Autobahn inside TLS": ("autobahn on ssl", websocket_echo_on_tls),
    "klein": ("klein", page),
    "WSGI": ("wsgi", wsgi),
    "XML-RPC": ("xmlrpc", xml_rpc),
    "SMTP with STARTTLS": ("smtp", smtp_starttls),
    "IMAP4": ("imap", imap),
    "POP3": ("pop3", pop3),
    "FTP with PASV": ("ftp", ftp_pasv),
    "telnet, protocol switched": ("telnet", telnet),
    "Perspective Broker": ("pb", perspective_broker),
    "AMP": ("amp", amp),
    "AMP with StartTLS": ("amp with TLS", amp_starttls),
    "SSH: exec": ("ssh", ssh_exec),
    "SSH: port forward": ("ssh", ssh_forward),
    "IRC": ("irc", irc),
    "DNS over TCP": ("dns", dns_over_tcp),
    "SOCKS": ("socks", socks),
    "portforward": ("portforward", page),
    "LineReceiver, raw mode": ("linereceiver", line_receiver),
    "StatefulProtocol": ("stateful", stateful),
    "UNIX descriptors": ("descriptors", descriptors),
    "half-close both ways": ("half-close", half_close),
    "echo on tcp": ("echo", echo),
    "echo on tcp6": ("echo on tcp6", echo_tcp6),
    "echo on unix": ("echo on unix", echo),
    "echo on ssl": ("echo on ssl", talk_tls),
    "echo on tls": ("echo on tls", talk_tls),
    "echo behind haproxy": ("echo behind haproxy", echo_haproxy),
    "echo on an adopted socket": ("echo on an adopted socket", echo),
}


async def converse(servers: Servers, row: str, way: str, reactor_name: str) -> object:
    """
    What the client of a row saw, and what the server was called with.
    """
    name, conversation = CONVERSATIONS[row]
    where = servers.where(way, reactor_name)
    if name not in where:
        pytest.skip("this Twisted has no such server")
    arguments = [where[name]]
    if conversation in (ssh_exec, ssh_forward):
        arguments.append(servers.folder)
    if conversation in (socks, ssh_forward):
        arguments.append(where["web"])
    if conversation is talk_tls:
        arguments += [servers.certificate, b"hello" * 10_000]
    waited_before, before = await deferToThread(records, where["records"], name)
    if inspect.iscoroutinefunction(conversation):
        seen = await conversation(*arguments)
    else:
        seen = await patiently(deferToThread(conversation, *arguments))
    began = reactor.seconds()
    # A protocol that is replaced while it runs is not told of the end by the method we recorded.
    replaced = ("websocket", "autobahn", "autobahn on ssl", "h2", "h2 around TLS")
    patience = 0.3 if name in replaced else PATIENCE
    while reactor.seconds() - began < patience:
        waited, so_far = await deferToThread(records, where["records"], name)
        callbacks = so_far[len(before) :]
        if callbacks and all(calls[-1] == "connectionLost" for calls in callbacks):
            break
    assert (waited > waited_before) == (way == "waited")
    return seen, callbacks


def records(port: int, name: str) -> tuple[int, list[list[str]]]:
    """
    How many connections have waited so far, and the callbacks of a server connection by connection.
    """
    with connect(port) as client:
        client.sendall(name.encode())
        waits, callbacks = json.loads(read_all(client))
        return waits, callbacks


@pytest.mark.parametrize("reactor_name", REACTORS)
@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("row", CONVERSATIONS)
@ensureDeferred
async def test_the_limited_server_is_like_the_bare_one(
    row: str, way: str, reactor_name: str, servers: Servers
) -> None:
    if (row, reactor_name) not in servers.bare:
        servers.bare[row, reactor_name] = await converse(servers, row, "bare", reactor_name)
    assert await converse(servers, row, way, reactor_name) == servers.bare[row, reactor_name]
