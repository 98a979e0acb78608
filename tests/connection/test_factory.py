"""
The factory that stands for another one.
"""

from __future__ import annotations

from copy import copy

from support.fakes import ApplicationError, FakeConnection, RecordingFactory
from support.limiters import LimiterTestCase
from twisted.internet.address import IPv4Address
from twisted.internet.interfaces import IConsumer, IProtocolFactory, IProtocolNegotiationFactory
from twisted.internet.protocol import ClientFactory, Factory, Protocol
from zope.interface import alsoProvides, implementer
from zope.interface.verify import verifyObject

from connlimit import Limiter, LimitingFactory


class StandingForTests(LimiterTestCase):
    """
    It behaves as the wrapped factory does.
    """

    def test_it_is_a_factory(self) -> None:
        self.limited(1)
        verifyObject(IProtocolFactory, self.factory)
        self.assertIs(self.factory.wrappedFactory, self.server)
        self.assertIs(self.factory.limiter, self.limiter)

    def test_only_a_factory_can_be_limited_and_only_by_a_limiter(self) -> None:
        with self.assertRaisesRegex(TypeError, "wrappedFactory must provide IProtocolFactory, not 5"):
            LimitingFactory(5, Limiter())
        with self.assertRaisesRegex(TypeError, "limiter must be a Limiter, not 5"):
            LimitingFactory(RecordingFactory(), 5)

    def test_it_starts_and_stops_the_wrapped_factory_as_its_ports_do(self) -> None:
        class Counting(RecordingFactory):
            def startFactory(self) -> None:
                self.events.append("start")

            def stopFactory(self) -> None:
                self.events.append("stop")

        server = Counting()
        factory = LimitingFactory(server, Limiter())
        factory.doStart()
        factory.doStart()
        self.assertEqual(factory.numPorts, 2)
        factory.doStop()
        self.assertEqual(server.events, ["start"])
        factory.doStop()
        self.assertEqual(server.events, ["start", "stop"])

    def test_the_last_port_that_stops_refuses_those_who_wait_for_this_factory_alone(self) -> None:
        self.limited(1)
        other = LimitingFactory(RecordingFactory(), self.limiter)
        self.factory.doStart()
        self.factory.doStart()
        active, waiting = self.connect(2)
        elsewhere = FakeConnection(self.clock).connect(other)
        self.factory.doStop()
        self.turn()
        self.assertFalse(waiting.closed)
        self.factory.doStop()
        self.turn()
        self.assertEqual((active.closed, waiting.closed, elsewhere.closed), (False, True, False))
        self.assert_counts(active=1, waiting=1, refused={"draining": 1})

    def test_what_is_set_on_it_is_set_on_the_wrapped_factory(self) -> None:
        self.limited(1)
        self.factory.timeOut = 5
        self.factory.protocol = Protocol
        self.factory.numPorts = 7
        self.assertEqual((self.server.timeOut, self.server.protocol, self.server.numPorts), (5, Protocol, 7))
        self.assertEqual(self.factory.timeOut, 5)
        del self.factory.timeOut
        self.assertFalse(hasattr(self.server, "timeOut"))
        with self.assertRaises(AttributeError):
            del self.factory.timeOut

    def test_a_buildProtocol_of_ones_own_does_not_pass_the_limiter_by(self) -> None:
        self.limited(1)
        self.factory.buildProtocol = lambda address: Protocol()
        first, _ = self.connect(2)
        self.assert_counts(active=1, waiting=1)
        self.assertIsInstance(first.protocol.wrappedProtocol, Protocol)
        del self.factory.buildProtocol
        self.close(first)
        self.assertEqual(self.served(), [1])

    def test_its_own_limiter_and_factory_can_be_replaced(self) -> None:
        self.limited(1)
        other, limiter = RecordingFactory(), Limiter(2, clock=self.clock)
        self.factory.wrappedFactory, self.factory.limiter = other, limiter
        self.connect()
        self.assertEqual((limiter.active, len(other.live), len(self.server.live)), (1, 1, 0))

    def test_it_can_be_copied_and_given_interfaces(self) -> None:
        self.limited(1)
        alsoProvides(self.factory, IConsumer)
        self.assertFalse(IConsumer.providedBy(self.server))
        self.assertTrue(IConsumer.providedBy(self.factory))
        self.assertIs(copy(self.factory).wrappedFactory, self.server)

    def test_its_log_prefix_is_that_of_the_wrapped_factory(self) -> None:
        class Named(Factory):
            def logPrefix(self) -> str:
                return "mail"

        @implementer(IProtocolFactory)
        class Nameless:
            pass

        self.assertEqual(LimitingFactory(Named(), Limiter()).logPrefix(), "mail")
        self.assertEqual(LimitingFactory(Nameless(), Limiter()).logPrefix(), "Nameless")

    def test_other_attributes_are_those_of_the_wrapped_factory(self) -> None:
        wrapped = ClientFactory()
        wrapped.noisy = False
        factory = LimitingFactory(wrapped, Limiter())
        self.assertFalse(factory.noisy)
        self.assertEqual(factory.clientConnectionLost, wrapped.clientConnectionLost)
        self.assertFalse(hasattr(LimitingFactory(Factory(), Limiter()), "clientConnectionLost"))
        self.assertFalse(hasattr(LimitingFactory.__new__(LimitingFactory), "anything"))

    def test_it_negotiates_protocols_if_and_only_if_the_wrapped_factory_does(self) -> None:
        @implementer(IProtocolNegotiationFactory)
        class Negotiating(Factory):
            def acceptableProtocols(self) -> list[bytes]:
                return [b"h2"]

        factory = LimitingFactory(Negotiating(), Limiter())
        self.assertTrue(IProtocolNegotiationFactory.providedBy(factory))
        self.assertEqual(factory.acceptableProtocols(), [b"h2"])
        self.assertFalse(IProtocolNegotiationFactory.providedBy(LimitingFactory(Factory(), Limiter())))


class BuildingTests(LimiterTestCase):
    """
    What the wrapped factory builds, or fails to build.
    """

    def build(self, *results: object) -> None:
        """
        Let the server build these for the first connections, and echoes for the others.
        """
        built = self.server.buildProtocol
        results = list(reversed(results))

        def build(address: object) -> Protocol | None:
            ours = built(address)
            if not results:
                return ours
            first = results.pop()
            if isinstance(first, Exception):
                raise first
            return first

        self.server.buildProtocol = build

    def test_a_connection_without_an_address_is_served(self) -> None:
        self.limited(5, max_per_peer=1)
        connections = [self.factory.buildProtocol(None) for _ in range(2)]
        # Nobody knows whose they are, so no cap of a peer holds.
        self.assertNotIn(None, connections)
        self.assert_counts(active=2)

    def test_a_refusal_without_words_is_no_protocol_at_all(self) -> None:
        self.limited(1, max_waiting=0)
        self.connect()
        self.assertIsNone(self.factory.buildProtocol(IPv4Address("TCP", "10.0.0.1", 1)))
        self.assert_counts(active=1, refused={"full": 1})
        self.assertEqual(self.served(), [0])

    def test_none_closes_the_connection_and_takes_no_slot(self) -> None:
        self.limited(1)
        self.build(None)
        first, second = self.connect(2)
        self.assertEqual((first.closed, second.closed), (True, False))
        self.assert_counts(active=1, waiting=0, finished=1)

    def test_none_after_a_wait_closes_the_connection_and_the_slot_goes_on(self) -> None:
        for at_once in (True, False):
            with self.subTest(at_once=at_once):
                self.limited(0)
                self.build(None)
                first, second = self.connect(2, at_once=at_once)
                self.limiter.max_connections = 1
                self.turn()
                self.assertEqual((first.closed, second.closed), (True, False))
                self.assert_counts(active=1, waiting=0, finished=1)

    def test_a_failure_is_logged_and_closes_the_connection(self) -> None:
        for maximum in (0, 1):
            with self.subTest(maximum=maximum):
                self.limited(maximum)
                self.build(ApplicationError())
                first, second = self.connect(2)
                self.limiter.max_connections = 1
                self.turn()
                self.assertEqual((first.closed, second.closed), (True, False))
                self.assert_counts(active=1, waiting=0, finished=1)
                self.assertEqual(len(self.flushLoggedErrors(ApplicationError)), 1)

    def test_many_failures_have_one_traceback(self) -> None:
        self.limited(100)
        self.build(*[ApplicationError()] * 100)
        self.assertTrue(all(client.closed for client in self.connect(100)))
        self.assertEqual(len(self.flushLoggedErrors(ApplicationError)), 1)
