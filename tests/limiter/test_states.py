"""
Any order of events whatever: no slot and no byte is lost, and every connection ends in exactly one way.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.fakes import ApplicationError, FakeConnection, RecordingFactory, RecordingProtocol
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock

from connlimit import Limiter, LimitingFactory
from connlimit._limiter.queue import ORDERS
from connlimit.limits import PerKey
from connlimit.observers import LimiterObserver


class UnrulyProtocol(RecordingProtocol):
    """
    An echo server that, as its factory was told, closes or fails in one of its methods.
    """

    def connectionMade(self) -> None:
        super().connectionMade()
        self.act("connectionMade")

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        self.act("dataReceived")

    def connectionLost(self, reason: object) -> None:
        super().connectionLost(reason)
        self.act("connectionLost")

    def act(self, where: str) -> None:
        if self.conduct[0] == where:
            {"close": self.transport.loseConnection, "abort": self.transport.abortConnection}.get(
                self.conduct[1], self.fail
            )()

    def fail(self) -> None:
        raise ApplicationError


class UnrulyFactory(RecordingFactory):
    """
    Builds servers that behave as the connection's number says.
    """

    protocol = UnrulyProtocol

    def __init__(self) -> None:
        super().__init__()
        self.conduct: dict[int, tuple[str, str]] = {}

    def buildProtocol(self, addr: object) -> Protocol | None:
        conduct = self.conduct[addr.port]
        if conduct[0] == "buildProtocol":
            if conduct[1] == "fail":
                raise ApplicationError
            return None
        protocol = super().buildProtocol(addr)
        protocol.conduct = conduct
        return protocol


class Endings(LimiterObserver):
    """
    Notes how each connection ended, and who was served before those who had waited longer.
    """

    def __init__(self) -> None:
        self.endings: dict[int, list[str]] = {}
        self.served_ones: set[int] = set()
        self.line: list[int] = []
        self.overtakers: list[int] = []

    def ends(self, connection: object, how: str) -> None:
        port = connection.address.port
        self.endings.setdefault(port, []).append(how)
        if port in self.line:
            self.line.remove(port)

    def waiting(self, limiter: Limiter, connection: object) -> None:
        self.line.append(connection.address.port)

    def served(self, limiter: Limiter, connection: object, waited: float) -> None:
        port = connection.address.port
        self.served_ones.add(port)
        if self.line and self.line[0] != port:
            self.overtakers.append(port)
        if port in self.line:
            self.line.remove(port)

    def finished(self, limiter: Limiter, connection: object) -> None:
        self.ends(connection, "served and finished")

    def refused(self, limiter: Limiter, connection: object, reason: str) -> None:
        self.ends(connection, "refused")

    def departed(self, limiter: Limiter, connection: object, waited: float) -> None:
        self.ends(connection, "departed")


def colour(address: object) -> int:
    """
    A key that has nothing to do with the peer.
    """
    return address.port % 3


CONDUCT = st.one_of(
    st.just(("nothing", "")),
    st.tuples(
        st.sampled_from(["buildProtocol", "connectionMade", "dataReceived", "connectionLost"]),
        st.sampled_from(["close", "abort", "fail"]),
    ),
)
ROOM = st.one_of(st.none(), st.integers(0, 3))


class EveryOrder(RuleBasedStateMachine):
    """
    Clients, a server, and somebody who changes the settings.
    """

    @initialize(
        maximum=ROOM,
        waiting=ROOM,
        timeout=st.one_of(st.none(), st.integers(1, 5)),
        order=st.sampled_from(["fifo", *sorted(ORDERS)]),
        cap=st.one_of(st.none(), st.integers(1, 2)),
        by_port=st.one_of(st.none(), st.integers(1, 2)),
    )
    def start(
        self,
        maximum: int | None,
        waiting: int | None,
        timeout: int | None,
        order: str,
        cap: int | None,
        by_port: int | None,
    ) -> None:
        self.clock = Clock()
        self.endings = Endings()
        self.limiter = Limiter(
            maximum,
            max_waiting=waiting,
            wait_timeout=timeout,
            order=order,
            max_per_peer=cap,
            limits=[] if by_port is None else [PerKey(by_port, colour)],
            clock=self.clock,
            observers=[self.endings],
            log=False,  # which sums up once a minute
        )
        self.by_port = by_port
        self.server = UnrulyFactory()
        self.factories = [LimitingFactory(self.server, self.limiter) for _ in range(2)]
        # Whether the line is served in the order of arrival, and has been all the time.
        self.is_plain = order == "fifo" and cap is None and by_port is None
        self.clients: list[FakeConnection] = []
        self.sent: dict[FakeConnection, bytes] = {}

    @rule(conduct=CONDUCT, at_once=st.booleans(), which=st.integers(0, 1), peer=st.integers(1, 3))
    def connect(self, conduct: tuple[str, str], at_once: bool, which: int, peer: int) -> None:
        client = FakeConnection(self.clock, number=len(self.clients), at_once=at_once, host=f"10.0.0.{peer}")
        self.server.conduct[client.address.port] = conduct
        self.sent[client] = b""
        self.clients.append(client)
        try:
            client.connect(self.factories[which])
        except ApplicationError:
            assert conduct == ("connectionMade", "fail")

    @rule(peer=st.integers(1, 3), count=st.integers(2, 5))
    def a_crowd_connects(self, peer: int, count: int) -> None:
        for _ in range(count):
            self.connect(("nothing", ""), False, 0, peer)

    def pick(self, number: int) -> FakeConnection:
        return self.clients[number % len(self.clients)]

    @precondition(lambda self: self.clients)
    @rule(number=st.integers(0, 20), data=st.binary(min_size=1, max_size=3))
    def client_sends(self, number: int, data: bytes) -> None:
        client = self.pick(number)
        if not client.has_ended:
            self.sent[client] += data
            client.send(data)

    @precondition(lambda self: self.clients)
    @rule(number=st.integers(0, 20))
    def transport_delivers_although_paused(self, number: int) -> None:
        client = self.pick(number)
        if client.closed or client.reading or client.disconnecting or client.has_ended:
            return
        if not client.sends:
            self.sent[client] += b"kept"
            client.deliver_although_paused(b"kept")

    @precondition(lambda self: self.clients)
    @rule(number=st.integers(0, 20), how=st.sampled_from(["close", "reset"]))
    def client_ends(self, number: int, how: str) -> None:
        getattr(self.pick(number), how)()

    @precondition(lambda self: self.clients)
    @rule(number=st.integers(0, 20), how=st.sampled_from(["loseConnection", "abortConnection"]))
    def server_ends(self, number: int, how: str) -> None:
        client = self.pick(number)
        if client.protocol is not None:
            getattr(client, how)()

    @precondition(lambda self: self.clients)
    @rule(number=st.integers(0, 20))
    def end_is_told_twice(self, number: int) -> None:
        client = self.pick(number)
        if client.lost is not None and client.address.port in self.endings.endings:
            client.protocol.factory.limiter.admission.finish(client.protocol)
            client.protocol.factory.limiter.admission.depart(client.protocol)

    @rule(maximum=ROOM)
    def change_the_limit(self, maximum: int | None) -> None:
        self.limiter.max_connections = maximum

    @rule(waiting=ROOM, timeout=st.one_of(st.none(), st.integers(1, 5)))
    def change_the_line(self, waiting: int | None, timeout: int | None) -> None:
        self.limiter.reconfigure(max_waiting=waiting, wait_timeout=timeout)

    @rule(
        order=st.sampled_from(sorted(ORDERS)),
        max_per_peer=st.one_of(st.none(), st.integers(1, 2)),
        over_peer=st.sampled_from(["wait", "refuse"]),
        max_rate=st.sampled_from([None, None, 1, 10]),
        peer_prefix=st.sampled_from([(32, 64), (0, 0)]),
    )
    def change_whose_turn_it_is(self, **settings: object) -> None:
        self.is_plain = False
        self.limiter.reconfigure(**settings, adaptive_target=1, adaptive_interval=2)

    @rule(seconds=st.integers(0, 3))
    def time_passes(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @precondition(lambda self: not self.limiter.waiting)
    @rule()
    def a_port_stops_and_starts(self) -> None:
        self.factories[0].doStart()
        self.factories[0].doStop()

    @invariant()
    def no_more_than_the_limit_are_active_unless_it_was_cut(self) -> None:
        if not hasattr(self, "limiter"):
            return
        maximum = self.limiter.max_connections
        # A cut ends nobody: what is active shrinks towards the limit, and never grows past it.
        if maximum is not None and hasattr(self, "before"):
            assert self.limiter.active <= max(maximum, self.before)
        self.before = self.limiter.active
        assert len(self.server.live) <= self.limiter.active

    @invariant()
    def no_peer_has_more_than_its_cap_unless_that_was_cut(self) -> None:
        if not hasattr(self, "limiter"):
            return
        cap, active = self.limiter.max_per_peer, self.peers(self.factories, "active_for")
        settings = (cap, self.limiter.peer_prefix)
        if getattr(self, "settings_before", None) == settings and cap is not None:
            assert all(count <= max(cap, self.peers_before[peer]) for peer, count in active.items())
        self.settings_before, self.peers_before = settings, active

    @invariant()
    def no_slot_is_free_while_somebody_waits(self) -> None:
        if not hasattr(self, "limiter") or not self.limiter.waiting or self.limiter.max_rate is not None:
            return
        maximum, cap = self.limiter.max_connections, self.limiter.max_per_peer
        if maximum is not None and self.limiter.active >= maximum:
            return
        assert cap is not None or self.by_port is not None
        active = [each for factory in self.factories for each in self.limiter.admission.active_for(factory)]
        peers, colours = Counter(map(self.peer, active)), Counter(colour(each.address) for each in active)
        for factory in self.factories:
            for each in self.limiter.admission.waiting_for(factory):
                lacks_peer = cap is not None and peers[self.peer(each)] >= cap
                lacks_colour = self.by_port is not None and colours[colour(each.address)] >= self.by_port
                assert lacks_peer or lacks_colour

    def peers(self, factories: list[LimitingFactory], which: str) -> Counter[str]:
        """
        How many connections of each peer are active or waiting.
        """
        return Counter(
            self.peer(connection)
            for factory in factories
            for connection in getattr(self.limiter.admission, which)(factory)
        )

    def peer(self, connection: object) -> str:
        """
        What counts as its client.
        """
        return "all" if self.limiter.peer_prefix == (0, 0) else connection.address.host

    @invariant()
    def nobody_overtakes_the_line(self) -> None:
        if hasattr(self, "limiter") and self.is_plain:
            assert self.endings.overtakers == []

    @invariant()
    def every_connection_is_somewhere_and_ends_once(self) -> None:
        if not hasattr(self, "limiter"):
            return
        snapshot = self.limiter.snapshot()
        assert all(len(ways) == 1 for ways in self.endings.endings.values())
        assert snapshot.accepted == len(self.clients)
        assert len(self.endings.endings) + snapshot.active + snapshot.waiting == snapshot.accepted
        assert snapshot.served == len(self.endings.served_ones)

    @invariant()
    def what_is_delivered_is_a_beginning_of_what_was_sent(self) -> None:
        for client in getattr(self, "clients", ()):
            assert self.sent[client].startswith(client.received)

    def teardown(self) -> None:
        if not hasattr(self, "limiter"):
            return
        self.limiter.reconfigure(
            max_connections=None, max_waiting=None, wait_timeout=None, max_per_peer=None, max_rate=None
        )
        self.clock.advance(0)
        self.clock.advance(0)
        for limit in self.limiter.limits:
            limit.slots = None
        self.clock.advance(0)
        for client in self.clients:
            well_behaved = self.server.conduct[client.address.port] == ("nothing", "")
            if well_behaved and not client.closed and not client.disconnecting and not client.has_ended:
                assert client.received == self.sent[client]
            client.close()
        for _ in range(3):
            self.clock.advance(0)
        assert (self.limiter.active, self.limiter.waiting) == (0, 0)
        assert len(self.endings.endings) == len(self.clients)
        assert not self.clock.getDelayedCalls()


EveryOrder.TestCase.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)
TestEveryOrder = EveryOrder.TestCase
