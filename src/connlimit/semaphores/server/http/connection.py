"""
HTTP/1.1 for small requests and answers, of which one client can have no more than its share in memory.

A connection has one request at a time. What a client sends before it has its answer is left in its socket,
but for one piece, and so is what it sends before it has read the answers that it was given. A request has so
much time until it is there as a whole, however slowly it is sent, and an answer until it is read. Parsing is
httptools's, which is strict: what could be understood in two ways is refused.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from time import monotonic, time
from typing import Any

from httptools import (
    HttpParserCallbackError,
    HttpParserError,
    HttpParserInvalidMethodError,
    HttpParserUpgrade,
    HttpRequestParser,
)
from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import LoopingCall
from twisted.internet.tcp import Connection
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from connlimit._system.bounded_log import BoundedLog
from connlimit.semaphores.server.http.messages import (
    MOST_BODY,
    TOO_LONG,
    Answer,
    Request,
    chunked,
    head,
    whole,
)

#: The longest head of a request that is read, in bytes.
MOST_HEAD = 16 * 1024

#: How many bytes the pieces of a body may have besides the body.
_MOST_FRAMING = MOST_HEAD + 8 * MOST_BODY

#: How many bytes are parsed at a time, so that no more requests are known than fit in there.
_PIECE = 1024

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

_SORRY = "Something went wrong here; the log says what."


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
    _log = BoundedLog(Logger(namespace="connlimit.semaphores.server"))

    # The request that is being read, when its head is there; how much was read of it, and of its body.
    _reading: Request | None = None
    _size = 0
    _received = 0
    # Whether a client that waits for it was told to send the body.
    _is_expected = False
    # What is wrong with it: a status and a sentence.
    _wrong: tuple[int, str] | None = None

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
        # What was read of the request so far.
        self._target: list[bytes] = []
        self._headers: dict[bytes, bytes] = {}
        self._chunks: list[bytes] = []
        # These two are called by httptools, the second more often than anything else.
        self.on_url = self._target.append
        self.on_header = self._headers.__setitem__
        self._parser = HttpRequestParser(self)
        self._requests: deque[Request] = deque()
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
        del self._parser  # which would keep this alive
        self._pieces = None
        self._requests.clear()
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
        if was_idle and self._size and is_free and not self._is_deaf:
            self.factory.expect(self, "request")

    def _parse(self, data: bytes) -> None:
        """
        Parse as much of the data as has a request, and answer that; keep the rest.
        """
        requests = self._requests
        at, length = 0, len(data)
        while at < length and not requests and self._wrong is None:
            piece = data if length <= _PIECE else data[at : at + _PIECE]
            at += self._parse_piece(piece)
            if not requests:
                self._size += len(piece)
                self._check()
        if self._wrong is None:
            self._unparsed = data[at:]
        elif requests:
            # Those before it are answered first, and that is the end.
            self._is_deaf = True
            self._requests[-1].is_persistent = False
        else:
            self._refuse(*self._wrong)
            return
        if requests:
            self._next()

    def _parse_piece(self, piece: bytes) -> int:
        """
        Parse all of some data, or what there is before the end of a request that offers another protocol.

        :return: how many bytes that was.
        """
        try:
            self._parser.feed_data(piece)
        except HttpParserUpgrade as upgrade:
            # There is nothing else to speak here: what follows is the next request.
            self._parser = HttpRequestParser(self)
            return int(upgrade.args[0])
        except HttpParserInvalidMethodError:
            self._wrong = 501, "there is no such method"
        except HttpParserCallbackError:
            self._log.failure("a request could not be read")
            self._wrong = 500, _SORRY
        except HttpParserError:
            self._wrong = self._wrong or (400, "this is not HTTP/1.1")
        return len(piece)

    def _check(self) -> None:
        """
        Look at a request that is not there as a whole.
        """
        if self._wrong is not None:
            return
        request = self._reading
        if request is not None and not self._is_expected:
            self._is_expected = True
            if not request.is_old and request.header(b"Expect").lower() == b"100-continue":
                length = request.header(b"Content-Length")[:10]
                if length.isdigit() and int(length) > MOST_BODY:
                    self._wrong = 413, TOO_LONG
                else:
                    self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif self._reading is None and self._size > MOST_HEAD:
            self._wrong = 431, f"the head of a request can have {MOST_HEAD} bytes at most"
        elif self._size - self._received > _MOST_FRAMING:
            self._wrong = 413, TOO_LONG

    # What httptools calls

    def on_headers_complete(self) -> None:
        """
        The head was read.
        """
        parser, target, headers = self._parser, self._target, self._headers
        version = parser.get_http_version()
        is_new = version == "1.1"
        self._reading = Request(
            parser.get_method(),
            target[0] if len(target) == 1 else b"".join(target),
            headers.copy(),
            is_new and parser.should_keep_alive(),
            version == "1.0",
        )
        target.clear()
        headers.clear()
        if not is_new and version != "1.0":
            self._wrong = self._wrong or (400, "this is not HTTP/1.1")

    def on_body(self, body: bytes) -> None:
        """
        A piece of the body was read.
        """
        self._received += len(body)
        if self._received <= MOST_BODY:
            self._chunks.append(body)
        else:
            self._chunks.clear()

    def on_message_complete(self) -> None:
        """
        The request is there as a whole.
        """
        request, self._reading = self._reading, None
        assert request is not None
        if self._received:
            request.body = b"".join(self._chunks)
            request.is_too_long = self._received > MOST_BODY
            self._chunks.clear()
        self._headers.clear()  # of trailers
        self._is_expected = False
        self._size = self._received = 0
        if self._wrong is None:
            self._requests.append(request)

    # What is answered

    def _next(self) -> None:
        """
        Answer the next request.
        """
        self._answering = request = self._requests.popleft()
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
            # From now on what is left, and whatever follows, goes in its order by way of the transport.
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
        elif self._requests or self._unparsed or self._is_paused or self._reading is not None:
            if self.expected == "wait":
                self.factory.expect(self, None)
            # Others have their turn first.
            self._later()
        elif not self._is_behind:
            self.factory.expect(self, "request" if self._size else "idle")

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
        if self._requests:
            self._next()
        elif not self._is_deaf:
            unparsed, self._unparsed = self._unparsed, b""
            if unparsed:
                self._parse(unparsed)
            if self._answering is None and not self._unparsed and not self._has_turn and not self._is_deaf:
                self._check()
                if self._wrong is not None:
                    self._refuse(*self._wrong)
                    return
                self._resume()
                self.factory.expect(self, "request" if self._size or self._reading is not None else "idle")

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
        if what in ("idle", "refused") or (what == "request" and not self._size):
            self._close()
        elif what == "request" and self._received > MOST_BODY:
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
        self._requests.clear()
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
