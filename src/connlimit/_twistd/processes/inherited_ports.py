"""
Ports that one process opens and others accept at: the same sockets in all of them.

What waits in a backlog is so accepted by any worker there is. With a socket each (SO_REUSEPORT) the kernel
chooses a process for each connection when it comes, be that process full or hanging, and resets what waits
for one that dies. As each accepts one at a time, a crowd is spread about as evenly as the kernel would spread
it; ``python -m bench workers`` measures both.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import attrs
from twisted.internet import unix
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IProtocolFactory
from twisted.internet.protocol import Factory

_METHODS = ("listenTCP", "listenUNIX", "adoptStreamPort")


@contextmanager
def _replaced(reactor: Any, **methods: Callable[..., Any]) -> Iterator[None]:
    """
    Let the reactor listen by these methods. All others, such as listenSSL, end in them.
    """
    for name, method in methods.items():
        setattr(reactor, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(reactor, name)


class _Nobody(Factory):
    """
    Serves nobody: the real factory is started by those who accept.
    """

    noisy = False

    def logPrefix(self) -> str:
        return "connlimit"


class NotOpened(CannotListenError):
    """
    The parent has not opened a port, or has closed it.
    """

    def __init__(self, interface: Any, port: Any) -> None:
        super().__init__(interface, port, OSError("the parent process has not opened it"))


class OpenedPorts:
    """
    The ports that a process has opened, at which it accepts nobody itself. Each has a number.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._ports: dict[int, tuple[str, Any]] = {}
        self._numbers = count(1)

    @contextmanager
    def listening(self) -> Iterator[list[int]]:
        """
        A context in which whatever listens opens such a port.
        """
        listen_tcp, listen_unix, adopt = (getattr(self._reactor, name) for name in _METHODS)

        def tcp(port: int, factory: IProtocolFactory, backlog: int = 50, interface: str = "") -> Any:
            return self._keep(_tcp(port, interface), listen_tcp(port, _Nobody(), backlog, interface))

        def unix(address: Any, factory: IProtocolFactory, *args: Any, **kwargs: Any) -> Any:
            return self._keep(_unix(address), listen_unix(address, _Nobody(), *args, **kwargs))

        def adopted(number: int, family: int, factory: IProtocolFactory) -> Any:
            return self._keep(_adopted(number), adopt(number, family, _Nobody()))

        with _replaced(self._reactor, listenTCP=tcp, listenUNIX=unix, adoptStreamPort=adopted):
            yield []

    def _keep(self, where: str, port: Any) -> Any:
        port.stopReading()
        self._ports[next(self._numbers)] = where, port
        return port

    def sockets(self) -> dict[int, tuple[str, int]]:
        """
        Where those ports listen that are open, and the numbers of their descriptors, in their order.
        """
        self._ports = {
            number: (where, port)
            for number, (where, port) in self._ports.items()
            if port.connected and not port.disconnecting
        }
        return {number: (where, port.fileno()) for number, (where, port) in self._ports.items()}


@attrs.define
class _Inherited:
    """
    A port that another process has opened.

    :ivar where: where it listens.
    :ivar descriptor: its descriptor in this process.
    :ivar port: what accepts at it here, or has accepted; None before.
    """

    where: str
    descriptor: int
    port: Any = None


class InheritedPorts:
    """
    The ports that a process may listen at, since another has opened them. Each has the other's number.

    A descriptor of each is kept as long as the port is open there, so that one can listen at it once more.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._ports: dict[int, _Inherited] = {}
        self._taken: list[int] = []

    def add(self, where: str, number: int, descriptor: int) -> None:
        """
        Take a descriptor of an open port.
        """
        self._ports[number] = _Inherited(where, descriptor)

    def keep(self, numbers: Collection[int]) -> None:
        """
        Close the descriptors of all ports but these, which alone are open by now.
        """
        for number in self._ports.keys() - set(numbers):
            os.close(self._ports.pop(number).descriptor)

    def are_open(self, numbers: Iterable[int]) -> bool:
        """
        Whether all of these ports are still open.
        """
        return all(number in self._ports for number in numbers)

    @contextmanager
    def listening(self) -> Iterator[list[int]]:
        """
        A context in which whatever listens does so at these ports; it has the numbers of those taken.
        """
        adopt = self._reactor.adoptStreamPort

        def tcp(port: int, factory: IProtocolFactory, backlog: int = 50, interface: str = "") -> Any:
            with self._take(_tcp(port, interface), interface, port) as taken:
                with socket.socket(fileno=os.dup(taken.descriptor)) as opened:
                    family = opened.family
                taken.port = accept_one_by_one(adopt(taken.descriptor, family, factory))
                return taken.port

        def at_path(address: Any, factory: IProtocolFactory, *args: Any, **kwargs: Any) -> Any:
            with self._take(_unix(address), None, address) as taken:
                taken.port = _unix_port(self._reactor, taken.descriptor, factory)
                return taken.port

        def adopted(number: int, family: int, factory: IProtocolFactory) -> Any:
            with self._take(_adopted(number), None, number) as taken:
                if family == socket.AF_UNIX:
                    taken.port = _unix_port(self._reactor, taken.descriptor, factory)
                else:
                    taken.port = accept_one_by_one(adopt(taken.descriptor, family, factory))
                return taken.port

        outer, self._taken = self._taken, []
        try:
            with _replaced(self._reactor, listenTCP=tcp, listenUNIX=at_path, adoptStreamPort=adopted):
                yield self._taken
        finally:
            self._taken = outer

    @contextmanager
    def _take(self, where: str, interface: Any, port: Any) -> Iterator[_Inherited]:
        for number, each in self._ports.items():
            if each.where == where and (each.port is None or not each.port.connected):
                yield each
                self._taken.append(number)
                return
        raise NotOpened(interface, port)


def accept_one_by_one(port: Any) -> Any:
    """
    Let a port accept one connection in a turn of the reactor, not a hundred, so that others get theirs.
    """
    accept = port.doRead

    def accept_one() -> None:
        if not port.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            port.stopReading()  # another process has closed it
            return
        port.numberAccepts = 1
        accept()

    port.doRead = accept_one
    return port


def _unix_port(reactor: Any, number: int, factory: IProtocolFactory) -> Any:
    """
    A port at a UNIX socket whose file, with its mode, is that of another process.
    """
    port = unix.Port._fromListeningDescriptor(reactor, number, factory)
    # As in the abstract namespace: it then neither changes nor removes the file. Older Twisted calls it port.
    path = "_bindPath" if hasattr(port, "_bindPath") else "port"
    setattr(port, path, b"\0" + getattr(port, path))
    port._shouldShutdown = False  # what is shut down is so in all processes
    port.startListening()
    return accept_one_by_one(port)


def _tcp(port: int, interface: str) -> str:
    return json.dumps(["tcp", port, interface])


def _unix(address: Any) -> str:
    return json.dumps(["unix", os.fsdecode(address)])


def _adopted(number: int) -> str:
    return json.dumps(["adopted", number])
