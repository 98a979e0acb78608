"""
Requests and answers of HTTP/1.1, and an answer's bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from email.utils import formatdate
from functools import lru_cache
from time import time

import attrs

#: The longest body that is read, in bytes; the rest of a longer one is thrown away as it comes.
MAX_BODY = 64 * 1024

TEXT = "text/plain; charset=utf-8"
HTML = "text/html; charset=utf-8"
JSON = "application/json"

TOO_LONG = f"a body can have {MAX_BODY} bytes at most"

_PHRASES = {
    200: "OK",
    202: "Accepted",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Request Entity Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
}


@attrs.define
class Answer:
    """
    What a request is answered; not to be changed.

    :ivar body: as a whole, or in pieces that are made as the client reads them.
    :ivar headers: besides those that every answer has.
    """

    status: int
    body: bytes | Iterator[bytes]
    kind: str = TEXT
    headers: tuple[tuple[str, str], ...] = ()


@attrs.define(eq=False)
class Request:
    """
    What a client asks for.

    :ivar method: such as ``b"GET"``.
    :ivar target: the path and the query, as they were sent.
    :ivar body: no more of it than `MAX_BODY`.
    :ivar is_too_long: whether something of the body was thrown away.
    :ivar headers: the headers by their names, as they were sent.
    :ivar is_persistent: whether the connection is kept when this is answered.
    :ivar is_old: whether it is one of HTTP/1.0.
    """

    method: bytes
    target: bytes
    headers: Mapping[bytes, bytes]
    is_persistent: bool
    is_old: bool
    body: bytes = b""
    is_too_long: bool = False

    def header(self, name: bytes) -> bytes:
        """
        The value of a header, the last if there are several; nothing if there is none.

        :param name: its name in its usual spelling.
        """
        value = self.headers.get(name)
        if value is None:
            name = name.lower()
            value = next((value for each, value in self.headers.items() if each.lower() == name), b"")
        return value


def chunked(pieces: Iterator[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        if piece:
            yield b"%x\r\n%b\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


def whole(request: Request, answer: Answer, body: bytes) -> bytes:
    """
    An answer of one piece.
    """
    start, end = head(
        int(time()), request.is_old, request.is_persistent, answer.status, answer.kind, answer.headers
    )
    return b"%b%d%b%b" % (start, len(body), end, b"" if request.method == b"HEAD" else body)


@lru_cache(256)
def head(
    now: int,
    is_old: bool,
    is_kept: bool,
    status: int,
    kind: str,
    headers: tuple[tuple[str, str], ...],
    framing: str = "Content-Length: ",
) -> tuple[bytes, bytes]:
    """
    The head of an answer, in two parts: the end of the line of framing goes between them.
    """
    start = [f"HTTP/1.{0 if is_old else 1} {status} {_PHRASES[status]}"]
    if not is_kept and not is_old:
        start.append("Connection: close")
    start += [f"Date: {formatdate(now, usegmt=True)}", f"Content-Type: {kind}", framing]
    end = ["", "Cache-Control: no-store", "X-Content-Type-Options: nosniff"]
    end += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join(start).encode(), "\r\n".join([*end, "", ""]).encode()
