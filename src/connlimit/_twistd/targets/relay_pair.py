"""
The two ends of a relayed connection as one: half-closes, resets, time limits, and the slot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol as TypingProtocol

from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure

from connlimit._system import sockets
from connlimit._twistd.targets.relay_ends import End
from connlimit._twistd.targets.relay_options import RelayOptions
from connlimit._twistd.targets.relay_times import Delivery, Stall, Times

#: Seconds that a client may take nothing of the rest of its answer, when the server's connection is over; and
#: that a server may take nothing of what a client said whose connection is over.
_DELIVERY_TIMEOUT = 60.0
_RESET_TIMEOUT = 1.0


class IRelay(TypingProtocol):
    """
    What a pair needs of its relay: `relay.RelayFactory` has it.
    """

    options: RelayOptions
    times: Times
    lingering: int

    def may_linger(self) -> bool: ...


class Pair:
    """
    The two ends of a relayed connection: what happens to one has its effect on the other here.

    :ivar relay: the factory.
    :ivar client: the client's end; None when its connection is over.
    :ivar backend: the backend's end; None before it is connected, and when its connection is over.
    """

    def __init__(self, relay: IRelay, client: End) -> None:
        self.relay = relay
        self.client: End | None = client
        self.backend: End | None = None
        self._release: Callable[[], None] | None = None
        self._lingers = False
        self._upstream: Stall | None = None
        self._downstream: Stall | None = None

    # The slot

    def keep_slot(self, release: Callable[[], None]) -> None:
        """
        The slot is ours until we call this.
        """
        self._release = release

    def release_slot(self) -> None:
        """
        There is no connection to the backend, nor will there be one: the slot is another's, unless too many
        clients linger without one already.
        """
        if self._release is None or (self.client is not None and not self.relay.may_linger()):
            return
        if self.client is not None:
            self._lingers = True
            self.relay.lingering += 1
        release, self._release = self._release, None
        release()

    # What happens

    def join(self, backend: End) -> None:
        """
        The backend is connected.
        """
        assert self.client is not None
        self.backend = backend
        backend.pair = self
        self.client.join(backend)
        backend.join(self.client)

    def said_all(self, end: End) -> None:
        """
        One side has said all it had to say: say so to the other side, and go on the other way.
        """
        other = end.other
        if other is None:
            end.lose()
            return
        other.transport.unregisterProducer()
        if other.said_all or (end is self.backend and sockets.is_dead(end.transport)):
            self._close_both()
        elif sockets.can_half_close(other.transport):
            other.transport.loseWriteConnection()
            self._limit_the_other_way(end)
        else:
            other.lose()
            self._limit_the_other_way(end)

    def will_say_no_more(self, end: End, unread: bool) -> bool:
        """
        One side has closed its direction, and the other has not taken everything yet.

        :return: whether that is the end of the connection: a client that has said nothing departs while
            the backend connects, as there is nobody to answer.
        """
        if end is self.client and self.backend is None:
            return not unread
        self._limit_the_other_way(end)
        if self._downstream is None:
            self._limit_delivery()
        return False

    def was_reset(self, end: End) -> None:
        """
        One side was reset while nothing was read from it.
        """
        if end is self.backend and end.other is not None:
            # What it has sent before can still be read, and is the client's; its slot is another's at once.
            self.release_slot()
            self._limit_delivery()
        else:
            end.abort()

    def lost(self, end: End, reason: Failure) -> None:
        """
        The connection on one side is over: end the other as it ended, when everything is written to it.
        """
        is_orderly = isinstance(reason.value, ConnectionDone)
        if end is self.backend:
            self.backend, other = None, self.client
            self.release_slot()
        else:
            self.client, other = None, self.backend
            if self._lingers:
                self._lingers = False
                self.relay.lingering -= 1
            if other is None:
                self.release_slot()
        self._stop_limits()
        if other is None:
            self.relay.times.end()
            return
        # TLS may have something of its own to say and to hear.
        has_unsent = bool(other.unsent()) or not sockets.can_half_close(other.transport)
        if is_orderly:
            other.lose()
        elif has_unsent:
            self._reset_when_delivered(other)
        else:
            other.abort()
        if has_unsent and other.connected:
            self._limit_delivery()

    def abort(self) -> None:
        """
        End everything at once.
        """
        for end in (self.backend, self.client):
            if end is not None:
                end.abort()

    def _close_both(self) -> None:
        """
        Both have said all: close each side when it has got everything.
        """
        client, backend = self.client, self.backend
        if backend is not None:
            backend.lose()
        if client is not None:
            client.lose()

    # What limits it in time

    def _limit_the_other_way(self, silent: End) -> None:
        """
        One side says no more; the other must not take for ever.
        """
        options = self.relay.options
        if silent is self.backend:
            if self._upstream is None:
                self._upstream = self._limit(
                    options.client_fin_timeout, self._bytes_upstream, self._client_is_silent
                )
        elif self._downstream is None:
            self._downstream = self._limit(options.server_fin_timeout, self._bytes_downstream, self.abort)

    def _limit_delivery(self) -> None:
        """
        The connection on one side is over, or will be: the other side must take the rest.
        """
        if self.client is None:
            self._upstream = self._limit(_RESET_TIMEOUT, self._bytes_upstream, self.abort)
        else:
            if self._downstream is not None:
                self._downstream.stop()
            self._downstream = self._limit(_DELIVERY_TIMEOUT, self._bytes_downstream, self.abort)

    def _limit(self, seconds: float, moved: Callable[[], object], call: Callable[[], None]) -> Stall:
        return Stall(self.relay.times, seconds, moved, call, self._watch)

    def _watch(self) -> None:
        """
        It takes longer: sides that nobody reads from any more are watched for resets.
        """
        for end in (self.client, self.backend):
            if end is not None and end.said_all:
                end.watch()

    def _stop_limits(self) -> None:
        for limit in (self._upstream, self._downstream):
            if limit is not None:
                limit.stop()
        self._upstream = self._downstream = None

    def _bytes_upstream(self) -> object:
        return self.client and self.client.reads, self.backend and self.backend.unsent()

    def _bytes_downstream(self) -> object:
        return (
            self.backend and (self.backend.reads, self.backend.unsent()),
            self.client and self.client.unsent(),
        )

    def _client_is_silent(self) -> None:
        """
        The backend has said all, and the client has nothing to say: the backend's connection is closed.
        """
        self._upstream = None
        backend = self.backend
        if backend is None:
            return
        if not backend.said_all:
            # It will say no more, but the client has not taken everything yet, so neither have we.
            self._limit_the_other_way(backend)
        elif sockets.buffered(backend.transport):
            backend.abort()  # it takes nothing of what the client said
        else:
            backend.lose()

    def _reset_when_delivered(self, end: End) -> None:
        """
        Reset the connection on one side when its peer has got everything; nothing is read from it until then.
        """
        if not end.transport.disconnecting:
            end.transport.pauseProducing()
        Delivery(self.relay.times.clock, end)
