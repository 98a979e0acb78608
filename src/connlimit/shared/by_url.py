"""
The shared limit that a text asks for: on the command line, in a file, or in an endpoint string.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from connlimit._limiter.settings import Settings
from connlimit._system.urls import masked
from connlimit.interfaces import ILimit

_OF_SEMAPHORES = ("http:", "https:")
_OF_A_REDIS = ("redis:", "rediss:", "unix:", "redis+sentinel:")


def shared_limits(url: str | None, settings: Settings, spell: Callable[[str], str] = str) -> tuple[Any, ...]:
    """
    The limit by which all processes that give the same URL and the same name share ``max_connections``, or
    the slots of the semaphore of that name.

    :param url: that of a Redis, or of a server of semaphores, or None.
    :param spell: how the user spells a setting's name.
    :return: the limit, or nothing without a URL.
    :raises ValueError: if the URL is wrong, or what it takes is not installed or not set.
    """
    if url is None:
        return ()
    shared = spell("shared")
    if url.lower().startswith(_OF_SEMAPHORES):
        from connlimit.shared import ThrottleLimit

        try:
            return (ThrottleLimit(settings.name, url),)
        except ValueError as error:
            raise ValueError(renamed(error, shared)) from None
    if not url.lower().startswith(_OF_A_REDIS):
        raise ValueError(
            f"{shared} must name a Redis, such as redis://localhost, or a server of semaphores, such as "
            f"http://localhost:8000, not {masked(url)!r}"
        )
    if settings.max_connections is None:
        raise ValueError(f"{shared} needs {spell('max_connections')}, how many are served at once in all")
    try:
        from connlimit.shared import RedisLimit
    except ImportError:
        raise ValueError(f"{shared} needs txredisapi: pip install 'connlimit[redis]'") from None
    try:
        return (RedisLimit(settings.name, settings.max_connections, url=url),)
    except ValueError as error:
        raise ValueError(renamed(error, shared)) from None


def follow(limits: Iterable[ILimit], settings: Settings) -> None:
    """
    Have the limits that share ``max_connections`` share as many as the settings say now.
    """
    for limit in limits:
        if hasattr(limit, "slots") and settings.max_connections is not None:
            limit.slots = settings.max_connections


def read_url(file: str, spell: Callable[[str], str] = str, text: str | None = None) -> str:
    """
    The URL that a file has, in its first line. So nobody sees a password in the list of processes.

    :param text: the file's text, if it was read already.
    :raises ValueError: if there is none.
    """
    try:
        lines = (Path(file).read_text() if text is None else text).splitlines()
    except (OSError, ValueError):
        lines = []
    if not lines or not lines[0].strip():
        raise ValueError(f"{spell('shared_file')} must be a file with a URL in its first line, not {file!r}")
    return lines[0].strip()


def renamed(error: ValueError, name: str) -> str:
    """
    The sentence on a wrong URL, with the name by which the user gave it.
    """
    return re.sub(r"\Aurl\b", name, str(error))


async def close(limits: tuple[ILimit, ...]) -> None:
    """
    Give back what is leased, of those limits that lease.
    """
    for limit in limits:
        if hasattr(limit, "close"):
            await limit.close()
