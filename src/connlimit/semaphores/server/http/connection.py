"""
HTTP/1.1 for small requests and answers, of which one client can have no more than its share in memory.

A connection has one request at a time. What a client sends before it has its answer is left in its socket,
but for one piece, and so is what it sends before it has read the answers that it was given. A request has so
much time until it is there as a whole, however slowly it is sent, and an answer until it is read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from time import monotonic, time
from typing import Any

from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import LoopingCall
from twisted.internet.tcp import Connection
from twisted.python.failure import Failure
from zope.interface import implementer

from connlimit.semaphores.server.http.messages import (
    MAX_BODY,
    TOO_LONG,
    Answer,
    Request,
    chunked,
    head,
    whole,
)
from connlimit.semaphores.server.http.reading import RequestReader

#: Seconds until a request must be there as a whole, and until an answer must be read a bit further.
_REQUEST, _READ = 20.0, 60.0

#: Seconds for which a connection is kept without a request.
_IDLE = 60.0

#: Seconds for which a request waits at most if there is more to be read behind it.
_WAIT = 60.0

#: Seconds for which a client that is refused may go on sending.
_LAST_WORDS = 2.0

#: Seconds between two looks at who is late.
_LOOK = 0.5


@implementer(IPushProducer)
class HttpConnection(Protocol):
    """
    One client's connection.

    :ivar expected: what is expected of the client in its time. See `HttpFactory.expect`.
    :ivar since: when that began.
    :ivar listed: when it had begun when it was looked at last.
    """

    factory: HttpFactory
    transport: Any
    expected: str | None = None
    since = listed = 0.0

    # Why nothing more is read: what was sent makes no sense, or the connection is about to end.
    _is_deaf = False
    _is_lost = False
    _is_paused = False
    # Whether the client is behind with reading.
    _is_behind = False
    # Whether everything that was written is with the socket.
    _is_direct = False
    # What is written as the client reads it.
    _pieces: Iterator[bytes] | None = None
    # Whether the next thing to be done is due in the reactor's next turn.
    _has_turn = False

    def __init__(self) -> None:
        self._reader = RequestReader(self._proceed)
        self._unparsed = b""
        self._answering: Request | None = None
        self._cancel: Callable[[], None] | None = None

    def connectionMade(self) -> None:
        """
        Wait for the first request.
        """
        # With TLS it is not the socket that we write to.
        self._is_direct = isinstance(self.transport, Connection) and not self.transport.TLS
        self.transport.registerProducer(self, True)
        self.factory.expect(self, "request")

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """
        Forget what was asked for.
        """
        self._is_deaf = True
        self._is_lost = True
        self._reader.close()
        self._pieces = None
        self._unparsed = b""
        self.factory.expect(self, None)
        if self._cancel is not None:
            cancel, self._cancel = self._cancel, None
            cancel()

    # What the client sends

    def dataReceived(self, data: bytes) -> None:
        """
        Read what was sent, or keep it until its turn.
        """
        if self._is_deaf:
            return
        if self._answering is not None or self._unparsed or self._is_behind or self._has_turn:
            self._unparsed += data
            self._pause()
            if self._cancel is not None:
                # Nobody would notice now that the client has gone.
                self.factory.expect(self, "wait")
            return
        was_idle = self.expected == "idle"
        self._parse(data)
        is_free = self._answering is None  # parsing may have begun an answer
        if was_idle and self._reader.size and is_free and not self._is_deaf:
            self.factory.expect(self, "request")

    def _parse(self, data: bytes) -> None:
        """
        Parse as much of the data as has a request, and answer that; keep the rest.
        """
        reader = self._reader
        rest = reader.read(data)
        if reader.wrong is None:
            self._unparsed = rest
        elif reader.requests:
            # Those before it are answered first, and that is the end.
            self._is_deaf = True
            reader.requests[-1].is_persistent = False
        else:
            self._refuse(*reader.wrong)
            return
        if reader.requests:
            self._next()

    def _proceed(self) -> None:
        """
        Tell a client that waits for it to send the body.
        """
        self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    # What is answered

    def _next(self) -> None:
        """
        Answer the next request.
        """
        self._answering = request = self._reader.requests.popleft()
        cancel = self.factory.answer(request, self.reply)
        if self._answering is request:
            self._cancel = cancel
            self.factory.expect(self, None)

    def reply(self, answer: Answer) -> None:
        """
        Answer the request.
        """
        request = self._answering
        if request is None or self._is_lost:
            return
        self._cancel = None
        if self.factory.is_ending:
            request.is_persistent = False
        body = answer.body
        if isinstance(body, bytes):
            self._write(whole(request, answer, body))
            self._answered()
            return
        if request.is_old:
            request.is_persistent = False
        framing = "Connection: close" if request.is_old else "Transfer-Encoding: chunked"
        is_kept = request.is_persistent
        lines = head(
            int(time()), request.is_old, is_kept, answer.status, answer.kind, answer.headers, framing
        )
        self._write(b"".join(lines))
        if request.method == b"HEAD":
            self._answered()
        else:
            self._pieces = body if request.is_old else chunked(body)
            self._later()

    def _write(self, data: bytes) -> None:
        """
        Write something, at once if the socket takes it.
        """
        if self._is_direct:
            # This spares the reactor three calls of the system, and a turn.
            written = self.transport.writeSomeData(data)
            if written == len(data):
                return
            # From now on what is left, and whatever follows, goes in its order through the transport.
            self._is_direct = False
            if isinstance(written, int):
                data = data[written:]
        self.transport.write(data)

    def _write_piece(self, pieces: Iterator[bytes]) -> None:
        piece = next(pieces, None)
        if piece is None:
            self._pieces = None
            self._answered()
        else:
            self._write(piece)
            self._later()

    def _answered(self) -> None:
        request, self._answering = self._answering, None
        assert request is not None
        if not request.is_persistent:
            self._close()
        elif self._reader.requests or self._unparsed or self._is_paused or self._reader.has_head:
            if self.expected == "wait":
                self.factory.expect(self, None)
            # Others have their turn first.
            self._later()
        elif not self._is_behind:
            self.factory.expect(self, "request" if self._reader.size else "idle")

    def _later(self) -> None:
        """
        Do the next thing that is to be done, after others have had their turn.
        """
        if not self._has_turn:
            self._has_turn = True
            self.factory.clock.callLater(0, self._turn)

    def _turn(self) -> None:
        self._has_turn = False
        if self._is_lost or self._is_behind:
            return
        if self._pieces is not None:
            self._write_piece(self._pieces)
        elif self._answering is None:
            self._go_on()

    def _go_on(self) -> None:
        """
        Have the next of the requests that were sent before the last was answered.
        """
        if self._reader.requests:
            self._next()
        elif not self._is_deaf:
            unparsed, self._unparsed = self._unparsed, b""
            if unparsed:
                self._parse(unparsed)
            if self._answering is None and not self._unparsed and not self._has_turn and not self._is_deaf:
                self._reader.check()
                if self._reader.wrong is not None:
                    self._refuse(*self._reader.wrong)
                    return
                self._resume()
                self.factory.expect(self, "request" if self._reader.size or self._reader.has_head else "idle")

    # How fast the client reads

    def pauseProducing(self) -> None:
        """
        The client does not read what it was answered.
        """
        self._is_behind = True
        self._pause()
        self.factory.expect(self, "read")

    def resumeProducing(self) -> None:
        """
        The client has read everything.
        """
        self._is_behind = False
        self.factory.expect(self, None)
        self._later()

    def stopProducing(self) -> None:
        """
        The connection is lost, which is told otherwise.
        """

    def _pause(self) -> None:
        if not self._is_paused and not self._is_lost:
            self._is_paused = True
            self.transport.pauseProducing()

    def _resume(self) -> None:
        if self._is_paused and not self._is_lost:
            self._is_paused = False
            self.transport.resumeProducing()

    # The end

    def late(self, what: str) -> None:
        """
        What was expected of the client did not come in time.
        """
        if what in ("idle", "refused") or (what == "request" and not self._reader.size):
            self._close()
        elif what == "request" and self._reader.received > MAX_BODY:
            self._refuse(413, TOO_LONG)
        elif what == "request":
            self._refuse(408, f"a request must be there within {_REQUEST:.0f} s")
        else:
            self.factory.expect(self, None)
            self.transport.abortConnection()

    def _refuse(self, status: int, text: str) -> None:
        """
        Say what is wrong, to a client that may be sending still, and read no more.
        """
        self._is_deaf = True
        self._unparsed = b""
        body = f"{text}\n".encode()
        self._write(whole(Request(b"", b"", {}, False, False), Answer(status, body), body))
        self._resume()
        self.factory.expect(self, "refused")

    def _close(self) -> None:
        self._is_deaf = True
        self._reader.requests.clear()
        self.factory.expect(self, "close")
        self.transport.unregisterProducer()
        self.transport.loseConnection()


class HttpFactory(Factory):
    """
    Makes connections, and ends those that are too late.

    :ivar is_ending: whether each connection ends with its next answer.
    """

    noisy = False
    protocol = HttpConnection  # type: ignore[assignment]

    _SECONDS = {
        "request": _REQUEST,
        "read": _READ,
        "idle": _IDLE,
        "refused": _LAST_WORDS,
        "close": _READ,
        "wait": _WAIT,
    }

    def __init__(self, clock: IReactorTime, seconds: Callable[[], float] = monotonic) -> None:
        """
        :param clock: has things happen later.
        :param seconds: gives the time by which clients are late.
        """
        self.clock = clock
        self.is_ending = False
        self._seconds = seconds
        # Those of whom something is expected, by what it is, in the order in which they were listed.
        self._expected: dict[str, OrderedDict[HttpConnection, None]] = {
            what: OrderedDict() for what in self._SECONDS
        }
        self._looking = LoopingCall(self._look)
        self._looking.clock = clock

    def answer(self, request: Request, reply: Callable[[Answer], None]) -> Callable[[], None] | None:
        """
        Answer a request, now or later.

        :return: what to call if the client goes away before it is answered.
        """
        raise NotImplementedError

    def expect(self, connection: HttpConnection, what: str | None) -> None:
        """
        Expect something of a client in its time, instead of whatever was expected before.
        """
        before = connection.expected
        connection.since = self._seconds()
        if before == what:
            return
        if before is not None:
            del self._expected[before][connection]
        connection.expected = what
        if what is not None:
            connection.listed = connection.since
            self._expected[what][connection] = None
            if not self._looking.running:
                self._looking.start(_LOOK, now=False)

    def _look(self) -> None:
        """
        End the connections of those who are late.
        """
        now = self._seconds()
        for what, connections in self._expected.items():
            latest = now - self._SECONDS[what]
            for _ in range(len(connections)):
                connection = next(iter(connections), None)
                if connection is None or connection.listed > latest:
                    break
                if connection.since > latest:
                    # It was in time, and has begun again.
                    connection.listed = connection.since
                    connections.move_to_end(connection)
                else:
                    connection.late(what)
        if not any(self._expected.values()):
            self._looking.stop()
