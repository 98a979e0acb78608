"""
A running program: starts, reports, drains and stops what ``twistd connlimit`` runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.application.service import IService, MultiService
from twisted.internet.defer import Deferred, ensureDeferred, gatherResults
from twisted.internet.error import CannotListenError
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from connlimit._limiter.limiter import Limiter
from connlimit._system import descriptors, systemd
from connlimit._twistd.processes.role import Alone
from connlimit.interfaces import ILimiter
from connlimit.observers import ConnectionLog, LimiterLog
from connlimit.shared.by_url import close

_log = Logger(namespace="connlimit.program")

_STATUS_INTERVAL = 5.0  # seconds


class CannotStart(SystemExit, Exception):
    """
    The service cannot start; the sentence says why.

    As an Exception it lets twistd clean up and tell its parent, as a SystemExit it ends the process with
    the sentence and exit code 1, without a traceback.
    """


class Program(MultiService):
    """
    Everything that one ``twistd connlimit`` runs.

    :ivar limiters: the limiters by name.
    :ivar drain_timeout: seconds that connections may take to end when the program is stopped.
    :ivar status: the service of the status page, which is the last to stop; or None.
    :ivar hints: what there is to see and to try, logged at the start.
    :ivar role: what this process does of what the program does.
    """

    def __init__(
        self, drain_timeout: float = 0.0, log_connections: bool = False, role: Alone | None = None
    ) -> None:
        super().__init__()
        self.role = Alone() if role is None else role
        self.limiters: dict[str, Limiter] = {}
        self.drain_timeout = drain_timeout
        self._log_connections = log_connections
        self.status: IService | None = None
        self.hints: tuple[str, ...] = ()
        self._telling = LoopingCall(self._tell_systemd)
        self._is_stopping = False

    def all_limiters(self) -> list[Limiter]:
        """
        The limiters, and others by which connections are still served.
        """
        return list(self.limiters.values())

    def add_limiter(self, limiter: Limiter) -> None:
        """
        Have a limiter drained at the end, and its connections logged if that is asked for.
        """
        self.limiters[limiter.name] = limiter
        if not self.role.serves:
            # Those who serve log; here there would only be the same changes once more.
            for observer in limiter.observers:
                if isinstance(observer, LimiterLog):
                    limiter.remove_observer(observer)
        if self._log_connections and self.role.serves:
            limiter.add_observer(ConnectionLog())

    def privilegedStartService(self) -> None:
        """
        Raise the descriptor limit and start to listen, or end the program with a sentence that says why not.
        """
        descriptors.raise_limit()
        self._or_exit(self._listen)
        if self.status is not None:
            self._or_exit(self.status.privilegedStartService)

    def _listen(self) -> None:
        with self.role.listening():
            super().privilegedStartService()

    def startService(self) -> None:
        """
        Start what listens without privileges.
        """
        from twisted.internet import reactor

        self._or_exit(super().startService)
        if self.status is not None:
            self._or_exit(self.status.startService)
        reactor.callWhenRunning(self._run, reactor)

    def _run(self, reactor: Any) -> None:
        running = ensureDeferred(self._running(reactor))
        running.addErrback(lambda failure: _log.failure("the program did not become ready", failure))

    async def _running(self, reactor: Any) -> None:
        """
        Say what there is, once the program can also be told to stop.
        """
        self.role.catch_signals(reactor)
        if self.role.serves:
            for limiter in self.limiters.values():
                _log.info("{budget}", budget=_budget(limiter))
        await self.role.start(self)
        if self.role.shows:
            for hint in self.hints:
                _log.info("{hint}", hint=hint)
        if self._is_stopping:
            return
        if systemd.notify("READY=1"):
            self._telling.start(_STATUS_INTERVAL)

    def stopService(self) -> Deferred[Any]:
        """
        Refuse the queue, stop listening, let those who are served finish in time, and end the others.
        """
        return ensureDeferred(self._stop())

    async def _stop(self) -> None:
        self._is_stopping = True
        systemd.notify("STOPPING=1")
        if self._telling.running:
            self._telling.stop()
        if self.role.serves:
            await self._drain_all()
        await self._stop_services()
        await self.role.stop(self)
        for limiter in self.all_limiters() if self.role.serves else self.role.watched(self).limiters.values():
            self._tell_end(limiter)
            await close(limiter.limits)
        if self.status is not None:
            await self.status.stopService()

    async def _stop_services(self) -> None:
        await super().stopService()

    async def _drain_all(self) -> None:
        """
        Refuse those who wait, close the ports, and let those who are served finish, with their services.

        Without a drain_timeout they are left to the end of the process, which loses nothing that Twisted's
        own would not.
        """
        limiters = self.all_limiters()
        for limiter in limiters:
            limiter.admission.refuse_all()
        stopping = [each for limiter in limiters for each in limiter.admission.stop_listening()]
        draining = [ensureDeferred(self._drain(limiter)) for limiter in limiters]
        await gatherResults([*stopping, *draining])

    async def _drain(self, limiter: Limiter) -> None:
        if not self.drain_timeout:
            await limiter.admission.wait_for((), None)
            return
        before = limiter.snapshot()
        if before.active or before.exempt:
            _log.info(
                "{limiter}: {active} connections may finish within {seconds} s",
                limiter=limiter.name,
                active=before.active + before.exempt,
                seconds=self.drain_timeout,
            )
        await limiter.drain(self.drain_timeout)

    def _tell_end(self, limiter: ILimiter) -> None:
        after = limiter.snapshot()
        _log.info(
            "{limiter}: drained: {served} connections were served and {refused} refused in all",
            limiter=limiter.name,
            served=after.served,
            refused=sum(after.refused.values()),
        )

    def _tell_systemd(self) -> None:
        limiters = self.role.watched(self).limiters
        systemd.notify("STATUS=" + "; ".join(summary(each) for each in limiters.values()))

    def _or_exit(self, start: Callable[[], None]) -> None:
        try:
            start()
        except (CannotListenError, OSError) as error:
            raise CannotStart(f"connlimit: {error}") from None


def summary(limiter: ILimiter) -> str:
    """
    One phrase on what a limiter does now.
    """
    maximum = limiter.settings.max_connections
    served = f"{limiter.active}/{'any' if maximum is None else maximum} served"
    return f"{limiter.name}: {served}, {limiter.waiting} waiting"


def _budget(limiter: Limiter) -> str:
    """
    One sentence on how many connections there can be.
    """
    served, waiting, allowed = limiter.max_connections, limiter.max_waiting, descriptors.limit()
    facts = [f"{'any number' if served is None else served} served at once"]
    if allowed is not None:
        kept_free = descriptors.reserve(allowed)
        facts.insert(0, f"{allowed} descriptors, {kept_free} of them kept free of those who wait")
        room = max(0, allowed - kept_free - (served or 0) * (1 + limiter.admission.budget.opens))
        waiting = room if waiting is None else min(room, waiting)
    facts.append(f"room for {'any number' if waiting is None else waiting} in the queue")
    return f"{limiter.name}: " + ", ".join(facts)
