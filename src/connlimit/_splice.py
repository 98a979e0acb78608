"""
Moves bytes from one socket to another within the kernel, where that can do it (Linux, ``splice``).

One pipe for the whole process is enough: what it takes from one socket it gives to the other at once, and
what that has no room for is read from it and left to Twisted. So it is always empty when the next one needs
it, and a relayed connection needs no descriptors besides its two sockets.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from typing import Any

from twisted.internet.tcp import Connection

#: How many bytes are moved at once, at most; the largest pipe that everybody may have by default.
_MOST = 1 << 20

_NOW = getattr(os, "SPLICE_F_MOVE", 0) | getattr(os, "SPLICE_F_NONBLOCK", 0)


def can_splice(source: object, target: object) -> bool:
    """
    Whether bytes can go from one transport to the other without being looked at: both are plain sockets.
    """
    return hasattr(os, "splice") and all(
        isinstance(each, Connection) and not getattr(each, "TLS", False) for each in (source, target)
    )


def splice(source: Any, target: Any) -> bool:
    """
    Move what has arrived at one transport to the other.

    :return: False if that must be done in the ordinary way this time: the target has still something else to
        write, or the source has an end or an error to tell of.
    """
    # What comes later must not overtake what Twisted has not written yet.
    if target.dataBuffer or target._tempDataLen or target.disconnecting or not target.connected:
        return False
    entry, exit = _pipe()
    try:
        count = os.splice(source.fileno(), entry, _MOST, flags=_NOW)
    except BlockingIOError:
        return True
    except OSError:
        return False
    if not count:
        return False
    try:
        left = count - os.splice(exit, target.fileno(), count, flags=_NOW)
    except OSError:  # there is no room now; or it is broken, which Twisted will find when it writes
        left = count
    while left:
        data = os.read(exit, left)
        left -= len(data)
        target.write(data)
    return True


@cache
def _pipe() -> tuple[int, int]:
    """
    The pipe, which is made when it is needed first.
    """
    import fcntl

    exit, entry = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    with suppress(OSError):  # the user may have no more
        fcntl.fcntl(entry, fcntl.F_SETPIPE_SZ, _MOST)
    return entry, exit
