"""
Endpoints by their strings: made, or found wrong in one sentence before anything is started.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.endpoints import clientFromString
from twisted.internet.interfaces import (
    IStreamClientEndpointStringParserWithReactor,
    IStreamServerEndpointStringParser,
)
from twisted.plugin import getPlugins

from connlimit._limiter.values import did_you_mean
from connlimit._listening.proxy_header import server_from_string

# More than any kernel holds: it takes its own maximum (somaxconn) instead.
_BACKLOG = 65535

_MAX_PORT = 65535
_LONGEST_PATH = 107  # bytes (unix(7))


def server_endpoint(reactor: Any, description: str, name: str = "--listen") -> Any:
    """
    The endpoint to listen at, with the longest backlog the kernel has, where it has one and none is given.

    :param name: what the description is called where it was given.
    :raises ValueError: if the description describes none, or one that cannot be.
    """
    made = None
    if "backlog=" not in description:
        with suppress(Exception):  # whatever is wrong is found and told without the backlog
            made = server_from_string(reactor, f"{description}:backlog={_BACKLOG}")
    try:
        endpoint = made or server_from_string(reactor, description)
        check_endpoint(endpoint)
    except Exception as error:
        raise _wrong(name, description, "tcp:8080", error, IStreamServerEndpointStringParser) from None
    return endpoint


def status_endpoint(reactor: Any, description: str, name: str = "--status") -> Any:
    """
    The endpoint of a status page: on loopback, unless the description gives an interface, or can give none.

    :param name: what the description is called where it was given.
    :raises ValueError: if the description describes none, or one that cannot be.
    """
    if "interface=" not in description:
        with suppress(Exception):  # whatever is wrong is found and told without the interface
            return server_endpoint(reactor, f"{description}:interface=127.0.0.1", name)
    return server_endpoint(reactor, description, name)


def client_endpoint(reactor: Any, description: str, name: str = "--forward") -> Any:
    """
    The endpoint of a server to relay to.

    :param name: what the description is called where it was given.
    :raises ValueError: if the description describes none, or one that cannot be.
    """
    try:
        endpoint = clientFromString(reactor, description)
        check_endpoint(endpoint, 1)
    except Exception as error:
        parsers = IStreamClientEndpointStringParserWithReactor
        raise _wrong(name, description, "tcp:localhost:9000", error, parsers) from None
    return endpoint


def _wrong(name: str, description: str, example: str, error: Exception, parsers: Any) -> ValueError:
    kinds = ["tcp", "unix", "ssl", *(each.prefix for each in getPlugins(parsers))]
    question = (
        "" if description.partition(":")[0] in kinds else did_you_mean(description.partition(":")[0], kinds)
    )
    return ValueError(
        f"{name} must be an endpoint such as {example}, not {description!r} ({why(error)})"
        + (f"; {question}" if question else "")
    )


def check_endpoint(endpoint: Any, lowest_port: int = 0) -> None:
    """
    See to it that there can be such a port, interface, backlog and path, as far as Twisted's endpoints tell.

    :raises ValueError: if there cannot.
    """
    for each in nested(endpoint):
        port, backlog = getattr(each, "_port", None), getattr(each, "_backlog", None)
        if isinstance(port, int) and not lowest_port <= port <= _MAX_PORT:
            raise ValueError(f"a port must be from {lowest_port} to {_MAX_PORT}, not {port}")
        if isinstance(backlog, int) and not 0 <= backlog < 2**31:
            raise ValueError(f"the backlog must be 0 or more, and not {backlog}")
        if "" in (getattr(each, "_host", None), getattr(each, "_hostText", None)):
            raise ValueError("the host is missing")
        if getattr(each, "_badHostname", False):
            raise ValueError("the host is not a valid name")
        _check_interface(getattr(each, "_interface", None))
        for path in (getattr(each, "_address", None), getattr(each, "_path", None)):
            if path == "":
                raise ValueError("the path is missing")
            if isinstance(path, str) and len(os.fsencode(path)) > _LONGEST_PATH:
                raise ValueError(f"the path must have {_LONGEST_PATH} bytes at most")


def nested(endpoint: Any) -> Iterator[Any]:
    """
    An endpoint, and those that it is around.
    """
    while endpoint is not None:
        yield endpoint
        endpoint = getattr(endpoint, "_wrappedEndpoint", None) or getattr(endpoint, "endpoint", None)


def _check_interface(interface: Any) -> None:
    if not isinstance(interface, str) or interface in ("", "localhost"):
        return
    if not isIPAddress(interface) and not isIPv6Address(interface):
        try:
            socket.getaddrinfo(interface, None)
        except (OSError, UnicodeError):
            raise ValueError(f"the interface must be an address of this machine, not {interface!r}") from None


def why(error: BaseException) -> str:
    """
    What is wrong with an endpoint string or the like, in words that say nothing of Python.
    """
    text = str(error)
    for pattern, words in _WORDS:
        found = re.search(pattern, text)
        if found:
            return words(found)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, ValueError):
        return text
    return f"{type(error).__name__}: {text}"


#: What Twisted and Python say, and what it means.
_WORDS: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"unexpected keyword argument '(.*)'", lambda found: f"it takes no {found[1]}"),
    (r"missing .* argument: '(.*)'", lambda found: f"its {found[1]} is missing"),
    (r"missing .* arguments: (.*)", lambda found: f"{found[1]} are missing"),
    (r"multiple values for .*argument '(.*)'", lambda found: f"its {found[1]} is there twice"),
    (r"takes .* positional arguments? but", lambda found: "there is too much in it"),
    (r"invalid literal for int\(\) with base \d+: (.*)", lambda found: f"{found[1]} is not a number"),
    (r"[Uu]nknown endpoint type: (.*)", lambda found: f"there is not an endpoint {found[1]}"),
    (r"raised StopIteration", lambda found: "it ends with a backslash"),
    (r"list index out of range", lambda found: "there is no such socket"),
)
