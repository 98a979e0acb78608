"""
What the requests of one connection have in common: they end with it, whatever has taken it over by then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from connlimit._limiter.admission import Admission
from connlimit._system import departures, sockets

#: Where a channel has its connection.
_ATTRIBUTE = "_connlimit_connection"


class Occupant(Protocol):
    """
    What waits on a connection.
    """

    def end(self) -> None: ...


class HTTPConnection:
    """
    A connection of HTTP, as long as it makes requests that are limited.

    While a request waits, the connection's own time-out is suspended, and a client that leaves is noticed,
    even if so much was pipelined behind the request that the channel does not read.

    :ivar transport: its transport, of which the end is learnt: a websocket, for one, takes it over.
    :ivar has_streams: whether several requests can be in progress at once, as in HTTP/2.
    """

    __slots__ = (
        "_channel",
        "_departures",
        "_descriptor",
        "_is_over",
        "_time_out",
        "_waiting",
        "has_streams",
        "transport",
    )

    def __init__(self, channel: Any, has_streams: bool) -> None:
        self._channel = channel
        self._waiting: set[Occupant] = set()
        self._is_over = False
        self._time_out: Any = None
        self._departures: Any = None
        self._descriptor = -1
        self.has_streams = has_streams
        self.transport = transport = channel.transport
        lost = getattr(transport, "connectionLost", None)
        if lost is not None:
            # On the instance, since what takes it over gets the real one.
            transport.connectionLost = partial(self._transport_lost, lost)

    def _transport_lost(self, lost: Callable[..., None], *reason: Any) -> None:
        """
        Be the ``connectionLost`` of our transport.

        :param lost: what was that before.
        """
        self._is_over = True
        try:
            self._end_waiting()
            lost(*reason)
        finally:
            vars(self.transport).pop("connectionLost", None)
            # Those of a channel that was told of it have ended. One that a websocket has replaced was not.
            for request in list(getattr(self._channel, "requests", ())):
                end = getattr(request, "_connlimit_end", None)
                if end is not None:
                    end()

    def request_lost(self) -> None:
        """
        A request is told that its connection or its stream is over. If it is the connection, those that wait
        depart before somebody's slot would serve one of them.
        """
        if self._is_over or not getattr(self._channel, "_stillProducing", True):
            self._end_waiting()

    def _end_waiting(self) -> None:
        for occupant in list(self._waiting):
            occupant.end()

    def when_stream_ends(self, stream: Any, end: Callable[[], None]) -> None:
        """
        Call *end* when a stream is over, since a server that resets it tells nobody else.
        """
        cleanup = getattr(self._channel, "_streamCleanupCallbacks", {}).get(stream.streamID)
        if cleanup is not None:
            cleanup.addCallback(lambda number: end())

    def joins(self, occupant: Occupant, admission: Admission) -> None:
        """
        A request is about to wait.
        """
        if not self._waiting:
            self._suspend(admission)
        self._waiting.add(occupant)

    def leaves(self, occupant: Occupant) -> None:
        """
        A request does not wait any more.
        """
        self._waiting.discard(occupant)
        if not self._waiting:
            self._resume()

    def _suspend(self, admission: Admission) -> None:
        set_time_out = getattr(self._channel, "setTimeout", None)
        if set_time_out is not None:
            self._time_out = set_time_out(None)
        sock = sockets.socket_of(self.transport)
        if sock is None:
            return
        reactor = sockets.lowest(self.transport).reactor
        admission.run_in(reactor)
        if not self.has_streams:  # a connection with streams is always read
            self._descriptor = sock.fileno()
            self._departures = departures.of(reactor)
            self._departures.watch(self._descriptor, self)

    def _resume(self) -> None:
        if self._departures is not None:
            self._departures.unwatch(self._descriptor, self)
            self._departures = None
        time_out, self._time_out = self._time_out, None
        if time_out is not None and not self._is_over:
            self._channel.setTimeout(time_out)

    # What the departures ask and tell

    def departs_with(self, unread: bool) -> bool:
        """
        A client that has closed its direction is gone: without us, too, its connection would be closed.
        """
        return True

    def client_departed(self) -> None:
        """
        The client went away.
        """
        try:
            self._end_waiting()
        finally:
            sockets.abort(self.transport)


def connection_of(channel: Any) -> HTTPConnection:
    """
    The connection of a request's channel: of HTTP/2 that is a stream.
    """
    known: HTTPConnection | None = channel.__dict__.get(_ATTRIBUTE)
    if known is not None:  # as it is for all requests of HTTP/1 but the first
        return known
    connection = getattr(channel, "_conn", None)
    has_streams = connection is not None
    attributes = vars(connection if has_streams else channel)
    known = attributes.get(_ATTRIBUTE)
    if known is None:
        known = attributes[_ATTRIBUTE] = HTTPConnection(connection if has_streams else channel, has_streams)
    return known
