"""
Limiter: its settings and counters, what can be asked of it, and what can be changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakValueDictionary

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.logger import Logger
from zope.interface import implementer

from connlimit._job.job import Job
from connlimit._limiter.admission import Admission
from connlimit._limiter.audience import Audience
from connlimit._limiter.dry_run import DryRun
from connlimit._limiter.peers import busiest, exhausted
from connlimit._limiter.settings import (
    FIELDS,
    Auto,
    Exempt,
    Notice,
    Order,
    OverPeer,
    Setting,
    Settings,
    SettingsDict,
)
from connlimit._limiter.values import did_you_mean
from connlimit._system.bounded_log import BoundedLog
from connlimit._system.clock import ReactorClock, clock_of
from connlimit.interfaces import (
    DESCRIPTORS,
    FULL,
    PEER,
    ILimit,
    ILimiter,
    ILimiterObserver,
    IOccupant,
    Snapshot,
)
from connlimit.observers import LimiterLog

if TYPE_CHECKING:
    if sys.version_info >= (3, 11):
        from typing import Unpack
    else:
        from typing_extensions import Unpack


@implementer(ILimiter)
class Limiter:
    """
    Limits, the queue of those who wait for them, and what happens when both are full.

    One limiter may serve any number of factories; its limits then hold across them. Every setting
    is also an attribute and can be changed at any time: more room admits at once, less room ends nobody.

    :ivar admission: what factories and protocols tell it.
    """

    # Named, so that what is set by a mistyped name is an error.
    __slots__ = ("__weakref__", "_audience", "_log_observer", "admission")

    max_connections = Setting[int | None]()
    max_per_peer = Setting[int | None]()
    peer_prefix = Setting[Sequence[int]]()
    over_peer = Setting[OverPeer]()
    max_rate = Setting[float | None]()
    max_burst = Setting[int | None]()
    max_waiting = Setting[int | None]()
    wait_timeout = Setting[float | None]()
    order = Setting[Order]()
    adaptive_target = Setting[float]()
    adaptive_interval = Setting[float]()
    departed_on_half_close = Setting[Auto]()
    notice = Setting[Notice]()
    idle_timeout = Setting[float | None]()
    exempt = Setting[Exempt]()
    refusal = Setting[Any]()
    dry_run = Setting[bool]()
    log = Setting[bool]()
    name = Setting[str]()

    # Limits, observers and the clock provide zope interfaces, of which not every type checker knows.
    def __init__(
        self,
        max_connections: int | None = None,
        *,
        max_per_peer: int | None = None,
        peer_prefix: Sequence[int] = (32, 64),
        over_peer: OverPeer = "wait",
        max_rate: float | None = None,
        max_burst: int | None = None,
        max_waiting: int | None = None,
        wait_timeout: float | None = None,
        order: Order = "fifo",
        adaptive_target: float = 0.5,
        adaptive_interval: float = 10.0,
        departed_on_half_close: Auto = "auto",
        notice: Notice = None,
        idle_timeout: float | None = None,
        exempt: Exempt = None,
        refusal: Any = "close",
        dry_run: bool = False,
        log: bool = True,
        name: str = "default",
        limits: Iterable[Any] = (),
        observers: Iterable[Any] = (),
        clock: Any = None,
        **unknown: NoReturn,
    ) -> None:
        """
        :param max_connections: how many connections are served at once; None for no limit, 0 for nobody.
        :param limits: further limits, each an `ILimit`; a connection is served when it has a slot of each.
        :param observers: those who observe it, each an `ILimiterObserver`.
        :param clock: where the time comes from, an `IReactorTime`; the reactor if not given.
        :raises TypeError: for an unknown setting or a value of a wrong type.
        :raises ValueError: for a wrong value.
        """
        given = {name: value for name, value in locals().items() if name in FIELDS}
        for wrong in unknown:
            known = [*FIELDS, "limits", "observers", "clock"]
            hint = did_you_mean(wrong, known) or f"there are {', '.join(known)}"
            raise TypeError(f"{wrong} is not a setting; {hint}")
        settings = Settings().evolve(given)
        time: IReactorTime = ReactorClock() if clock is None else clock_of(_checked_clock(clock))
        bounded_log = BoundedLog(Logger(namespace="connlimit.limiter"), time)
        self._audience = Audience(self, observers, bounded_log)
        self._log_observer: LimiterLog | None = None
        self.admission = Admission(settings, limits, time, self._audience, bounded_log)
        if not any(issubclass(type(each), LimiterLog) for each in self._audience.everybody):
            self._switch_log()
        if dry_run:
            self._switch_dry_run()
        # Last, since a limit may call back at once.
        self.admission.subscribe()

    if not TYPE_CHECKING:
        # A type checker finds it by itself.

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(self._has_no(name), name=name, obj=self)

        def __setattr__(self, name: str, value: object) -> None:
            try:
                super().__setattr__(name, value)
            except AttributeError:
                if hasattr(type(self), name):
                    raise  # it is there, but cannot be set
                raise AttributeError(self._has_no(name), name=name, obj=self) from None

    def _has_no(self, name: str) -> str:
        hint = did_you_mean(name, [each for each in dir(type(self)) if not each.startswith("_")])
        return f"a Limiter has no {name}{hint and f'; {hint}'}"

    def __repr__(self) -> str:
        return (
            f"<Limiter {self.settings.name}: {self.active} of {self.settings.max_connections} served, "
            f"{self.waiting} waiting>"
        )

    # What can be asked

    @property
    def settings(self) -> Settings:
        """
        All settings, frozen; change them by `reconfigure` or by their attributes.
        """
        return self.admission.settings

    @property
    def limits(self) -> tuple[ILimit, ...]:
        """
        The further limits that it was given.
        """
        return self.admission.limits.given

    @property
    def clock(self) -> IReactorTime:
        """
        Where the time comes from.
        """
        return self.admission.clock

    @property
    def observers(self) -> tuple[ILimiterObserver, ...]:
        """
        Who observes it.
        """
        return self._audience.everybody

    @property
    def active(self) -> int:
        """
        How many connections hold a slot.
        """
        return self.admission.slots.count()

    @property
    def waiting(self) -> int:
        """
        How many connections wait in the queue.
        """
        return len(self.admission.queue)

    def snapshot(self) -> Snapshot:
        """
        Every counter and gauge, at this instant.
        """
        admission = self.admission
        admission.reclaim_lost()
        counts, queue, now = admission.counts, admission.queue, self.clock.seconds()
        return Snapshot(
            active=self.active,
            waiting=self.waiting,
            accepted=counts.accepted,
            served=self.active + counts.finished,
            finished=counts.finished,
            departed=counts.departed,
            refused=MappingProxyType(dict(counts.refused)),
            longest_wait=max(0.0, now - queue.oldest()[1]) if queue else 0.0,
            waits=counts.waits,
            wait_seconds=counts.wait_seconds,
            reclaimed=counts.reclaimed,
            idle_closed=counts.idle_closed,
            exempt=len(admission.slots.exempt),
            exempted=counts.exempted,
            backlog=admission.backlog(),
            draining=admission.is_draining,
            dry_run=admission.dry_run.snapshot() if admission.dry_run else None,
        )

    def has_room(self) -> bool:
        """
        Whether a newcomer would be served at once, as far as that does not depend on its peer.
        """
        return self.admission.has_room()

    def busiest_peers(self, count: int) -> list[tuple[Hashable, int, int]]:
        """
        The peers with the most connections: each with how many are active and how many wait. Looks at all.
        """
        return exhausted(self.find_busiest_peers(count))

    def find_busiest_peers(self, count: int) -> Generator[None, None, list[tuple[Hashable, int, int]]]:
        """
        The same, as a generator that returns it: between two of its steps others can have their turn.
        """
        admission = self.admission
        active, waiting = list(admission.slots.active.values()), list(admission.queue.everybody())
        return busiest(admission.limits.peer, active, waiting, count)

    def first_waiting(self, count: int) -> list[tuple[IAddress, float]]:
        """
        Those who have waited longest: their addresses, and how many seconds they have waited.
        """
        queue, now = self.admission.queue, self.clock.seconds()
        return [(each.address, max(0.0, now - queue.arrival(each))) for each in queue.first(count)]

    def limited_by(self, reason: str = FULL, connection: IOccupant | None = None) -> str:
        """
        In words, which limit makes connections wait now, or why one was refused.

        :param reason: why.
        :param connection: which.
        """
        settings, limits = self.settings, self.admission.limits
        if reason == DESCRIPTORS:
            return "descriptors run short"
        if reason == PEER and connection is not None:
            return limits.peer_in_words(settings, connection)
        taken, queue, maximum = self.admission.slots.taken, self.admission.queue, settings.max_waiting
        words = limits.in_words(settings, taken, self.active, queue, connection)
        return words if maximum is None or len(queue) < maximum else f"{words}, max_waiting is {maximum}"

    # Work of any kind

    def slot(self, key: Any = None, weight: int = 1, timeout: float | None = None) -> Job:
        """
        A slot for a job, to be taken by ``async with``, or by what a `Job` can do besides. It waits in the
        same queue as connections do, by the same rules; if it is refused, that raises `Refused`.

        :param key: what stands for a peer, as ``max_per_peer`` counts; None for none. It may be the
            address of a client, if it is to be counted as that.
        :param weight: how many slots it takes. As long as it is the first of the queue and there are fewer,
            nobody overtakes it. If ``max_connections`` is lowered below this while it waits, it is refused as
            ``full``, but not if nobody is served, as that is 0. All other limits count it once.
        :param timeout: how many seconds it waits at the most, besides ``wait_timeout``; 0 if it does not.
        :raises TypeError: for a value of a wrong type.
        :raises ValueError: for a wrong value, such as a weight of more than ``max_connections``.
        """
        if type(weight) is not int or weight != 1:
            maximum = self.admission.limits.maximum
            if type(weight) is not int:
                raise TypeError(f"weight must be a whole number, not {weight!r}")
            if weight < 1:
                raise ValueError(f"weight must be at least 1, not {weight}")
            if 0 < maximum < weight:
                raise ValueError(f"weight must be at most max_connections, which is {maximum}, not {weight}")
        if timeout is not None:
            if not isinstance(timeout, (int, float)):
                raise TypeError(f"timeout must be a number of seconds, not {timeout!r}")
            if not timeout >= 0:
                raise ValueError(f"timeout must be at least 0 seconds, not {timeout}")
        if key is not None:
            hash(key)
        return Job(self.admission, key, weight, timeout)

    def run(self, f: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Deferred[Any]:
        """
        Call a function when there is a slot for it, and hold that until it is over: until its Deferred has
        fired, or its coroutine has ended, if it returns one. See `Job.run`.

        :return: fires with its result, or fails, with `Refused` if there is no slot for it.
        """
        return self.slot().run(f, *args, **kwargs)

    # What can be changed

    def reconfigure(self, **settings: Unpack[SettingsDict]) -> None:
        """
        Change several settings at once, all or none.

        :raises TypeError: for an unknown setting or a value of a wrong type; nothing has changed.
        :raises ValueError: for a wrong value; nothing has changed.
        """
        old, new = self.settings, self.settings.evolve(settings)
        changes = {
            name: (getattr(old, name), getattr(new, name))
            for name in settings
            if getattr(old, name) != getattr(new, name)
        }
        if not changes:
            return
        admission = self.admission
        admission.change(new, changes.keys())
        if "dry_run" in changes:
            self._switch_dry_run()
        elif admission.dry_run is not None:
            admission.dry_run.reconfigure({name: value for name, (_, value) in changes.items()})
        self._audience.tell("reconfigured", changes)
        if "log" in changes:
            self._switch_log()
        admission.take_effect(changes.keys())

    def _switch_dry_run(self) -> None:
        admission = self.admission
        if admission.dry_run is not None:
            self.remove_observer(admission.dry_run)
            admission.dry_run.report()
            admission.dry_run = None
        if self.settings.dry_run:
            tried_out = DryRun.tried_out(attrs.asdict(self.settings, recurse=False))
            shadow = Limiter(clock=self.clock, log=False, **tried_out)
            admission.dry_run = DryRun(self, shadow)
            self.add_observer(admission.dry_run)

    def _switch_log(self) -> None:
        if self._log_observer is not None:
            self.remove_observer(self._log_observer)
            self._log_observer = None
        if self.settings.log:
            self._log_observer = LimiterLog()
            self.add_observer(self._log_observer)

    def add_observer(self, observer: ILimiterObserver) -> None:
        """
        Tell an observer what happens from now on.
        """
        self._audience.add(observer)

    def remove_observer(self, observer: ILimiterObserver) -> None:
        """
        Tell an observer nothing more.
        """
        self._audience.remove(observer)

    def drain(self, timeout: float | None = None) -> Deferred[None]:
        """
        Refuse newcomers and the queue, wait for the active connections, then close what is left.

        A drained limiter serves nobody any more. Connections that are between two requests are closed at
        once, as far as that can be told.

        :param timeout: seconds until the active connections are closed; None waits as long as it takes.
        :return: fires when no connection is active, and those who were refused have been told.
        """
        self.admission.refuse_all()
        return self.admission.wait_for(self.admission.slots.occupants(), timeout)


#: The limiters of this process that something stands behind, in the order in which they came into use, as
#: long as somebody else holds them.
IN_USE: WeakValueDictionary[int, Limiter] = WeakValueDictionary()


def _checked_clock(clock: object) -> IReactorTime:
    if not (hasattr(clock, "seconds") and hasattr(clock, "callLater")):
        raise TypeError(f"clock must provide IReactorTime, as the reactor and task.Clock do, not {clock!r}")
    return clock  # type: ignore[return-value]
