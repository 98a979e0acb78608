"""
What there is to see of semaphores and peers: for pages, for metrics, and for who asks over HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from connlimit.semaphores.server.state import State


def semaphore_facts(state: State, now: float) -> list[dict[str, Any]]:
    """
    The facts of each configured semaphore, sorted by name: counts, and seconds.
    """
    facts = []
    for name, semaphore in sorted(state.semaphores.items()):
        if semaphore.is_configured:
            first = next(iter(semaphore.queue.values()), None)
            facts.append(
                {
                    "name": name,
                    "full_count": semaphore.full_count,
                    "level": semaphore.level,
                    "acquired": semaphore.acquired,
                    "pending": semaphore.pending,
                    "longest_pending": max(0.0, now - first.since) if first else 0.0,
                }
            )
    return facts


def holders(state: State, name: str, now: float, maximum: int) -> list[dict[str, Any]]:
    """
    Who holds a semaphore, how much of it, and since how many seconds; longest first.
    """
    return [
        {"peer": number, "count": lock.count, "for": max(0.0, now - lock.since)}
        for number, lock in islice(state.semaphores[name].holders.items(), maximum)
    ]


def peer_facts(state: State, now: float, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
    """
    What each of these peers holds and wants, since how many seconds, and in how many it expires.

    Those that are forgotten meanwhile are left out.
    """
    for number in numbers:
        peer = state.peers.get(number)
        if peer is None:
            continue
        pending = None
        if peer.pending is not None:
            lock = state.semaphores[peer.pending].queue[number]
            pending = {"semaphore": peer.pending, "count": lock.count, "for": max(0.0, now - lock.since)}
        yield {
            "id": number,
            "acquired": {
                name: {"count": lock.count, "for": max(0.0, now - lock.since)}
                for name, lock in peer.held.items()
            },
            "pending": pending,
            "expires_in": max(0.0, peer.expires - now),
        }


_METRICS = (
    ("acquired", "acquired", "Sum of all acquired locks."),
    (
        "longest_pending_sec",
        "longest_pending",
        "Time the longest pending peer is waiting until now, to acquire a lock to a semaphore.",
    ),
    ("max", "full_count", "Maximum allowed lock count for this semaphore."),
    ("pending", "pending", "Sum of all pending locks"),
)


def metrics_text(facts: list[dict[str, Any]]) -> str:
    """
    The metrics of Throttle, in the text format of Prometheus.

    :param facts: what `semaphore_facts` tells.
    """
    lines = []
    for metric, key, text in _METRICS if facts else ():
        lines += [f"# HELP throttle_{metric} {text}", f"# TYPE throttle_{metric} gauge"]
        for each in facts:
            label = each["name"].replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
            lines.append(f'throttle_{metric}{{semaphore="{label}"}} {int(each[key])}')
    return "".join(f"{line}\n" for line in lines)
