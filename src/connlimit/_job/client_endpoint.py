"""
A client endpoint whose connections take slots, for as long as they live.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IAddress, IProtocol, IProtocolFactory, IStreamClientEndpoint
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from zope.interface import directlyProvides, implementer, providedBy

from connlimit._job.job import GivesSlots, Job, checked


@implementer(IStreamClientEndpoint)
class LimitingClientEndpoint:
    """
    Connects by another endpoint when there is a slot, which is held until the connection is over.

    :ivar endpoint: the endpoint that connects.
    :ivar limiter: the limiter, which others may share.
    """

    def __init__(
        self,
        endpoint: IStreamClientEndpoint,
        limiter: GivesSlots,
        key: Hashable = None,
        timeout: float | None = None,
    ) -> None:
        """
        :param limiter: a `connlimit.Limiter`.
        :param key: what takes the place of a peer, as ``max_per_peer`` counts; None for none.
        :param timeout: how many seconds it waits for a slot at the most, besides ``wait_timeout``.
        :raises TypeError: if *endpoint* is no client endpoint or *limiter* no limiter.
        """
        if not IStreamClientEndpoint.providedBy(endpoint):
            raise TypeError(f"endpoint must provide IStreamClientEndpoint, not {endpoint!r}")
        self.endpoint = endpoint
        self.limiter = checked(limiter)
        self._key = key
        self._timeout = timeout

    def __repr__(self) -> str:
        return f"<LimitingClientEndpoint of {self.endpoint!r}>"

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """
        Connect when there is a slot.

        :return: fires with the protocol, or fails; with `connlimit.Refused` if there is no slot.
        """
        slot = self.limiter.slot(key=self._key, timeout=self._timeout)
        return slot.acquire().addCallback(self._connect, protocolFactory)

    def _connect(self, job: Job, factory: IProtocolFactory) -> Deferred[IProtocol]:
        holding: Any = _Holding(factory, job)
        connecting = maybeDeferred(self.endpoint.connect, holding)
        return connecting.addCallbacks(holding.connected, _failed, errbackArgs=(job,))


def _failed(failure: Failure, job: Job) -> Failure:
    job.release()
    return failure


class _Holding:
    """
    Stands for a factory, and has the connection of its protocol hold a slot.

    The protocol is the factory's own, and gets the real transport.
    """

    def __init__(self, factory: IProtocolFactory, job: Job) -> None:
        self._factory = factory
        self._job = job
        self._is_held = False
        directlyProvides(self, providedBy(factory))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._factory, name)

    def buildProtocol(self, address: IAddress) -> IProtocol | None:
        protocol: Any = self._factory.buildProtocol(address)
        try:
            make_connection = protocol.makeConnection
            protocol.makeConnection = self._begun(protocol, make_connection)
        except AttributeError:
            pass  # there is no protocol, or nothing can be set on it
        return protocol  # type: ignore[no-any-return]

    def _begun(self, protocol: Any, make_connection: Callable[[Any], None]) -> Callable[[Any], None]:
        def begun(transport: Any) -> None:
            del protocol.makeConnection
            self._hold(transport, protocol)
            make_connection(transport)

        return begun

    def connected(self, protocol: Any) -> Any:
        """
        There is a connection, which may be over already.
        """
        if not self._is_held:
            transport = getattr(protocol, "transport", None)
            if getattr(transport, "connected", True):
                self._hold(transport, protocol)
            else:
                self._job.release()
        return protocol

    def _hold(self, transport: Any, protocol: Any) -> None:
        """
        Release the slot when a connection is over, whichever protocol may have it then: as its transport
        knows it, or, where that is not told, as its protocol does.
        """
        self._is_held = True
        told: Any = transport if hasattr(transport, "connectionLost") else protocol
        its_own = told.connectionLost
        job = self._job

        def lost(reason: Failure = connectionDone) -> None:
            if vars(told).get("connectionLost") is lost:
                del told.connectionLost
            try:
                its_own(reason)
            finally:
                job.release()

        told.connectionLost = lost
