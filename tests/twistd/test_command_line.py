"""
The command line: real processes and real clients.
"""

from __future__ import annotations

import ftplib
import os
import re
import resource
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.applications import ECHO, TAC
from support.clients import read_all
from support.fakes import RecordingFactory
from support.patience import PATIENCE
from support.programs import Program, failing, require_program, running, twistd_command
from twisted.application.internet import SSLServer, StreamServerEndpointService, TCPServer, UNIXServer
from twisted.application.service import IServiceMaker, MultiService, Service
from twisted.plugin import getPlugins

from connlimit import __version__
from connlimit._twistd.command_line import CannotStart, Options, makeService

LOCAL = "tcp:0:interface=127.0.0.1"
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """
    A folder with a module that has a factory.
    """
    (tmp_path / "echo_server.py").write_text(ECHO)
    return tmp_path


@contextmanager
def client(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connected:
        yield connected


def echoed(port: int) -> bytes:
    """
    What an echo server makes of a greeting.
    """
    with client(port) as connection:
        connection.sendall(b"hello")
        return connection.recv(100)


def says_nothing(connection: socket.socket) -> bool:
    """
    Whether nothing comes for a moment: neither data nor the end.
    """
    connection.settimeout(0.3)
    try:
        connection.recv(1)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(PATIENCE)
    return False


def curl(url: str, *options: str) -> str:
    """
    What curl gets from the URL.
    """
    command = [require_program("curl"), "--silent", "--show-error", "--max-time", str(int(PATIENCE))]
    return subprocess.run([*command, *options, url], capture_output=True, text=True, check=True).stdout


# What is limited


def test_a_server_behind_a_relay_gets_as_many_clients_as_the_limit_says(tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text("the page")
    with ExitStack() as stack:
        backend = stack.enter_context(running("web", "--listen", LOCAL, "--path", str(tmp_path)))
        forward = f"tcp:127.0.0.1:{backend.port()}"
        limit = ["--max-connections", "1"]
        relay = stack.enter_context(running("connlimit", "--listen", LOCAL, "--forward", forward, *limit))
        url = f"http://127.0.0.1:{relay.port()}/page.txt"
        assert curl(url) == "the page"
        with client(relay.port()) as first, client(relay.port()) as second:
            first.sendall(b"GET /page.txt HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"200 OK" in first.recv(1000)
            second.sendall(b"GET /page.txt HTTP/1.0\r\n\r\n")
            assert says_nothing(second)
            first.close()
            assert read_all(second).endswith(b"the page")
        assert curl(url) == "the page"
        assert relay.terminate() == 0


@pytest.mark.parametrize("name", ["factory", "make", "EchoFactory"])
def test_a_factory_is_found_where_the_user_stands(echo: Path, name: str) -> None:
    arguments = ["--listen", LOCAL, "--factory", f"echo_server:{name}", "--max-connections", "1"]
    with running("connlimit", *arguments, cwd=echo) as program:
        with client(program.port()) as first, client(program.port()) as second:
            second.sendall(b"second")
            assert says_nothing(second)
            first.close()
            assert second.recv(100) == b"second"
        assert program.terminate() == 0


def test_several_ports_share_one_limit(echo: Path) -> None:
    listen = ["--listen", LOCAL, "--listen", LOCAL]
    with running(
        *("connlimit", *listen, "--factory", "echo_server:factory", "--max-connections", "1"), cwd=echo
    ) as program:
        match = program.wait_for(r"(?s)starting on (\d+).*starting on (\d+)")
        with client(int(match[1])) as first, client(int(match[2])) as second:
            first.sendall(b"first")
            assert first.recv(100) == b"first"
            second.sendall(b"second")
            assert says_nothing(second)
            first.close()
            assert second.recv(100) == b"second"


def test_the_web_plugin_is_limited(tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text("the page")
    with running(
        *("connlimit", "--max-connections", "1", "web", "--listen", LOCAL, "--path", str(tmp_path))
    ) as program:
        url = f"http://127.0.0.1:{program.port()}/page.txt"
        with client(program.port()) as blocker:
            blocker.sendall(b"GET /page.txt HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"200 OK" in blocker.recv(1000)
            with client(program.port()) as waiting:
                waiting.sendall(b"GET /page.txt HTTP/1.0\r\n\r\n")
                assert says_nothing(waiting)
                blocker.close()
                assert read_all(waiting).endswith(b"the page")
        assert curl(url) == "the page"
        assert program.terminate() == 0


def test_the_ftp_plugin_is_limited(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("the file")
    ftp = ["ftp", "--port", "0", "--root", str(tmp_path)]
    with running("connlimit", "--max-connections", "1", *ftp) as program:
        with ftplib.FTP(timeout=PATIENCE) as session:
            session.connect("127.0.0.1", program.port())
            session.login()
            received: list[bytes] = []
            session.retrbinary("RETR file.txt", received.append)
            assert b"".join(received) == b"the file"
            with client(program.port()) as second:
                assert says_nothing(second)
                session.quit()
                assert second.recv(100).startswith(b"220")
        assert program.terminate() == 0


def test_the_words_plugin_is_limited() -> None:
    with running(
        *("connlimit", "--max-connections", "1", "words", "--irc-port", LOCAL, "--pb-port", LOCAL),
        *("--auth", "memory:somebody:secret"),
    ) as program:
        port = int(program.wait_for(r"IRCFactory starting on (\d+)")[1])

        def register(connection: socket.socket) -> None:
            connection.sendall(b"NICK somebody\r\n")

        with client(port) as first, client(port) as second:
            register(first)
            assert b"Password?" in first.recv(10000)
            register(second)
            assert says_nothing(second)
            first.close()
            assert b"Password?" in second.recv(10000)
        assert program.terminate() == 0


def test_with_nothing_to_limit_a_slow_page_shows_how_it_works() -> None:
    with running("connlimit", "--listen", LOCAL) as program:
        program.wait_for(r"2 served at once")
        program.wait_for(r"look at ")
        program.wait_for(r"try .*curl")
        url = f"http://127.0.0.1:{program.port()}/"
        command = [require_program("curl"), "-s", "-w", "\n%{time_total}", url]
        clients = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
        answers = [process.communicate(timeout=PATIENCE)[0] for process in clients]
        pages, times = zip(*(answer.rsplit("\n", 1) for answer in answers), strict=True)
        assert all("It was your turn" in page for page in pages)
        assert [round(float(seconds) / 2) for seconds in sorted(times, key=float)] == [1, 1, 2, 2]
        assert program.terminate() == 0


def test_an_endpoint_string_limits_a_program_that_has_never_heard_of_it(tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text("the page")
    endings = []
    for where in (f"connlimit:{LOCAL}:max_connections=1", LOCAL):
        with running("web", "--listen", where, "--path", str(tmp_path)) as program:
            with client(program.port()) as blocker:
                blocker.sendall(b"GET /page.txt HTTP/1.1\r\nhost: x\r\n\r\n")
                assert b"200 OK" in blocker.recv(1000)
                with client(program.port()) as other:
                    other.sendall(b"GET /page.txt HTTP/1.0\r\n\r\n")
                    assert says_nothing(other) == where.startswith("connlimit:")
                    blocker.close()
            assert curl(f"http://127.0.0.1:{program.port()}/page.txt") == "the page"
            endings.append(program.terminate())
    # How the process ends is the program's own affair: Twisted's own dies of the signal, limited or not.
    assert endings == [-signal.SIGTERM, -signal.SIGTERM]


def test_the_tac_example_runs(tmp_path: Path) -> None:
    tac = tmp_path / "limited.tac"
    tac.write_text((EXAMPLES / "limited.tac").read_text().replace("tcp:8007", "tcp:0"))
    with running("-y", str(tac)) as program:
        assert echoed(program.port()) == b"hello"
        program.terminate()
        assert "Traceback" not in program.output


# Starting and stopping


def test_a_thousand_clients_that_connect_in_the_same_instant_all_get_through_at_once(echo: Path) -> None:
    somaxconn = int(Path("/proc/sys/net/core/somaxconn").read_text())
    if somaxconn < 1000:
        pytest.skip(f"the kernel holds {somaxconn} connections only")
    with (
        running(
            *("connlimit", "--listen", LOCAL, "--factory", "echo_server:factory", "--max-connections", "10"),
            cwd=echo,
        ) as program,
        selectors.DefaultSelector() as selector,
        ExitStack() as stack,
    ):
        address = ("127.0.0.1", program.port())
        program.process.send_signal(signal.SIGSTOP)
        clients = []
        for _ in range(1000):
            connection = stack.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex(address)
            selector.register(connection, selectors.EVENT_WRITE)
            clients.append(connection)
        connecting = set(selector.get_map())
        while connecting:
            for key, _ in selector.select(PATIENCE):
                connecting.discard(key.fd)
                selector.modify(key.fileobj, selectors.EVENT_READ)
                key.fileobj.send(b"hello")
        # Where a backlog is full, SYNs are lost, and sent again after a second.
        assert sum(map(sent_again, clients)) == 0
        program.process.send_signal(signal.SIGCONT)
        served = 0
        while served < 1000:
            ready = selector.select(PATIENCE)
            assert ready
            for key, _ in ready:
                assert key.fileobj.recv(100) == b"hello"
                selector.unregister(key.fileobj)
                key.fileobj.close()
                served += 1


def sent_again(connection: socket.socket) -> int:
    """
    How many segments had to be sent twice: tcpi_total_retrans of the kernel's tcp_info (tcp(7)).
    """
    return int.from_bytes(
        connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[100:], sys.byteorder
    )


def test_a_download_that_is_in_progress_may_finish_and_the_line_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(8_000_000))
    limits = ["--max-connections=1", "--drain-timeout=20", "--refusal=http"]
    with running("connlimit", *limits, "web", f"--listen={LOCAL}", f"--path={tmp_path}") as program:
        port = program.port()
        with client(port) as downloading, client(port) as waiting:
            downloading.sendall(b"GET /large HTTP/1.0\r\n\r\n")
            received = len(downloading.recv(1000))
            waiting.sendall(b"GET / HTTP/1.0\r\n\r\n")
            program.process.send_signal(signal.SIGTERM)
            program.wait_for("1 connections may finish within 20.0 s")
            assert b" 503 " in read_all(waiting)
            with pytest.raises(ConnectionRefusedError), client(port):
                pass
            received += len(read_all(downloading))
            assert received > 8_000_000
        assert program.process.wait(PATIENCE) == 0
        program.wait_for("drained: 1 connections were served and 1 refused in all")


@contextmanager
def draining_within(echo: Path, seconds: str) -> Iterator[Program]:
    """
    An echo server with a client that does not go away.
    """
    arguments = ["--listen", LOCAL, "--factory", "echo_server:factory", "--drain-timeout", seconds]
    arguments += ["--max-connections", "1"]
    with running("connlimit", *arguments, cwd=echo) as program, client(program.port()) as idle:
        idle.sendall(b"hello")
        assert idle.recv(100) == b"hello"
        yield program


def test_what_does_not_finish_in_time_is_closed(echo: Path) -> None:
    with draining_within(echo, "200ms") as program:
        assert program.terminate() == 0
        program.wait_for("1 connections did not end in time and are closed")


def test_a_second_order_to_stop_is_carried_out_at_once(echo: Path) -> None:
    with draining_within(echo, "1min") as program:
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("may finish")
        assert program.terminate() == -signal.SIGTERM


def test_a_dry_run_ends_with_the_limit_that_would_do(echo: Path) -> None:
    arguments = ["--listen", LOCAL, "--factory", "echo_server:factory", "--max-connections", "1"]
    with running("connlimit", *arguments, "--dry-run", "yes", cwd=echo) as program, ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(client(program.port()))
            connection.sendall(b"hello")
            assert connection.recv(100) == b"hello"
        assert program.terminate() == 0
        program.wait_for("of 3 connections, 2 would have waited")
        program.wait_for("with max_connections=3, 99 % would not have waited")


def test_the_backlog_is_the_kernels_unless_it_is_given(echo: Path) -> None:
    ss = require_program("ss")
    somaxconn = Path("/proc/sys/net/core/somaxconn").read_text().strip()
    for where, expected in ((LOCAL, somaxconn), (f"{LOCAL}:backlog=7", "7")):
        arguments = ["--listen", where, "--factory", "echo_server:factory", "--max-connections", "1"]
        with running("connlimit", *arguments, cwd=echo) as program:
            listed = subprocess.run(
                [ss, "-Hltn", f"sport = :{program.port()}"], capture_output=True, text=True, check=True
            ).stdout
            assert listed.split()[2] == expected


def test_the_descriptor_limit_is_raised_and_the_budget_logged(echo: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    arguments = ["--listen", LOCAL, "--factory", "echo_server:factory", "--name", "echoes"]
    limits = ["--max-connections", "5", "--max-waiting", "7"]
    with running("connlimit", *arguments, *limits, cwd=echo, ulimit="-Sn 200") as program:
        program.wait_for(rf"echoes: {hard} descriptors, .* 5 served at once, room for 7 in the queue")
        in_force = Path(f"/proc/{program.process.pid}/limits").read_text()
        assert f"Max open files            {hard}" in in_force
        assert program.terminate() == 0


def test_a_crowd_never_takes_the_last_descriptors(echo: Path) -> None:
    arguments = ["--listen", LOCAL, "--factory", "echo_server:factory", "--max-connections", "2"]
    with running("connlimit", *arguments, cwd=echo, ulimit="-n 100") as program, ExitStack() as stack:
        port = program.port()
        crowd = [stack.enter_context(client(port)) for _ in range(300)]
        # The last are closed at once: they would wait with a descriptor of the reserve.
        assert crowd[-1].recv(1) == b""
        assert 20 < len(list(Path(f"/proc/{program.process.pid}/fd").iterdir())) <= 100 - 24
        for connection in crowd[:2]:
            connection.sendall(b"hello")
            assert connection.recv(100) == b"hello"
        stack.close()
        assert echoed(port) == b"hello"
        assert program.terminate() == 0
        assert "EMFILE" not in program.output
        assert "Traceback" not in program.output


def test_a_daemon_starts_serves_and_ends(echo: Path, tmp_path: Path) -> None:
    log, pid = tmp_path / "log", tmp_path / "pid"
    twistd = twistd_command()[0]
    command = [twistd, "--pidfile", str(pid), "--logfile", str(log), "connlimit"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--listen", f"tcp:{port}:interface=127.0.0.1", "--factory", "echo_server:factory"]
    arguments += ["--max-connections", "1"]
    subprocess.run([*command, *arguments], cwd=echo, check=True, timeout=PATIENCE)
    number = int(pid.read_text())
    try:
        assert echoed(port) == b"hello"

        again = [twistd, "--pidfile", f"{pid}.2", "--logfile", f"{log}.2", "connlimit", *arguments]
        done = subprocess.run(again, cwd=echo, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 1
        assert "Traceback" not in done.stdout + done.stderr
        wait_until_gone(Path(f"{pid}.2"))  # twistd tells its parent first
    finally:
        os.kill(number, signal.SIGTERM)
    wait_until_gone(pid)


def wait_until_gone(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "program",
    ["twistd connlimit", "twistd connlimit-semaphores", "connlimit-top", "connlimit-shared"],
)
def test_every_command_tells_the_version(program: str) -> None:
    *_, name = words = program.split()
    command = [str(Path(sysconfig.get_path("scripts")) / words[0]), *words[1:], "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{name} {__version__}\n", "")


# What cannot start


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-connections", "many"], ["--max-connections", "whole number", "'many'"]),
        (["--max-connections", "-1"], ["--max-connections", "'-1'"]),
        (["--drain-timeout", "soon"], ["--drain-timeout", "'soon'"]),
        (["--max-waiting", "1.5"], ["--max-waiting", "'1.5'"]),
        (["--wait-timeout", "0"], ["--wait-timeout", "a time above 0", "'0'"]),
        (["--wait-timeout", "soon"], ["--wait-timeout", "'soon'"]),
        (["--wait-timeout", "nan"], ["--wait-timeout", "'nan'"]),
        (["--name", ""], ["--name", "''"]),
        (["--max-conections", "5"], ["--max-conections"]),
        (["nonsense"], ["nonsense"]),
        (["--forward", "tcp:localhost:1"], ["--forward", "--listen"]),
        (["--factory", "a:b"], ["--factory", "--listen"]),
        (["--listen", LOCAL, "--forward", "tcp:localhost:1", "--factory", "a:b"], ["--forward", "--factory"]),
        (["--listen", LOCAL, "web"], ["--listen", "web"]),
        (["--forward", "tcp:localhost:1", "web"], ["--forward", "web"]),
        (["--listen", "tcp:port", "--forward", "tcp:localhost:1"], ["--listen", "'tcp:port'"]),
        (["--listen", "tpc:80", "--forward", "tcp:localhost:1"], ["--listen", "'tpc:80'"]),
        (["--listen", "ssl:0:privateKey=/nowhere", "--forward", "tcp:localhost:1"], ["--listen", "/nowhere"]),
        (["--listen", LOCAL, "--forward", "tcp"], ["--forward", "'tcp'"]),
        (["--listen", LOCAL, "--forward", "nonsense:1"], ["--forward", "'nonsense:1'"]),
        (["--send-proxy"], ["--send-proxy", "--forward"]),
        (["--connect-timeout", "3", "web"], ["--connect-timeout", "--forward"]),
        (
            ["--listen", LOCAL, "--forward", "tcp:localhost:1", "--server-fin-timeout", "0"],
            ["--server-fin-timeout must be a time above 0", "'0'"],
        ),
        (
            ["--listen", LOCAL, "--forward", "tls:localhost:1", "--send-proxy"],
            ["--send-proxy must be left out with --forward tls:localhost:1"],
        ),
        (["--listen", LOCAL, "--factory", "echo_server"], ["--factory", "MODULE:NAME", "'echo_server'"]),
        (["--listen", LOCAL, "--factory", "no_such_module:x"], ["--factory", "no_such_module"]),
        (["--listen", LOCAL, "--factory", "echo_server:absent"], ["--factory", "absent"]),
        (["--listen", LOCAL, "--factory", "echo_server:fail"], ["--factory", "not today"]),
        (["--listen", LOCAL, "--factory", "echo_server:nothing"], ["--factory", "5"]),
        (["web", "--listen", "connlimit:tcp:0:max_connections=x"], ["web", "max_connections", "'x'"]),
        (["web", "--listen", "tcp:0:nonsense=5"], ["web", "nonsense"]),
        (["web", "--nonsense"], ["nonsense"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_command_line_gets_one_sentence(echo: Path, arguments: list[str], words: list[str]) -> None:
    sentence = failing("connlimit", "--max-connections=1", *arguments, cwd=echo)
    assert sentence.startswith("connlimit: ")
    for word in words:
        assert word in sentence


def test_a_port_in_use_gets_one_sentence_and_nothing_is_started(echo: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        where = f"tcp:{port}:interface=127.0.0.1"
        for arguments in (
            ["--listen", LOCAL, "--listen", where, "--factory", "echo_server:make"],
            ["web", "--listen", where],
        ):
            sentence = failing_to_listen(echo, *arguments)
            assert f"127.0.0.1:{port}" in sentence
            assert "in use" in sentence


def test_a_path_that_cannot_be_listened_at_gets_one_sentence(echo: Path) -> None:
    arguments = ["--listen", "unix:/no/such/folder/socket", "--factory", "echo_server:make"]
    assert "/no/such/folder/socket" in failing_to_listen(echo, *arguments)


def failing_to_listen(folder: Path, *arguments: str) -> str:
    """
    The sentence of a program that could not listen; the log has begun by then, and is where it stands.
    """
    with running("connlimit", "--max-connections=1", *arguments, cwd=folder) as program:
        assert program.process.wait(PATIENCE) == 1
        sentence = program.wait_for(r"connlimit: .*")[0]
        assert "Traceback" not in program.output
        return sentence


class ServiceMakers:
    """
    Makes a service, in the place of a plugin.
    """

    tapname = "stand-in"
    description = "for a test"

    def __init__(self, service: Service) -> None:
        self._service = service

    def options(self) -> Options:
        from twisted.python.usage import Options

        return Options()

    def makeService(self, options: object) -> Service:
        return self._service


def with_plugin(monkeypatch: pytest.MonkeyPatch, service: Service) -> MultiService:
    """
    What the command line makes of a plugin that makes this service.
    """
    plugins = [*getPlugins(IServiceMaker), ServiceMakers(service)]
    monkeypatch.setattr("connlimit._twistd.targets.by_name.getPlugins", lambda interface: plugins)
    options = Options()
    options.parseOptions(["--max-connections", "3", "stand-in"])
    return makeService(options)


FILE = """
[limiters.echoes]
max_connections = 1
[services.echoes]
tac = "echoes.tac"
skip = "unix:admin"
"""


@pytest.mark.parametrize("way", ["command line", "two processes", "file"])
def test_an_application_is_limited_but_for_what_is_skipped(echo: Path, way: str) -> None:
    # Who is nobody may start no workers, and with a file twistd must be told who to be.
    uid = (os.getuid() or 65534) if way == "command line" else os.getuid()
    (echo / "echoes.tac").write_text(TAC.replace("UID", str(uid) if way == "command line" else "None"))
    (echo / "connlimit.toml").write_text(FILE)
    arguments = ["--max-connections=1", "--tac=echoes.tac", f"--skip=unix:{echo}/admin"]
    if way == "two processes":
        arguments.append("--processes=2")
    if way == "file":
        arguments = ["--config=connlimit.toml"]
    with running("connlimit", *arguments, cwd=echo) as program:
        program.wait_for("the application runs")
        with (
            client(program.port()) as first,
            client(program.port()) as second,
            socket.socket(socket.AF_UNIX) as admin,
        ):
            first.sendall(b"first")
            assert first.recv(100) == b"first"
            second.sendall(b"second")
            assert says_nothing(second)
            admin.settimeout(PATIENCE)
            admin.connect(str(echo / "admin"))
            admin.sendall(b"admin")
            assert admin.recv(100) == b"admin"
            first.close()
            assert second.recv(100) == b"second"
        found = re.search(r"Uid:\s+(\d+)", Path(f"/proc/{program.process.pid}/status").read_text())[1]
        assert int(found) == uid
        assert program.terminate() == 0
        assert "Traceback" not in program.output


def test_an_application_that_cannot_be_limited_is_not_started(echo: Path) -> None:
    (echo / "idle.tac").write_text(
        "from twisted.application.service import Application\napplication = Application('idle')"
    )
    sentence = failing("connlimit", "--max-connections=1", "--tac=idle.tac", cwd=echo)
    assert sentence == "connlimit: idle.tac has no service that listens, so there is nothing to limit"
    (echo / "echoes.tac").write_text(TAC.replace("UID", "65534"))
    (echo / "connlimit.toml").write_text(FILE)
    sentence = failing("connlimit", "--config=connlimit.toml", cwd=echo)
    assert "[services.echoes] tac echoes.tac wants the uid 65534: run twistd with --uid 65534" in sentence


def test_a_plugin_with_nothing_that_listens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CannotStart, match="stand-in has no service that listens"):
        with_plugin(monkeypatch, MultiService())


def test_every_listening_factory_of_a_plugin_is_limited_by_the_same_limiter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outer, inner = MultiService(), MultiService()
    inner.setServiceParent(outer)
    factories = [RecordingFactory() for _ in range(5)]
    endpoint = StreamServerEndpointService(None, factories[0])
    tcp = TCPServer(0, factories[1], 7, interface="127.0.0.1")
    ssl = SSLServer(0, factories[2], None)
    unix = UNIXServer("/x", factory=factories[3])
    other = Service()
    for service in (endpoint, tcp, ssl):
        service.setServiceParent(inner)
    for service in (unix, other):
        service.setServiceParent(outer)
    with_plugin(monkeypatch, outer)
    limited = [endpoint.factory, tcp.args[1], ssl.args[1], unix.kwargs["factory"]]
    assert [factory.wrappedFactory for factory in limited] == factories[:4]
    assert len({factory.limiter for factory in limited}) == 1
    assert limited[0].limiter.max_connections == 3
    assert (tcp.args[0], tcp.args[2], tcp.kwargs) == (0, 7, {"interface": "127.0.0.1"})
