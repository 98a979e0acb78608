"""
The shared limit that a text asks for: on the command line, in a file, or in an endpoint string.
"""

from __future__ import annotations

from typing import Any

from connlimit._settings import Settings
from connlimit.interfaces import ILimit


def shared_limits(url: str | None, settings: Settings) -> tuple[Any, ...]:
    """
    The limit by which all processes that give the same URL and the same name share ``max_connections``, or
    the slots of the semaphore of that name.

    :param url: that of a Redis, or of a server of semaphores, or None.
    :return: the limit, or nothing without a URL.
    :raises ValueError: if the URL is wrong, or what it takes is not installed or not set.
    """
    if url is None:
        return ()
    if url.startswith(("http:", "https:")):
        try:
            from connlimit.shared import ThrottleLimit

            return (ThrottleLimit(settings.name, url),)
        except ImportError:
            raise ValueError("shared needs treq: pip install 'connlimit[semaphores]'") from None
    if settings.max_connections is None:
        raise ValueError("shared needs max_connections, how many are served at once in all")
    try:
        from connlimit.shared import RedisLimit
    except ImportError:
        raise ValueError("shared needs txredisapi: pip install 'connlimit[redis]'") from None
    return (RedisLimit(settings.name, settings.max_connections, url=url),)


async def close(limits: tuple[ILimit, ...]) -> None:
    """
    Give back what is leased, of those limits that lease.
    """
    for limit in limits:
        if hasattr(limit, "close"):
            await limit.close()
