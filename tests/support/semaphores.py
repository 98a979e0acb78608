"""
A server of semaphores: the original, or ours.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from support.clients import free_port
from support.patience import PATIENCE
from support.programs import require_program, running

#: The semaphores of a server, unless a test has others.
FILE = """
[semaphores]
A = 5
B = { max = 5, level = 1 }
C = { max = 1, level = 2 }
"/&" = 2
none = 0
"""


class Server:
    """
    A server of semaphores, and a client of it that blocks.
    """

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, str]:
        """
        The status and the body of an answer.
        """
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)) as connection:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body)
            sent = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, path, data, {**sent, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def new_peer(self, expires_in: str = "5min") -> int:
        status, text = self.ask("POST", "/new_peer", {"expires_in": expires_in})
        assert status == 200
        return int(text)

    def acquire(self, peer: int, name: str, count: int = 1, query: str = "") -> int:
        """
        The status.
        """
        status, text = self.ask("PUT", f"/peers/{peer}/{quote(name, safe='')}?{query}", count)
        assert text == str(peer), text
        return status

    def release(self, peer: int, name: str) -> None:
        assert self.ask("DELETE", f"/peers/{peer}/{quote(name, safe='')}") == (200, "Ok")


def is_listening(port: int) -> bool:
    """
    Whether somebody accepts connections there.
    """
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def original(folder: Path, text: str = FILE, port: int = 0) -> Iterator[Server]:
    """
    The original server.
    """
    program = Path(sysconfig.get_path("scripts")) / "throttle"
    if not program.exists():
        program = Path(require_program("throttle"))
    (folder / "original.toml").write_text(text)
    port = port or free_port()
    process = subprocess.Popen(
        [program, "--port", str(port), "-c", "original.toml"], cwd=folder, stderr=subprocess.DEVNULL
    )
    try:
        began = time.monotonic()
        while not is_listening(port):
            assert process.poll() is None
            assert time.monotonic() - began < PATIENCE
            time.sleep(0.02)
        yield Server(port)
    finally:
        process.kill()
        process.wait()


@contextmanager
def ours(folder: Path, *arguments: str, text: str = FILE, port: int = 0) -> Iterator[Server]:
    """
    A server of our own, as a program.
    """
    (folder / "throttle.toml").write_text(text)
    listen = f"tcp:{port}:interface=127.0.0.1"
    with running("connlimit-semaphores", "--listen", listen, *arguments, cwd=folder) as program:
        server = Server(program.port())
        server.program = program
        yield server


def in_thread(call: Callable[[], Any]) -> Callable[[], Any]:
    """
    Call in a thread. Returns what waits for its result.
    """
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(PATIENCE)
        return results[0]

    return result


def wait_until_pending(server: Server, peer: int) -> None:
    """
    Wait until a peer that asks stands in the queue.
    """
    began = time.monotonic()
    while server.ask("GET", f"/peers/{peer}/is_acquired") != (200, "false"):
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.01)
