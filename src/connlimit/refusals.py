"""
What a refused client gets.
"""

from __future__ import annotations

from twisted.internet.interfaces import IAddress, IProtocol
from zope.interface import implementer

from connlimit.interfaces import IRefusal

FULL = "full"
TIMEOUT = "timeout"
PEER = "peer"
DESCRIPTORS = "descriptors"
DRAINING = "draining"

#: Why a connection can be refused.
REASONS = (FULL, TIMEOUT, PEER, DESCRIPTORS, DRAINING)


@implementer(IRefusal)
class _Close:
    """
    Close the connection without a word.
    """

    def build_protocol(self, address: IAddress, reason: str) -> IProtocol | None:
        return None


close = _Close()
