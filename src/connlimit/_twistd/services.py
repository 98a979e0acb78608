"""
What a configured program opens and closes while it runs: services, and the status page.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

import attrs
from twisted.application.service import IService
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IListeningPort, IProtocolFactory
from twisted.logger import Logger
from twisted.python.failure import Failure

from connlimit._connection import in_use
from connlimit._connection.factory import LimitingFactory
from connlimit._limiter.limiter import Limiter
from connlimit._listening.ports import WatchedEndpoint
from connlimit._twistd.config_file import ServiceConfig
from connlimit._twistd.processes.role import Alone

_log = Logger(namespace="connlimit.program")

#: Seconds that a service may take to stop before the program goes on without it.
STOP_TIMEOUT = 10.0


@attrs.frozen
class Parts:
    """
    What a service is made of, found and checked before anything is changed.

    :ivar endpoints: where it listens, by what the file says.
    :ivar factory: what it serves with; None for a plugin.
    :ivar make_plugin: makes the plugin's service, the limiter before all that listens in it.
    """

    config: ServiceConfig
    endpoints: dict[str, Any]
    factory: IProtocolFactory | None
    make_plugin: Callable[[Limiter], IService] | None = None


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

    async def close(self, piece: str) -> None:
        """
        Close a piece.
        """

    def may_be_at(self, piece: str, port: object) -> bool:
        """
        Whether the piece may be what listens at a port or path.
        """


@attrs.frozen
class _Opened:
    """
    :ivar port: what listens; None for a plugin.
    :ivar numbers: of the ports of another process that it has taken.
    """

    port: IListeningPort | None
    numbers: list[int]


class ServiceUnit:
    """
    A service: it listens at its endpoints.
    """

    def __init__(self, parts: Parts, limiter: Limiter, role: Alone) -> None:
        self.name = f"service {parts.config.name}"
        self.config = parts.config
        self.limiter = limiter
        self.endpoints = parts.endpoints
        self.factory: Any = LimitingFactory(parts.factory, limiter) if parts.factory is not None else None
        self._role = role
        self._opened: dict[str, _Opened] = {}

    def wanted(self) -> list[str]:
        """
        See `Unit.wanted`.
        """
        return list(self.endpoints)

    def opened(self) -> list[str]:
        """
        See `Unit.opened`.
        """
        return list(self._opened)

    def stale(self) -> list[str]:
        """
        The pieces at ports that another process has closed.
        """
        return [piece for piece, opened in self._opened.items() if not self._role.are_open(opened.numbers)]

    def open(self, piece: str) -> None:
        """
        See `Unit.open`.
        """
        watched = WatchedEndpoint(self.endpoints[piece], self.limiter, self.config.when_full)
        with self._role.listening() as numbers:
            self._opened[piece] = _Opened(_at_once(watched.listen(self.factory)), numbers)

    def change(self, parts: Parts) -> None:
        """
        Serve in another way, without touching a connection.
        """
        old, new = self.config, parts.config
        is_served_so = (old.forward, old.relay, old.factory) == (new.forward, new.relay, new.factory)
        if not is_served_so and parts.factory is not None:
            self.factory.wrappedFactory = parts.factory
            in_use.use(self.limiter, parts.factory)
        self.config = parts.config

    async def close(self, piece: str) -> None:
        """
        See `Unit.close`.
        """
        port = self._opened.pop(piece).port
        assert port is not None
        await stopped(self.name, port.stopListening)

    def may_be_at(self, piece: str, port: object) -> bool:
        """
        See `Unit.may_be_at`.
        """
        listening: Any = self._opened[piece].port
        host = listening.getHost()
        return port in (getattr(host, "port", None), getattr(host, "name", None)) or (
            isinstance(port, (str, bytes)) and os.fsencode(port) == getattr(host, "name", None)
        )


class PluginUnit(ServiceUnit):
    """
    The service of a plugin or an application: it listens by itself.
    """

    def __init__(self, parts: Parts, limiter: Limiter, role: Alone) -> None:
        super().__init__(parts, limiter, role)
        assert parts.make_plugin is not None
        self._service = role.plugin(parts.make_plugin(limiter))

    def wanted(self) -> list[str]:
        """
        See `Unit.wanted`.
        """
        return [self.config.tac or self.config.plugin[0]]

    def open(self, piece: str) -> None:
        """
        See `Unit.open`.
        """
        with self._role.listening() as numbers:
            started(self._service)
        self._opened[piece] = _Opened(None, numbers)

    async def close(self, piece: str) -> None:
        """
        See `Unit.close`.
        """
        del self._opened[piece]
        await stopped(self.name, self._service.stopService)

    def may_be_at(self, piece: str, port: object) -> bool:
        """
        See `Unit.may_be_at`: there is no telling.
        """
        return True


def started(service: IService) -> None:
    """
    Start a service, or stop what has started of it and raise the reason.
    """
    try:
        service.privilegedStartService()
        service.startService()
    except Exception:
        maybeDeferred(service.stopService).addErrback(lambda failure: None)
        raise


async def stopped(name: str, stop: Callable[[], Any]) -> None:
    """
    Stop something, but do not wait for ever, and go on if that fails.
    """
    from twisted.internet import reactor

    done: Deferred[None] = Deferred()

    def late() -> None:
        _log.error("{name} has not stopped within {seconds:.0f} s", name=name, seconds=STOP_TIMEOUT)
        done.callback(None)

    def end(result: Any) -> None:
        if isinstance(result, Failure):
            _log.failure("{name} did not stop as it should", result, name=name)
        if timer.active():
            timer.cancel()
            done.callback(None)

    timer = reactor.callLater(STOP_TIMEOUT, late)
    maybeDeferred(stop).addBoth(end)
    await done


def _at_once(deferred: Deferred[Any]) -> Any:
    """
    The result of a Deferred that has fired.
    """
    results: list[Any] = []
    deferred.addBoth(results.append)
    if not results:
        raise OSError("an endpoint that does not listen at once cannot be used here")
    if isinstance(results[0], Failure):
        results[0].raiseException()
    return results[0]
