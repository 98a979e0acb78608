"""
The factory that stands for another one and lets its connections through a limiter.
"""

from __future__ import annotations

import sys
from typing import Any

from twisted.internet.address import UNIXAddress
from twisted.internet.interfaces import (
    IAddress,
    ILoggingContext,
    IProtocol,
    IProtocolFactory,
    IProtocolNegotiationFactory,
)
from twisted.logger import Logger
from zope.interface import alsoProvides, implementer, providedBy

from connlimit._connection import in_use, known_protocols, refused
from connlimit._connection.delegating import DelegatingProtocol
from connlimit._connection.forwarding import class_for
from connlimit._connection.waiting import ArrivingProtocol, WaitingProtocol
from connlimit._limiter.admission import Admission
from connlimit._limiter.limiter import Limiter
from connlimit._system.bounded_log import BoundedLog


@implementer(IProtocolFactory, ILoggingContext)
class LimitingFactory:
    """
    Serves the connections of another factory as far as a limiter allows; the others wait in its queue.

    Whatever else is asked of it or set on it, it hands on to the wrapped factory.

    :ivar wrappedFactory: the factory whose protocols serve the connections.
    :ivar admission: the limiter's side that connections report to.
    :ivar connection_log: where failures of connections are logged.
    :ivar is_tls: whether the wrapped factory is the one that speaks TLS.
    """

    # What is declared here is set on this object, all else on the wrapped factory.
    wrappedFactory: IProtocolFactory
    admission: Admission
    _limiter: Limiter
    connection_log: BoundedLog
    is_tls: bool
    _last_provided: object
    _last_class: type[DelegatingProtocol]
    _ports: int
    _has_built: bool
    _answers: bool | None

    def __init__(self, wrappedFactory: IProtocolFactory, limiter: Limiter) -> None:
        """
        :raises TypeError: if *wrappedFactory* is no factory or *limiter* no `Limiter`.
        """
        if not IProtocolFactory.providedBy(wrappedFactory):
            raise TypeError(f"wrappedFactory must provide IProtocolFactory, not {wrappedFactory!r}")
        if not isinstance(limiter, Limiter):
            raise TypeError(f"limiter must be a Limiter, not {limiter!r}")
        self.connection_log = BoundedLog(Logger(namespace="connlimit.connection"))
        self.wrappedFactory = wrappedFactory
        self.limiter = limiter
        self._last_provided = None
        self._last_class = DelegatingProtocol
        self._ports = 0
        self._has_built = False
        # Whether its protocols are of a kind that answers, if that is known.
        self._answers = None
        # If that has not been imported yet, there is no such factory.
        tls = sys.modules.get("twisted.protocols.tls")
        self.is_tls = tls is not None and isinstance(wrappedFactory, tls.TLSMemoryBIOFactory)
        if IProtocolNegotiationFactory.providedBy(wrappedFactory):
            alsoProvides(self, IProtocolNegotiationFactory)

    def __getattr__(self, name: str) -> Any:
        if name == "wrappedFactory":  # not set yet, as while it is unpickled
            raise AttributeError(name)
        return getattr(self.wrappedFactory, name)

    def __setattr__(self, name: str, value: object) -> None:
        if _is_ours(name):
            object.__setattr__(self, name, value)
        else:
            setattr(self.wrappedFactory, name, value)

    def __delattr__(self, name: str) -> None:
        if _is_ours(name):
            object.__delattr__(self, name)
        else:
            delattr(self.wrappedFactory, name)

    def __repr__(self) -> str:
        return f"<LimitingFactory of {self.wrappedFactory!r}>"

    @property
    def limiter(self) -> Limiter:
        """
        The limiter, which other factories may share.
        """
        return self._limiter

    @limiter.setter
    def limiter(self, limiter: Limiter) -> None:
        in_use.use(limiter, self.wrappedFactory)
        self._limiter = limiter
        self.admission = limiter.admission  # bound once, since every connection needs it

    def logPrefix(self) -> str:
        """
        The log prefix of the wrapped factory.
        """
        if ILoggingContext.providedBy(self.wrappedFactory):
            return self.wrappedFactory.logPrefix()
        return self.wrappedFactory.__class__.__name__

    def doStart(self) -> None:
        """
        A port begins to use this factory.
        """
        self._ports += 1
        self.wrappedFactory.doStart()

    def doStop(self) -> None:
        """
        A port ceases to use this factory. With the last, those who still wait for it are refused.
        """
        self._ports -= 1
        if self._ports == 0:
            self.admission.refuse_waiting(self.admission.waiting_for(self))
        self.wrappedFactory.doStop()

    def buildProtocol(self, address: IAddress) -> DelegatingProtocol | None:
        """
        The protocol of a new connection: the real one if there is room, one that waits if there is
        a position in the queue, or None.
        """
        connection = DelegatingProtocol()
        connection.factory = self
        connection.address = address
        connection.slot = connection.transport = None
        connection.connected = 0
        connection.closing = None
        kind: type = address.__class__
        if kind is UNIXAddress and self.admission.needs_peers:
            connection.wrappedProtocol = ArrivingProtocol(connection)
            return connection
        protocol: Any = self.first_protocol(connection)
        if protocol is None:
            return None
        connection.wrappedProtocol = protocol
        provided = providedBy(protocol)
        if provided is not self._last_provided:
            self._last_provided, self._last_class = provided, class_for(provided)
        if self._last_class is not DelegatingProtocol:
            connection.become(self._last_class)
        return connection

    def first_protocol(self, connection: DelegatingProtocol) -> IProtocol | None:
        """
        What a new connection begins with: the real protocol if there is room, one that waits if there is
        a position in the queue, one that refuses, or None to close it.
        """
        admission = self.admission
        address = connection.address
        if admission.serve_at_once(connection):
            try:
                protocol: IProtocol | None = self.wrappedFactory.buildProtocol(address)
                if not self._has_built:
                    self.learn_from(protocol)
            except BaseException:
                self.connection_log.failure(
                    "{factory} failed to build a protocol", factory=self.wrappedFactory
                )
                protocol = None
            if protocol is None:
                admission.finish(connection)
            return protocol
        reason = admission.may_wait(connection)
        return WaitingProtocol(connection) if reason is None else self.build_refusal(address, reason)

    def departs_on_half_close(self) -> bool:
        """
        Whether a waiting client that has sent something and then closed its direction has departed.
        """
        settings = self.limiter.settings
        if not isinstance(settings.departed_on_half_close, str):
            return settings.departed_on_half_close
        if self._answers is None and not self._has_built:
            self._answers = known_protocols.factory_answers(self.wrappedFactory)
        return known_protocols.refusal_answers(settings.refusal) if self._answers is None else self._answers

    def learn_from(self, protocol: IProtocol | None) -> None:
        """
        Find out whether the first protocol is of a kind that answers. If that changes what those
        who wait are taken for, looks at all who wait.
        """
        if self._has_built or protocol is None:
            return
        self._has_built = True
        before = self.departs_on_half_close()
        answers = known_protocols.protocol_answers(protocol)
        if answers is not None:
            self._answers = answers
        if self.departs_on_half_close() and not before:
            for connection in self.admission.waiting_for(self):
                connection.reconsider()

    def build_refusal(self, address: IAddress, reason: str) -> IProtocol | None:
        """
        The protocol that refuses a client, or None if the connection is to be closed without a word.
        """
        protocol = refused.build(self.limiter, address, reason)
        if protocol is None or not self.is_tls:
            return protocol
        from twisted.protocols.tls import TLSMemoryBIOProtocol

        return TLSMemoryBIOProtocol(self.wrappedFactory, protocol)


def _is_ours(name: str) -> bool:
    # What Python and zope.interface note about an object has underscores.
    return name in LimitingFactory.__annotations__ or name == "limiter" or name.startswith("__")
