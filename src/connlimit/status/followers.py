"""
The clients that follow the status page: each is sent the page's sections once a second, as long as it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.logger import Logger
from twisted.web.server import Request
from zope.interface import implementer

from connlimit._limiter.peers import peer_key
from connlimit.status.guarded_site import MAX, is_near

#: How many may follow the page from loopback, and as many from elsewhere; and how many of one peer elsewhere.
MAX_FOLLOWERS = MAX // 2
MAX_FOLLOWERS_OF_A_PEER = 4

#: A follower that has not read this number of events is given up.
_MAX_PAUSED = 10


class Followers:
    """
    All who follow the page.
    """

    _log = Logger(namespace="connlimit.status")

    def __init__(self, make: Callable[[str, bool], Deferred[bytes]]) -> None:
        """
        :param make: makes what is sent: a form of `Picture`, with or without the addresses of clients.
        """
        self._make = make
        self._all: set[_Follower] = set()

    def add(self, request: Request, with_peers: bool) -> bool:
        """
        Send the page's sections from now on.

        :param with_peers: whether they may have the addresses of clients.
        :return: False if too many follow the page already.
        """
        address = request.getClientAddress()
        near, peer = is_near(address), _peer(address)
        its = [follower for follower in self._all if follower.near == near]
        its_peers = [follower for follower in its if follower.peer == peer]
        if len(its) >= MAX_FOLLOWERS or (not near and len(its_peers) >= MAX_FOLLOWERS_OF_A_PEER):
            return False
        self._send([_Follower(request, self._all, with_peers, near, peer)])
        return True

    def send(self) -> None:
        """
        Send an event to each.
        """
        self._send(list(self._all))

    def _send(self, followers: list[_Follower]) -> None:
        for with_peers in (False, True):
            those = [follower for follower in followers if follower.with_peers == with_peers]
            if those:
                event = self._make("event", with_peers).addCallback(partial(_send, those))
                event.addErrback(
                    lambda failure: self._log.failure("the status page could not be made", failure)
                )

    def close(self) -> None:
        """
        End them all.
        """
        for follower in list(self._all):
            follower.stopProducing()


@implementer(IPushProducer)
class _Follower:
    """
    A client that follows the page.
    """

    def __init__(
        self, request: Request, followers: set[_Follower], with_peers: bool, near: bool, peer: Hashable
    ) -> None:
        self.with_peers = with_peers
        self.near = near
        self.peer = peer
        self._request = request
        self._followers = followers
        self._paused = 0
        self._reads = True
        followers.add(self)
        request.notifyFinish().addBoth(lambda _: followers.discard(self))
        request.registerProducer(self, True)

    def send(self, event: bytes) -> None:
        """
        Send an event, unless the client has not read the last ones.
        """
        if self not in self._followers:
            return
        if self._reads:
            self._paused = 0
            self._request.write(event)
            return
        self._paused += 1
        if self._paused > _MAX_PAUSED:
            transport: Any = self._request.transport
            transport.abortConnection()

    def pauseProducing(self) -> None:
        self._reads = False

    def resumeProducing(self) -> None:
        self._reads = True

    def stopProducing(self) -> None:
        if self in self._followers:
            self._followers.discard(self)
            self._request.unregisterProducer()
            self._request.finish()


def _send(followers: list[_Follower], event: bytes) -> None:
    for follower in followers:
        follower.send(event)


_peer = peer_key((32, 64))
