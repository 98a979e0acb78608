"""
Several processes at one port: a parent, its workers, and the limit that is one for all of them.
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from support.applications import ECHO
from support.clients import free_port, read_all
from support.patience import PATIENCE
from support.programs import Program, failing, running, twistd_command
from support.redis import Redis

from connlimit._twistd.config import MAX_PROCESSES

LOCAL = "tcp:0:interface=127.0.0.1"

NAMED = """
import os
from twisted.internet.protocol import Factory, Protocol

class Named(Protocol):
    def dataReceived(self, data):
        self.transport.write(b"%d %s" % (os.getpid(), data))

factory = Factory.forProtocol(Named)
"""


class Backend(socketserver.ThreadingTCPServer):
    """
    A server that counts how many it serves at once.

    :ivar maximum: the highest count.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1000

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.lock = threading.Lock()
        self.now = self.maximum = self.served = 0


class Answer(socketserver.StreamRequestHandler):
    """
    Answers one line, a little later.
    """

    server: Backend

    def handle(self) -> None:
        with self.server.lock:
            self.server.now += 1
            self.server.maximum = max(self.server.maximum, self.server.now)
        word = self.rfile.readline()
        time.sleep(0.01)
        with self.server.lock:
            self.server.now -= 1
            self.server.served += 1
        self.wfile.write(b"served " + word)


@pytest.fixture
def backend() -> Iterator[Backend]:
    """
    A counting server that runs.
    """
    with Backend() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """
    A folder with a server that tells its process.
    """
    (tmp_path / "named.py").write_text(NAMED)
    return tmp_path


LIMIT = ("--max-connections=100",)
FACTORY = ("--factory", "named:factory")


def workers(program: Program, count: int) -> dict[int, int]:
    """
    The process of each worker, when all of them serve.
    """
    for number in range(1, count + 1):
        program.wait_for(rf"worker {number} serves")
    return {
        int(number): int(pid) for number, pid in re.findall(r"worker (\d+) is process (\d+)", program.output)
    }


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), PATIENCE)


def asked(client: socket.socket) -> int:
    """
    The process that serves a client.
    """
    client.sendall(b"hello")
    return answer(client)


def answer(client: socket.socket) -> int:
    """
    The process that has answered a client.
    """
    pid, _, word = client.recv(100).partition(b" ")
    assert word == b"hello"
    return int(pid)


def is_gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def wait_until_gone(pids: dict[int, int]) -> None:
    began = time.monotonic()
    while not all(map(is_gone, pids.values())):
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.02)


# One limit


def crowd(port: int, count: int) -> list[bytes]:
    """
    What each of so many clients receives, many of them at once.
    """

    def one(number: int) -> bytes:
        with connected(port) as client:
            client.sendall(b"%d\n" % number)
            return read_all(client)

    with ThreadPoolExecutor(100) as pool:
        return list(pool.map(one, range(count)))


@pytest.mark.parametrize("by", ["parent", "redis"])
def test_a_crowd_is_served_by_all_workers_and_never_more_at_once_than_the_limit(
    by: str, backend: Backend, redis: Redis
) -> None:
    forward = f"tcp:127.0.0.1:{backend.server_address[1]}"
    shared = ["--shared", redis.url, "--name", "crowd"] if by == "redis" else []
    arguments = ["--processes=4", "--max-connections=6", "--listen", LOCAL, "--forward", forward, *shared]
    with running("connlimit", *arguments) as program:
        workers(program, 4)
        assert crowd(program.port(), 200) == [b"served %d\n" % number for number in range(200)]
        assert backend.served == 200
        assert 1 < backend.maximum <= 6
        assert program.terminate() == 0
        counts = re.findall(r"\[worker \d, .*\] \S+ drained: (\d+) connections were served", program.output)
        assert sum(map(int, counts)) == 200
        assert sum(count != "0" for count in counts) > 1


def test_without_a_limit_all_are_served_at_once(folder: Path) -> None:
    with (
        running("connlimit", "--processes=2", *LIMIT, "--listen", LOCAL, *FACTORY, cwd=folder) as program,
        ExitStack() as stack,
    ):
        pids = workers(program, 2)
        clients = [stack.enter_context(connected(program.port())) for _ in range(50)]
        assert {asked(client) for client in clients} <= set(pids.values())


# Workers that die


def test_a_dead_workers_slots_are_free_and_another_takes_its_place(folder: Path) -> None:
    arguments = ["--processes=2", "--max-connections=3", "--listen", LOCAL, *FACTORY]
    with running("connlimit", *arguments, cwd=folder) as program, ExitStack() as stack:
        before = workers(program, 2)
        served = [stack.enter_context(connected(program.port())) for _ in range(3)]
        busy = [asked(client) for client in served]
        victim = busy[0]
        number = next(number for number, pid in before.items() if pid == victim)
        os.kill(victim, signal.SIGKILL)
        program.wait_for(rf"worker {number} died of SIGKILL; it is restarted in 0.1 s")
        # The slots of the dead are free while those of the living are not.
        clients = [stack.enter_context(connected(program.port())) for _ in range(busy.count(victim))]
        assert victim not in {asked(client) for client in clients}
        program.wait_for(rf"(?s)died of SIGKILL.*worker {number} serves")
        stack.close()
        clients = [stack.enter_context(connected(program.port())) for _ in range(3)]
        after = workers(program, 2)
        assert after[number] != victim
        assert {asked(client) for client in clients} <= set(after.values())
        assert program.terminate() == 0


def test_what_a_dead_worker_has_not_accepted_is_served_by_another(folder: Path) -> None:
    with (
        running("connlimit", "--processes=2", *LIMIT, "--listen", LOCAL, *FACTORY, cwd=folder) as program,
        ExitStack() as stack,
    ):
        pids = workers(program, 2)
        for pid in pids.values():
            os.kill(pid, signal.SIGSTOP)
        clients = [stack.enter_context(connected(program.port())) for _ in range(20)]
        os.kill(pids[1], signal.SIGKILL)
        assert pids[1] not in {asked(client) for client in clients}
        os.kill(pids[2], signal.SIGCONT)


def test_a_worker_that_is_asked_to_end_lets_its_connections_finish(folder: Path) -> None:
    arguments = ["--processes=2", *LIMIT, "--drain-timeout=20", "--listen", LOCAL, *FACTORY]
    with running("connlimit", *arguments, cwd=folder) as program, connected(program.port()) as client:
        workers(program, 2)
        pid = asked(client)
        os.kill(pid, signal.SIGTERM)
        program.wait_for("1 connections may finish")
        assert asked(client) == pid
        client.close()
        program.wait_for("ended with exit code 0; it is restarted")


def test_a_worker_that_dies_again_and_again_is_started_ever_more_slowly(tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(
        f"import os, sys\n{ECHO}\nif 'connlimit._twistd.worker_program' in sys.modules:\n    os._exit(7)\n"
    )
    arguments = ["--processes=2", *LIMIT, "--listen", LOCAL, "--factory", "dying:factory"]
    with running("connlimit", *arguments, cwd=tmp_path) as program:
        for delay in ("0.1", "0.2", "0.4"):
            program.wait_for(rf"worker 1 ended with exit code 7; it is restarted in {delay} s")
        assert program.terminate() == 0


# Stopping


def test_all_workers_drain_together(folder: Path) -> None:
    arguments = ["--processes=3", *LIMIT, "--drain-timeout=20", "--listen", LOCAL, *FACTORY]
    with running("connlimit", *arguments, cwd=folder) as program, ExitStack() as stack:
        pids = workers(program, 3)
        port = program.port()
        clients = [stack.enter_context(connected(port)) for _ in range(12)]
        served = [asked(client) for client in clients]
        program.process.send_signal(signal.SIGTERM)
        for number in {number for number, pid in pids.items() if pid in served}:
            program.wait_for(rf"\[worker {number}, .*\] .* may finish within 20.0 s")
        assert [asked(client) for client in clients] == served
        assert program.process.poll() is None
        for client in clients:
            client.close()
        assert program.process.wait(PATIENCE) == 0
        assert all(map(is_gone, pids.values()))
        with pytest.raises(ConnectionRefusedError):
            connected(port)
        program.wait_for("drained: 12 connections were served")
        assert "Traceback" not in program.output


def test_a_second_order_to_stop_ends_all_at_once(folder: Path) -> None:
    arguments = ["--processes=2", *LIMIT, "--drain-timeout=60", "--listen", LOCAL, *FACTORY]
    with running("connlimit", *arguments, cwd=folder) as program, connected(program.port()) as client:
        pids = workers(program, 2)
        asked(client)
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("may finish")
        assert program.terminate() == -signal.SIGTERM
        wait_until_gone(pids)


def test_workers_whose_parent_was_killed_end_as_well(folder: Path) -> None:
    arguments = ["--processes=2", *LIMIT, "--listen", LOCAL, *FACTORY]
    with running("connlimit", *arguments, cwd=folder) as program, connected(program.port()) as client:
        pids = workers(program, 2)
        asked(client)
        program.process.kill()
        wait_until_gone(pids)


# What can be served, and where


def test_every_kind_of_server_and_port_works(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    arguments = [f"--listen={LOCAL}", f"--listen=unix:{path}:mode=600", f"--listen=haproxy:{LOCAL}"]
    with running("connlimit", "--processes=2", *LIMIT, *arguments, *FACTORY, cwd=folder) as program:
        pids = workers(program, 2)
        os.kill(pids[1], signal.SIGTERM)  # a worker that ends in order leaves the file
        program.wait_for("(?s)restarted.*worker 1 serves")
        pids = workers(program, 2)
        assert path.stat().st_mode & 0o777 == 0o600
        plain, proxied = re.findall(r"\[-\] connlimit starting on (\d+)", program.output)
        with connected(int(plain)) as client:
            assert asked(client) in pids.values()
        with closing(socket.socket(socket.AF_UNIX)) as client:
            client.connect(str(path))
            assert asked(client) in pids.values()
        with connected(int(proxied)) as client:
            client.sendall(b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n")
            assert asked(client) in pids.values()
        assert program.terminate() == 0
        assert not path.exists()


def test_a_plugin_is_served_by_all_workers(tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text("the page")
    with running(
        *("connlimit", "--processes=2", "--max-connections=4", "web", "--listen", LOCAL, "--path"),
        str(tmp_path),
    ) as program:
        workers(program, 2)
        url = f"http://127.0.0.1:{program.port()}/page.txt"
        assert urllib.request.urlopen(url, timeout=PATIENCE).read() == b"the page"


def test_sockets_of_systemd_are_served_and_it_is_told_when_all_workers_serve(folder: Path) -> None:
    with (
        closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as notified,
        socket.create_server(("127.0.0.1", 0)) as given,
    ):
        notified.bind(str(folder / "notify"))
        notified.settimeout(PATIENCE)
        where = "systemd:domain=INET:name=web"
        command = twistd_command("connlimit", "--processes=2", *LIMIT, "--listen", where, *FACTORY)
        # As systemd does: the descriptor is 3, and the PID that of the program itself.
        script = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); "
            "os.environ.update(LISTEN_FDS='1', LISTEN_FDNAMES='web', LISTEN_PID=str(os.getpid())); "
            "os.execv(sys.argv[2], sys.argv[2:])"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(given.fileno()), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            pass_fds=[given.fileno()],
            env={**os.environ, "PYTHONUNBUFFERED": "1", "NOTIFY_SOCKET": str(folder / "notify")},
        )
        program = Program(process)
        try:
            assert notified.recv(100) == b"READY=1"
            pids = workers(program, 2)
            with connected(given.getsockname()[1]) as client:
                assert asked(client) in pids.values()
            assert program.terminate() == 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def test_workers_find_what_their_parent_has_found_wherever_it_goes(folder: Path) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    file = folder / "connlimit.toml"
    port = free_port()
    write(file, port)
    with running(f"--rundir={elsewhere}", "connlimit", "--config", "connlimit.toml", cwd=folder) as program:
        pids = workers(program, 2)
        with connected(port) as client:
            assert asked(client) in pids.values()
        write(file, port, slots=2)
        program.process.send_signal(signal.SIGHUP)
        reloaded(program, 1)
        assert f"reloaded {file}" in program.output
        assert program.terminate() == 0


# What is seen


def test_the_status_page_and_the_metrics_add_up_what_the_workers_do(folder: Path) -> None:
    pytest.importorskip("prometheus_client")
    where = f"127.0.0.1:{free_port()}"
    status = f"tcp:{where.split(':')[1]}:interface=127.0.0.1"
    arguments = ["--processes=2", "--max-connections=4", "--status", status, "--listen", LOCAL, *FACTORY]

    def get(path: str) -> str:
        return urllib.request.urlopen(f"http://{where}/{path}", timeout=PATIENCE).read().decode()

    def until(**facts: object) -> dict[str, object]:
        began = time.monotonic()
        while True:
            now = json.loads(get("status.json"))["limiters"][0]
            if facts.items() <= now.items():
                return now
            assert time.monotonic() - began < PATIENCE, now
            time.sleep(0.05)

    with running("connlimit", *arguments, cwd=folder) as program, ExitStack() as stack:
        pids = workers(program, 2)
        clients = [stack.enter_context(connected(program.port())) for _ in range(10)]
        now = until(active=4, waiting=6, served=4, accepted=10, max_connections=4)
        assert now["peers"] == [{"peer": "127.0.0.1", "active": 4, "waiting": 6}]
        assert len(now["queue"]) == 6
        assert 'connlimit_connections{limiter="default",state="waiting"} 6.0' in get("metrics")
        for client in clients:
            client.close()
        until(active=0, waiting=0)
        os.kill(pids[1], signal.SIGKILL)
        program.wait_for("(?s)died of SIGKILL.*worker 1 serves")
        now = until(active=0, accepted=10)
        assert now["accepted"] == now["finished"] + now["departed"]
        assert 'connlimit_wait_seconds_count{limiter="default"} ' in get("metrics")


# The configuration file


def test_a_file_that_is_read_again_changes_all_workers(folder: Path) -> None:
    one, two = free_port(), free_port()
    file = folder / "connlimit.toml"

    def write(slots: int, *ports: int) -> None:
        listen = json.dumps([f"tcp:{port}:interface=127.0.0.1" for port in ports])
        file.write_text(
            f"processes = 2\ndrain_timeout = 5\n[limiters.main]\nmax_connections = {slots}\n"
            f'[services.named]\nlisten = {listen}\nfactory = "named:factory"\n'
        )

    write(1, one)
    with running("connlimit", "--config", str(file), cwd=folder) as program, ExitStack() as stack:
        pids = workers(program, 2)
        clients = [stack.enter_context(connected(one)) for _ in range(4)]
        for client in clients:
            client.sendall(b"hello")
        assert len(select.select(clients, [], [], PATIENCE)[0]) == 1
        write(4, one, two)
        program.process.send_signal(signal.SIGHUP)
        for number in pids:
            program.wait_for(rf"\[worker {number}, .*\] reloaded .*connlimit.toml")
        for client in clients:
            assert answer(client) in pids.values()
        stack.close()
        with connected(two) as client:
            assert asked(client) in pids.values()
        file.write_text("nonsense")
        program.process.send_signal(signal.SIGHUP)
        program.wait_for("nothing was changed")
        write(4, two)
        program.process.send_signal(signal.SIGHUP)
        for number in pids:
            program.wait_for(rf"(?s)\[worker {number}, .*\] .*nothing was.*\[worker {number}, .*\] reloaded ")
        with pytest.raises(ConnectionRefusedError):
            connected(one)
        assert program.terminate() == 0


def write(file: Path, port: int, slots: int = 3, when_full: str = "refuse") -> None:
    """
    Write a configuration for two workers, at once.
    """
    new = file.with_suffix(".new")
    new.write_text(
        f"processes = 2\ndrain_timeout = 5\n[limiters.main]\nmax_connections = {slots}\n[services.named]\n"
        f'listen = "tcp:{port}:interface=127.0.0.1"\nfactory = "named:factory"\nwhen_full = "{when_full}"\n'
    )
    new.replace(file)


def test_reloads_in_quick_succession_leave_no_worker_deaf(folder: Path) -> None:
    """
    Each pair restarts the service and takes that back, so that workers which are late find nothing changed.
    """
    port, file = free_port(), folder / "connlimit.toml"
    write(file, port)
    with running("connlimit", "--config", str(file), cwd=folder) as program:
        workers(program, 2)
        for _ in range(30):
            for when_full in ("stop-accepting", "refuse"):
                write(file, port, when_full=when_full)
                program.process.send_signal(signal.SIGHUP)
                time.sleep(random.uniform(0.001, 0.02))
            served_at_once(port, 3)
        assert program.terminate() == 0


def served_at_once(port: int, count: int) -> set[int]:
    """
    The processes that serve so many clients at once, as soon as a port that is opened again lets them.
    """
    began = time.monotonic()
    while True:
        try:
            with ExitStack() as stack:
                clients = [stack.enter_context(connected(port)) for _ in range(count)]
                for client in clients:
                    client.sendall(b"hello")
                return {answer(client) for client in clients}
        except (ConnectionError, AssertionError):  # it was closed with its backlog
            assert time.monotonic() - began < PATIENCE
            time.sleep(0.01)


def test_a_worker_that_dies_while_the_file_is_broken_or_not_reloaded_comes_back(folder: Path) -> None:
    port, file = free_port(), folder / "connlimit.toml"
    write(file, port)
    with running("connlimit", "--config", str(file), cwd=folder) as program, ExitStack() as stack:
        pids = workers(program, 2)
        for text in ("nonsense", "", None):
            if text is None:
                write(file, port, slots=1)
            elif text:
                file.write_text(text)
            else:
                file.unlink()
            for number in pids:
                before = len(re.findall(rf"worker {number} serves", program.output))
                os.kill(pids[number], signal.SIGKILL)
                program.wait_for(rf"(?s)(worker {number} serves.*){{{before + 1}}}")
            pids = workers(program, 2)
        clients = {stack.enter_context(connected(port)) for _ in range(4)}
        for client in clients:
            client.sendall(b"hello")
        for _ in range(3):
            client = select.select(clients, [], [], PATIENCE)[0][0]
            assert answer(client) in pids.values()
            clients.remove(client)
        assert not select.select(clients, [], [], 0.2)[0]


def reloaded(program: Program, count: int) -> None:
    """
    Wait until the parent and both workers have read the file again so many times.
    """
    began = time.monotonic()
    while program.output.count("reloaded ") < 3 * count:
        assert time.monotonic() - began < PATIENCE, program.output
        time.sleep(0.005)


def test_a_storm_of_reloads_while_workers_die_leaves_every_port_served_below_the_limit(folder: Path) -> None:
    one, two, file = free_port(), free_port(), folder / "connlimit.toml"

    def write(first: int, second: int, name: str, slots: int, when_full: str) -> None:
        new = file.with_suffix(".new")
        new.write_text(
            f"processes = 2\n[limiters.{name}]\nmax_connections = {slots}\n"
            f'[services.one]\nlisten = "tcp:{first}:interface=127.0.0.1"\nfactory = "named:factory"\n'
            f'[services.two]\nlisten = "tcp:{second}:interface=127.0.0.1"\nfactory = "named:factory"\n'
            f'when_full = "{when_full}"\n'
        )
        new.replace(file)

    write(one, two, "main", 4, "refuse")
    with running("connlimit", "--config", str(file), cwd=folder) as program:
        workers(program, 2)
        for number in range(150):
            ports = random.sample([one, two], 2)
            name, when_full = random.choice(["main", "other"]), random.choice(["refuse", "stop-accepting"])
            write(*ports, name, random.randint(1, 6), when_full)
            if number % 10 == 5:
                file.write_text("nonsense")
            if number % 50 == 25:
                pids = dict(re.findall(r"worker (\d+) is process (\d+)", program.output))
                os.kill(int(pids[random.choice("12")]), signal.SIGKILL)
            program.process.send_signal(signal.SIGHUP)
            time.sleep(random.choice([0, 0.001, 0.005, 0.02]))
        write(one, two, "last", 4, "refuse")
        program.process.send_signal(signal.SIGHUP)
        program.wait_for("limiter last added")
        for port in (one, two):
            assert served_at_once(port, 4)
        with ExitStack() as stack:
            clients = [stack.enter_context(connected(port)) for port in 10 * [one, two]]
            for client in clients:
                client.sendall(b"hello")
            answered = 0
            while clients:
                served = select.select(clients, [], [], PATIENCE)[0]
                assert 0 < len(served) <= 4
                for client in served:
                    assert answer(client)
                    client.close()
                    clients.remove(client)
                    answered += 1
        assert answered == 20
        assert "Traceback" not in program.output
        assert program.terminate() == 0


def test_limiters_that_are_no_more_are_forgotten(folder: Path) -> None:
    file = folder / "connlimit.toml"

    def write(name: str) -> None:
        new = file.with_suffix(".new")
        new.write_text(
            f"processes = 2\n[limiters.{name}]\nmax_connections = 4\n"
            f'[services.one]\nlisten = "tcp:0:interface=127.0.0.1"\nfactory = "named:factory"\n'
        )
        new.replace(file)

    write("first")
    with running("connlimit", "--config", str(file), cwd=folder) as program:
        workers(program, 2)
        for number in range(1, 121):
            write(f"limiter{number}")
            program.process.send_signal(signal.SIGHUP)
            reloaded(program, number)
            if number == 20:
                before = program.resident_memory()
        # Each that were kept would take seven kilobytes and more.
        assert program.resident_memory() - before < 400_000
        assert program.terminate() == 0


# What is logged

TELLING = """
import os
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger, jsonFileLogObserver
from twisted.python import log

class Thing:
    name = "thing"

logger = Logger(namespace="telling")

class Telling(Protocol):
    def dataReceived(self, data):
        form = "{data!r} of {thing.name} and {many[0]} at {at:.1f}"
        logger.warn(form, data=data, thing=Thing(), many=[5], at=1.23)
        log.msg("the old way", more=7)
        try:
            1 / 0
        except ZeroDivisionError:
            logger.failure("it fails with {number}", number=5)
        circle = {}
        circle["itself"] = circle
        logger.info("what is {no} JSON", no="no", circle=circle)
        logger.info("all is told")

factory = Factory.forProtocol(Telling)

def observer():
    return jsonFileLogObserver(open("log.json", "w", buffering=1), recordSeparator="")
"""


def test_events_of_workers_are_those_of_a_single_process_but_for_their_system(tmp_path: Path) -> None:
    (tmp_path / "telling.py").write_text(TELLING)
    events = {}
    for processes in (1, 2):
        port = free_port()
        arguments = [f"--processes={processes}", "--max-connections=9", f"--listen=tcp:{port}"]
        command = twistd_command(
            "--logger=telling.observer", "connlimit", *arguments, "--factory=telling:factory"
        )
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        with subprocess.Popen(command, cwd=tmp_path, env=environment) as process:
            try:
                client = connected_soon(port)
                client.sendall(b"hello")
                told = until_told(tmp_path / "log.json")
                client.close()
            finally:
                process.kill()
        events[processes] = [each for each in told if each["log_namespace"] == "telling" or "more" in each]
        (tmp_path / "log.json").unlink()
    assert len(events[1]) == 4  # one has no JSON
    for event in events[2]:
        assert event.pop("worker") in (1, 2)
        assert re.match(r"worker [12], (Telling,0,127.0.0.1|telling#\w+)", event.pop("log_system"))
    alone = [{k: v for k, v in event.items() if k != "log_system"} for event in events[1]]
    together = [event for event in events[2] if event["log_format"] != "{text}"]
    for event in alone + together:
        event.pop("log_failure", None)
        for key in ("log_time", "time"):
            event.pop(key, None)
    assert together == alone
    (circle,) = [event for event in events[2] if event["log_format"] == "{text}"]
    assert circle["text"] == "what is no JSON"


def until_told(path: Path) -> list[dict[str, object]]:
    """
    The events of a log, once the last was logged.
    """
    began = time.monotonic()
    while not path.exists() or "all is told" not in path.read_text():
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.05)
    return [json.loads(line) for line in path.read_text().splitlines()]


def connected_soon(port: int) -> socket.socket:
    """
    A client, once somebody listens.
    """
    began = time.monotonic()
    while True:
        try:
            return connected(port)
        except ConnectionRefusedError:
            assert time.monotonic() - began < PATIENCE
            time.sleep(0.05)


def test_the_log_of_a_worker_says_why_something_failed(tmp_path: Path) -> None:
    (tmp_path / "telling.py").write_text(TELLING)
    arguments = ["--processes=2", "--max-connections=9", "--listen", LOCAL, "--factory=telling:factory"]
    with running("connlimit", *arguments, cwd=tmp_path) as program, connected(program.port()) as client:
        client.sendall(b"hello")
        program.wait_for(
            r"(?s)worker \d, telling#critical\] it fails with 5.*ZeroDivisionError: division by zero"
        )


def test_a_parent_that_is_stuck_holds_no_worker_up(tmp_path: Path) -> None:
    (tmp_path / "talkative.py").write_text(
        "from twisted.internet.protocol import Factory, Protocol\n"
        "from twisted.logger import Logger\n"
        "class Talkative(Protocol):\n"
        "    def dataReceived(self, data):\n"
        "        for number in range(3000):\n"
        "            Logger().info('{text}', text='x' * 1000)\n"
        "        self.transport.write(data)\n"
        "factory = Factory.forProtocol(Talkative)\n"
    )
    arguments = ["--processes=2", "--max-connections=9", "--listen", LOCAL, "--factory=talkative:factory"]
    with running("connlimit", *arguments, cwd=tmp_path) as program, connected(program.port()) as client:
        workers(program, 2)
        program.process.send_signal(signal.SIGSTOP)
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
        program.process.send_signal(signal.SIGCONT)
        program.wait_for(
            r"\[worker \d, .*\] \d+ lines of the log were dropped, as the parent did not read them"
        )
        client.sendall(b"again")
        assert client.recv(100) == b"again"
        assert program.terminate() == 0


# Workers that hang


def test_a_worker_that_hangs_is_killed_and_its_slots_are_free(folder: Path) -> None:
    arguments = ["--processes=2", "--worker-timeout=2", "--max-connections=2", "--listen", LOCAL, *FACTORY]
    with running("connlimit", *arguments, cwd=folder) as program, ExitStack() as stack:
        pids = workers(program, 2)
        clients = [stack.enter_context(connected(program.port())) for _ in range(2)]
        victim = asked(clients[0])
        number = next(number for number, pid in pids.items() if pid == victim)
        os.kill(victim, signal.SIGSTOP)
        program.wait_for(rf"worker {number} has not answered for 2 s and is killed")
        program.wait_for(rf"(?s)worker {number} died of SIGKILL.*worker {number} serves")
        stack.close()
        assert served_at_once(program.port(), 2) <= set(workers(program, 2).values())
        assert program.output.count("has not answered") == 1


def test_a_parent_that_was_stopped_itself_kills_no_worker(folder: Path) -> None:
    arguments = ["--processes=2", "--worker-timeout=3", "--max-connections=9", "--listen", LOCAL, *FACTORY]
    with running("connlimit", *arguments, cwd=folder) as program:
        pids = workers(program, 2)
        program.process.send_signal(signal.SIGSTOP)
        time.sleep(5)
        program.process.send_signal(signal.SIGCONT)
        time.sleep(1.5)  # the next look, and its answer
        assert not any(map(is_gone, pids.values()))
        assert "has not answered" not in program.output
        assert program.terminate() == 0


# What cannot start


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", str(MAX_PROCESSES + 1)])
def test_a_wrong_number_of_processes_gets_one_sentence(value: str) -> None:
    sentence = failing(
        "connlimit", f"--processes={value}", *LIMIT, "--listen", LOCAL, "--forward", "tcp:localhost:1"
    )
    assert sentence == f"connlimit: --processes must be a whole number from 1 to 1024, not {value!r}"


def test_a_port_in_use_gets_one_sentence_and_nothing_is_started(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"tcp:{taken.getsockname()[1]}:interface=127.0.0.1"
        with running(
            "connlimit", "--processes=2", *LIMIT, "--listen", where, *FACTORY, cwd=folder
        ) as program:
            assert program.process.wait(PATIENCE) == 1
            assert "in use" in program.wait_for(r"connlimit: .*")[0]
            assert "Traceback" not in program.output
            assert "is process" not in program.output
