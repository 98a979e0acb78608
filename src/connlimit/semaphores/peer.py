"""
Who holds locks, and keeps them: what a peer tells its server, and when.

A lock belongs to a peer, which the server forgets, with its locks, unless it hears from it in time. So as
long as a peer holds nothing and only asks, that time is short, and what was asked for dies soon after the
process; once it holds something it sends heartbeats. It keeps the time itself as well, from the sending of
each request on: what the server may have given to others is lost, whatever it answers later. If the server
has forgotten a peer all the same, it is told again what that holds.
"""

from __future__ import annotations

import math
import random
from types import TracebackType
from typing import Any
from urllib.parse import quote

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from connlimit._system.durations import is_seconds
from connlimit._system.since_boot import since_boot
from connlimit.semaphores.http import PATIENCE, SemaphoreError, UnknownPeer, Unreachable
from connlimit.semaphores.session import FIRST_RETRY, LAST_RETRY, Session

#: Seconds for which a request for a lock lets the server wait.
_BLOCK_FOR = 2.0

#: Seconds after which the server forgets a peer that holds nothing yet.
_ASKING_EXPIRES_IN = 5.0

_log = Logger(namespace="connlimit.semaphores")


class Peer:
    """
    Holds locks: several at once, if each has a lower level than those before.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
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
        return Lock(self, name, count, timeout)

    @property
    def has_expired(self) -> bool:
        """
        Whether the server may have forgotten this peer and have given what it holds to others.
        """
        return since_boot() >= self._known_until

    async def acquire(self, lock: Lock, timeout: float | None) -> None:
        name = lock.name
        if name in self._held:
            raise SemaphoreError(409, f"this peer holds {name} already")
        ends = math.inf if timeout is None else since_boot() + timeout
        wait = FIRST_RETRY
        self._acquiring += 1
        try:
            while not await self._ask(lock, max(0.0, min(_BLOCK_FOR, ends - since_boot()))):
                if since_boot() >= ends:
                    raise TimeoutError(f"{name}: no lock within {timeout:g} s")
                if self._is_unreachable:
                    await self._session.retry(max(0.0, min(wait, ends - since_boot())))
                    wait = min(2 * wait, LAST_RETRY)
                else:
                    wait = FIRST_RETRY
        except BaseException as error:
            self._acquiring -= 1
            self._session.behind(self._forget(name, isinstance(error, SemaphoreError)))
            raise
        self._acquiring -= 1

    async def _ask(self, lock: Lock, block_for: float) -> bool:
        """
        Ask for a lock once, for which the server may wait.

        :return: whether it is held now.
        """
        session = self._session
        self._is_unreachable = False
        try:
            await self._be_known()
            expires_in = session.expires_in
            if not self._held:
                expires_in = min(expires_in, _ASKING_EXPIRES_IN)
                block_for = min(block_for, expires_in / 2)
            path = f"{self._path(lock.name)}?expires_in={_text(expires_in)}&block_for={_text(block_for)}"
            asked = since_boot()
            status, _ = await session.request("PUT", path, lock.count, block_for + PATIENCE)
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
        Have the server know this peer. It is made once, and goes on being made if one who asked gives up.
        """
        if self._id is not None:
            return
        known: Deferred[None] = Deferred()
        if self._expecting is None:
            self._expecting = [known]
            self._session.behind(self._become_known())
        else:
            self._expecting.append(known)
        await known

    async def _become_known(self) -> None:
        session = self._session
        body = {"expires_in": _text(min(session.expires_in, _ASKING_EXPIRES_IN))}
        try:
            self._id = await session.number("POST", "/new_peer", body)
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
        The server has heard from this peer.
        """
        self._known_until = until
        left = until - since_boot()
        self._stop_timers()
        if self._held:
            self._beat_timer = self._session.later(left / 3, self._beat_soon)
            self._expiry_timer = self._session.later(left, self._expire)

    def _stop_timers(self) -> None:
        for timer in (self._beat_timer, self._expiry_timer):
            if timer is not None and timer.active():
                timer.cancel()
        self._beat_timer = self._expiry_timer = None

    def _expire(self) -> None:
        """
        The server has not been heard from for so long that what is held may be somebody else's.
        """
        self._expiry_timer = None
        if self.has_expired:
            self._lose("the server was not reached in time")
        else:
            self._expiry_timer = self._session.later(self._known_until - since_boot(), self._expire)

    def _lose(self, why: str) -> None:
        lost = [lock for lock in self._held.values() if not lock._is_lost]
        for lock in lost:
            lock._is_lost = True
        if lost:
            _log.warn(
                "{locks} at {url} may be held by others now: {why}",
                locks=", ".join(lock.name for lock in lost),
                url=self._session.url,
                why=why,
            )

    async def release(self, name: str) -> None:
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
        await self._session.retry(FIRST_RETRY * 10)
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
            await self._session.delete(self._path(name))

    async def _leave(self) -> None:
        """
        Have the server forget this peer, unless that is still being made: then it leaves as soon as it is.
        """
        if self._id is not None:
            path, self._id = f"/peers/{self._id}", None
            self._stop_timers()
            await self._session.delete(path)

    def _beat_soon(self) -> None:
        self._beat_timer = None
        self._session.behind(self._beat())

    async def _beat(self) -> None:
        """
        Tell the server that this peer is still there.
        """
        peer, asked, expires_in = self._id, since_boot(), self._session.expires_in
        try:
            body = {"expires_in": _text(expires_in)}
            patience = min(PATIENCE, max(expires_in / 3, 1.0))
            await self._session.request("PUT", f"/peers/{peer}", body, patience)
        except UnknownPeer:
            if self._id == peer:
                if self.has_expired:
                    self._lose("the server has forgotten them")
                await self._restore()
        except (Unreachable, SemaphoreError):
            if self._id == peer and self._held and self._beat_timer is None:
                seconds = min(expires_in / 6, LAST_RETRY) * random.uniform(0.5, 1)
                self._beat_timer = self._session.later(seconds, self._beat_soon)
        else:
            # It has known the peer all the time, however late it was told.
            if self._id == peer and since_boot() < asked + expires_in:
                self._will_be_known(asked + expires_in)

    async def _restore(self) -> None:
        """
        Tell a server that has forgotten this peer what it holds.
        """
        peer, asked, expires_in = self._id, since_boot(), self._session.expires_in
        if peer is None:
            return
        body = {
            "expires_in": _text(expires_in if self._held else min(expires_in, _ASKING_EXPIRES_IN)),
            "peer_id": peer,
            "acquired": {name: lock.count for name, lock in self._held.items()},
        }
        try:
            await self._session.request("POST", "/restore", body)
        except Unreachable:
            # Who needs the peer finds that it is unknown once more.
            if self._id == peer and self._held and self._beat_timer is None:
                self._beat_timer = self._session.later(FIRST_RETRY * 5, self._beat_soon)
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
        if timeout is not None and not is_seconds(timeout):
            raise ValueError(f"timeout must be a number of seconds, 0 or more, or None, not {timeout!r}")
        self.name = name
        self.count = count
        self._peer = peer
        self._timeout = timeout
        self._is_lost = False

    @property
    def lost(self) -> bool:
        """
        Whether it was held and others may have got it since: the server has not heard from this process for
        as long as ``expires_in``, or has forgotten the lock. A warning in the log says so, too.
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
