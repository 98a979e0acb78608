"""
Clocks that tests advance.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock


class TurnsClock(Clock):
    """
    A clock on which what is to come at once comes in the next turn, as in a reactor.
    """

    turn = 2.0**-20

    def callLater(self, delay: float, *args: Any, **kwargs: Any) -> Any:
        return super().callLater(delay or self.turn, *args, **kwargs)
