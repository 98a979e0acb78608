"""
The endpoint string ``connlimit:``, which puts a limiter before any other endpoint.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

from twisted.internet.endpoints import quoteStringArgument, serverFromString

from connlimit._limiter.limiter import Limiter
from connlimit._limiter.settings import FIELDS, Settings, check_limits, parse
from connlimit._limiter.values import did_you_mean, one_of, shown
from connlimit._listening.checked_endpoints import check_endpoint, status_endpoint, why
from connlimit._listening.endpoint import PER, LimitingEndpoint, LimitingReactor, SocketLimitingEndpoint
from connlimit._listening.ports import check_when_full
from connlimit._listening.proxy_header import server_from_string
from connlimit.shared.by_url import shared_limits

# In a string a limiter's name is given as ``limiter``: ``name`` can be an argument of the inner endpoint.
_SETTINGS = tuple(name for name in FIELDS if name != "name")

#: Puts a status page beside an endpoint: takes it, the endpoint string of the page, and the reactor.
Shown = Callable[[Any, str, Any], Any]

# All that is ours in a string.
_OURS = (*_SETTINGS, "limiter", "per", "place", "when_full", "shared", "status")

# An argument that is as near as this to one of ours is a slip, whatever the inner endpoint would make of it.
_SLIP = 0.85

# Where the limiter stands: right before the protocol, inside TLS and the like, or next to the socket.
_PLACE = one_of("protocol", "socket")

# Strings that name the same limiter share it, as long as one of their endpoints is in use.
_limiters: WeakValueDictionary[str, Limiter] = WeakValueDictionary()


def from_arguments(
    reactor: Any, positional: Sequence[object], keywords: Mapping[str, object], shown: Shown
) -> LimitingEndpoint:
    """
    The endpoint for the arguments of a ``connlimit:`` string, already split and unquoted.

    Our settings are taken out by their names; all the rest is the inner endpoint's.

    :param shown: puts a status page beside an endpoint.
    :raises ValueError: if a setting is wrong, nothing would be limited, or the rest is not an endpoint.
    """
    inner = {key: str(value) for key, value in keywords.items()}
    ours = {key: inner.pop(key) for key in _OURS if key in inner}
    try:
        for key in inner:
            if difflib.get_close_matches(key, _OURS, 1, _SLIP):
                raise ValueError(f"it takes no {key}; {did_you_mean(key, _OURS)}")
        place, when_full = ours.pop("place", "protocol"), ours.pop("when_full", "refuse")
        per = ours.pop("per", "connection")
        _PLACE.of_text("place", place)
        PER.of_text("per", per)
        if per == "request" and place == "socket":
            raise ValueError("per must be connection, not request, for place=socket, which knows no requests")
        check_when_full(when_full)
        status = ours.pop("status", None)
        if status is not None:
            status_endpoint(reactor, status, "status")  # whether it can be made
        description = _describe(positional, inner)
        limiter = _limiter(reactor, ours, ":".join(map(str, positional[:2])))
        if place == "socket":
            limiting = LimitingReactor(reactor, limiter)
            endpoint = _inner(limiting, description)
        else:
            endpoint = _inner(reactor, description)
        if status is not None:
            endpoint = shown(endpoint, status, reactor)
        make = SocketLimitingEndpoint if place == "socket" else LimitingEndpoint
        return make(endpoint, limiter, when_full, per)
    except ValueError as error:
        raise ValueError(f"connlimit endpoint: {error}") from None


def _inner(reactor: Any, description: str) -> Any:
    """
    The endpoint that ours is around.
    """
    make = serverFromString if isinstance(reactor, LimitingReactor) else server_from_string
    try:
        endpoint = make(reactor, description)
        check_endpoint(endpoint)
    except Exception as error:
        sentence = f"{description!r} is not an endpoint ({why(error)})"
        if isinstance(error, TypeError):  # an argument, perhaps, that was meant for us
            sentence += f"; connlimit itself takes {', '.join(_OURS)}"
        raise ValueError(sentence) from None
    return endpoint


def _describe(positional: Sequence[object], keywords: Mapping[str, str]) -> str:
    """
    Put an endpoint string together again.
    """
    return ":".join(
        [_quote(str(argument)) for argument in positional]
        + [f"{_quote(key)}={_quote(value)}" for key, value in keywords.items()]
    )


def _quote(argument: str) -> str:
    # quoteStringArgument alone would let "=" turn an argument into a keyword.
    quoted: str = quoteStringArgument(argument)
    return quoted.replace("=", r"\=")


def _limiter(reactor: Any, ours: dict[str, str], where: str) -> Limiter:
    """
    A limiter of its own, or the one that is named.

    The first string that names it sets it up; others may repeat its settings.

    :param where: the endpoint that it stands before, which is its name if it gets no other.
    """
    name, shared = ours.pop("limiter", None), ours.pop("shared", None)
    values = parse(ours)
    existing = None if name is None else _limiters.get(name)
    if existing is not None:
        for key, value in values.items():
            if getattr(existing, key) != value:
                raise ValueError(
                    f"{key} of limiter {name} is {shown(getattr(existing, key))} already, "
                    f"so it must be that or left out, not {ours[key]!r}"
                )
        return existing
    check_limits(ours if shared is None else {**ours, "shared": shared}, str, "max_connections=none")
    values["name"] = (where or "default") if name is None else name
    settings = Settings().evolve(values)
    limiter = Limiter(**settings.changed(), limits=shared_limits(shared, settings), clock=reactor)
    if name is not None:
        _limiters[name] = limiter
    return limiter
