"""
One connection's life, in every order of events.
"""

from __future__ import annotations

from limiter.test_limiter import LimiterTestCase
from support import Log
from support.fakes import ApplicationError, FakeConnection, RecordingFactory, RecordingProtocol
from twisted.internet.interfaces import (
    IFileDescriptorReceiver,
    IHalfCloseableProtocol,
    IHandshakeListener,
    ILoggingContext,
)
from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer

from connlimit._connection.delegating import DelegatingProtocol, WaitingProtocol


class WaitingTests(LimiterTestCase):
    """
    Who waits loses nothing.
    """

    def wait(self, protocol: type[Protocol] = RecordingProtocol, **how: bool) -> FakeConnection:
        """
        A client that waits for its turn, which `serve` gives it.
        """
        self.limited(0)
        self.server.protocol = protocol
        return self.connect(**how)[0]

    def serve(self) -> None:
        self.limiter.max_connections = 1
        self.turn()

    def test_nothing_is_read(self) -> None:
        client = self.wait()
        client.send(b"early")
        self.turn()
        self.assertFalse(client.reading)
        self.assertEqual(self.server.events, [])
        self.serve()
        self.assertEqual(self.server.events, ["made", b"early"])
        self.assertEqual(client.received, b"early")

    def test_what_the_transport_delivers_all_the_same_comes_first_and_in_order(self) -> None:
        client = self.wait()
        client.deliver_although_paused(b"one")
        client.deliver_although_paused(b"two")
        client.send(b"three")
        self.serve()
        self.assertEqual(self.server.events, ["made", b"one", b"two", b"three"])

    def test_a_transport_that_goes_on_delivering_is_ended(self) -> None:
        with Log() as log:
            for _ in range(3):
                client = self.wait()
                while not client.closed:
                    client.deliver_although_paused(b"x" * 65536)
                    self.turn()
                    self.assertLess(sum(map(len, client.protocol.wrappedProtocol.kept)), 5_000_000)
                self.assert_counts(waiting=0, departed=1)
        self.assertEqual(len(log.warnings()), 3)  # one for each factory

    def test_no_protocol_is_built_before_its_turn(self) -> None:
        self.wait()
        self.assertEqual(self.server.addresses, [])
        self.serve()
        self.assertEqual(len(self.server.addresses), 1)

    def test_a_client_that_left_unnoticed_is_served_its_end(self) -> None:
        client = self.wait()
        client.send(b"bye")
        client.close()
        self.turn()
        self.assert_counts(waiting=1)
        self.serve()
        self.assertEqual(self.server.events, ["made", b"bye", "lost"])
        self.assert_counts(active=0, waiting=0, finished=1)

    def test_a_client_whose_transport_tells_that_it_left_has_departed(self) -> None:
        client = self.wait()
        client.abortConnection()
        self.turn()
        self.assert_counts(active=0, waiting=0, departed=1)
        self.serve()
        self.assertEqual(self.server.addresses, [])

    def test_a_transport_that_is_lost_while_it_resumes_gets_no_protocol(self) -> None:
        class Resuming(FakeConnection):
            def resumeProducing(self) -> None:
                self.loseConnection()

        self.limited(0)
        Resuming(self.clock, at_once=True).connect(self.factory)
        self.serve()
        self.assertEqual(self.server.events, [])
        self.assert_counts(active=0, finished=1)

    def test_a_transport_that_cannot_resume_is_ended(self) -> None:
        class Stuck(FakeConnection):
            def resumeProducing(self) -> None:
                raise ApplicationError

        self.limited(0)
        Stuck(self.clock).connect(self.factory)
        self.serve()
        self.assert_counts(active=0, finished=1)
        self.assertEqual(len(self.flushLoggedErrors(ApplicationError)), 1)

    def test_a_protocol_that_pauses_when_it_is_made_stays_paused(self) -> None:
        class Pausing(RecordingProtocol):
            def connectionMade(self) -> None:
                super().connectionMade()
                self.transport.pauseProducing()

        client = self.wait(Pausing)
        client.send(b"later")
        self.serve()
        self.assertFalse(client.reading)
        self.assertEqual(self.server.events, ["made"])
        client.resumeProducing()
        self.turn()
        self.assertEqual(self.server.events, ["made", b"later"])

    def test_a_protocol_that_closes_when_it_is_made_gets_nothing_more(self) -> None:
        class Closing(RecordingProtocol):
            def connectionMade(self) -> None:
                super().connectionMade()
                self.transport.loseConnection()

        for at_once in (True, False):
            with self.subTest(at_once=at_once):
                client = self.wait(Closing, at_once=at_once)
                client.deliver_although_paused(b"too late")
                self.serve()
                self.assertEqual(self.server.events, ["made", "lost"])
                self.assert_counts(active=0, finished=1)

    def test_the_real_protocol_gets_the_real_transport(self) -> None:
        client = self.wait()
        self.serve()
        self.assertIs(self.server.live[0].transport, client)


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


class RefusingTests(LimiterTestCase):
    """
    The refused are closed, whatever their transport makes of it.
    """

    def test_a_refused_connection_is_closed_and_counts_once(self) -> None:
        for at_once in (True, False):
            with self.subTest(at_once=at_once):
                self.limited(0, wait_timeout=1)
                client = self.connect(at_once=at_once)[0]
                self.clock.advance(1)
                self.turn()
                self.assertTrue(client.closed)
                self.assert_counts(refused={"timeout": 1}, departed=0, finished=0)

    def test_a_transport_that_cannot_close_is_aborted(self) -> None:
        class Stuck(FakeConnection):
            def loseConnection(self) -> None:
                raise ApplicationError

        self.limited(0, wait_timeout=1)
        client = Stuck(self.clock).connect(self.factory)
        self.clock.advance(1)
        self.turn()
        self.assertTrue(client.closed)
        self.assertEqual(len(self.flushLoggedErrors(ApplicationError)), 1)

    def test_a_transport_that_can_neither_close_nor_abort_harms_nobody(self) -> None:
        class Stuck(FakeConnection):
            def loseConnection(self) -> None:
                raise ApplicationError

            abortConnection = None

        self.limited(0, wait_timeout=1)
        Stuck(self.clock).connect(self.factory)
        other = self.connect()[0]
        self.clock.advance(1)
        self.turn()
        self.assertTrue(other.closed)
        self.assertEqual(len(self.flushLoggedErrors(ApplicationError)), 2)


@implementer(IHalfCloseableProtocol, IHandshakeListener, IFileDescriptorReceiver)
class Listening(Protocol):
    """
    Writes down the events that only a protocol that asks for them hears.
    """

    def __init__(self) -> None:
        self.heard: list[object] = []

    def readConnectionLost(self) -> None:
        self.heard.append("read")

    def writeConnectionLost(self) -> None:
        self.heard.append("write")

    def handshakeCompleted(self) -> None:
        self.heard.append("handshake")

    def fileDescriptorReceived(self, descriptor: int) -> None:
        self.heard.append(descriptor)


class ForwardingTests(LimiterTestCase):
    """
    A connection provides what its real protocol provides, no more and no less.
    """

    ASKED = (IHalfCloseableProtocol, IHandshakeListener, IFileDescriptorReceiver)

    def test_events_are_forwarded_to_a_protocol_that_asks_for_them(self) -> None:
        for most in (0, 1):
            with self.subTest(most=most):
                self.limited(most)
                self.server.protocol = Listening
                connection = self.connect()[0].protocol
                self.limiter.max_connections = 1
                for interface in self.ASKED:
                    self.assertTrue(interface.providedBy(connection))
                connection.readConnectionLost()
                connection.writeConnectionLost()
                connection.handshakeCompleted()
                connection.fileDescriptorReceived(7)
                self.assertEqual(connection.wrappedProtocol.heard, ["read", "write", "handshake", 7])

    def test_each_interface_is_provided_if_and_only_if_the_real_protocol_provides_it(self) -> None:
        for chosen in self.ASKED:
            protocol = implementer(chosen)(type("Chosen", (Protocol,), {}))
            self.limited(1)
            self.server.protocol = protocol
            connection = self.connect()[0].protocol
            self.assertEqual(
                [each.providedBy(connection) for each in self.ASKED], [each is chosen for each in self.ASKED]
            )

    def test_who_waits_provides_none(self) -> None:
        self.limited(0)
        self.server.protocol = Listening
        connection = self.connect()[0].protocol
        self.assertEqual([each.providedBy(connection) for each in self.ASKED], [False] * 3)

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

    def test_the_log_prefix_is_that_of_the_real_protocol(self) -> None:
        class Named(Protocol):
            def logPrefix(self) -> str:
                return "mail"

        self.limited(1)
        self.server.protocol = Named
        connection = self.connect()[0].protocol
        self.assertTrue(ILoggingContext.providedBy(connection))
        self.assertEqual(connection.logPrefix(), "mail")
        self.assertEqual(self.factory.buildProtocol(None).logPrefix(), "WaitingProtocol")

    def test_the_transport_logs_as_the_real_protocol_after_a_wait(self) -> None:
        self.limited(0)
        client = FakeConnection(self.clock)
        client.logstr = "WaitingProtocol,7,127.0.0.1"
        client.connect(self.factory)
        self.limiter.max_connections = 1
        self.assertEqual(client.logstr, "RecordingProtocol,7,127.0.0.1")

    def test_a_protocol_without_a_log_prefix_is_called_by_its_class(self) -> None:
        connection = DelegatingProtocol()
        connection.wrappedProtocol = 5
        self.assertEqual(connection.logPrefix(), "int")

    def test_a_place_is_held_by_a_waiting_protocol(self) -> None:
        self.limited(0)
        self.assertIsInstance(self.connect()[0].protocol.wrappedProtocol, WaitingProtocol)


class TransparencyTests(LimiterTestCase):
    """
    Under the limit the bare server's events are what the real protocol gets.
    """

    def test_a_conversation_is_the_same_bare_with_room_and_after_a_wait(self) -> None:
        conversations = []
        for most in (None, 1, 0):
            self.limited(most)
            bare = RecordingFactory()
            target: Factory = bare if most is None else self.factory
            client = FakeConnection(self.clock).connect(target)
            self.limiter.max_connections = 1
            client.send(b"hello")
            self.turn()
            client.send(b"again")
            self.close(client)
            events = (bare if most is None else self.server).events
            conversations.append((events, client.received))
        self.assertEqual(conversations, [(["made", b"hello", b"again", "lost"], b"helloagain")] * 3)
