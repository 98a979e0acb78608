"""
What ``twistd connlimit`` limits when it is given nothing to limit: a web page that takes its time.
"""

from __future__ import annotations

from twisted.internet import task
from twisted.internet.interfaces import IReactorTime
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site

from connlimit._limiter import Limiter

LISTEN = "tcp:8080:interface=127.0.0.1"
STATUS = "tcp:8081:interface=127.0.0.1"
MAX_CONNECTIONS = 2
SECONDS = 2.0

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>connlimit</title>
<style>
  body {{ font: 1.1em/1.5 system-ui, sans-serif; max-width: 36em; margin: 3em auto; padding: 0 1em }}
</style>
<h1>It was your turn</h1>
<p>This page took {seconds:g} seconds to make. {active} of {most} slots were in use,
{waiting} connections waited in line, and {finished} had been served before.</p>
<p>Open it in several tabs at once: those over the limit wait, and not one is lost.</p>
"""


class _SlowPage(Resource):
    isLeaf = True

    def __init__(self, limiter: Limiter, clock: IReactorTime) -> None:
        super().__init__()
        self._limiter = limiter
        self._clock = clock

    def render_GET(self, request: Request) -> int:
        making = task.deferLater(self._clock, SECONDS, self._finish, request)
        making.addErrback(lambda failure: None)
        request.notifyFinish().addErrback(lambda failure: making.cancel())
        return NOT_DONE_YET

    def _finish(self, request: Request) -> None:
        now = self._limiter.snapshot()
        most = now.settings.max_connections
        request.setHeader(b"content-type", b"text/html; charset=utf-8")
        # A connection kept alive would keep its slot; the next in line waits for it.
        request.setHeader(b"connection", b"close")
        channel = request.channel
        page = _PAGE.format(
            seconds=SECONDS,
            active=now.active,
            most="any number of" if most is None else most,
            waiting=now.waiting,
            finished=now.finished,
        )
        request.write(page.encode())
        request.finish()
        channel.loseConnection()


def site(limiter: Limiter, clock: IReactorTime) -> Site:
    """
    A web site of one page, which takes `SECONDS` to make.
    """
    return Site(_SlowPage(limiter, clock))


def hints(listen: list[str], status: str | None) -> tuple[str, ...]:
    """
    Where to look and what to try, a sentence a line.
    """
    port = listen[0].split(":")[1] if listen[0].startswith("tcp:") else None
    if port is None:
        return (f"a page that takes {SECONDS:g} seconds to make is at {' and '.join(listen)}",)
    url = f"http://127.0.0.1:{port}/"
    return (
        f"look at {url} : a page that takes {SECONDS:g} seconds to make",
        *((f"watch it at http://127.0.0.1:{status.split(':')[1]}/",) if status == STATUS else ()),
        "try   for i in 1 2 3 4 5 6; do"
        f" curl -s -o /dev/null -w '%{{http_code}} %{{time_total}} s\\n' {url} & done; wait",
    )
