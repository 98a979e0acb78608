"""
What a program opens and closes while it runs: services, and the status page.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

import attrs
from twisted.application.service import IService
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger
from twisted.python.failure import Failure

from connlimit._connection import in_use
from connlimit._limiter.limiter import Limiter
from connlimit._listening.checked_endpoints import status_endpoint
from connlimit._listening.endpoint import limited
from connlimit._listening.ports import WatchedEndpoint
from connlimit._twistd.config import StatusConfig
from connlimit._twistd.processes.role import Alone, IRunning
from connlimit._twistd.services.parts import Parts
from connlimit.status import status_service

_log = Logger(namespace="connlimit.program")

#: Seconds that a service may take to stop before the program goes on without it.
STOP_TIMEOUT = 10.0


class IShown(IRunning, Protocol):
    """
    What the status page needs to know of the program that it shows.
    """

    role: Alone
    reactor: Any
    status: Any


class Unit(Protocol):
    """
    Something that is opened and closed, in one piece or several.

    :ivar name: what the log calls it.
    """

    name: str

    def wanted(self) -> list[str]:
        """
        The pieces that should be open.
        """

    def opened(self) -> list[str]:
        """
        The pieces that are open.
        """

    def open(self, piece: str) -> None:
        """
        Open a piece, or raise the reason why that is impossible.
        """

    async def close(self, piece: str, patience: float | None = STOP_TIMEOUT) -> None:
        """
        Close a piece.

        :param patience: see `stopped`.
        """

    def may_be_at(self, piece: str, port: object) -> bool:
        """
        Whether the piece may be what listens at a port or path.
        """


@attrs.define
class _Opened:
    """
    :ivar numbers: of the ports of another process that it has taken.
    :ivar port: what listens; None for a plugin, and for an endpoint that does not listen yet.
    :ivar listening: fires when it listens.
    """

    numbers: list[int]
    port: IListeningPort | None = None
    listening: Deferred[Any] | None = None


class ServiceUnit:
    """
    A service: it listens at its endpoints.
    """

    def __init__(self, parts: Parts, limiter: Limiter, role: Alone, has_privileges: bool = False) -> None:
        self.name = f"service {parts.config.name}"
        self.config = parts.config
        self.limiter = limiter
        self.endpoints = parts.endpoints
        self.factory: Any = None
        if parts.make_factory is not None:
            self.factory = limited(parts.make_factory(limiter), limiter, parts.config.per)
        self._role = role
        self._opened: dict[str, _Opened] = {}

    def wanted(self) -> list[str]:
        return list(self.endpoints)

    def opened(self) -> list[str]:
        return list(self._opened)

    def stale(self) -> list[str]:
        """
        The pieces at ports that another process has closed.
        """
        return [piece for piece, opened in self._opened.items() if not self._role.are_open(opened.numbers)]

    def open(self, piece: str) -> None:
        watched = WatchedEndpoint(self.endpoints[piece], self.limiter, self.config.when_full)
        with self._role.listening() as numbers:
            opened = _Opened(numbers, listening=watched.listen(self.factory))
        failures: list[Failure] = []

        def listens(result: Any) -> None:
            if not isinstance(result, Failure):
                opened.port = result
            elif self._opened.get(piece) is opened:
                _log.failure("{name} does not listen at {where}", result, name=self.name, where=piece)
            else:
                failures.append(result)

        assert opened.listening is not None
        opened.listening.addBoth(listens)
        if failures:
            failures[0].raiseException()
        self._opened[piece] = opened

    def start(self) -> None:
        """
        Do what is to be done when the process has given its privileges up.
        """

    def change(self, parts: Parts) -> None:
        """
        Serve in another way, without touching a connection.
        """
        old, new = self.config, parts.config
        is_served_so = (old.forward, old.relay, old.factory) == (new.forward, new.relay, new.factory)
        if not is_served_so and parts.make_factory is not None:
            self.factory.wrappedFactory = parts.make_factory(self.limiter)
            in_use.use(self.limiter, self.factory.wrappedFactory)
        self.config = parts.config

    async def close(self, piece: str, patience: float | None = STOP_TIMEOUT) -> None:
        opened = self._opened.pop(piece)
        if opened.port is not None:
            await stopped(self.name, opened.port.stopListening, patience)
        elif opened.listening is not None:
            opened.listening.cancel()

    def may_be_at(self, piece: str, port: object) -> bool:
        listening: Any = self._opened[piece].port
        if listening is None:
            return False
        host = listening.getHost()
        return port in (getattr(host, "port", None), getattr(host, "name", None)) or (
            isinstance(port, (str, bytes)) and os.fsencode(port) == getattr(host, "name", None)
        )


class PluginUnit(ServiceUnit):
    """
    The service of a plugin or an application: it listens by itself.
    """

    def __init__(self, parts: Parts, limiter: Limiter, role: Alone, has_privileges: bool) -> None:
        """
        :param has_privileges: whether the process may have privileges that it gives up before `start`.
        """
        super().__init__(parts, limiter, role, has_privileges)
        assert parts.make_plugin is not None
        self._has_privileges = has_privileges
        self._service = role.plugin(parts.make_plugin(limiter))

    def wanted(self) -> list[str]:
        return [self.config.tac or self.config.plugin[0]]

    def open(self, piece: str) -> None:
        with self._role.listening() as numbers:
            started(self._service, self._service.privilegedStartService, *self._rest())
        self._opened[piece] = _Opened(numbers)

    def _rest(self) -> list[Callable[[], Any]]:
        return [] if self._has_privileges else [self._service.startService]

    def start(self) -> None:
        self._has_privileges = False
        for opened in self._opened.values():
            with self._role.listening() as numbers:
                started(self._service, self._service.startService)
            opened.numbers += numbers

    async def close(self, piece: str, patience: float | None = STOP_TIMEOUT) -> None:
        del self._opened[piece]
        await stopped(self.name, self._service.stopService, patience)

    def may_be_at(self, piece: str, port: object) -> bool:
        """
        Unknown, so it may be.
        """
        return True


class Page:
    """
    The status page of a program, or none.
    """

    name = "the status page"

    def __init__(self, program: IShown, config: StatusConfig | None) -> None:
        self._program = program
        self._config = config if program.role.shows else None
        self._service: IService | None = None

    def wanted(self) -> list[str]:
        return [] if self._config is None else [self._config.listen]

    def opened(self) -> list[str]:
        return [] if self._service is None else self.wanted()

    def make(self) -> None:
        """
        Make what shows the page, to be started by the program.
        """
        program, config = self._program, self._config
        if config is not None:
            endpoint = status_endpoint(program.reactor, config.listen)
            watched = program.role.watched(program)
            self._service = status_service(endpoint, watched, config.show_peers, config.hosts)
            program.status = self._service

    def open(self, piece: str) -> None:
        before = self._program.status
        self.make()
        service = self._service
        assert service is not None
        try:
            started(service, service.privilegedStartService, service.startService)
        except Exception:
            self._service, self._program.status = None, before
            raise

    async def close(self, piece: str, patience: float | None = STOP_TIMEOUT) -> None:
        service, self._service = self._service, None
        assert service is not None
        if self._program.status is service:
            self._program.status = None
        await stopped(self.name, service.stopService, patience)

    def may_be_at(self, piece: str, port: object) -> bool:
        """
        Unknown, so it may be.
        """
        return True


def started(service: IService, *starts: Callable[[], Any]) -> None:
    """
    Start a service by these methods of it, or stop what has started of it and raise the reason.
    """
    try:
        for start in starts:
            start()
    except Exception:
        maybeDeferred(service.stopService).addErrback(lambda failure: None)
        raise


async def stopped(name: str, stop: Callable[[], Any], patience: float | None = STOP_TIMEOUT) -> None:
    """
    Stop something, and go on if that fails.

    :param patience: after this number of seconds it is not waited for any more; None for as long as it takes.
    """
    from twisted.internet import reactor

    done: Deferred[None] = Deferred()

    def late() -> None:
        _log.error("{name} has not stopped within {seconds:.0f} s", name=name, seconds=patience)
        done.callback(None)

    def end(result: Any) -> None:
        if isinstance(result, Failure):
            _log.failure("{name} did not stop as it should", result, name=name)
        if timer is None:
            done.callback(None)
        elif timer.active():
            timer.cancel()
            done.callback(None)

    timer = None if patience is None else reactor.callLater(patience, late)
    maybeDeferred(stop).addBoth(end)
    await done
