"""
The waiting line: who waits, since when, and whose turn it is.
"""

from __future__ import annotations

from collections import OrderedDict

from zope.interface import implementer

from connlimit.interfaces import IServableConnection, IWaitingLine


@implementer(IWaitingLine)
class Fifo(OrderedDict[IServableConnection, float]):
    """
    First come, first served: the time of arrival by connection.

    An OrderedDict, not a dict: the first entry of a dict takes ever longer to find as entries
    before it are removed.
    """

    def add(self, connection: IServableConnection, now: float) -> None:
        """
        See `IWaitingLine.add`.
        """
        self[connection] = now

    def remove(self, connection: IServableConnection) -> float | None:
        """
        See `IWaitingLine.remove`.
        """
        return self.pop(connection, None)

    def next(self) -> IServableConnection:
        """
        See `IWaitingLine.next`.
        """
        return next(iter(self))

    def oldest(self) -> tuple[IServableConnection, float]:
        """
        See `IWaitingLine.oldest`.
        """
        return next(iter(self.items()))
