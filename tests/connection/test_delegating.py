"""
One connection's life, in every order of events.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from support.fakes import ApplicationError, FakeConnection, RecordingFactory, RecordingProtocol
from support.limiters import LimiterTestCase
from twisted.internet.protocol import Factory, Protocol


class DelegateTests(LimiterTestCase):
    """
    Every event is the delegate's, whoever that is at the time.
    """

    def test_a_method_that_is_replaced_while_running_is_the_one_that_is_called(self) -> None:
        self.limited(1)
        client = self.connect()[0]
        real = self.server.live[0]
        received = []
        real.dataReceived = received.append
        client.send(b"new")
        self.turn()
        self.assertEqual(received, [b"new"])

    def test_a_protocol_that_takes_the_connection_over_is_told_of_its_end(self) -> None:
        self.limited(1)
        client = self.connect()[0]
        other = RecordingFactory().buildProtocol(client.address)
        other.factory.live.append(other)
        client.protocol.wrappedProtocol = other
        self.close(client)
        self.assertEqual(other.factory.events, ["lost"])
        self.assert_counts(active=0, finished=1)


class CostTests(LimiterTestCase):
    """
    As long as nobody has to wait, a limiter costs next to nothing.
    """

    def test_an_event_costs_one_call_more_than_without_a_limiter(self) -> None:
        self.limited(1)
        bare = FakeConnection(self.clock).connect(self.server)
        active, waiting = self.connect(2)
        cost = calls(bare.protocol.dataReceived, b"x")
        self.assertEqual(calls(active.protocol.dataReceived, b"x"), cost + 1)
        self.close(active)
        self.assertEqual(calls(waiting.protocol.dataReceived, b"x"), cost + 1)


def calls(function: Callable[..., object], *arguments: object) -> int:
    """
    How many functions of Python are called by a call.
    """
    called: list[str] = []
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, argument: called.append(event))
    try:
        function(*arguments)
    finally:
        sys.setprofile(before)
    return called.count("call")


class FailingServerTests(LimiterTestCase):
    """
    Whatever the application does, its slot goes on to the next.
    """

    def fail_first(self, event: str) -> None:
        """
        Make the server fail at its first call of a method.
        """

        class Failing(RecordingProtocol):
            def fail(self, name: str) -> None:
                if name == event and not self.factory.has_failed:
                    self.factory.has_failed = True
                    raise ApplicationError(name)

            def connectionMade(self) -> None:
                super().connectionMade()
                self.fail("connectionMade")

            def dataReceived(self, data: bytes) -> None:
                super().dataReceived(data)
                self.fail("dataReceived")

            def connectionLost(self, reason: object) -> None:
                super().connectionLost(reason)
                self.fail("connectionLost")

        self.server.has_failed = False
        self.server.protocol = Failing

    def test_a_failing_connectionMade_after_a_wait_is_logged_and_the_connection_stays_open(self) -> None:
        self.limited(0)
        self.fail_first("connectionMade")
        first, _ = self.connect(2)
        self.limiter.max_connections = 1
        first.send(b"still here")
        self.turn()
        self.assertEqual(first.received, b"still here")
        self.assertEqual(len(self.flushLoggedErrors(ApplicationError)), 1)
        self.close(first)
        self.assertEqual(self.served(), [0, 1])

    def test_a_failing_connectionMade_with_room_is_for_the_port_to_log(self) -> None:
        self.limited(1)
        self.fail_first("connectionMade")
        with self.assertRaises(ApplicationError):
            self.connect()
        self.assert_counts(active=1)

    def test_a_failing_dataReceived_ends_the_connection(self) -> None:
        self.limited(1)
        self.fail_first("dataReceived")
        first, _ = self.connect(2)
        first.send(b"boom")
        self.turn()
        self.assertEqual(self.served(), [0, 1])
        self.assert_counts(active=1, finished=1)

    def test_a_failing_dataReceived_of_what_was_kept_is_logged_and_ends_the_connection(self) -> None:
        self.limited(0)
        self.fail_first("dataReceived")
        first, _ = self.connect(2)
        first.deliver_although_paused(b"boom")
        first.deliver_although_paused(b"never seen")
        self.limiter.max_connections = 1
        self.turn()
        self.assertEqual(len(self.flushLoggedErrors(ApplicationError)), 1)
        self.assertNotIn(b"never seen", self.server.events)
        self.assertEqual(self.served(), [0, 1])

    def test_a_failing_connectionLost_frees_the_slot(self) -> None:
        self.limited(1)
        self.fail_first("connectionLost")
        first, _ = self.connect(2)
        self.close(first)
        self.assertEqual(self.served(), [0, 1])

    def test_an_end_that_is_told_twice_frees_one_slot(self) -> None:
        self.limited(1)
        self.server.protocol = Protocol
        first, *_ = self.connect(3)
        self.close(first)
        first.protocol.connectionLost(first.lost)
        self.assert_counts(active=1, waiting=1, finished=1)


class ExitingServerTests(LimiterTestCase):
    """
    A server that calls ``sys.exit`` is one that fails, as it is to the reactor.
    """

    def exit_in(self, method: str) -> type[Protocol]:
        def leave(*arguments: object) -> None:
            self.server.protocol = RecordingProtocol
            raise SystemExit(1)

        return type("Exiting", (Protocol,), {method: leave})

    def test_at_its_turn_it_harms_nobody_else(self) -> None:
        for method in ("__init__", "makeConnection", "connectionMade", "dataReceived", "logPrefix"):
            with self.subTest(method=method):
                self.limited(1)
                first, second, _ = self.connect(3)
                second.deliver_although_paused(b"kept")
                self.server.protocol = self.exit_in(method)
                self.close(first)
                self.assertEqual(len(self.flushLoggedErrors(SystemExit)), 1)
                self.close(second)
                self.assertEqual(self.served()[-1], 2)
                self.assert_counts(active=1, waiting=0)

    def test_a_factory_that_exits_has_no_protocol(self) -> None:
        self.limited(1)
        self.server.protocol = self.exit_in("__init__")
        first, second = self.connect(2)
        self.assertTrue(first.closed)
        self.assertEqual(len(self.flushLoggedErrors(SystemExit)), 1)
        self.assert_counts(active=1, finished=1)
        self.assertFalse(second.closed)

    def test_a_refusal_that_exits_ends_its_client(self) -> None:
        class Exiting(Protocol):
            def connectionMade(self) -> None:
                raise SystemExit(1)

        for refusal in (Factory.forProtocol(Exiting), Factory.forProtocol(self.exit_in("__init__"))):
            self.limited(0, wait_timeout=1, refusal=refusal)
            clients = self.connect(3)
            self.clock.advance(1)
            self.turn()
            self.assertTrue(all(client.closed for client in clients))
            self.flushLoggedErrors(SystemExit)


class TransparencyTests(LimiterTestCase):
    """
    Under the limit the bare server's events are what the real protocol gets.
    """

    def test_a_conversation_is_the_same_bare_with_room_and_after_a_wait(self) -> None:
        conversations = []
        for maximum in (None, 1, 0):
            self.limited(maximum)
            bare = RecordingFactory()
            target: Factory = bare if maximum is None else self.factory
            client = FakeConnection(self.clock).connect(target)
            self.limiter.max_connections = 1
            client.send(b"hello")
            self.turn()
            client.send(b"again")
            self.close(client)
            events = (bare if maximum is None else self.server).events
            conversations.append((events, client.received))
        self.assertEqual(conversations, [(["made", b"hello", b"again", "lost"], b"helloagain")] * 3)
