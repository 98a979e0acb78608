"""
Fixtures for what processes share.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.redis import Redis


@pytest.fixture
def settled_redis(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> Redis:
    """
    A Redis that says that it has been up for long.
    """
    from support.redis_limits import redis_limit, script

    monkeypatch.setattr(redis_limit, "_SCRIPT", script().decode())
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
