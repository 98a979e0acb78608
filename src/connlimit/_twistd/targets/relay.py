"""
A relay: what a client sends goes to another server, and what that answers comes back.

Each relayed connection is a pair of ends, each with a transport of its own. What can happen to it:

* A peer closes its direction. The other side is told so, once it has got everything, and goes on in the other
  direction. From then on that has a time limit: ``client_fin_timeout`` or ``server_fin_timeout``.
* Both have closed their directions: each side is closed as soon as it has got everything.
* One side ends by a reset, or any other error: the other is reset as well, once it has got everything; so it
  can tell a truncated answer from a whole one. While nobody reads from a side, the kernel reports its reset.

The slot is the server's: it is free when there is no connection to the server. The client may still be taking
the rest of its answer then. If it is the client that has gone, the slot is not free before the server's
connection is closed. So the server never sees more connections than there are slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IAddress, IStreamClientEndpoint
from twisted.internet.protocol import Factory, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from connlimit._system import descriptors, sockets
from connlimit._system.bounded_log import BoundedLog
from connlimit._system.deadlines import Deadlines
from connlimit._twistd.targets.relay_ends import End
from connlimit._twistd.targets.relay_options import RelayOptions
from connlimit._twistd.targets.relay_pair import Pair
from connlimit._twistd.targets.relay_times import Times
from connlimit._twistd.targets.send_proxy import proxy_header
from connlimit.interfaces import ISlotKeeper

#: Seconds after which connecting to the server takes long.
_SOON = 0.05

_UNREACHABLE = "{backend} cannot be reached, so {client} is closed: {error}"


class RelayFactory(Factory):
    """
    Relays each of its connections to a backend, over a connection of its own.

    :ivar backend: how the backend is reached.
    :ivar name: what the backend is called in the log.
    :ivar options: how connections are treated.
    :ivar times: what its connections wait for.
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
        self.log = BoundedLog(Logger(namespace="connlimit.relay"), clock)
        self.times = Times(clock)

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

        When nobody can come any more, it keeps the slot, so that what waits for the slots to be free waits
        for it, too.
        """
        if self._has_stopped:
            return False
        maximum = descriptors.limit()
        return not descriptors.is_short and self.lingering < (
            1000 if maximum is None else min(maximum // 8, 1000)
        )

    def logPrefix(self) -> str:
        """
        What the log calls the port.
        """
        return f"relay to {self.name}"


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
        relay.times.begin()
        self._deadlines = relay.times.deadlines(_SOON, ClientEnd._takes_long)
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
        self._deadlines = self._relay.times.deadlines(left, ClientEnd._give_up)
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
        self.pair.keep_slot(release)

    def is_over(self) -> bool:
        pair = self.pair
        backend = pair.backend
        if backend is not None:
            return sockets.is_dead(backend.transport) and pair.client is None
        return self._connecting is None and (pair.client is None or sockets.is_dead(self.transport))

    def abort_all(self) -> None:
        self.pair.abort()


_backend_factory = Factory.forProtocol(End)
_backend_factory.noisy = False
