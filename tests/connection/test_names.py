"""
What the log calls a connection.
"""

from __future__ import annotations

from support.fakes import FakeConnection
from support.limiters import LimiterTestCase
from twisted.internet.interfaces import ILoggingContext
from twisted.internet.protocol import Protocol

from connlimit._connection.delegating import DelegatingProtocol


class NamesTests(LimiterTestCase):
    """
    A connection has the names of its real protocol.
    """

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
