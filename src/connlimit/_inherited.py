"""
Ports that one process opens and others accept at: the same sockets in all of them.

What waits in a backlog is so accepted by whoever is there. With a socket each (SO_REUSEPORT) the kernel
chooses a process for each connection when it comes, be that process full or hanging, and resets what waits
for one that dies. As each accepts one at a time, a crowd is spread about as evenly as the kernel would spread
it; ``python -m bench workers`` measures both.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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


class OpenedPorts:
    """
    The ports that a process has opened, at which it accepts nobody itself.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._ports: list[tuple[str, Any]] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
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
            yield

    def _keep(self, where: str, port: Any) -> Any:
        port.stopReading()
        self._ports.append((where, port))
        return port

    def sockets(self) -> list[tuple[str, int]]:
        """
        Where those ports listen that are open, and the numbers of their descriptors, in their order.
        """
        self._ports = [(where, port) for where, port in self._ports if port.connected]
        return [(where, port.fileno()) for where, port in self._ports]


class InheritedPorts:
    """
    The ports that a process may listen at, since another has opened them.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._descriptors: dict[str, list[int]] = {}

    def add(self, where: str, descriptor: int) -> None:
        """
        Take a descriptor of an open port.
        """
        self._descriptors.setdefault(where, []).append(descriptor)

    def clear(self) -> None:
        """
        Close the descriptors that nobody has listened at.
        """
        for descriptors in self._descriptors.values():
            for descriptor in descriptors:
                os.close(descriptor)
        self._descriptors.clear()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """
        A context in which whatever listens does so at these ports.
        """
        adopt = self._reactor.adoptStreamPort

        def tcp(port: int, factory: IProtocolFactory, backlog: int = 50, interface: str = "") -> Any:
            number = self._take(_tcp(port, interface), interface, port)
            try:
                with socket.socket(fileno=os.dup(number)) as opened:
                    family = opened.family
                return accept_one_by_one(adopt(number, family, factory))
            finally:
                os.close(number)

        def at_path(address: Any, factory: IProtocolFactory, *args: Any, **kwargs: Any) -> Any:
            number = self._take(_unix(address), None, address)
            try:
                return _unix_port(self._reactor, number, factory)
            finally:
                os.close(number)

        def adopted(number: int, family: int, factory: IProtocolFactory) -> Any:
            opened = self._take(_adopted(number), None, number)
            try:
                if family == socket.AF_UNIX:
                    return _unix_port(self._reactor, opened, factory)
                return accept_one_by_one(adopt(opened, family, factory))
            finally:
                os.close(opened)

        with _replaced(self._reactor, listenTCP=tcp, listenUNIX=at_path, adoptStreamPort=adopted):
            yield

    def _take(self, where: str, interface: Any, port: Any) -> int:
        descriptors = self._descriptors.get(where)
        if not descriptors:
            raise CannotListenError(interface, port, OSError("the parent process has not opened it"))
        return descriptors.pop(0)


def accept_one_by_one(port: Any) -> Any:
    """
    Let a port accept one connection in a turn of the reactor, not a hundred, so that others get theirs.
    """
    accept = port.doRead

    def accept_one() -> None:
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
