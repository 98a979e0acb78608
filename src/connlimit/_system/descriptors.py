"""
The process's file descriptors: how many there may be, and who may take one more.

The kernel gives out the lowest free number (POSIX, "File Descriptor Allocation"), so the number of a new
socket tells how full the table is. The last descriptors are a reserve of eight shares:

* who waits takes none of the reserve;
* who is served takes, with all that is opened for it, none of the last four shares;
* of these, one share each is for status pages, for PROXY headers that are being read, and for refusals that
  are being said;
* the last is taken by nothing of ours: it is for files, names, and whatever else the process opens.

While there is room outside the reserve, nobody looks: those who see the number of a new socket say so if it
lies in the reserve, and only then is each decision a look at the table. Where descriptors are opened for
those who are served, they say so of every one; its number decides, and before somebody is turned away the
table is looked at, since descriptors may have been closed meanwhile.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any
from weakref import WeakSet

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP6ClientEndpoint, UNIXClientEndpoint
from twisted.internet.interfaces import IProtocol, IProtocolFactory, IStreamClientEndpoint
from zope.interface import implementer

try:
    import resource
except ImportError:  # Windows has neither the limit nor the module
    resource = None  # type: ignore[assignment]

_SHARES = 8
_SHARES_BEYOND_SERVING = 4

#: The first number that is to be told: see `saw`.
told_from = sys.maxsize

#: Whether the last number that was seen lay in the reserve.
is_short = False

# How many descriptors are about to be opened for connections that are served.
_opening = 0

# Whether every number is told, and the last that was taken, as far as we know.
_hears_all = False
_last_seen: int | None = None


def limit() -> int | None:
    """
    How many descriptors this process may have open; None if there is no telling.
    """
    if resource is None:
        return None  # type: ignore[unreachable]
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def count() -> int | None:
    """
    How many descriptors this process has open; None if there is no telling.
    """
    try:
        if sys.platform == "linux" and (size := os.stat("/proc/self/fd").st_size):
            return size  # Linux 6.2 and newer tell without a listing, which takes longer the more there are
        return len(os.listdir("/dev/fd")) - 1  # one is that of the listing
    except OSError:
        return None


def raise_limit() -> None:
    """
    Raise the soft limit to the hard one, as far as the system lets us.
    """
    if resource is None:
        return  # type: ignore[unreachable]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # macOS reports an unlimited hard limit that it does not accept as a soft one.
        for wanted in (hard, 65536, 10240):
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            except (ValueError, OSError):
                continue
            break
    _known_limit()


def share(limit: int) -> int:
    """
    How many of the descriptors are one share of the reserve.
    """
    return min(max(limit // 64, min(limit // 32, 8)), 512)


def reserve(limit: int) -> int:
    """
    How many of the descriptors are kept free of waiting connections, for the connections that are
    served and for whatever else the process opens.
    """
    return _SHARES * share(limit)


def saw(number: int) -> None:
    """
    A new descriptor has this number; call it at least if that is not below `told_from`.
    """
    global _last_seen
    _last_seen = number
    maximum = _known_limit()
    _set_short(maximum is not None and number >= maximum - reserve(maximum))


def _set_short(short: bool) -> None:
    global is_short
    if short != is_short:
        is_short = short
        for budget in _budgets:
            budget.is_tight = short or budget.opens > 0


def left_for_serving(opens: int = 0) -> bool:
    """
    Whether one more connection may be served.

    :param opens: how many descriptors are opened for it besides its own.
    """
    if not is_short and not opens:
        return True
    maximum = _known_limit()
    if maximum is None:
        return True
    global _last_seen
    end = maximum - _SHARES_BEYOND_SERVING * share(maximum)
    needed = _opening + opens if opens else 0
    free = _lowest_free(maximum)
    if free + needed > end:
        return False
    _last_seen = free - 1 + needed  # with what is about to be opened
    if _opening <= share(maximum):
        return True
    # The lowest free number is below all that is free, but what is above it may be taken already.
    taken = count()
    return taken is None or taken + needed <= end


def left_for_waiting(kept: float = 0) -> bool:
    """
    Whether one more connection may wait.

    :param kept: how many descriptors outside the reserve are kept free for what is opened when it is served;
        no more than half of them are.
    """
    maximum = _known_limit()
    if maximum is None or not (is_short or kept):
        return True
    end = maximum - reserve(maximum)
    end -= int(min(kept, end // 2))
    if not is_short and _hears_all and _last_seen is not None and _last_seen + 1 < end:
        return True
    return _lowest_free(maximum) < end


def left_in_reserve() -> bool:
    """
    Whether what has a share of the reserve may take one more descriptor of it.
    """
    if not is_short:
        return True
    maximum = _known_limit()
    return maximum is None or _lowest_free(maximum) < maximum - share(maximum)


def may_be_accepted() -> bool:
    """
    Whether a connection that was just accepted may keep its descriptor: not if that is of the last share.
    Looks at the table, since those that make room for others have their descriptors for a while.
    """
    maximum = _known_limit()
    return maximum is None or _lowest_free(maximum) <= maximum - share(maximum)


class Share:
    """
    What one use takes of the descriptors: a share of the reserve at most, or, as long as nobody is short of
    them, an eighth of all, and no more than a thousand.

    :ivar taken: how many it has taken.
    """

    def __init__(self) -> None:
        self.taken = 0

    def has_room(self) -> bool:
        """
        Whether it may take one more.
        """
        maximum = limit()
        if maximum is None:
            return self.taken < 1000
        if self.taken < share(maximum):
            return left_in_reserve()
        return not is_short and self.taken < min(maximum // 8, 1000)


#: Refusals that are being said, and connections whose PROXY header is being read.
REFUSALS = Share()
HEADERS = Share()


@attrs.define(eq=False)
class Budget:
    """
    What the connections of a limiter may take, which its admission asks.

    :ivar is_tight: whether there is something to find out before somebody is served.
    :ivar opens: how many descriptors are opened for one that is served, besides its own.
    """

    opens: int = 0
    is_tight: bool = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.is_tight = is_short or self.opens > 0
        _budgets.add(self)

    def expect(self, factory: Any) -> None:
        """
        Connections will be served by a factory, whose ``opens_descriptors``, if it has that, says how many
        descriptors it opens for each.
        """
        while factory is not None:
            opens = getattr(factory, "opens_descriptors", 0)
            if isinstance(opens, int):
                self.opens = max(self.opens, opens)
                self.is_tight = is_short or self.opens > 0
            factory = vars(factory).get("wrappedFactory") if hasattr(factory, "__dict__") else None
        if self.opens:
            _hear_all()

    def may_serve(self) -> bool:
        """
        Whether one more may be served.
        """
        return left_for_serving(self.opens)

    def may_serve_exempt(self) -> bool:
        """
        Whether one more may be served that is exempt.
        """
        return left_in_reserve()

    def may_wait(self, slots: float) -> bool:
        """
        Whether one more may wait.

        :param slots: how many more could be served at once.
        """
        return left_for_waiting(self.opens * slots if self.opens else 0)


#: All there are, which are told when descriptors run short.
_budgets: WeakSet[Budget] = WeakSet()


def _hear_all() -> None:
    """
    Have every number told from now on.
    """
    global _hears_all, told_from
    _hears_all, told_from = True, 0


def counted(endpoint: IStreamClientEndpoint) -> IStreamClientEndpoint:
    """
    The endpoint, which counts what it is about to open if that is not open as soon as it is to connect.
    """
    at_once = (TCP4ClientEndpoint, TCP6ClientEndpoint, UNIXClientEndpoint)
    return endpoint if type(endpoint) in at_once else _CountedEndpoint(endpoint)


@implementer(IStreamClientEndpoint)
@attrs.frozen
class _CountedEndpoint:
    """
    A client endpoint whose connections are counted as long as they are being made.
    """

    endpoint: IStreamClientEndpoint

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """
        Connect.
        """
        global _opening
        _opening += 1
        try:
            connecting = self.endpoint.connect(protocolFactory)
        except BaseException:
            _opening -= 1
            raise
        return connecting.addBoth(_opened)


def _opened(result: Any) -> Any:
    global _opening
    _opening -= 1
    return result


def _known_limit() -> int | None:
    """
    The limit; which numbers are to be told is known afterwards.
    """
    global told_from
    maximum = limit()
    if not _hears_all:
        told_from = sys.maxsize if maximum is None else maximum - reserve(maximum)
    return maximum


def _lowest_free(maximum: int) -> int:
    """
    The number that the next descriptor gets; the limit if there is none left.
    """
    global _last_seen
    try:
        with socket.socket() as probe:
            number = probe.fileno()
    except OSError:
        number = maximum
    _last_seen = number - 1
    _set_short(number >= maximum - reserve(maximum))
    return number


_known_limit()
