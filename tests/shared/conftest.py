"""
Fixtures for what processes share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
from support.redis import Redis


@pytest.fixture
def settled_redis(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> Redis:
    """
    A Redis that says that it has been up for long.
    """
    from support.redis_limits import script

    from connlimit._redis import link

    monkeypatch.setattr(link, "_SCRIPT", script())
    monkeypatch.setattr(link, "_SHA", hashlib.sha1(script()).hexdigest().encode())
    return redis


@pytest.fixture
def proxied(redis: Redis) -> Iterator[object]:
    """
    A way to the Redis that can be made slow, or deaf.
    """
    from support.redis_limits import Switch

    switch = Switch(redis)
    yield switch
    switch.stop()
