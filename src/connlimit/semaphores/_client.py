"""
A client of semaphores for Twisted (``connlimit[semaphores]``), which never blocks and never starts a thread.

It speaks the protocol of Throttle, to connlimit's own server or to the original one. A lock belongs to a
peer, which the server forgets, with its locks, unless it hears of it in time: the client sends heartbeats at
a third of that time, and if the server has forgotten it all the same, it says again what it holds.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Coroutine
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

import attrs
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.defer import CancelledError, Deferred, DeferredList, ensureDeferred
from twisted.internet.defer import TimeoutError as TimedOut
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP6ClientEndpoint
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from twisted.web.client import URI, Agent, HTTPConnectionPool
from twisted.web.iweb import IAgentEndpointFactory
from zope.interface import implementer

#: Seconds for which a request for a lock lets the server wait.
_BLOCK_FOR = 5.0

#: Seconds in which the server must answer, besides.
_PATIENCE = 10.0

#: Seconds in which the server can still be told something at the end.
_LAST_WORDS = 2.0

#: Seconds until the server is tried again, at first and at most.
_FIRST_RETRY, _LAST_RETRY = 0.1, 5.0

_log = Logger()


class SemaphoreError(Exception):
    """
    The server refuses a request, and would refuse it again.

    :ivar status: the HTTP status.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _UnknownPeer(Exception):
    """
    The server has forgotten the peer, or everything.
    """


class _Unreachable(Exception):
    """
    The server does not answer, or not now.
    """


class Semaphores:
    """
    The semaphores of a server.

    .. code-block:: python

       semaphores = Semaphores("http://localhost:8000")
       async with semaphores.lock("database", count=2, timeout=5):
           ...

    Each lock has a peer of its own, so that locks in different parts of a program have nothing to do with
    each other. Who needs several at once takes them from one `peer`; the server then sees to it that nobody
    waits in a circle.
    """

    def __init__(self, url: str, *, expires_in: float = 300.0, reactor: Any = None) -> None:
        """
        :param url: that of the server, such as ``http://localhost:8000``.
        :param expires_in: seconds after which the server forgets a peer that it does not hear of.
        :raises ValueError: for a wrong value.
        """
        parts = urlsplit(url) if isinstance(url, str) else None
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"url must name a server of semaphores, such as http://localhost:8000, not {url!r}"
            )
        if isinstance(expires_in, bool) or not isinstance(expires_in, (int, float)) or not expires_in >= 0.1:
            raise ValueError(f"expires_in must be a number of seconds, 0.1 or more, not {expires_in!r}")
        try:
            import treq
        except ImportError:
            raise ImportError("semaphores need treq: pip install 'connlimit[semaphores]'") from None
        if reactor is None:
            from twisted.internet import reactor
        self._treq = treq
        self._url = url.rstrip("/")
        self._reactor = reactor
        self._pool = HTTPConnectionPool(reactor)
        self._pool.maxPersistentPerHost = 8
        if parts.scheme == "http" and (isIPAddress(parts.hostname) or isIPv6Address(parts.hostname)):
            self._agent = Agent.usingEndpointFactory(reactor, _Numeric(reactor), self._pool)
        else:
            self._agent = Agent(reactor, connectTimeout=_PATIENCE, pool=self._pool)
        self._is_away = False
        self._behind: set[Deferred[Any]] = set()
        self.expires_in = float(expires_in)

    def lock(self, name: str, count: int = 1, timeout: float | None = None) -> Lock:
        """
        A lock of one semaphore, which is not acquired yet.

        :param name: the semaphore's name.
        :param count: how much of it.
        :param timeout: seconds that it may take to acquire it; None for as long as it takes.
        """
        return self.peer().lock(name, count, timeout)

    def peer(self) -> Peer:
        """
        Who takes several locks at once, one after the other, each of a lower level than those before.
        """
        return Peer(self)

    def remainder(self, name: str) -> Deferred[int]:
        """
        How much of a semaphore nobody holds now.

        :return: fails with `SemaphoreError` if there is no such semaphore, or if the server does not answer.
        """
        return ensureDeferred(self._remainder(name))

    async def _remainder(self, name: str) -> int:
        try:
            _, text = await self.request("GET", f"/remainder?semaphore={quote(name, safe='')}")
        except _Unreachable as error:
            raise SemaphoreError(503, str(error)) from None
        return int(text)

    def close(self) -> Deferred[None]:
        """
        Tell the server what is still to be told, if that is soon done, and close all connections.
        """
        return ensureDeferred(self._close())

    async def _close(self) -> None:
        told = DeferredList(list(self._behind))
        await told.addTimeout(_LAST_WORDS, self._reactor).addErrback(lambda failure: failure.trap(TimedOut))
        for each in list(self._behind):
            each.cancel()
        await self._pool.closeCachedConnections()

    async def request(
        self, method: str, path: str, body: object = None, seconds: float = 0.0
    ) -> tuple[int, str]:
        """
        Ask the server once.

        :param seconds: how long it may take beyond what any request may take.
        :return: the status and the body of a good answer.
        """
        asked = ensureDeferred(self._ask(method, path, {} if body is None else {"json": body}))
        try:
            status, text = await _cancellable(asked.addTimeout(seconds + _PATIENCE, self._reactor))
        except CancelledError:
            raise
        except Exception as error:  # there are many types of it, and some are private
            raise self._away(error) from None
        if status >= 500 and status != 501:
            raise self._away(SemaphoreError(status, text))
        if self._is_away:
            self._is_away = False
            _log.info("semaphores at {url} are back", url=self._url)
        if status >= 400:
            if text == "Unknown peer":
                raise _UnknownPeer()
            raise SemaphoreError(status, text)
        return status, text

    async def _ask(self, method: str, path: str, arguments: dict[str, Any]) -> tuple[int, str]:
        response = await self._treq.request(
            method, self._url + path, agent=self._agent, reactor=self._reactor, **arguments
        )
        return response.code, (await response.content()).decode("utf-8", "replace")

    def _away(self, error: Exception) -> _Unreachable:
        reasons = getattr(error, "reasons", None)
        why = str(reasons[0].value if reasons else error) or type(error).__name__
        if not self._is_away:
            self._is_away = True
            _log.error("semaphores at {url} do not answer: {why}", url=self._url, why=why)
        return _Unreachable(f"semaphores at {self._url} do not answer: {why}")

    async def retry(self, seconds: float) -> None:
        """
        Wait before the server is tried again: at most so many seconds, and not all clients the same.
        """
        await deferLater(self._reactor, random.uniform(0.5, 1) * seconds, lambda: None)

    def behind(self, doing: Coroutine[Any, Any, None]) -> Deferred[None]:
        """
        Do something though nobody may wait for it, until `close`.
        """
        done = ensureDeferred(doing)
        self._behind.add(done)

        def over(result: Any) -> None:
            self._behind.discard(done)
            if result is not None and not result.check(CancelledError):
                _log.failure("semaphores at {url}", result, url=self._url)

        return done.addBoth(over)

    def every(self, seconds: float, call: Any) -> LoopingCall:
        """
        Have something called again and again, for the first time after so many seconds.
        """
        loop = LoopingCall(call)
        loop.clock = self._reactor
        loop.start(seconds, now=False).addErrback(
            lambda failure: _log.failure("semaphores at {url}", failure, url=self._url)
        )
        return loop


class Peer:
    """
    Holds locks: several at once, if each has a lower level than those before.
    """

    def __init__(self, semaphores: Semaphores) -> None:
        self._semaphores = semaphores
        self._held: dict[str, int] = {}
        self._id: int | None = None
        self._acquiring = 0
        self._heartbeat: LoopingCall | None = None

    def lock(self, name: str, count: int = 1, timeout: float | None = None) -> Lock:
        """
        See `Semaphores.lock`.
        """
        return Lock(self, name, count, timeout)

    async def acquire(self, name: str, count: int, timeout: float | None) -> None:
        """
        See `Lock.acquire`.
        """
        if name in self._held:
            raise SemaphoreError(409, f"this peer holds {name} already")
        ends = math.inf if timeout is None else time.monotonic() + timeout
        wait = _FIRST_RETRY
        self._acquiring += 1
        try:
            while True:
                try:
                    if await self._ask(name, count, max(0.0, min(_BLOCK_FOR, ends - time.monotonic()))):
                        break
                    wait = _FIRST_RETRY
                except _UnknownPeer:
                    await self._restore()
                except _Unreachable:
                    await self._semaphores.retry(max(0.0, min(wait, ends - time.monotonic())))
                    wait = min(2 * wait, _LAST_RETRY)
                if time.monotonic() >= ends:
                    raise TimeoutError(f"{name}: no lock within {timeout:g} s")
        except BaseException as error:
            self._acquiring -= 1
            self._semaphores.behind(self._forget(name, isinstance(error, SemaphoreError)))
            raise
        self._acquiring -= 1
        self._held[name] = count

    async def _ask(self, name: str, count: int, block_for: float) -> bool:
        """
        Ask for a lock, which the server may wait for.
        """
        semaphores, expires_in = self._semaphores, _text(self._semaphores.expires_in)
        if self._id is None:
            _, text = await semaphores.request("POST", "/new_peer", {"expires_in": expires_in})
            self._id = int(text)
        if self._heartbeat is None:
            self._heartbeat = semaphores.every(semaphores.expires_in / 3, self._beat)
        path = f"{self._path(name)}?expires_in={expires_in}&block_for={_text(block_for)}"
        status, _ = await semaphores.request("PUT", path, count, block_for)
        return status == 200

    async def release(self, name: str) -> None:
        """
        See `Lock.release`.
        """
        if name not in self._held:
            raise ValueError(f"{name} is not held")
        del self._held[name]
        await self._give_back(name)

    async def _forget(self, name: str, is_rejected: bool) -> None:
        """
        Leave nothing of what was asked for.
        """
        await self._give_back(name, is_rejected)
        if self._id is None or is_rejected:
            return
        # The server may read what was asked for after this, as it comes on another connection.
        await self._semaphores.retry(_FIRST_RETRY * 10)
        if name not in self._held and not self._acquiring:
            await self._give_back(name)

    async def _give_back(self, name: str, is_unknown: bool = False) -> None:
        """
        Tell the server that a lock is neither held nor wanted. If it cannot be told now, that is done behind.

        :param is_unknown: whether the server does not know of the lock.
        """
        if self._id is None:
            return
        path = self._path(name)
        if not self._held and not self._acquiring:
            path = f"/peers/{self._id}"
            self._id = None
            self._stop_heartbeat()
        elif is_unknown:
            return
        ends = time.monotonic() + self._semaphores.expires_in
        if not await self._delete(path):
            self._semaphores.behind(self._keep_deleting(path, ends))

    async def _keep_deleting(self, path: str, ends: float) -> None:
        seconds = _FIRST_RETRY
        while time.monotonic() < ends:
            await self._semaphores.retry(seconds)
            if await self._delete(path):
                return
            seconds = min(seconds * 2, _LAST_RETRY)

    async def _delete(self, path: str) -> bool:
        try:
            await self._semaphores.request("DELETE", path)
        except _Unreachable:
            return False
        except (_UnknownPeer, SemaphoreError) as error:
            _log.debug("{path} could not be deleted: {error}", path=path, error=error)
        return True

    async def _beat(self) -> None:
        peer = self._id
        try:
            body = {"expires_in": _text(self._semaphores.expires_in)}
            await self._semaphores.request("PUT", f"/peers/{peer}", body)
        except _UnknownPeer:
            if self._id == peer:
                await self._restore()
        except (_Unreachable, SemaphoreError):
            pass  # the next one may come through

    async def _restore(self) -> None:
        """
        Tell a server that has forgotten this peer what it holds.
        """
        body = {
            "expires_in": _text(self._semaphores.expires_in),
            "peer_id": self._id,
            "acquired": self._held,
        }
        try:
            await self._semaphores.request("POST", "/restore", body)
        except _Unreachable:
            pass  # who needs the peer finds that it is unknown once more
        except SemaphoreError as error:
            if error.status != 409:  # if it was not restored already
                _log.error("what was held could not be restored: {error}", error=error)

    def _path(self, name: str) -> str:
        return f"/peers/{self._id}/{quote(name, safe='')}"

    def _stop_heartbeat(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None


class Lock:
    """
    A lock of one semaphore: acquired by ``async with``, or by `acquire`.

    :ivar name: the semaphore's name.
    :ivar count: how much of it.
    """

    def __init__(self, peer: Peer, name: str, count: int, timeout: float | None) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count must be a whole number, 1 or more, not {count!r}")
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout must be a number of seconds, 0 or more, or None, not {timeout!r}")
        self.name = name
        self.count = count
        self._peer = peer
        self._timeout = timeout

    def acquire(self) -> Deferred[Lock]:
        """
        Acquire it. Cancelled, it leaves nothing pending.

        :return: fires with this lock; fails with `TimeoutError`, or with `SemaphoreError` if it can't be had.
        """
        acquired = ensureDeferred(self._peer.acquire(self.name, self.count, self._timeout))
        return acquired.addCallback(lambda _: self)

    def release(self) -> Deferred[None]:
        """
        Give it back. If the server does not answer, it is told again until the lock has expired anyway.
        """
        return ensureDeferred(self._peer.release(self.name))

    async def __aenter__(self) -> Lock:
        return await self.acquire()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.release()


@implementer(IAgentEndpointFactory)
@attrs.frozen
class _Numeric:
    """
    Endpoints of servers that are named by their addresses, which Twisted alone would look up, in a thread.
    """

    reactor: Any

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        """
        See `IAgentEndpointFactory.endpointForURI`.
        """
        host = uri.host.decode().strip("[]")
        kind = TCP4ClientEndpoint if isIPAddress(host) else TCP6ClientEndpoint
        return kind(self.reactor, host, uri.port, timeout=_PATIENCE)


def _text(seconds: float) -> str:
    return f"{int(seconds * 1000)}ms"


def _cancellable(inner: Deferred[Any]) -> Deferred[Any]:
    """
    The same, which fails with `CancelledError` and nothing else when it is cancelled.
    """

    def cancel(outer: Deferred[Any]) -> None:
        outer.errback(CancelledError())
        inner.cancel()

    outer: Deferred[Any] = Deferred(cancel)
    inner.addBoth(lambda result: None if outer.called else outer.callback(result))
    return outer
