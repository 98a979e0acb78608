"""
A clock that nobody sets, and that goes on while the machine is suspended.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

# Linux's monotonic clock stands still during a suspension, and another one does not.
_CLOCK: int | None = getattr(time, "CLOCK_BOOTTIME", None)

#: Seconds since some moment in the past. Without a function of ours around it, since each connection asks.
since_boot: Callable[[], float] = time.monotonic if _CLOCK is None else partial(time.clock_gettime, _CLOCK)
