"""
A relay: what a client sends goes to another server, and what that answers comes back.

Each relayed connection is a pair of ends, each with a transport of its own. What can happen to it:

* A peer closes its direction. The other side is told so, once it has got everything, and goes on in the other
  direction. From then on that has a time limit: ``client_fin_timeout`` or ``server_fin_timeout``.
* Both have closed their directions: each side is closed as soon as it has got everything.
* One side ends by a reset, or any other error: the other is reset as well, once it has got everything; so it
  can tell a truncated answer from a whole one. While nobody reads from a side, the kernel tells of its reset.

The slot is the server's: it is free when there is no connection to the server. The client may still be taking
the rest of its answer then. If it is the client that has gone, the slot is not free before the server's
connection is closed. So the server never sees more connections than there are slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import (
    IAddress,
    IHalfCloseableProtocol,
    IPushProducer,
    IStreamClientEndpoint,
)
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from connlimit._connection import departures
from connlimit._system import descriptors, sockets
from connlimit._system.bounded_log import BoundedLog
from connlimit._system.deadlines import Deadlines, Sweep
from connlimit._twistd.targets.relay_options import RelayOptions
from connlimit._twistd.targets.send_proxy import proxy_header
from connlimit._twistd.targets.splice import can_splice, splice
from connlimit.interfaces import ISlotKeeper

#: Seconds that a client may take nothing of the rest of its answer, when the server's connection is over; and
#: that a server may take nothing of what a client said whose connection is over.
_DELIVERY_TIMEOUT = 60.0
_RESET_TIMEOUT = 1.0

#: Seconds after which connecting to the server takes long.
_SOON = 0.05

_UNREACHABLE = "{backend} cannot be reached, so {client} is closed: {error}"


class RelayFactory(Factory):
    """
    Relays each of its connections to a backend, over a connection of its own.

    :ivar backend: how the backend is reached.
    :ivar name: what the backend is called in the log.
    :ivar options: how connections are treated.
    :ivar opens_descriptors: how many descriptors are opened for a connection, besides its own.
    :ivar lingering: how many clients, without a slot, still take the rest of an answer.
    """

    noisy = False
    opens_descriptors = 1

    def __init__(
        self,
        backend: IStreamClientEndpoint,
        name: str,
        options: RelayOptions | None = None,
        clock: Any = None,
    ) -> None:
        """
        :param clock: where the time comes from; the reactor if not given.
        """
        self.backend = descriptors.counted(backend)
        self.name = name
        self.options = RelayOptions() if options is None else options
        self.lingering = 0
        self._has_stopped = False
        self.log = BoundedLog(Logger(), clock)
        self._clock = clock
        self._relayed = 0
        self._sweep: Sweep | None = None

    @property
    def clock(self) -> Any:
        """
        Where the time comes from.
        """
        if self._clock is None:
            from twisted.internet import reactor

            self._clock = reactor
        return self._clock

    def deadlines(self, seconds: float, call: Callable[[Any], object]) -> Deadlines[Any]:
        """
        Those of all its connections for which the same is called after the same time.
        """
        if self._sweep is None:
            self._sweep = Sweep(self.clock)
        return self._sweep.deadlines(seconds, call)

    def begin(self) -> None:
        """
        A connection is relayed.
        """
        self._relayed += 1

    def end(self) -> None:
        """
        A relayed connection is over on both sides.
        """
        self._relayed -= 1
        if self._relayed == 0 and self._sweep is not None:
            self._sweep.rest()

    def startFactory(self) -> None:
        """
        A port listens.
        """
        self._has_stopped = False

    def stopFactory(self) -> None:
        """
        No port listens any more.
        """
        self._has_stopped = True

    def buildProtocol(self, addr: IAddress | None) -> ClientEnd:
        """
        The client's end of a relay. It connects to the backend once it is connected itself.
        """
        return ClientEnd(self)

    def may_linger(self) -> bool:
        """
        Whether one more client may take the rest of its answer without a slot.

        When nobody can come any more, it keeps the slot, so that whoever waits for the slots to be free waits
        for it, too.
        """
        if self._has_stopped:
            return False
        most = descriptors.limit()
        return not descriptors.is_short and self.lingering < (1000 if most is None else min(most // 8, 1000))

    def logPrefix(self) -> str:
        """
        What the log calls the port.
        """
        return f"relay to {self.name}"


@implementer(IHalfCloseableProtocol, IPushProducer)
class End(Protocol):
    """
    One end of a relay.

    Each end is the producer of the other's transport: a reader who stops reading stops the writer, and no
    more is held in between than a transport's buffer.

    Between plain sockets the kernel moves the bytes. What it can't move then, for the moment or because it is
    an end and no bytes, goes the ordinary way: read by the transport, received here, written to the other.

    :ivar pair: what it is an end of; None for a backend's end that is not joined yet.
    :ivar other: the other end; None unless both are connected.
    :ivar said_all: whether the peer on this side has closed its direction.
    :ivar reads: how often something came from the peer on this side.
    """

    # Any: besides ITransport, each is a consumer, a producer and, mostly, a half-closeable descriptor.
    transport: Any
    pair: Pair | None = None
    other: End | None = None
    said_all = False
    reads = 0
    _watched: int | None = None

    def join(self, other: End) -> None:
        """
        Send all that comes from the peer on this side to the other side from now on.
        """
        self.other = other
        self.transport.registerProducer(other, True)
        if can_splice(self.transport, other.transport):
            # The reactor calls this for each event: the transport's own is called from there when needed.
            self.transport.doRead = self._do_read

    def _do_read(self) -> Any:
        """
        Be the ``doRead`` of our transport.
        """
        other = self.other
        if other is not None:
            why = splice(self.transport, other.transport)
            if why is not False:
                self.reads += 1
                return why
        return type(self.transport).doRead(self.transport)

    def dataReceived(self, data: bytes) -> None:
        self.reads += 1
        if self.other is not None:
            self.other.transport.write(data)

    def readConnectionLost(self) -> None:
        """
        The peer on this side has said all it had to say.
        """
        self.said_all = True
        if self.pair is not None:
            self.pair.said_all(self)
        else:
            self.transport.loseConnection()

    def writeConnectionLost(self) -> None:
        """
        The peer on this side has got all that the other side said.
        """

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.connected = 0
        self.stop_watching()
        self.transport.__dict__.pop("doRead", None)  # nobody must hold the other any more
        other, self.other = self.other, None
        if other is not None:
            other.other = None
            if not self.said_all:
                other.transport.unregisterProducer()
        if self.pair is not None:
            self.pair.lost(self, reason)

    # What the other side's transport asks, when it cannot take more

    def pauseProducing(self) -> None:
        """
        Read nothing for now; the kernel tells if the connection ends meanwhile.
        """
        self.transport.pauseProducing()
        self.watch()

    def resumeProducing(self) -> None:
        """
        Read again.
        """
        self.stop_watching()
        if not self.said_all:
            self.transport.resumeProducing()

    def stopProducing(self) -> None:
        """
        The other side's transport is gone, which its end will hear.
        """

    # What the departures tell, while nothing is read

    def watch(self) -> None:
        """
        Let the kernel tell of the end of the connection.
        """
        if self._watched is None:
            sock = sockets.socket_of(self.transport)
            if sock is not None:
                self._watched = sock.fileno()
                departures.of(sockets.lowest(self.transport).reactor).watch(self._watched, self)

    def stop_watching(self) -> None:
        """
        Nothing is to be told any more: somebody reads again, or it is over.
        """
        descriptor, self._watched = self._watched, None
        if descriptor is not None:
            departures.of(sockets.lowest(self.transport).reactor).unwatch(descriptor, self)

    def departs_with(self, unread: bool) -> bool:
        """
        The peer on this side has closed its direction, as is seen before it is read.
        """
        return self.pair is not None and self.pair.will_say_no_more(self, unread)

    def client_departed(self) -> None:
        """
        The connection on this side was reset.
        """
        self.stop_watching()
        if self.pair is not None:
            self.pair.was_reset(self)

    # How it ends

    def unsent(self) -> int:
        """
        How many bytes the peer on this side has not got yet, as far as can be told.
        """
        return sockets.unsent(self.transport)

    def lose(self) -> None:
        """
        Close the connection when everything is written.
        """
        self.stop_watching()
        self.transport.loseConnection()

    def abort(self) -> None:
        """
        Reset the connection.
        """
        self.stop_watching()
        sockets.abort(self.transport)


class Pair:
    """
    The two ends of a relayed connection: what happens to one has its effect on the other here.

    :ivar relay: the factory.
    :ivar client: the client's end; None when its connection is over.
    :ivar backend: the backend's end; None before it is connected, and when its connection is over.
    """

    def __init__(self, relay: RelayFactory, client: End) -> None:
        self.relay = relay
        self.client: End | None = client
        self.backend: End | None = None
        self._release: Callable[[], None] | None = None
        self._lingers = False
        self._upstream: _Stall | None = None
        self._downstream: _Stall | None = None

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
            self.relay.end()
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

    def _limit(self, seconds: float, moved: Callable[[], object], call: Callable[[], None]) -> _Stall:
        return _Stall(self.relay, seconds, moved, call, self._watch)

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
        _Delivery(self.relay.clock, end)


class _Stall:
    """
    Calls when no byte has moved for some seconds.

    It looks four times in this time. The first look, after a second at the latest, is the one with which the
    others compare; nearly always all is over before.
    """

    _LOOKS = 4

    def __init__(
        self,
        relay: RelayFactory,
        seconds: float,
        moved: Callable[[], object],
        call: Callable[[], None],
        first_look: Callable[[], None],
    ) -> None:
        """
        :param moved: differs from the last time if bytes have moved.
        :param first_look: is called at the first look.
        """
        self._relay = relay
        self._interval = seconds / self._LOOKS
        self._moved = moved
        self._call = call
        self._first_look = first_look
        self._left = 0
        self._last: object = None
        self._deadlines = relay.deadlines(min(self._interval, 1.0), _Stall._look_first)
        self._deadlines.add(self)

    def stop(self) -> None:
        """
        Do not call any more.
        """
        self._deadlines.discard(self)

    def _look_first(self) -> None:
        self._deadlines = self._relay.deadlines(self._interval, _Stall._look)
        self._deadlines.add(self)
        self._last = self._moved()
        self._left = self._LOOKS - (self._interval <= 1.0)
        self._first_look()

    def _look(self) -> None:
        self._deadlines.add(self)
        now = self._moved()
        if now != self._last:
            self._last = now
            self._left = self._LOOKS
            return
        self._left -= 1
        if self._left <= 0:
            self.stop()
            self._call()


class _Delivery:
    """
    Resets a connection when its peer has got everything; whoever limits its time does so without us.
    """

    _MOST = 0.25  # seconds

    def __init__(self, clock: Any, end: End) -> None:
        self._clock = clock
        self._end = end
        self._look(0.005)

    def _look(self, interval: float) -> None:
        end = self._end
        if not end.connected:
            return
        if end.unsent():
            self._clock.callLater(interval, self._look, min(2 * interval, self._MOST))
        else:
            end.abort()


@implementer(ISlotKeeper)
class ClientEnd(End):
    """
    The client's end, which reads nothing before there is somebody to tell it.
    """

    pair: Pair

    def __init__(self, relay: RelayFactory) -> None:
        self._relay = relay
        self.pair = Pair(relay, self)
        self._connecting: Deferred[Any] | None = None
        # Among which it is as long as its time to connect is not over.
        self._deadlines: Deadlines[ClientEnd] | None = None
        # What was received all the same: TLS has decrypted it already.
        self._early: list[bytes] = []

    def connectionMade(self) -> None:
        relay = self._relay
        self.transport.pauseProducing()
        relay.begin()
        self._deadlines = relay.deadlines(_SOON, ClientEnd._takes_long)
        self._deadlines.add(self)
        self._connecting = relay.backend.connect(_backend_factory)
        self._connecting.addCallbacks(self._connected, self._not_connected)

    def dataReceived(self, data: bytes) -> None:
        if self._connecting is not None:
            self._early.append(data)
        else:
            super().dataReceived(data)

    def _connected(self, backend: End) -> None:
        self._stop_connecting()
        self._relay.log.over(
            _UNREACHABLE,
            "{backend} can be reached again, after {count} connections in {seconds:.0f} s that could not",
            backend=self._relay.name,
        )
        self.pair.join(backend)
        if self._relay.options.send_proxy:
            backend.transport.write(proxy_header(self.transport.getPeer(), self.transport.getHost()))
        early, self._early = self._early, []
        for data in early:
            self.dataReceived(data)
        self.resumeProducing()

    def _not_connected(self, failure: Failure) -> None:
        is_ours = failure.check(CancelledError) is not None and self._deadlines is None
        self._stop_connecting()
        self.pair.release_slot()
        if not self.connected:
            return
        error = failure.getErrorMessage()
        if is_ours:
            error = f"it did not answer within {self._relay.options.connect_timeout:g} s"
        self._relay.log.warn(
            _UNREACHABLE, backend=self._relay.name, client=self.transport.getPeer(), error=error
        )
        self.lose()

    def _takes_long(self) -> None:
        """
        It is not a matter of milliseconds, as it is nearly always: see whether the client leaves meanwhile.
        """
        self.watch()
        left = max(0.0, self._relay.options.connect_timeout - _SOON)
        self._deadlines = self._relay.deadlines(left, ClientEnd._give_up)
        self._deadlines.add(self)

    def _give_up(self) -> None:
        """
        It takes too long to connect.
        """
        self._deadlines = None
        if self._connecting is not None:
            self._connecting.cancel()

    def _stop_connecting(self) -> None:
        self._connecting = None
        if self._deadlines is not None:
            self._deadlines.discard(self)
            self._deadlines = None

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._connecting is not None:
            self.connected = 0
            self.pair.client = None
            self._connecting.cancel()
        super().connectionLost(reason)

    # What keeps the slot

    def keep_slot(self, release: Callable[[], None]) -> None:
        """
        See `ISlotKeeper.keep_slot`.
        """
        self.pair.keep_slot(release)

    def is_over(self) -> bool:
        """
        See `ISlotKeeper.is_over`.
        """
        pair = self.pair
        backend = pair.backend
        if backend is not None:
            return sockets.is_dead(backend.transport) and pair.client is None
        return self._connecting is None and (pair.client is None or sockets.is_dead(self.transport))

    def abort_all(self) -> None:
        """
        See `ISlotKeeper.abort_all`.
        """
        self.pair.abort()


_backend_factory = Factory.forProtocol(End)
_backend_factory.noisy = False
