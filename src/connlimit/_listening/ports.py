"""
Ports that stop accepting while their limiter is full, and what their backlogs hold.
"""

from __future__ import annotations

from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import (
    IDelayedCall,
    IListeningPort,
    IProtocolFactory,
    IReactorCore,
    IReadDescriptor,
    IStreamServerEndpoint,
)
from zope.interface import implementer

from connlimit._limiter.limiter import Limiter
from connlimit._limiter.values import one_of
from connlimit._system import sockets
from connlimit.interfaces import ILimiter, IOccupant, IPort
from connlimit.observers import LimiterObserver

#: What a port can do when nobody more can be served or wait.
WHEN_FULL = one_of("refuse", "stop-accepting")

_LOOK_INTERVAL = 1.0  # seconds

#: How many are accepted in one turn of the reactor, as Twisted does at first.
_BATCH = 100


def check_when_full(value: object, name: str = "when_full") -> None:
    """
    :param name: what the value is called where it was given.
    :raises ValueError: if the value is not one of `WHEN_FULL`; TypeError if it is no text.
    """
    WHEN_FULL.of_code(name, value)


@implementer(IStreamServerEndpoint)
@attrs.frozen
class WatchedEndpoint:
    """
    An endpoint whose limiter knows its ports, and whose ports may stop accepting.

    :ivar endpoint: where to listen.
    :ivar limiter: the limiter of the factories that listen here.
    :ivar when_full: one of `WHEN_FULL`.
    """

    endpoint: IStreamServerEndpoint
    limiter: Limiter
    when_full: str = attrs.field(
        default="refuse", validator=lambda instance, attribute, value: check_when_full(value)
    )

    def listen(self, protocolFactory: IProtocolFactory) -> Deferred[IListeningPort]:
        """
        Listen on the endpoint.
        """
        return self.endpoint.listen(protocolFactory).addCallback(self._watch)

    def _watch(self, port: Any) -> Any:
        return watched(port, self.limiter, self.when_full)


def watched(port: Any, limiter: Limiter, when_full: str) -> Any:
    """
    The port, which its limiter knows from now on.
    """
    if hasattr(port, "socket"):
        limiter.admission.run_in(port.reactor)
        if IReactorCore.providedBy(port.reactor):
            _Shutdown(limiter, port)
        if when_full == "stop-accepting" and IReadDescriptor.providedBy(port):
            limiter.admission.add_port(_StoppingPort(limiter, port))
        else:
            limiter.admission.add_port(_Port(port))
    return port


@implementer(IPort)
class _Port:
    """
    A port that accepts whatever comes.
    """

    def __init__(self, port: Any) -> None:
        self._port = port

    def is_listening(self) -> bool:
        return bool(self._port.connected)

    def backlog(self) -> int | None:
        return sockets.backlog(self._port.socket)

    def stop_listening(self) -> Any:
        return self._port.stopListening()


class _Shutdown:
    """
    Sees to it that, when the reactor shuts down, those who wait at a port are refused before anything else
    stops, and have been told before the port has stopped.

    The reactor asks in the order of the requests to be asked; twistd's own, to stop all services, comes after
    those of the ports that the services have opened.
    """

    def __init__(self, limiter: Limiter, port: Any) -> None:
        self._limiter = limiter
        self._reactor = port.reactor
        self._stop = port.stopListening
        self._has_begun = False
        self._trigger = self._reactor.addSystemEventTrigger("before", "shutdown", self._begin)
        port.stopListening = self._stop_listening

    def _begin(self) -> None:
        self._has_begun = True
        self._limiter.admission.refuse_all()

    def _stop_listening(self) -> Any:
        """
        Be the port's ``stopListening``.
        """
        if not self._has_begun:
            if self._trigger is not None:
                self._reactor.removeSystemEventTrigger(self._trigger)
                self._trigger = None
            return self._stop()
        stopped = self._stop()
        return None if stopped is None else stopped.addCallback(self._wait)

    def _wait(self, result: Any) -> Deferred[Any]:
        return self._limiter.admission.wait_for((), None).addCallback(lambda _: result)


class _StoppingPort(_Port, LimiterObserver):
    """
    A port that stops accepting when nobody more can be served or wait, and goes on by itself.
    """

    def __init__(self, limiter: Limiter, port: Any) -> None:
        super().__init__(port)
        self._limiter = limiter
        self._timer: IDelayedCall | None = None
        self._has_stopped = False
        self._accept_batch = port.doRead
        port.doRead = self._accept
        limiter.add_observer(self)
        self._check()

    def _accept(self) -> None:
        """
        Be the port's ``doRead``, one by one: to stop a port does not end the batch that it is accepting.
        """
        for _ in range(_BATCH):
            if self._has_stopped or not self.is_listening():
                return
            self._port.numberAccepts = 1
            self._accept_batch()
            if self._port.numberAccepts == 1:  # had there been one, the port would go for more next time
                return

    def waiting(self, limiter: ILimiter, connection: IOccupant) -> None:
        self._check()

    def served(self, limiter: ILimiter, connection: IOccupant, waited: float) -> None:
        self._check()

    def refused(self, limiter: ILimiter, connection: IOccupant, reason: str) -> None:
        self._check()

    def departed(self, limiter: ILimiter, connection: IOccupant, waited: float) -> None:
        self._check()

    def finished(self, limiter: ILimiter, connection: IOccupant) -> None:
        self._check()

    def reconfigured(self, limiter: ILimiter, changes: dict[str, tuple[Any, Any]]) -> None:
        self._look_soon(0)  # they take effect after this call

    def _check(self) -> None:
        if not self.is_listening():
            self._limiter.remove_observer(self)
            self._cancel_look()
            return
        has_place = self._limiter.admission.has_place()
        if has_place == self._has_stopped:
            self._has_stopped = not has_place
            if has_place:
                self._port.startReading()
            else:
                self._port.stopReading()
        if has_place:
            self._cancel_look()
        elif self._timer is None:
            self._look_soon(_LOOK_INTERVAL)

    def _look_soon(self, seconds: float) -> None:
        """
        Look again from time to time: a descriptor that is none of the limiter's may become free.
        """
        self._cancel_look()
        self._timer = self._limiter.clock.callLater(seconds, self._look)

    def _look(self) -> None:
        self._timer = None
        self._check()

    def _cancel_look(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
