"""
Requests as they are read, each within its bounds, and what is wrong with them.

Parsing is httptools's, which is strict: what could be understood in two ways is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from httptools import (
    HttpParserCallbackError,
    HttpParserError,
    HttpParserInvalidMethodError,
    HttpParserUpgrade,
    HttpRequestParser,
)
from twisted.logger import Logger

from connlimit._system.bounded_log import BoundedLog
from connlimit.semaphores.server.http.messages import MAX_BODY, TOO_LONG, Request

#: The longest head of a request that is read, in bytes.
MAX_HEAD = 16 * 1024

#: How many bytes the pieces of a body may have besides the body.
_MAX_FRAMING = MAX_HEAD + 8 * MAX_BODY

#: How many bytes are parsed at a time, so that no more requests are known than fit in there.
_PIECE = 1024

_SORRY = "Something went wrong here; the log says what."

_log = BoundedLog(Logger(namespace="connlimit.semaphores.server"))


class RequestReader:
    """
    Reads the requests of one connection.

    :ivar requests: those that are there as a whole, until they are answered.
    :ivar size: how many bytes were read of the next one.
    :ivar received: how many of them were of its body.
    :ivar wrong: what is wrong with it: a status and a sentence.
    """

    def __init__(self, proceed: Callable[[], None]) -> None:
        """
        :param proceed: tells a client that waits for it to send the body.
        """
        self.requests: deque[Request] = deque()
        self.size = self.received = 0
        self.wrong: tuple[int, str] | None = None
        self._proceed = proceed
        # The request that is being read, when its head is there.
        self._reading: Request | None = None
        # Whether a client that waits for it was told to send the body.
        self._is_expected = False
        # What was read of the request so far.
        self._target: list[bytes] = []
        self._headers: dict[bytes, bytes] = {}
        self._chunks: list[bytes] = []
        # These two are called by httptools, the second more often than anything else.
        self.on_url = self._target.append
        self.on_header = self._headers.__setitem__
        self._parser = HttpRequestParser(self)

    @property
    def has_head(self) -> bool:
        """
        Whether the head of the next one is there, and its body is not.
        """
        return self._reading is not None

    def close(self) -> None:
        """
        Read no more, and forget what was read.
        """
        del self._parser, self._proceed  # which would keep this and its connection alive
        self.requests.clear()

    def read(self, data: bytes) -> bytes:
        """
        Read as much of the data as has a request.

        :return: the rest.
        """
        requests = self.requests
        at, length = 0, len(data)
        while at < length and not requests and self.wrong is None:
            piece = data if length <= _PIECE else data[at : at + _PIECE]
            at += self._parse_piece(piece)
            if not requests:
                self.size += len(piece)
                self.check()
        return data[at:]

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
            self.wrong = 501, "there is no such method"
        except HttpParserCallbackError:
            _log.failure("a request could not be read")
            self.wrong = 500, _SORRY
        except HttpParserError:
            self.wrong = self.wrong or (400, "this is not HTTP/1.1")
        return len(piece)

    def check(self) -> None:
        """
        Look at a request that is not there as a whole.
        """
        if self.wrong is not None:
            return
        request = self._reading
        if request is not None and not self._is_expected:
            self._is_expected = True
            if not request.is_old and request.header(b"Expect").lower() == b"100-continue":
                length = request.header(b"Content-Length")[:10]
                if length.isdigit() and int(length) > MAX_BODY:
                    self.wrong = 413, TOO_LONG
                else:
                    self._proceed()
        elif self._reading is None and self.size > MAX_HEAD:
            self.wrong = 431, f"the head of a request can have {MAX_HEAD} bytes at most"
        elif self.size - self.received > _MAX_FRAMING:
            self.wrong = 413, TOO_LONG

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
            self.wrong = self.wrong or (400, "this is not HTTP/1.1")

    def on_body(self, body: bytes) -> None:
        """
        A piece of the body was read.
        """
        self.received += len(body)
        if self.received <= MAX_BODY:
            self._chunks.append(body)
        else:
            self._chunks.clear()

    def on_message_complete(self) -> None:
        """
        The request is there as a whole.
        """
        request, self._reading = self._reading, None
        assert request is not None
        if self.received:
            request.body = b"".join(self._chunks)
            request.is_too_long = self.received > MAX_BODY
            self._chunks.clear()
        self._headers.clear()  # of trailers
        self._is_expected = False
        self.size = self.received = 0
        if self.wrong is None:
            self.requests.append(request)
