"""
The server of the status page.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from ipaddress import ip_address
from typing import Any

from twisted.application.internet import StreamServerEndpointService
from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.internet.interfaces import IPushProducer, IStreamServerEndpoint
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request
from zope.interface import implementer

from connlimit._limiter.peers import peer_key
from connlimit._system import descriptors
from connlimit._system.bounded_log import BoundedLog
from connlimit._system.version import __version__
from connlimit.status import page
from connlimit.status.guarded_site import MOST, GuardedSite, is_near
from connlimit.status.once import Recent
from connlimit.status.picture import Picture
from connlimit.status.watch import INTERVAL, Watch

#: So many may follow the page from loopback, and as many from elsewhere; and so many of one peer elsewhere.
MOST_WATCHERS = MOST // 2
MOST_WATCHERS_OF_A_PEER = 4

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

    _log = Logger()

    def __init__(
        self, endpoint: IStreamServerEndpoint, limited: Any, show_peers: bool, hosts: frozenset[str]
    ) -> None:
        self._limited = limited
        self._show_peers = show_peers
        self._hosts = frozenset(host.lower() for host in hosts)
        self.watches: dict[str, Watch] = {}
        self.reactor_lag = 0.0
        self._sampled: float | None = None
        self._watchers: set[_Watcher] = set()
        self._sampling = LoopingCall(self._sample)
        self._picture = Recent(self._look, lambda picture: picture.took)
        self._metrics = Recent(self._exposition)
        self._site = GuardedSite(_Root(self))
        super().__init__(endpoint, self._site)

    def privilegedStartService(self) -> None:
        """
        Start to listen, or raise the reason why that is impossible.
        """
        self._raiseSynchronously = True
        super().privilegedStartService()

    def listening(self) -> Deferred[Any]:
        """
        Fires with the port, as soon as there is one.
        """
        asked: Deferred[Any] = Deferred()

        def tell(port: Any) -> Any:
            asked.callback(port)
            return port

        waiting: Any = self._waitingForPort
        waiting.addBoth(tell)
        return asked

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
        self._site.close()
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
                self.watches[name] = Watch(limiter, name, self._forget)

    def is_draining(self) -> bool:
        """
        Whether any limiter is being drained.
        """
        return any(limiter.snapshot().draining for limiter in self._limited.limiters.values())

    def show(self, form: str, with_peers: bool) -> Deferred[bytes]:
        """
        What there is to see, in a form of `Picture`: the same for all who ask at about the same time.
        """
        return self._picture.get().addCallback(lambda picture: picture.form(form, with_peers))

    def metrics(self) -> Deferred[bytes]:
        """
        The metrics, the same for all who ask at about the same time.

        :raises ImportError: without what they need.
        """
        return self._metrics.get()

    def _forget(self) -> None:
        self._picture.forget()
        self._metrics.forget()

    async def _exposition(self) -> bytes:
        from connlimit.status import metrics

        self.follow_limiters()
        return metrics.exposition(self.watches.values(), self.reactor_lag)

    async def _look(self) -> Picture:
        self.follow_limiters()
        limiters: list[tuple[Watch, dict[str, Any]]] = []
        for watch in list(self.watches.values()):
            limiters.append((watch, {**watch.facts(), "history": watch.history()}))
            if len(limiters) < len(self.watches):
                await self._turn()
        process = {
            "version": __version__,
            "descriptors": {"open": descriptors.count(), "limit": descriptors.limit()},
            "headers": descriptors.HEADERS.taken,
            "refusals": descriptors.REFUSALS.taken,
            "reactor_lag": self.reactor_lag,
        }
        return Picture(limiters, process, getattr(self._limited, "semaphores", None), self._turn)

    def _turn(self) -> Deferred[None]:
        """
        Give others their turn.
        """
        mine: Deferred[None] = Deferred()
        self._site.take_turn(lambda: mine.callback(None))
        return mine

    def may_see_peers(self, request: Request) -> bool:
        """
        Whether the addresses of clients may be shown to whoever asks.
        """
        return self._show_peers or is_near(request.getClientAddress())

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

    def add_watcher(self, request: Request) -> bool:
        """
        Send the page's sections each second, as long as the client reads them.

        :return: False if too many follow the page already.
        """
        address = request.getClientAddress()
        near, peer = is_near(address), _peer(address)
        its = [watcher for watcher in self._watchers if watcher.near == near]
        its_peers = [watcher for watcher in its if watcher.peer == peer]
        if len(its) >= MOST_WATCHERS or (not near and len(its_peers) >= MOST_WATCHERS_OF_A_PEER):
            return False
        watcher = _Watcher(request, self._watchers, self.may_see_peers(request), near, peer)
        self._send_picture([watcher])
        return True

    def _sample(self) -> None:
        self.follow_limiters()
        now = self._sampling.clock.seconds()
        if self._sampled is not None:
            self.reactor_lag = max(0.0, now - self._sampled - INTERVAL)
        self._sampled = now
        for watch in self.watches.values():
            watch.sample()
        if self._watchers:
            self._send_picture(list(self._watchers))

    def _send_picture(self, watchers: list[_Watcher]) -> None:
        """
        Send an event to each of these watchers.
        """
        for with_peers in (False, True):
            those = [watcher for watcher in watchers if watcher.with_peers == with_peers]
            if those:
                sections = self.show("event", with_peers).addCallback(partial(_send, those))
                sections.addErrback(lambda failure: self._log.failure("no picture was made", failure))


@implementer(IPushProducer)
class _Watcher:
    """
    A client that follows the page.
    """

    def __init__(
        self, request: Request, watchers: set[_Watcher], with_peers: bool, near: bool, peer: Hashable
    ) -> None:
        self.with_peers = with_peers
        self.near = near
        self.peer = peer
        self._request = request
        self._watchers = watchers
        self._paused = 0
        self._reads = True
        watchers.add(self)
        request.notifyFinish().addBoth(lambda _: watchers.discard(self))
        request.registerProducer(self, True)

    def send(self, event: bytes) -> None:
        """
        Send an event, unless the client has not read the last ones.
        """
        if self not in self._watchers:
            return
        if self._reads:
            self._paused = 0
            self._request.write(event)
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


def _send(watchers: list[_Watcher], event: bytes) -> None:
    for watcher in watchers:
        watcher.send(event)


class _Root(Resource):
    """
    Everything that the server answers.
    """

    isLeaf = True
    _log = BoundedLog(Logger())

    def __init__(self, service: StatusService) -> None:
        super().__init__()
        self._service = service
        show = service.show
        self._pages: dict[bytes, tuple[str, Callable[[bool], Deferred[bytes]]]] = {
            b"/": ("text/html", partial(show, "page")),
            b"/status.css": ("text/css", lambda _: succeed(page.CSS.encode())),
            b"/status.js": ("text/javascript", lambda _: succeed(page.SCRIPT.encode())),
            b"/status.json": ("application/json", partial(show, "json")),
        }
        # These have numbers alone, and are not guarded against foreign names.
        self._numbers: dict[bytes, Callable[[Request], Any]] = {
            b"/health": self._health,
            b"/metrics": self._metrics,
        }

    def render(self, request: Request) -> Any:
        for name, value in _HEADERS.items():
            request.setHeader(name, value)
        if request.method not in (b"GET", b"HEAD"):
            request.setHeader(b"allow", b"GET, HEAD")
            return self._answer(request, 405, "only GET and HEAD are answered\n")
        numbers = self._numbers.get(request.path)
        if numbers is not None:
            return numbers(request)
        if not self._service.is_ours(request.getHeader(b"host")):
            return self._answer(
                request,
                421,
                "ask by IP address, by localhost, or by a name given by --status-host or status.hosts\n",
            )
        if request.path == b"/events":
            return self._events(request)
        if request.path not in self._pages:
            return self._answer(request, 404, "there is nothing here\n")
        kind, make = self._pages[request.path]
        return self._answer_later(request, kind, make(self._service.may_see_peers(request)))

    def _answer(self, request: Request, code: int, body: str | bytes, kind: str = "text/plain") -> bytes:
        request.setResponseCode(code)
        request.setHeader(b"content-type", f"{kind}; charset=utf-8".encode())
        data = body.encode() if isinstance(body, str) else body
        if request.method == b"HEAD":
            request.setHeader(b"content-length", b"%d" % len(data))
            return b""
        return data

    def _answer_later(self, request: Request, kind: str, body: Deferred[bytes]) -> Any:
        """
        Answer when the body is made, if the client is still there.
        """
        gone: list[object] = []
        request.notifyFinish().addErrback(gone.append)

        def answer(data: bytes, code: int = 200, kind: str = kind) -> None:
            if not gone:
                data = self._answer(request, code, data, kind)
                request.setHeader(b"content-length", b"%d" % len(data)) if data else None
                request.write(data)
                request.finish()

        def fail(failure: Failure) -> None:
            if failure.check(ImportError):
                answer(b"metrics need prometheus-client: pip install connlimit[metrics]\n", 501, "text/plain")
            else:
                self._log.failure("no picture was made", failure)
                answer(b"this failed; the log says why\n", 500, "text/plain")

        body.addCallbacks(answer, fail)
        return NOT_DONE_YET

    def _events(self, request: Request) -> Any:
        if request.method == b"HEAD":
            return self._answer(request, 200, "", "text/event-stream")
        request.setHeader(b"content-type", b"text/event-stream")
        if not self._service.add_watcher(request):
            request.setHeader(b"retry-after", b"10")
            return self._answer(request, 503, "too many follow this page already\n")
        return NOT_DONE_YET

    def _health(self, request: Request) -> bytes:
        draining = self._service.is_draining()
        return self._answer(request, 503 if draining else 200, "draining\n" if draining else "ok\n")

    def _metrics(self, request: Request) -> Any:
        return self._answer_later(request, "text/plain; version=0.0.4", self._service.metrics())


_peer = peer_key((32, 64))
