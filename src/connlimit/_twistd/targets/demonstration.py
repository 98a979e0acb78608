"""
What ``twistd connlimit`` limits when it is given nothing to limit: a web page that takes its time.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from importlib.resources import files
from itertools import count
from secrets import token_hex
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.web.http import HTTPChannel
from twisted.web.iweb import IRequest
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site
from twisted.web.template import Element, Flattenable, Tag, XMLString, flatten, renderer, tags

from connlimit._limiter.limiter import Limiter

LISTEN = "tcp:8080:interface=127.0.0.1"
STATUS = "tcp:8081:interface=127.0.0.1"
MAX_CONNECTIONS = 2
SECONDS = 2.0

#: Seconds between two pictures of the queue.
_STEP = 0.5

#: Seconds within which a client that is served must ask: browsers also open connections in reserve.
_PATIENCE = 1.0

#: How many of those who wait are drawn.
_DRAWN = 60

_TEMPLATE = XMLString((files(__package__) / "demonstration.xml").read_text())


class _Channel(HTTPChannel):
    """
    A connection that says nothing of itself in the log.
    """

    def timeoutConnection(self) -> None:
        self.loseConnection()


class DemonstrationSite(Site):
    """
    A web site of one page, which takes `SECONDS` to make.
    """

    displayTracebacks = False
    protocol = _Channel  # type: ignore[assignment]

    def log(self, request: Any) -> None:
        """
        Log no request.
        """


class _Page(Element):
    """
    The page: the queue as it was again and again while the page was made.
    """

    loader = _TEMPLATE

    def __init__(self, limiter: Limiter, clock: IReactorTime, status: str | None) -> None:
        super().__init__()
        self._limiter = limiter
        self._clock = clock
        self._status = status
        self._waiting: IDelayedCall | None = None

    def stop(self) -> None:
        """
        Make no more of it.
        """
        if self._waiting is not None and self._waiting.active():
            self._waiting.cancel()

    @renderer
    def page(self, request: IRequest | None, tag: Tag) -> Tag:
        """
        All of it.
        """
        maximum = self._limiter.max_connections
        return tag.fillSlots(
            seconds=f"{SECONDS:g}", maximum="any number" if maximum is None else str(maximum)
        )

    @renderer
    def link(self, request: IRequest | None, tag: Tag) -> Tag | str:
        """
        Where the status page is, if there is one.
        """
        return "" if self._status is None else tag.fillSlots(status=self._status)

    @renderer
    def pictures(self, request: IRequest | None, tag: Tag) -> Generator[Flattenable, None, None]:
        """
        The queue at once and after each step, until the page has taken its time.
        """
        for _ in range(round(SECONDS / _STEP)):
            yield self._picture(tag.clone())
            yield self._step()
        yield self._picture(tag.clone())

    def _step(self) -> Deferred[str]:
        deferred: Deferred[str] = Deferred()
        self._waiting = self._clock.callLater(_STEP, deferred.callback, "")
        return deferred

    def _picture(self, tag: Tag) -> Tag:
        now, maximum = self._limiter.snapshot(), self._limiter.max_connections
        free = 0 if maximum is None else max(0, maximum - now.active)
        return tag.fillSlots(
            active=str(now.active),
            waiting=str(now.waiting),
            finished=str(now.finished),
            maximum="any number of" if maximum is None else str(maximum),
            drawn=[
                [tags.i(class_="served")] * min(now.active, _DRAWN),
                [tags.i(class_="free")] * min(free, _DRAWN),
                " ",
                [tags.i(class_="waits")] * min(now.waiting, _DRAWN),
                " …" if now.waiting > _DRAWN else "",
            ],
        )


class _SlowPage(Resource):
    isLeaf = True
    _log = Logger(namespace="connlimit.demonstration")

    def __init__(self, limiter: Limiter, clock: IReactorTime, status: str | None) -> None:
        super().__init__()
        self._limiter = limiter
        self._clock = clock
        self._status = status
        self._number = count(1)

    def render_GET(self, request: Request) -> Any:
        request.setHeader(b"cache-control", b"no-store")
        # A connection kept alive would keep its slot; the next in the queue waits for it.
        request.setHeader(b"connection", b"close")
        if request.path == b"/favicon.ico":
            request.setResponseCode(204)
            return self._end(request)
        if request.path == b"/" and b"text/html" in (request.getHeader(b"accept") or b""):
            # A browser asks for one address once at a time, so each tab gets one of its own.
            request.redirect(f"/{next(self._number)}-{token_hex(4)}".encode())
            request.setResponseCode(303)
            return self._end(request)
        request.setHeader(b"content-type", b"text/html; charset=utf-8")
        page = _Page(self._limiter, self._clock, self._status)
        request.notifyFinish().addErrback(lambda _: page.stop())
        making = ensureDeferred(self._make(request, page))
        making.addErrback(lambda failure: self._log.failure("the page could not be made", failure))
        return NOT_DONE_YET

    async def _make(self, request: Request, page: _Page) -> None:
        request.write(b"<!DOCTYPE html>\n")
        await flatten(request, page, request.write)
        self._end(request)

    def _end(self, request: Request) -> int:
        channel = request.channel
        request.finish()
        channel.loseConnection()
        return NOT_DONE_YET


def site(limiter: Limiter, clock: IReactorTime, status: str | None = None) -> Site:
    """
    A web site of one page, which takes `SECONDS` to make.

    :param status: the endpoint string of the status page.
    """
    page = _SlowPage(limiter, clock, status_url(status))
    return DemonstrationSite(page, timeout=_PATIENCE, reactor=clock)


def status_url(status: str | None) -> str | None:
    """
    The address of the status page, as far as its endpoint string tells one for this machine.
    """
    found = re.match(r"tcp:([1-9]\d*)(?=:|$)", status or "")
    if found is None or not re.search(r":interface=(127\.|0\.0\.0\.0|localhost)|^[^=]*$", status or ""):
        return None
    return f"http://127.0.0.1:{found[1]}/"


def hints(listen: list[str], status: str | None) -> tuple[str, ...]:
    """
    Where to look and what to try, a sentence a line.
    """
    port = listen[0].split(":")[1] if listen[0].startswith("tcp:") else None
    if port is None:
        return (f"a page that takes {SECONDS:g} seconds to make is at {' and '.join(listen)}",)
    url, watch = f"http://127.0.0.1:{port}/", status_url(status)
    form = "%{http_code} %{time_total} s\\n"
    return (
        f"look at {url} : a page that takes {SECONDS:g} seconds to make",
        *((f"watch it at {watch}",) if watch is not None else ()),
        f"try   for i in 1 2 3 4 5 6; do curl -s -o /dev/null -w '{form}' {url} & done; wait",
    )
