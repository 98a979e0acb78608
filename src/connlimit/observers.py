"""
The base class for observers that care about some of a limiter's events only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zope.interface import implementer

from connlimit.interfaces import IConnection, ILimiterObserver

if TYPE_CHECKING:
    from connlimit._limiter.limiter import Limiter


@implementer(ILimiterObserver)
class LimiterObserver:
    """
    An observer that does nothing: override what you want to hear.
    """

    def exempted(self, limiter: Limiter, connection: IConnection) -> None:
        """
        See `ILimiterObserver.exempted`.
        """

    def waiting(self, limiter: Limiter, connection: IConnection) -> None:
        """
        See `ILimiterObserver.waiting`.
        """

    def served(self, limiter: Limiter, connection: IConnection, waited: float) -> None:
        """
        See `ILimiterObserver.served`.
        """

    def finished(self, limiter: Limiter, connection: IConnection) -> None:
        """
        See `ILimiterObserver.finished`.
        """

    def refused(self, limiter: Limiter, connection: IConnection, reason: str) -> None:
        """
        See `ILimiterObserver.refused`.
        """

    def departed(self, limiter: Limiter, connection: IConnection, waited: float) -> None:
        """
        See `ILimiterObserver.departed`.
        """

    def reconfigured(self, limiter: Limiter, changes: dict[str, tuple[Any, Any]]) -> None:
        """
        See `ILimiterObserver.reconfigured`.
        """


def hears(observer: object, event: str) -> bool:
    """
    Whether an observer does anything when it is told of an event, by the name of its method.
    """
    try:
        method = getattr(observer, event, None)
    except Exception:
        return True  # it will raise again when it is told, and that is logged
    return getattr(method, "__func__", method) is not getattr(LimiterObserver, event)
