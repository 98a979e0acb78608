"""
What a refused client gets.

A refusal is given to `Limiter` as ``refusal``: one of those below, by its object or as text by its name, an
`connlimit.interfaces.IRefusal` of your own, or any protocol factory. What a refused client is told must end
with the connection; one that does not end within `LINGER` seconds is aborted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import attrs
from twisted.internet.interfaces import IAddress, IProtocol, IProtocolFactory
from twisted.internet.protocol import Protocol
from zope.interface import implementer

from connlimit._system.sockets import abort, can_half_close
from connlimit.interfaces import DESCRIPTORS, DRAINING, FULL, PEER, TIMEOUT, IRefusal

#: Seconds after which a refused connection that is not over is aborted.
LINGER = 5.0

#: What each reason is called in the sentences of the presets.
WORDS: Mapping[str, str] = {
    FULL: "Too many connections, try again later",
    TIMEOUT: "Too busy, try again later",
    PEER: "Too many connections from your address",
    DESCRIPTORS: "Too many connections, try again later",
    DRAINING: "Shutting down, try again later",
}


@implementer(IRefusal)
class _Close:
    """
    Close the connection without a word.
    """

    def __repr__(self) -> str:
        return "close"

    def build_protocol(self, address: IAddress, reason: str, retry_after: float) -> IProtocol | None:
        return None


@implementer(IRefusal)
class _Reset:
    """
    Reset the connection: the client's next call fails at once, and nothing of it is left in the kernel.
    """

    def __repr__(self) -> str:
        return "reset"

    def build_protocol(self, address: IAddress, reason: str, retry_after: float) -> IProtocol | None:
        return _Resetting()


class _Resetting(Protocol):
    """
    Resets its connection, over TCP by a RST.
    """

    transport: Any

    def connectionMade(self) -> None:
        abort(self.transport)


class Speaking(Protocol):
    """
    Says what *answer* returns, and closes its direction; what the client still sends is read and dropped.

    Closed while something is unread, the connection would be reset, and the sentence be lost to a client
    that is still sending (RFC 9112, 9.6). So it ends when the client does, or is aborted.

    :ivar answer: what to say, for what was received so far; None to hear more first.
    """

    #: More than any opening that an answer depends on.
    MAX = 16384

    transport: Any

    def __init__(self, answer: Callable[[bytes], bytes | None]) -> None:
        self.answer: Callable[[bytes], bytes | None] | None = answer
        self.received = b""

    def connectionMade(self) -> None:
        self._speak()

    def dataReceived(self, data: bytes) -> None:
        if self.answer is not None and len(self.received) < self.MAX:
            self.received += data
            self._speak()

    def _speak(self) -> None:
        assert self.answer is not None
        sentence = self.answer(self.received)
        if sentence is None:
            return
        self.answer = None
        self.received = b""
        self.transport.write(sentence)
        if can_half_close(self.transport):
            self.transport.loseWriteConnection()
        else:  # TLS says goodbye, and waits for the client's
            self.transport.loseConnection()


class _SpeakingPostgreSQL(Speaking):
    """
    Says no to encryption, of each kind once, and answers what the client sends then.
    """

    #: SSLRequest and GSSENCRequest (PostgreSQL, "Message Formats").
    ASKS = tuple((8).to_bytes(4, "big") + code.to_bytes(4, "big") for code in (80877103, 80877104))

    def __init__(self, answer: Callable[[bytes], bytes | None]) -> None:
        super().__init__(answer)
        self._asks = set(self.ASKS)

    def _speak(self) -> None:
        while (ask := self.received[:8]) in self._asks:
            self._asks.remove(ask)
            self.received = self.received[8:]
            self.transport.write(b"N")
        super()._speak()


@implementer(IRefusal)
@attrs.frozen
class Say:
    """
    Say a sentence, and close.

    :ivar sentence: what is said, whatever the reason.
    """

    sentence: bytes

    def build_protocol(self, address: IAddress, reason: str, retry_after: float) -> IProtocol | None:
        return Speaking(lambda received: self.sentence)


@implementer(IRefusal)
@attrs.frozen
class Preset:
    """
    A refusal in a protocol's own words.

    :ivar name: what the refusal is called.
    :ivar answer: makes the answer of the reason's words, the seconds after which to try again, and what was
        received so far; None to hear more first.
    """

    name: str
    answer: Callable[[str, int, bytes], bytes | None]
    protocol: type[Speaking] = Speaking

    def __repr__(self) -> str:
        return self.name

    def build_protocol(self, address: IAddress, reason: str, retry_after: float) -> IProtocol | None:
        words, seconds = WORDS[reason], math.ceil(retry_after)
        return self.protocol(lambda received: self.answer(words, seconds, received))


@implementer(IRefusal)
@attrs.frozen
class FromFactory:
    """
    Whatever a factory's protocols say.
    """

    factory: IProtocolFactory

    def build_protocol(self, address: IAddress, reason: str, retry_after: float) -> IProtocol | None:
        return self.factory.buildProtocol(address)


def _http(words: str, retry_after: int, received: bytes) -> bytes | None:
    # An answer before the request is taken for one to the request before, or for noise.
    if _HTTP2.startswith(received):
        return None
    if received.startswith(_HTTP2):
        return _http2(retry_after)
    body = f"{words}.\n".encode()
    return b"\r\n".join(
        [
            b"HTTP/1.1 503 Service Unavailable",
            b"Content-Type: text/plain",
            b"Content-Length: %d" % len(body),
            b"Retry-After: %d" % retry_after,
            b"Connection: close",
            b"",
            body,
        ]
    )


_HTTP2 = b"PRI * HTTP/2."


def _http2(retry_after: int) -> bytes:
    """
    The same in HTTP/2 (RFC 9113), to the first request: settings, headers that end the stream, and goodbye.
    """

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    def literal(index: bytes, value: bytes) -> bytes:  # RFC 7541, 6.2.2: not indexed, with an indexed name
        return index + bytes([len(value)]) + value

    seconds = str(retry_after).encode()
    headers = literal(b"\x08", b"503") + literal(b"\x0f\x26", seconds)  # :status and retry-after
    goodbye = (1).to_bytes(4, "big") + bytes(4)  # the last stream that was answered, no error
    return frame(4, 0, 0, b"") + frame(4, 1, 0, b"") + frame(1, 5, 1, headers) + frame(7, 0, 0, goodbye)


def _line(start: str) -> Callable[[str, int, bytes], bytes]:
    return lambda words, retry_after, received: f"{start} {words}\r\n".encode()


def _mysql(words: str, retry_after: int, received: bytes) -> bytes:
    # An error packet before the handshake has no SQL state (MySQL, "Connection Phase", ERR_Packet).
    payload = b"\xff" + (1040).to_bytes(2, "little") + words.encode()
    return len(payload).to_bytes(3, "little") + b"\0" + payload


def _postgresql(words: str, retry_after: int, received: bytes) -> bytes | None:
    if len(received) < 8:  # as long as every opening is
        return None
    fields = {"S": "FATAL", "V": "FATAL", "C": "53300", "M": words}
    payload = b"".join(f"{key}{value}\0".encode() for key, value in fields.items()) + b"\0"
    return b"E" + (len(payload) + 4).to_bytes(4, "big") + payload


close = _Close()
reset = _Reset()
HTTP = Preset("http", _http)
SMTP = Preset("smtp", _line("421 4.3.2"))
FTP = Preset("ftp", _line("421"))
POP3 = Preset("pop3", _line("-ERR [SYS/TEMP]"))
IMAP = Preset("imap", _line("* BYE"))
IRC = Preset("irc", lambda words, retry_after, received: f"ERROR :{words}\r\n".encode())
NNTP = Preset("nntp", _line("400"))
REDIS = Preset("redis", _line("-ERR"))
MYSQL = Preset("mysql", _mysql)
POSTGRESQL = Preset("postgresql", _postgresql, _SpeakingPostgreSQL)
SSH = Preset("ssh", lambda words, retry_after, received: f"{words}\r\n".encode())

#: The refusals that have names.
NAMED: Mapping[str, Any] = {
    repr(each): each
    for each in (close, reset, HTTP, SMTP, FTP, POP3, IMAP, IRC, NNTP, REDIS, MYSQL, POSTGRESQL, SSH)
}


def refusal_of(value: Any) -> Any:
    """
    The refusal that a setting asks for.

    :raises TypeError: if it is none.
    :raises ValueError: if no refusal is called so.
    """
    if isinstance(value, str):
        if value.startswith("say ") and value[4:]:
            return Say(unescaped(value[4:]))
        if value not in NAMED:
            raise ValueError
        return NAMED[value]
    if IRefusal.providedBy(value):
        return value
    if IProtocolFactory.providedBy(value):
        return FromFactory(value)
    raise TypeError


def unescaped(text: str) -> bytes:
    r"""
    The bytes that a text stands for in which ``\r``, ``\n``, ``\t``, ``\0``, ``\xNN`` and ``\\`` can be used.
    """

    def character(match: re.Match[bytes]) -> bytes:
        escape = match[1]
        return bytes.fromhex(escape[1:].decode()) if escape[:1] == b"x" else _ESCAPES[escape]

    return re.sub(rb"\\(x[0-9a-fA-F]{2}|[rnt0\\])", character, text.encode())


_ESCAPES = {b"r": b"\r", b"n": b"\n", b"t": b"\t", b"0": b"\0", b"\\": b"\\"}
