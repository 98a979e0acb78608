"""
What a program does when it is told to stop, side by side with what Twisted alone does.
"""

from __future__ import annotations

import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.applications import Running, ask
from support.clients import free_port, read_all
from support.patience import PATIENCE
from support.programs import Program, running
from support.tls import make_certificate

LOCAL = "tcp:0:interface=127.0.0.1"

#: Smaller than what a kernel holds for a connection, and so large that no kernel does.
LARGE, HUGE = 1_500_000, 30_000_000

#: A web site whose page takes a second.
SLOW = """
from twisted.internet import reactor
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site

class Page(Resource):
    isLeaf = True

    def render_GET(self, request):
        reactor.callLater(float(request.args[b"seconds"][0]), self.finish, request)
        return NOT_DONE_YET

    def finish(self, request):
        request.write(b"the page")
        request.finish()

site = Site(Page())
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "large").write_bytes(bytes(LARGE))
    (tmp_path / "huge").write_bytes(bytes(HUGE))
    (tmp_path / "slow.py").write_text(SLOW)
    return tmp_path


def asking(port: int, path: str) -> socket.socket:
    """
    A client of HTTP that has asked for something.
    """
    client = socket.create_connection(("127.0.0.1", port), PATIENCE)
    client.sendall(f"GET /{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return client


def body(client: socket.socket, length: int) -> int:
    """
    How many bytes of a body of this length a client receives.
    """
    with client, client.makefile("rb") as file:
        while file.readline() != b"\r\n":
            pass
        received = 0
        try:
            while received < length and (chunk := file.read(min(65536, length - received))):
                received += len(chunk)
        except ConnectionResetError:
            pass
        return received


def end(program: Program) -> float:
    """
    Wait until a program that was told to stop has ended; how many seconds that took.
    """
    began = time.monotonic()
    program.process.wait(PATIENCE)
    return time.monotonic() - began


def wait_until_closed(port: int) -> None:
    """
    Wait until nobody listens at a port any more.
    """
    began = time.monotonic()
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), PATIENCE).close()
        except ConnectionError:
            return
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.01)


# What is being answered


WAYS = {
    "bare": ["web", f"--listen={LOCAL}", "--path=."],
    "string": ["web", f"--listen=connlimit:{LOCAL}:max_connections=5", "--path=."],
    "plugin": ["connlimit", "--max-connections=5", "web", f"--listen={LOCAL}", "--path=."],
    "drained plugin": [
        *("connlimit", "--max-connections=5", "--drain-timeout=300ms"),
        *("web", f"--listen={LOCAL}", "--path=."),
    ],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_slow_reader_gets_the_whole_answer_as_from_a_bare_server(way: str, files: Path) -> None:
    with running(*WAYS[way], cwd=files) as program, asking(program.port(), "large") as client:
        client.recv(100, socket.MSG_PEEK)
        time.sleep(0.3)  # until the kernel has all that it can hold
        program.process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert body(client, LARGE) == LARGE


def test_what_is_being_read_at_the_end_of_the_drain_is_read_to_its_end(files: Path) -> None:
    way = [*WAYS["drained plugin"][:2], "--drain-timeout=100ms", *WAYS["drained plugin"][3:]]
    with running(*way, cwd=files) as program, asking(program.port(), "huge") as client:
        client.recv(100, socket.MSG_PEEK)
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("1 connections did not end in time and are closed")
        time.sleep(0.5)
        assert program.process.poll() is None
        assert body(client, HUGE) == HUGE
        assert end(program) < 5
        assert program.process.returncode == 0
        assert "aborted" not in program.output


def test_who_reads_nothing_any_more_is_aborted_after_the_drain(files: Path) -> None:
    way = [*WAYS["drained plugin"][:2], "--drain-timeout=100ms", *WAYS["drained plugin"][3:]]
    with running(*way, cwd=files) as program, asking(program.port(), "huge") as client:
        client.recv(100, socket.MSG_PEEK)
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("1 connections did not end in time and are closed")
        assert 3 < end(program) < 12
        program.wait_for("1 of the connections that were closed took too long and were aborted")
        assert body(client, HUGE) < HUGE


def test_without_a_drain_timeout_nobody_is_waited_for(files: Path) -> None:
    with running(*WAYS["plugin"], cwd=files) as program, asking(program.port(), "huge") as client:
        client.recv(100, socket.MSG_PEEK)
        assert program.terminate() == 0


# What is not being answered


def test_connections_without_a_request_do_not_hold_the_drain(files: Path) -> None:
    options = [f"--listen={LOCAL}", "--factory=slow:site", "--max-connections=5", "--drain-timeout=25"]
    with running("connlimit", *options, cwd=files) as program, ExitStack() as stack:
        port = program.port()
        kept = stack.enter_context(asking(port, "?seconds=0"))
        while b"the page" not in kept.recv(1000):
            pass
        for _ in range(2):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
        slow = stack.enter_context(asking(port, "?seconds=2"))
        time.sleep(0.3)  # until the request was read
        program.process.send_signal(signal.SIGTERM)
        assert kept.recv(100) == b""
        began = time.monotonic()
        while b"the page" not in slow.recv(1000):
            pass
        assert time.monotonic() - began > 1
        assert slow.recv(1000) == b""  # it has no request any more
        assert end(program) < 3


def test_a_relayed_connection_that_is_silent_after_its_answer_does_not_hold_the_drain(files: Path) -> None:
    with ExitStack() as stack:
        backend = stack.enter_context(
            running("connlimit", f"--listen={LOCAL}", "--factory=slow:site", "--max-connections=5", cwd=files)
        )
        options = [f"--forward=tcp:127.0.0.1:{backend.port()}", "--max-connections=5", "--drain-timeout=25"]
        program = stack.enter_context(running("connlimit", f"--listen={LOCAL}", *options))
        kept, slow = (
            stack.enter_context(asking(program.port(), f"?seconds={seconds}")) for seconds in (0, 8)
        )
        while b"the page" not in kept.recv(1000):
            pass
        program.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert kept.recv(100) == b""
        assert 4 < time.monotonic() - began < 8
        while b"the page" not in slow.recv(1000):
            pass
        assert slow.recv(100) == b""
        assert end(program) < 3


# Those who wait


def refused_words(program: Program, client: socket.socket, words: bytes) -> None:
    program.process.send_signal(signal.SIGTERM)
    assert read_all(client) == words
    client.close()
    assert end(program) < 5


SERVED_NOBODY = ["--max-connections=0", r"--refusal=say please come back\r\n"]


def test_with_nobody_active_those_who_wait_are_told(files: Path) -> None:
    options = [f"--listen={LOCAL}", "--factory=slow:site", *SERVED_NOBODY, "--status=" + LOCAL]
    with running("connlimit", *options, cwd=files) as program:
        client = asking(program.port(), "")
        time.sleep(0.3)
        refused_words(program, client, b"please come back\r\n")


@pytest.mark.parametrize("place", ["protocol", "socket"])
def test_inside_tls_they_are_told_too(files: Path, place: str) -> None:
    certificate = make_certificate(files)
    listen = f"ssl:0:interface=127.0.0.1:privateKey={certificate}"
    inner = "connlimit:" + listen + rf":place={place}:max_connections=0:refusal=say please come back\\r\\n"
    with running("web", f"--listen={inner}", "--path=.", cwd=files) as program:
        context = ssl.create_default_context(cafile=str(certificate))
        raw = socket.create_connection(("127.0.0.1", program.port()), PATIENCE)
        time.sleep(0.3)
        program.process.send_signal(signal.SIGTERM)
        with context.wrap_socket(raw, server_hostname="localhost") as client:
            assert client.recv(100) == b"please come back\r\n"
        assert end(program) < 6


def test_one_who_still_sends_is_told_too(files: Path) -> None:
    options = [f"--listen={LOCAL}", "--factory=slow:site", *SERVED_NOBODY]
    with running("connlimit", *options, cwd=files) as program:
        client = socket.create_connection(("127.0.0.1", program.port()), PATIENCE)
        stop = threading.Event()

        def send() -> None:
            with client.dup() as sending:
                try:
                    while not stop.is_set():
                        sending.sendall(bytes(10_000))
                        time.sleep(0.01)
                except OSError:
                    pass

        sender = threading.Thread(target=send)
        sender.start()
        try:
            time.sleep(0.3)
            program.process.send_signal(signal.SIGTERM)
            time.sleep(2)
            assert client.recv(100) == b"please come back\r\n"
        finally:
            stop.set()
            sender.join()
            client.close()
        assert end(program) < 6


TAC = """
from twisted.application.service import Application, Service
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory, Protocol
from connlimit import LimitedService, Limiter

class Greeter(Protocol):
    def connectionMade(self):
        self.transport.write(b"opened\\r\\n" if database.running else b"the database is closed\\r\\n")
        database.clients.append(self)

class Database(Service):
    clients = []

    def stopService(self):
        super().stopService()
        for each in self.clients:
            each.transport.abortConnection()

database = Database()
limiter = Limiter(1, refusal="say please come back")
endpoint = serverFromString(reactor, "tcp:0:interface=127.0.0.1")
limited = LimitedService(endpoint, Factory.forProtocol(Greeter), limiter)
application = Application("greeter")
for each in ORDER:
    each.setServiceParent(application)
"""


@pytest.mark.parametrize("order", ["database, limited", "limited, database"])
def test_nobody_who_waits_reaches_a_service_that_has_been_stopped(order: str, tmp_path: Path) -> None:
    (tmp_path / "greeter.tac").write_text(TAC.replace("ORDER", f"({order})"))
    with running("--python", "greeter.tac", cwd=tmp_path) as program:
        port = program.port()
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as served:
            assert served.recv(100) == b"opened\r\n"
            waiting = [socket.create_connection(("127.0.0.1", port), PATIENCE) for _ in range(5)]
            time.sleep(0.3)
            program.process.send_signal(signal.SIGTERM)
            for client in waiting:
                with client:
                    assert read_all(client) == b"please come back"
        assert end(program) < 5


PLUGIN = """
from twisted.application.service import MultiService, Service, ServiceMaker
from twisted.application.internet import StreamServerEndpointService
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory, Protocol
from twisted.python import usage

class Options(usage.Options):
    optParameters = [["listen", None, "tcp:0:interface=127.0.0.1", ""]]

class Greeter(Protocol):
    def connectionMade(self):
        self.transport.write(b"opened\\r\\n" if self.factory.database.running else b"closed\\r\\n")
        self.factory.database.clients.append(self)

    def dataReceived(self, data):
        self.transport.write(b"open\\r\\n" if self.factory.database.running else b"closed\\r\\n")

class Database(Service):
    def __init__(self):
        self.clients = []

    def stopService(self):
        super().stopService()
        for each in self.clients:
            each.transport.abortConnection()

def makeService(options):
    services = MultiService()
    factory = Factory.forProtocol(Greeter)
    factory.database = Database()
    endpoint = serverFromString(reactor, options["listen"])
    StreamServerEndpointService(endpoint, factory).setServiceParent(services)
    factory.database.setServiceParent(services)
    return services
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "greeter_plugin.py").write_text(PLUGIN)
    plugins = tmp_path / "twisted" / "plugins"
    plugins.mkdir(parents=True)
    (plugins / "greeter_tap.py").write_text(
        "from twisted.application.service import ServiceMaker\n"
        'greeter = ServiceMaker("greeter", "greeter_plugin", "greets", "greeter")\n'
    )
    return tmp_path


def greeter(way: str, plugin: Path, port: int, drain_timeout: int) -> list[str]:
    """
    The arguments that run the plugin behind a limit of one: all on the command line, or in a file.
    """
    listen = f"tcp:{port}:interface=127.0.0.1"
    if way == "options":
        limits = ["--max-connections=1", "--refusal=say please come back"]
        return [*limits, f"--drain-timeout={drain_timeout}", "greeter", "--listen", listen]
    (plugin / "connlimit.toml").write_text(
        f"drain_timeout = {drain_timeout}\n"
        '[limiters.main]\nmax_connections = 1\nrefusal = "say please come back"\n'
        f'[services.greeter]\nplugin = ["greeter", "--listen", "{listen}"]\nlimiter = "main"\n'
    )
    return ["--config", "connlimit.toml"]


@contextmanager
def stopped_while_one_waits(
    way: str, plugin: Path, drain_timeout: int
) -> Iterator[tuple[socket.socket, int]]:
    """
    The plugin told to stop while it serves one client and another waits, which is refused: the one that is
    served, and the port. It ends in time when that client has gone.
    """
    port = free_port()
    command = greeter(way, plugin, port, drain_timeout=drain_timeout)
    with running("connlimit", *command, cwd=plugin) as program:
        program.wait_for("1 served at once")
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as served:
            assert served.recv(100) == b"opened\r\n"
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as waiting:
                time.sleep(0.3)
                program.process.send_signal(signal.SIGTERM)
                assert read_all(waiting) == b"please come back"
            yield served, port
        assert end(program) < 5


@pytest.mark.parametrize("way", ["options", "file"])
def test_those_who_are_served_by_a_plugin_keep_its_services_while_they_finish(way: str, plugin: Path) -> None:
    with stopped_while_one_waits(way, plugin, drain_timeout=20) as (served, port):
        wait_until_closed(port)
        served.sendall(b"?")
        assert served.recv(100) == b"open\r\n"


@pytest.mark.parametrize("way", ["options", "file"])
def test_a_plugin_that_is_not_drained_serves_nobody_who_waits_either(way: str, plugin: Path) -> None:
    with stopped_while_one_waits(way, plugin, drain_timeout=0):
        pass


# What was reloaded


def test_the_connections_of_a_service_that_was_removed_are_drained_with_the_others(
    configured: Running,
) -> None:
    it = configured
    with it.connect() as client:
        assert ask(client) == b"hello you\r\n"
        it.write(
            "drain_timeout = 20\n[limiters.new]\nmax_connections = 2\n"
            + it.service("other", it.other).replace('"main"', '"new"')
        )
        it.reload()
        it.program.process.send_signal(signal.SIGTERM)
        it.program.wait_for("main: 1 connections may finish")
        assert ask(client) == b"hello you\r\n"
        assert it.program.process.poll() is None
    assert end(it.program) < 5
    it.program.wait_for("main: drained: 1 connections were served")


def test_sighup_while_draining_opens_nothing_again(configured: Running) -> None:
    it = configured
    it.write("drain_timeout = 20\n[limiters.main]\nmax_connections = 2\n" + it.service())
    it.reload()
    with it.connect() as client:
        assert ask(client) == b"hello you\r\n"
        it.program.process.send_signal(signal.SIGTERM)
        it.program.wait_for("1 connections may finish")
        it.program.process.send_signal(signal.SIGHUP)
        it.program.wait_for("is not reloaded: the program is stopping")
        wait_until_closed(it.port)
        assert ask(client) == b"hello you\r\n"
    assert end(it.program) < 5
    assert it.program.process.returncode == 0
