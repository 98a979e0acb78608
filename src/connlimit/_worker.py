"""
A worker process: serves at the ports that its parent has opened, with the slots that its parent lends.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import ensureDeferred, maybeDeferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.protocol import Factory, connectionDone
from twisted.logger import Logger, globalLogBeginner, jsonFileLogObserver
from twisted.python.failure import Failure
from twisted.python.reflect import namedModule

from connlimit import _channel
from connlimit._inherited import InheritedPorts
from connlimit._lending import BorrowedLimit
from connlimit._limiter import Limiter
from connlimit._pooled import Reporter
from connlimit._role import Alone
from connlimit._settings import Settings

if TYPE_CHECKING:
    from connlimit._program import Program

_log = Logger()


class Worker(Alone):
    """
    The part of a worker.
    """

    shows = False

    def __init__(self, reactor: Any) -> None:
        self.ports = InheritedPorts(reactor)
        self.channel = _WorkersEnd(self)
        self._reactor = reactor
        self._limits: dict[str, BorrowedLimit] = {}
        self._reporters: dict[str, Reporter] = {}
        self._program: Program
        self._is_stopping = False
        self._has_stopped = False

    def limit(self, name: str) -> BorrowedLimit:
        """
        The limit of that name, of which slots are borrowed.
        """
        if name not in self._limits:
            self._limits[name] = BorrowedLimit(
                lambda: self.channel.callRemote(_channel.Ask, limit=name),
                lambda slots: self.channel.callRemote(_channel.GiveBack, limit=name, slots=slots),
            )
        return self._limits[name]

    # The part

    def limiter(self, settings: Mapping[str, Any], shared: str | None) -> Limiter:
        """
        See `Alone.limiter`.
        """
        if shared is not None:
            return super().limiter(settings, shared)
        return Limiter(**settings, limits=[self.limit(Settings().evolve(dict(settings)).name)])

    def listening(self) -> AbstractContextManager[None]:
        """
        See `Alone.listening`.
        """
        return self.ports.listening()

    def catch_signals(self, reactor: Any) -> None:
        """
        Let SIGTERM end this worker in order: whoever sends it may also send it to the parent.
        """
        signal.signal(signal.SIGTERM, lambda number, frame: reactor.callFromThread(self.order_to_stop))

    async def start(self, program: Program) -> None:
        """
        See `Alone.start`.
        """
        self.channel.callRemote(_channel.Ready)

    # What the parent orders

    def run(self, program: Program, control: int) -> None:
        """
        Do what the parent orders, until it orders to stop, or is no more.
        """
        self._program = program
        self._reactor.addSystemEventTrigger("before", "shutdown", lambda: ensureDeferred(self._stop()))
        self._reactor.adoptStreamConnection(
            control, socket.AF_UNIX, Factory.forProtocol(lambda: self.channel)
        )
        os.close(control)
        self._reactor.run()

    def begin(self) -> None:
        """
        Start to serve.
        """
        try:
            self._program.privilegedStartService()
            self._program.startService()
        except SystemExit as error:
            _log.error("{error}", error=str(error))
            os._exit(1)
        self.ports.clear()
        self.report()

    def read_again(self) -> None:
        """
        Read the configuration file again.
        """
        done = self._program.reload()  # type: ignore[attr-defined]
        done.addCallback(lambda _: self.ports.clear())

    def order_to_stop(self) -> None:
        """
        Stop, and let the connections end in time.
        """
        if not self._is_stopping:
            self._is_stopping = True
            self._reactor.stop()

    def report(self) -> None:
        """
        Tell what all limiters do.
        """
        limiters = self._program.limiters
        for name, limiter in limiters.items():
            if name not in self._reporters or self._reporters[name].limiter is not limiter:
                self._reporters[name] = Reporter(limiter)
            for facts in self._reporters[name].reports():
                self.channel.callRemote(_channel.Report, limiter=name, facts=facts)

    def is_orphaned(self) -> None:
        """
        The parent is no more: stop, or end at once if that was ordered already.
        """
        if self._is_stopping and not self._has_stopped:
            os.kill(os.getpid(), signal.SIGKILL)
        self.order_to_stop()

    async def _stop(self) -> None:
        self._is_stopping = True
        await maybeDeferred(self._program.stopService)
        self._has_stopped = True
        self.report()
        with suppress(ConnectionDone, ConnectionLost):  # there may be no parent any more
            await self.channel.callRemote(_channel.Done)


class _WorkersEnd(_channel.Channel):
    """
    What the parent tells a worker.
    """

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._worker = worker

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        super().connectionLost(reason)
        self._worker.is_orphaned()

    @_channel.Listen.responder
    def listen(self, where: str, socket: int) -> dict[str, Any]:
        self._worker.ports.add(where, socket)
        return {}

    @_channel.Start.responder
    def start(self) -> dict[str, Any]:
        self._worker.begin()
        return {}

    @_channel.Reload.responder
    def reload(self) -> dict[str, Any]:
        self._worker.read_again()
        return {}

    @_channel.Stop.responder
    def stop(self) -> dict[str, Any]:
        self._worker.order_to_stop()
        return {}

    @_channel.Look.responder
    def look(self) -> dict[str, Any]:
        self._worker.report()
        return {}

    @_channel.Lend.responder
    def lend(self, limit: str, slots: int) -> dict[str, Any]:
        self._worker.limit(limit).lent(slots)
        return {}

    @_channel.Recall.responder
    def recall(self, limit: str, recalled: bool) -> dict[str, Any]:
        self._worker.limit(limit).recall(recalled)
        return {}


def main() -> None:
    """
    Be a worker: the arguments are the number of the control socket, the module of the reactor, and the
    command line of the parent.
    """
    control, reactor_module, *arguments = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent tells what to do
    namedModule(reactor_module).install()
    output = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    globalLogBeginner.beginLoggingTo([jsonFileLogObserver(output, recordSeparator="")])
    from twisted.internet import reactor

    from connlimit._tap import Options, makeService

    options = Options()
    options.parseOptions(arguments)
    worker = Worker(reactor)
    worker.run(makeService(options, worker), int(control))
