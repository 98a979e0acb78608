"""
Tells systemd how the program is, if it asked for that (``Type=notify``).
"""

from __future__ import annotations

import os
import socket
import time


def notify(state: str) -> bool:
    """
    Send a state, as described in sd_notify(3).

    :return: whether there is anybody to be told.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):  # the abstract namespace
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(state.encode(), address)
    except OSError:
        pass  # it is told again, and nothing depends on it
    return True


def notify_reloading() -> bool:
    """
    Tell that the configuration is being read again; ``READY=1`` ends that.
    """
    return notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
