"""
How a relay treats its connections: what can be set, on the command line, in a file and in code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from connlimit._limiter.values import FLAG, SECONDS, Kind


def _check(instance: object, attribute: Any, value: object) -> None:
    kind: Kind = attribute.metadata["kind"]
    kind.of_code(attribute.name, value)


def _option(default: Any, kind: Kind, help: str) -> Any:
    return attrs.field(default=default, validator=_check, metadata={"kind": kind, "help": help})


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

    connect_timeout: float = _option(5.0, SECONDS, "how long it may take to reach the server")
    client_fin_timeout: float = _option(
        1.0, SECONDS, "how long the client may send nothing once the server has closed its direction"
    )
    server_fin_timeout: float = _option(
        60.0, SECONDS, "how long the server may send nothing once the client has closed its direction"
    )
    send_proxy: bool = _option(
        False, FLAG, "tell the server by a PROXY header (version 2) whose connection it gets"
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
    values = {
        name: RELAY_FIELDS[name].metadata["kind"].of_file(spell(name), value) for name, value in given.items()
    }
    options = RelayOptions(**values)
    if options.send_proxy and forward.partition(":")[0].lower() in ("tls", "ssl"):
        raise ValueError(
            f"{spell('send_proxy')} must be left out with {spell('forward')} {forward}:"
            " the header would have to come before TLS"
        )
    return options
