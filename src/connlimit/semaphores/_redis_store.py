"""
Where the state of the semaphores is kept: in a Redis, so that it outlives this process and others see it too.

What Redis keeps is the order of the operations: a log to which each server adds its own, with the time by
Redis's clock, and of which each carries out all. The same operations in the same order lead to the same state
everywhere, so that every server can answer for all. From time to time one of them writes the state down, and
the operations before it are dropped.

A server that finds that Redis has lost its memory, or a part of it, writes down the state that it has itself.
If several do, the first counts, and the others take it over.
"""

from __future__ import annotations

import json
import random
import secrets
import time
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred, succeed
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from connlimit._redis import Redis, describe
from connlimit._redis_address import RedisAddress
from connlimit.semaphores._state import Rejected, State
from connlimit.semaphores._store import IStore, Timer, Unavailable

_PREFIX = "connlimit:{semaphores}"

#: Seconds between two looks at what others did, if no notification comes.
_POLL = 1.0

#: Seconds in which Redis must answer.
_PATIENCE = 3.0

#: How many operations the log has before the state is written down, unless there are more peers than that.
_KEPT = 2000

#: How many bytes the state and its log can have.
_LONGEST = 1 << 28

# Adds operations to the log, and returns all that the caller has not seen.
#
# KEYS: log (a list), about (a hash: history, the name of this log; start, how many operations were dropped;
#   state, what they led to; time, that of the last operation in ms)
# ARGV: channel, history, how many operations the caller has seen, operations…
# Returns: history, the state if the caller must begin with it, the number of the first operation returned,
#   operations… Or nothing, if the caller has seen what is not there any more: then nothing was added.
_ADD = """
local history, start = unpack(redis.call('HMGET', KEYS[2], 'history', 'start'))
local seen = tonumber(ARGV[3])
if not history and ARGV[2] ~= '' then return {} end
if not history then
  local time = redis.call('TIME')
  history, start = redis.sha1hex(time[1] .. time[2] .. (ARGV[4] or '')), 0
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[2], 'history', history, 'start', 0, 'state', '', 'time', 0)
end
start = tonumber(start)
if history == ARGV[2] and seen > start + redis.call('LLEN', KEYS[1]) then return {} end
if #ARGV > 3 then
  local time = redis.call('TIME')
  local now = math.max(time[1] * 1000 + math.floor(time[2] / 1000), redis.call('HGET', KEYS[2], 'time'))
  redis.call('HSET', KEYS[2], 'time', now)
  for at = 4, #ARGV do redis.call('RPUSH', KEYS[1], string.format('%d ', now) .. ARGV[at]) end
  redis.call('PUBLISH', ARGV[1], 'operations')
end
local state = ''
if history ~= ARGV[2] or seen < start then
  state, seen = redis.call('HGET', KEYS[2], 'state'), start
end
local answer = redis.call('LRANGE', KEYS[1], seen - start, -1)
table.insert(answer, 1, tostring(seen))
table.insert(answer, 1, state)
table.insert(answer, 1, history)
return answer
"""

# Writes a state down, and drops the operations that led to it.
#
# KEYS: as above
# ARGV: channel, history, how many operations led to the state, the state, time of the last of them in ms, and
#   the name of a new history, if it is to begin with this state because the log is behind it
_WRITE = """
local history, start, time = unpack(redis.call('HMGET', KEYS[2], 'history', 'start', 'time'))
local seen = tonumber(ARGV[3])
if history and history ~= ARGV[2] then return 0 end
local last = history and tonumber(start) + redis.call('LLEN', KEYS[1]) or -1
if seen > last then
  if ARGV[6] == '' then return 0 end
  redis.call('DEL', KEYS[1])
  time = math.max(tonumber(time or 0), tonumber(ARGV[5]))
  redis.call('HSET', KEYS[2], 'history', ARGV[6], 'start', seen, 'state', ARGV[4], 'time', time)
  redis.call('PUBLISH', ARGV[1], 'history')
elseif seen > tonumber(start) then
  redis.call('LTRIM', KEYS[1], seen - start, -1)
  redis.call('HSET', KEYS[2], 'start', seen, 'state', ARGV[4])
end
return 0
"""


@implementer(IStore)
class RedisStore:
    """
    A state that all servers have which use the same database of the same Redis.
    """

    _log = Logger()

    def __init__(self, state: State, url: str, reactor: Any) -> None:
        """
        :param url: see `RedisAddress.from_url`.
        :raises ValueError: if the URL is wrong.
        """
        self.state = state
        self._empty = state.dump()
        self._address = RedisAddress.from_url(url)
        self._reactor = reactor
        self._channel = f"{_PREFIX}:operations"
        self._keys = [f"{_PREFIX}:log", f"{_PREFIX}:about"]
        self._redis = Redis(self._address, reactor, self._channel, lambda _: self._look(), _LONGEST)
        self._history = ""
        self._seen = 0
        # The time of the last operation by Redis's clock, in ms, and when it was seen by the monotonic clock.
        self._time = 0
        self._time_seen = time.monotonic()
        self._member = secrets.token_hex(8)
        self._count = 0
        self._queue: list[str] = []
        self._asked: dict[str, Deferred[Any]] = {}
        self._exchanging = False
        self._look_again = False
        self._closed = False
        self._is_away = False
        self._timer = Timer(self, reactor)
        self._next_look: IDelayedCall | None = None

    def submit(self, operation: str, *arguments: object) -> Deferred[Any]:
        """
        See `IStore.submit`.
        """
        self._count += 1
        token = f"{self._member}:{self._count}"
        done: Deferred[Any] = Deferred()
        self._asked[token] = done
        self._queue.append(json.dumps([token, operation, arguments], separators=(",", ":")))
        self._look()
        return done

    def seconds(self) -> float:
        """
        See `IStore.seconds`.
        """
        return self._time / 1000 + time.monotonic() - self._time_seen

    def close(self) -> Deferred[None]:
        """
        See `IStore.close`.
        """
        self._closed = True
        self._timer.cancel()
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        self._redis.hang_up()
        return succeed(None)

    # What is said to Redis, one thing at a time

    def _look(self) -> None:
        """
        Add what is to be added, and see what is new.
        """
        if self._exchanging or self._closed:
            self._look_again = True
            return
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        self._exchanging = True
        self._look_again = False
        operations, self._queue = self._queue, []
        exchanging = ensureDeferred(self._exchange(operations)).addTimeout(
            _PATIENCE, self._reactor, _too_late
        )
        exchanging.addCallbacks(self._exchanged, self._failed, errbackArgs=(operations,))
        exchanging.addErrback(
            lambda failure: self._log.failure("{operations}", failure, operations=operations)
        )

    async def _exchange(self, operations: list[str]) -> None:
        while True:
            arguments = [self._channel, self._history, self._seen, *operations]
            answer = await self._redis.eval(_ADD, self._keys, arguments)
            if not isinstance(answer, list) or (answer and len(answer) < 3):
                raise ValueError(f"it answers {answer!r:.100}")
            if answer:
                break
            await self._write(secrets.token_hex(20))
            self._log.warn(
                "Redis at {address} has lost what it knew; it is told again", address=self._address
            )
        history, state, first, *log = answer
        if history != self._history or state:
            self.state.load(json.loads(state) if state else self._empty)
            self._history, self._seen = history, int(first)
        before, is_ours = self._seen, False
        for entry in log:
            is_ours = self._carry_out(entry) or is_ours
        most = max(_KEPT, len(self.state.peers))
        if is_ours and before // most != self._seen // most:
            await self._write("")

    async def _write(self, new_history: str) -> None:
        arguments = [
            self._channel,
            self._history,
            self._seen,
            json.dumps(self.state.dump()),
            self._time,
            new_history,
        ]
        await self._redis.eval(_WRITE, self._keys, arguments)

    def _carry_out(self, entry: str) -> bool:
        """
        Carry out an operation of the log.

        :return: whether it was added here.
        """
        now, _, text = entry.partition(" ")
        token, operation, arguments = json.loads(text)
        self._seen += 1
        self._time, self._time_seen = int(now), time.monotonic()
        result: Any
        try:
            result = self.state.apply(self._time / 1000, operation, arguments)
        except Rejected as error:
            result = Failure(error)
        except Exception:
            result = Failure()  # the same everywhere, and nothing that comes after it can be left out
            self._log.failure("{entry} cannot be carried out", result, entry=entry)
        done = self._asked.pop(token, None)
        if done is not None and not done.called:
            done.callback(result)
        return done is not None

    def _exchanged(self, result: None) -> None:
        self._exchanging = False
        if self._is_away:
            self._is_away = False
            self._log.info("Redis at {address} is back", address=self._address)
        if self._closed:
            return
        self._redis.listen(_PATIENCE)
        self._timer.set()
        if self._queue or self._look_again:
            self._look()
        else:
            self._next_look = self._reactor.callLater(_POLL, self._look_now)

    def _look_now(self) -> None:
        self._next_look = None
        self._look()

    def _failed(self, failure: Failure, operations: list[str]) -> None:
        self._exchanging = False
        self._redis.hang_up()
        why = describe(failure.value or ValueError())
        if not self._is_away and not self._closed:
            self._is_away = True
            self._log.error("Redis at {address} cannot be used: {why}", address=self._address, why=why)
        queue, self._queue = operations + self._queue, []
        for text in queue:
            done = self._asked.pop(json.loads(text)[0], None)
            if done is not None and not done.called:
                done.errback(Unavailable(f"The store cannot be used now: {why}"))
        if not self._closed:
            # Not all at once, when it is back.
            self._next_look = self._reactor.callLater(random.uniform(0.5, 1) * _POLL, self._look_now)


def _too_late(result: object, seconds: float) -> object:
    raise TimeoutError(f"no answer within {seconds:g} s")
