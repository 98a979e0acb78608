"""
Programs with few descriptors: they never run out of them, and nobody who waits is cut for that.
"""

from __future__ import annotations

import re
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from support.applications import ECHO
from support.clients import free_port
from support.patience import PATIENCE
from support.programs import Program, running

resource = pytest.importorskip("resource")


@pytest.fixture(autouse=True)
def _many_descriptors() -> Iterator[None]:
    """
    As many as there can be for the clients, which run in this process.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 3000:
        pytest.skip("too few descriptors for the clients")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Backend:
    """
    A server that says how many it serves: the most there were at once.
    """

    def __init__(self) -> None:
        self.now = self.maximum = 0
        self._server = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.port = self._server.getsockname()[1]
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with self._lock:
            self.now += 1
            self.maximum = max(self.maximum, self.now)
        with connection:
            while data := connection.recv(1000):
                connection.sendall(data)
        with self._lock:
            self.now -= 1

    def close(self) -> None:
        self._server.close()


@contextmanager
def relay(folder: Path, text: str) -> Iterator[tuple[Program, Backend, int, Path]]:
    """
    A relay with 256 descriptors, its backend, its port and its file, which begins with the text.
    """
    port, file = free_port(), folder / "connlimit.toml"
    with closing(Backend()) as backend:
        service = (
            f'\n[services.relay]\nlisten = ["tcp:{port}:interface=127.0.0.1"]\nlimiter = "main"\n'
            f'forward = "tcp:127.0.0.1:{backend.port}"\n'
        )
        file.write_text(text + service)
        with running("connlimit", "--config", str(file), ulimit="-n 256") as program:
            program.port()
            yield program, backend, port, file


def echoes(client: socket.socket) -> bool:
    """
    Whether the client is served, which it may have to wait for.
    """
    client.settimeout(PATIENCE)
    try:
        client.sendall(b"hello")
        return client.recv(100) == b"hello"
    except OSError:
        return False


def test_a_raised_limit_serves_those_who_wait_as_far_as_the_backends_descriptors_go(tmp_path: Path) -> None:
    text = "drain_timeout = 1\n[limiters.main]\nmax_connections = 2\n"
    with relay(tmp_path, text) as (program, backend, port, file), ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE)) for _ in range(300)
        ]
        assert echoes(clients[0])
        refused = 0
        for client in reversed(clients):  # the last are refused: they would wait with one of the reserve
            client.settimeout(0.5)
            try:
                assert client.recv(1) == b""
            except TimeoutError:
                break
            refused += 1
        assert refused < 150
        file.write_text(file.read_text().replace("max_connections = 2\n", "max_connections = 100\n"))
        program.process.send_signal(signal.SIGHUP)
        program.wait_for("reloaded ")
        for client in clients[: len(clients) - refused]:
            assert echoes(client)
            client.close()
        assert 10 < backend.maximum <= 100
        assert program.terminate() == 0
        assert "cannot be reached" not in program.output
        assert "Too many open files" not in program.output
        assert "EMFILE" not in program.output


def test_those_who_are_served_leave_descriptors_too(tmp_path: Path) -> None:
    text = "drain_timeout = 0\n[limiters.main]\nmax_connections = 1000\n"
    with relay(tmp_path, text) as (program, backend, port, _), ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE)) for _ in range(300)
        ]
        served = 0
        for client in clients:
            if not echoes(client):
                break
            served += 1
        assert 85 < served < 112  # each takes two of 256
        for client in clients:
            client.close()
        began = time.monotonic()
        while backend.now:
            assert time.monotonic() - began < PATIENCE
            time.sleep(0.01)
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
            assert echoes(client)
        assert program.terminate() == 0
        assert "cannot be reached" not in program.output
        assert "Too many open files" not in program.output
        assert "EMFILE" not in program.output


def test_a_crowd_at_the_status_page_and_one_that_waits_leave_the_last_descriptors(tmp_path: Path) -> None:
    page = free_port()
    options = ["--listen=tcp:0:interface=127.0.0.1", "--max-connections=2", "--refusal=http"]
    options += [f"--status=tcp:{page}:interface=127.0.0.1"]
    (tmp_path / "echoing.py").write_text(ECHO)
    with (
        running("connlimit", *options, "--factory=echoing:factory", ulimit="-n 256", cwd=tmp_path) as program,
        ExitStack() as stack,
    ):
        program.wait_for("2 served at once")
        listening = {int(port) for port in re.findall(r"starting on (\d+)", program.output)}
        (port,) = listening - {page}
        for where in (port, page, port, page):
            for _ in range(200):
                stack.enter_context(socket.create_connection(("127.0.0.1", where), PATIENCE))
        time.sleep(2)  # those who make room at the page may take a second to close
        with urllib.request.urlopen(f"http://127.0.0.1:{page}/health", timeout=PATIENCE) as answer:
            assert answer.read() == b"ok\n"
        stack.close()
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
            assert echoes(client)
        assert program.terminate() == 0
        assert "EMFILE" not in program.output
        assert "Too many open files" not in program.output


HEADER = b"PROXY TCP4 192.0.2.1 127.0.0.1 5 6\r\n"


def test_crowds_everywhere_at_once_leave_the_last_descriptors(tmp_path: Path) -> None:
    behind, plain, page = free_port(), free_port(), free_port()
    options = [f"--listen=haproxy:tcp:{behind}:interface=127.0.0.1"]
    options += [f"--listen=tcp:{plain}:interface=127.0.0.1", "--drain-timeout=0"]
    options += [f"--status=tcp:{page}:interface=127.0.0.1", "--max-connections=50"]
    (tmp_path / "echoing.py").write_text(ECHO)
    with (
        running("connlimit", *options, "--factory=echoing:factory", ulimit="-n 256", cwd=tmp_path) as program,
        ExitStack() as stack,
    ):
        for port in (behind, plain, page):
            program.wait_for(rf"starting on {port}\b")

        def crowd(port: int, count: int, data: bytes = b"") -> list[socket.socket]:
            clients = []
            for _ in range(count):
                clients.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE)))
                clients[-1].sendall(data)
            return clients

        for others in (0, 0, 400):
            # The program goes on when all are there, so it accepts as many at once as it ever does.
            program.process.send_signal(signal.SIGSTOP)
            good = crowd(behind, 10, HEADER)
            crowd(behind, 150, b"PROXY TCP4 ")
            crowd(page, 150)
            good += crowd(behind, 10, HEADER)
            crowd(behind, 150, b"PROXY TCP4 ")
            crowd(plain, others)
            program.process.send_signal(signal.SIGCONT)
            served = [echoes(client) for client in good]
            assert others or all(served)
            for client in good:
                client.close()
        stack.close()
        with socket.create_connection(("127.0.0.1", behind), PATIENCE) as client:
            client.sendall(HEADER)
            assert echoes(client)
        assert program.terminate() == 0
        assert "EMFILE" not in program.output
        assert "Too many open files" not in program.output
        assert "Traceback" not in program.output
