"""
Limits that processes, machines and programs in any language share.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from connlimit._redis.address import RedisAddress
    from connlimit.shared.redis_limit import RedisLimit, set_slots
    from connlimit.shared.semaphore_limit import ThrottleLimit

__all__ = ["RedisAddress", "RedisLimit", "ThrottleLimit", "set_slots"]

_MODULES = {
    "RedisAddress": "_redis.address",
    "RedisLimit": "shared.redis_limit",
    "set_slots": "shared.redis_limit",
    "ThrottleLimit": "shared.semaphore_limit",
}


def __getattr__(name: str) -> Any:
    # When it is asked for, since each needs another library.
    if name in _MODULES:
        return getattr(import_module(f"connlimit.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
