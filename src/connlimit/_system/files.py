"""
Files that users name: read at once and whole, or not at all.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

#: More bytes than any file that is meant has.
MAX_BYTES = 1 << 20


def contents(path: Path) -> bytes:
    """
    All that is in a regular file.

    A FIFO, a device or another program's end of a pipe could keep its reader waiting for ever.

    :raises OSError: if it cannot be read, is no regular file, or is too large; ``strerror`` says which.
    """
    with open(path, "rb", opener=_open) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MAX_BYTES} bytes")
    return data


def _open(path: str, flags: int) -> int:
    # To open a FIFO waits for a writer, unless it is told not to.
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return descriptor
