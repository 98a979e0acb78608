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
- While Redis has been up for less than ``ttl``, it gives no new slots: it may have lost its memory, and every
  process says within that time what it holds. After FLUSHALL, or a failover to a replica that is behind, the
  limit may be exceeded by what is not known there, until the next heartbeat, a third of ``ttl`` at most.
- Processes that lack slots are served in the order in which they asked; a process has one place, however many
  wait for it there, and the order within it is that of its own line.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import attrs
import txredisapi  # type: ignore[import-untyped]
from twisted.application.internet import ClientService, backoffPolicy
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.endpoints import HostnameEndpoint, UNIXClientEndpoint, wrapClientTLS
from twisted.internet.interfaces import IDelayedCall, IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from zope.interface import implementer

from connlimit.interfaces import IConnection, ILimit

#: The prefix of all keys.
PREFIX = "connlimit"

#: What part of the ttl a lease is used for: the rest allows for the clocks' different speeds and for pauses.
_USED = 0.9

#: Seconds between two questions of a process that lacks slots, if no notification comes.
_POLL = 1.0

#: How many slots a busy process takes beyond those it needs, at most.
_MOST_SPARE = 64

# Leases as many slots as there are, of those that a member wants in all, and renews its lease.
#
# KEYS: slots (the limit), held (slots by member), alive (end of each lease in ms), asking (members in
#   the order of their asking), turns (counts the askings), last (the number of each member's last question)
# ARGV: member, ttl in ms, slots in use, slots kept in any case, slots wanted in all, the limit if none is
#   set, channel, number of the question
# Returns: slots held, how many others are asking.
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
local uptime = tonumber(string.match(redis.call('INFO', 'server'), 'uptime_in_seconds:(%d+)')) * 1000
if uptime < ttl then free = math.min(free, before) end
local held = math.max(kept, math.min(wanted, free))

redis.call('ZADD', KEYS[3], now + ttl, member)
if held > 0 then redis.call('HSET', KEYS[2], member, held) else redis.call('HDEL', KEYS[2], member) end
local asks = held < wanted and held <= in_use
if not asks then
  redis.call('ZREM', KEYS[4], member)
elseif not place then
  redis.call('ZADD', KEYS[4], redis.call('INCR', KEYS[5]), member)
end
for at = 2, 6 do redis.call('PEXPIRE', KEYS[at], ttl * 10) end

local asking = redis.call('ZCARD', KEYS[4]) - (asks and 1 or 0)
if (asking > 0 and held < before) or (asks and not place) then redis.call('PUBLISH', ARGV[7], 'room') end
return {held, asking}
"""

# Gives everything back that a member has, because it ends. KEYS and ARGV as above, as far as they matter.
_LEAVE = """
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[4], ARGV[1])
redis.call('HDEL', KEYS[6], ARGV[1])
redis.call('PUBLISH', ARGV[7], 'room')
return 0
"""


@attrs.frozen
class RedisAddress:
    """
    Where a Redis is, and how it is asked.
    """

    host: str | None
    port: int
    path: str | None
    database: int
    username: str | None
    password: str | None
    tls: bool

    @classmethod
    def from_url(cls, url: str) -> RedisAddress:
        """
        The address that a URL describes: ``redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]``, ``rediss://…``
        with TLS, or ``unix://[[USER]:PASSWORD@]/PATH[?db=DATABASE]``.

        :raises ValueError: if it describes none.
        """
        wrong = ValueError(
            "url must be that of a Redis, such as redis://localhost:6379/0 or unix:///run/redis.sock, "
            f"not {url!r}"
        )
        try:
            parts = urlsplit(url)
            port = parts.port or 6379
            if parts.scheme == "unix":
                database = int(parse_qs(parts.query).get("db", ["0"])[0])
            else:
                database = int(parts.path.strip("/") or 0)
        except ValueError:
            raise wrong from None
        if parts.scheme not in ("redis", "rediss", "unix") or database < 0:
            raise wrong
        if (parts.scheme == "unix") != (not parts.hostname) or (parts.scheme == "unix" and not parts.path):
            raise wrong
        return cls(
            parts.hostname,
            port,
            parts.path if parts.scheme == "unix" else None,
            database,
            unquote(parts.username) if parts.username else None,
            unquote(parts.password) if parts.password else None,
            parts.scheme == "rediss",
        )

    def endpoint(self, reactor: Any) -> IStreamClientEndpoint:
        """
        The endpoint to connect to.
        """
        if self.path is not None:
            return UNIXClientEndpoint(reactor, self.path, timeout=2)
        tcp = HostnameEndpoint(reactor, str(self.host), self.port, timeout=2)
        if not self.tls:
            return tcp
        from twisted.internet.ssl import optionsForClientTLS

        secure: IStreamClientEndpoint = wrapClientTLS(optionsForClientTLS(str(self.host)), tcp)
        return secure

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"


@implementer(ILimit)
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
        ttl: float = 10.0,
        when_unreachable: str = "hold",
        reactor: Any = None,
    ) -> None:
        """
        :param name: what the processes have in common.
        :param slots: how many slots there are, unless `set_slots` has said otherwise.
        :param url: see `RedisAddress.from_url`.
        :param ttl: seconds after which the slots of a process that is not heard of are everybody's again.
        :param when_unreachable: ``hold``: what is leased can be used until the lease ends; or ``local=N``:
            from then on N slots can be used in this process until Redis is back.
        :raises ValueError: for a wrong value.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a text of at least one character, not {name!r}")
        if isinstance(slots, bool) or not isinstance(slots, int) or slots < 0:
            raise ValueError(f"slots must be a whole number, 0 or more, not {slots!r}")
        if not 0.5 <= ttl <= 3600:
            raise ValueError(f"ttl must be a number of seconds from 0.5 to 3600, not {ttl!r}")
        self._local = _local_slots(when_unreachable)
        self.address = RedisAddress.from_url(url)
        if reactor is None:
            from twisted.internet import reactor
        self.name = name
        self.in_use = 0
        self.held = 0
        self._slots = slots
        self._ttl = ttl
        self._reactor = reactor
        self._member = f"{os.uname().nodename}:{os.getpid()}:{random.getrandbits(32):08x}"
        base = f"{PREFIX}:{{{name}}}"
        self._keys = [f"{base}:{each}" for each in ("slots", "held", "alive", "asking", "turns", "last")]
        self._channel = f"{base}:room"
        self._subscribers: list[Callable[[], None]] = []
        # When the lease ends, by the monotonic clock, which also runs while the process is stopped.
        self._ends = -1.0
        # Whether somebody here has been told that there is no slot, and whether that may be so elsewhere.
        self._short = False
        self._others_ask = False
        # How many slots to take beyond those that are needed.
        self._spare = 0
        self._question = 0
        self._asking = False
        self._ask_again = False
        self._timer: IDelayedCall | None = None
        self._is_away = False
        self._closed = False
        self._redis: Any = None
        self._listening: Any = None

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
        if time.monotonic() < self._ends:
            may = self.in_use < self.held
        else:
            may = self._is_away and self._local is not None and self.in_use < self._local
        if may:
            self.in_use += 1
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
            self._ask_soon(0)

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
        if self._redis is None:
            self._connect()
        began = time.monotonic()
        wanted = self.in_use + self._short + (0 if self._others_ask else self._spare)
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
        asked: Deferred[Any] = self._redis.eval(_LEASE, self._keys, arguments)
        asked.addTimeout(max(0.5, min(2.0, self._ttl / 3)), self._reactor)
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
        if not had_asked:
            self._spare //= 2
        seconds = min(_POLL, self._ttl / 3) if self._short else self._ttl / 3
        self._ask_soon(0 if self._ask_again else seconds)

    def _unanswered(self, failure: Any) -> None:
        self._asking = False
        if self._closed:
            return
        if not self._is_away:
            self._is_away = True
            self._log.error(
                "limit {name}: Redis at {address} does not answer: {error}",
                name=self.name,
                address=self.address,
                error=failure.getErrorMessage() or failure.type.__name__,
            )
        self._tell()
        # Not all at once, when it is back.
        self._ask_soon(random.uniform(0.5, 1) * min(_POLL, self._ttl / 3))

    def _tell(self) -> None:
        for callback in self._subscribers:
            callback()

    # Redis

    def _connect(self) -> None:
        where = self.address
        settings = {
            "dbid": where.database,
            "password": where.password,
            "reconnect": True,
            "connectTimeout": 2,
        }
        if where.path is not None:
            self._redis = txredisapi.lazyUnixConnection(where.path, **settings)
        else:
            self._redis = txredisapi.lazyConnection(
                where.host, where.port, ssl_context_factory=where.tls, username=where.username, **settings
            )
        self._listening = ClientService(
            where.endpoint(self._reactor),
            _Notifications(self._channel, where, self._notified),
            retryPolicy=backoffPolicy(initialDelay=0.1, maxDelay=1.0),
            clock=self._reactor,
        )
        self._listening.startService()

    def _notified(self) -> None:
        """
        Some process has given slots back, or lacks some.
        """
        self._others_ask = True
        if self._short or self.held > self.in_use:
            self._ask_soon(0)

    def close(self) -> Deferred[None]:
        """
        Give all slots back, and use Redis no more.

        :return: fires when that is done, or impossible.
        """
        return self._close()

    @inlineCallbacks
    def _close(self) -> Any:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.held, self._ends = 0, -1.0
        if self._redis is None:
            return
        yield self._listening.stopService()
        try:
            leaving = self._redis.eval(_LEAVE, self._keys, [self._member, 0, 0, 0, 0, 0, self._channel])
            yield leaving.addTimeout(1, self._reactor)
        except Exception as error:
            self._log.info("shared limit {name}: not told to Redis: {error}", name=self.name, error=error)
        yield self._redis.disconnect()


class _Listener(txredisapi.SubscriberProtocol):
    """
    Hears of notifications.
    """

    @inlineCallbacks
    def connectionMade(self) -> Any:
        factory = self.factory
        try:
            if factory.address.password is not None:
                yield self.auth(factory.address.password)
            yield self.subscribe(factory.channel)
        except Exception:
            return  # Redis is asked once a second as well
        factory.notified()

    def messageReceived(self, pattern: Any, channel: Any, message: Any) -> None:
        self.factory.notified()


class _Notifications(Factory):
    """
    Builds what hears of notifications.
    """

    protocol = _Listener
    noisy = False
    charset = "utf-8"
    convertNumbers = True

    def __init__(self, channel: str, address: RedisAddress, notified: Callable[[], None]) -> None:
        self.channel = channel
        self.address = address
        self.notified = notified


def _counts(answer: Any) -> tuple[int, int]:
    """
    What the script returns.

    :raises ValueError: if it is something else.
    """
    if not isinstance(answer, list) or [type(each) for each in answer] != [int, int]:
        raise ValueError(f"this is no Redis, it answers {answer!r}")
    return answer[0], answer[1]


def _local_slots(text: str) -> int | None:
    if text == "hold":
        return None
    key, _, count = text.partition("=") if isinstance(text, str) else ("", "", "")
    if key == "local" and count.isdecimal():
        return int(count)
    raise ValueError(f"when_unreachable must be hold or local=N, not {text!r}")


def set_slots(redis: Any, name: str, slots: int) -> Deferred[Any]:
    """
    Change a limit for all processes at once.

    :param redis: a connection of txredisapi.
    """
    base = f"{PREFIX}:{{{name}}}"
    changed: Deferred[Any] = redis.set(f"{base}:slots", slots)
    return changed.addCallback(lambda _: redis.publish(f"{base}:room", "room"))
