"""
Departures: notices, by the kernel's word, that a client goes away while it waits.

A paused transport is in no reactor, so nobody would notice before its turn. Its socket is watched here
for the end of the connection alone: by an epoll (Linux) or a kqueue (macOS, BSD) that is itself a reader of
the reactor, or, where there is neither, by a look at each once a second. Nothing is read.

A process that forks shares its epoll and its sockets with its child. After one has closed a socket, the
kernel goes on reporting it, by a number that may be another's by then. So a socket is unwatched before it is
closed, what is reported is held against the socket that has the number now, and a child leaves the epoll to
its parent.
"""

from __future__ import annotations

import os
import select
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import Logger
from zope.interface import implementer

from connlimit._system import sockets
from connlimit._system.bounded_log import BoundedLog

_select: Any = select  # type checkers know that of their own platform alone

_LOOK_INTERVAL = 1.0  # seconds

#: The most events that are taken from the kernel at once, so that a crowd that leaves holds up nobody.
_BATCH = 500


class Watched(Protocol):
    """
    What is told when its client has gone.
    """

    def departs_with(self, unread: bool) -> bool:
        """
        Whether a client that closed its direction has departed.

        :param unread: whether it had sent something that was not read.
        """

    def client_departed(self) -> None:
        """
        The client has departed.
        """


class _Kernel(Protocol):
    """
    Tells which of many sockets have ended.
    """

    def fileno(self) -> int: ...

    def watch(self, descriptor: int) -> None: ...

    def unwatch(self, descriptor: int) -> None: ...

    def ended(self) -> Iterable[tuple[int, bool]]:
        """
        Which descriptors have ended, and whether for good, by a reset or an error.
        """

    def has_ended(self, descriptor: int) -> bool:
        """
        Whether it is the socket that has this number now whose end was reported.
        """

    def close(self) -> None: ...

    def heard(self, descriptor: int) -> None:
        """
        The descriptor's peer has closed its direction, and may be told more: only a reset matters now.
        """


class _Epoll:
    """
    Linux, epoll(7).
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.fileno = self._epoll.fileno
        self.close = self._epoll.close

    def watch(self, descriptor: int) -> None:
        self._epoll.register(descriptor, select.EPOLLRDHUP)

    def unwatch(self, descriptor: int) -> None:
        with suppress(OSError):  # the kernel forgets those that are closed
            self._epoll.unregister(descriptor)

    def ended(self) -> Iterable[tuple[int, bool]]:
        for descriptor, events in self._epoll.poll(0, _BATCH):
            yield descriptor, bool(events & select.EPOLLERR)

    def has_ended(self, descriptor: int) -> bool:
        poll = select.poll()
        poll.register(descriptor, select.POLLRDHUP)
        return any(not events & select.POLLNVAL for _, events in poll.poll(0))

    def heard(self, descriptor: int) -> None:
        # One call more, for the reset; or at once, if a UNIX socket was closed altogether.
        self._epoll.modify(descriptor, select.EPOLLONESHOT)


class _Kqueue:
    """
    macOS and the BSDs, kqueue(2).
    """

    def __init__(self) -> None:
        self._kqueue = _select.kqueue()
        self.fileno = self._kqueue.fileno
        self.close = self._kqueue.close

    def _change(self, descriptor: int, flags: int) -> None:
        event = _select.kevent(descriptor, filter=_select.KQ_FILTER_READ, flags=flags)
        self._kqueue.control([event], 0, 0)

    def watch(self, descriptor: int) -> None:
        # Each change calls once: what a live client sends more is let pass.
        self._change(descriptor, _select.KQ_EV_ADD | _select.KQ_EV_CLEAR)

    def unwatch(self, descriptor: int) -> None:
        with suppress(OSError):  # the kernel forgets those that are closed
            self._change(descriptor, _select.KQ_EV_DELETE)

    def ended(self) -> Iterable[tuple[int, bool]]:
        for event in self._kqueue.control(None, _BATCH, 0):
            if event.flags & _select.KQ_EV_EOF:
                yield event.ident, bool(event.fflags)  # the socket's error

    def has_ended(self, descriptor: int) -> bool:
        """
        A queue knows of no socket that this process has closed, and is not handed on to a child.
        """
        return True

    def heard(self, descriptor: int) -> None:
        """
        Nothing is to be done: the same state does not call again.
        """


class Looks:
    """
    Looks at the sockets of those who wait once a second, where the kernel does not tell.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._log = BoundedLog(Logger(namespace="connlimit.connection"), reactor)
        self._watched: dict[int, Watched] = {}
        self._timer: Any = None

    def watch(self, descriptor: int, watched: Watched) -> None:
        self._watched[descriptor] = watched
        if self._timer is None:
            self._timer = self._reactor.callLater(_LOOK_INTERVAL, self._look)

    def unwatch(self, descriptor: int, watched: Watched) -> None:
        if self._watched.get(descriptor) is watched:
            del self._watched[descriptor]
        if not self._watched and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def look_again(self, descriptor: int, watched: Watched) -> None:
        """
        Each is looked at again in any case.
        """

    def _look(self) -> None:
        self._timer = self._reactor.callLater(_LOOK_INTERVAL, self._look)
        for descriptor, watched in list(self._watched.items()):
            if self._watched.get(descriptor) is not watched:
                continue
            try:
                state = sockets.end_of(descriptor)
                if state is not None and (state or watched.departs_with(sockets.unread(descriptor))):
                    watched.client_departed()
            except BaseException:  # as the reactor does, which would go on without us
                self._log.failure("{watched} failed to depart", watched=watched)
                self.unwatch(descriptor, watched)


@implementer(IReadDescriptor)
class Departures:
    """
    Watches the sockets of those who wait.
    """

    def __init__(self, reactor: Any, kernel: _Kernel) -> None:
        self._reactor = reactor
        self._log = BoundedLog(Logger(namespace="connlimit.connection"), reactor)
        self._kernel = kernel
        # By descriptor. The kernel gives out the lowest numbers, so a list is the smallest map.
        self._watched: list[Watched | None] = []
        self._count = 0
        self._heard: set[int] = set()
        # For those that the kernel does not take.
        self._looks = Looks(reactor)
        self._only_looks = False

    def fileno(self) -> int:
        """
        The descriptor that is readable when something has happened.
        """
        return self._kernel.fileno()

    def watch(self, descriptor: int, watched: Watched) -> None:
        """
        Tell *watched* when the client of the socket with this descriptor departs.
        """
        if self._only_looks:
            self._look_at_all()
            self._looks.watch(descriptor, watched)
            return
        try:
            self._kernel.watch(descriptor)
        except OSError:  # there is a limit to how many can be watched
            self._looks.watch(descriptor, watched)
            return
        if not self._count:
            self._reactor.addReader(self)
        if descriptor >= len(self._watched):
            self._watched.extend([None] * (descriptor + 1 - len(self._watched)))
        if self._watched[descriptor] is None:
            self._count += 1
        self._watched[descriptor] = watched

    def unwatch(self, descriptor: int, watched: Watched) -> None:
        """
        Tell *watched* nothing any more. This must be called before its socket is closed; later, it can be.
        """
        if self._only_looks:
            self._look_at_all()
        if descriptor >= len(self._watched) or self._watched[descriptor] is not watched:
            self._looks.unwatch(descriptor, watched)
            return
        self._kernel.unwatch(descriptor)
        self._heard.discard(descriptor)
        self._watched[descriptor] = None
        self._count -= 1
        if not self._count:
            self._reactor.removeReader(self)

    def look_again(self, descriptor: int, watched: Watched) -> None:
        """
        What *watched* says of a client that has closed its direction may have changed. Never raises.
        """
        if not self._only_looks and descriptor in self._heard and self._watched[descriptor] is watched:
            self._tell(descriptor, watched, False)

    def doRead(self) -> None:
        """
        Something has happened to some of the sockets. Never raises: the reactor would not call again.
        """
        try:
            if self._only_looks:
                # Only a reactor that goes on in the child comes here.
                self._reactor.removeReader(self)
                self._look_at_all()
            else:
                self._tell_all()
        except BaseException:
            self._log.failure("{departures} failed, and looks at each from now on", departures=self)
            with suppress(Exception):
                self._reactor.removeReader(self)
            self.disown()
            self._look_at_all()

    def _tell_all(self) -> None:
        ended = list(self._kernel.ended())
        # All that the kernel reports is watched, unless somebody else has the same socket open.
        is_stale = any(self._watched[descriptor] is None for descriptor, _ in ended)
        for descriptor, for_good in ended:
            watched = self._watched[descriptor]
            if watched is None:
                continue
            if self._kernel.has_ended(descriptor):
                self._tell(descriptor, watched, for_good)
            else:
                is_stale = True
        if is_stale:
            self._begin_anew()

    def _tell(self, descriptor: int, watched: Watched, for_good: bool) -> None:
        """
        Report the end of one. Never raises.
        """
        try:
            if for_good or watched.departs_with(sockets.unread(descriptor)):
                watched.client_departed()
            elif descriptor not in self._heard:
                self._heard.add(descriptor)
                self._kernel.heard(descriptor)
        except BaseException:  # as the reactor does, which would go on without us
            self._log.failure("{watched} failed to depart", watched=watched)
            self.unwatch(descriptor, watched)

    def _begin_anew(self) -> None:
        """
        Have the kernel watch the same sockets, and nothing that we have closed. Looks at all of them.
        """
        kernel = type(self._kernel)()
        for descriptor, watched in enumerate(self._watched):
            if watched is not None:
                kernel.watch(descriptor)
                if descriptor in self._heard:
                    kernel.heard(descriptor)
        if self._count:
            self._reactor.removeReader(self)
        self._kernel.close()
        self._kernel = kernel
        if self._count:
            self._reactor.addReader(self)

    def is_used(self) -> bool:
        """
        Whether the kernel watches anything.
        """
        return self._count > 0

    def disown(self) -> None:
        """
        Leave the kernel's word to the parent of this process, and look at each from the next call on.
        """
        self._only_looks = True

    def _look_at_all(self) -> None:
        """
        Look at each that the kernel has watched.
        """
        watched, self._watched = self._watched, []
        self._count = 0
        self._heard.clear()
        for descriptor, each in enumerate(watched):
            if each is not None:
                self._looks.watch(descriptor, each)

    def logPrefix(self) -> str:
        """
        What the log calls this.
        """
        return "connlimit departures"

    def connectionLost(self, reason: object) -> None:
        """
        The reactor shuts down.
        """


_of_reactors: WeakKeyDictionary[Any, Departures | Looks] = WeakKeyDictionary()


def of(reactor: Any) -> Departures | Looks:
    """
    What watches for departures in a reactor: one for all limiters.
    """
    departures = _of_reactors.get(reactor)
    if departures is None:
        departures = _of_reactors[reactor] = _make(reactor)
    return departures


def _make(reactor: Any) -> Departures | Looks:
    if hasattr(reactor, "addReader"):
        for name, kernel in (("epoll", _Epoll), ("kqueue", _Kqueue)):
            if hasattr(select, name):
                try:
                    return Departures(reactor, kernel())
                except OSError:  # no descriptor is left, or the system forbids it
                    break
    return Looks(reactor)


def _forked() -> None:
    """
    Be in the child of a process that has forked.
    """
    for reactor, departures in list(_of_reactors.items()):
        if not isinstance(departures, Departures):
            continue
        if departures.is_used():
            departures.disown()
        else:
            del _of_reactors[reactor]  # the next one has an epoll of its own


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
