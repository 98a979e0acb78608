"""
A limit that many processes and machines share through Redis (``connlimit[redis]``).

Each process leases slots of the limit and gives them to its connections itself, so that a busy process does
not ask Redis for each. A lease is one number for each process. It ends on its own when the process is not
heard from for ``ttl`` seconds, and its slots are everybody's again. The process knows by its own clock, which
goes on while it is stopped or its machine suspended, when the lease must have ended, a little before, and
then serves nobody until it has a new one.

What holds:

- The slots that are leased never exceed the limit. Only Redis counts them, in one script that nothing
  interrupts. Its clock can be set: then the clocks of the processes count.
- A Redis that may not know of all leases gives no new slots for ``ttl``: it was restarted, another was the
  primary before, or what it knew was deleted or evicted. Each process says which Redis has answered it last,
  so that none of this goes unnoticed, and within that time what it holds.
- While Redis is away each process keeps the slots that it has leased, until the lease ends.
- Connections outlive their lease if their process was stopped, or cut off from Redis, for longer than
  ``ttl``. They are not ended, and count again as soon as the process is back; until then they do not, and
  more than the limit can be served. ``outlived`` counts them.
- Processes that lack slots are served in the order in which they asked, a slot each time; a process has one
  position, however many wait for it there, and the order within it is that of its own queue.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from zope.interface import implementer

from connlimit._limiter.values import COUNT, NAME, duration
from connlimit._redis.address import RedisAddress, url_parameters
from connlimit._redis.asker import IAsker
from connlimit._redis.client import Script, describe
from connlimit._redis.link import PREFIX as PREFIX
from connlimit._redis.link import TURNS, Link
from connlimit._system.bounded_log import BoundedLog
from connlimit._system.clock import clock_of
from connlimit._system.since_boot import since_boot
from connlimit.interfaces import IOccupant, IRefusingLimit

#: What part of the ttl a lease is used for: the rest allows for the clocks' different speeds and for pauses.
_USED = 0.9

#: Seconds between two questions while others may need what is asked for, if no notification comes.
_POLL = 1.0

#: Seconds between two questions that are refused, and until it does not matter any more that all is over.
_PATIENCE = 5.0

#: Seconds between two questions while there is nothing to ask.
_IDLE = 60.0

#: Seconds after which a Redis that cannot be used is away.
_AWAY = 1.0

#: How many slots a busy process takes beyond those it needs, at most.
_MAX_SPARE = 64

#: How many questions a second one process asks in order to find out whether others lack slots, at most.
_MAX_POLLS = 200

_SCRIPT = Path(__file__).with_name("lease.lua").read_text()

#: The kinds of keys that a limit has.
LEASE, SLOTS = "lease", "slots"

#: What is published when a limit was changed.
_CHANGED = "room"

#: After how long the slots of a process that is not heard from are everybody's again.
_TTL = duration(0.5, 3600)

_ANSWER = re.compile(r"(\d{1,18}) (\d{1,18}) (\d{1,18}) (\d{1,18}) ([01]) (\d{1,18}) (.*)")

_numbers = itertools.count(1)


@implementer(IRefusingLimit, IAsker)
class RedisLimit:
    """
    A number of slots for all processes that use a name.

    :ivar name: the name.
    :ivar in_use: how many slots the connections of this process have.
    :ivar held: how many this process has leased.
    :ivar outlived: how many connections of this process have outlived their lease until now.
    """

    _log = Logger(namespace="connlimit.redis")

    def __init__(
        self,
        name: str,
        slots: int,
        *,
        url: str,
        ttl: float | None = None,
        when_unreachable: str | None = None,
        reactor: Any = None,
    ) -> None:
        """
        :param name: what the processes have in common.
        :param slots: how many slots there are, unless `set_slots` has said otherwise.
        :param url: see `RedisAddress.from_url`.
        :param ttl: seconds after which the slots of a process that is not heard from are everybody's again,
            the same in all processes; if not given, what ``?ttl=`` of the URL says, or 10.
        :param when_unreachable: what happens when Redis has been away for a second, and what was leased is
            used up or the lease over, until Redis is back. ``hold``: all wait; ``refuse``: those who wait or
            come are refused; ``local=N``: N slots can be used in this process. If not given, what
            ``?when_unreachable=`` of the URL says, or ``hold``.
        :raises TypeError: for a value of a wrong type.
        :raises ValueError: for a wrong value.
        """
        NAME.of_code("name", name)
        if not is_text(name):
            raise ValueError(f"name must be a text that can be written in UTF-8, not {name!r}")
        COUNT.of_code("slots", slots)
        self._slots = slots
        self.address = RedisAddress.from_url(url)
        parameters = url_parameters(url)
        self._ttl: float = (
            _TTL.of_text("ttl", parameters.get("ttl", "10")) if ttl is None else _TTL.of_code("ttl", ttl)
        )
        self._refuses, self._local = _unreachable(
            parameters.get("when_unreachable", "hold") if when_unreachable is None else when_unreachable
        )
        if reactor is None:
            from twisted.internet import reactor
        self.name = name
        self.in_use = 0
        self.held = 0
        self.outlived = 0
        self._clock = clock_of(reactor)
        self._link = Link.to(self.address, reactor)
        self._failures = BoundedLog(self._log)
        self._subscribers: list[Callable[[], None]] = []
        # What the link asks with.
        self.member = ""
        self.patience = max(0.5, min(2.0, self._ttl / 3))
        self.script = Script(_SCRIPT, keys_of(name))
        self.channel = _channel(name)
        # When the lease ends.
        self._ends = -1.0
        # How many slots were released while others asked. They are given back with the next question.
        self._set_aside = 0
        # Whether somebody here has been told that there is no slot, and whether that may be so elsewhere.
        self._short = False
        self._others_ask = False
        # Whether somebody else waited here when the last slot came.
        self._more = False
        # When somebody tried to get a slot in vain, and when they were told last that there are none.
        self._tried = 0.0
        self._told = 0.0
        # How many slots to take beyond those that are needed, and how many were needed at once of late. Both
        # shrink step by step, after this time.
        self._spare = 0
        self._peak = 0
        self._shrinks = 0.0
        # The last question, when it was sent, over which connection; the same of the last that was answered,
        # and which Redis did that.
        self._question = 0
        self._began = 0.0
        self._connection = 0
        self._answered_began: float | None = None
        self._answered_connection = 0
        self._run = ""
        self._untold = 0
        self._asking = False
        self._ask_again = False
        self._is_slow = False
        # Whether this process is among those who ask.
        self._queued = False
        self._timer: IDelayedCall | None = None
        self._rejections = 0
        self._is_away = False
        self._away_since = 0.0
        self._closed = False

    def __repr__(self) -> str:
        return f"<RedisLimit {self.name}: {self.in_use} of {self.held} leased slots used>"

    @property
    def slots(self) -> int:
        """
        How many slots there are for what this process takes, unless `set_slots` has said otherwise.

        It can be changed; ``TypeError`` or ``ValueError`` for a wrong value.
        """
        return self._slots

    @slots.setter
    def slots(self, slots: int) -> None:
        COUNT.of_code("slots", slots)
        changed, self._slots = self._slots != slots, slots
        if changed and (self._short or self.held):
            self._ask_soon(0)

    # ILimit

    def subscribe(self, callback: Callable[[], None]) -> None:
        self._subscribers.append(callback)

    def try_acquire(self, connection: IOccupant) -> bool:
        in_use = self.in_use + 1
        if (in_use <= self.held - self._set_aside and since_boot() < self._ends) or in_use <= self._room():
            self.in_use = in_use
            if in_use > self._peak:
                self._peak = in_use
            self._short = False
            return True
        if not self._short:
            self._short = True
            self._spare = min(max(1, self._spare * 2), _MAX_SPARE)
            if not self._queued and not self._is_away:
                self._ask_soon(0)
            elif self._is_away and self._local:
                self._ask_soon(_AWAY)
        self._tried = since_boot()
        return False

    def release(self, connection: IOccupant) -> None:
        self.in_use -= 1
        if self._others_ask and not (self._is_away or self._is_slow):
            # Whose turn it is, Redis knows.
            self._set_aside += 1
            self._ask_soon(0)

    def refuses(self) -> bool:
        return self._refuses and self._is_away_for_long() and not (self.held and since_boot() < self._ends)

    def _room(self) -> int:
        """
        How many slots can be in use here.
        """
        room = self.held - self._set_aside if since_boot() < self._ends else 0
        if self._is_away and room < self._local and self._is_away_for_long():
            return self._local
        return room

    def _is_away_for_long(self) -> bool:
        return self._is_away and since_boot() >= self._away_since + _AWAY

    # The lease

    def _ask_soon(self, seconds: float) -> None:
        """
        Schedule a request to Redis unless one is due sooner.
        """
        if self._closed:
            return
        if self._asking:
            self._ask_again = self._ask_again or seconds == 0
            return
        if self._timer is not None:
            if self._timer.getTime() <= self._clock.seconds() + seconds:
                return
            self._timer.cancel()
        self._timer = self._clock.callLater(seconds, self._ask)

    def _ask(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None
        if self._is_away and self._local:
            self._tell()
        if self._asking or self._closed:
            return
        self._asking = True
        self._ask_again = False
        if not self.member:
            self.member = f"{self._link.process}#{next(_numbers)}"
        self._link.join(self)
        self._link.ask(self)

    def question(self, same: int) -> str:
        now = self._began = since_boot()
        if now >= self._ends:
            self.held, self._set_aside = self.in_use, 0
        wanted = self.in_use + self._short
        if not self._others_ask:
            wanted = max(wanted, self._peak) + self._spare
        if self._is_away or same != self._answered_connection:
            # What is given back may be given to nobody, if there is no answer.
            wanted = max(wanted, self.held - self._set_aside)
        # What is given back is given back from now on, not from the answer on.
        self.held = max(self.in_use, min(self.held - self._set_aside, wanted))
        self._set_aside = 0
        self._question += 1
        self._connection = same
        began = self._answered_began
        return self._say(
            in_use=self.in_use,
            kept=self.held,
            wanted=wanted,
            more=self._short and self._more,
            age=-1 if began is None else int((now - began) * 1000),
            same=self._answered_connection == same,
            outlived=self._untold,
        )

    def _say(self, **facts: object) -> str:
        question = {
            "member": self.member,
            "ttl": int(self._ttl * 1000),
            "number": self._question,
            "slots": self._slots,
            "run": self._run,
            "hears": self._link.hears(self._link.turns),
            "own": int(self._link.hears_alone(self)),
            "leaves": False,
            "channel": self.channel,
            "turns": TURNS,
            **facts,
        }
        return json.dumps(question, separators=(",", ":"))

    def _farewell(self, same: int) -> str:
        self._question += 1
        return self._say(in_use=0, kept=0, wanted=0, more=False, age=-1, same=True, outlived=0, leaves=True)

    def answered(self, answer: Any) -> None:
        self._asking = False
        if self._closed:
            return
        try:
            held, others, run, guarded, pause, self._queued, too_many = _counts(answer)
        except ValueError as error:
            self.rejected(error)
            return
        began, ended = self._began, self._ends
        outlived = self.in_use if began >= ended >= 0 else 0
        self._untold = outlived
        self.outlived += outlived
        self._rejections = 0
        self._is_slow = False
        self._answered_began, self._answered_connection, self._run = began, self._connection, run
        self.held = max(held, self.in_use)
        self._ends = began + self._ttl * _USED
        self._others_ask = others > 0
        if self._is_away:
            self._is_away = False
            self._link.relieve(self, self.name)
        if outlived:
            self._log.warn(
                "limit {name}: connections that have outlived their lease: {count}. They count again, and "
                "{too_many} more are served than there are slots",
                name=self.name,
                count=outlived,
                too_many=too_many,
            )
        self._link.hear(self)
        had_asked = self._short
        self._offer()
        if self._queued and not self._short:
            self._ask_again = True  # to leave the queue
        if self._others_ask and self.in_use < self.held and not guarded:
            self._ask_again = True  # to give back what is not needed
        if began >= self._shrinks:
            self._shrinks = began + self._ttl / 3
            if not had_asked:
                self._spare //= 2
            self._peak = (self._peak + self.in_use) // 2
        self._ask_soon(0 if self._ask_again else self._pause(pause / 1000, guarded / 1000))

    def _offer(self) -> None:
        """
        Let those who wait here have what is free, and find out whether somebody still waits.
        """
        if self.in_use < self._room():
            self._tell()
            if self.in_use < self._room():
                self._short = False  # those who lacked one have one, or went away
            self._more = self._short
        elif self._short and self._subscribers:
            if self._tried < self._told:
                self._short = False  # it was told last time, and nobody has tried since
            else:
                self._told = since_boot()
                self._tell()

    def _pause(self, asked_for: float, guarded: float) -> float:
        """
        Seconds until the next question, if nothing happens.

        :param asked_for: what Redis wants that to be if slots are lacked here.
        :param guarded: seconds until it gives new slots again.
        """
        # The answer is to be there before the lease ends.
        maximum = max(0.0, self._ends - since_boot() - 1.5 * self._link.round_trip)
        heartbeat = min(self._ttl / 3 * random.uniform(0.9, 1), maximum)
        if guarded:
            return min(heartbeat, guarded + 0.005)
        if self._short:
            if not self._link.hears(self._link.turns):
                return min(heartbeat, _POLL)
            pause = asked_for if asked_for <= _POLL else asked_for * random.uniform(0.5, 1)
            return min(heartbeat, pause) if self.held else pause
        if self.held > self.in_use:
            return min(heartbeat, max(_POLL, self._link.askers / _MAX_POLLS))
        if self.held:
            return heartbeat
        self._peak = self._spare = 0
        return _IDLE * random.uniform(0.9, 1)

    def rejected(self, error: Exception) -> None:
        self.unreachable(error)
        self._rejections = min(self._rejections + 1, 10)
        self._ask_soon(min(_PATIENCE, 0.1 * 2**self._rejections) * random.uniform(0.5, 1))

    def slow(self) -> None:
        # Redis has not been told that these are given back.
        self._is_slow = True
        self._set_aside = 0
        self._tell()

    def unreachable(self, error: Exception) -> None:
        self._asking = False
        if self._closed or not (self.in_use or self.held or self._short):
            return
        self._queued = False
        self._set_aside = 0
        if not self._is_away:
            self._is_away = True
            self._away_since = since_boot()
            self._link.complain(self, self.name, error)
        self._tell()

    def reachable(self) -> None:
        asks = self._asking or self._is_away or self.in_use or self.held or self._short
        self._asking = False
        self._set_aside = 0
        if asks:
            self._ask()
        elif self._timer is None:
            self._ask_soon(_IDLE * random.uniform(0.5, 1))

    def heard(self, message: str) -> None:
        if message == self.member:
            if self._short or self._queued or self._asking:
                self._ask_soon(0)
        elif message == _CHANGED or not message:
            if self._short or self.held:
                self._ask_soon(0)
        else:
            self._others_ask = True
            if self.held - self._set_aside > self.in_use:
                self._ask_soon(0)

    def deaf(self) -> None:
        if self._short:
            self._ask_soon(_POLL)

    def _tell(self) -> None:
        for callback in list(self._subscribers):
            try:
                callback()
            except Exception:
                self._failures.failure("a subscriber of limit {name} failed", name=self.name)

    def close(self) -> Deferred[None]:
        """
        Give all slots back, and use Redis no more.

        :return: fires when that is done, or impossible.
        """
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.held, self._ends = 0, -1.0
        if not self._question or self._is_away:
            self._link.leave(self)
            return succeed(None)
        return _Farewell(self, self._link, self._clock).done.addBoth(lambda _: self._link.leave(self))


class _Farewell:
    """
    The last question of a limit: it has nothing any more.

    :ivar done: fires when it is answered, or will not be.
    """

    def __init__(self, limit: RedisLimit, link: Link, clock: Any) -> None:
        self._limit = limit
        self.member = limit.member
        self.channel = limit.channel
        self.script = limit.script
        self.patience = 1.0
        self.done: Deferred[None] = Deferred()
        self._timer = clock.callLater(_PATIENCE, self._too_late)
        link.ask(self)

    def question(self, same: int) -> str:
        if self._timer.active():
            self._timer.reset(self.patience)
        return self._limit._farewell(same)

    def answered(self, answer: Any) -> None:
        if not self.done.called:
            if self._timer.active():
                self._timer.cancel()
            self.done.callback(None)

    def rejected(self, error: Exception) -> None:
        if not self.done.called:
            RedisLimit._log.info(
                "limit {name}: Redis at {address} could not be told of the end: {why}",
                name=self._limit.name,
                address=self._limit.address,
                why=describe(error),
            )
            self.answered(None)

    unreachable = rejected

    def slow(self) -> None:
        """
        Do nothing: it has a timer of its own.
        """

    def _too_late(self) -> None:
        self.rejected(TimeoutError(f"no answer within {self.patience:g} s"))


def _counts(answer: Any) -> tuple[int, int, str, int, int, bool, int]:
    """
    What the script returns.

    :raises ValueError: if it is something else.
    """
    found = _ANSWER.fullmatch(answer) if isinstance(answer, str) else None
    if found is None:
        raise ValueError(f"this is not a Redis, it answers {answer!r:.100}")
    held, others, guarded, pause, queued, too_many, run = found.groups()
    return int(held), int(others), run, int(guarded), int(pause), queued == "1", int(too_many)


def _unreachable(text: object) -> tuple[bool, int]:
    """
    Whether to refuse while Redis is unreachable, and how many slots to use then.
    """
    if text in ("hold", "refuse"):
        return text == "refuse", 0
    key, _, count = text.partition("=") if isinstance(text, str) else ("", "", "")
    if key == "local" and count.isdecimal():
        return False, int(count)
    raise ValueError(f"when_unreachable must be hold, refuse or local=N, not {text!r}")


def is_text(name: str) -> bool:
    """
    Whether a name can be that of a key.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def keys_of(name: str) -> list[str]:
    """
    The keys of a limit: what is leased, and the limit, if one was set for all.
    """
    return [f"{PREFIX}:{{{name}}}:{kind}" for kind in (LEASE, SLOTS)]


def _channel(name: str) -> str:
    return f"{PREFIX}:{{{name}}}:room"


def set_slots(redis: Any, name: str, slots: int) -> Deferred[Any]:
    """
    Change a limit for all processes at once.

    :param redis: a connection of txredisapi.
    """
    changed: Deferred[Any] = redis.set(keys_of(name)[1], slots)
    return changed.addCallback(lambda _: redis.publish(_channel(name), _CHANGED))
