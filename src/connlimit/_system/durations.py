"""
Durations as texts: ``300000ms``, ``5min``, ``2h 37min``.

There is one grammar for all. The units are those of the Rust library humantime, with which Throttle reads
them; there the unit is needed, and everywhere else a number alone stands for seconds.
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache

#: The longest duration, in seconds: a year, and a leap day.
LONGEST = 366 * 86400.0

_UNITS = {
    unit: seconds
    for seconds, units in (
        (1e-9, "ns nsec nanos"),
        (1e-6, "us usec µs"),
        (1e-3, "ms msec millis"),
        (1.0, "s sec secs second seconds"),
        (60.0, "m min mins minute minutes"),
        (3600.0, "h hr hrs hour hours"),
        (86400.0, "d day days"),
        (7 * 86400.0, "w wk wks week weeks"),
        (30.44 * 86400.0, "M month months"),
        (365.25 * 86400.0, "y yr yrs year years"),
    )
    for unit in units.split()
}

_PART = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Zµ]+)\s*", re.ASCII)

_NUMBER = re.compile(r"[-+]?[0-9]*\.?[0-9]*", re.ASCII)

_MAX_CHARACTERS = 100


def seconds(text: str) -> float:
    """
    The seconds that a text stands for, such as ``30``, ``30s``, ``500ms``, ``5min`` or ``2h 30min``.

    :raises ValueError: if it stands for none.
    """
    text = text.strip()
    if _NUMBER.fullmatch(text) and any(map(str.isdecimal, text)):
        return float(text)
    value = _seconds(text) if len(text) <= _MAX_CHARACTERS else None
    if value is None:
        raise ValueError(f"{_short(text)} is not a duration")
    return value


def is_seconds(value: object, minimum: float = 0.0) -> bool:
    """
    Whether a value is a number of seconds, as it is given in code.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return minimum <= value <= sys.float_info.max


def duration(name: str, text: object) -> float:
    """
    The seconds that a text stands for.

    :param name: what it is the value of.
    :raises ValueError: if it stands for none, or for more than `LONGEST`.
    """
    seconds = _seconds(text) if isinstance(text, str) and len(text) <= _MAX_CHARACTERS else None
    if seconds is None:
        raise ValueError(f"{name} must be a duration such as 300ms, 5min or 2h 30min, not {_short(text)}")
    if seconds > LONGEST:
        raise ValueError(f"{name} must be at most {LONGEST / 86400:.0f} days, not {_short(text)}")
    return seconds


@lru_cache(1024)
def _seconds(text: str) -> float | None:
    """
    The seconds that a text stands for; None if it stands for none.
    """
    if text.strip() == "0":
        return 0.0
    seconds, at = 0.0, 0
    while at < len(text):
        part = _PART.match(text, at)
        if part is None or part[2] not in _UNITS:
            return None
        seconds += float(part[1]) * _UNITS[part[2]]
        at = part.end()
    return seconds if text else None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}…"
