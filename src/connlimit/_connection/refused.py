"""
Refusals that are being said: how many at once, and how long each may take.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IDelayedCall, IProtocol
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from connlimit._connection.closing import Patience
from connlimit._limiter.limiter import Limiter
from connlimit._system import descriptors
from connlimit._system.bounded_log import BoundedLog
from connlimit._system.sockets import abort, lowest, unsent
from connlimit.interfaces import DESCRIPTORS, IRefusing
from connlimit.refusals import LINGER

_log = BoundedLog(Logger(namespace="connlimit.connection"))

#: Seconds of silence after which a client has been told, once all has arrived there.
QUIET = 1.0


def build(limiter: Limiter, address: IAddress, reason: str) -> IProtocol | None:
    """
    The protocol that refuses a client of the limiter, or None to close the connection without a word.

    That is so, too, when no descriptor can be spared, or too many others are being refused.
    """
    if reason == DESCRIPTORS or not descriptors.REFUSALS.has_room():
        return None
    try:
        protocol = limiter.settings.refusal.build_protocol(address, reason, limiter.admission.retry_after())
    except BaseException:
        _log.failure("{refusal} failed to build a protocol", refusal=limiter.settings.refusal)
        return None
    return None if protocol is None else _Refusing(limiter, protocol)


@implementer(IRefusing)
class _Refusing(Protocol):
    """
    Has a refusal's protocol speak, and aborts it when its time is over.

    When the program is waiting for it, it need not wait for the client's end, but only until the client has
    received all, and has sent nothing for a while: one that still sends would be told by a reset.
    """

    transport: Any

    def __init__(self, limiter: Limiter, protocol: IProtocol) -> None:
        self._limiter = limiter
        self._protocol = protocol
        self._timer: IDelayedCall | None = None
        self._patience: Patience | None = None
        self._waiting: list[Deferred[None]] = []

    def connectionMade(self) -> None:
        self._limiter.admission.refusals.add(self)
        descriptors.REFUSALS.taken += 1
        self._timer = self._limiter.clock.callLater(LINGER, self._abort)
        self._call("makeConnection", self.transport)

    def dataReceived(self, data: bytes) -> None:
        self._call("dataReceived", data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        descriptors.REFUSALS.taken -= 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._patience is not None:
            self._patience.stop()
        self._limiter.admission.refusals.discard(self)
        waiting, self._waiting = self._waiting, []
        self._call("connectionLost", reason)
        for each in waiting:
            each.callback(None)

    def _call(self, method: str, argument: Any) -> None:
        """
        Tell the refusal's protocol of an event, and abort the connection if that fails.
        """
        try:
            getattr(self._protocol, method)(argument)
        except BaseException:
            _log.failure("{protocol} failed to refuse a client", protocol=self._protocol)
            abort(self.transport)

    def said(self) -> Deferred[None]:
        self._hurry()
        waiting: Deferred[None] = Deferred()
        self._waiting.append(waiting)
        return waiting

    def _hurry(self) -> None:
        if self._patience is None:
            self._patience = Patience(self.transport, self._limiter.clock, self._end, QUIET, LINGER)

    def _end(self) -> None:
        """
        Nothing moves any more: if all has arrived, close.
        """
        self._patience = None
        if unsent(self.transport):
            self._hurry()
        else:
            lowest(self.transport).loseConnection()

    def _abort(self) -> None:
        self._timer = None
        abort(self.transport)
