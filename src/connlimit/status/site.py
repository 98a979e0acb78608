"""
What the status page's server answers, and to whom.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from typing import Any, Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from connlimit._system.bounded_log import BoundedLog
from connlimit.status import page
from connlimit.status.followers import Followers
from connlimit.status.guarded_site import is_near

_HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self';"
    b" connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}


class Shown(Protocol):
    """
    Whatever there is to see.
    """

    def show(self, form: str, with_peers: bool) -> Deferred[bytes]:
        """
        All of it, in a form of `Picture`.
        """

    def metrics(self) -> Deferred[bytes]:
        """
        The metrics.

        :raises ImportError: without what they need.
        """

    def is_draining(self) -> bool:
        """
        Whether any limiter is being drained.
        """


class Root(Resource):
    """
    Everything that the server answers.
    """

    isLeaf = True
    _log = BoundedLog(Logger(namespace="connlimit.status"))

    def __init__(self, shown: Shown, followers: Followers, show_peers: bool, hosts: frozenset[str]) -> None:
        """
        :param show_peers: whether others than loopback see the addresses of clients.
        :param hosts: names, besides IP addresses and localhost, by which browsers may ask.
        """
        super().__init__()
        self._shown = shown
        self._followers = followers
        self._show_peers = show_peers
        self._hosts = frozenset(host.lower() for host in hosts)
        self._pages: dict[bytes, tuple[str, Callable[[bool], Deferred[bytes]]]] = {
            b"/": ("text/html", partial(shown.show, "page")),
            b"/status.css": ("text/css", lambda _: succeed(page.CSS.encode())),
            b"/status.js": ("text/javascript", lambda _: succeed(page.SCRIPT.encode())),
            b"/status.json": ("application/json", partial(shown.show, "json")),
        }
        # These have numbers alone, and are not guarded against foreign names.
        self._numbers: dict[bytes, Callable[[Request], Any]] = {
            b"/health": self._health,
            b"/metrics": self._metrics,
        }

    def may_see_peers(self, request: Request) -> bool:
        """
        Whether the addresses of clients may be shown to this client.
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

    def render(self, request: Request) -> Any:
        for name, value in _HEADERS.items():
            request.setHeader(name, value)
        if request.method not in (b"GET", b"HEAD"):
            request.setHeader(b"allow", b"GET, HEAD")
            return self._answer(request, 405, "only GET and HEAD are answered\n")
        numbers = self._numbers.get(request.path)
        if numbers is not None:
            return numbers(request)
        if not self.is_ours(request.getHeader(b"host")):
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
        return self._answer_later(request, kind, make(self.may_see_peers(request)))

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
                self._log.failure("the status page could not be made", failure)
                answer(b"this failed; the log says why\n", 500, "text/plain")

        body.addCallbacks(answer, fail)
        return NOT_DONE_YET

    def _events(self, request: Request) -> Any:
        if request.method == b"HEAD":
            return self._answer(request, 200, "", "text/event-stream")
        request.setHeader(b"content-type", b"text/event-stream")
        if not self._followers.add(request, self.may_see_peers(request)):
            request.setHeader(b"retry-after", b"10")
            return self._answer(request, 503, "too many follow this page already\n")
        return NOT_DONE_YET

    def _health(self, request: Request) -> bytes:
        draining = self._shown.is_draining()
        return self._answer(request, 503 if draining else 200, "draining\n" if draining else "ok\n")

    def _metrics(self, request: Request) -> Any:
        return self._answer_later(request, "text/plain; version=0.0.4", self._shown.metrics())
