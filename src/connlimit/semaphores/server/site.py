"""
The Throttle protocol over HTTP: what each request asks of the semaphores, and how it is answered.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from connlimit._system.bounded_log import BoundedLog
from connlimit._system.version import __version__
from connlimit.semaphores.server import page
from connlimit.semaphores.server.facts import metrics_text, peer_facts, semaphore_facts
from connlimit.semaphores.server.http.connection import HttpFactory
from connlimit.semaphores.server.http.messages import HTML, JSON, TEXT, Answer, Request
from connlimit.semaphores.server.http.shared import Shared, pieces_of
from connlimit.semaphores.server.polls import Polls
from connlimit.semaphores.server.records import Rejected
from connlimit.semaphores.server.requests import (
    Query,
    Refused,
    count_of,
    expiry_of,
    name_of,
    parts_of,
    peer_number,
    query_duration,
    query_name,
    restored_by,
)
from connlimit.semaphores.server.store import IStore, Unavailable

#: How many peers are listed in one turn of the reactor.
_SLICE = 500

#: How many routes are remembered, and how long their targets can be: peers ask again and again for the same.
_ROUTES, _SHORT = 2048, 200

_METRICS = f"{TEXT}; version=0.0.4"

_OK = Answer(200, b"Ok")
_RELEASED = Answer(200, b'"Peer released"', JSON)
_NO_PEER = Answer(200, b'"Peer not found"', JSON)
_TRUE, _FALSE = (Answer(200, each, JSON) for each in (b"true", b"false"))
_NOT_FOUND = Answer(404, page.NOT_FOUND.encode(), HTML)

_Reply = Callable[[Answer], None]
_Answering = Answer | Deferred[Answer]
_Handler = Callable[..., _Answering]
_Methods = dict[bytes, _Handler]
# What can be done there, or None if there is nothing; the query; and what the path tells.
_Route = tuple[_Methods | None, Query, tuple[Any, ...]]


class SemaphoreSite(HttpFactory):
    """
    Serves the semaphores of a store.
    """

    _log = BoundedLog(Logger(namespace="connlimit.semaphores.server"))

    def __init__(self, store: IStore, clock: IReactorTime) -> None:
        """
        :param clock: measures how long a request may wait for its lock.
        """
        super().__init__(clock)
        self._store = store
        self._polls = Polls(clock)
        self._draw = random.SystemRandom().getrandbits
        self._in_flight = 0
        self._ends: Deferred[None] | None = None
        self._is_ready = True
        self._shared = Shared()
        store.state.settled = self._polls.settled
        self._pages: dict[bytes, _Methods] = {
            b"": {b"GET": self._welcome},
            b"health": {b"GET": self._health},
            b"version": {b"GET": self._version},
            b"favicon.ico": {b"GET": self._icon},
            b"metrics": {b"GET": self._metrics},
            b"new_peer": {b"POST": self._new_peer},
            b"restore": {b"POST": self._restore},
            b"remainder": {b"GET": self._remainder},
        }
        self._all_peers: _Methods = {b"GET": self._peers}
        self._one_peer: _Methods = {b"PUT": self._heartbeat, b"DELETE": self._remove}
        self._one_lock: _Methods = {b"PUT": self._acquire, b"DELETE": self._release}
        self._is_lock_acquired: _Methods = {**self._one_lock, b"GET": self._is_acquired}
        self._remembered_route = lru_cache(_ROUTES)(self._route)

    def set_ready(self, is_ready: bool) -> None:
        """
        Have requests answered that have to do with semaphores, or put off, because these are not known yet.
        """
        self._is_ready = is_ready

    def finish(self, seconds: float) -> Deferred[None]:
        """
        Have each connection end with its next answer, and requests wait no longer than these seconds.

        :return: fires when all requests are answered.
        """
        self.is_ending = True
        self._ends = Deferred()
        timer = self.clock.callLater(seconds, self._polls.end)
        self._ends.addBoth(lambda _: timer.cancel() if timer.active() else None)
        ends = self._ends
        self._may_have_ended()
        return ends

    # How any request is answered

    def answer(self, request: Request, reply: _Reply) -> Callable[[], None] | None:
        self._in_flight += 1
        try:
            answer = self._handle(request)
        except Exception:
            self._failed(Failure(), request, reply)
            return None
        if isinstance(answer, Answer):
            self._succeeded(answer, reply)
            return None
        answer.addCallbacks(self._succeeded, self._failed, (reply,), errbackArgs=(request, reply))
        return answer.cancel

    def _succeeded(self, answer: Answer, reply: _Reply) -> None:
        self._in_flight -= 1
        reply(answer)
        if self._ends is not None:
            self._may_have_ended()

    def _failed(self, failure: Failure, request: Request, reply: _Reply) -> None:
        error = failure.value
        if isinstance(error, Refused):
            answer = error.answer
        elif isinstance(error, Rejected):
            answer = Answer(error.status, str(error).encode())
        elif isinstance(error, Unavailable):
            # Clients of Throttle try again after a 503.
            answer = Answer(503, f"{error}\n".encode())
        else:
            if not isinstance(error, CancelledError):  # the client went away
                target = request.target[:200].decode("latin-1")
                self._log.failure("a request failed", failure, method=request.method.decode(), target=target)
            answer = Answer(500, b"Something went wrong here; the log says what.\n")
        self._succeeded(answer, reply)

    def _may_have_ended(self) -> None:
        if self._ends is not None and not self._ends.called and not self._in_flight:
            self._ends.callback(None)

    def _handle(self, request: Request) -> _Answering:
        target, method = request.target, request.method
        route = self._remembered_route if len(target) <= _SHORT else self._route
        methods, query, arguments = route(target)
        if methods is None:
            return _NOT_FOUND
        handler = methods.get(b"GET" if method == b"HEAD" else method)
        if handler is None:
            allowed = sorted(each.decode() for each in methods)
            if b"GET" in methods:
                allowed.append("HEAD")
            headers = (("Allow", ", ".join(allowed)),)
            raise Refused(405, f"only {' and '.join(allowed)} can be done here", headers)
        return handler(request, query, *arguments)

    def _route(self, target: bytes) -> _Route:
        """
        Where a target leads.
        """
        parts, query = parts_of(target)
        length = len(parts)
        if length == 1:
            return self._pages.get(parts[0]), query, ()
        if parts[0] != b"peers":
            return None, query, ()
        if length == 2:
            methods, peer = (self._one_peer, (peer_number(parts[1]),)) if parts[1] else (self._all_peers, ())
            return methods, query, peer
        if length == 3 and parts[2]:
            methods = self._is_lock_acquired if parts[2] == b"is_acquired" else self._one_lock
            return methods, query, (peer_number(parts[1]), name_of(parts[2]))
        return None, query, ()

    def _submit(self, then: Callable[[Any], _Answering], operation: str, *arguments: object) -> _Answering:
        """
        Carry out an operation; its result, now or later, leads to the answer.
        """
        if not self._is_ready:
            raise Unavailable("The semaphores are not known yet")
        result = self._store.submit(operation, *arguments)
        return result.addCallback(then) if type(result) is Deferred else then(result)

    # What a browser, a monitor or a person asks for

    def _welcome(self, request: Request, query: Query) -> Answer:
        if b"text/html" not in request.header(b"Accept"):
            return Answer(200, b"Hello from Throttle!")
        return self._shared.answer("welcome", lambda: page.welcome(self._facts()), HTML, page.HEADERS)

    def _health(self, request: Request, query: Query) -> Answer:
        return _OK

    def _version(self, request: Request, query: Query) -> Answer:
        return Answer(200, __version__.encode())

    def _icon(self, request: Request, query: Query) -> Answer:
        return Answer(200, page.ICON, "image/x-icon")

    def _metrics(self, request: Request, query: Query) -> Answer:
        return self._shared.answer(
            "metrics", lambda: pieces_of(metrics_text(self._facts()).encode()), _METRICS
        )

    def _facts(self) -> list[dict[str, Any]]:
        return semaphore_facts(self._store.state, self._store.seconds())

    # What clients ask for

    def _new_peer(self, request: Request, query: Query) -> _Answering:
        return self._draw_peer(expiry_of(request))

    def _draw_peer(self, expires_in: float) -> _Answering:
        peer = self._draw(64)
        return self._submit(
            lambda is_new: _number(peer) if is_new else self._draw_peer(expires_in),
            "new_peer",
            peer,
            expires_in,
        )

    def _peers(self, request: Request, query: Query) -> _Answering:
        return self._submit(self._list_peers, "nothing")

    def _list_peers(self, _: object) -> Answer:
        state = self._store.state
        if len(state.peers) <= _SLICE:
            return _json(list(peer_facts(state, self._store.seconds(), state.peers)))
        numbers = self._shared.recent("peers") or self._shared.keep("peers", list(state.peers))
        return Answer(200, self._peer_slices(numbers), JSON)

    def _peer_slices(self, numbers: list[int]) -> Iterator[bytes]:
        """
        All peers as JSON, each as it is when it is written.
        """
        before = "["
        for at in range(0, len(numbers), _SLICE):
            facts = peer_facts(self._store.state, self._store.seconds(), numbers[at : at + _SLICE])
            text = ", ".join(map(json.dumps, facts))
            if text:
                yield f"{before}{text}".encode()
                before = ", "
        yield b"]" if before != "[" else b"[]"

    def _heartbeat(self, request: Request, query: Query, peer: int) -> _Answering:
        return self._submit(_ok, "heartbeat", peer, expiry_of(request))

    def _remove(self, request: Request, query: Query, peer: int) -> _Answering:
        return self._submit(lambda was_known: _RELEASED if was_known else _NO_PEER, "remove", peer)

    def _acquire(self, request: Request, query: Query, peer: int, name: str) -> _Answering:
        expires_in = query_duration(query, b"expires_in")
        block_for = query_duration(query, b"block_for")

        def answer(is_acquired: bool) -> _Answering:
            if is_acquired:
                return _number(peer)
            if not block_for:
                return _number(peer, 202)
            waiting = self._polls.wait(peer, name, block_for)
            return waiting.addCallback(lambda is_acquired: _number(peer, 200 if is_acquired else 202))

        return self._submit(answer, "acquire", peer, name, count_of(request), expires_in)

    def _release(self, request: Request, query: Query, peer: int, name: str) -> _Answering:
        return self._submit(_ok, "release", peer, name)

    def _is_acquired(self, request: Request, query: Query, peer: int, _: str) -> _Answering:
        return self._submit(lambda is_so: _TRUE if is_so else _FALSE, "is_acquired", peer)

    def _remainder(self, request: Request, query: Query) -> _Answering:
        return self._submit(_number, "remainder", query_name(query))

    def _restore(self, request: Request, query: Query) -> _Answering:
        return self._submit(_ok, "restore", *restored_by(request))


def _ok(_: object) -> Answer:
    return _OK


def _json(value: object) -> Answer:
    return Answer(200, json.dumps(value).encode(), JSON)


def _number(number: int, status: int = 200) -> Answer:
    return Answer(status, b"%d" % number, JSON)
