"""
What is right in a program, and in which a type checker has to find no mistake. It is checked, and not run.
"""

from collections.abc import Callable, Hashable
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from connlimit import Limiter, Snapshot
from connlimit.limits import PerKey, Total
from connlimit.observers import LimiterObserver
from connlimit.refusals import Say


class Order:
    def __init__(self, settings: object, peer: Callable[[Any], Hashable]) -> None: ...


def is_friend(address: IPv4Address) -> bool:
    return address.host == "192.0.2.1"


values: dict[str, Any] = {"max_waiting": 5}
limiter = Limiter(
    100, max_per_peer=3, limits=[Total(3), PerKey(2, str)], observers=[LimiterObserver()], clock=Clock()
)
Limiter(
    max_connections=None,
    wait_timeout=0.5,
    peer_prefix=(24, 48),
    order=Order,
    exempt=["127.0.0.0/8"],
    notice=(5, b"please wait"),
    refusal=Say(b"full"),
)
Limiter(exempt=is_friend, refusal="http", order="adaptive", departed_on_half_close=True, over_peer="refuse")
Limiter(**values)
limiter.max_connections = 4
limiter.max_connections = None
limiter.exempt = ["127.0.0.0/8"]
limiter.order = "lifo"
limiter.reconfigure(order="lifo", wait_timeout=3)
limiter.reconfigure(**values)
drained: Deferred[None] = limiter.drain(3)
maximum: int | None = limiter.max_connections
snapshot: Snapshot = limiter.snapshot()
active: int = limiter.active + snapshot.active
