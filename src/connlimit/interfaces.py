"""
What occupants, limits, orders, refusals and observers are to each other, and what a limiter shows of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IProtocol, IProtocolFactory
from zope.interface import Attribute, Interface

FULL = "full"
TIMEOUT = "timeout"
PEER = "peer"
DESCRIPTORS = "descriptors"
DRAINING = "draining"

#: Why a connection can be refused.
REASONS = (FULL, TIMEOUT, PEER, DESCRIPTORS, DRAINING)


#: The kinds of figures. Of several limiters together, gauges and counters are added up, and of maxima the
#: highest is taken; a flag is not added up.
GAUGE = "gauge"
COUNTER = "counter"
MAXIMUM = "maximum"
FLAG = "flag"


@attrs.frozen(kw_only=True)
class Figure:
    """
    What there is to know of a field of `Snapshot`, for whatever shows it or adds it up.

    :ivar kind: ``gauge``, how much there is now; ``counter``, how much there has been since the limiter was
        made; ``maximum``, the highest of several; ``flag``, whether something is so.
    :ivar unit: ``connections`` or ``seconds``; empty for a flag.
    :ivar help: what it tells.
    :ivar title: what it is called on the status page and in a terminal; if not given, as the field is.
    :ivar label: what it is counted by; None if it is one number.
    :ivar setting: the setting by which it is limited, or None.
    :ivar metric: the name of its metric, if that is not its own; if several share one, it tells them apart by
        their ``state``.
    """

    kind: str
    unit: str
    help: str
    title: str = ""
    label: str | None = None
    setting: str | None = None
    metric: str | None = None


def figure(kind: str, help: str, unit: str = "connections", **more: str) -> dict[str, Figure]:
    """
    The metadata of a field that is a figure.

    :param more: what else a `Figure` has.
    """
    return {"figure": Figure(kind=kind, help=help, unit=unit, **more)}


@attrs.frozen
class Snapshot:
    """
    What a limiter has done since it was made, and what it holds now.

    ``accepted`` is always ``active + waiting + finished + departed`` and all of ``refused``; the exempt are
    counted apart. A field that is None is not known.
    """

    active: int = attrs.field(
        metadata=figure(
            GAUGE,
            "connections that hold a slot",
            title="served",
            setting="max_connections",
            metric="connections",
        )
    )
    waiting: int = attrs.field(
        metadata=figure(
            GAUGE, "connections that wait in the queue", setting="max_waiting", metric="connections"
        )
    )
    accepted: int = attrs.field(metadata=figure(COUNTER, "connections that the limiter was asked about"))
    served: int = attrs.field(
        metadata=figure(
            COUNTER, "connections that got a slot, at once or after a wait", title="served so far"
        )
    )
    finished: int = attrs.field(metadata=figure(COUNTER, "connections that were served and are over"))
    departed: int = attrs.field(
        metadata=figure(COUNTER, "clients that went away while they waited", title="departed while waiting")
    )
    refused: Mapping[str, int] = attrs.field(
        metadata=figure(COUNTER, "connections that were turned away, by reason", label="reason")
    )
    longest_wait: float = attrs.field(
        metadata=figure(
            MAXIMUM, "how long the first of the queue has waited; 0 if nobody waits", unit="seconds"
        )
    )
    waits: int = attrs.field(
        metadata=figure(COUNTER, "connections that were served after a wait", title="served after a wait")
    )
    wait_seconds: float = attrs.field(
        metadata=figure(
            COUNTER,
            "how long those who were served after a wait have waited, all together",
            unit="seconds",
            title="waited in all",
            metric="waited",
        )
    )
    reclaimed: int = attrs.field(
        metadata=figure(
            COUNTER,
            "of the finished, those whose protocol did not learn of the end of its socket",
            title="slots reclaimed",
        )
    )
    idle_closed: int = attrs.field(
        metadata=figure(
            COUNTER,
            "connections that were closed because they were idle while others waited",
            title="closed when idle",
        )
    )
    exempt: int = attrs.field(
        metadata=figure(
            GAUGE, "exempt connections that are served now", title="exempt now", metric="connections"
        )
    )
    exempted: int = attrs.field(metadata=figure(COUNTER, "exempt connections so far", title="exempt so far"))
    backlog: int | None = attrs.field(
        metadata=figure(
            MAXIMUM,
            "connections that the kernel has accepted and we have not, on all ports, which workers share",
            title="in the kernel's backlog",
        )
    )
    draining: bool = attrs.field(metadata=figure(FLAG, "whether the limiter is being drained", unit=""))
    #: In a dry run, what would have happened without it; None otherwise.
    dry_run: Snapshot | None

    def figures(self) -> dict[str, Any]:
        """
        All figures by their names, as JSON can say them.
        """
        values = {name: getattr(self, name) for name in FIGURES}
        return {name: dict(value) if FIGURES[name].label else value for name, value in values.items()}


def figures_of(cls: type[Snapshot]) -> dict[str, Figure]:
    """
    The figures of a class of snapshots, by the names of their fields.
    """
    figures = {name: field.metadata.get("figure") for name, field in attrs.fields_dict(cls).items()}
    return {
        name: attrs.evolve(figure, title=figure.title or name.replace("_", " "))
        for name, figure in figures.items()
        if figure is not None
    }


#: The one table from which are made what workers report, the sums of it, the metrics, the status page, its
#: JSON, ``connlimit-top``, and the reference.
FIGURES: Mapping[str, Figure] = figures_of(Snapshot)


class IOccupant(Interface):
    """
    What takes a slot: what limits, queues and observers may look at, and what its limiter tells it.

    A connection is one, and so can be an HTTP request, or a job. While it is active it is held weakly, so it
    must be possible to refer to it so; and it is equal to no other.
    """

    address: Any = Attribute(
        "Whose it is: of a connection, the client's address, as Twisted gives it to ``buildProtocol``; of"
        " what is known by a key, a `connlimit.limits.Key`; None if nothing is known."
    )
    factory: Any = Attribute("The factory that it belongs to; None if there is none.")
    slot: Any = Attribute("Set by the limiter: None unless the occupant is active.")

    def serve() -> None:
        """
        Its turn has come after a wait. Never raises.
        """

    def refuse(reason: str) -> None:
        """
        It will not be served. Never raises.
        """

    def abort() -> None:
        """
        It is ended at once, and its slot becomes free, as far as that can be done. Never raises.
        """


class IConnection(IOccupant):
    """
    One accepted connection, as an occupant: what only sockets have.

    When its turn has come, the real protocol gets the transport; if it is refused, the refusal says so, as
    far as it has words, and closes; if it is aborted, what is still to be sent is dropped.
    """

    factory: IProtocolFactory = Attribute("The factory that it belongs to.")

    def close(gave_up: Callable[[], None] | None = None) -> None:
        """
        It is ended in good order: what is still to be sent is sent, as long as the client takes any of it,
        but not for ever. Never raises.

        :param gave_up: called if it is ended at once in the end.
        """

    def notify(data: bytes) -> None:
        """
        It waits, and its client is told something. Never raises.
        """

    def reconsider() -> None:
        """
        It waits, and a setting has changed that decides whether its client has departed. Never raises.
        """

    def idle() -> float | None:
        """
        For how many seconds it has moved no byte; None if that cannot be told, or it is being closed.
        """

    def is_at_rest(quiet: float | None) -> bool:
        """
        Whether it is between two requests, so that to close it cuts nothing. Never raises.

        :param quiet: after how many seconds without a byte any connection whose client did not speak last is
            taken for one at rest; None if only those are whose protocol knows.
        """

    def is_dead() -> bool:
        """
        Whether the socket is gone, or was reset, although the connection has not been told. Never raises.
        """


class IRefusing(Interface):
    """
    A refusal that is being said to a client.
    """

    def said() -> Deferred[None]:
        """
        Wait until it has been said, which is bounded, and shorter from now on if the client is silent.
        """


class IPort(Interface):
    """
    A listening port, as its limiter sees it.
    """

    def is_listening() -> bool:
        """
        Whether it has not been closed.
        """

    def backlog() -> int | None:
        """
        How many connections wait to be accepted; None if there is no telling.
        """

    def stop_listening() -> Any:
        """
        Close it.

        :return: None, or a Deferred that fires when it is closed.
        """


class ILimit(Interface):
    """
    A number of slots, in all or per key.

    It is asked in the reactor's thread and answers at once. A limit whose slots live elsewhere
    answers False while it asks, and calls its subscribers when there may be room.
    """

    def try_acquire(connection: IOccupant) -> bool:
        """
        Take a slot for the connection. If this raises, the connection lets others pass, and is tried again
        when the limit calls and once a second, in turn with others.

        :return: True if it now holds a slot, False if there is none for it at the moment.
        """

    def release(connection: IOccupant) -> None:
        """
        Give back the slot that the connection holds.

        If the connection object itself was lost to garbage collection, another one stands for it that
        has the same address; a limit that keeps the object keeps it from being lost.
        """

    def subscribe(callback: Callable[[], None]) -> None:
        """
        Call *callback*, without arguments, whenever there may be room that was not there before.

        A call without room is harmless. Releases need not be announced to the limiter that made them.
        """


class IKeyedLimit(ILimit):
    """
    A limit that can have room for one connection and none for another, by a key that each has.

    A connection whose key has no room lets others pass it in the queue. So does one of which the limit fails
    to tell the key.
    """

    def key(connection: IOccupant) -> Hashable:
        """
        The key of the connection, the same at every call.
        """

    def has_room(key: Hashable) -> bool:
        """
        Whether a connection of this key would get a slot. If this raises, it would not.
        """


class IRefusingLimit(ILimit):
    """
    A limit that can know that waiting for a slot is useless.
    """

    def refuses() -> bool:
        """
        Whether nobody is to wait now: newcomers that get no slot are refused, and within a second all who
        wait.
        """


class IQueue(Interface):
    """
    The order in which waiting connections are served. Every operation takes constant or logarithmic time.

    One that raises, or names somebody who does not wait, is logged and asked no more: from then on those who
    wait are served in the order of their arrival.
    """

    def add(connection: IOccupant, now: float) -> None:
        """
        Put the connection in the queue.

        :param now: the time in seconds.
        """

    def remove(connection: IOccupant) -> object:
        """
        Take the connection out, wherever it stands. Only called for one that was put in.
        """

    def next(now: float) -> IOccupant:
        """
        Whose turn it is. Only called while somebody waits.

        :param now: the time in seconds.
        """

    def expires() -> float | None:
        """
        When the order itself may find that somebody has waited too long, whatever ``wait_timeout`` says. Only
        called while somebody waits.

        :return: a time in seconds; None if it never does.
        """

    def has_expired(connection: IOccupant, now: float) -> bool:
        """
        Whether the one who has waited longest is to be refused now.
        """


class IRefusal(Interface):
    """
    What a refused client gets.
    """

    def build_protocol(address: IAddress, reason: str, retry_after: float) -> IProtocol | None:
        """
        The protocol that speaks to the refused client, or None to close the connection without a word.

        It should end the connection when it has spoken; if it is not over after some seconds, it is aborted.

        :param reason: ``full``, ``timeout``, ``peer``, ``descriptors`` or ``draining``.
        :param retry_after: seconds after which the client would probably be served, as far as can be told.
        """


class ISlotKeeper(Interface):
    """
    A protocol whose slot is not bound to its own connection, but to what it does with it.

    A relay is one: its slot is free when its connection to the server behind it is over.
    """

    def keep_slot(release: Callable[[], None]) -> None:
        """
        Is called before ``makeConnection``: the slot is free when *release* is called, be it before or after
        the end of the connection.
        """

    def is_over() -> bool:
        """
        Whether there is nothing any more that the slot is kept for. Is asked from time to time, so that no
        slot is lost.
        """

    def abort_all() -> None:
        """
        End everything that the slot is kept for, without delay.
        """


class ILimiter(Interface):
    """
    What a limiter shows of itself: one of this process, or those of one name in all workers as one.
    """

    name: str = Attribute("What it is called where it is shown.")
    settings: Any = Attribute("The settings in force.")
    limits: Any = Attribute("The further limits that it was given.")
    clock: Any = Attribute("Where its time comes from; it provides `IReactorTime`.")
    active: int = Attribute("How many connections hold a slot.")
    waiting: int = Attribute("How many connections wait in the queue.")

    def snapshot() -> Snapshot:
        """
        Every counter and gauge, at this instant.
        """

    def has_room() -> bool:
        """
        Whether one more would be served at once.
        """

    def limited_by(reason: str = FULL, connection: IOccupant | None = None) -> str:
        """
        In words, which limit makes connections wait now, or why one was refused.

        :param reason: why.
        :param connection: which.
        """

    def first_waiting(count: int) -> Sequence[tuple[IAddress | str, float]]:
        """
        The addresses of those who have waited longest, or the texts of these, each with how many seconds.
        """

    def busiest_peers(count: int) -> list[tuple[Hashable, int, int]]:
        """
        The peers with the most connections: each with how many are active and how many wait. Looks at all.
        """

    def find_busiest_peers(count: int) -> Generator[None, None, list[tuple[Hashable, int, int]]]:
        """
        `busiest_peers` in steps, each of which looks at a part.
        """

    def add_observer(observer: ILimiterObserver) -> None:
        """
        Tell an observer what happens from now on.
        """

    def remove_observer(observer: ILimiterObserver) -> None:
        """
        Tell an observer nothing more.
        """

    def drain(timeout: float | None = None) -> Deferred[None]:
        """
        Refuse those who wait, and wait for those who are served.

        :param timeout: seconds until the rest is closed; None for never.
        """


class ILimiterObserver(Interface):
    """
    What watches limiters: metrics, log, status page.

    It is called after the event has taken effect. What it raises is logged and changes nothing.
    `connlimit.observers.LimiterObserver` has all methods, doing nothing.
    """

    def exempted(limiter: ILimiter, connection: IOccupant) -> None:
        """
        The connection is exempt and is served without a slot.
        """

    def waiting(limiter: ILimiter, connection: IOccupant) -> None:
        """
        The connection has joined the queue.
        """

    def served(limiter: ILimiter, connection: IOccupant, waited: float) -> None:
        """
        The connection has got a slot.

        :param waited: seconds in the queue; 0.0 if there was room at once.
        """

    def finished(limiter: ILimiter, connection: IOccupant) -> None:
        """
        The connection is over and its slot is free.
        """

    def refused(limiter: ILimiter, connection: IOccupant, reason: str) -> None:
        """
        The connection was turned away.

        :param reason: ``full``, ``timeout``, ``peer``, ``descriptors`` or ``draining``.
        """

    def departed(limiter: ILimiter, connection: IOccupant, waited: float) -> None:
        """
        The client went away while it waited.

        :param waited: seconds in the queue.
        """

    def reconfigured(limiter: ILimiter, changes: dict[str, tuple[Any, Any]]) -> None:
        """
        Settings have changed.

        :param changes: the old and the new value of each changed setting, by its name.
        """
