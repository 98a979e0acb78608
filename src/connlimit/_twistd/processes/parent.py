"""
The parent of several worker processes, which serve at the same ports.

It opens the ports, lends the slots that the workers share, sends them the configuration that it has read,
restarts those that die, kills those that hang, adds up what they report, and ends when all have ended.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from itertools import count
from types import NoneType
from typing import Any

from twisted.application.service import IService, Service
from twisted.internet.defer import Deferred, gatherResults, maybeDeferred
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from connlimit._limiter.limiter import Limiter
from connlimit._listening.service import listening_services
from connlimit._twistd.config import WORKER_TIMEOUT
from connlimit._twistd.processes import commands
from connlimit._twistd.processes.child import LOOK_INTERVAL, Child
from connlimit._twistd.processes.inherited_ports import OpenedPorts
from connlimit._twistd.processes.lending import Lender
from connlimit._twistd.processes.reports import PooledLimiter
from connlimit._twistd.processes.role import Alone, IRunning
from connlimit.status.service import Limited

_log = Logger(namespace="connlimit.workers")

#: Seconds until a worker that died is started again: at first, and at most if it dies again and again.
_FIRST_DELAY, _MAX_DELAY = 0.1, 10.0

#: A worker that served for these seconds did not die of its start.
_WELL = 10.0

#: Seconds that a worker may take to end beyond drain_timeout, before it is killed.
_GRACE = 45.0


class Parent(Alone):
    """
    The role of a parent.
    """

    serves = False

    def __init__(
        self,
        processes: int,
        arguments: list[str],
        reactor: Any,
        worker_timeout: float = WORKER_TIMEOUT,
        text: str | None = None,
        twistd: Mapping[str, Any] | None = None,
    ) -> None:
        """
        :param processes: how many workers there are.
        :param arguments: the command line, without ``twistd connlimit``; the workers get the same.
        :param worker_timeout: seconds after which a worker that does not answer is killed.
        :param text: the text of the configuration file that is in force; None if there is none.
        :param twistd: the options of twistd itself.
        """
        self.arguments = arguments
        self.reactor = reactor
        self.worker_timeout = worker_timeout
        self.number = 1
        self._text = text
        self._ports: tuple[int, ...] = ()
        self._twistd = {k: v for k, v in (twistd or {}).items() if isinstance(v, (str, int, float, NoneType))}
        self.ports = OpenedPorts(reactor)
        self.lenders: dict[str, Lender] = {}
        self._keys: dict[Limiter, str] = {}
        self._departed: dict[Limiter, int] = {}  # the first assignment without it
        self._numbers = count(1)
        self._count = processes
        self._program: IRunning
        self._pooled: dict[str, PooledLimiter] = {}
        self._workers: dict[int, Child] = {}
        self._ready: set[int] = set()
        self._delays: dict[int, float] = {}
        self._restarts: dict[int, IDelayedCall] = {}
        self._looking = LoopingCall(self._look)
        self._stopping = False
        self._all_ready: Deferred[None] = Deferred()
        self._all_ended: Deferred[None] = Deferred()

    # The part

    def watched(self, program: IRunning) -> Limited:
        self._program = program
        return self

    @property
    def limiters(self) -> Mapping[str, PooledLimiter]:
        """
        All limiters, each as what the workers report of it.
        """
        old = self._pooled
        self._pooled = {
            name: old[name] if name in old and old[name].own is own else PooledLimiter(own)
            for name, own in self._program.limiters.items()
        }
        return self._pooled

    def listening(self) -> AbstractContextManager[list[int]]:
        return self.ports.listening()

    def is_over(self, limiter: Limiter) -> bool:
        """
        Whether the workers know that it was removed, and have given back what they had.
        """
        is_known = all(worker.runs >= self._departed.get(limiter, 0) for worker in self._workers.values())
        return limiter not in self._keys or (is_known and self.lenders[self._keys[limiter]].is_over())

    def forget(self, limiter: Limiter) -> None:
        self._departed.pop(limiter, None)
        if limiter in self._keys:
            del self.lenders[self._keys.pop(limiter)]

    def plugin(self, service: IService) -> IService:
        return _Ports(service)

    async def start(self, program: IRunning) -> None:
        self._program = program
        self._set_lenders()
        self._ports = tuple(self.ports.sockets())
        for number in range(1, self._count + 1):
            self._start_worker(number)
        self._looking.start(LOOK_INTERVAL)
        await self._all_ready

    def reload(self, program: IRunning, text: str | None) -> None:
        self._set_lenders()
        before, self._ports = self._ports, tuple(self.ports.sockets())
        if (text, self._ports) == (self._text, before):
            return
        self._text = text
        self.number += 1
        for worker in self._workers.values():
            for lender in self.lenders.values():
                if worker not in lender.lent:
                    lender.join(worker)
            worker.assign()

    def assignment(self) -> commands.Assignment:
        """
        What a worker is to run now.
        """
        limits = {name: self._keys[limiter] for name, limiter in self._program.limiters.items()}
        ports = tuple(self.ports.sockets())
        return commands.Assignment(self.number, ports, limits, self._text, self._twistd)

    async def stop(self, program: IRunning) -> None:
        self._stopping = True
        for limiter in self.limiters.values():
            limiter.drain()
        for restart in self._restarts.values():
            restart.cancel()
        for worker in self._workers.values():
            worker.stop()
        kill = self.reactor.callLater(program.drain_timeout + _GRACE, self._kill)
        if self._workers:
            await self._all_ended
        if kill.active():
            kill.cancel()
        if self._looking.running:
            self._looking.stop()

    # The workers

    def _set_lenders(self) -> None:
        """
        Have a lender for each limiter, which keeps it whatever its name is.
        """
        for limiter in self._program.all_limiters():
            slots = None if limiter.settings.dry_run else limiter.settings.max_connections
            if limiter not in self._keys:
                key = self._keys[limiter] = f"{next(self._numbers)}"
                self.lenders[key] = Lender(key, slots, self._count)
            lender = self.lenders[self._keys[limiter]]
            is_departing = limiter not in self._program.limiters.values()
            if is_departing:
                self._departed.setdefault(limiter, self.number + 1)
            else:
                self._departed.pop(limiter, None)
            lender.depart(is_departing)
            lender.set_slots(slots)

    def _start_worker(self, number: int) -> None:
        self._restarts.pop(number, None)
        worker = self._workers[number] = Child(self, number)
        try:
            worker.spawn()
        except OSError as error:
            self.has_ended(worker, f"could not be started ({error})")
            return
        for lender in self.lenders.values():
            lender.join(worker)
        worker.assign()

    def is_ready(self, worker: Child) -> None:
        """
        A worker serves.
        """
        _log.info("worker {number} serves", number=worker.number)
        self._ready.add(worker.number)
        if len(self._ready) == self._count and not self._all_ready.called:
            self._all_ready.callback(None)

    def has_ended(self, worker: Child, how: str) -> None:
        """
        A worker's process has ended.
        """
        number = worker.number
        del self._workers[number]
        for lender in self.lenders.values():
            lender.leave(worker)
        for limiter in self.limiters.values():
            limiter.forget(worker)
        if self._stopping:
            if not self._workers:
                self._all_ended.callback(None)
            return
        if self.reactor.seconds() - worker.began >= _WELL:
            self._delays.pop(number, None)
        delay = self._delays.get(number, _FIRST_DELAY)
        self._delays[number] = min(_MAX_DELAY, delay * 2)
        _log.error(
            "worker {number} {how}; it is restarted in {delay:.1f} s", number=number, how=how, delay=delay
        )
        self._restarts[number] = self.reactor.callLater(delay, self._start_worker, number)

    def has_reported(self, worker: Child, name: str, facts: str) -> None:
        """
        A worker tells what a limiter does.
        """
        if name in self.limiters:
            self.limiters[name].take(worker, facts)

    def _look(self) -> None:
        is_watched = self._program.status is not None or "NOTIFY_SOCKET" in os.environ
        for worker in list(self._workers.values()):
            worker.look(is_watched)

    def _kill(self) -> None:
        for worker in self._workers.values():
            _log.error("worker {number} did not end in time and is killed", number=worker.number)
            worker.kill()


class _Ports(Service):
    """
    Lets the service of a plugin listen, and no more; the rest is done by the workers.
    """

    def __init__(self, service: IService) -> None:
        self._services = list(listening_services(service))

    def privilegedStartService(self) -> None:
        for each in self._services:
            each.privilegedStartService()

    def stopService(self) -> Deferred[Any]:
        return gatherResults([maybeDeferred(each.stopService) for each in self._services])
