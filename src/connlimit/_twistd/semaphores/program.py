"""
A running server of semaphores: starts, reloads its file, shows its state, and stops.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, maybeDeferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

from connlimit._limiter.limiter import Limiter
from connlimit._listening.service import LimitedService
from connlimit._system import descriptors, systemd
from connlimit._system.clock import clock_of
from connlimit._twistd.program import Program
from connlimit._twistd.semaphores.config_file import Config, read
from connlimit._twistd.toml import ConfigError
from connlimit.semaphores.server.facts import holders, semaphore_facts
from connlimit.semaphores.server.site import SemaphoreSite
from connlimit.semaphores.server.store import IStore, Unavailable

#: Seconds that the last answers may take to reach their clients.
_FLUSH = 5.0

#: How many holders of each semaphore are shown.
_SHOWN = 50

#: Seconds until something is sent to the store again that could not be sent.
_AGAIN = 1.0


class SemaphoreProgram(Program):
    """
    Serves semaphores; SIGHUP reads their file again.
    """

    _log = Logger(namespace="connlimit.semaphores.server")

    def __init__(
        self,
        path: Path,
        config: Config | None,
        endpoints: list[Any],
        store: IStore,
        reactor: Any,
        *,
        max_peers: int | None = None,
        max_per_peer: int | None = None,
        grace: float = 0.0,
        polls_timeout: float = 30.0,
    ) -> None:
        """
        :param path: the file of the semaphores.
        :param config: what it says; None if there is none. Then the semaphores are those that the store has.
        :param endpoints: where to listen.
        :param store: where the semaphores are kept.
        :param max_peers: how many peers there can be at once; None for as many as the store says.
        :param max_per_peer: how many connections one address can have; None for half of all.
        :param grace: for how many seconds after the start nothing is granted, so that peers can restore.
        :param polls_timeout: how many seconds requests may still wait for their locks at the end.
        """
        super().__init__(_FLUSH)
        self._path = path.absolute()
        self._config = config
        self._store = store
        self._reactor = reactor
        self._max_peers = max_peers
        self._grace = grace
        self._polls_timeout = polls_timeout
        self._is_configured = False
        self._configuring: Deferred[None] | None = None
        self._clock = clock_of(reactor)
        self._site = SemaphoreSite(store, self._clock)
        # Only so that the last descriptors are not taken: each request that waits for a lock is a connection.
        allowed = descriptors.limit()
        room = None if allowed is None else allowed - descriptors.reserve(allowed)
        if max_per_peer is None and room is not None:
            max_per_peer = max(1, room // 2)
        self._limiter = Limiter(
            max_connections=room,
            max_per_peer=max_per_peer,
            over_peer="refuse",
            refusal="http",
            name="requests",
        )
        self.add_limiter(self._limiter)
        self._services = [LimitedService(endpoint, self._site, self._limiter) for endpoint in endpoints]
        for service in self._services:
            service.setServiceParent(self)

    def semaphores(self, with_holders: bool) -> list[dict[str, Any]]:
        """
        What there is to see of the semaphores.

        :param with_holders: whether to show who holds them; a peer's number is enough to act for it.
        """
        now = self._store.seconds()
        state = self._store.state
        facts = semaphore_facts(state, now)
        if with_holders:
            for each in facts:
                each["holders"] = holders(state, each["name"], now, _SHOWN)
        return facts

    def privilegedStartService(self) -> None:
        """
        Start to listen, or end the program with a sentence that says why not.
        """
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, lambda number, frame: self._reactor.callFromThread(self.reload))
        if self._config is not None and not self._config:
            self._log.warn("{path}: no semaphores configured", path=str(self._path))
        if self._grace:
            self._store.submit("grace", self._grace)
        self._tell_store()
        super().privilegedStartService()

    def reload(self) -> None:
        """
        Read the file again. One that is wrong changes nothing.
        """
        systemd.notify_reloading()
        try:
            self._config = read(self._path)
        except ConfigError as error:
            for each in error.errors:
                self._log.error("{error}; nothing was changed", error=each)
        else:
            self._tell_store()
        systemd.notify("READY=1")

    def _tell_store(self) -> None:
        if self._configuring is not None:
            self._configuring.cancel()
        self._configuring = ensureDeferred(self._configure())
        self._configuring.addErrback(lambda failure: failure.trap(CancelledError))

    async def _configure(self) -> None:
        config, max_peers = self._config, self._max_peers
        while True:
            try:
                # What is known already is not told again: that would be an operation for all servers.
                await maybeDeferred(self._store.submit, "nothing")
                if config is not None and not self._store.state.is_configured_as(config, max_peers):
                    await maybeDeferred(self._store.submit, "configure", config, max_peers)
                break
            except Unavailable:
                self._site.set_ready(self._is_configured)
                await deferLater(self._clock, _AGAIN)
        self._is_configured = True
        self._site.set_ready(True)
        if config is None:
            return
        self._log.info("{path}: {count} semaphores", path=str(self._path), count=len(config))

    async def _drain(self, limiter: Limiter) -> None:
        """
        Finish the requests, and then the connections that are kept for others.
        """
        if self._configuring is not None:
            self._configuring.cancel()
        await self._site.finish(self._polls_timeout)
        for service in self._services:
            for connection in limiter.admission.active_for(service.factory):
                connection.close()
        await super()._drain(limiter)
        await self._store.close()
