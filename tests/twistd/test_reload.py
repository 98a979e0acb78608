"""
A program with a configuration file: what it runs, how it is reloaded and how it ends.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing, suppress
from pathlib import Path

import pytest
from support.applications import Running, ask
from support.clients import free_port, read_all
from support.patience import PATIENCE
from support.programs import running

prometheus = pytest.importorskip("prometheus_client.parser")


def test_more_room_serves_the_line_in_its_order_and_touches_nobody(configured: Running) -> None:
    clients = []
    for _ in range(5):
        clients.append(configured.connect())
        clients[-1].sendall(b"early\r\n")
    configured.until(active=2, waiting=3)
    configured.write("[limiters.main]\nmax_connections = 4\norder = 'lifo'\n" + configured.service())
    configured.reload()
    configured.program.wait_for(r"main: max_connections 2 -> 4, order 'fifo' -> 'lifo'")
    configured.until(active=4, waiting=1)
    for number in (0, 1, 3, 4):
        assert clients[number].recv(100) == b"hello early\r\n"
    assert ask(clients[0]) == b"hello you\r\n"
    clients[0].close()
    assert clients[2].recv(100) == b"hello early\r\n"


def test_a_wrong_file_changes_nothing_and_says_why(configured: Running) -> None:
    with configured.connect() as client:
        assert ask(client) == b"hello you\r\n"
        for wrong, why in (
            ("[limiters.main]\nmax_connections = -1\n" + configured.service(), "max_connections must be"),
            ("nonsense", "this is not TOML"),
            (
                "[limiters.main]\nmax_connections = 9\n" + configured.service(factory="server:nobody"),
                "factory server:nobody failed",
            ),
        ):
            configured.write(wrong)
            configured.reload("nothing was changed")
            configured.program.wait_for(why)
        with socket.create_server(("127.0.0.1", configured.other)):
            configured.write(
                "[limiters.main]\nmax_connections = 9\n"
                + configured.service()
                + configured.service("second", configured.other)
            )
            configured.reload("nothing was changed")
        configured.path.unlink()
        configured.reload("nothing was changed")
        assert ask(client) == b"hello you\r\n"
        assert configured.limiter()["max_connections"] == 2


def test_services_come_and_go_while_connections_stay(configured: Running) -> None:
    limits = "[limiters.main]\nmax_connections = 2\n"
    with configured.connect() as old:
        assert ask(old) == b"hello you\r\n"
        configured.write(limits + configured.service() + configured.service("second", configured.other))
        configured.reload()
        with configured.connect(configured.other) as new:
            assert ask(new) == b"hello you\r\n"
            configured.write(limits + configured.service("second", configured.other, "server:bye"))
            configured.reload()
            with pytest.raises(ConnectionRefusedError):
                configured.connect()
            assert ask(old) == b"hello you\r\n"
            assert ask(new) == b"hello you\r\n"
        with configured.connect(configured.other) as newest:
            assert ask(newest) == b"bye you\r\n"


def test_what_only_the_next_start_changes_is_logged_and_changes_nothing(configured: Running) -> None:
    with configured.connect() as client:
        assert ask(client) == b"hello you\r\n"
        text = "processes = 2\n[limiters.main]\nmax_connections = 3\n" + configured.service()
        configured.write(text)
        configured.reload()
        configured.program.wait_for("processes changes with the next start of the program")
        assert configured.limiter()["max_connections"] == 3
        assert ask(client) == b"hello you\r\n"


def test_a_service_can_move_and_those_who_wait_for_it_keep_their_places(configured: Running) -> None:
    clients = [configured.connect() for _ in range(3)]
    configured.until(active=2, waiting=1)
    configured.write("[limiters.main]\nmax_connections = 2\n" + configured.service(port=configured.other))
    configured.reload()
    with pytest.raises(ConnectionRefusedError):
        configured.connect()
    clients[0].close()
    assert ask(clients[2]) == b"hello you\r\n"
    clients[1].close()
    with configured.connect(configured.other) as new:
        assert ask(new) == b"hello you\r\n"


def test_the_status_page_can_be_turned_off_and_on(configured: Running) -> None:
    text = "[limiters.main]\nmax_connections = 2\n" + configured.service()
    configured.write(text, status=False)
    configured.reload()
    with pytest.raises(OSError, match="refused"):
        configured.get("health")
    configured.write(text)
    configured.reload()
    assert configured.get("health") == "ok\n"


def test_a_limiter_that_is_no_more_lets_its_connections_finish(configured: Running) -> None:
    with configured.connect() as old:
        assert ask(old) == b"hello you\r\n"
        configured.write(
            "[limiters.other]\nmax_connections = 1\n" + configured.service().replace("main", "other")
        )
        configured.reload()
        assert ask(old) == b"hello you\r\n"
        with configured.connect() as new:
            assert ask(new) == b"hello you\r\n"
        assert configured.limiter()["name"] == "other"


def test_a_limiter_that_comes_back_counts_whom_it_still_serves(configured: Running) -> None:
    served, clients = [], []
    for number in range(7):
        name = ("main", "other")[number % 2]
        limits = f"[limiters.{name}]\nmax_connections = 2\n"
        configured.write(limits + configured.service().replace("main", name))
        configured.reload()
        clients = [configured.connect() for _ in range(3)]
        configured.until(name=name, active=2, waiting=1 if number < 2 else 3)
        served += clients[:2] if number < 2 else []
    assert [ask(client) for client in served] == 4 * [b"hello you\r\n"]
    for client in served[:2]:
        client.close()
    assert [ask(client) for client in clients[:2]] == 2 * [b"hello you\r\n"]


def test_at_the_end_those_of_a_limiter_that_is_no_more_may_finish_and_nothing_is_opened(
    configured: Running,
) -> None:
    configured.write("drain_timeout = 20\n[limiters.main]\nmax_connections = 2\n" + configured.service())
    configured.reload()
    with configured.connect() as old:
        assert ask(old) == b"hello you\r\n"
        configured.write(
            "drain_timeout = 20\n[limiters.other]\nmax_connections = 2\n"
            + configured.service().replace("main", "other")
        )
        configured.reload()
        configured.program.process.send_signal(signal.SIGTERM)
        configured.program.wait_for("main: 1 connections may finish")
        configured.program.process.send_signal(signal.SIGHUP)
        assert ask(old) == b"hello you\r\n"
        with pytest.raises(ConnectionRefusedError):
            configured.connect()
        assert ask(old) == b"hello you\r\n"
    assert configured.program.process.wait(PATIENCE) == 0


def test_services_can_swap_their_ports(configured: Running) -> None:
    limits = "[limiters.main]\nmax_connections = 9\n"
    one, two = configured.port, configured.other

    def write(hello: int, bye: int) -> None:
        configured.write(
            limits + configured.service("one", hello) + configured.service("two", bye, "server:bye")
        )

    write(one, two)
    configured.reload()
    with configured.connect(one) as client:
        assert ask(client) == b"hello you\r\n"
        write(two, one)
        configured.reload()
        with configured.connect(one) as swapped, configured.connect(two) as other:
            assert ask(client) == ask(other) == b"hello you\r\n"
            assert ask(swapped) == b"bye you\r\n"
    # The status page is no exception, and gives its port to a service, and the other way round.
    configured.status, status = two, configured.status
    configured.write(limits + configured.service("one", status))
    configured.reload()
    assert configured.get("health") == "ok\n"
    with configured.connect(status) as client:
        assert ask(client) == b"hello you\r\n"


def test_what_cannot_take_the_place_of_a_port_leaves_it_as_it_was(configured: Running) -> None:
    """
    Our own port is in the way, and so is one of somebody else.
    """
    limits = "[limiters.main]\nmax_connections = 9\n"
    with socket.create_server(("127.0.0.2", configured.port)), configured.connect() as client:
        assert ask(client) == b"hello you\r\n"
        anywhere = configured.service().replace(":interface=127.0.0.1", "")
        configured.write(limits + anywhere)
        configured.reload("nothing was changed")
        assert ask(client) == b"hello you\r\n"
        with configured.connect() as new:
            assert ask(new) == b"hello you\r\n"
    configured.reload()
    with configured.connect() as new:
        assert ask(new) == b"hello you\r\n"


def test_a_status_page_whose_port_is_taken_comes_when_it_is_free(configured: Running) -> None:
    text = "[limiters.main]\nmax_connections = 3\n" + configured.service()
    configured.write(text, status=False)
    configured.reload()
    with socket.create_server(("127.0.0.1", configured.status)):
        configured.write(text)
        configured.reload()
        configured.program.wait_for("the status page cannot be started: .* it is tried again every second")
    configured.program.wait_for("the status page started")
    assert configured.get("health") == "ok\n"
    assert configured.program.output.count("cannot be started") == 1


def test_a_fifo_in_the_place_of_the_file_holds_nothing_up(configured: Running) -> None:
    configured.path.unlink()
    os.mkfifo(configured.path)
    configured.reload("nothing was changed")
    configured.program.wait_for("connlimit.toml: the file cannot be read: it is not a regular file")
    with configured.connect() as client:
        assert ask(client) == b"hello you\r\n"
    assert configured.program.terminate() == 0


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    it = Running(tmp_path)
    it.write("[limiters.main]\nmax_connections = 2\n" + it.service())
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with running("connlimit", "--config", str(it.path), cwd=tmp_path) as program:
            it.program = program
            assert systemd.recv(1000) == b"READY=1"
            assert systemd.recv(1000) == b"STATUS=main: 0/2 served, 0 waiting"
            it.reload()
            assert systemd.recv(1000).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
            assert systemd.recv(1000) == b"READY=1"
            assert program.terminate() == 0
            assert systemd.recv(1000) == b"STOPPING=1"


def test_the_unit_runs_the_command_as_it_stands() -> None:
    unit = (Path(__file__).parents[2] / "docs/examples/connlimit.service").read_text()
    (command,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    assert command.endswith("/twistd --nodaemon --pidfile= connlimit --config /etc/connlimit.toml")


def test_a_socket_of_systemd_can_be_listened_at(tmp_path: Path) -> None:
    it = Running(tmp_path)
    it.write(
        '[limiters.main]\nmax_connections = 2\n[services.greeter]\nlisten = "systemd:domain=INET:name=web"\n'
        'factory = "server:hello"\n'
    )
    with socket.create_server(("127.0.0.1", 0)) as listening:
        # As systemd does: the descriptor is 3, and the PID that of the program itself.
        script = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); "
            "os.environ.update(LISTEN_FDS='1', LISTEN_FDNAMES='web', LISTEN_PID=str(os.getpid())); "
            "os.execv(sys.argv[2], sys.argv[2:])"
        )
        from support.programs import twistd_command

        twistd = twistd_command("connlimit", "--config", str(it.path))
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(listening.fileno()), *twistd],
            pass_fds=[listening.fileno()],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
        try:
            with socket.create_connection(listening.getsockname(), PATIENCE) as client:
                assert ask(client) == b"hello you\r\n"
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0


def test_the_shipped_example_runs_is_reloaded_and_stops(tmp_path: Path) -> None:
    example = (Path(__file__).parents[2] / "docs/examples/connlimit.toml").read_text()
    ports = {number: free_port() for number in ("8080", "8443", "8090", "8081", "2525", "9000")}
    for number, port in ports.items():
        example = re.sub(rf"\b{number}\b", str(port), example)
    path = tmp_path / "connlimit.toml"
    path.write_text(example)
    (tmp_path / "page.txt").write_text("the page")
    with (
        running("web", f"--listen=tcp:{ports['9000']}", f"--path={tmp_path}") as backend,
        running("connlimit", "--config", str(path), cwd=tmp_path) as program,
    ):
        backend.wait_for("Starting factory")
        program.wait_for("mail: .* 100 served at once")

        def page(number: str) -> str:
            url = f"http://127.0.0.1:{ports[number]}/page.txt"
            with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                return answer.read().decode()

        assert page("8080") == page("8090") == "the page"
        path.write_text(example.replace("max_connections = 500", "max_connections = 400"))
        program.process.send_signal(signal.SIGHUP)
        program.wait_for("web: max_connections 500 -> 400")
        assert page("8080") == "the page"
        with socket.create_connection(("127.0.0.1", ports["2525"]), PATIENCE) as client:
            client.sendall(b"PROXY TCP4 192.0.2.1 127.0.0.1 5 6\r\n")
            program.wait_for("reloaded ")
        with urllib.request.urlopen(f"http://127.0.0.1:{ports['8081']}/health", timeout=PATIENCE) as answer:
            assert answer.read() == b"ok\n"
        assert program.terminate() == 0


class Load(threading.Thread):
    """
    Clients that come one after the other, and what became of them.
    """

    def __init__(self, port: int, ended: threading.Event) -> None:
        super().__init__()
        self._port, self._ended = port, ended
        self.answered = self.cut = 0

    def run(self) -> None:
        while not self._ended.is_set():
            try:
                with socket.create_connection(("127.0.0.1", self._port), PATIENCE) as client:
                    for number in range(3):
                        word = b"%d" % number
                        if ask(client, word) != b"hello " + word + b"\r\n":
                            self.cut += 1
                            break
                    else:
                        self.answered += 1
            except OSError:
                self.cut += 1


def test_under_load_nothing_is_cut_and_everything_tells_the_same(configured: Running) -> None:
    ended = threading.Event()
    load = [Load(configured.port, ended) for _ in range(12)]
    for each in load:
        each.start()
    scraped = []
    for room in (1, 5, 3):
        time.sleep(0.3)
        configured.write(f"[limiters.main]\nmax_connections = {room}\n" + configured.service())
        configured.reload()
        scraped.append(sample(configured.get("metrics"), "connlimit_max_connections", limiter="main"))
        assert "refused" in configured.get("")
    configured.program.wait_for(r"main: full: max_connections is \d: \d served")
    ended.set()
    for each in load:
        each.join(PATIENCE)
    configured.until(active=0, waiting=0)
    assert scraped == [1, 5, 3]
    assert sum(each.cut for each in load) == 0
    answered = sum(each.answered for each in load)
    facts, metrics = configured.limiter(), configured.get("metrics")
    assert facts["accepted"] == facts["finished"] == answered
    for metric in ("accepted", "finished", "served"):
        assert sample(metrics, f"connlimit_{metric}_total", limiter="main") == answered
    assert sample(metrics, "connlimit_wait_seconds_count", limiter="main") == answered
    assert sample(metrics, "connlimit_connections", limiter="main", state="active") == 0
    assert f'<th scope="row">accepted</th><td>{answered}</td>' in configured.get("")
    with configured.connect() as last:
        assert ask(last) == b"hello you\r\n"
        configured.program.process.send_signal(signal.SIGTERM)
        with suppress(ConnectionResetError):  # its time is over at once
            assert read_all(last) == b""
    assert configured.program.process.wait(PATIENCE) == 0
    configured.program.wait_for(f"main: drained: {answered + 1} connections were served and 0 refused in all")
    configured.program.wait_for(r"main: room again after [\d.]+ s: \d+ waited")


def sample(text: str, name: str, **labels: str) -> float:
    """
    The value of one sample of Prometheus's text format.
    """
    (value,) = [
        sample.value
        for family in prometheus.text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and sample.labels == labels
    ]
    return value
