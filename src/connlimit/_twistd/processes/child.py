"""
A worker's process as its parent has it: spawned, told what to run, heard, and killed if it hangs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Any, Protocol

from twisted.internet.error import ProcessExitedAlready
from twisted.internet.protocol import Factory, ProcessProtocol, connectionDone
from twisted.logger import Logger, LogLevel, globalLogPublisher
from twisted.python.failure import Failure

from connlimit._twistd.processes import commands
from connlimit._twistd.processes.inherited_ports import OpenedPorts
from connlimit._twistd.processes.lending import Lender
from connlimit._twistd.processes.log_pipe import of_line

_log = Logger(namespace="connlimit.workers")

#: Seconds between two looks at what the workers do.
LOOK_INTERVAL = 1.0

#: Seconds within which the last messages of a process that has ended are read.
_LAST_WORDS = 1.0

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


class IParent(Protocol):
    """
    What a child needs to know of its parent.
    """

    arguments: list[str]
    reactor: Any
    worker_timeout: float
    number: int
    ports: OpenedPorts
    lenders: dict[str, Lender]

    def assignment(self) -> commands.Assignment: ...

    def is_ready(self, worker: Child) -> None: ...

    def has_ended(self, worker: Child, how: str) -> None: ...

    def has_reported(self, worker: Child, name: str, facts: str) -> None: ...


class Child(ProcessProtocol):
    """
    A worker's process, from its start to its end.

    :ivar runs: the number of the assignment that it runs.
    """

    transport: Any

    def __init__(self, parent: IParent, number: int) -> None:
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
        if (self._unanswered - 1) * LOOK_INTERVAL >= timeout and not self._is_killed:
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
        Tell the parent if the process has ended and all that it said was heard.
        """
        if self._how is not None and not self._channel.is_open:
            self._close_in_flight()
            self.parent.has_ended(self, self._how)


class _ParentsEnd(commands.Channel):
    """
    What a worker tells its parent.
    """

    transport: Any

    def __init__(self, child: Child) -> None:
        super().__init__()
        self._child = child

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        super().connectionLost(reason)
        self._child.check_end()

    @commands.Ready.responder
    def ready(self, number: int) -> dict[str, Any]:
        self._child.ready(number)
        return {}

    @commands.Ask.responder
    def ask(self, limit: str) -> dict[str, Any]:
        if lender := self._child.parent.lenders.get(limit):
            lender.ask(self._child)
        return {}

    @commands.GiveBack.responder
    def give_back(self, limit: str, slots: int) -> dict[str, Any]:
        if lender := self._child.parent.lenders.get(limit):
            lender.give_back(self._child, slots)
        return {}

    @commands.Done.responder
    def done(self) -> dict[str, Any]:
        return {}

    @commands.Report.responder
    def report(self, limiter: str, facts: str) -> dict[str, Any]:
        self._child.parent.has_reported(self._child, limiter, facts)
        return {}
