"""
The waiting line: who waits, since when, and whose turn it is.
"""

from __future__ import annotations

from collections import OrderedDict

from zope.interface import implementer

from connlimit.interfaces import IConnection, IWaitingLine


@implementer(IWaitingLine)
class Fifo(OrderedDict[IConnection, float]):
    """
    First come, first served: the time of arrival by connection.

    An OrderedDict, not a dict: the first entry of a dict takes ever longer to find as entries
    before it are removed.
    """

    def add(self, connection: IConnection, now: float) -> None:
        """
        See `IWaitingLine.add`.
        """
        self[connection] = now

    def remove(self, connection: IConnection) -> float:
        """
        See `IWaitingLine.remove`.
        """
        return self.pop(connection)

    def next(self) -> IConnection:
        """
        See `IWaitingLine.next`.
        """
        return next(iter(self))

    def oldest(self) -> tuple[IConnection, float]:
        """
        See `IWaitingLine.oldest`.
        """
        return next(iter(self.items()))
