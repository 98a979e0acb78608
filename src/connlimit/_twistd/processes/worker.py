"""
A worker process: serves at the ports that its parent has opened, with the slots that its parent lends.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from typing import Any, NoReturn

from twisted.internet.defer import ensureDeferred, maybeDeferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.protocol import Factory, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from connlimit._limiter.limiter import Limiter
from connlimit._limiter.settings import Settings
from connlimit._twistd.processes import commands
from connlimit._twistd.processes.inherited_ports import InheritedPorts
from connlimit._twistd.processes.lending import BorrowedLimit
from connlimit._twistd.processes.log_pipe import LogPipe
from connlimit._twistd.processes.reports import Reporter
from connlimit._twistd.processes.role import Alone, IRunning

#: Makes the program of a worker: of what the parent tells, and of the part that it plays.
MakeProgram = Callable[[commands.Assignment, "Worker"], IRunning]

_log = Logger(namespace="connlimit.workers")

#: Seconds, at most, between two attempts to run what the parent runs.
_MAX_DELAY = 60.0


class Worker(Alone):
    """
    The role of a worker.
    """

    shows = False
    reads = False

    def __init__(self, reactor: Any, make_program: MakeProgram, log: LogPipe) -> None:
        """
        :param make_program: makes the program that runs in it.
        :param log: where what is logged goes.
        """
        self.ports = InheritedPorts(reactor)
        self.channel = _WorkersEnd(self)
        self.reactor = reactor
        self._make_program = make_program
        self._log_pipe = log
        self._limits: dict[str, BorrowedLimit] = {}
        self._reporters: dict[Limiter, Reporter] = {}
        self._program: IRunning | None = None
        self._assignment: commands.Assignment | None = None
        self._is_stopping = False
        self._has_stopped = False

    def limit(self, name: str) -> BorrowedLimit:
        """
        The limit of that name, of which slots are borrowed.
        """
        if name not in self._limits:
            self._limits[name] = BorrowedLimit(
                lambda: self.channel.tell(commands.Ask, limit=name),
                lambda slots: self.channel.tell(commands.GiveBack, limit=name, slots=slots),
            )
        return self._limits[name]

    # The part

    def limiter(self, settings: Settings, shared: str | None) -> Limiter:
        if shared is not None:
            return super().limiter(settings, shared)
        return Limiter(**settings.changed(), limits=[self._limit_of(settings.name)])

    def continued(self, name: str, limiters: list[Limiter]) -> Limiter | None:
        """
        That of which the parent lends slots now.
        """
        limit: object = self._limit_of(name)
        return next((each for each in limiters if limit in each.limits or not self._borrows(each)), None)

    def _borrows(self, limiter: Limiter) -> bool:
        return any(isinstance(each, BorrowedLimit) for each in limiter.limits)

    def _limit_of(self, name: str) -> BorrowedLimit:
        assert self._assignment is not None
        return self.limit(self._assignment.limits[name])

    def listening(self) -> AbstractContextManager[list[int]]:
        return self.ports.listening()

    def are_open(self, ports: Iterable[int]) -> bool:
        return self.ports.are_open(ports)

    def catch_signals(self, reactor: Any) -> None:
        """
        Let SIGTERM end this worker in order: its sender may also send it to the parent.
        """
        signal.signal(signal.SIGTERM, lambda number, frame: reactor.callFromThread(self.order_to_stop))

    async def start(self, program: IRunning) -> None:
        assert self._assignment is not None
        self.channel.tell(commands.Ready, number=self._assignment.number)

    # The parent's commands

    def serve(self, control: int) -> None:
        """
        Carry out the parent's commands, until the command to stop or the parent's end.
        """
        self.reactor.addSystemEventTrigger("before", "shutdown", lambda: ensureDeferred(self._stop()))
        self.reactor.adoptStreamConnection(control, socket.AF_UNIX, Factory.forProtocol(lambda: self.channel))
        os.close(control)
        self.reactor.run()

    def run(self, assignment: commands.Assignment) -> None:
        """
        Run what the parent has assigned: start with it, or change.
        """
        self.ports.keep(assignment.ports)
        self._assignment = assignment
        if self._program is None:
            self._begin(assignment)
        else:
            ensureDeferred(self._change(assignment, self._program))

    def _begin(self, assignment: commands.Assignment) -> None:
        try:
            self._program = self._make_program(assignment, self)
            self._program.privilegedStartService()
            self._program.startService()
        except SystemExit as error:
            _log.error("{error}", error=str(error))
            self._die()
        except Exception:
            _log.failure("the worker cannot start")
            self._die()
        self.report()

    def _die(self) -> NoReturn:
        self._log_pipe.flush()
        os._exit(1)

    async def _change(self, assignment: commands.Assignment, program: Any, delay: float = 1.0) -> None:
        if assignment.text is not None and not await program.run(assignment.text):
            # What keeps this process from it, and not the parent, may pass.
            later = min(2 * delay, _MAX_DELAY)
            self.reactor.callLater(delay, self._try_again, assignment, program, later)
        self._forget(program)
        self.channel.tell(commands.Ready, number=assignment.number)

    def _try_again(self, assignment: commands.Assignment, program: Any, delay: float) -> None:
        if assignment is self._assignment and not self._is_stopping:
            ensureDeferred(self._change(assignment, program, delay))

    def _forget(self, program: IRunning) -> None:
        """
        Forget the limits of limiters that were removed.
        """
        for limiter in self._reporters.keys() - set(program.limiters.values()):
            limiter.remove_observer(self._reporters.pop(limiter))
        in_use: set[object] = {limit for limiter in program.all_limiters() for limit in limiter.limits}
        self._limits = {
            name: limit for name, limit in self._limits.items() if limit in in_use or not limit.is_unused()
        }

    def order_to_stop(self) -> None:
        """
        Stop, and let the connections end in time.
        """
        if not self._is_stopping:
            self._is_stopping = True
            self.reactor.stop()

    def report(self) -> None:
        """
        Tell what all limiters do.
        """
        if self._program is None:
            return
        for name, limiter in self._program.limiters.items():
            if limiter not in self._reporters:
                self._reporters[limiter] = Reporter(limiter)
            for facts in self._reporters[limiter].reports():
                self.channel.tell(commands.Report, limiter=name, facts=facts)

    def is_orphaned(self) -> None:
        """
        The parent has ended: stop, or end at once if this worker is stopping already.
        """
        if self._is_stopping and not self._has_stopped:
            os.kill(os.getpid(), signal.SIGKILL)
        self.order_to_stop()

    async def _stop(self) -> None:
        self._is_stopping = True
        if self._program is not None:
            await maybeDeferred(self._program.stopService)
        self._has_stopped = True
        self.report()
        if self.channel.is_open:
            with suppress(ConnectionDone, ConnectionLost):  # the parent may end meanwhile
                await self.channel.callRemote(commands.Done)


class _WorkersEnd(commands.Channel):
    """
    What the parent tells a worker.
    """

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._worker = worker
        self._parts: list[bytes] = []

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        super().connectionLost(reason)
        self._worker.is_orphaned()

    @commands.Port.responder
    def port(self, where: str, number: int, socket: int) -> dict[str, Any]:
        self._worker.ports.add(where, number, socket)
        return {}

    @commands.Part.responder
    def part(self, part: bytes) -> dict[str, Any]:
        self._parts.append(part)
        return {}

    @commands.Run.responder
    def run(self) -> dict[str, Any]:
        whole = b"".join(self._parts)
        self._parts.clear()
        # In a turn of its own: what is done by it is not done by this connection.
        self._worker.reactor.callLater(0, self._worker.run, commands.Assignment.of(whole))
        return {}

    @commands.Beat.responder
    def beat(self) -> dict[str, Any]:
        return {}

    @commands.Stop.responder
    def stop(self) -> dict[str, Any]:
        self._worker.order_to_stop()
        return {}

    @commands.Look.responder
    def look(self) -> dict[str, Any]:
        self._worker.report()
        return {}

    @commands.Lend.responder
    def lend(self, limit: str, slots: int) -> dict[str, Any]:
        self._worker.limit(limit).lent(slots)
        return {}

    @commands.Recall.responder
    def recall(self, limit: str, recalled: bool) -> dict[str, Any]:
        self._worker.limit(limit).recall(recalled)
        return {}
