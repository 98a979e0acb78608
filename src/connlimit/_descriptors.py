"""
The process's file descriptors: how many there may be, and whether some are left for one who waits.
"""

from __future__ import annotations

import os
import socket

try:
    import resource
except ImportError:  # Windows has neither the limit nor the module
    resource = None  # type: ignore[assignment]


def limit() -> int | None:
    """
    How many descriptors this process may have open; None if there is no telling.
    """
    if resource is None:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def count() -> int | None:
    """
    How many descriptors this process has open; None if there is no telling.
    """
    try:
        return len(os.listdir("/dev/fd")) - 1  # one is that of the listing
    except OSError:
        return None


def raise_limit() -> None:
    """
    Raise the soft limit to the hard one, as far as the system lets us.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # macOS reports an unlimited hard limit that it does not accept as a soft one.
        for wanted in (hard, 65536, 10240):
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            except (ValueError, OSError):
                continue
            return


def reserve(limit: int) -> int:
    """
    How many of the descriptors are kept free of waiting connections, for the connections that are
    served and for whatever else the process opens.
    """
    return min(max(limit // 8, 32), 1024)


def left_for_waiting() -> bool:
    """
    Whether one more connection may wait.

    The kernel gives out the lowest free number (POSIX, "File Descriptor Allocation"), so a socket
    made now tells how full the table is, and those who wait never get a number in the reserve at its end.
    """
    most = limit()
    if most is None:
        return True
    try:
        with socket.socket() as probe:
            return probe.fileno() < most - reserve(most)
    except OSError:
        return False
