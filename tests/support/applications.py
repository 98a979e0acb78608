"""
What a program under test runs: a factory, an application, a configuration file.
"""

from __future__ import annotations

import json
import signal
import socket
import time
import urllib.request
from pathlib import Path

from support.clients import free_port
from support.patience import PATIENCE
from support.programs import Program

#: The module of a server that a program under test can import.
ECHO = """
from twisted.internet.protocol import Factory, Protocol

class Echo(Protocol):
    def dataReceived(self, data):
        self.transport.write(data)

class EchoFactory(Factory):
    protocol = Echo

factory = EchoFactory()

def make():
    return EchoFactory()

def fail():
    raise RuntimeError("not today")

nothing = 5
"""

#: An application that uses it, with a port, an endpoint and a timer.
TAC = """
import os
from twisted.application.internet import StreamServerEndpointService, TCPServer, TimerService
from twisted.application.service import Application, IService
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from echo_server import factory, make

application = Application("echoes", uid=UID, gid=UID)
TCPServer(0, factory, interface="127.0.0.1").setServiceParent(application)
admin = serverFromString(reactor, "unix:" + os.path.join(os.path.dirname(__file__), "admin"))
StreamServerEndpointService(admin, make()).setServiceParent(application)
TimerService(1, print, "the application runs").setServiceParent(application)
"""

#: A greeter whose greeting is that of its factory.
SERVER = """
from twisted.internet.protocol import Factory
from twisted.protocols.basic import LineReceiver

class Greeter(LineReceiver):
    def lineReceived(self, line):
        self.sendLine(self.factory.word + b" " + line)

def served(word):
    factory = Factory.forProtocol(Greeter)
    factory.word = word
    return factory

hello, bye = served(b"hello"), served(b"bye")
"""


class Running:
    """
    A configured program, its file, and its ports.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "connlimit.toml"
        self.port, self.other, self.status = free_port(), free_port(), free_port()
        (folder / "server.py").write_text(SERVER)
        self.program: Program
        self.clients: list[socket.socket] = []

    def write(self, text: str, status: bool = True) -> None:
        if status:
            text += f'\n[status]\nlisten = "tcp:{self.status}:interface=127.0.0.1"\n'
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.replace(self.path)

    def service(self, name: str = "greeter", port: int | None = None, factory: str = "server:hello") -> str:
        where = f"tcp:{port or self.port}:interface=127.0.0.1"
        return f'[services.{name}]\nlisten = ["{where}"]\nfactory = "{factory}"\nlimiter = "main"\n'

    def reload(self, told: str = "reloaded ") -> None:
        before = self.program.output.count(told)
        self.program.process.send_signal(signal.SIGHUP)
        began = time.monotonic()
        while self.program.output.count(told) == before:
            assert time.monotonic() - began < PATIENCE, self.program.output
            time.sleep(0.01)

    def connect(self, port: int | None = None) -> socket.socket:
        self.clients.append(socket.create_connection(("127.0.0.1", port or self.port), PATIENCE))
        return self.clients[-1]

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.status}/{path}", timeout=PATIENCE) as answer:
            return answer.read().decode()

    def limiter(self) -> dict[str, object]:
        return json.loads(self.get("status.json"))["limiters"][0]

    def until(self, **facts: object) -> None:
        """
        Wait until the status tells this.
        """
        began = time.monotonic()
        while not facts.items() <= (now := self.limiter()).items():
            assert time.monotonic() - began < PATIENCE, now
            time.sleep(0.02)


def ask(client: socket.socket, word: bytes = b"you") -> bytes:
    """
    What the greeter answers.
    """
    client.sendall(word + b"\r\n")
    return client.recv(1000)
