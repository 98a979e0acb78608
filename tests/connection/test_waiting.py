"""
Who holds a place loses nothing, and gives way to the real protocol or to a refusal.
"""

from __future__ import annotations

from support.fakes import ApplicationError, FakeConnection, RecordingProtocol
from support.limiters import LimiterTestCase
from support.logs import Log
from twisted.internet.protocol import Protocol

from connlimit._connection.waiting import WaitingProtocol


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

    def test_a_place_is_held_by_a_waiting_protocol(self) -> None:
        self.limited(0)
        self.assertIsInstance(self.connect()[0].protocol.wrappedProtocol, WaitingProtocol)


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
