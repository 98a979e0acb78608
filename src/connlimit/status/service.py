"""
The service of the status page: it listens, and watches the limiters as long as it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from twisted.application.internet import StreamServerEndpointService
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.internet.task import LoopingCall

from connlimit._system import descriptors
from connlimit._system.version import __version__
from connlimit.interfaces import ILimiter
from connlimit.status.followers import Followers
from connlimit.status.guarded_site import GuardedSite
from connlimit.status.once import Recent
from connlimit.status.picture import Picture
from connlimit.status.site import Root
from connlimit.status.watch import INTERVAL, Watch


class Limited(Protocol):
    """
    Whatever has limiters. What it has as ``semaphores`` is called to show these too, as
    `connlimit.semaphores` has it.
    """

    @property
    def limiters(self) -> Mapping[str, ILimiter]:
        """
        The limiters by name.
        """


class StatusService(StreamServerEndpointService):
    """
    Serves the status page, and watches the limiters as long as it runs.
    """

    def __init__(
        self, endpoint: IStreamServerEndpoint, limited: Limited, show_peers: bool, hosts: frozenset[str]
    ) -> None:
        self._limited = limited
        self.watches: dict[str, Watch] = {}
        self.reactor_lag = 0.0
        self._sampled: float | None = None
        self._sampling = LoopingCall(self._sample)
        self._picture = Recent(self._look, lambda picture: picture.took)
        self._metrics = Recent(self._exposition)
        self._followers = Followers(self.show)
        self._site = GuardedSite(Root(self, self._followers, show_peers, hosts))
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
        self._followers.close()
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

    def _sample(self) -> None:
        self.follow_limiters()
        now = self._sampling.clock.seconds()
        if self._sampled is not None:
            self.reactor_lag = max(0.0, now - self._sampled - INTERVAL)
        self._sampled = now
        for watch in self.watches.values():
            watch.sample()
        self._followers.send()
