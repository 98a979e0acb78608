"""
The parent of several worker processes, which serve at the same ports.

It opens the ports, lends the slots that the workers share, starts anew who dies, adds up what they report,
and ends when all have ended.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from twisted.application.service import IService, Service
from twisted.internet.defer import Deferred, gatherResults, maybeDeferred
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import Factory, ProcessProtocol, connectionDone
from twisted.internet.task import LoopingCall
from twisted.logger import Logger, LogLevel, eventFromJSON, globalLogPublisher
from twisted.protocols import amp
from twisted.python.failure import Failure

from connlimit import _channel
from connlimit._inherited import OpenedPorts
from connlimit._lending import Lender
from connlimit._pooled import PooledLimiter
from connlimit._role import Alone
from connlimit._serving import listening_services

if TYPE_CHECKING:
    from connlimit._program import Program

_log = Logger()

#: Seconds until a worker that died is started again: at first, and at most if it dies again and again.
_FIRST_DELAY, _MOST_DELAY = 0.1, 10.0

#: A worker that served for so many seconds did not die of its start.
_WELL = 10.0

#: Seconds that a worker may take to end beyond drain_timeout, before it is killed.
_GRACE = 10.0

#: Seconds within which the last messages of a process that is no more are read.
_LAST_WORDS = 1.0

#: Seconds between two looks at what the workers do.
_LOOK_INTERVAL = 1.0

#: What a worker runs. Twisted believes what is said of systemd's sockets only if it is said to this process.
_RUN = """
import os
if "LISTEN_FDS" in os.environ:
    os.environ["LISTEN_PID"] = str(os.getpid())
from connlimit._worker import main
main()
"""


class Parent(Alone):
    """
    The part of a parent.
    """

    serves = False

    def __init__(self, processes: int, arguments: list[str], reactor: Any) -> None:
        """
        :param processes: how many workers there are.
        :param arguments: the command line, without ``twistd connlimit``; the workers get the same.
        """
        self.arguments = arguments
        self.reactor = reactor
        self.ports = OpenedPorts(reactor)
        self.lenders: dict[str, Lender] = {}
        self._count = processes
        self._program: Program
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

    def watched(self, program: Program) -> Any:
        """
        See `Alone.watched`.
        """
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

    def listening(self) -> AbstractContextManager[None]:
        """
        See `Alone.listening`.
        """
        return self.ports.listening()

    def plugin(self, service: IService) -> IService:
        """
        See `Alone.plugin`.
        """
        return _Ports(service)

    async def start(self, program: Program) -> None:
        """
        See `Alone.start`.
        """
        self._program = program
        self._set_lenders()
        for number in range(1, self._count + 1):
            self._start_worker(number)
        self._looking.start(_LOOK_INTERVAL)
        await self._all_ready

    def reload(self, program: Program) -> None:
        """
        See `Alone.reload`.
        """
        self._set_lenders()
        for worker in self._workers.values():
            for lender in self.lenders.values():
                if worker not in lender.lent:
                    lender.join(worker)
            worker.order(_channel.Reload)

    async def stop(self, program: Program) -> None:
        """
        See `Alone.stop`.
        """
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
        for name, limiter in self._program.limiters.items():
            slots = None if limiter.settings.dry_run else limiter.settings.max_connections
            if name in self.lenders:
                self.lenders[name].set_slots(slots)
            else:
                self.lenders[name] = Lender(name, slots, self._count)

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
        worker.order(_channel.Start)

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
        if self._program.status is not None or "NOTIFY_SOCKET" in os.environ:
            for worker in self._workers.values():
                worker.look()

    def _kill(self) -> None:
        for worker in self._workers.values():
            _log.error("worker {number} did not end in time and is killed", number=worker.number)
            worker.kill()


class _Worker(ProcessProtocol):
    """
    A worker's process, from its start to its end.
    """

    transport: Any

    def __init__(self, parent: Parent, number: int) -> None:
        self.parent = parent
        self.number = number
        self.began = parent.reactor.seconds()
        self._channel = _ParentsEnd(self)
        self._rest = {1: b"", 2: b""}
        self._is_ready = False
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
            inherited |= {1: "r", 2: "r", control: theirs.fileno()}
            command = [sys.executable, "-c", _RUN, str(control), type(reactor).__module__]
            reactor.spawnProcess(
                self, sys.executable, [*command, *self.parent.arguments], environment, childFDs=inherited
            )
        _log.info("worker {number} is process {pid}", number=self.number, pid=self.transport.pid)

    def order(self, what: type[amp.Command]) -> None:
        """
        Tell the worker all ports, and to do something with them.
        """
        if self._channel.is_open:
            for where, descriptor in self.parent.ports.sockets():
                self._channel.callRemote(_channel.Listen, where=where, socket=descriptor)
            self._channel.callRemote(what)

    def look(self) -> None:
        """
        Have the worker report.
        """
        self._channel.callRemote(_channel.Look)

    def lend(self, name: str, slots: int) -> None:
        """
        See `Borrower.lend`.
        """
        self._channel.callRemote(_channel.Lend, limit=name, slots=slots)

    def recall(self, name: str, recalled: bool) -> None:
        """
        See `Borrower.recall`.
        """
        self._channel.callRemote(_channel.Recall, limit=name, recalled=recalled)

    def stop(self) -> None:
        """
        Let the worker end, at once if it does not serve yet.
        """
        if self._is_ready:
            self._channel.callRemote(_channel.Stop)
        else:
            self.kill()

    def kill(self) -> None:
        """
        End the process.
        """
        self.transport.signalProcess("KILL")

    def ready(self) -> None:
        """
        The worker serves.
        """
        self._is_ready = True
        self.parent.is_ready(self)

    # ProcessProtocol

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        *lines, self._rest[childFD] = (self._rest[childFD] + data).split(b"\n")
        for line in lines:
            self._log_line(childFD, line.decode(errors="replace"))

    def childConnectionLost(self, childFD: int) -> None:
        if childFD in self._rest:
            self.childDataReceived(childFD, b"\n" if self._rest[childFD] else b"")

    def _log_line(self, descriptor: int, line: str) -> None:
        """
        Log what a worker has logged, or what came from below it.
        """
        who = f"worker {self.number}"
        if descriptor == 1:
            try:
                globalLogPublisher({**eventFromJSON(line), "log_system": who})
                return
            except ValueError:
                pass
        _log.emit(LogLevel.error, "{line}", line=line, log_system=who)

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
            self.parent.has_ended(self, self._how)


class _ParentsEnd(_channel.Channel):
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

    @_channel.Ready.responder
    def ready(self) -> dict[str, Any]:
        self._worker.ready()
        return {}

    @_channel.Ask.responder
    def ask(self, limit: str) -> dict[str, Any]:
        self._worker.parent.lenders[limit].ask(self._worker)
        return {}

    @_channel.GiveBack.responder
    def give_back(self, limit: str, slots: int) -> dict[str, Any]:
        self._worker.parent.lenders[limit].give_back(self._worker, slots)
        return {}

    @_channel.Done.responder
    def done(self) -> dict[str, Any]:
        return {}

    @_channel.Report.responder
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
