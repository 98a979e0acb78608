"""
Connections provide what their delegates provide.
"""

from __future__ import annotations

from support.limiters import LimiterTestCase
from twisted.internet.interfaces import IFileDescriptorReceiver, IHalfCloseableProtocol, IHandshakeListener
from twisted.internet.protocol import Protocol
from zope.interface import implementer


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
        for maximum in (0, 1):
            with self.subTest(maximum=maximum):
                self.limited(maximum)
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
