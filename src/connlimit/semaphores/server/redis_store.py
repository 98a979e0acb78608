"""
Where the state of the semaphores is kept: in a Redis, so that it outlives this process and others see it too.

What Redis keeps is the order of the operations: a log to which each server adds its own, and of which each
carries out all. The same operations in the same order lead to the same state everywhere, so that every server
can answer for all. From time to time one of them writes the state down, and the operations before it are
dropped. What changes nothing is not added: a server that is asked looks what others did, and answers then.

Each operation has a time, which goes by the servers' monotonic clocks: each says how late it is by its own,
and the latest counts. So it does not matter what Redis's clock does; while no server runs, no time goes by.

A server that finds that Redis has lost its memory, or a part of it, writes down the state that it has itself.
If several do, the first counts, and the others take it over.
"""

from __future__ import annotations

import json
import random
import secrets
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

import attrs
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, succeed
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from connlimit._redis.address import RedisAddress
from connlimit._redis.client import Redis, Script, describe
from connlimit._system.bounded_log import BoundedLog
from connlimit._system.clock import clock_of
from connlimit.semaphores.server.records import Rejected
from connlimit.semaphores.server.state import QUESTIONS, State
from connlimit.semaphores.server.store import IStore, Timer, Unavailable

_PREFIX = "connlimit:{semaphores}"

_SCRIPT = files(__package__).joinpath("log.lua").read_text()

#: Seconds between two looks at what others did, if no notification comes.
_POLL = 1.0

#: Seconds in which Redis must answer a question, however many of them it takes to get somewhere.
_PATIENCE = 3.0

#: Seconds between two looks at the time.
_BEAT = 0.25

#: How many bytes an operation can have that a client asked for.
MAX_BYTES = 1024

#: How many operations, and how many bytes of them, the log has before the state is written down; or as many
#: as the state has, if that is more.
_KEPT, _KEPT_BYTES = 2000, 1 << 20

#: How many operations are added, and how many are read, by one question.
_AT_ONCE = 1000

#: What is said of these at each question.
_LIMITS = f"{_AT_ONCE}\t{_KEPT}\t{_KEPT_BYTES}"

#: How many records of the state, and how many bytes, are on one page of it; how many pages are asked for, and
#: written, by one question.
_RECORDS, _PAGE, _PAGES_READ, _PAGES_WRITTEN = 500, 1 << 16, 8, 2

#: How many bytes an answer of Redis can have.
_LONGEST = 1 << 26

_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode

#: What makes JSON of what most operations have, which are finite numbers and little else.
_WORDS: dict[type, Callable[[Any], str]] = {int: repr, float: repr, type(None): lambda _: "null"}

_AWAY = "Redis at {address} cannot be used: {why}"


@attrs.define(eq=False)
class _Operation:
    """
    What somebody here asked for.

    :ivar token: its name, of which there is no other.
    :ivar text: what the log has of it; nothing if it changes nothing, and is a question therefore.
    """

    name: str
    arguments: tuple[Any, ...]
    token: str
    text: str


@implementer(IStore)
class RedisStore:
    """
    A state that all servers have which use the same database of the same Redis.
    """

    def __init__(self, state: State, url: str, reactor: Any) -> None:
        """
        :param url: see `RedisAddress.from_url`.
        :raises ValueError: if the URL is wrong.
        """
        self.state = state
        self._address = RedisAddress.from_url(url)
        self._clock = clock_of(reactor)
        self._member = secrets.token_hex(8)
        log, draft = f"{_PREFIX}:log", f"{_PREFIX}:draft:{self._member}"
        self._script = Script(_SCRIPT, [log, f"{_PREFIX}:state", f"{_PREFIX}:about", draft])
        self._redis = Redis(self._address, reactor, log, self._hear, _LONGEST)
        self._log = BoundedLog(Logger(namespace="connlimit.semaphores.server"), self._clock)
        # What is known here: how many operations of a history, and how the last of them begins.
        self._history, self._seen, self._mark = "", 0, ""
        # The time of the last of them, in ms, and when it was seen by the monotonic clock.
        self._time, self._time_seen = 0, time.monotonic()
        self._count = 0
        self._queue: list[_Operation] = []
        # What is answered, or refused, when it is known what others did.
        self._questions: list[_Operation] = []
        self._asked: dict[str, Deferred[Any]] = {}
        self._exchanging = False
        # What was heard during an exchange.
        self._heard: str | None = None
        self._is_writing = False
        self._closed = False
        self._timer = Timer(self, self._clock)
        # One timer for everything that has its time: a timer for each would take more than all the rest.
        self._beat: IDelayedCall | None = None
        self._look_at = 0.0
        # The questions that wait for their answers, and for how many beats: while this process is stopped, so
        # is their time.
        self._asking: dict[Deferred[Any], int] = {}

    def submit(self, operation: str, *arguments: Any) -> Any:
        self._count += 1
        token = f"{self._member}:{self._count}"
        if operation in QUESTIONS:
            self._questions.append(_Operation(operation, arguments, token, ""))
        else:
            text = _text(token, operation, arguments)
            asked = _Operation(operation, arguments, token, text)
            if self.state.refusal(operation, arguments) is None:
                self._check_length(operation, text)
                self._queue.append(asked)
            else:
                self._questions.append(asked)
        done = self._asked[token] = Deferred()
        self._look()
        return done

    def seconds(self) -> float:
        return self._time / 1000 + max(0.0, time.monotonic() - self._time_seen)

    def close(self) -> Deferred[None]:
        self._closed = True
        self._timer.cancel()
        if self._beat is not None:
            self._beat.cancel()
            self._beat = None
        self._redis.hang_up()
        return succeed(None)

    def _check_length(self, operation: str, text: str) -> None:
        """
        :raises Rejected: if an operation takes more of the log than is given to a client.
        """
        length = len(text) if text.isascii() else len(text.encode())
        if length > MAX_BYTES and operation != "configure":
            raise Rejected(
                413, f"A request can have {MAX_BYTES} bytes in the store at most; this one has {length}."
            )

    # What is said to Redis, one thing at a time

    def _hear(self, notification: str) -> None:
        """
        Others did something, perhaps what is known here already.
        """
        self._heard = notification
        if not self._exchanging and self._is_news(notification):
            self._look()

    def _is_news(self, notification: str) -> bool:
        history, _, there = notification.partition(" ")
        return history != self._history or not there.isdigit() or int(there) > self._seen

    def _look(self) -> None:
        """
        Add what is to be added, and see what is new.
        """
        if self._exchanging or self._closed:
            return
        if self._beat is None:
            self._beat = self._clock.callLater(_BEAT, self._see_what_is_due)
        self._exchanging = True
        self._heard = None
        operations, self._queue = self._queue[:_AT_ONCE], self._queue[_AT_ONCE:]
        questions, self._questions = self._questions, []
        exchanging = self._exchange(operations, questions)
        exchanging.addCallbacks(self._exchanged, self._failed, errbackArgs=(operations, questions))
        exchanging.addErrback(lambda failure: self._log.failure("an exchange failed", failure))

    def _exchange(self, operations: list[_Operation], questions: list[_Operation]) -> Deferred[None]:
        """
        Add operations, and carry out whatever is new; answer questions then.
        """
        # The time matters to who asks for something, and to nobody else.
        now = str(int(self.seconds() * 1000)) if operations or questions else ""
        words = f"add\t{self._history}\t{self._seen}\t{self._mark}\t{self._member}\t{now}\t{_LIMITS}"
        texts = ["\t".join([each.text for each in operations])] if operations else []
        return self._ask(words, *texts).addCallback(self._told, operations, questions)

    def _told(
        self, answer: list[str], operations: list[_Operation], questions: list[_Operation]
    ) -> Deferred[None] | None:
        """
        Do what Redis says to an exchange, and go on with it until everything is known.
        """
        word = answer[0]
        if word == "ok":
            _, self._history, last_time, there, writes, *entries = answer
            if operations and self._seen + len(operations) == int(there):
                # Nobody else did anything that is not known here, and so nothing is told.
                self._carry_out_own(last_time, operations)
            for entry in entries:
                self._carry_out(entry)
            if entries:
                self._mark = entries[-1].partition(",")[0]
                self._time_seen = time.monotonic()
            if self._seen < int(there):
                return self._exchange([], questions)
            self._time, self._time_seen = max(self._time, int(last_time)), time.monotonic()
            for question in questions:
                self._answer(question)
            if writes != "0" and not self._is_writing:
                self._is_writing = True
                ensureDeferred(self._write("")).addBoth(self._written)
            return None
        if word == "lost":
            beginning = ensureDeferred(self._tell_again())
        elif word == "state":
            beginning = ensureDeferred(self._read(answer[1], int(answer[2]), answer[3]))
        else:
            raise ValueError(f"it answers {word!r:.100}")
        return beginning.addCallback(lambda _: self._exchange(operations, questions))

    def _ask(self, words: str, *arguments: str) -> Deferred[list[str]]:
        """
        The words that the script returns. Redis has its time for each answer, and not for all together.
        """
        asking = self._redis.run(self._script, [words, *arguments])
        self._asking[asking] = 0
        return asking.addBoth(self._said, asking)

    def _said(self, answer: object, asking: Deferred[Any]) -> list[str]:
        del self._asking[asking]
        if isinstance(answer, Failure):
            if answer.check(CancelledError):
                raise TimeoutError(f"no answer within {_PATIENCE:g} s")
            answer.raiseException()
        return str(answer).split("\t")

    def _see_what_is_due(self) -> None:
        """
        Give up questions that are not answered, and look what others did if nothing was heard for a while.
        """
        self._beat = self._clock.callLater(_BEAT, self._see_what_is_due)
        for asking, beats in list(self._asking.items()):
            if beats * _BEAT >= _PATIENCE:
                asking.cancel()
            elif asking in self._asking:
                self._asking[asking] = beats + 1
        if not self._exchanging and time.monotonic() >= self._look_at:
            self._look()

    async def _tell_again(self) -> None:
        """
        Begin a history with what is known here.
        """
        await self._write(f"h{secrets.token_hex(20)}")
        self._log.warn("Redis at {address} has lost the state, which is sent again", address=self._address)

    async def _read(self, history: str, start: int, mark: str) -> None:
        """
        Begin with the state that was written down last; not if another was written down meanwhile.
        """
        state, at, there = State(), 0, 1
        while at < there:
            pages = await self._ask(f"read\t{history}\t{start}\t{at}\t{_PAGES_READ}")
            if not pages[0]:
                return
            there = int(pages[0])
            for page in pages[1:]:
                for record in json.loads(page):
                    state.add(record)
            at += _PAGES_READ
        self.state.become(state)
        self._history, self._seen, self._mark = history, start, mark

    async def _write(self, new_history: str) -> None:
        """
        Write the state down as it is now, while it may go on changing.
        """
        known = f"{self._history}\t{self._seen}"
        mark, now = self._mark, self._time
        count = size = 0
        written: list[str] = []
        for page, records in pages(self.state.records()):
            written.append(page)
            count, size = count + records, size + len(page)
            if len(written) >= _PAGES_WRITTEN:
                await self._ask(f"draft\t{known}\t{self._member}", *written)
                written = []
        await self._ask(f"draft\t{known}\t{self._member}", *written)
        await self._ask(f"keep\t{known}\t{mark}\t{now}\t{new_history}\t{count}\t{size}")

    def _written(self, result: object) -> None:
        # A failure matters to nobody: somebody will write the state down when there is more.
        self._is_writing = False

    # What comes of it

    def _carry_out(self, entry: str) -> None:
        """
        Carry out an operation of the log.
        """
        now, _, text = entry.partition(" ")
        token, operation, arguments = json.loads(text)
        self._seen += 1
        self._time = int(now)
        # Whatever happens is the same everywhere, and nothing that comes after it can be left out.
        self._finish(token, operation, arguments)

    def _carry_out_own(self, now: str, operations: list[_Operation]) -> None:
        """
        Carry out operations as the log has them, which are those that were added to it last.
        """
        self._mark = f"{now} {operations[-1].text}".partition(",")[0]
        self._time, self._time_seen = int(now), time.monotonic()
        for each in operations:
            self._seen += 1
            self._finish(each.token, each.name, each.arguments)

    def _answer(self, question: _Operation) -> None:
        """
        Answer what can be answered now that it is known what others did.
        """
        if not question.text:
            self._finish(question.token, question.name, question.arguments)
            return
        try:
            self.state.apply(self._time / 1000, "nothing", ())
            reason = self.state.refusal(question.name, question.arguments)
            if reason is not None:
                raise reason
            self._check_length(question.name, question.text)
        except Rejected as error:
            self._fire(question.token, Failure(error))
        else:
            self._queue.append(question)

    def _finish(self, token: str, operation: str, arguments: Any) -> None:
        result: Any
        try:
            result = self.state.apply(self._time / 1000, operation, arguments)
        except Rejected as error:
            result = Failure(error)
        except Exception:
            result = Failure()
            self._log.failure("{operation} cannot be carried out", result, operation=operation)
        self._fire(token, result)

    def _fire(self, token: str, result: Any) -> None:
        done = self._asked.pop(token, None)
        if done is not None and not done.called:
            done.callback(result)

    def _exchanged(self, result: None) -> None:
        self._exchanging = False
        self._log.over(_AWAY, "Redis at {address} is back", address=self._address)
        if self._closed:
            return
        self._redis.listen(_PATIENCE)
        self._timer.set()
        if self._queue or self._questions or (self._heard is not None and self._is_news(self._heard)):
            self._look()
        else:
            self._look_at = time.monotonic() + _POLL

    def _failed(self, failure: Failure, operations: list[_Operation], questions: list[_Operation]) -> None:
        self._exchanging = False
        self._redis.hang_up()
        why = describe(failure.value or ValueError())
        if not self._closed:
            self._log.error(_AWAY, address=self._address, why=why)
        given_up = [*operations, *self._queue, *questions, *self._questions]
        self._queue, self._questions = [], []
        for each in given_up:
            self._fire(each.token, Failure(Unavailable(f"The store cannot be used now: {why}")))
        # Not all at once, when it is back.
        self._look_at = time.monotonic() + random.uniform(0.5, 1) * _POLL


def _text(token: str, operation: str, arguments: tuple[Any, ...]) -> str:
    """
    An operation as JSON.
    """
    # The encoder takes twice as long for all of it.
    words = [_WORDS.get(type(each), _json)(each) for each in arguments]
    return f'["{token}","{operation}",[{",".join(words)}]]'


def pages(records: Iterator[list[Any]]) -> Iterator[tuple[str, int]]:
    """
    Records as JSON, a number on each page, and how many these are.
    """
    page: list[str] = []
    size = 0
    for record in records:
        page.append(_json(record))
        size += len(page[-1])
        if len(page) >= _RECORDS or size >= _PAGE:
            yield f"[{','.join(page)}]", len(page)
            page, size = [], 0
    if page:
        yield f"[{','.join(page)}]", len(page)
