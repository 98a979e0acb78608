"""
A client of semaphores for Twisted (``connlimit[semaphores]``), which never blocks and never starts a thread.

It speaks the protocol of Throttle, to connlimit's own server or to the original one.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from twisted.internet.defer import Deferred, ensureDeferred

from connlimit.semaphores.http import SemaphoreError, Unreachable
from connlimit.semaphores.peer import Lock, Peer
from connlimit.semaphores.session import Session


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
        :param expires_in: seconds after which the server forgets a peer that it does not hear from.
        :param headers: what else is sent with each request, such as a token for a proxy before the server.
        :raises ValueError: for a wrong value.
        """
        if reactor is None:
            from twisted.internet import reactor
        self._session = Session(url, expires_in, headers, reactor)

    @property
    def url(self) -> str:
        """
        Where the server is, without the credentials.
        """
        return self._session.url

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
        return Peer(self._session)

    def remainder(self, name: str) -> Deferred[int]:
        """
        How much of a semaphore nobody holds now.

        :return: fails with `SemaphoreError` if there is no such semaphore, or if the server does not answer.
        """
        return ensureDeferred(self._remainder(name))

    async def _remainder(self, name: str) -> int:
        try:
            return await self._session.number("GET", f"/remainder?semaphore={quote(name, safe='')}")
        except Unreachable as error:
            raise SemaphoreError(503, str(error)) from None

    def close(self) -> Deferred[None]:
        """
        Tell the server what is still to be told, if that is soon done, and close all connections.
        """
        return ensureDeferred(self._session.close())
