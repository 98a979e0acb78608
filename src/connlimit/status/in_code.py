"""
The status page of a process whose limiters are made in code or by endpoint strings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
from twisted.internet.defer import Deferred, fail, maybeDeferred, succeed
from twisted.internet.interfaces import IAddress, IListeningPort, IProtocolFactory, IStreamServerEndpoint
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from zope.interface import implementer

from connlimit._connection import in_use
from connlimit._limiter.limiter import Limiter
from connlimit._listening.checked_endpoints import status_endpoint
from connlimit.status.service import StatusService

#: Seconds between two looks whether a page has still something to show.
_INTERVAL = 1.0


class _InUse:
    """
    Has all limiters that something stands behind.
    """

    @property
    def limiters(self) -> Mapping[str, Limiter]:
        """
        These limiters by name.
        """
        return in_use.limiters()


@implementer(IListeningPort)
@attrs.frozen
class _StatusPort:
    """
    The port of a status page, which ends with it.
    """

    service: StatusService
    port: Any

    def startListening(self) -> None:
        """
        It listens already.
        """

    def stopListening(self) -> Deferred[Any]:
        return maybeDeferred(self.service.stopService)

    def getHost(self) -> IAddress:
        host: IAddress = self.port.getHost()
        return host


def serve(
    where: str, *, show_peers: bool = False, hosts: Iterable[str] = (), reactor: Any = None
) -> Deferred[IListeningPort]:
    """
    Show all limiters of this process that something stands behind.

    :param where: an endpoint string. If it gives no interface, that is 127.0.0.1: all who can connect can see
        the page.
    :param show_peers: whether others than loopback see the addresses of clients.
    :param hosts: names, besides IP addresses and localhost, by which browsers may ask for it.
    :return: fires with the port when it listens; to stop that port ends the page.
    :raises ValueError: if the string describes no endpoint.
    """
    if reactor is None:
        from twisted.internet import reactor
    endpoint = status_endpoint(reactor, where, "where")
    return _listen(StatusService(endpoint, _InUse(), show_peers, frozenset(hosts)))


def _listen(service: StatusService) -> Deferred[IListeningPort]:
    try:
        service.privilegedStartService()
        service.startService()
    except Exception:
        return fail()
    return service.listening().addCallback(lambda port: _StatusPort(service, port))


class _SharedPage:
    """
    The page of all endpoint strings that name the same endpoint.
    """

    _log = Logger(namespace="connlimit.status")

    def __init__(self, where: str, reactor: Any) -> None:
        self._where = where
        self._reactor = reactor
        self._page: Any = None
        self._ports: list[Any] = []
        self._looking = LoopingCall(self._look)

    def open(self) -> Deferred[Any]:
        """
        Listen, unless it does.
        """
        if self._page is not None:
            return succeed(None)
        return serve(self._where, reactor=self._reactor).addCallback(self._opened)

    def _opened(self, page: Any) -> None:
        _pages[self._where] = self
        self._page = page
        self._looking.start(_INTERVAL, now=False)

    def show(self, port: Any) -> Any:
        """
        Show the limiter of a port, too; the page ends when the last of these ports has ended.
        """
        self._ports.append(port)
        return port

    def _look(self) -> None:
        self._ports = [port for port in self._ports if getattr(port, "connected", True)]
        if not self._ports:
            self._looking.stop()
            page, self._page = self._page, None
            _pages.pop(self._where, None)
            page.stopListening().addErrback(
                lambda failure: self._log.failure("the status page could not be closed", failure)
            )


# The pages that listen, by where they do.
_pages: dict[str, _SharedPage] = {}


@implementer(IStreamServerEndpoint)
@attrs.frozen
class ShownEndpoint:
    """
    An endpoint whose process has a status page as long as it listens here.

    :ivar endpoint: where to listen.
    :ivar where: the endpoint string of the status page.
    """

    endpoint: IStreamServerEndpoint
    where: str
    reactor: Any

    def listen(self, protocolFactory: IProtocolFactory) -> Deferred[IListeningPort]:
        """
        Listen on the endpoint, after the page.
        """
        page = _pages.get(self.where) or _SharedPage(self.where, self.reactor)
        listening = page.open().addCallback(lambda _: self.endpoint.listen(protocolFactory))
        return listening.addCallback(page.show)
