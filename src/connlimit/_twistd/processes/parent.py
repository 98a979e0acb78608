"""
The parent of several worker processes, which serve at the same ports.

It opens the ports, lends the slots that the workers share, sends them the configuration that it has read,
starts anew who dies, kills who hangs, adds up what they report, and ends when all have ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from itertools import count
from types import NoneType
from typing import Any

from twisted.application.service import IService, Service
from twisted.internet.defer import Deferred, gatherResults, maybeDeferred
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import Factory, ProcessProtocol, connectionDone
from twisted.internet.task import LoopingCall
from twisted.logger import Logger, LogLevel, globalLogPublisher
from twisted.python.failure import Failure

from connlimit._limiter.limiter import Limiter
from connlimit._listening.service import listening_services
from connlimit._twistd.config import WORKER_TIMEOUT
from connlimit._twistd.processes import commands
from connlimit._twistd.processes.inherited_ports import OpenedPorts
from connlimit._twistd.processes.lending import Lender
from connlimit._twistd.processes.log_pipe import of_line
from connlimit._twistd.processes.reports import PooledLimiter
from connlimit._twistd.processes.role import Alone, IRunning
from connlimit.status.service import Limited

_log = Logger(namespace="connlimit.workers")

#: Seconds until a worker that died is started again: at first, and at most if it dies again and again.
_FIRST_DELAY, _MOST_DELAY = 0.1, 10.0

#: A worker that served for so many seconds did not die of its start.
_WELL = 10.0

#: Seconds that a worker may take to end beyond drain_timeout, before it is killed.
_GRACE = 45.0

#: Seconds within which the last messages of a process that is no more are read.
_LAST_WORDS = 1.0

#: Seconds between two looks at what the workers do.
_LOOK_INTERVAL = 1.0

#: Seconds that a worker may take, at least, until it serves and answers.
_START_TIMEOUT = 60.0

#: How many bytes a line may have that comes from below a worker.
_LONGEST_LINE = 1 << 16

#: What a worker runs. It finds modules where its parent does, which may have gone to another directory since.
#: Twisted believes what is said of systemd's sockets only if it is said to this process.
_RUN = """
import json, os, sys
sys.path[:] = json.loads(sys.argv.pop(1))
if "LISTEN_FDS" in os.environ:
    os.environ["LISTEN_PID"] = str(os.getpid())
from connlimit._twistd.worker_program import main
main()
"""


class Parent(Alone):
    """
    The part of a parent.
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
        self._workers: dict[int, _Worker] = {}
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
        self._looking.start(_LOOK_INTERVAL)
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
        worker = self._workers[number] = _Worker(self, number)
        try:
            worker.spawn()
        except OSError as error:
            self.has_ended(worker, f"could not be started ({error})")
            return
        for lender in self.lenders.values():
            lender.join(worker)
        worker.assign()

    def is_ready(self, worker: _Worker) -> None:
        """
        A worker serves.
        """
        _log.info("worker {number} serves", number=worker.number)
        self._ready.add(worker.number)
        if len(self._ready) == self._count and not self._all_ready.called:
            self._all_ready.callback(None)

    def has_ended(self, worker: _Worker, how: str) -> None:
        """
        A worker's process is no more.
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
        self._delays[number] = min(_MOST_DELAY, delay * 2)
        _log.error(
            "worker {number} {how}; it is started again in {delay:.1f} s", number=number, how=how, delay=delay
        )
        self._restarts[number] = self.reactor.callLater(delay, self._start_worker, number)

    def has_reported(self, worker: _Worker, name: str, facts: str) -> None:
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


class _Worker(ProcessProtocol):
    """
    A worker's process, from its start to its end.

    :ivar runs: the number of the assignment that it runs.
    """

    transport: Any

    def __init__(self, parent: Parent, number: int) -> None:
        self.parent = parent
        self.number = number
        self.began = parent.reactor.seconds()
        self._channel = _ParentsEnd(self)
        self._rest = {1: b"", 2: b""}
        self._log_pipe = 0
        self._assigned = 0
        self.runs = 0
        self._told: set[int] = set()
        self._in_flight: list[int] = []
        self._unanswered = 0
        self._is_killed = False
        self._how: str | None = None

    def spawn(self) -> None:
        """
        Start the process.
        """
        reactor = self.parent.reactor
        ours, theirs = socket.socketpair()
        with ours, theirs, open(os.devnull, "rb") as null:
            factory = Factory.forProtocol(lambda: self._channel)
            reactor.adoptStreamConnection(ours.fileno(), socket.AF_UNIX, factory)
            environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
            control = 3
            if names := environment.get("LISTEN_FDNAMES"):
                # The worker finds all that systemd has given by their numbers, but gets the ports from us.
                control += len(names.split(":"))
                environment["LISTEN_FDS"] = str(control - 3)
            inherited: dict[int, Any] = {number: null.fileno() for number in (0, *range(3, control))}
            self._log_pipe = control + 1
            self._rest[self._log_pipe] = b""
            inherited |= {1: "r", 2: "r", control: theirs.fileno(), self._log_pipe: "r"}
            command = [sys.executable, "-c", _RUN, json.dumps(sys.path)]
            command += [str(control), str(self._log_pipe), type(reactor).__module__]
            reactor.spawnProcess(
                self, sys.executable, [*command, *self.parent.arguments], environment, childFDs=inherited
            )
        _log.info("worker {number} is process {pid}", number=self.number, pid=self.transport.pid)

    def assign(self) -> None:
        """
        Tell the worker what to run, as soon as it runs what it was told before.
        """
        if self.runs < self._assigned or not self._channel.is_open:
            return
        sockets = self.parent.ports.sockets()
        self._told.intersection_update(sockets)
        new = [number for number in sockets if number not in self._told]
        try:
            # The port's own may be closed, and its number another's, before it is sent.
            for number in new:
                self._in_flight.append(os.dup(sockets[number][1]))
        except OSError as error:
            self._close_in_flight()
            _log.error("worker {number} cannot be told what to run: {error}", number=self.number, error=error)
            return  # it is tried again when it has answered
        for number, descriptor in zip(new, self._in_flight, strict=True):
            where = sockets[number][0]
            self._channel.tell(commands.Port, where=where, number=number, socket=descriptor)
        self._told.update(new)
        for part in self.parent.assignment().parts():
            self._channel.tell(commands.Part, part=part)
        self._channel.tell(commands.Run)
        self._assigned = self.parent.number

    def look(self, is_watched: bool) -> None:
        """
        Have the worker answer, or kill it if it has not for too long; and have it report if somebody watches.

        What counts are looks, not seconds: when this process itself was stopped or busy, it has not read the
        answers yet.
        """
        if not self._channel.is_open:
            return
        self._unanswered += 1
        if self._unanswered == 1:
            if is_watched:
                self._channel.tell(commands.Look)
            beat = self._channel.callRemote(commands.Beat)
            beat.addCallbacks(self._has_answered, lambda failure: None)
            return
        timeout = self.parent.worker_timeout
        if not self.runs:
            timeout = max(timeout, _START_TIMEOUT)
        if (self._unanswered - 1) * _LOOK_INTERVAL >= timeout and not self._is_killed:
            _log.error(
                "worker {number} has not answered for {seconds:.0f} s and is killed",
                number=self.number,
                seconds=timeout,
            )
            self.kill()

    def _has_answered(self, answer: object) -> None:
        self._unanswered = 0
        if self._assigned < self.parent.number:
            self.assign()

    def lend(self, name: str, slots: int) -> None:
        self._channel.tell(commands.Lend, limit=name, slots=slots)

    def recall(self, name: str, recalled: bool) -> None:
        self._channel.tell(commands.Recall, limit=name, recalled=recalled)

    def stop(self) -> None:
        """
        Let the worker end, at once if it does not serve yet.
        """
        if self.runs:
            self._channel.tell(commands.Stop)
        else:
            self.kill()

    def kill(self) -> None:
        """
        End the process.
        """
        self._is_killed = True
        with suppress(ProcessExitedAlready):
            self.transport.signalProcess("KILL")

    def ready(self, number: int) -> None:
        """
        The worker serves, and runs the assignment of that number.
        """
        is_new = not self.runs
        self.runs = number
        self._close_in_flight()
        if is_new:
            self.parent.is_ready(self)
        if number < self.parent.number:
            self.assign()

    def _close_in_flight(self) -> None:
        for descriptor in self._in_flight:
            os.close(descriptor)
        self._in_flight.clear()

    # ProcessProtocol

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        *lines, rest = (self._rest[childFD] + data).split(b"\n")
        if len(rest) > _LONGEST_LINE and childFD != self._log_pipe:
            lines.append(rest)
            rest = b""
        self._rest[childFD] = rest
        for line in lines:
            self._log_line(childFD, line)

    def childConnectionLost(self, childFD: int) -> None:
        if childFD in self._rest:
            self.childDataReceived(childFD, b"\n" if self._rest[childFD] else b"")

    def _log_line(self, descriptor: int, line: bytes) -> None:
        """
        Log what a worker has logged, or what came from below it.
        """
        if descriptor == self._log_pipe:
            try:
                globalLogPublisher(of_line(line, self.number))
                return
            except ValueError:
                pass
        level = LogLevel.info if descriptor == 1 else LogLevel.error
        who = f"worker {self.number}"
        _log.emit(level, "{line}", line=line.decode(errors="replace"), log_system=who, worker=self.number)

    def processExited(self, reason: Failure) -> None:
        ended: Any = reason.value
        if ended.signal is not None:
            self._how = f"died of {signal.Signals(ended.signal).name}"
        else:
            self._how = f"ended with exit code {ended.exitCode}"
        if self._channel.is_open:  # a process that the worker has left behind may keep it so
            self.parent.reactor.callLater(_LAST_WORDS, self._channel.transport.abortConnection)
        self.check_end()

    def check_end(self) -> None:
        """
        Tell the parent if the process is no more and all that it told was heard.
        """
        if self._how is not None and not self._channel.is_open:
            self._close_in_flight()
            self.parent.has_ended(self, self._how)


class _ParentsEnd(commands.Channel):
    """
    What a worker tells its parent.
    """

    transport: Any

    def __init__(self, worker: _Worker) -> None:
        super().__init__()
        self._worker = worker

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        super().connectionLost(reason)
        self._worker.check_end()

    @commands.Ready.responder
    def ready(self, number: int) -> dict[str, Any]:
        self._worker.ready(number)
        return {}

    @commands.Ask.responder
    def ask(self, limit: str) -> dict[str, Any]:
        if lender := self._worker.parent.lenders.get(limit):
            lender.ask(self._worker)
        return {}

    @commands.GiveBack.responder
    def give_back(self, limit: str, slots: int) -> dict[str, Any]:
        if lender := self._worker.parent.lenders.get(limit):
            lender.give_back(self._worker, slots)
        return {}

    @commands.Done.responder
    def done(self) -> dict[str, Any]:
        return {}

    @commands.Report.responder
    def report(self, limiter: str, facts: str) -> dict[str, Any]:
        self._worker.parent.has_reported(self._worker, limiter, facts)
        return {}


class _Ports(Service):
    """
    Of the service of a plugin, that it listens; all else is done by the workers.
    """

    def __init__(self, service: IService) -> None:
        self._services = list(listening_services(service))

    def privilegedStartService(self) -> None:
        for each in self._services:
            each.privilegedStartService()

    def stopService(self) -> Deferred[Any]:
        return gatherResults([maybeDeferred(each.stopService) for each in self._services])
