"""
The role of this process: alone, parent or worker.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from twisted.application.service import IService

from connlimit._limiter.limiter import Limiter
from connlimit._limiter.settings import Settings
from connlimit.shared.by_url import shared_limits
from connlimit.status.service import Limited


class IRunning(Protocol):
    """
    What a role needs to know of its program.
    """

    @property
    def limiters(self) -> Mapping[str, Limiter]: ...

    @property
    def drain_timeout(self) -> float: ...

    @property
    def status(self) -> Any: ...

    def all_limiters(self) -> Iterable[Limiter]: ...

    def privilegedStartService(self) -> None: ...

    def startService(self) -> None: ...

    def stopService(self) -> Any: ...


class Alone:
    """
    The role of the only process of a program. A parent and its workers differ from it in what they override.

    :ivar serves: whether connections are served in this process.
    :ivar shows: whether the status page and the hints are shown by this process.
    :ivar reads: whether this process reads the configuration file itself.
    """

    serves = True
    shows = True
    reads = True

    def limiter(self, settings: Settings, shared: str | None) -> Limiter:
        """
        A limiter with these settings.

        :param shared: the URL of the Redis by which ``max_connections`` is shared, or None.
        """
        return Limiter(**settings.changed(), limits=shared_limits(shared, settings))

    def continued(self, name: str, limiters: list[Limiter]) -> Limiter | None:
        """
        Which of the limiters of that name goes on when the file is read again.
        """
        return next(iter(limiters), None)

    def is_over(self, limiter: Limiter) -> bool:
        """
        Whether a limiter that is not in the configuration any more can be forgotten.
        """
        now = limiter.snapshot()
        return not (now.active or now.waiting or now.exempt)

    def forget(self, limiter: Limiter) -> None:
        """
        A limiter was removed.
        """

    def watched(self, program: IRunning) -> Limited:
        """
        What has the limiters that are shown.
        """
        return program

    def listening(self) -> AbstractContextManager[list[int]]:
        """
        The context in which ports are opened; it has the numbers of those that another process has opened.
        """
        return nullcontext([])

    def are_open(self, ports: Iterable[int]) -> bool:
        """
        Whether these ports of another process are still open.
        """
        return True

    def plugin(self, service: IService) -> IService:
        """
        What is run of the service of a plugin.
        """
        return service

    def catch_signals(self, reactor: Any) -> None:
        """
        Make SIGTERM an order to stop that is carried out with exit code 0; a second one ends the process.

        Twisted's own handler stops as well, but then lets the process die of the signal.
        """

        def stop(number: int, frame: object) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            reactor.callFromThread(reactor.stop)

        signal.signal(signal.SIGTERM, stop)

    async def start(self, program: IRunning) -> None:
        """
        Do what remains to be done until the program is ready.
        """

    def reload(self, program: IRunning, text: str | None) -> None:
        """
        The program may have changed: it listens elsewhere, or runs what another text of the file says.
        """

    async def stop(self, program: IRunning) -> None:
        """
        The program has stopped to listen.
        """
