"""
Time: durations by the kernel's monotonic clock, and timers that keep to it.

Twisted's reactors measure time by the wall clock: if that is set back by an hour, each of their timers is an
hour late. So each reactor gets one timer of the kernel's (timerfd of Linux, kqueue of macOS and the BSDs), a
reader like any other. Where the kernel has none, the reactor's own timers are used, and are late then.
"""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from heapq import heapify, heappop, heappush
from itertools import count
from time import monotonic
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from twisted.internet.base import DelayedCall, ReactorBase
from twisted.internet.interfaces import IDelayedCall, IReactorTime, IReadDescriptor
from twisted.logger import Logger
from zope.interface import implementer

_select: Any = select  # type checkers know that of their own platform alone


@implementer(IReactorTime)
class ReactorClock:
    """
    Time in a reactor that may become known only later: that of the first connection. Until then timers run in
    the global reactor.
    """

    def __init__(self, reactor: Any = None) -> None:
        self._reactor = reactor
        # The timers that were set before the reactor was known.
        self._early: list[DelayedCall] = []

    def run_in(self, reactor: Any) -> None:
        """
        Let the timers run in this reactor, unless it is known already where.
        """
        if self._reactor is None:
            self._reactor = reactor
            for call in self._early:
                if call.active():
                    call.canceller(call)
                    _timers_of(reactor).add(call)
            self._early.clear()

    def seconds(self) -> float:
        """
        Seconds since some instant, which never go back.
        """
        return monotonic()

    def callLater(
        self, delay: float, callable: Callable[..., object], *args: Any, **kwargs: Any
    ) -> IDelayedCall:
        call = DelayedCall(
            monotonic() + max(0.0, delay), callable, args, kwargs, _no_timers, _no_timers, monotonic
        )
        _timers_of(self._known()).add(call)
        if self._reactor is None:
            self._early = [*(each for each in self._early if each.active()), call]
        return call

    def _known(self) -> Any:
        if self._reactor is not None:
            return self._reactor
        from twisted.internet import reactor

        return reactor

    def getDelayedCalls(self) -> Sequence[IDelayedCall]:
        """
        Those of all clocks of this reactor.
        """
        return _timers_of(self._known()).pending()


def _no_timers(call: DelayedCall) -> None:
    """
    What a timer tells that runs nowhere yet.
    """


def clock_of(reactor: Any) -> IReactorTime:
    """
    The clock of a reactor; what is no real reactor, such as `twisted.internet.task.Clock`, is its own.
    """
    return ReactorClock(reactor) if isinstance(reactor, ReactorBase) else reactor


class _Alarm(Protocol):
    """
    A timer of the kernel's: its descriptor can be read when it is time.
    """

    def fileno(self) -> int: ...

    def set(self, seconds: float) -> None:
        """
        Ring once, in this number of seconds; what was set before is void.
        """

    def heard(self) -> None:
        """
        It has rung.
        """


class _Timerfd:
    """
    Linux, timerfd_create(2). Python knows it from 3.13 on, and the C library always.
    """

    def __init__(self) -> None:
        self._settime = _libc().timerfd_settime
        descriptor: int = _libc().timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if descriptor < 0:
            raise OSError("timerfd_create failed")
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def set(self, seconds: float) -> None:
        nanoseconds = max(1, int(seconds * 1e9))  # 0 would switch it off
        value = struct.pack("qqqq", 0, 0, *divmod(nanoseconds, 10**9))  # struct itimerspec
        self._settime(self._descriptor, 0, value, None)

    def heard(self) -> None:
        with suppress(OSError):
            os.read(self._descriptor, 8)


_CLOCK_MONOTONIC = 1  # include/uapi/linux/time.h


@cache
def _libc() -> Any:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.timerfd_settime.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p]
    libc.timerfd_create.argtypes = [ctypes.c_int, ctypes.c_int]
    return libc


class _KqueueTimer:
    """
    macOS and the BSDs, kqueue(2).
    """

    def __init__(self) -> None:
        self._kqueue = _select.kqueue()
        self.fileno = self._kqueue.fileno

    def set(self, seconds: float) -> None:
        event = _select.kevent(
            1,
            filter=_select.KQ_FILTER_TIMER,
            flags=_select.KQ_EV_ADD | _select.KQ_EV_ONESHOT,
            data=max(1, round(seconds * 1000)),
        )
        self._kqueue.control([event], 0, 0)

    def heard(self) -> None:
        self._kqueue.control(None, 1, 0)


def _new_alarm() -> _Alarm | None:
    """
    A timer of the kernel's; None if it has none.
    """
    try:
        return _KqueueTimer() if hasattr(select, "kqueue") else _Timerfd()
    except (AttributeError, OSError):  # the C library knows no such call, or no descriptor is left
        return None


@implementer(IReadDescriptor)
class _Timers:
    """
    The timers of one reactor.
    """

    _log = Logger(namespace="connlimit.clock")

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        # Those that were cancelled or moved leave an entry behind, until that comes first or most are such.
        self._calls: list[tuple[float, int, DelayedCall]] = []
        self._number = count()
        self._active = 0
        # When the alarm or, without one, the reactor's own timer is set for.
        self._set_for: float | None = None
        self._own: IDelayedCall | None = None
        self._pid = os.getpid()
        self._alarm = _new_alarm() if hasattr(reactor, "addReader") else None

    def add(self, call: DelayedCall) -> None:
        """
        Make the call when it is due.
        """
        call.canceller, call.resetter = self._cancel, self._moved
        self._active += 1
        self._push(call)
        self._set()

    def pending(self) -> list[DelayedCall]:
        """
        What is still to be called.
        """
        return list({id(call): call for _, _, call in self._calls if call.active()}.values())

    def _push(self, call: DelayedCall) -> None:
        heappush(self._calls, (call.getTime(), next(self._number), call))

    def _cancel(self, call: DelayedCall) -> None:
        self._active -= 1
        if not self._active:
            self._calls.clear()
            self._unset()
        elif len(self._calls) > 50 + 2 * self._active:
            self._calls = [entry for entry in self._calls if entry[2] is not call and entry[2].active()]
            heapify(self._calls)

    def _moved(self, call: DelayedCall) -> None:
        # To a time that is sooner; one that is put off is found so when its entry comes up.
        self._push(call)
        self._set()

    def _set(self) -> None:
        """
        See to it that we are called when the first is due, and seldom before.
        """
        if self._pid != os.getpid():
            # A child shares the alarm and the reactor's epoll with its parent, and must not touch them.
            self._pid, self._alarm, self._own, self._set_for = os.getpid(), None, None, None
        due = self._calls[0][0]
        if self._set_for is not None and self._set_for <= due:
            return
        seconds = max(0.0, due - monotonic())
        if self._alarm is not None:
            self._alarm.set(seconds)
            self._reactor.addReader(self)
        else:
            self._unset()
            self._own = self._reactor.callLater(seconds, self.doRead)
        self._set_for = due

    def _unset(self) -> None:
        self._set_for = None
        if self._alarm is not None:
            self._reactor.removeReader(self)
        elif self._own is not None:
            self._own.cancel()
            self._own = None

    def doRead(self) -> None:
        """
        Some of the timers are due.
        """
        if self._alarm is not None:
            self._alarm.heard()
        self._own = self._set_for = None
        now = monotonic()
        # Those that are added meanwhile have their turn next time.
        due = []
        while self._calls and self._calls[0][0] <= now:
            due.append(heappop(self._calls)[2])
        for call in due:
            if call.active() and call.getTime() > now:
                self._push(call)
            elif call.active():
                self._active -= 1
                call.called = 1
                try:
                    call.func(*call.args, **call.kw)
                except Exception:
                    self._log.failure("{call} failed", call=call.func)
        if self._active:
            self._set()
        else:
            self._unset()

    def fileno(self) -> int:
        """
        The alarm's descriptor.
        """
        return -1 if self._alarm is None else self._alarm.fileno()

    def logPrefix(self) -> str:
        """
        What the log calls this.
        """
        return "connlimit timers"

    def connectionLost(self, reason: object) -> None:
        """
        The reactor shuts down.
        """


_of_reactors: WeakKeyDictionary[Any, _Timers] = WeakKeyDictionary()


def _timers_of(reactor: Any) -> _Timers:
    timers = _of_reactors.get(reactor)
    if timers is None:
        timers = _of_reactors[reactor] = _Timers(reactor)
    return timers
