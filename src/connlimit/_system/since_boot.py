"""
A clock that nobody sets, and that goes on while the machine is suspended.
"""

from __future__ import annotations

import time

#: Linux's monotonic clock stands still during a suspension, and another one does not.
_CLOCK: int | None = getattr(time, "CLOCK_BOOTTIME", None)


def since_boot() -> float:
    """
    Seconds since some moment in the past.
    """
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)
