"""
What the server of semaphores knows of each lock, semaphore and peer.

Locks and peers are never changed but replaced, so that a list of them is a picture of one moment.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import attrs


class Rejected(Exception):
    """
    An operation that cannot be carried out, and has changed nothing but perhaps the peer's expiry.

    :ivar status: the HTTP status that says so.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def unknown_semaphore() -> Rejected:
    """
    What is said of a semaphore that is not configured.
    """
    return Rejected(400, "Unknown semaphore")


def unknown_peer() -> Rejected:
    """
    What is said to a peer that is forgotten, or never was.
    """
    return Rejected(400, "Unknown peer")


def never(count: int, full_count: int) -> Rejected:
    """
    What is said of a lock that asks for more than there is.
    """
    return Rejected(
        409, f"Lock can never be acquired. Lock asks for count {count} yet full count is only {full_count}."
    )


def wrong_count(count: int) -> Rejected:
    """
    What is said of a lock of nothing.
    """
    return Rejected(400, f"Lock count must be a positive number. Found: {count}.")


@attrs.define
class Lock:
    """
    A count of a semaphore, held or pending; not to be changed.

    :ivar since: when it was acquired, or asked for, in seconds.
    """

    count: int
    since: float


_NOTHING: Mapping[str, Lock] = {}


@attrs.define
class Peer:
    """
    What one peer has; not to be changed.

    :ivar expires: when it is forgotten unless it is heard from, in seconds.
    :ivar held: its locks by the names of their semaphores.
    :ivar pending: the name of the semaphore in whose queue it stands, or None.
    """

    expires: float
    held: Mapping[str, Lock] = _NOTHING
    pending: str | None = None


@attrs.define
class Semaphore:
    """
    What one semaphore has.

    :ivar full_count: how much of it there is.
    :ivar acquired: how much of it is held.
    :ivar pending: how much of it is wanted by those in the queue.
    :ivar holders: the locks that are held by their peers, in the order in which they were acquired.
    :ivar queue: the pending locks by their peers, first come first.
    :ivar is_configured: False when it was taken out of the configuration and is still held.
    """

    full_count: int
    level: int = 0
    acquired: int = 0
    pending: int = 0
    holders: OrderedDict[int, Lock] = attrs.field(factory=OrderedDict)
    queue: OrderedDict[int, Lock] = attrs.field(factory=OrderedDict)
    is_configured: bool = True
