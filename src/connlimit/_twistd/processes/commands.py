"""
What a parent and its workers tell each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
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
        # Not by AMP's own, which logs every connection.
        amp.BinaryBoxProtocol.makeConnection(self, transport)
        self.is_open = True

    def tell(self, what: type[amp.Command], **arguments: Any) -> None:
        """
        Send a command that is not answered, if there is still somebody to hear it.
        """
        if self.is_open:
            self.callRemote(what, **arguments)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.is_open = False
        amp.BinaryBoxProtocol.connectionLost(self, reason)


@attrs.frozen
class Assignment:
    """
    What a worker is to run, as its parent sends it.

    :ivar number: counts them.
    :ivar ports: the numbers of all ports that are open.
    :ivar limits: what the limit of each limiter is called where slots are lent, by the limiter's name.
    :ivar text: the text of the configuration file as the parent has read it last; None if there is none.
    :ivar twistd: the options of twistd itself.
    """

    number: int
    ports: tuple[int, ...]
    limits: Mapping[str, str]
    text: str | None
    twistd: Mapping[str, Any]

    def parts(self) -> Iterator[bytes]:
        """
        The assignment in parts that fit into a message.
        """
        whole = json.dumps(attrs.asdict(self)).encode()
        for start in range(0, len(whole), _PART):
            yield whole[start : start + _PART]

    @classmethod
    def of(cls, whole: bytes) -> Assignment:
        """
        The assignment whose parts make up the whole.
        """
        return cls(**json.loads(whole))


#: How many bytes are sent in one message.
_PART = 60_000


class _Note(amp.Command):
    """
    A command that is not answered.
    """

    requiresAnswer = False


class Port(_Note):
    """
    To a worker: a port that the parent has opened, by its number, from now on.
    """

    arguments = [(b"where", amp.Unicode()), (b"number", amp.Integer()), (b"socket", amp.Descriptor())]


class Part(_Note):
    """
    To a worker: a part of the text of an `Assignment`. A message has 64 KiB at most.
    """

    arguments = [(b"part", amp.String())]


class Run(_Note):
    """
    To a worker: that was all of the text, run it.
    """


class Beat(amp.Command):
    """
    To a worker: answer, as one that does not hang.
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
    To a worker: it has this number of slots of a limit more.
    """

    arguments = [(b"limit", amp.Unicode()), (b"slots", amp.Integer())]


class Recall(_Note):
    """
    To a worker: whether slots of a limit are lacking elsewhere.
    """

    arguments = [(b"limit", amp.Unicode()), (b"recalled", amp.Boolean())]


class Ready(_Note):
    """
    To the parent: the worker serves, and runs the assignment of that number.
    """

    arguments = [(b"number", amp.Integer())]


class Ask(_Note):
    """
    To the parent: a slot of a limit is lacking.
    """

    arguments = [(b"limit", amp.Unicode())]


class GiveBack(_Note):
    """
    To the parent: this number of slots of a limit is not needed.
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
