"""
A connection that does nothing, whatever its limiter tells it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zope.interface import implementer

from connlimit.interfaces import IConnection


@implementer(IConnection)
class Inert:
    """
    Stands for a connection that is no more, or that is another limiter's.
    """

    factory = None
    slot: Any = None

    def __init__(self, address: Any) -> None:
        self.address = address

    def serve(self) -> None: ...

    def refuse(self, reason: str) -> None: ...

    def abort(self) -> None: ...

    def close(self, gave_up: Callable[[], None] | None = None) -> None: ...

    def notify(self, data: bytes) -> None: ...

    def reconsider(self) -> None: ...

    def is_dead(self) -> bool:
        return False

    def idle(self) -> float | None:
        return None

    def is_at_rest(self, quiet: float | None) -> bool:
        return False
