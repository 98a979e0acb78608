"""
The status page, its JSON, the metrics and the terminal's view.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred
from support.applications import ECHO
from support.clients import free_port, page_until, read_all
from support.clocks import TurnsClock
from support.fakes import RecordingFactory
from support.patience import PATIENCE
from support.programs import Program, failing, require_program, running
from support.sockets import connected, listening, until
from twisted.internet import reactor
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.task import Clock

from connlimit import Limiter, __version__
from connlimit._limiter.slots import NullConnection
from connlimit._listening.checked_endpoints import status_endpoint
from connlimit.status import in_code, once, page, serve, top
from connlimit.status.followers import MAX_FOLLOWERS
from connlimit.status.service import StatusService
from connlimit.status.site import Root
from connlimit.status.watch import Watch


class Server:
    """
    A limited server with a status page.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        ports = [int(port) for port in re.findall(r"starting on (\d+)", program.output)]
        self.status, self.port = ports[0], ports[1]
        if "Site starting on" in program.output:
            self.status = int(re.search(r"Site starting on (\d+)", program.output)[1])
            self.port = next(port for port in ports if port != self.status)
        self.url = f"http://127.0.0.1:{self.status}/"

    def ask(self, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.status, timeout=PATIENCE)
        with closing(connection):
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read().decode()

    def facts(self) -> dict[str, object]:
        return json.loads(self.ask("/status.json")[2])["limiters"][0]

    def until(self, **facts: object) -> None:
        began = time.monotonic()
        while not facts.items() <= (now := self.facts()).items():
            assert time.monotonic() - began < PATIENCE, now
            time.sleep(0.02)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """
    A server of two slots.
    """
    folder = tmp_path_factory.mktemp("server")
    (folder / "echoes.py").write_text(ECHO)
    command = ["--listen=tcp:0:interface=127.0.0.1", "--status=tcp:0:interface=127.0.0.1"]
    command += ["--factory=echoes:factory", "--max-connections=2", "--max-waiting=10", "--name=<main>"]
    with running("connlimit", *command, cwd=folder) as program:
        program.wait_for("2 served at once")
        yield Server(program)


class Balanced(HTMLParser):
    """
    Checks that what was opened is closed, and keeps the text.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None: ...

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_tells_everything_without_a_script(server: Server) -> None:
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(server.connect())
        server.until(active=2, waiting=1)
        status, headers, text = server.ask("/")
        assert status == 200
        markup = Balanced()
        markup.feed(text)
        assert markup.open == []
        for words in ("<main>", "2 served of 2", "1 waiting of 10", "127.0.0.1", "accepted", "descriptors"):
            assert words in markup.text
        assert 'class="full"' in text
        assert "<main>" not in re.sub(r'<main id="main">|</main>', "", text)  # a name is no markup
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "http" not in text.replace("http-equiv", "")  # no outside address
    server.until(active=0, waiting=0)


def test_the_json_has_the_same_facts(server: Server) -> None:
    with server.connect() as client:
        client.sendall(b"hello")
        assert client.recv(10) == b"hello"
        server.until(active=1)
        facts = server.facts()
        assert (facts["name"], facts["max_connections"]) == ("<main>", 2)
        assert facts["peers"] == [{"peer": "127.0.0.1", "active": 1, "waiting": 0}]
        assert set(facts["history"]) == {"active", "waiting", "refused"}
    server.until(active=0)


def test_health_is_ok(server: Server) -> None:
    assert server.ask("/health")[::2] == (200, "ok\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_only_get_and_head_are_answered(server: Server, method: str) -> None:
    status, headers, _ = server.ask("/", method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/", "/status.json", "/metrics", "/health", "/status.js", "/events"])
def test_head_is_get_without_the_body(server: Server, path: str) -> None:
    status, _, body = server.ask(path, "HEAD")
    assert (status, body) == (200, "")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", 200),
        ("localhost:8081", 200),
        ("[::1]:80", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
    ],
)
def test_a_foreign_name_is_not_answered(server: Server, host: str, expected: int) -> None:
    assert server.ask("/status.json", Host=host)[0] == expected


def test_what_is_not_there_is_not_found(server: Server) -> None:
    for path in ("/nothing", "/../etc/passwd", "/%00", "/status.json/x"):
        assert server.ask(path)[0] == 404


def test_the_page_follows_each_second(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.status), PATIENCE) as client:
        client.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = b""
        while received.count(b"data: ") < 3:
            received += client.recv(65536)
        assert b"Content-Type: text/event-stream" in received.replace(b"content-type", b"Content-Type")
        assert b"served" in received


def test_bad_clients_do_not_move_the_limited_service(server: Server) -> None:
    def latency() -> float:
        times = []
        with server.connect() as client:
            for _ in range(50):
                began = time.perf_counter()
                client.sendall(b"x")
                assert client.recv(1) == b"x"
                times.append(time.perf_counter() - began)
        return sorted(times)[25]

    before = latency()
    with ExitStack() as stack:
        watchers = [socket.socket() for _ in range(1000)]
        for number, watcher in enumerate(watchers):
            stack.enter_context(watcher)
            watcher.settimeout(PATIENCE)
            watcher.connect_ex(("127.0.0.1", server.status))
            request = [
                b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n",
                b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000,
                b"GET ",
                b"\0\xff" * 100,
            ][number % 4]
            with suppress(OSError):
                watcher.sendall(request)
        during = latency()
        assert during < before * 5 + 0.02
    assert server.ask("/health")[0] in (200, 503)


def test_requests_by_the_thousand_on_one_connection_do_not_move_the_limited_service(tmp_path: Path) -> None:
    (tmp_path / "echoes.py").write_text(ECHO)
    command = ["--listen=tcp:0:interface=127.0.0.1", "--status=tcp:0:interface=127.0.0.1"]
    command += ["--factory=echoes:factory", "--max-connections=2", "--max-waiting=5000"]
    with running("connlimit", *command, cwd=tmp_path) as program, ExitStack() as stack:
        program.wait_for("2 served at once")
        server = Server(program)
        client = stack.enter_context(server.connect())
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        waiting = min(3000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200)
        for _ in range(waiting):
            stack.enter_context(server.connect())
        server.until(waiting=waiting - 1)
        with socket.create_connection(("127.0.0.1", server.status), PATIENCE) as asks:
            asks.setblocking(False)
            with suppress(BlockingIOError):
                asks.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000)
            longest = 0.0
            for _ in range(300):
                began = time.perf_counter()
                client.sendall(b"x")
                assert client.recv(1) == b"x"
                longest = max(longest, time.perf_counter() - began)
        assert longest < 0.5


@pytest.mark.skipif(not Path("/proc").exists(), reason="memory is told by /proc")
def test_a_client_that_asks_and_never_reads_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "echoes.py").write_text(ECHO)
    command = ["--listen=tcp:0:interface=127.0.0.1", "--status=tcp:0:interface=127.0.0.1"]
    command += ["--factory=echoes:factory", "--max-connections=100"]
    with running("connlimit", *command, cwd=tmp_path) as program:
        program.wait_for("served at once")
        server = Server(program)
        server.ask("/status.json")
        before = program.resident_memory()
        requests = b"GET /status.css HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000
        with socket.create_connection(("127.0.0.1", server.status), PATIENCE) as client:
            client.settimeout(1)
            with suppress(TimeoutError):
                for _ in range(500):
                    client.sendall(requests)
                pytest.fail("all was read")
            assert program.resident_memory() - before < 10_000_000
            assert server.ask("/health")[0] == 200


def test_idle_clients_do_not_shut_health_out(server: Server) -> None:
    with ExitStack() as stack:
        for _ in range(1000):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.status), PATIENCE))
            with suppress(OSError):
                client.sendall(b"GET /heal")
        began = time.monotonic()
        assert server.ask("/health")[::2] == (200, "ok\n")
        assert time.monotonic() - began < 2


def test_only_so_many_follow_the_page_and_others_are_answered(server: Server) -> None:
    with ExitStack() as stack:
        statuses = []
        for _ in range(MAX_FOLLOWERS + 4):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.status), PATIENCE))
            client.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            statuses.append(client.recv(65536).split()[1])
        # A watcher of another test may not be known to have left yet.
        assert MAX_FOLLOWERS - 2 <= statuses.count(b"200") <= MAX_FOLLOWERS
        assert set(statuses) == {b"200", b"503"}
        assert server.ask("/health")[0] == server.ask("/status.json")[0] == 200


def test_half_a_hundred_pollers_share_what_is_found_out(server: Server) -> None:
    answers: list[int] = []

    def poll() -> None:
        for _ in range(10):
            with suppress(OSError, http.client.HTTPException):
                answers.append(server.ask("/status.json")[0])

    with server.connect() as client:
        threads = [threading.Thread(target=poll) for _ in range(50)]
        for thread in threads:
            thread.start()
        times = []
        while any(thread.is_alive() for thread in threads):
            began = time.perf_counter()
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            times.append(time.perf_counter() - began)
    assert set(answers) == {200}
    assert len(answers) > 400
    assert sorted(times)[len(times) // 2] < 0.1
    server.until(active=0)


@pytest.mark.parametrize(
    "request_",
    [
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\0\xff" * 20_000 + b"\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10_000,
        b"GET /" + b"a" * 100_000,
        b"\r\n\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_request_of_ours_ends_its_connection_alone(server: Server, request_: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.status), PATIENCE) as client:
        answer = b""
        with suppress(OSError):  # it may be over before all is sent
            client.sendall(request_)
            client.shutdown(socket.SHUT_WR)
            answer = read_all(client)
    assert b" 200 " not in answer
    assert b"Traceback" not in answer
    assert server.ask("/health")[0] == 200
    assert "Traceback" not in server.program.output


def test_a_job_that_waits_is_shown_by_its_key() -> None:
    limiter = Limiter(0, clock=Clock())
    limiter.slot(key="the <reports>").acquire()
    service = StatusService(None, Limited(limiter), True, frozenset())
    assert "the &lt;reports&gt;" in shown_in_turns(service, "page")[0].decode()
    facts = json.loads(shown_in_turns(service, "json")[0])["limiters"][0]
    assert [each["peer"] for each in facts["peers"]] == ["the <reports>"]
    assert "UNIX" not in json.dumps(facts)


def test_names_and_addresses_are_no_markup() -> None:
    class Address:
        host = "<script>alert(1)</script>"
        port = 1

    hostile = '"><script>alert(1)</script>'
    clock = Clock()
    limiter = Limiter(0, name=hostile, clock=clock)
    limiter.admission.wait(NullConnection(Address()))
    service = StatusService(None, Limited(limiter), True, frozenset())
    text = shown_in_turns(service, "page")[0].decode()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    markup = Balanced()
    markup.feed(text)
    assert markup.open == []
    assert json.loads(shown_in_turns(service, "json")[0])["limiters"][0]["name"] == hostile


def test_many_limiters_are_looked_at_in_turns() -> None:
    service = StatusService(None, Limited(*(Limiter(0, name=str(n)) for n in range(50))), True, frozenset())
    shown, turns = shown_in_turns(service, "json")
    assert turns >= 2 * 49
    assert len(json.loads(shown)["limiters"]) == 50


def test_thousands_who_wait_are_looked_at_in_turns() -> None:
    limiter = Limiter(0, clock=Clock())
    for number in range(5000):
        limiter.admission.wait(NullConnection(IPv4Address("TCP", f"192.0.2.{number % 100}", number)))
    service = StatusService(None, Limited(limiter), True, frozenset())
    shown, turns = shown_in_turns(service, "json")
    assert turns >= 5000 / 200
    (facts,) = json.loads(shown)["limiters"]
    assert [each["waiting"] for each in facts["peers"]] == [50] * 10
    assert len(facts["queue"]) == 50


def shown_in_turns(service: StatusService, form: str) -> tuple[bytes, int]:
    """
    What a service shows, and how many turns of the reactor it took.
    """
    clock = TurnsClock()
    service._site.reactor = clock
    shown: list[bytes] = []
    service.show(form, True).addCallback(shown.append)
    turns = 0
    while not shown:
        clock.advance(clock.turn)
        turns += 1
    return shown[0], turns


def test_metrics_are_right_by_their_own_parser_and_by_promtool(server: Server) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    status, headers, text = server.ask("/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    names = {family.name for family in parser.text_string_to_metric_families(text)}
    assert {
        "connlimit_connections",
        "connlimit_max_connections",
        "connlimit_accepted",
        "connlimit_finished",
        "connlimit_refused",
        "connlimit_departed",
        "connlimit_reclaimed",
        "connlimit_wait_seconds",
        "connlimit_longest_wait_seconds",
        "connlimit_backlog",
        "connlimit_descriptors",
        "connlimit_reactor_lag_seconds",
        "connlimit_headers",
        "connlimit_refusals",
        "connlimit_build_info",
    } <= names
    assert f'connlimit_build_info{{version="{__version__}"}} 1.0' in text
    assert json.loads(server.ask("/status.json")[2])["version"] == __version__
    assert f'<th scope="row">connlimit</th><td>{__version__}</td>' in server.ask("/")[2]
    done = subprocess.run(
        [require_program("promtool"), "check", "metrics"], input=text, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_headers_that_are_being_read_and_refusals_that_are_being_said_are_counted(tmp_path: Path) -> None:
    (tmp_path / "connlimit.toml").write_text("""
        [limiters.main]
        max_connections = 0
        max_waiting = 0
        refusal = "say come back later"

        [services.behind]
        listen = "haproxy:tcp:0:interface=127.0.0.1"
        factory = "module:factory"

        [status]
        listen = "tcp:0"
    """)
    (tmp_path / "module.py").write_text(ECHO)
    with running("connlimit", "--config", "connlimit.toml", cwd=tmp_path) as program, ExitStack() as stack:
        program.wait_for("Site starting on")
        program.wait_for(r"\(PROXY\) starting on ")
        server = Server(program)

        def told() -> tuple[int, int]:
            state = json.loads(server.ask("/status.json")[2])
            return state["headers"], state["refusals"]

        assert told() == (0, 0)
        for header in (b"PROXY TCP4 192.0.2.1", b"PROXY TCP4 192.0.2.1 127.0.0.1 5 6\r\n"):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), PATIENCE))
            client.sendall(header)
        began = time.monotonic()
        while told() != (1, 1):
            assert time.monotonic() - began < PATIENCE, told()
        assert "connlimit_headers 1.0" in server.ask("/metrics")[2]
        assert '<th scope="row">PROXY headers being read</th><td>1</td>' in server.ask()[2]


def test_the_terminal_shows_the_same(server: Server) -> None:
    command = [sys.executable, "-m", "connlimit.status.top", server.url, "--once"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    assert "<main>" in shown
    assert "served   [..............................] 0 of 2" in shown
    state = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, timeout=PATIENCE, check=True
    ).stdout
    assert json.loads(state)["limiters"][0]["name"] == "<main>"


def test_the_terminal_says_what_is_wrong() -> None:
    port = free_port()
    for url in (f"http://127.0.0.1:{port}/", "nonsense"):
        done = subprocess.run(
            [sys.executable, "-m", "connlimit.status.top", url, "--once"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 1
        assert "URL must be that of a status page" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_names_cannot_command_the_terminal() -> None:
    limiter = Limiter(5, name="\x1b[31mred")
    facts = Watch(limiter).facts()
    state = {"limiters": [facts], "descriptors": {"open": 1, "limit": 2}, "reactor_lag": 0.0}
    assert "\x1b" not in "\n".join(top.lines(state))


def test_another_name_is_answered_if_it_is_given_and_numbers_are_for_any(tmp_path: Path) -> None:
    (tmp_path / "echoes.py").write_text(ECHO)
    command = ["--listen=tcp:0:interface=127.0.0.1", "--status=tcp:0", "--status-host=Status.example"]
    command += ["--status-host", "other.example", "--factory=echoes:factory", "--max-connections=2"]
    with running("connlimit", *command, cwd=tmp_path) as program:
        program.wait_for("2 served at once")
        server = Server(program)
        for name, expected in (("status.example:80", 200), ("other.example", 200), ("evil.example", 421)):
            assert server.ask("/status.json", Host=name)[0] == expected
            assert server.ask("/health", Host=name)[0] == 200
            assert server.ask("/metrics", Host=name)[0] == 200


def test_a_name_without_a_page_is_refused() -> None:
    assert "--status-host needs --status" in failing("connlimit", "--listen=tcp:0", "--status-host=a.example")


def test_the_page_listens_on_loopback_unless_it_is_told_otherwise() -> None:
    for string, interface in (
        ("tcp:8081", "127.0.0.1"),
        ("tcp:8081:backlog=5", "127.0.0.1"),
        ("tcp:8081:interface=0.0.0.0", "0.0.0.0"),
        ("tcp:8081:192.0.2.1", "192.0.2.1"),
    ):
        assert status_endpoint(None, string)._interface == interface
    assert status_endpoint(None, "unix:/run/status")._address == "/run/status"
    with pytest.raises(ValueError, match=r"--status must be an endpoint such as tcp:8080, not 'tcp:70000' "):
        status_endpoint(None, "tcp:70000")


def is_free(port: int) -> bool:
    """
    Whether nobody listens on this port.
    """
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


async def ask(port: object, path: str = "/status.json") -> dict[str, object]:
    """
    What a page answers to a client of this process's reactor.
    """
    client = await connected(f"tcp:127.0.0.1:{port.getHost().port}")
    client.transport.write(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
    await client.is_closed()
    return json.loads(client.received.partition(b"\r\n\r\n")[2])


@ensureDeferred
async def test_in_code_all_limiters_that_something_stands_behind_are_shown() -> None:
    unused = Limiter(7, name="unused")
    limiter, same = Limiter(3, name="one"), Limiter(4, name="one")
    async with listening(limiter) as (_, where), listening(same):
        port = await serve("tcp:0")
        assert port.getHost().host == "127.0.0.1"
        client = await connected(where)
        await until(lambda: limiter.active)
        shown = {each["name"]: each for each in (await ask(port))["limiters"]}
        assert {"one", "one (2)"} <= shown.keys()
        assert (shown["one"]["active"], shown["one (2)"]["max_connections"]) == (1, 4)
        assert unused.name not in shown
        await client.close()
        await port.stopListening()
        await port.stopListening()


@ensureDeferred
async def test_in_code_a_port_in_use_fails_and_leaves_nothing() -> None:
    port = await serve("tcp:0")
    with pytest.raises(CannotListenError):
        await serve(f"tcp:{port.getHost().port}")
    with pytest.raises(ValueError, match="where must be an endpoint such as tcp:8080, not 'tpc:8081'"):
        serve("tpc:8081")
    await port.stopListening()


@ensureDeferred
async def test_endpoint_strings_share_a_page_as_long_as_they_listen() -> None:
    status = free_port()
    first = "connlimit:tcp:0:interface=127.0.0.1:max_connections=3:limiter=first"
    strings = (f"{first}:status=tcp\\:{status}", f"connlimit:tcp:0:max_connections=4:status=tcp\\:{status}")
    ports = [await serverFromString(reactor, string).listen(RecordingFactory()) for string in strings]
    (markup,) = (markup for where, markup in in_code._pages.items() if where == f"tcp:{status}")
    names = {each["name"] for each in (await ask(markup._page))["limiters"]}
    assert {"first", "tcp:0"} <= names
    await ports[0].stopListening()
    await until(lambda: markup._ports == ports[1:])
    assert in_code._pages == {f"tcp:{status}": markup}
    await ports[1].stopListening()
    await until(lambda: not in_code._pages and is_free(status))


@ensureDeferred
async def test_an_endpoint_string_whose_page_cannot_be_is_told_so() -> None:
    with pytest.raises(ValueError, match="connlimit endpoint: status must be an endpoint such as tcp:8080"):
        serverFromString(reactor, "connlimit:tcp:0:max_connections=3:status=tpc\\:8081")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        string = f"connlimit:tcp:0:max_connections=3:status=tcp\\:{taken.getsockname()[1]}"
        with pytest.raises(CannotListenError, match="Address already in use"):
            await serverFromString(reactor, string).listen(RecordingFactory())
    assert not in_code._pages


@ensureDeferred
async def test_a_page_ends_if_nothing_listens_after_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"tcp:{taken.getsockname()[1]}:interface=127.0.0.1:max_connections=3"
        with pytest.raises(CannotListenError):
            await serverFromString(reactor, f"connlimit:{where}:status=tcp\\:0").listen(RecordingFactory())
    await until(lambda: not in_code._pages)


class Limited:
    """
    Whatever has limiters.
    """

    def __init__(self, *limiters: Limiter) -> None:
        self.limiters = {limiter.name: limiter for limiter in limiters}


class Asks:
    """
    A request, as far as it matters who asks.
    """

    def __init__(self, address: object) -> None:
        self.getClientAddress = lambda: address


def root(show_peers: bool, *hosts: str) -> Root:
    """
    What answers for a service that shows nothing.
    """
    service = StatusService(None, Limited(), show_peers, frozenset(hosts))
    return Root(service, service._followers, show_peers, frozenset(hosts))


def limiters(service: StatusService, with_peers: bool) -> list[dict[str, object]]:
    """
    The facts of the limiters, as a service shows them now.
    """
    return json.loads(succeeded(service.show("json", with_peers)))["limiters"]


def succeeded(deferred: Deferred[bytes]) -> bytes:
    """
    The result of a Deferred that has fired.
    """
    results: list[bytes] = []
    deferred.addCallback(results.append)
    return results[0]


def test_addresses_of_peers_are_for_loopback_unless_the_setting_says_otherwise() -> None:
    near, far = IPv4Address("TCP", "127.0.0.1", 1), IPv6Address("TCP", "2001:db8::1", 1)
    for show, expected in ((False, [True, False]), (True, [True, True])):
        assert [root(show).may_see_peers(Asks(address)) for address in (near, far)] == expected
    assert root(False).may_see_peers(Asks(UNIXAddress(b"/x")))
    facts = limiters(StatusService(None, Limited(Limiter(0)), False, frozenset()), False)[0]
    assert not {"peers", "line"} & facts.keys()


def test_a_name_that_is_configured_is_ours() -> None:
    site = root(False, "status.Example")
    assert site.is_ours(b"Status.example:80")
    assert not site.is_ours(b"other.example")
    assert not site.is_ours(None)


def test_limiters_that_come_and_go_are_followed() -> None:
    clock = Clock()
    first, second = Limiter(1, name="a", clock=clock), Limiter(1, name="b", clock=clock)
    limited = Limited(first)
    service = StatusService(None, limited, False, frozenset())
    assert [each["name"] for each in limiters(service, False)] == ["a"]
    limited.limiters = {"b": second}
    time.sleep(once.LEAST_AGE)
    assert [each["name"] for each in limiters(service, False)] == ["b"]
    assert not [each for each in first.observers if isinstance(each, Watch)]


def test_a_changed_setting_is_shown_at_once() -> None:
    limiter = Limiter(1)
    service = StatusService(None, Limited(limiter), False, frozenset())
    for maximum in (1, 5, 3):
        limiter.max_connections = maximum
        assert [each["max_connections"] for each in limiters(service, False)] == [maximum]


def test_what_takes_long_to_make_is_made_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    now, made = [0.0], [0]
    monkeypatch.setattr(once, "monotonic", lambda: now[0])

    async def make() -> int:
        made[0] += 1
        now[0] += 0.02
        return made[0]

    recent = once.Recent(make, lambda made: 0.01 if made == 2 else 0.0)
    ages = []
    for _ in range(4):
        began, before = now[0], made[0]
        while made[0] == before:
            succeeded(recent.get())
            now[0] += 0.01
        ages.append(round(now[0] - began, 1))
    assert ages == [0.0, 0.4, 0.6, 0.4]


@ensureDeferred
async def test_what_is_being_made_is_made_once_for_all_who_ask() -> None:
    waiting: Deferred[None] = Deferred()
    made = []

    async def make() -> int:
        made.append(1)
        await waiting
        return len(made)

    recent = once.Recent(make)
    asked = [recent.get() for _ in range(3)]
    waiting.callback(None)
    assert [await each for each in asked] == [1, 1, 1]


@ensureDeferred
async def test_what_fails_to_be_made_is_tried_again() -> None:
    made = []

    async def make() -> int:
        made.append(1)
        return 1 // (len(made) - 1)

    recent = once.Recent(make)
    with pytest.raises(ZeroDivisionError):
        await recent.get()
    assert await recent.get() == 1


def test_percentiles_are_those_of_the_last_waits() -> None:
    watch = Watch(Limiter(1))
    for hundredth in range(100):
        watch.served(watch.limiter, None, hundredth / 100)
    assert watch.percentiles() == {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    assert sum(watch.counts) == 100


def test_a_chart_shows_ten_minutes_at_most() -> None:
    limiter = Limiter(1)
    watch = Watch(limiter)
    for _ in range(700):
        watch.sample()
    assert len(watch.samples) == 600
    assert page._points([0] * 600, 1).count(" ") == 199
    assert page._points([], 1) == ""


def test_in_a_browser_the_numbers_move_and_survive_a_restart(browser: object, tmp_path: Path) -> None:
    (tmp_path / "echoes.py").write_text(ECHO)
    port = free_port()
    command = ["connlimit", "--listen=tcp:0:interface=127.0.0.1", "--factory=echoes:factory"]
    command += [f"--status=tcp:{port}:interface=127.0.0.1", "--max-connections=3", "--max-waiting=10"]
    with running(*command, cwd=tmp_path) as program, ExitStack() as stack:
        program.wait_for("3 served at once")
        server = Server(program)
        browser.get(server.url)
        page_until(browser, "live")
        page_until(browser, "0 served of 3")
        screenshot(browser, "idle")
        for _ in range(2):
            stack.enter_context(server.connect())
        page_until(browser, "2 served of 3")
        screenshot(browser, "busy")
        for _ in range(5):
            stack.enter_context(server.connect())
        page_until(browser, "3 served of 3")
        page_until(browser, "4 waiting of 10")
        assert browser.find_element("css selector", "section.full h2")
        screenshot(browser, "full")
        assert browser.get_log("browser") == []
    page_until(browser, "not connected")
    with running(*command, cwd=tmp_path) as program:
        program.wait_for("3 served at once")
        page_until(browser, "live")
        page_until(browser, "0 served of 3")


def test_on_a_phone_nothing_is_wider_than_the_screen(browser: object, server: Server) -> None:
    browser.set_window_size(500, 800)  # no window is narrower; the page itself is told that it is a phone
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True},
    )
    browser.get(server.url)
    page_until(browser, "served of 2")
    width, shown = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert width <= shown == 360
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_each_colour_has_the_contrast_of_wcag_aa() -> None:
    def luminance(colour: str) -> float:
        digits = colour if len(colour) == 6 else "".join(each * 2 for each in colour)
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [each / 12.92 if each <= 0.03928 else ((each + 0.055) / 1.055) ** 2.4 for each in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = re.findall(r":root \{(.*?)\}", page.CSS, re.DOTALL)
    for scheme in (light, dark):
        colours = dict(re.findall(r"--(\w+): #([0-9a-f]{6}|[0-9a-f]{3})\b", scheme))
        for paper in ("paper", "box"):
            for ink in ("ink", "soft", "active", "waiting", "refused"):
                one, other = sorted((luminance(colours[ink]), luminance(colours[paper])), reverse=True)
                assert (one + 0.05) / (other + 0.05) >= 4.5, (ink, paper)


def screenshot(browser: object, name: str) -> None:
    """
    Keep what the browser shows, if it is asked for by CONNLIMIT_SCREENSHOTS, the folder to keep it in.
    """
    folder = os.environ.get("CONNLIMIT_SCREENSHOTS")
    if folder:
        time.sleep(3)
        browser.save_screenshot(str(Path(folder) / f"status-{name}.png"))
