"""
Listening behind a limiter: as an endpoint, and as a service that drains when it is stopped.
"""

from __future__ import annotations

import math
from typing import Any

from twisted.application.internet import StreamServerEndpointService
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IListeningPort, IProtocolFactory, IStreamServerEndpoint

from connlimit._accepting import WatchedEndpoint
from connlimit._factory import LimitingFactory
from connlimit._limiter import Limiter


class LimitingEndpoint(WatchedEndpoint):
    """
    An endpoint that puts a limiter before whatever listens on it.

    :ivar endpoint: where to listen.
    :ivar limiter: the limiter; every factory that listens here shares it.
    :ivar when_full: ``refuse``, or ``stop-accepting``: while nobody can be served or wait, the port accepts
        nobody, and the kernel's backlog holds those who come.
    """

    def listen(self, protocolFactory: IProtocolFactory) -> Deferred[IListeningPort]:
        """
        Listen on the endpoint, the limiter before the factory.
        """
        return super().listen(self.limit(protocolFactory))

    def limit(self, factory: IProtocolFactory) -> IProtocolFactory:
        """
        Put the limiter before a factory.
        """
        return LimitingFactory(factory, self.limiter)


class LimitedService(StreamServerEndpointService):
    """
    A service that listens on an endpoint behind a limiter.

    If it cannot listen, it does not start: the error is raised by ``startService``. When it is stopped,
    it stops listening and refuses those who wait for it. With a *drain_timeout* it then lets the active
    connections finish, and aborts what is left when that time is over; the limiter's connections
    to other services are left alone.
    """

    factory: LimitingFactory

    def __init__(
        self,
        endpoint: IStreamServerEndpoint,
        factory: IProtocolFactory,
        limiter: Limiter,
        drain_timeout: float | None = None,
        when_full: str = "refuse",
    ) -> None:
        """
        :param endpoint: where to listen.
        :param factory: serves the connections.
        :param limiter: says how many at once.
        :param drain_timeout: seconds that active connections may take when the service is stopped;
            None does not wait for them, and leaves them open, as Twisted does.
        :param when_full: see `LimitingEndpoint`.
        :raises ValueError: for a wrong *drain_timeout* or *when_full*.
        """
        if drain_timeout is not None and not 0 <= drain_timeout < math.inf:
            raise ValueError(
                f"drain_timeout must be a number of seconds, 0 or more, or None, not {drain_timeout!r}"
            )
        super().__init__(WatchedEndpoint(endpoint, limiter, when_full), LimitingFactory(factory, limiter))
        self.drain_timeout = drain_timeout

    def privilegedStartService(self) -> None:
        """
        Start to listen, or raise the reason why that is impossible.
        """
        # The flag by which strports.service makes a failure to listen a failure to start.
        self._raiseSynchronously = True
        super().privilegedStartService()

    def stopService(self) -> Deferred[Any]:
        """
        Stop listening, and drain.

        :return: fires when that is done.
        """
        return ensureDeferred(self._stop())

    async def _stop(self) -> None:
        await super().stopService()
        limiter = self.factory.limiter
        if self.drain_timeout is not None:
            await limiter.wait_for(limiter.active_for(self.factory), self.drain_timeout)
