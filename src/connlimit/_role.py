"""
What a process does for itself when it is the only one, and what is done otherwise by a parent or a worker.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from twisted.application.service import IService

from connlimit._limiter import Limiter
from connlimit._settings import Settings
from connlimit._sharing import shared_limits

if TYPE_CHECKING:
    from connlimit._program import Program


class Alone:
    """
    The part of the only process of a program. A parent and its workers differ from it in what they override.

    :ivar serves: whether connections are served in this process.
    :ivar shows: whether the status page and the hints are shown by this process.
    """

    serves = True
    shows = True

    def limiter(self, settings: Mapping[str, Any], shared: str | None) -> Limiter:
        """
        A limiter with these settings.

        :param shared: the URL of the Redis by which ``max_connections`` is shared, or None.
        """
        return Limiter(**settings, limits=shared_limits(shared, Settings().evolve(dict(settings))))

    def watched(self, program: Program) -> Any:
        """
        What has the limiters that are shown.
        """
        return program

    def listening(self) -> AbstractContextManager[None]:
        """
        The context in which ports are opened.
        """
        return nullcontext()

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

    async def start(self, program: Program) -> None:
        """
        Do what remains to be done until the program is ready.
        """

    def reload(self, program: Program) -> None:
        """
        The configuration file was read again, and has changed the program.
        """

    async def stop(self, program: Program) -> None:
        """
        The program has stopped to listen.
        """
