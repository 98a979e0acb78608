"""
The Throttle protocol over HTTP: what each request asks of the semaphores, and how it is answered.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Coroutine, Mapping
from importlib.metadata import version
from io import BytesIO
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site

from connlimit.semaphores import _page
from connlimit.semaphores._durations import duration
from connlimit.semaphores._state import Rejected
from connlimit.semaphores._store import IStore, Unavailable

#: The longest body that is read, in bytes; the rest of a longer one is thrown away as it comes.
MOST_BYTES = 64 * 1024

#: How many bytes of a body that is too long are thrown away before the client is cut off.
_MOST_THROWN_AWAY = 2**31

_U64 = 2**64
_I64 = 2**63

#: What came of a request: a status, a body, and the body's type.
_Answer = tuple[int, bytes, str]


class SemaphoreRequest(Request):
    """
    A request that keeps no more of its body than can be of use.
    """

    _received = 0

    def gotLength(self, length: int | None) -> None:
        """
        Prepare for a body, without a file for a long one.
        """
        super().gotLength(length if length is None else min(length, MOST_BYTES))
        self.content = BytesIO()

    def handleContentChunk(self, data: bytes) -> None:
        """
        Keep a piece of the body, if it is not too much.
        """
        self._received += len(data)
        if self._received <= MOST_BYTES:
            super().handleContentChunk(data)
        elif self._received > _MOST_THROWN_AWAY and self.channel is not None:
            self.channel.forceAbortClient()

    def body_is_too_long(self) -> bool:
        """
        Whether something of the body was thrown away.
        """
        return self._received > MOST_BYTES


class SemaphoreSite(Site):
    """
    Serves the semaphores of a store.
    """

    noisy = False
    requestFactory = SemaphoreRequest

    def __init__(self, store: IStore, clock: IReactorTime) -> None:
        """
        :param clock: measures how long a request may wait for its lock.
        """
        self._root = _Root(store, clock)
        super().__init__(self._root, timeout=60)

    def log(self, request: object) -> None:
        """
        Keep no log of requests: there is one each few seconds for each client that waits.
        """

    def set_ready(self, is_ready: bool) -> None:
        """
        Have requests answered that have to do with semaphores, or put off, because these are not known yet.
        """
        self._root.is_ready = is_ready

    def finish(self, seconds: float) -> Deferred[None]:
        """
        Have each connection end with its next answer, and requests wait no longer than so many seconds.

        :return: fires when all requests are answered.
        """
        return self._root.finish(seconds)


class _Refused(Exception):
    """
    A request that is none of the protocol's.
    """

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers or {}
        self.body = f"{text}\n"
        self.kind = _TEXT


_Handler = Callable[..., Coroutine[Any, Any, _Answer]]
_Methods = dict[bytes, _Handler]

_TEXT = "text/plain; charset=utf-8"
_HTML = "text/html; charset=utf-8"


class _Root(Resource):
    """
    Everything that is answered.
    """

    isLeaf = True
    _log = Logger()

    def __init__(self, store: IStore, clock: IReactorTime) -> None:
        super().__init__()
        self._store = store
        self._clock = clock
        self._draw = random.SystemRandom().getrandbits
        self._polls: dict[tuple[int, str], list[Deferred[Rejected | None]]] = {}
        self.in_flight = 0
        self.is_ready = True
        self._ends: Deferred[None] | None = None
        store.state.settled = self._settled
        self._pages: dict[str, _Methods] = {
            "": {b"GET": self._welcome},
            "health": {b"GET": self._health},
            "version": {b"GET": self._version},
            "favicon.ico": {b"GET": self._icon},
            "metrics": {b"GET": self._metrics},
            "new_peer": {b"POST": self._new_peer},
            "restore": {b"POST": self._restore},
            "remainder": {b"GET": self._remainder},
        }

    # How any request is answered

    def render(self, request: Request) -> Any:
        self.in_flight += 1
        answering = ensureDeferred(self._answer(request))
        if not answering.called:
            # The client went away: its lock, if it has one pending, keeps its place until it expires.
            request.notifyFinish().addErrback(lambda _: answering.cancel())
        answering.addBoth(self._answered)
        return NOT_DONE_YET

    def _answered(self, result: object) -> None:
        self.in_flight -= 1
        self._may_have_ended()

    async def _answer(self, request: Request) -> None:
        headers: Mapping[str, str] = {}
        try:
            handler, arguments = self._find(request)
            status, body, kind = await handler(request, *arguments)
        except CancelledError:
            return
        except _Refused as error:
            status, body, kind, headers = error.status, error.body.encode(), error.kind, error.headers
        except Rejected as error:
            status, body, kind = error.status, str(error).encode(), _TEXT
        except Unavailable as error:
            # Clients of Throttle try again after a 503.
            status, body, kind = 503, f"{error}\n".encode(), _TEXT
        except Exception:
            self._log.failure("{method} {uri} failed", method=request.method, uri=request.uri)
            status, body, kind = 500, b"Something went wrong here; the log says what.\n", _TEXT
        request.setResponseCode(status)
        request.setHeader(b"content-type", kind.encode())
        request.setHeader(b"content-length", b"%d" % len(body))
        request.setHeader(b"cache-control", b"no-store")
        request.setHeader(b"x-content-type-options", b"nosniff")
        for name, value in headers.items():
            request.setHeader(name.encode(), value.encode())
        if self._ends is not None:
            request.setHeader(b"connection", b"close")
            request.channel.persistent = False
        if request.method != b"HEAD":
            request.write(body)
        request.finish()

    def _find(self, request: Request) -> tuple[_Handler, list[Any]]:
        """
        What answers a request, and what its path tells it.
        """
        try:
            parts = [part.decode() for part in request.postpath or [b""]]
        except UnicodeDecodeError:
            raise _Refused(400, "the path must be UTF-8") from None
        methods, arguments = self._route(parts)
        method = b"GET" if request.method == b"HEAD" else request.method
        if method not in methods:
            allowed = sorted(each.decode() for each in methods)
            if b"GET" in methods:
                allowed.append("HEAD")
            raise _Refused(
                405, f"only {' and '.join(allowed)} can be done here", {"allow": ", ".join(allowed)}
            )
        return methods[method], arguments

    def _route(self, parts: list[str]) -> tuple[_Methods, list[Any]]:
        match parts:
            case [page] if page in self._pages:
                return self._pages[page], []
            case ["peers", ""]:
                return {b"GET": self._peers}, []
            case ["peers", peer]:
                return {b"PUT": self._heartbeat, b"DELETE": self._remove}, [_peer_number(peer)]
            case ["peers", peer, name] if name:
                methods: _Methods = {b"PUT": self._acquire, b"DELETE": self._release}
                if name == "is_acquired":
                    methods[b"GET"] = self._is_acquired
                return methods, [_peer_number(peer), name]
        raise _NotFound()

    def _submit(self, operation: str, *arguments: object) -> Deferred[Any]:
        if not self.is_ready:
            raise Unavailable("The semaphores are not known yet")
        return self._store.submit(operation, *arguments)

    # What a browser, a monitor or a person asks for

    async def _welcome(self, request: Request) -> _Answer:
        if "text/html" in (request.getHeader("accept") or ""):
            facts = list(self._store.state.facts(self._store.seconds()))
            request.setHeader(b"content-security-policy", _page.POLICY)
            return 200, _page.welcome(facts).encode(), _HTML
        return 200, b"Hello from Throttle!", _TEXT

    async def _health(self, request: Request) -> _Answer:
        return 200, b"Ok", _TEXT

    async def _version(self, request: Request) -> _Answer:
        return 200, version("connlimit").encode(), _TEXT

    async def _icon(self, request: Request) -> _Answer:
        return 200, _page.ICON, "image/x-icon"

    async def _metrics(self, request: Request) -> _Answer:
        facts = list(self._store.state.facts(self._store.seconds()))
        return 200, _metrics_text(facts).encode(), f"{_TEXT}; version=0.0.4"

    # What clients ask for

    async def _new_peer(self, request: Request) -> _Answer:
        fields = _fields(request, {"expires_in"})
        expires_in = _body_duration(fields["expires_in"])
        while True:
            peer = self._draw(64)
            if await self._submit("new_peer", peer, expires_in):
                return _json(peer)

    async def _peers(self, request: Request) -> _Answer:
        await self._submit("nothing")
        return _json(list(self._store.state.peer_facts(self._store.seconds())))

    async def _heartbeat(self, request: Request, peer: int) -> _Answer:
        fields = _fields(request, {"expires_in"})
        await self._submit("heartbeat", peer, _body_duration(fields["expires_in"]))
        return 200, b"Ok", _TEXT

    async def _remove(self, request: Request, peer: int) -> _Answer:
        known = await self._submit("remove", peer)
        return _json("Peer released" if known else "Peer not found")

    async def _acquire(self, request: Request, peer: int, name: str) -> _Answer:
        expires_in = _query_duration(request, "expires_in")
        block_for = _query_duration(request, "block_for")
        count = _body(request)
        if type(count) is not int or not -_I64 <= count < _I64:
            raise _Refused(422, "the body must be a whole number, the count of the lock, such as 1")
        if await self._submit("acquire", peer, name, count, expires_in):
            return _json(peer)
        acquired = await self._poll(peer, name, block_for or 0.0)
        return _json(peer, 200 if acquired else 202)

    async def _release(self, request: Request, peer: int, name: str) -> _Answer:
        await self._submit("release", peer, name)
        return 200, b"Ok", _TEXT

    async def _is_acquired(self, request: Request, peer: int, _: str) -> _Answer:
        return _json(await self._submit("is_acquired", peer))

    async def _remainder(self, request: Request) -> _Answer:
        names = (request.args or {}).get(b"semaphore", [])
        if len(names) != 1:
            raise _Refused(400, "the query must name one semaphore, such as ?semaphore=A")
        try:
            name = names[0].decode()
        except UnicodeDecodeError:
            raise _Refused(400, "the query must be UTF-8") from None
        return _json(await self._submit("remainder", name))

    async def _restore(self, request: Request) -> _Answer:
        fields = _fields(request, {"expires_in", "peer_id", "acquired"})
        peer, acquired = fields["peer_id"], fields["acquired"]
        if type(peer) is not int or not 0 <= peer < _U64:
            raise _Refused(422, "peer_id must be a whole number of 64 bits")
        if not isinstance(acquired, dict) or not all(
            type(count) is int and -_I64 <= count < _I64 for count in acquired.values()
        ):
            raise _Refused(422, 'acquired must have the count of each lock, such as {"A": 1}')
        await self._submit("restore", peer, _body_duration(fields["expires_in"]), acquired)
        return 200, b"Ok", _TEXT

    # Requests that wait for their locks

    async def _poll(self, peer: int, name: str, seconds: float) -> bool:
        """
        Wait for a pending lock to be granted, at most so many seconds.

        :return: whether it was.
        :raises Rejected: if it never will be.
        """
        if not seconds or self._ends is not None:
            return False
        settled: Deferred[Rejected | None] = Deferred()
        polls = self._polls.setdefault((peer, name), [])
        polls.append(settled)
        timer = self._clock.callLater(seconds, self._give_up, settled)
        try:
            reason = await settled
        except _StillPending:
            return False
        finally:
            if timer.active():
                timer.cancel()
            polls.remove(settled)
            if not polls:
                self._polls.pop((peer, name), None)
        if reason is not None:
            raise reason
        return True

    def _give_up(self, settled: Deferred[Rejected | None]) -> None:
        if not settled.called:
            settled.errback(_StillPending())

    def _settled(self, peer: int, name: str, reason: Rejected | None) -> None:
        for each in list(self._polls.get((peer, name), ())):
            if not each.called:
                # By and by, as the state is in the middle of an operation.
                self._clock.callLater(0, self._tell, each, reason)

    def _tell(self, settled: Deferred[Rejected | None], reason: Rejected | None) -> None:
        if not settled.called:
            settled.callback(reason)

    def finish(self, seconds: float) -> Deferred[None]:
        self._ends = Deferred()
        timer = self._clock.callLater(seconds, self._give_all_up)
        self._ends.addBoth(lambda _: timer.cancel() if timer.active() else None)
        ends = self._ends
        self._may_have_ended()
        return ends

    def _give_all_up(self) -> None:
        for polls in list(self._polls.values()):
            for each in list(polls):
                self._give_up(each)

    def _may_have_ended(self) -> None:
        if self._ends is not None and not self._ends.called and not self.in_flight:
            self._ends.callback(None)


class _StillPending(Exception):
    """
    A request has waited long enough.
    """


class _NotFound(_Refused):
    """
    There is nothing at the path.
    """

    def __init__(self) -> None:
        super().__init__(404, "Not found")
        self.body, self.kind = _page.NOT_FOUND, _HTML


def _peer_number(text: str) -> int:
    if text.isascii() and text.isdecimal() and len(text) <= 20 and int(text) < _U64:
        return int(text)
    raise _Refused(400, f"a peer is a whole number of 64 bits, not {text[:40]!r}")


def _body(request: Request) -> Any:
    """
    The JSON that a request has for a body.
    """
    if isinstance(request, SemaphoreRequest) and request.body_is_too_long():
        raise _Refused(413, f"a body can have {MOST_BYTES} bytes at most")
    kind = (request.getHeader("content-type") or "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise _Refused(415, "the request needs a body with Content-Type: application/json")
    assert request.content is not None
    try:
        return json.loads(request.content.read().decode())
    except (ValueError, RecursionError) as error:
        raise _Refused(400, f"the body must be JSON: {error}") from None


def _fields(request: Request, names: set[str]) -> dict[str, Any]:
    body = _body(request)
    if not isinstance(body, dict) or not names <= body.keys():
        raise _Refused(422, f"the body must be a JSON object with {' and '.join(sorted(names))}")
    return body


def _body_duration(value: object) -> float:
    try:
        return duration("expires_in", value)
    except ValueError as error:
        raise _Refused(422, str(error)) from None


def _query_duration(request: Request, name: str) -> float | None:
    values = (request.args or {}).get(name.encode())
    if values is None:
        return None
    try:
        return duration(name, values[-1].decode())
    except ValueError as error:
        raise _Refused(400, str(error)) from None


def _json(value: object, status: int = 200) -> _Answer:
    return status, json.dumps(value).encode(), "application/json"


_METRICS = (
    ("acquired", "acquired", "Sum of all acquired locks."),
    (
        "longest_pending_sec",
        "longest_pending",
        "Time the longest pending peer is waiting until now, to acquire a lock to a semaphore.",
    ),
    ("max", "full_count", "Maximum allowed lock count for this semaphore."),
    ("pending", "pending", "Sum of all pending locks"),
)


def _metrics_text(facts: list[dict[str, Any]]) -> str:
    """
    The metrics of Throttle, in the text format of Prometheus.
    """
    lines = []
    for metric, key, text in _METRICS if facts else ():
        lines += [f"# HELP throttle_{metric} {text}", f"# TYPE throttle_{metric} gauge"]
        for each in facts:
            label = each["name"].replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
            lines.append(f'throttle_{metric}{{semaphore="{label}"}} {int(each[key])}')
    return "".join(f"{line}\n" for line in lines)
