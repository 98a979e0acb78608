"""
How a relay treats its connections: what can be set, on the command line, in a file and in code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from connlimit._limiter.settings import seconds


def _is_time(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < value < math.inf


def _check(instance: object, attribute: Any, value: object) -> None:
    if attribute.default is False:
        if not isinstance(value, bool):
            raise ValueError(f"{attribute.name} must be true or false, not {value!r}")
    elif not _is_time(value):
        raise ValueError(f"{attribute.name} must be a time above 0, such as 5, 5s or 1min, not {value!r}")


def _time(default: float, help: str) -> Any:
    return attrs.field(default=default, validator=_check, metadata={"help": help})


@attrs.frozen
class RelayOptions:
    """
    How a relay treats its connections.

    :ivar connect_timeout: seconds in which the server must be reached.
    :ivar client_fin_timeout: seconds that the client may send nothing, once the server has closed its
        direction, until the connection to the server is closed.
    :ivar server_fin_timeout: seconds in which nothing may move, once the client has closed its direction,
        until both sides are reset.
    :ivar send_proxy: whether the server is told by a PROXY header whose connection it is.
    """

    connect_timeout: float = _time(5.0, "how long it may take to reach the server")
    client_fin_timeout: float = _time(
        1.0, "how long the client may send nothing once the server has closed its direction"
    )
    server_fin_timeout: float = _time(
        60.0, "how long the server may send nothing once the client has closed its direction"
    )
    send_proxy: bool = attrs.field(
        default=False,
        validator=_check,
        metadata={"help": "tell the server by a PROXY header (version 2) whose connection it gets"},
    )


#: The options of a relay, by name.
RELAY_FIELDS = {each.name: each for each in attrs.fields(RelayOptions)}


def relay_options(given: Mapping[str, Any], forward: str, spell: Callable[[str], str] = str) -> RelayOptions:
    """
    The options that have these values, numbers or texts.

    :param forward: the endpoint string of the server.
    :param spell: how an option is called where its value was given.
    :raises ValueError: for a wrong value.
    """
    values: dict[str, Any] = {}
    for name, value in given.items():
        field = RELAY_FIELDS[name]
        try:
            values[name] = seconds(value) if isinstance(value, str) and field.default is not False else value
            _check(None, field, values[name])
        except ValueError:
            right = "true or false" if field.default is False else "a time above 0, such as 5, 5s or 1min"
            raise ValueError(f"{spell(name)} must be {right}, not {value!r}") from None
    options = RelayOptions(**values)
    if options.send_proxy and forward.partition(":")[0].lower() in ("tls", "ssl"):
        raise ValueError(
            f"{spell('send_proxy')} must be left out with {spell('forward')} {forward}:"
            " the header would have to come before TLS"
        )
    return options
