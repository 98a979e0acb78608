"""
A request as an occupant: it holds a slot while it is answered, or waits for one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context, copy_context
from typing import Any, Protocol

from twisted.internet.error import ConnectionAborted
from twisted.python.failure import Failure
from zope.interface import implementer

from connlimit._limiter.admission import Admission
from connlimit._request.connection import connection_of
from connlimit._request.refused import refuse
from connlimit._system import sockets
from connlimit._system.bounded_log import BoundedLog
from connlimit.interfaces import IOccupant


class IFactory(Protocol):
    """
    What a request needs of the factory that limits it: `connlimit.RequestLimitingFactory` has it.
    """

    admission: Admission
    request_log: BoundedLog


@implementer(IOccupant)
class RequestOccupant:
    """
    A request, complete with its body, as its limiter sees it. The request holds it, until it is over.

    :ivar address: the client's address.
    :ivar factory: the factory that limits it.
    :ivar slot: set by the limiter while the request is active.
    """

    __slots__ = (
        "__weakref__",
        "_connection",
        "_context",
        "_process",
        "_request",
        "address",
        "factory",
        "slot",
    )

    def __init__(self, request: Any, factory: IFactory) -> None:
        self._request = request
        self._process: Callable[[Any], None] | None = None
        self.address = request.client
        self.factory = factory
        self.slot: Any = None
        self._connection = connection = connection_of(request.channel)
        if connection.has_streams:
            connection.when_stream_ends(request.channel, self.end)

    def wait_or_be_refused(self, process: Callable[[Any], None]) -> None:
        """
        There was no room at once.

        :param process: processes the request, at its turn.
        """
        admission = self.factory.admission
        reason = admission.may_wait(self)
        if reason is not None:
            self.refuse(reason)
            return
        self._process = process
        # What makes room is in another's context, of which nothing must be seen.
        self._context: Context = copy_context()
        self._connection.joins(self, admission)
        admission.wait(self)

    def connection_lost(self) -> None:
        """
        The request is about to be told that its connection or its stream is over.
        """
        self._connection.request_lost()

    def end(self) -> None:
        """
        The response is finished, or nobody is there for it any more. Can be called again.
        """
        self._request = None  # so that neither waits for the garbage collector
        if self._process is None:
            self.factory.admission.finish(self)
        else:
            self._stop_waiting()
            self.factory.admission.depart(self)

    def _stop_waiting(self) -> Callable[[Any], None] | None:
        process, self._process = self._process, None
        if process is not None:
            self._connection.leaves(self)
        return process

    # What the limiter decides, see IOccupant

    def serve(self) -> None:
        """
        Have the request processed.

        What it raises would, without us, end its connection.
        """
        process, request = self._stop_waiting(), self._request
        assert process is not None
        try:
            self._context.run(process, request)
        except BaseException:
            self.factory.request_log.failure("{request} could not be processed", request=request)
            self.abort()

    def refuse(self, reason: str) -> None:
        """
        Answer the request by a 503.
        """
        self._stop_waiting()
        request = self._request
        try:
            refuse(request, reason, self.factory.admission.retry_after())
        except BaseException:
            self.factory.request_log.failure("{request} could not be refused", request=request)
            self.abort()

    def abort(self) -> None:
        """
        End the request without delay: with its connection, or, if that has streams, with its stream alone.
        """
        request = self._request
        if request is None:
            return
        try:
            if self._connection.has_streams:
                try:
                    request.channel.abortConnection()
                finally:
                    request.connectionLost(Failure(ConnectionAborted()))
            else:
                sockets.abort(self._connection.transport)
        except BaseException:
            self.factory.request_log.failure("{request} could not be ended", request=request)
