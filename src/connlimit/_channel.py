"""
What a parent and its workers tell each other.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.protocol import connectionDone
from twisted.protocols import amp
from twisted.python.failure import Failure


class Channel(amp.AMP):
    """
    One end of the connection between a parent and a worker.

    :ivar is_open: whether there is somebody at the other end.
    """

    is_open = False

    def makeConnection(self, transport: Any) -> None:
        # Not by way of AMP's own, which tells of each connection in the log.
        amp.BinaryBoxProtocol.makeConnection(self, transport)
        self.is_open = True

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.is_open = False
        amp.BinaryBoxProtocol.connectionLost(self, reason)


class _Note(amp.Command):
    """
    A command that is not answered.
    """

    requiresAnswer = False


class Listen(_Note):
    """
    To a worker: a port that it may listen at, from now on.
    """

    arguments = [(b"where", amp.Unicode()), (b"socket", amp.Descriptor())]


class Start(_Note):
    """
    To a worker: all ports were told, start.
    """


class Reload(_Note):
    """
    To a worker: all ports were told, read the configuration file again.
    """


class Stop(_Note):
    """
    To a worker: stop, and let the connections end in time.
    """


class Look(_Note):
    """
    To a worker: report what all limiters do.
    """


class Lend(_Note):
    """
    To a worker: it has so many slots of a limit more.
    """

    arguments = [(b"limit", amp.Unicode()), (b"slots", amp.Integer())]


class Recall(_Note):
    """
    To a worker: whether slots of a limit are lacking elsewhere.
    """

    arguments = [(b"limit", amp.Unicode()), (b"recalled", amp.Boolean())]


class Ready(_Note):
    """
    To the parent: the worker serves.
    """


class Ask(_Note):
    """
    To the parent: a slot of a limit is lacking.
    """

    arguments = [(b"limit", amp.Unicode())]


class GiveBack(_Note):
    """
    To the parent: so many slots of a limit are not needed.
    """

    arguments = [(b"limit", amp.Unicode()), (b"slots", amp.Integer())]


class Done(amp.Command):
    """
    To the parent: everything has been told. The worker ends when that is answered.
    """


class Report(_Note):
    """
    To the parent: what a limiter does, as JSON.
    """

    arguments = [(b"limiter", amp.Unicode()), (b"facts", amp.Unicode())]
