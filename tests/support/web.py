"""
Web servers behind a limiter of requests, and clients of HTTP without sockets.
"""

from __future__ import annotations

import re
from typing import Any

from twisted.internet.task import Clock
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site

from connlimit import Limiter, RequestLimitingFactory
from support.fakes import FakeConnection
from support.limiters import LimiterTestCase


class Holding(Resource):
    """
    Holds each request until it is told to answer.

    :ivar requests: those that are being answered, in the order in which they came.
    :ivar paths: of all that ever came.
    :ivar most: how many were being answered at once.
    """

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Any] = []
        self.paths: list[bytes] = []
        self.bodies: list[bytes] = []
        self.most = 0

    def render(self, request: Any) -> object:
        self.requests.append(request)
        self.paths.append(request.path)
        self.bodies.append(request.content.read())
        self.most = max(self.most, sum(not each.finished for each in self.requests))
        request.notifyFinish().addBoth(lambda result: self.requests.remove(request))
        return NOT_DONE_YET

    def answer(self, request: Any = None, body: bytes = b"yes") -> None:
        """
        Answer the one that came first, or another.
        """
        request = request or self.requests[0]
        request.write(body)
        request.finish()


class RequestTestCase(LimiterTestCase):
    """
    A limiter of requests before a site that holds them, and clients by the number.
    """

    def limited(self, *args: object, site: object = None, **settings: object) -> Limiter:
        self.clock = settings.setdefault("clock", Clock())
        self.limiter = Limiter(*args, **settings)
        self.page = Holding()
        self.site: Any = site or Site(self.page, reactor=self.clock)
        self.factory = RequestLimitingFactory(self.site, self.limiter)
        self.clients: list[FakeConnection] = []
        return self.limiter

    def ask(self, *clients: FakeConnection, path: str = "/") -> None:
        """
        Have clients send a request, in this order.
        """
        for client in clients:
            client.send(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            self.turn()

    def answers(self, client: FakeConnection) -> list[bytes]:
        """
        The status codes that a client has got.
        """
        return re.findall(rb"HTTP/1\.1 (\d+) ", client.received)
