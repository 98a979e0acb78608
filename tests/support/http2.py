"""
A client of HTTP/2 that does what it is told.
"""

from __future__ import annotations

from pathlib import Path

import h2.connection
import h2.events
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol, wrapClientTLS
from twisted.internet.protocol import Protocol
from twisted.internet.ssl import Certificate, optionsForClientTLS
from twisted.python.failure import Failure

from support.sockets import patiently


class HTTP2Client(Protocol):
    """
    Asks on as many streams as it is told to.

    :ivar heads: the headers of each answer, by the number of its stream.
    :ivar bodies: the bodies so far.
    :ivar ended: the streams whose answers are complete.
    :ivar resets: the streams that the server has reset.
    """

    def __init__(self) -> None:
        self._h2 = h2.connection.H2Connection()
        self.heads: dict[int, dict[str, str]] = {}
        self.bodies: dict[int, bytes] = {}
        self.ended: list[int] = []
        self.resets: list[int] = []
        self.lost: Deferred[None] = Deferred()
        self.is_lost = False

    def connectionMade(self) -> None:
        self._h2.initiate_connection()
        self._send()

    def _send(self) -> None:
        self.transport.write(self._h2.data_to_send())

    def ask(self, path: str = "/", body: bytes = b"") -> int:
        """
        Send a request.

        :return: the number of its stream.
        """
        stream = self._h2.get_next_available_stream_id()
        head = [(":method", "POST" if body else "GET"), (":path", path), (":scheme", "https")]
        self._h2.send_headers(stream, [*head, (":authority", "localhost")], end_stream=not body)
        if body:
            self._h2.send_data(stream, body, end_stream=True)
        self._send()
        return stream

    def reset(self, stream: int) -> None:
        """
        Reset a stream.
        """
        self._h2.reset_stream(stream)
        self._send()

    def dataReceived(self, data: bytes) -> None:
        for event in self._h2.receive_data(data):
            if isinstance(event, h2.events.ResponseReceived):
                self.heads[event.stream_id] = {_text(name): _text(value) for name, value in event.headers}
            elif isinstance(event, h2.events.DataReceived):
                self.bodies[event.stream_id] = self.bodies.get(event.stream_id, b"") + event.data
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                self.ended.append(event.stream_id)
            elif isinstance(event, h2.events.StreamReset):
                self.resets.append(event.stream_id)
        self._send()

    def connectionLost(self, reason: Failure) -> None:
        self.is_lost = True
        self.lost.callback(None)

    async def close(self) -> None:
        """
        Close the connection.
        """
        self.transport.loseConnection()
        if not self.is_lost:
            await patiently(self.lost)

    def status(self, stream: int) -> str:
        """
        The status code of an answer.
        """
        return self.heads[stream][":status"]


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


async def connect_http2(port: int, certificate: Path) -> HTTP2Client:
    """
    A client that is connected to a port of loopback.
    """
    trusted = Certificate.loadPEM(certificate.read_bytes())
    options = optionsForClientTLS("localhost", trusted, acceptableProtocols=[b"h2"])
    endpoint = wrapClientTLS(options, TCP4ClientEndpoint(reactor, "127.0.0.1", port))
    return await patiently(connectProtocol(endpoint, HTTP2Client()))
