"""
Moves bytes from one socket to another within the kernel, where that can do it (Linux, ``splice``).

One pipe for the whole process is enough: what it takes from one socket it gives to the other at once, and
what that has no room for is read from it and left to Twisted. So it is always empty when the next one needs
it, and a relayed connection needs no descriptors besides its two sockets.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from functools import cache
from typing import Any

from twisted.internet.main import CONNECTION_LOST
from twisted.internet.tcp import Connection

#: How many bytes are moved at once, at most; the largest pipe that everybody may have by default.
_MAX = 1 << 20

_NOW = getattr(os, "SPLICE_F_MOVE", 0) | getattr(os, "SPLICE_F_NONBLOCK", 0)

#: What the kernel says if it cannot do that with this socket, or not now: the connection itself is all right.
_NOT_SO = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOMEM, errno.EBADF}


def can_splice(source: object, target: object) -> bool:
    """
    Whether bytes can go from one transport to the other without being looked at: both are plain sockets.
    """
    return hasattr(os, "splice") and all(
        isinstance(each, Connection) and not getattr(each, "TLS", False) for each in (source, target)
    )


def splice(source: Any, target: Any) -> Any:
    """
    Move what has arrived at one transport to the other.

    :return: what ``doRead`` of the source is to return; False if that must be called this time: the target
        has still something else to write, the source is at its end, or no pipe can be had.
    """
    # What comes later must not overtake what Twisted has not written yet.
    if target.dataBuffer or target._tempDataLen or target.disconnecting or not target.connected:
        return False
    try:
        entry, exit = _pipe()
    except OSError:
        return False
    try:
        count = os.splice(source.fileno(), entry, _MAX, flags=_NOW)
    except BlockingIOError:
        return None
    except OSError as error:
        # The kernel reports an error once: after this, reading would find an orderly end.
        return False if error.errno in _NOT_SO else CONNECTION_LOST
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
    return None


@cache
def _pipe() -> tuple[int, int]:
    """
    The pipe, which is made when it is needed first.

    :raises OSError: if no descriptor is left for it now.
    """
    import fcntl

    exit, entry = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    with suppress(OSError):  # the user may have no more
        fcntl.fcntl(entry, fcntl.F_SETPIPE_SZ, _MAX)
    return entry, exit


# Two processes must not take each other's bytes out of one pipe.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _pipe.cache_clear())
