"""
What all peers of one client share: the server that is asked, and what is done in the background.
"""

from __future__ import annotations

import random
from collections.abc import Coroutine, Mapping
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, DeferredList, ensureDeferred
from twisted.internet.defer import TimeoutError as TimedOut
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.task import deferLater
from twisted.logger import Logger

from connlimit._system.durations import is_seconds
from connlimit._system.since_boot import since_boot
from connlimit.semaphores.http import Requests, SemaphoreError, UnknownPeer, Unreachable

#: Seconds until the server is tried again, at first and at most.
FIRST_RETRY, LAST_RETRY = 0.1, 5.0

#: Seconds in which the server can still be told something at the end.
_LAST_WORDS = 2.0

_log = Logger(namespace="connlimit.semaphores")


class Session:
    """
    Asks one server for all peers of a client.

    :ivar request: asks it once; see `Requests.ask`.
    :ivar expires_in: seconds after which the server forgets a peer that it does not hear from.
    """

    def __init__(self, url: str, expires_in: float, headers: Mapping[str, str], reactor: Any) -> None:
        """
        :raises ValueError: for a wrong value.
        """
        if not is_seconds(expires_in, 0.1):
            raise ValueError(f"expires_in must be a number of seconds, 0.1 or more, not {expires_in!r}")
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

    async def delete(self, path: str) -> None:
        """
        Have the server delete something. If it cannot be told now, that is done behind.
        """
        if not await self._delete_once(path):
            self.behind(self._delete_later(path, since_boot() + self.expires_in))

    async def _delete_later(self, path: str, ends: float) -> None:
        seconds = FIRST_RETRY
        while since_boot() < ends:
            await self.retry(seconds)
            if await self._delete_once(path):
                return
            seconds = min(seconds * 2, LAST_RETRY)

    async def _delete_once(self, path: str) -> bool:
        try:
            await self.request("DELETE", path)
        except Unreachable:
            return False
        except (UnknownPeer, SemaphoreError) as error:
            _log.debug("{path} could not be deleted: {error}", path=path, error=error)
        return True

    async def close(self) -> None:
        """
        Tell the server what is still to be told, if that is soon done, and close all connections.
        """
        told = DeferredList(list(self._behind))
        await told.addTimeout(_LAST_WORDS, self._reactor).addErrback(lambda failure: failure.trap(TimedOut))
        for each in list(self._behind):
            each.cancel()
        await self._requests.close()

    async def retry(self, seconds: float) -> None:
        """
        Wait before the server is tried again: at most this number of seconds, and not all clients the same.
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
                _log.failure("a request to the semaphores at {url} failed", result, url=self.url)

        return done.addBoth(over)

    def later(self, seconds: float, call: Any) -> IDelayedCall:
        """
        Have something called in this number of seconds.
        """
        timer: IDelayedCall = self._reactor.callLater(max(0.0, seconds), call)
        return timer
