"""
The factory that stands for a web server's.
"""

from __future__ import annotations

from support.fakes import FakeConnection, RecordingFactory
from support.web import RequestTestCase
from twisted.internet.interfaces import IProtocolFactory, IProtocolNegotiationFactory
from twisted.internet.protocol import Factory
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.web import http
from twisted.web.server import Site
from zope.interface.verify import verifyObject

from connlimit import Limiter, LimitingFactory, RequestLimitingFactory


class StandingForTests(RequestTestCase):
    """
    It behaves as the wrapped factory does.
    """

    def test_it_is_a_factory(self) -> None:
        self.limited(1)
        verifyObject(IProtocolFactory, self.factory)
        self.assertIs(self.factory.wrappedFactory, self.site)
        self.assertIs(self.factory.limiter, self.limiter)
        self.assertIn("Site", repr(self.factory))
        self.assertEqual(self.factory.logPrefix(), "Site")

    def test_its_protocols_are_the_servers_own(self) -> None:
        self.limited(1)
        bare, limited = self.site.buildProtocol(None), self.factory.buildProtocol(None)
        self.assertIs(type(limited), type(bare))
        self.assertIs(limited.site, self.site)

    def test_the_site_itself_is_left_as_it_is(self) -> None:
        self.limited(0)
        self.factory.buildProtocol(None)
        self.ask(FakeConnection(self.clock).connect(self.site))
        self.assertEqual(len(self.page.requests), 1)
        self.assert_counts(accepted=0)

    def test_it_negotiates_what_the_site_does(self) -> None:
        self.limited(1)
        self.assertTrue(IProtocolNegotiationFactory.providedBy(self.factory))
        self.assertEqual(self.factory.acceptableProtocols(), self.site.acceptableProtocols())
        plain = RequestLimitingFactory(Factory.forProtocol(http.HTTPChannel), self.limiter)
        self.assertFalse(IProtocolNegotiationFactory.providedBy(plain))

    def test_what_is_set_on_it_is_set_on_the_site(self) -> None:
        self.limited(1)
        self.factory.displayTracebacks = True
        self.assertTrue(self.site.displayTracebacks)
        self.assertTrue(self.factory.displayTracebacks)
        del self.factory.displayTracebacks
        self.assertFalse(self.site.displayTracebacks)

    def test_the_last_port_that_stops_refuses_the_requests_that_wait_for_this_factory_alone(self) -> None:
        self.limited(0)
        other = RequestLimitingFactory(Site(self.page, reactor=self.clock), self.limiter)
        for factory in (self.factory, other):
            factory.doStart()
        self.addCleanup(other.doStop)
        (here,) = self.connect()
        there = FakeConnection(self.clock).connect(other)
        self.ask(here, there)
        self.factory.doStop()
        self.assertEqual((self.answers(here), self.answers(there)), ([b"503"], []))
        self.assert_counts(waiting=1, refused={"draining": 1})


class WhatCanBeLimitedTests(RequestTestCase):
    """
    What makes no requests is refused before anything starts.
    """

    def test_a_factory_that_is_none_of_http_is_refused_in_a_sentence(self) -> None:
        with self.assertRaisesRegex(TypeError, "if the factory is one of HTTP, such as a .*Site, not <"):
            RequestLimitingFactory(RecordingFactory(), Limiter())
        with self.assertRaisesRegex(TypeError, "wrappedFactory must provide IProtocolFactory, not 5"):
            RequestLimitingFactory(5, Limiter())
        with self.assertRaisesRegex(TypeError, "limiter must be a Limiter, not 5"):
            RequestLimitingFactory(Site(None), 5)

    def test_connections_are_limited_outside_of_requests(self) -> None:
        with self.assertRaisesRegex(TypeError, "requests are limited inside and connections outside"):
            RequestLimitingFactory(LimitingFactory(Site(None), Limiter()), Limiter())

    def test_channels_of_any_factory_are_limited(self) -> None:
        class Channel(http.HTTPChannel):
            requestFactory = http.Request

        self.limited(0)
        self.factory = RequestLimitingFactory(Factory.forProtocol(Channel), self.limiter)
        self.ask(*self.connect())
        self.assert_counts(waiting=1)

    def test_channels_within_other_protocols_are_limited(self) -> None:
        self.limited(1)
        self.factory = RequestLimitingFactory(WrappingFactory(self.site), self.limiter)
        clients = self.connect(2)
        self.assertIsInstance(clients[0].protocol, ProtocolWrapper)
        self.ask(*clients)
        self.assert_counts(active=1, waiting=1)

    def test_a_protocol_that_makes_no_requests_is_closed(self) -> None:
        class Odd(Site):
            def buildProtocol(self, address: object) -> object:
                return RecordingFactory().buildProtocol(address)

        self.limited(1)
        self.factory = RequestLimitingFactory(Odd(None, reactor=self.clock), self.limiter)
        (client,) = self.connect()
        self.assertTrue(client.closed)

    def test_a_connection_limiter_outside_and_a_request_limiter_inside_count_apart(self) -> None:
        self.limited(1)
        connections = Limiter(2, clock=self.clock)
        self.factory = LimitingFactory(self.factory, connections)
        clients = self.connect(3)
        self.assertEqual((connections.active, connections.waiting), (2, 1))
        self.ask(*clients)
        self.assert_counts(active=1, waiting=1)
        self.close(clients[1])
        self.assertEqual((connections.active, connections.waiting), (2, 0))
        self.assert_counts(active=1, waiting=1, departed=1)

    def test_requests_can_be_limited_twice(self) -> None:
        self.limited(2)
        outer = Limiter(1, clock=self.clock)
        self.factory = RequestLimitingFactory(self.factory, outer)
        clients = self.connect(3)
        self.ask(*clients)
        self.assertEqual((outer.active, outer.waiting), (1, 2))
        self.assert_counts(active=1)
        for _ in clients:
            self.page.answer()
        self.assertEqual((outer.active, outer.waiting, outer.snapshot().finished), (0, 0, 3))
        self.assert_counts(active=0, finished=3)
