"""
Slots for jobs against Twisted's own semaphore.
"""

from __future__ import annotations

import gc
import random
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred, DeferredSemaphore
from twisted.internet.task import Clock

from bench.harness.processes import in_turn
from bench.harness.results import Cell, Figure, Result, Table, at_most, ratio
from connlimit import Limiter

_OURS, _THEIRS, _ALONE = "connlimit", "DeferredSemaphore", "a Deferred alone"

#: How many tokens or slots there are for those that need not wait.
_ROOM = 10


def run(quick: bool) -> Iterator[Result]:
    """
    Microseconds for a job that need not wait, and for the end of a wait, by how many wait.
    """
    yield _without_wait(quick)
    yield _ends_of_waits(quick)
    yield _bodies_that_do_not_wait(1000 if quick else 100_000)


def _without_wait(quick: bool) -> Table:
    rounds, number = (3, 200) if quick else (25, 3000)
    semaphore, limiter = DeferredSemaphore(_ROOM), Limiter(_ROOM)

    def acquire_theirs() -> None:
        semaphore.acquire()
        semaphore.release()

    def acquire_ours() -> None:
        slot = limiter.slot()
        slot.acquire()
        slot.release()

    async def enter_theirs() -> None:
        async with semaphore:
            pass

    async def enter_ours() -> None:
        async with limiter.slot():
            pass

    ways: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "acquire and release": (acquire_theirs, acquire_ours),
        "run": (partial(semaphore.run, int), partial(limiter.run, int)),
        "async with": (partial(_drive, enter_theirs), partial(_drive, enter_ours)),
    }
    columns = ("", _THEIRS, _OURS, f"{_OURS}, times that", "aim")
    table = Table("jobs", "A job that need not wait, in microseconds", columns)
    aim = at_most(1.5)
    for way, (theirs, ours) in ways.items():
        samples = in_turn(
            rounds, {_THEIRS: partial(_cost, theirs, number), _OURS: partial(_cost, ours, number)}
        )
        times = ratio(samples[_OURS], samples[_THEIRS], "{:.2f}")
        figures = [Figure.of(each, "{:.2f}") for each in samples.values()]
        table.rows.append((way, *figures, times, aim.judge(times)))
    return table


def _drive(f: Callable[[], Any]) -> None:
    """
    Run a coroutine that does not wait.
    """
    with suppress(StopIteration):
        f().send(None)


def _cost(f: Callable[[], object], number: int) -> float:
    """
    Microseconds of CPU, in the mean of a number of them.
    """
    return timeit.timeit(f, timer=time.process_time, number=number) / number * 1e6


def _ends_of_waits(quick: bool) -> Table:
    counts, acts, rounds = ((100, 500), 50, 2) if quick else ((100, 100_000), 90, 3)
    columns = ("", "", *(f"{count:,} wait" for count in counts), "aim")
    table = Table("jobs-waiting", "The end of a wait, in microseconds, by how many wait", columns, named=2)
    ways: dict[tuple[str, str], Callable[[int, int], float]] = {
        ("is cancelled", _ALONE): lambda count, acts: _each(_cancel, [_deferred() for _ in range(acts)]),
        ("is cancelled", _THEIRS): _cancel_theirs,
        ("is cancelled", _OURS): partial(_cancel_ours, None),
        ("is cancelled", f"{_OURS}, with a time-out"): partial(_cancel_ours, 5.0),
        ("times out", _OURS): _time_out,
    }
    aim = at_most(5)
    for (event, name), measure in ways.items():
        samples = in_turn(rounds, {count: partial(measure, count, acts) for count in counts})
        figures = [Figure.of(each, "{:,.1f}") for each in samples.values()]
        last: Cell = aim.judge(figures[-1]) if _OURS in name else ""
        table.rows.append((event, name, *figures, last))
    return table


def _deferred() -> Deferred[None]:
    return Deferred(lambda deferred: None)


def _cancel(deferred: Deferred[Any]) -> None:
    deferred.cancel()


def _each(act: Callable[[Any], object], on: Sequence[Any]) -> float:
    """
    Microseconds for each, in the mean of all; what they fail with is nobody's.
    """
    for each in on:
        each.addErrback(_ignore)
    gc.collect()
    gc.disable()
    began = time.process_time()
    for each in on:
        act(each)
    took = time.process_time() - began
    gc.enable()
    return took / len(on) * 1e6


def _ignore(failure: object) -> None: ...


def _cancel_theirs(count: int, acts: int) -> float:
    semaphore = DeferredSemaphore(1)
    semaphore.acquire()
    waiting = [semaphore.acquire() for _ in range(count)]
    return _each(_cancel, random.Random(1).sample(waiting, acts))


def _crowd(count: int, timeout: float | None) -> tuple[Limiter, Any, list[Deferred[Any]], Clock]:
    clock = Clock()
    limiter = Limiter(1, clock=clock)
    held = limiter.slot()
    held.acquire()
    return limiter, held, [limiter.slot(timeout=timeout).acquire() for _ in range(count)], clock


def _cancel_ours(timeout: float | None, count: int, acts: int) -> float:
    _limiter, _held, waiting, _clock = _crowd(count, timeout)
    return _each(_cancel, random.Random(1).sample(waiting, acts))


def _time_out(count: int, acts: int) -> float:
    """
    All time out together.
    """
    limiter, _held, waiting, clock = _crowd(count, 5.0)
    for each in waiting:
        each.addErrback(_ignore)
    gc.collect()
    gc.disable()
    began = time.process_time()
    clock.advance(5)
    took = time.process_time() - began
    gc.enable()
    assert not limiter.waiting
    return took / count * 1e6


def _bodies_that_do_not_wait(count: int) -> Table:
    caption = f"{count:,} jobs that wait for one slot, and whose bodies do not wait"
    table = Table("jobs-recursion", caption, ("", "how many run when the slot is free"))
    for name in (_THEIRS, _OURS):
        ran: list[int] = []
        if name == _THEIRS:
            semaphore = DeferredSemaphore(1)
            semaphore.acquire()
            results = [semaphore.run(ran.append, number) for number in range(count)]
            semaphore.release()
        else:
            limiter = Limiter(1, clock=Clock())
            held = limiter.slot()
            held.acquire()
            results = [limiter.run(ran.append, number) for number in range(count)]
            held.release()
        for each in results:
            each.addErrback(_ignore)
        table.rows.append((name, f"{len(ran):,}"))
    return table
