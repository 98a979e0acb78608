"""
The two connections of a link: one for questions, one that hears.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import txredisapi  # type: ignore[import-untyped]
from twisted.python.failure import Failure

from connlimit._redis.client import Asking, Careful


class Questions(Asking):
    """
    The connection for questions.
    """

    ended: Callable[[Any, Failure], None] | None = None

    def connectionLost(self, reason: Failure) -> None:
        """
        Tell the link.
        """
        ended, self.ended = self.ended, None
        why = Failure(self._why) if self._why is not None else reason
        super().connectionLost(reason)
        if ended is not None:
            ended(self, why)


class Ear(Careful, txredisapi.RedisProtocol):
    """
    The connection that hears.
    """

    ended: Callable[[Any], None] | None = None
    heard: Callable[[str, str], None]
    subscribed: Callable[[str], None]
    refused: Callable[[Exception], None]
    pinged_at: float | None = None

    def replyReceived(self, reply: Any) -> None:
        """
        A notification or an answer has come.
        """
        if not isinstance(reply, list) or len(reply) < 2:
            if isinstance(reply, Exception) and not self.replyQueue.waiting:
                self.refused(reply)
            super().replyReceived(reply)
            return
        self._received = 0
        if reply[0] == "message" and len(reply) == 3:
            self.heard(str(reply[1]), str(reply[2]))
        elif reply[0] == "subscribe":
            self.subscribed(str(reply[1]))
        elif reply[0] == "pong":
            self.pinged_at = None

    def say(self, *words: object) -> None:
        """
        Say something whose answer is no reply, but heard.
        """
        self.transport.write(self._build_command(*words))

    def connectionLost(self, reason: Failure) -> None:
        """
        Tell the link.
        """
        super().connectionLost(reason)
        ended, self.ended = self.ended, None
        if ended is not None:
            ended(self)
