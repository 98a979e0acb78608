"""
A limit that many processes and machines share, by way of Redis (``connlimit[redis]``).

Each process leases slots of the limit and gives them to its connections itself, so that a busy process does
not ask Redis for each. A lease is one number for each process. It ends on its own when the process is not
heard of for ``ttl`` seconds, and its slots are everybody's again; the process knows by its own monotonic
clock when it must have ended, a little before, and then serves nobody until it has a new one.

What holds:

- The slots that are leased never exceed the limit, as only Redis counts them, in one script that nothing
  interrupts, by its own clock. Slots of connections that outlive their lease (a process that was stopped for
  longer than ``ttl``) count again as soon as the process is back, and until then do not.
- A Redis that has been up for less than ``ttl``, or has taken another's place less than ``ttl`` ago, gives no
  new slots: it may have lost its memory, and every process says within that time what it holds. After
  FLUSHALL, or a failover to a replica that has never heard of the limit, what is leased can be leased again
  until the next heartbeat, a third of ``ttl`` at most; what is too much ends with its connections.
- Processes that lack slots are served in the order in which they asked, a slot each time; a process has one
  place, however many wait for it there, and the order within it is that of its own line.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from time import monotonic
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from zope.interface import implementer

from connlimit._redis import Redis, describe
from connlimit._redis_address import RedisAddress, url_parameters
from connlimit.interfaces import IConnection, IRefusingLimit

#: The prefix of all keys.
PREFIX = "connlimit"

#: What part of the ttl a lease is used for: the rest allows for the clocks' different speeds and for pauses.
_USED = 0.9

#: Seconds between two questions of a process that lacks slots, if no notification comes.
_POLL = 1.0

#: How many slots a busy process takes beyond those it needs, at most.
_MOST_SPARE = 64

_KEYS = ("slots", "held", "alive", "asking", "turns", "last", "server")

# Leases as many slots as there are, of those that a member wants in all, and renews its lease.
#
# KEYS: slots (the limit), held (slots by member), alive (end of each lease in ms), asking (members in
#   the order of their asking), turns (counts the askings), last (the number of each member's last question),
#   server (which Redis has answered, and since when it has all leases)
# ARGV: member, ttl in ms, slots in use, slots kept in any case, slots wanted in all, the limit if none is
#   set, channel, number of the question
# Returns: slots held, how many others are asking; at least 1 if more are held than there are, so that what
#   is not in use is given back.
_LEASE = """
local member, ttl, in_use = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local kept, wanted = tonumber(ARGV[4]), tonumber(ARGV[5])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local slots = tonumber(redis.call('GET', KEYS[1]) or ARGV[6])

for _, dead in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now)) do
  redis.call('ZREM', KEYS[3], dead)
  redis.call('HDEL', KEYS[2], dead)
  redis.call('ZREM', KEYS[4], dead)
  redis.call('HDEL', KEYS[6], dead)
end

-- A question that was delayed on a connection that is no more must not undo what was answered since.
if tonumber(redis.call('HGET', KEYS[6], member) or 0) >= tonumber(ARGV[8]) then return {0, 0} end
redis.call('HSET', KEYS[6], member, ARGV[8])

local others, before = 0, tonumber(redis.call('HGET', KEYS[2], member) or 0)
for _, count in ipairs(redis.call('HVALS', KEYS[2])) do others = others + count end
others = others - before

-- One slot is left for each who has asked earlier.
local place = redis.call('ZSCORE', KEYS[4], member)
local earlier = redis.call('ZCOUNT', KEYS[4], '-inf', place and '(' .. place or '+inf')

local free = math.max(0, slots - others - earlier)
local info = redis.call('INFO', 'server')
local server = string.match(info, 'run_id:(%w+)')
local uptime = string.match(info, 'uptime_in_seconds:(%d+)') * 1000
local known, since = string.match(redis.call('GET', KEYS[7]) or '', '(%w+) (%d+)')
if known ~= server then
  -- Another Redis has answered until now, and may have known more.
  since = known and now or 0
  redis.call('SET', KEYS[7], server .. ' ' .. since)
end
if uptime < ttl or now - since < ttl then free = math.min(free, before) end
local held = math.max(kept, math.min(wanted, free))

redis.call('ZADD', KEYS[3], now + ttl, member)
if held > 0 then redis.call('HSET', KEYS[2], member, held) else redis.call('HDEL', KEYS[2], member) end
local asks = held < wanted and held <= in_use
if not asks then
  redis.call('ZREM', KEYS[4], member)
elseif not place then
  redis.call('ZADD', KEYS[4], redis.call('INCR', KEYS[5]), member)
end
for at = 2, 7 do redis.call('PEXPIRE', KEYS[at], ttl * 10) end

local asking = redis.call('ZCARD', KEYS[4]) - (asks and 1 or 0)
if (asking > 0 and held < before) or (asks and not place) then redis.call('PUBLISH', ARGV[7], member) end
return {held, math.max(asking, others + held > slots and 1 or 0)}
"""

# Gives everything back that a member has, because it ends. KEYS and ARGV as above, as far as they matter.
_LEAVE = """
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[4], ARGV[1])
redis.call('HDEL', KEYS[6], ARGV[1])
redis.call('PUBLISH', ARGV[7], ARGV[1])
return 0
"""


@implementer(IRefusingLimit)
class RedisLimit:
    """
    So many slots for all processes that use a name.

    :ivar name: the name.
    :ivar in_use: how many slots the connections of this process have.
    :ivar held: how many this process has leased.
    """

    _log = Logger()

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
        :param ttl: seconds after which the slots of a process that is not heard of are everybody's again; if
            not given, what ``?ttl=`` of the URL says, or 10.
        :param when_unreachable: what happens from the end of the lease on until Redis is back. ``hold``: all
            wait; ``refuse``: who waits or comes is refused; ``local=N``: N slots can be used in this
            process. If not given, what ``?when_unreachable=`` of the URL says, or ``hold``.
        :raises ValueError: for a wrong value.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a text of at least one character, not {name!r}")
        if isinstance(slots, bool) or not isinstance(slots, int) or slots < 0:
            raise ValueError(f"slots must be a whole number, 0 or more, not {slots!r}")
        self.address = RedisAddress.from_url(url)
        parameters = url_parameters(url)
        self._ttl = _seconds(parameters.get("ttl", 10.0) if ttl is None else ttl)
        self._refuses, self._local = _unreachable(
            parameters.get("when_unreachable", "hold") if when_unreachable is None else when_unreachable
        )
        if reactor is None:
            from twisted.internet import reactor
        self.name = name
        self.in_use = 0
        self.held = 0
        self._slots = slots
        # Seconds in which Redis must answer.
        self._patience = max(0.5, min(2.0, self._ttl / 3))
        self._reactor = reactor
        self._member = f"{os.uname().nodename}:{os.getpid()}:{random.getrandbits(32):08x}"
        base = f"{PREFIX}:{{{name}}}"
        self._keys = [f"{base}:{each}" for each in _KEYS]
        self._channel = f"{base}:room"
        self._subscribers: list[Callable[[], None]] = []
        # When the lease ends, by the monotonic clock, which also runs while the process is stopped.
        self._ends = -1.0
        # Whether somebody here has been told that there is no slot, and whether that may be so elsewhere.
        self._short = False
        self._others_ask = False
        # How many slots to take beyond those that are needed, and how many were needed at once of late. Both
        # shrink by and by, after this time.
        self._spare = 0
        self._peak = 0
        self._shrinks = 0.0
        self._question = 0
        self._asking = False
        self._ask_again = False
        self._timer: IDelayedCall | None = None
        self._is_away = False
        self._closed = False
        self._redis = Redis(self.address, reactor, self._channel, self._notified)

    # ILimit

    def subscribe(self, callback: Callable[[], None]) -> None:
        """
        See `ILimit.subscribe`.
        """
        self._subscribers.append(callback)

    def try_acquire(self, connection: IConnection) -> bool:
        """
        See `ILimit.try_acquire`.
        """
        in_use = self.in_use + 1
        leased = monotonic() < self._ends
        if in_use <= (self.held if leased else self._local if self._is_away else 0):
            self.in_use = in_use
            if in_use > self._peak:
                self._peak = in_use
            self._short = False
            return True
        if not self._short:
            self._short = True
            self._spare = min(max(1, self._spare * 2), _MOST_SPARE)
        if not self._is_away:
            self._ask_soon(0)
        return False

    def release(self, connection: IConnection) -> None:
        """
        See `ILimit.release`.
        """
        self.in_use -= 1
        if self._others_ask:
            # Whose turn it is, Redis knows.
            self.held = max(self.in_use, self.held - 1)
            self._ask_soon(0)

    def refuses(self) -> bool:
        """
        See `IRefusingLimit.refuses`.
        """
        return self._refuses and self._is_away and monotonic() >= self._ends

    # The lease

    def _ask_soon(self, seconds: float) -> None:
        """
        Ask Redis by and by, if it is not to be asked earlier.
        """
        if self._closed:
            return
        if self._asking:
            self._ask_again = self._ask_again or seconds == 0
            return
        if self._timer is not None:
            if self._timer.getTime() <= self._reactor.seconds() + seconds:
                return
            self._timer.cancel()
        self._timer = self._reactor.callLater(seconds, self._ask)

    def _ask(self) -> None:
        self._timer = None
        self._asking = True
        self._ask_again = False
        began = monotonic()
        wanted = self.in_use + self._short
        if not self._others_ask:
            wanted = max(wanted, self._peak) + self._spare
        if began >= self._ends:
            self.held = self.in_use
        # What is given back is given back from now on, not from the answer on.
        self.held = max(self.in_use, min(self.held, wanted))
        self._question += 1
        arguments = [
            self._member,
            int(self._ttl * 1000),
            self.in_use,
            self.held,
            wanted,
            self._slots,
            self._channel,
            self._question,
        ]
        asked = self._ask_redis(_LEASE, arguments, self._patience)
        asked.addCallback(_counts).addCallbacks(self._answered, self._unanswered, callbackArgs=(began,))
        asked.addErrback(lambda failure: self._log.failure("{limit} failed", failure, limit=self.name))

    def _answered(self, counts: tuple[int, int], began: float) -> None:
        held, others = counts
        self._asking = False
        if self._closed:
            return
        if self._is_away:
            self._is_away = False
            self._log.info("limit {name}: Redis at {address} is back", name=self.name, address=self.address)
        self._redis.listen(self._patience)
        self.held = max(held, self.in_use)
        self._ends = began + self._ttl * _USED
        self._others_ask = others > 0
        had_asked = self._short
        if self.in_use < self.held:
            self._tell()
            if self.in_use < self.held:
                self._short = False  # whoever lacked one has one, or went away
        if self._others_ask and self.in_use < self.held:
            self._ask_again = True
        if began >= self._shrinks:
            self._shrinks = began + self._ttl / 3
            if not had_asked:
                self._spare //= 2
            self._peak = (self._peak + self.in_use) // 2
        seconds = min(_POLL, self._ttl / 3) if self._short else self._ttl / 3
        self._ask_soon(0 if self._ask_again else seconds)

    def _unanswered(self, failure: Any) -> None:
        self._asking = False
        if self._closed:
            return
        if not self._is_away:
            self._is_away = True
            self._log.error(
                "limit {name}: Redis at {address} cannot be used: {why}",
                name=self.name,
                address=self.address,
                why=describe(failure.value),
            )
        self._tell()
        # Not all at once, when it is back.
        self._ask_soon(random.uniform(0.5, 1) * min(_POLL, self._ttl / 3))

    def _tell(self) -> None:
        for callback in self._subscribers:
            callback()

    # Redis

    def _ask_redis(self, script: str, arguments: list[object], patience: float) -> Deferred[Any]:
        def too_late(result: object, seconds: float) -> object:
            raise TimeoutError(f"no answer within {seconds:g} s")

        asked = Deferred.fromCoroutine(self._redis.eval(script, self._keys, arguments))
        return asked.addTimeout(patience, self._reactor, too_late)

    def _notified(self, who: str) -> None:
        """
        Some process has given slots back, or lacks some, or may have, unheard.
        """
        if who == self._member:
            return
        if self._short or self.held > self.in_use or not who:
            self._ask_soon(0)
        else:
            self._others_ask = True

    def close(self) -> Deferred[None]:
        """
        Give all slots back, and use Redis no more.

        :return: fires when that is done, or impossible.
        """
        return Deferred.fromCoroutine(self._close())

    async def _close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.held, self._ends = 0, -1.0
        if self._question:
            try:
                await self._ask_redis(_LEAVE, [self._member, 0, 0, 0, 0, 0, self._channel], 1)
            except Exception as error:
                self._log.info(
                    "limit {name}: Redis at {address} was not told of the end: {why}",
                    name=self.name,
                    address=self.address,
                    why=describe(error),
                )
        self._redis.hang_up()


def _counts(answer: Any) -> tuple[int, int]:
    """
    What the script returns.

    :raises ValueError: if it is something else.
    """
    if not isinstance(answer, list) or [type(each) for each in answer] != [int, int]:
        raise ValueError(f"this is no Redis, it answers {answer!r:.100}")
    return answer[0], answer[1]


def _seconds(ttl: object) -> float:
    try:
        seconds = float(ttl)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0.5 <= seconds <= 3600:
        raise ValueError(f"ttl must be a number of seconds from 0.5 to 3600, not {ttl!r}")
    return seconds


def _unreachable(text: str) -> tuple[bool, int]:
    """
    Whether to refuse while Redis is unreachable, and how many slots to use then.
    """
    if text in ("hold", "refuse"):
        return text == "refuse", 0
    key, _, count = text.partition("=") if isinstance(text, str) else ("", "", "")
    if key == "local" and count.isdecimal():
        return False, int(count)
    raise ValueError(f"when_unreachable must be hold, refuse or local=N, not {text!r}")


def set_slots(redis: Any, name: str, slots: int) -> Deferred[Any]:
    """
    Change a limit for all processes at once.

    :param redis: a connection of txredisapi.
    """
    base = f"{PREFIX}:{{{name}}}"
    changed: Deferred[Any] = redis.set(f"{base}:slots", slots)
    return changed.addCallback(lambda _: redis.publish(f"{base}:room", "room"))
