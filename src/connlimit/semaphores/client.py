"""
A client of semaphores for Twisted (``connlimit[semaphores]``), which never blocks and never starts a thread.

It speaks the protocol of Throttle, to connlimit's own server or to the original one. A lock belongs to a
peer, which the server forgets, with its locks, unless it hears of it in time. So as long as a peer holds
nothing and only asks, that time is short, and what was asked for dies soon after the process; once it
holds something the client sends heartbeats. It keeps the time itself as well, from the sending of each
request on: what the server may have given to others is lost, whatever it answers later. If the server has
forgotten a peer all the same, it is told again what that holds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Coroutine, Mapping
from types import MappingProxyType, TracebackType
from typing import Any
from urllib.parse import quote

from twisted.internet.defer import CancelledError, Deferred, DeferredList, ensureDeferred
from twisted.internet.defer import TimeoutError as TimedOut
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.task import deferLater
from twisted.logger import Logger

from connlimit._system.since_boot import since_boot
from connlimit.semaphores.http import PATIENCE, Requests, SemaphoreError, UnknownPeer, Unreachable

#: Seconds for which a request for a lock lets the server wait.
_BLOCK_FOR = 2.0

#: Seconds after which the server forgets a peer that holds nothing yet.
_ASKING_EXPIRES_IN = 5.0

#: Seconds in which the server can still be told something at the end.
_LAST_WORDS = 2.0

#: Seconds until the server is tried again, at first and at most.
_FIRST_RETRY, _LAST_RETRY = 0.1, 5.0

_log = Logger()


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

    def __init__(
        self,
        url: str,
        *,
        expires_in: float = 300.0,
        headers: Mapping[str, str] = MappingProxyType({}),
        reactor: Any = None,
    ) -> None:
        """
        :param url: that of the server, such as ``http://localhost:8000``; ``user:password@`` before the host
            is sent as Basic authentication, and not logged.
        :param expires_in: seconds after which the server forgets a peer that it does not hear of.
        :param headers: what else is sent with each request, such as a token for a proxy before the server.
        :raises ValueError: for a wrong value.
        """
        is_number = isinstance(expires_in, (int, float)) and not isinstance(expires_in, bool)  # type: ignore[redundant-expr]
        if not is_number or not expires_in >= 0.1:
            raise ValueError(f"expires_in must be a number of seconds, 0.1 or more, not {expires_in!r}")
        if reactor is None:
            from twisted.internet import reactor
        self._reactor = reactor
        self._requests = Requests(url, headers, reactor)
        self.request = self._requests.ask
        self._behind: set[Deferred[Any]] = set()
        self.expires_in = float(expires_in)

    @property
    def url(self) -> str:
        """
        Where the server is, without the credentials.
        """
        return self._requests.url

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
            return await self.number("GET", f"/remainder?semaphore={quote(name, safe='')}")
        except Unreachable as error:
            raise SemaphoreError(503, str(error)) from None

    async def number(self, method: str, path: str, body: object = None) -> int:
        """
        Ask the server for a number.

        :raises Unreachable: also if it answers something else.
        """
        _, text = await self.request(method, path, body)
        try:
            return int(text)
        except ValueError as error:
            raise self._requests.away(error) from None

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
        await self._requests.close()

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
                _log.failure("semaphores at {url}", result, url=self.url)

        return done.addBoth(over)

    def later(self, seconds: float, call: Any) -> IDelayedCall:
        """
        Have something called in so many seconds.
        """
        timer: IDelayedCall = self._reactor.callLater(max(0.0, seconds), call)
        return timer


class Peer:
    """
    Holds locks: several at once, if each has a lower level than those before.
    """

    def __init__(self, semaphores: Semaphores) -> None:
        self._semaphores = semaphores
        self._held: dict[str, Lock] = {}
        self._id: int | None = None
        self._acquiring = 0
        # Who waits for the peer to be made; None unless it is being made.
        self._expecting: list[Deferred[None]] | None = None
        # By the clock since boot: until when the server has certainly not forgotten the peer.
        self._known_until = math.inf
        self._beat_timer: IDelayedCall | None = None
        self._expiry_timer: IDelayedCall | None = None

    def lock(self, name: str, count: int = 1, timeout: float | None = None) -> Lock:
        """
        See `Semaphores.lock`.
        """
        return Lock(self, name, count, timeout)

    @property
    def has_expired(self) -> bool:
        """
        Whether the server may have forgotten this peer and have given what it holds to others.
        """
        return since_boot() >= self._known_until

    async def acquire(self, lock: Lock, timeout: float | None) -> None:
        """
        See `Lock.acquire`.
        """
        name = lock.name
        if name in self._held:
            raise SemaphoreError(409, f"this peer holds {name} already")
        ends = math.inf if timeout is None else since_boot() + timeout
        wait = _FIRST_RETRY
        self._acquiring += 1
        try:
            while not await self._ask(lock, max(0.0, min(_BLOCK_FOR, ends - since_boot()))):
                if since_boot() >= ends:
                    raise TimeoutError(f"{name}: no lock within {timeout:g} s")
                if self._is_unreachable:
                    await self._semaphores.retry(max(0.0, min(wait, ends - since_boot())))
                    wait = min(2 * wait, _LAST_RETRY)
                else:
                    wait = _FIRST_RETRY
        except BaseException as error:
            self._acquiring -= 1
            self._semaphores.behind(self._forget(name, isinstance(error, SemaphoreError)))
            raise
        self._acquiring -= 1

    async def _ask(self, lock: Lock, block_for: float) -> bool:
        """
        Ask for a lock once, for which the server may wait.

        :return: whether it is held now.
        """
        semaphores = self._semaphores
        self._is_unreachable = False
        try:
            await self._be_known()
            expires_in = semaphores.expires_in
            if not self._held:
                expires_in = min(expires_in, _ASKING_EXPIRES_IN)
                block_for = min(block_for, expires_in / 2)
            path = f"{self._path(lock.name)}?expires_in={_text(expires_in)}&block_for={_text(block_for)}"
            asked = since_boot()
            status, _ = await semaphores.request("PUT", path, lock.count, block_for + PATIENCE)
            known_until = asked + expires_in
            if status != 200 or since_boot() >= known_until:
                return False  # it pends; or it was given to somebody else since
        except UnknownPeer:
            await self._restore()
            return False
        except Unreachable:
            self._is_unreachable = True
            return False
        self._held[lock.name] = lock
        lock._is_lost = False
        self._will_be_known(known_until)
        return True

    async def _be_known(self) -> None:
        """
        Have the server know this peer. It is made once, whoever asks, and goes on being made if one gives up.
        """
        if self._id is not None:
            return
        known: Deferred[None] = Deferred()
        if self._expecting is None:
            self._expecting = [known]
            self._semaphores.behind(self._become_known())
        else:
            self._expecting.append(known)
        await known

    async def _become_known(self) -> None:
        semaphores = self._semaphores
        body = {"expires_in": _text(min(semaphores.expires_in, _ASKING_EXPIRES_IN))}
        try:
            self._id = await semaphores.number("POST", "/new_peer", body)
            result: Any = None
        except Exception as error:
            result = error
        expecting, self._expecting = self._expecting or [], None
        for each in expecting:
            if not each.called:
                each.callback(None) if result is None else each.errback(result)
        if not self._acquiring:
            await self._leave()

    def _will_be_known(self, until: float) -> None:
        """
        The server has heard of this peer.
        """
        self._known_until = until
        left = until - since_boot()
        self._stop_timers()
        if self._held:
            self._beat_timer = self._semaphores.later(left / 3, self._beat_soon)
            self._expiry_timer = self._semaphores.later(left, self._expire)

    def _stop_timers(self) -> None:
        for timer in (self._beat_timer, self._expiry_timer):
            if timer is not None and timer.active():
                timer.cancel()
        self._beat_timer = self._expiry_timer = None

    def _expire(self) -> None:
        """
        The server has not been heard of for so long that what is held may be somebody else's.
        """
        self._expiry_timer = None
        if self.has_expired:
            self._lose("the server was not reached in time")
        else:
            self._expiry_timer = self._semaphores.later(self._known_until - since_boot(), self._expire)

    def _lose(self, why: str) -> None:
        lost = [lock for lock in self._held.values() if not lock._is_lost]
        for lock in lost:
            lock._is_lost = True
        if lost:
            _log.warn(
                "{locks} at {url} may be held by others now: {why}",
                locks=", ".join(lock.name for lock in lost),
                url=self._semaphores.url,
                why=why,
            )

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
        if not self._held and not self._acquiring:
            await self._leave()
        elif self._id is not None and not is_unknown:
            await self._keep_deleting(self._path(name))

    async def _leave(self) -> None:
        """
        Have the server forget this peer, unless that is still being made: then it leaves as soon as it is.
        """
        if self._id is not None:
            path, self._id = f"/peers/{self._id}", None
            self._stop_timers()
            await self._keep_deleting(path)

    async def _keep_deleting(self, path: str) -> None:
        if not await self._delete(path):
            self._semaphores.behind(self._delete_later(path, since_boot() + self._semaphores.expires_in))

    async def _delete_later(self, path: str, ends: float) -> None:
        seconds = _FIRST_RETRY
        while since_boot() < ends:
            await self._semaphores.retry(seconds)
            if await self._delete(path):
                return
            seconds = min(seconds * 2, _LAST_RETRY)

    async def _delete(self, path: str) -> bool:
        try:
            await self._semaphores.request("DELETE", path)
        except Unreachable:
            return False
        except (UnknownPeer, SemaphoreError) as error:
            _log.debug("{path} could not be deleted: {error}", path=path, error=error)
        return True

    def _beat_soon(self) -> None:
        self._beat_timer = None
        self._semaphores.behind(self._beat())

    async def _beat(self) -> None:
        """
        Tell the server that this peer is still there.
        """
        peer, asked, expires_in = self._id, since_boot(), self._semaphores.expires_in
        try:
            body = {"expires_in": _text(expires_in)}
            patience = min(PATIENCE, max(expires_in / 3, 1.0))
            await self._semaphores.request("PUT", f"/peers/{peer}", body, patience)
        except UnknownPeer:
            if self._id == peer:
                if self.has_expired:
                    self._lose("the server has forgotten them")
                await self._restore()
        except (Unreachable, SemaphoreError):
            if self._id == peer and self._held and self._beat_timer is None:
                seconds = min(expires_in / 6, _LAST_RETRY) * random.uniform(0.5, 1)
                self._beat_timer = self._semaphores.later(seconds, self._beat_soon)
        else:
            # It has known the peer all the time, however late it was told.
            if self._id == peer and since_boot() < asked + expires_in:
                self._will_be_known(asked + expires_in)

    async def _restore(self) -> None:
        """
        Tell a server that has forgotten this peer what it holds.
        """
        peer, asked, expires_in = self._id, since_boot(), self._semaphores.expires_in
        if peer is None:
            return
        body = {
            "expires_in": _text(expires_in if self._held else min(expires_in, _ASKING_EXPIRES_IN)),
            "peer_id": peer,
            "acquired": {name: lock.count for name, lock in self._held.items()},
        }
        try:
            await self._semaphores.request("POST", "/restore", body)
        except Unreachable:
            # Who needs the peer finds that it is unknown once more.
            if self._id == peer and self._held and self._beat_timer is None:
                self._beat_timer = self._semaphores.later(_FIRST_RETRY * 5, self._beat_soon)
            return
        except SemaphoreError as error:
            if error.status != 409:  # if it was not restored already
                self._lose(f"they could not be restored: {error}")
        if self._id == peer:
            self._will_be_known(asked + expires_in)

    def _path(self, name: str) -> str:
        return f"/peers/{self._id}/{quote(name, safe='')}"


class Lock:
    """
    A lock of one semaphore: acquired by ``async with``, or by `acquire`.

    :ivar name: the semaphore's name.
    :ivar count: how much of it.
    """

    def __init__(self, peer: Peer, name: str, count: int, timeout: float | None) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:  # type: ignore[redundant-expr]
            raise ValueError(f"count must be a whole number, 1 or more, not {count!r}")
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout must be a number of seconds, 0 or more, or None, not {timeout!r}")
        self.name = name
        self.count = count
        self._peer = peer
        self._timeout = timeout
        self._is_lost = False

    @property
    def lost(self) -> bool:
        """
        Whether it was held and others may have got it since: the server has not heard of this process for as
        long as ``expires_in``, or has forgotten the lock. A warning in the log says so, too.
        """
        return self._is_lost or (self._peer._held.get(self.name) is self and self._peer.has_expired)

    def acquire(self) -> Deferred[Lock]:
        """
        Acquire it. Cancelled, it leaves nothing pending.

        :return: fires with this lock; fails with `TimeoutError`, or with `SemaphoreError` if it can't be had.
        """
        acquired = ensureDeferred(self._peer.acquire(self, self._timeout))
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


def _text(seconds: float) -> str:
    return f"{int(seconds * 1000)}ms"
