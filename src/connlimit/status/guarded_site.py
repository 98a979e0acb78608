"""
A site of twisted.web that no client can use up: not its memory, not its time, and not its connections.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from functools import partial
from ipaddress import ip_address
from typing import Any

from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IReactorTime, ISSLTransport
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel
from twisted.web.resource import IResource
from twisted.web.server import Request, Site

from connlimit._limiter.peers import peer_key
from connlimit._system import descriptors, sockets

#: Seconds within which a client must have sent its request, or its next one, from the first byte to the last.
REQUEST_TIMEOUT = 15

#: Seconds within which a client must have read its answer.
READ_TIMEOUT = 60

#: Seconds that a connection may take to close when another one replaces it.
_LAST_WORDS = 1

#: How many connections there are at most: from loopback, and from elsewhere; and from one peer elsewhere. All
#: together they take no more than their share of the descriptors.
MAX = 64
MAX_PER_PEER = 16


class GuardedSite(Site):
    """
    A site that answers one request in each turn of the reactor, and takes no bodies.

    On a connection, the next request is looked at when the answer to the last one is on its way. If there are
    too many connections, a new one replaces the one that has been idle longest; loopback has room
    of its own.
    """

    noisy = False
    displayTracebacks = False

    def __init__(self, resource: IResource, clock: IReactorTime | None = None) -> None:
        """
        :param clock: where the time comes from; the reactor if not given.
        """
        self.protocol = _Channel  # type: ignore[assignment]
        super().__init__(resource, _Request, timeout=REQUEST_TIMEOUT, reactor=clock)
        self._near, self._far = _Pool(), _Pool()
        self._peers: dict[Hashable, _Pool] = {}
        self._turns: deque[Callable[[], None]] = deque()

    def startFactory(self) -> None:
        """
        Begin. There is no access log: a client could make it grow without end.
        """

    def stopFactory(self) -> None:
        """
        End.
        """

    def log(self, request: Any) -> None:
        """
        Log no request.
        """

    def buildProtocol(self, addr: Any) -> Any:
        """
        The channel of a new connection, or None if it has one of the last descriptors.
        """
        return super().buildProtocol(addr) if descriptors.may_be_accepted() else None

    def acceptableProtocols(self) -> list[bytes]:
        """
        Inside TLS, HTTP/1.1 alone: what is promised here is kept by its channel.
        """
        return [b"http/1.1"]

    def take_turn(self, what: Callable[[], None]) -> None:
        """
        Call something when it is its turn: one thing in each turn of the reactor.
        """
        self._turns.append(what)
        if len(self._turns) == 1:
            self.reactor.callLater(0, self._next)

    def _next(self) -> None:
        what = self._turns[0]
        try:
            what()
        finally:
            self._turns.popleft()
            if self._turns:
                self.reactor.callLater(0, self._next)

    def close(self) -> None:
        """
        Close all connections.
        """
        for pool in (self._near, self._far):
            for channel in list(pool.all):
                channel.give_way()

    def find_place(self, channel: _Channel) -> tuple[_Pool, ...]:
        """
        Room for a new connection, if need be that of the one that has been idle longest.

        :return: the pools it is in; none if all others are being answered.
        """
        address = channel.transport.getPeer()
        maximum = MAX
        allowed = descriptors.limit()
        if allowed is not None:
            maximum = min(maximum, max(1, descriptors.share(allowed) // 2))
        if is_near(address):
            pools = [self._near] if self._near.make_room(maximum) else []
        else:
            peer = _peer(address)
            its = self._peers.get(peer)
            if (its is not None and not its.make_room(MAX_PER_PEER)) or not self._far.make_room(maximum):
                return ()
            # The one that made room may have been the last of this peer.
            its = self._peers.setdefault(peer, _Pool(partial(self._peers.pop, peer)))
            pools = [self._far, its]
        for pool in pools:
            pool.add(channel)
        return tuple(pools)


class _Pool:
    """
    Connections that share a maximum number.

    :ivar all: all of them.
    :ivar idle: those that are not being answered, longest idle first.
    """

    def __init__(self, empty: Callable[[], object] = lambda: None) -> None:
        """
        :param empty: called when the last connection leaves.
        """
        self.all: set[_Channel] = set()
        self.idle: OrderedDict[_Channel, None] = OrderedDict()
        self._empty = empty

    def make_room(self, maximum: int) -> bool:
        """
        Whether there is room for one more, now that an idle one has made it, if need be.
        """
        if len(self.all) >= maximum or not descriptors.left_in_reserve():
            if not self.idle:
                return False
            next(iter(self.idle)).give_way()
        return True

    def add(self, channel: _Channel) -> None:
        """
        Let a connection in.
        """
        self.all.add(channel)
        self.idle[channel] = None

    def remove(self, channel: _Channel) -> None:
        """
        A connection leaves.
        """
        self.all.remove(channel)
        self.idle.pop(channel, None)
        if not self.all:
            self._empty()


class _Channel(HTTPChannel):
    """
    One connection.

    twisted.web stops reading while an answer does not fit into the buffer, but not if that answer was made at
    once. So the end of each request is told to it only when the answer is on its way. Until then it keeps
    what has arrived, up to 16 KiB and what was read at once, and reads no more.
    """

    maxHeaders = 100
    site: GuardedSite
    transport: Any

    def __init__(self) -> None:
        super().__init__()
        self._done: Any = None
        self._is_closing = False
        self._pools: tuple[_Pool, ...] = ()

    def connectionMade(self) -> None:
        super().connectionMade()
        self._pools = self.site.find_place(self)
        if not self._pools:
            self.give_way()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._leave()
        self._done = None
        super().connectionLost(reason)

    def resetTimeout(self) -> None:
        """
        A piece of a request gives no more time for the rest of it.
        """

    def timeoutConnection(self) -> None:
        """
        The client has not asked in time, or has not read in time.
        """
        if self._is_closing or self._done is not None:
            self.transport.abortConnection()
        else:
            self.loseConnection()

    def loseConnection(self) -> None:
        """
        Close when everything is sent, or when the client has not read it in time.
        """
        self._is_closing = True
        super().loseConnection()
        self.setTimeout(READ_TIMEOUT)

    def give_way(self) -> None:
        """
        Close, and soon: at once, if there is nothing to be said.
        """
        self._leave()
        says_more = (
            self._handlingRequest
            or sockets.buffered(self.transport)
            or ISSLTransport.providedBy(self.transport)
        )
        if not says_more and sockets.end_at_once(self.transport, ConnectionDone):
            return
        self.loseConnection()
        self.setTimeout(_LAST_WORDS)

    def _leave(self) -> None:
        for pool in self._pools:
            pool.remove(self)
        self._pools = ()

    # Requests

    def allHeadersReceived(self) -> None:
        if self.length == 0:
            super().allHeadersReceived()
            return
        self.transport.write(
            b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        )
        self.loseConnection()

    def allContentReceived(self) -> None:
        """
        A request is there. What else has arrived with it is kept, which Twisted does itself from 23.10 on.
        """
        self.setRawMode()
        super().allContentReceived()

    def rawDataReceived(self, data: bytes) -> None:
        if self._is_closing:
            return
        if self._handlingRequest:
            self._dataBuffer.append(data)
            if sum(map(len, self._dataBuffer)) > self._optimisticEagerReadSize:
                self._networkProducer.pauseProducing()
            return
        super().rawDataReceived(data)

    def is_asked(self) -> None:
        """
        A request is there, and is going to be answered.
        """
        for pool in self._pools:
            pool.idle.pop(self, None)

    def requestDone(self, request: Any) -> None:
        """
        An answer is made. When it is on its way, it is the turn of the next request of this connection.
        """
        for pool in self._pools:
            pool.idle[self] = None
        self._done = request
        if self._waitingForTransport:
            self.setTimeout(READ_TIMEOUT)
        else:
            self.site.take_turn(self._go_on)

    def resumeProducing(self) -> None:
        super().resumeProducing()
        if self._done is not None:
            self.site.take_turn(self._go_on)

    def _go_on(self) -> None:
        if self._done is not None and not self._waitingForTransport:
            request, self._done = self._done, None
            self.setTimeout(None)
            super().requestDone(request)


class _Request(Request):
    """
    A request that is answered when it is its turn.
    """

    channel: Any

    def process(self) -> None:
        self.channel.is_asked()
        self.channel.site.take_turn(self._answer)

    def _answer(self) -> None:
        if self.channel is not None:
            super().process()


_peer = peer_key((32, 64))


def is_near(address: Any) -> bool:
    """
    Whether an address is one of this machine: of loopback, or of a UNIX socket.
    """
    host = getattr(address, "host", None)
    if host is None:
        return True
    try:
        ip = ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback
