"""
The server of the status page.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

from twisted.application.internet import StreamServerEndpointService
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IPushProducer, IStreamServerEndpoint
from twisted.internet.task import LoopingCall
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site
from zope.interface import implementer

from connlimit import _descriptors
from connlimit._accepting import WatchedEndpoint
from connlimit._factory import LimitingFactory
from connlimit._limiter import Limiter
from connlimit.status import _html
from connlimit.status._watch import INTERVAL, Watch

#: So many may watch at once, one client no more than a part of them; others wait a little, or are refused.
_LIMITS: dict[str, Any] = {
    "max_connections": 64,
    "max_per_peer": 32,
    "max_waiting": 64,
    "wait_timeout": 5.0,
    "refusal": "http",
}

#: Seconds within which a client must have sent its request, or its next one.
_REQUEST_TIMEOUT = 15

#: A watcher that has not read for so many seconds is given up.
_MOST_PAUSED = 10

_HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self';"
    b" connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}


class StatusService(StreamServerEndpointService):
    """
    Serves the status page, and watches the limiters as long as it runs.
    """

    def __init__(
        self, endpoint: IStreamServerEndpoint, limited: Any, show_peers: bool, hosts: frozenset[str]
    ) -> None:
        self._limited = limited
        self._show_peers = show_peers
        self._hosts = hosts
        self.watches: dict[str, Watch] = {}
        self.reactor_lag = 0.0
        self._sampled: float | None = None
        self._watchers: set[_Watcher] = set()
        self._sampling = LoopingCall(self._sample)
        site = Site(_Root(self), timeout=_REQUEST_TIMEOUT)
        site.noisy = False
        own = Limiter(**_LIMITS, name="status")
        super().__init__(WatchedEndpoint(endpoint, own), LimitingFactory(site, own))

    def privilegedStartService(self) -> None:
        """
        Start to listen, or raise the reason why that is impossible.
        """
        self._raiseSynchronously = True
        super().privilegedStartService()

    def startService(self) -> None:
        """
        Start to watch.
        """
        super().startService()
        self._sampling.start(INTERVAL)

    def stopService(self) -> Deferred[Any]:
        """
        Stop to listen and to watch.
        """
        if self._sampling.running:
            self._sampling.stop()
        for watcher in list(self._watchers):
            watcher.stopProducing()
        for watch in self.watches.values():
            watch.close()
        self.watches.clear()
        return maybeDeferred(super().stopService)

    def follow_limiters(self) -> None:
        """
        Watch those limiters that there are now.
        """
        limiters = self._limited.limiters
        for name, watch in list(self.watches.items()):
            if limiters.get(name) is not watch.limiter:
                self.watches.pop(name).close()
        for name, limiter in limiters.items():
            if name not in self.watches:
                self.watches[name] = Watch(limiter)

    def is_draining(self) -> bool:
        """
        Whether any limiter is being drained.
        """
        return any(limiter.snapshot().draining for limiter in self._limited.limiters.values())

    def state(self, with_peers: bool) -> dict[str, Any]:
        """
        Everything there is to tell, as JSON can say it.
        """
        self.follow_limiters()
        semaphores = getattr(self._limited, "semaphores", None)
        return {
            **({"semaphores": semaphores(with_peers)} if semaphores else {}),
            "limiters": [
                {**watch.facts(with_peers), "history": watch.history()} for watch in self.watches.values()
            ],
            "descriptors": {"open": _descriptors.count(), "limit": _descriptors.limit()},
            "reactor_lag": self.reactor_lag,
        }

    def may_see_peers(self, request: Request) -> bool:
        """
        Whether the addresses of clients may be shown to whoever asks.
        """
        return self._show_peers or _is_loopback(getattr(request.getClientAddress(), "host", None))

    def is_ours(self, host: bytes | None) -> bool:
        """
        Whether a Host header names this server: by an IP address, localhost, or one of the given names.

        Any other name may have been made to point here to let a foreign page read ours (DNS rebinding).
        """
        name = (host or b"").decode("ascii", "replace").lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        if name == "localhost" or name in self._hosts:
            return True
        try:
            ip_address(name)
        except ValueError:
            return False
        return True

    def add_watcher(self, request: Request) -> None:
        """
        Send the page's sections each second, as long as the client reads them.
        """
        _Watcher(request, self._watchers, self.may_see_peers(request)).send(self._event)

    def _event(self, with_peers: bool) -> bytes:
        return b"data: %s\n\n" % json.dumps(_html.sections(self.state(with_peers))).encode()

    def _sample(self) -> None:
        self.follow_limiters()
        now = self._sampling.clock.seconds()
        if self._sampled is not None:
            self.reactor_lag = max(0.0, now - self._sampled - INTERVAL)
        self._sampled = now
        for watch in self.watches.values():
            watch.sample()
        made: dict[bool, bytes] = {}

        def event(with_peers: bool) -> bytes:
            if with_peers not in made:
                made[with_peers] = self._event(with_peers)
            return made[with_peers]

        for watcher in list(self._watchers):
            watcher.send(event)


def _is_loopback(host: str | None) -> bool:
    if host is None:
        return True  # a UNIX socket
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@implementer(IPushProducer)
class _Watcher:
    """
    A client that follows the page.
    """

    def __init__(self, request: Request, watchers: set[_Watcher], with_peers: bool) -> None:
        self._request = request
        self._watchers = watchers
        self._with_peers = with_peers
        self._paused = 0
        self._reads = True
        watchers.add(self)
        request.notifyFinish().addBoth(lambda _: watchers.discard(self))
        request.registerProducer(self, True)

    def send(self, event: Callable[[bool], bytes]) -> None:
        """
        Send an event, unless the client has not read the last ones.
        """
        if self._reads:
            self._paused = 0
            self._request.write(event(self._with_peers))
            return
        self._paused += 1
        if self._paused > _MOST_PAUSED:
            transport: Any = self._request.transport
            transport.abortConnection()

    def pauseProducing(self) -> None:
        self._reads = False

    def resumeProducing(self) -> None:
        self._reads = True

    def stopProducing(self) -> None:
        if self in self._watchers:
            self._watchers.discard(self)
            self._request.unregisterProducer()
            self._request.finish()


class _Root(Resource):
    """
    Everything that the server answers.
    """

    isLeaf = True

    def __init__(self, service: StatusService) -> None:
        super().__init__()
        self._service = service
        self._paths: dict[bytes, Callable[[Request], tuple[str, str | bytes]]] = {
            b"/": lambda request: ("text/html", _html.page(self._state(request))),
            b"/status.css": lambda request: ("text/css", _html.CSS),
            b"/status.js": lambda request: ("text/javascript", _html.SCRIPT),
            b"/status.json": lambda request: ("application/json", json.dumps(self._state(request))),
            b"/health": self._health,
            b"/metrics": self._metrics,
        }

    def render(self, request: Request) -> Any:
        for name, value in _HEADERS.items():
            request.setHeader(name, value)
        if request.method not in (b"GET", b"HEAD"):
            request.setHeader(b"allow", b"GET, HEAD")
            return self._answer(request, 405, "only GET and HEAD are answered\n")
        if not self._service.is_ours(request.getHeader(b"host")):
            return self._answer(
                request, 421, "ask by IP address, by localhost, or by a name listed in status.hosts\n"
            )
        if request.path == b"/events":
            return self._events(request)
        answer = self._paths.get(request.path)
        if answer is None:
            return self._answer(request, 404, "there is nothing here\n")
        kind, body = answer(request)
        return self._answer(request, request.code, body, kind)

    def _answer(self, request: Request, code: int, body: str | bytes, kind: str = "text/plain") -> bytes:
        request.setResponseCode(code)
        request.setHeader(b"content-type", f"{kind}; charset=utf-8".encode())
        data = body.encode() if isinstance(body, str) else body
        if request.method == b"HEAD":
            request.setHeader(b"content-length", b"%d" % len(data))
            return b""
        return data

    def _state(self, request: Request) -> dict[str, Any]:
        return self._service.state(self._service.may_see_peers(request))

    def _events(self, request: Request) -> Any:
        request.setHeader(b"content-type", b"text/event-stream")
        if request.method == b"HEAD":
            return b""
        request.channel.setTimeout(None)
        self._service.add_watcher(request)
        return NOT_DONE_YET

    def _health(self, request: Request) -> tuple[str, str]:
        draining = self._service.is_draining()
        request.setResponseCode(503 if draining else 200)
        return "text/plain", "draining\n" if draining else "ok\n"

    def _metrics(self, request: Request) -> tuple[str, str | bytes]:
        try:
            from connlimit import metrics
        except ImportError:
            request.setResponseCode(501)
            return "text/plain", "metrics need prometheus-client: pip install connlimit[metrics]\n"
        self._service.follow_limiters()
        return "text/plain; version=0.0.4", metrics.exposition(
            self._service.watches.values(), self._service.reactor_lag
        )
