"""
The one pair of connections that all limits of a process have to a Redis: one for questions, one that hears.

Whatever happens to it, it is made again, ever more slowly if that fails again and again, and tells those who
use it. Questions are sent in the order in which they were asked, not too many at a time; what a question says
is decided when it is sent, and so is how long the answer may take.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import txredisapi  # type: ignore[import-untyped]
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python.failure import Failure

from connlimit._redis.address import RedisAddress
from connlimit._redis.client import describe, greet
from connlimit._redis.connections import Ear, Questions
from connlimit._system.bounded_log import BoundedLog
from connlimit._system.clock import clock_of
from connlimit._system.since_boot import since_boot

#: The prefix of all keys and channels.
PREFIX = "connlimit"

#: The prefix of the channels on which processes hear whose turn it is.
TURNS = f"{PREFIX}:turns:"

#: How many questions are under way at the same time, at most.
_MAX_ASKED = 64

#: Seconds until a question is slow, and each who has asked is told so.
_SLOW = 0.25

#: Seconds between two attempts to connect, at first and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0

#: Seconds in which an answer must come, at most.
_LONGEST_PATIENCE = 10.0

#: Seconds in which the first answer on a connection must come, at most, if it is not known to take longer.
_LONGEST_GREETING = 2.0

#: Seconds between two looks at whether the connection that hears still does.
_BEAT = 1.0

#: Seconds until it is tried again to hear, at most, if that was refused.
_DEAF = 60.0

#: How many channels are asked for at a time.
_CHANNELS = 500

#: What a Redis answers that is to be left, and tried again: nobody is served by it.
_USELESS = ("NOAUTH", "WRONGPASS", "READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "UNKILLABLE", "BUSY")


_links: WeakValueDictionary[tuple[int, RedisAddress], Link] = WeakValueDictionary()


class Link:
    """
    The connections of this process to a Redis.

    :ivar connection: the number of the connection for questions.
    """

    _log = Logger(namespace="connlimit.redis")

    @classmethod
    def to(cls, address: RedisAddress, reactor: Any) -> Link:
        """
        The link to an address, the same for all who use it.

        :raises ValueError: if it cannot be connected to as the address says.
        """
        link = _links.get((id(reactor), address))
        if link is None:
            link = _links[id(reactor), address] = cls(address, reactor)
        return link

    def __init__(self, address: RedisAddress, reactor: Any) -> None:
        """
        :raises ValueError: if it cannot be connected to as the address says.
        """
        self.address = address
        self.connection = 0
        self._failures_log = BoundedLog(self._log)
        self._endpoint = address.endpoint(reactor)
        self._reactor = reactor
        self._clock = clock_of(reactor)
        self._askers: dict[str, Any] = {}
        self._waiting: deque[Any] = deque()
        # Who, when, what, and whether the script was sent with it.
        self._asked: deque[tuple[Any, float, str, bool]] = deque()
        self._questions: Any = None
        self._connecting: Deferred[None] | None = None
        self._has_answered = False
        self._since = 0.0
        self._failures = 0
        self._pause: IDelayedCall | None = None
        self._pause_ends = 0.0
        self._error: Exception | None = None
        self._watching: IDelayedCall | None = None
        self._is_slow = False
        self._round_trip = 0.0
        self._complaining: set[Any] = set()
        # The connection that hears, and who hears what by it.
        self._hearers: dict[str, list[Any]] = {}
        self._subscribed: set[str] = set()
        self._ear: Any = None
        self._ear_connecting: Deferred[None] | None = None
        self._ear_failures = 0
        self._beating: IDelayedCall | None = None
        self._beats_at = 0.0
        self._is_deaf = False

    # Who uses it

    def join(self, asker: Any) -> None:
        """
        Tell an asker of what happens to the connections from now on.
        """
        self._askers[asker.member] = asker

    def leave(self, asker: Any) -> None:
        """
        Tell it no more. When the last has left the connections end.
        """
        self._askers.pop(asker.member, None)
        self.relieve(asker)
        hearers = self._hearers.get(asker.channel, [])
        if asker in hearers:
            hearers.remove(asker)
            if not hearers:
                del self._hearers[asker.channel]
                self._subscribed.discard(asker.channel)
                if self._ear is not None:
                    self._ear.say("UNSUBSCRIBE", asker.channel)
        if not self._askers:
            self._end()

    def ask(self, asker: Any) -> None:
        """
        Ask an asker's question as soon as that is possible.

        It is answered or rejected, or Redis is unreachable, or reachable again.
        """
        if self._pause is not None and since_boot() < self._pause_ends:
            self._tell(asker, "unreachable", self._error)
            return
        self._waiting.append(asker)
        if self._questions is not None:
            self._send()
        else:
            self._connect()

    def hears(self, channel: str) -> bool:
        """
        Whether what is published on a channel is heard here.
        """
        return channel in self._subscribed

    def hears_alone(self, asker: Any) -> bool:
        """
        Whether an asker hears its channel, and is the only one here that does.
        """
        return asker.channel in self._subscribed and self._hearers.get(asker.channel) == [asker]

    @cached_property
    def process(self) -> str:
        """
        The name of this process, and of this link. It is made when it is asked for, since a program may have
        become a daemon, or several processes, after it has made its limits.
        """
        return f"{os.uname().nodename}:{os.getpid()}:{random.SystemRandom().getrandbits(48):012x}"

    @property
    def turns(self) -> str:
        """
        The channel on which this process hears whose turn it is.
        """
        return TURNS + self.process

    @property
    def round_trip(self) -> float:
        """
        Seconds in which a question is answered, of late.
        """
        return self._round_trip

    @property
    def askers(self) -> int:
        """
        How many use it.
        """
        return len(self._askers)

    def complain(self, asker: Any, name: str, error: Exception) -> None:
        """
        Log that an asker cannot use Redis, unless another has said so.
        """
        if not self._complaining:
            self._log.error(
                "limit {name}: Redis at {address} cannot be used: {why}",
                name=name,
                address=self.address,
                why=describe(error),
            )
        self._complaining.add(asker)

    def relieve(self, asker: Any, name: str = "") -> None:
        """
        Log that Redis can be used again, when that is so for all.
        """
        if asker in self._complaining:
            self._complaining.remove(asker)
            if name and not self._complaining:
                self._log.info("limit {name}: Redis at {address} is back", name=name, address=self.address)

    # Questions

    def _send(self) -> None:
        while self._waiting and len(self._asked) < _MAX_ASKED:
            asker = self._waiting.popleft()
            try:
                question = asker.question(self.connection)
            except Exception:
                self._failures_log.failure("{asker} failed", asker=asker)
                continue
            self._ask(asker, question)

    def _ask(self, asker: Any, question: str, *, in_full: bool = False) -> None:
        connection = self._questions
        connection.transport.write(asker.script.command([question], in_full=in_full))
        self._asked.append((asker, since_boot(), question, in_full))
        connection.replyQueue.get().addCallback(self._answered, connection)
        if self._watching is None:
            self._watching = self._clock.callLater(_SLOW, self._watch, since_boot() + _SLOW)

    def _answered(self, answer: Any, connection: Any) -> None:
        if connection is not self._questions:
            return
        if isinstance(answer, Exception) and not isinstance(answer, txredisapi.ResponseError):
            return  # the end of the connection follows
        asker, since, question, was_told = self._asked.popleft()
        self._is_slow = False
        text = str(answer) if isinstance(answer, Exception) else ""
        if text.startswith("NOSCRIPT") and not was_told:
            self._ask(asker, question, in_full=True)
            return
        if text.startswith(_USELESS):
            self._broken(answer)
            return
        self._has_answered = True
        self._failures = 0
        self._round_trip += (since_boot() - since - self._round_trip) / 8
        self._tell(asker, "rejected" if text or isinstance(answer, Exception) else "answered", answer)
        if self._questions is connection:
            self._send()

    def _watch(self, due: float) -> None:
        """
        Look whether the oldest question is answered in time.
        """
        self._watching = None
        if not self._asked:
            return
        now = since_boot()
        asker, since, _, _ = self._asked[0]
        late = now - due > _SLOW  # this process was stopped, or busy: the answer may be there and unread
        patience = self._patience(asker.patience)
        if not late and now >= since + patience:
            self._broken(TimeoutError(f"no answer within {patience:g} s"))
            return
        if not late and not self._is_slow and now >= since + min(patience, _SLOW + 2 * self._round_trip):
            self._is_slow = True
            for each in {asker: None for asker, _, _, _ in self._asked}:
                self._tell(each, "slow")
        pause = max(0.05, min(_SLOW, since + patience - now))
        self._watching = self._clock.callLater(pause, self._watch, now + pause)

    def _patience(self, wanted: float) -> float:
        return min(_LONGEST_PATIENCE, max(wanted, 4 * self._round_trip))

    # The connection for questions

    def _connect(self) -> None:
        if self._pause is not None:
            if self._pause.active():
                self._pause.cancel()
            self._pause = None
        if self._connecting is None and self._questions is None:
            self._connecting = Deferred.fromCoroutine(self._open(Questions))
            self._connecting.addCallbacks(self._connected, self._not_connected)
            self._connecting.addErrback(
                lambda failure: self._log.failure("{link} failed", failure, link=self)
            )

    async def _open(self, protocol: Callable[[], Any]) -> Any:
        factory = Factory.forProtocol(protocol)
        factory.noisy = False
        began = since_boot()
        connection: Any = await self._endpoint.connect(factory)
        self._round_trip = max(self._round_trip, since_boot() - began)
        address, began = self.address, since_boot()
        greeting = Deferred.fromCoroutine(
            greet(connection, address.username, address.password, address.database)
        )
        patience = self._patience(min((asker.patience for asker in self._askers.values()), default=1.0))
        # What is connected to may be a proxy near by, before a Redis that is far away.
        patience = max(patience, min(_LONGEST_GREETING, patience * 2 ** min(self._failures, 10)))
        await greeting.addTimeout(patience, self._clock, _too_late)
        self._round_trip = max(self._round_trip, since_boot() - began)
        return connection

    def _connected(self, connection: Any) -> None:
        self._connecting = None
        self._questions = connection
        self.connection += 1
        self._has_answered = False
        self._since = since_boot()
        connection.ended = self._ended
        if not connection.connected:
            self._ended(connection, Failure(ConnectionError("the connection was closed")))
            return
        waiting = [each for each in self._waiting if self._askers.get(each.member) is not each]
        self._waiting = deque(waiting)
        for asker in list(self._askers.values()):
            self._tell(asker, "reachable")
        self._send()
        if self._hearers:
            self._listen()

    def _not_connected(self, failure: Failure) -> None:
        self._connecting = None
        if self._askers:
            self._broken(failure.value)

    def _ended(self, connection: Any, reason: Failure) -> None:
        if connection is not self._questions:
            return
        if self._has_answered or (self._failures == 0 and since_boot() - self._since > 1):
            self._drop()
            self._connect()
        else:
            self._broken(reason.value)

    def _broken(self, error: Any) -> None:
        """
        Redis cannot be used: try again after a pause.
        """
        self._error = error
        self._drop()
        self._failures += 1
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(self._failures, 10)) * random.uniform(0.5, 1)
        self._pause_ends = since_boot() + pause
        self._pause = self._clock.callLater(pause, self._connect)
        for asker in list(self._askers.values()):
            self._tell(asker, "unreachable", error)

    def _drop(self) -> None:
        """
        End the connections, at once.
        """
        lost = [*(asker for asker, _, _, _ in self._asked), *self._waiting]
        self._asked.clear()
        self._waiting.clear()
        for asker in lost:
            if self._askers.get(asker.member) is not asker:  # nobody tells it anything else
                self._tell(asker, "unreachable", self._error or ConnectionError("the connection was lost"))
        self._is_slow = False
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        connection, self._questions = self._questions, None
        if connection is not None:
            connection.ended = None
            connection.transport.abortConnection()
        self._shut_ear()

    def _end(self) -> None:
        self._drop()
        for connecting in (self._connecting, self._ear_connecting):
            if connecting is not None:
                connecting.cancel()
        for timer in (self._pause, self._beating):
            if timer is not None and timer.active():
                timer.cancel()
        self._pause = self._beating = None

    def _tell(self, asker: Any, what: str, *about: Any) -> None:
        try:
            getattr(asker, what)(*about)
        except Exception:
            self._failures_log.failure("{asker} failed", asker=asker)

    # The connection that hears

    def hear(self, asker: Any) -> None:
        """
        Let an asker hear its channel from now on.
        """
        hearers = self._hearers.setdefault(asker.channel, [])
        if asker in hearers:
            return
        hearers.append(asker)
        if self._ear is not None:
            if asker.channel not in self._subscribed:
                self._ear.say("SUBSCRIBE", asker.channel)
        elif self._beating is None:
            self._listen()

    def _listen(self) -> None:
        """
        Connect, or look whether the connection still hears.
        """
        if self._beating is not None and self._beating.active():
            self._beating.cancel()
        pause = _BEAT
        ear = self._ear
        if ear is None and self._questions is not None:
            if self._ear_connecting is None:
                self._ear_connecting = Deferred.fromCoroutine(self._open(Ear))
                self._ear_connecting.addCallbacks(self._can_hear, self._cannot_hear)
                self._ear_connecting.addErrback(
                    lambda failure: self._log.failure("{link} failed", failure, link=self)
                )
            pause = min(_DEAF if self._is_deaf else 5.0, 0.1 * 2**self._ear_failures) * random.uniform(0.5, 1)
        elif ear is not None and ear.pinged_at is None:
            ear.pinged_at = since_boot()
            ear.say("PING")
        elif (
            ear is not None
            and since_boot() - ear.pinged_at > self._patience(_BEAT)
            and since_boot() - self._beats_at <= _SLOW  # else its answer may be there and unread
        ):
            self._ear_failures = min(self._ear_failures + 1, 10)
            self._shut_ear()
        self._beats_at = since_boot() + pause
        self._beating = self._clock.callLater(pause, self._listen)

    def _can_hear(self, ear: Any) -> None:
        self._ear_connecting = None
        if self._questions is None:
            ear.transport.abortConnection()
            return
        self._ear = ear
        ear.heard = self._heard
        ear.subscribed = self._is_subscribed
        ear.refused = self._may_not_hear
        ear.ended = self._ear_ended
        channels = [self.turns, *self._hearers]
        for at in range(0, len(channels), _CHANNELS):
            ear.say("SUBSCRIBE", *channels[at : at + _CHANNELS])

    def _cannot_hear(self, failure: Failure) -> None:
        self._ear_connecting = None
        self._ear_failures = min(self._ear_failures + 1, 10)

    def _may_not_hear(self, error: Exception) -> None:
        if not self._is_deaf:
            self._is_deaf = True
            self._log.warn(
                "Redis at {address} sends no notifications, so free slots are asked for every second: {why}",
                address=self.address,
                why=describe(error),
            )

    def _is_subscribed(self, channel: str) -> None:
        self._ear_failures = 0
        self._is_deaf = False
        if channel != self.turns and channel not in self._hearers:
            return  # those who wanted to hear it have left
        self._subscribed.add(channel)
        # Something may have been said while nobody listened.
        self._hear_of(self._hearers.get(channel, ()), "")

    def _ear_ended(self, ear: Any) -> None:
        if ear is self._ear:
            self._ear_failures = min(self._ear_failures + 1, 10)
            self._shut_ear()

    def _shut_ear(self) -> None:
        ear, self._ear = self._ear, None
        if ear is not None:
            ear.ended = None
            ear.transport.abortConnection()
        if self._subscribed:
            self._subscribed.clear()
            for asker in list(self._askers.values()):
                self._tell(asker, "deaf")

    def _heard(self, channel: str, message: str) -> None:
        if channel == self.turns:
            asker = self._askers.get(message)
            self._hear_of(() if asker is None else (asker,), message)
        else:
            self._hear_of(self._hearers.get(channel, ()), message)

    def _hear_of(self, askers: Iterable[Any], message: str) -> None:
        for asker in list(askers):
            self._tell(asker, "heard", message)


def _too_late(result: object, seconds: float) -> object:
    raise TimeoutError(f"no answer within {seconds:g} s")
