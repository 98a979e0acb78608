"""
Connections to a Redis: one for questions, made when it is needed, and one that hears what is published.

What txredisapi understands of the protocol is used here, not its pools. These stop for good when a
password is refused, do not look at certificates, and keep whatever comes, however much it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import txredisapi  # type: ignore[import-untyped]
from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.tcp import Connection
from twisted.python.failure import Failure

from connlimit._system.clock import clock_of

#: How many bytes an answer can have, unless more are expected.
LONGEST = 1 << 20


class Careful:
    """
    What both kinds of connection have in common: what is no Redis, or says too much, is cut off.
    """

    #: How many bytes an answer can have.
    longest = LONGEST

    _received = 0
    _why: Exception | None = None

    def connectionMade(self) -> None:
        """
        Do nothing: `connect` sees to the password and the database.
        """

    def dataReceived(self, data: bytes, unpause: bool = False) -> None:
        """
        Read what comes, as long as it is an answer or a notification.
        """
        if not unpause:
            self._received += len(data)
        try:
            super().dataReceived(data, unpause)  # type: ignore[misc]
        except Exception:
            self._cut("what it sends is not a Redis's")
        if self._received > self.longest:
            self._cut("its answer is too long")

    def replyReceived(self, reply: Any) -> None:
        """
        Hand on an answer.
        """
        self._received = 0
        super().replyReceived(reply)  # type: ignore[misc]
        if self.replyQueue.pending:  # type: ignore[attr-defined]
            self.replyQueue.pending.clear()  # type: ignore[attr-defined]
            self._cut("it answers without being asked")

    def _cut(self, why: str) -> None:
        self._why = self._why or txredisapi.InvalidResponse(why)
        self.transport.abortConnection()  # type: ignore[attr-defined]

    def connectionLost(self, reason: Failure) -> None:
        """
        Tell those who wait for an answer why there is none.
        """
        waiting = self.replyQueue.waiting  # type: ignore[attr-defined]
        while waiting:
            self.replyQueue.put(self._why or reason.value)  # type: ignore[attr-defined]
        super().connectionLost(reason)  # type: ignore[misc]


class Script:
    """
    A script of Redis's, with its keys: what is the same each time that it is run.
    """

    def __init__(self, text: str, keys: Sequence[str]) -> None:
        # There can be thousands with the same text, which is of use once for each time that Redis is started.
        self._text = text
        self._same = [b"%d" % len(keys), *(key.encode() for key in keys)]
        self._words = 2 + len(self._same)
        self._in_short = _words([b"EVALSHA", _digest(text), *self._same])

    def command(self, arguments: Sequence[str], *, in_full: bool = False) -> bytes:
        """
        What Redis is sent to run it.

        :param in_full: whether it is sent itself, and not only its name, by which Redis knows it afterwards.
        """
        start = _words([b"EVAL", self._text.encode(), *self._same]) if in_full else self._in_short
        return b"*%d\r\n%b%b" % (self._words + len(arguments), start, _words(map(str.encode, arguments)))


@lru_cache(16)
def _digest(text: str) -> bytes:
    """
    The name by which Redis knows a script.
    """
    return hashlib.sha1(text.encode()).hexdigest().encode()


def _words(words: Iterable[bytes]) -> bytes:
    return b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])


class Asking(Careful, txredisapi.RedisProtocol):
    """
    A connection for questions.
    """

    def run(self, script: Script, arguments: Sequence[str]) -> Deferred[Any]:
        """
        What a script returns.
        """
        answer = self._ask(script.command(arguments))
        return answer.addCallback(self._look_whether_known, script, arguments)

    def _look_whether_known(self, answer: Any, script: Script, arguments: Sequence[str]) -> Any:
        if not isinstance(answer, Exception):
            return answer
        if isinstance(answer, txredisapi.ResponseError) and str(answer).startswith("NOSCRIPT"):
            return self._ask(script.command(arguments, in_full=True)).addCallback(self.handle_reply)
        raise answer

    def _ask(self, command: bytes) -> Deferred[Any]:
        if self.replyQueue.waiting or not isinstance(self.transport, Connection) or self.transport.TLS:
            self.transport.write(command)
        else:
            # All that was sent before has its answer. This spares the reactor three calls of the system.
            sent = self.transport.writeSomeData(command)
            if sent != len(command):
                self.transport.write(command[sent:] if isinstance(sent, int) else command)
        answer: Deferred[Any] = self.replyQueue.get()
        return answer


class Hearing(Careful, txredisapi.SubscriberProtocol):
    """
    A connection that hears what is published.

    :ivar heard: is called with each notification.
    """

    heard: Callable[[str], None]

    def messageReceived(self, pattern: object, channel: object, message: object) -> None:
        """
        A notification has come.
        """
        self._received = 0
        self.heard(str(message))


async def connect(
    endpoint: IStreamClientEndpoint,
    protocol: Callable[[], Any] = Asking,
    *,
    username: str | None = None,
    password: str | None = None,
    database: int | None = None,
) -> Any:
    """
    A new connection to the Redis at an endpoint.

    :param protocol: `Asking` or `Hearing`.
    :param database: the number of the database; None for something that has none.
    :raises Exception: if it cannot be reached, or refuses the password or the database.
    """
    factory = Factory.forProtocol(protocol)
    factory.noisy = False
    connection: Any = await endpoint.connect(factory)
    await greet(connection, username, password, database)
    return connection


async def greet(connection: Any, username: str | None, password: str | None, database: int | None) -> None:
    """
    Say who we are on a new connection, and which database is meant.

    :raises Exception: if the password or the database is refused; then the connection is ended.
    """
    try:
        if password is not None:
            await connection.execute_command("AUTH", *(each for each in (username, password) if each))
        if database is not None:
            await connection.execute_command("SELECT", database)
    except BaseException:
        connection.transport.abortConnection()
        raise


class Redis:
    """
    A Redis that is asked, and heard, over connections that are made again after each failure.
    """

    def __init__(
        self, address: Any, reactor: Any, channel: str, heard: Callable[[str], None], longest: int = LONGEST
    ) -> None:
        """
        :param address: a `RedisAddress`.
        :param channel: the name of the channel to hear.
        :param heard: is called with each notification on it, and with an empty one if some may have been
            missed.
        :param longest: how many bytes an answer can have.
        :raises ValueError: if it cannot be connected to as the address says.
        """
        self._longest = longest
        self._connect = address.connector(reactor)
        self._reactor = reactor
        self._channel = channel
        self._heard = heard
        self._lock = DeferredLock()
        self._asking: Any = None
        self._hearing: Any = None
        self._subscribing: Deferred[None] | None = None

    def run(self, script: Script, arguments: Sequence[str]) -> Deferred[Any]:
        """
        What a script returns. Questions are answered in the order in which they are asked.

        A failure, such as an answer that is an error, or cancellation ends both connections; the next
        question begins again.
        """
        if self._asking is not None and self._asking.connected and not self._lock.locked:
            answer: Deferred[Any] = self._asking.run(script, arguments)
        else:
            answer = Deferred.fromCoroutine(self._connect_and_run(script, arguments))
        return answer.addErrback(self._failed)

    async def _connect_and_run(self, script: Script, arguments: Sequence[str]) -> Any:
        await self._lock.acquire()
        try:
            if self._asking is None or not self._asking.connected:
                self._asking = await self._connect(Asking)
                self._asking.longest = self._longest
            answer = self._asking.run(script, arguments)
        finally:
            self._lock.release()
        return await answer

    def _failed(self, failure: Failure) -> Failure:
        self.hang_up()
        return failure

    def listen(self, timeout: float) -> None:
        """
        Hear the channel from now on, if that is not so already.
        """
        if self._subscribing is None and (self._hearing is None or not self._hearing.connected):
            self._subscribing = Deferred.fromCoroutine(self._subscribe()).addTimeout(
                timeout, clock_of(self._reactor)
            )
            self._subscribing.addBoth(self._subscribed)

    async def _subscribe(self) -> None:
        self._hearing = None
        self._hearing = await self._connect(Hearing)
        self._hearing.heard = self._heard
        await self._hearing.subscribe(self._channel)
        self._heard("")

    def _subscribed(self, result: object) -> None:
        # A failure is only a delay: those who lack something ask again and again.
        self._subscribing = None
        if isinstance(result, Failure) and self._hearing is not None:
            self._hearing.transport.abortConnection()

    def hang_up(self) -> None:
        """
        End the connections, at once.
        """
        if self._subscribing is not None:
            self._subscribing.cancel()
        for connection in (self._asking, self._hearing):
            if connection is not None:
                connection.transport.abortConnection()
        self._asking = self._hearing = None


def describe(error: BaseException) -> str:
    """
    What went wrong, in some words and one line.
    """
    words: Any = error.args[0] if error.args else ""
    if type(error).__module__.startswith("OpenSSL") and isinstance(words, list):
        text = ", ".join(each[-1] for each in words)
    elif type(error).__name__ == "VerificationError":
        text = "its certificate is for another host"
    else:
        text = " ".join(str(error).split())
        if text.startswith(("MOVED ", "ASK ", "CROSSSLOT")):
            text = f"it is one of a Redis Cluster, and another node has what is asked for ({text})"
    return text[:200] or type(error).__name__
