"""
The endpoint string ``connlimit:``, which puts a limiter before any other endpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

from twisted.internet.endpoints import quoteStringArgument, serverFromString

from connlimit._accepting import check_when_full
from connlimit._limiter import Limiter
from connlimit._place import LimitingReactor, SocketLimitingEndpoint
from connlimit._proxied import server_from_string
from connlimit._service import LimitingEndpoint
from connlimit._settings import FIELDS, Settings, parse
from connlimit._sharing import shared_limits
from connlimit.interfaces import ILimit

# In a string a limiter's name is given as ``limiter``: ``name`` can be an argument of the inner endpoint.
_SETTINGS = tuple(name for name in FIELDS if name != "name")

# Where the limiter stands: right before the protocol, inside TLS and the like, or next to the socket.
_PLACES = ("protocol", "socket")

# Strings that name the same limiter share it, as long as one of their endpoints is in use.
_limiters: WeakValueDictionary[str, Limiter] = WeakValueDictionary()


def from_arguments(
    reactor: Any, positional: Sequence[object], keywords: Mapping[str, object]
) -> LimitingEndpoint:
    """
    The endpoint for the arguments of a ``connlimit:`` string, already split and unquoted.

    Our settings are taken out by their names; all the rest is the inner endpoint's.

    :raises ValueError: if a setting is wrong or the rest is no endpoint.
    """
    inner = {key: str(value) for key, value in keywords.items()}
    name = inner.pop("limiter", None)
    place = inner.pop("place", "protocol")
    if place not in _PLACES:
        raise ValueError(f"connlimit endpoint: place must be {' or '.join(_PLACES)}, not {place!r}")
    when_full = inner.pop("when_full", "refuse")
    shared = inner.pop("shared", None)
    texts = {key: inner.pop(key) for key in _SETTINGS if key in inner}
    try:
        check_when_full(when_full)
        values = parse(texts)
    except ValueError as error:
        raise ValueError(f"connlimit endpoint: {error}") from None
    description = _describe(positional, inner)
    limiter = _limiter(reactor, name, values, shared)
    try:
        if place == "socket":
            inner_reactor = LimitingReactor(reactor, limiter)
            return SocketLimitingEndpoint(serverFromString(inner_reactor, description), limiter, when_full)
        return LimitingEndpoint(server_from_string(reactor, description), limiter, when_full)
    except Exception as error:
        raise ValueError(
            f"connlimit endpoint: {description!r} is no endpoint ({error}); "
            f"connlimit itself takes {', '.join(_SETTINGS)}, limiter, place, when_full and shared"
        ) from None


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


def _limiter(reactor: Any, name: str | None, values: Mapping[str, Any], shared: str | None) -> Limiter:
    """
    A limiter of its own, or the one of that name.

    The first string that names it sets it up; others may repeat its settings.
    """
    if name is None:
        return Limiter(**values, limits=_shared(shared, values), clock=reactor)
    limiter = _limiters.get(name)
    if limiter is None:
        values = {**values, "name": name}
        limiter = _limiters[name] = Limiter(**values, limits=_shared(shared, values), clock=reactor)
    for key, value in values.items():
        existing = getattr(limiter, key)
        if existing != value:
            raise ValueError(
                f"connlimit endpoint: {key} of limiter {name} is {existing} already, "
                f"so it must be that or left out, not {value}"
            )
    return limiter


def _shared(url: str | None, values: Mapping[str, Any]) -> tuple[ILimit, ...]:
    try:
        return shared_limits(url, Settings().evolve(values))
    except ValueError as error:
        raise ValueError(f"connlimit endpoint: {error}") from None
