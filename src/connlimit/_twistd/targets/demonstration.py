"""
What ``twistd connlimit`` limits when it is given nothing to limit: a web page that takes its time.
"""

from __future__ import annotations

import re
from itertools import count
from secrets import token_hex
from typing import Any

from twisted.internet import task
from twisted.internet.interfaces import IReactorTime
from twisted.web.http import HTTPChannel
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site

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

_HEAD = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>connlimit</title>
<link rel="icon" href="data:,">
<style>
  :root {{ color-scheme: light dark; --served: #0b61a4; --waits: #9a5b00 }}
  @media (prefers-color-scheme: dark) {{ :root {{ --served: #6cb6f5; --waits: #f0b45b }} }}
  body {{ font: 1.1em/1.5 system-ui, sans-serif; max-width: 36em; margin: 3em auto; padding: 0 1em }}
  .now, h1 {{ display: none }} .now:last-of-type, h1:last-of-type {{ display: block }}
  i {{ display: inline-block; width: 1em; height: 1em; margin: .1em; border-radius: 50% }}
  i {{ border: .15em solid }}
  .served {{ color: var(--served); background: var(--served) }} .waits {{ color: var(--waits) }}
  .free {{ opacity: .4 }}
</style>
</head>
<body>
<h1>It is your turn</h1>
<p>This page takes {seconds:g} seconds to make, for {most} at once. Open it in several tabs at once: those
over the limit wait, and not one is lost.{link}</p>
"""

_LINK = ' <a href="{url}">The status page</a> shows it as it happens.'

_PICTURE = """\
<section class="now">
<p role="img" aria-label="{active} served, {waiting} waiting">{drawn}</p>
<p>{active} of {most} slots were in use, {waiting} connections waited in line, and {finished} had been served
before.</p>
</section>
"""

_END = """\
<h1>It was your turn</h1>
</body>
</html>
"""


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


class _SlowPage(Resource):
    isLeaf = True

    def __init__(self, limiter: Limiter, clock: IReactorTime, status: str | None) -> None:
        super().__init__()
        self._limiter = limiter
        self._clock = clock
        self._link = "" if status is None else _LINK.format(url=status)
        self._number = count(1)

    def render_GET(self, request: Request) -> Any:
        request.setHeader(b"cache-control", b"no-store")
        # A connection kept alive would keep its slot; the next in line waits for it.
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
        most = self._limiter.max_connections
        head = _HEAD.format(seconds=SECONDS, most="any number" if most is None else most, link=self._link)
        request.write(head.encode())
        drawing = task.LoopingCall(self._draw, request)
        drawing.clock = self._clock
        making = self._clock.callLater(SECONDS, self._finish, request, drawing)

        def leave(failure: object) -> None:
            making.cancel()
            if drawing.running:
                drawing.stop()

        request.notifyFinish().addErrback(leave)
        drawing.start(_STEP)
        return NOT_DONE_YET

    def _draw(self, request: Request) -> None:
        now = self._limiter.snapshot()
        most = self._limiter.max_connections
        drawn = '<i class="served"></i>' * min(now.active, _DRAWN)
        if most is not None:
            drawn += '<i class="free"></i>' * min(max(0, most - now.active), _DRAWN)
        drawn += " " + '<i class="waits"></i>' * min(now.waiting, _DRAWN)
        request.write(
            _PICTURE.format(
                active=now.active,
                most="any number of" if most is None else most,
                waiting=now.waiting,
                finished=now.finished,
                drawn=drawn + (" …" if now.waiting > _DRAWN else ""),
            ).encode()
        )

    def _finish(self, request: Request, drawing: task.LoopingCall) -> None:
        if drawing.running:
            drawing.stop()
        self._draw(request)
        request.write(_END.encode())
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
