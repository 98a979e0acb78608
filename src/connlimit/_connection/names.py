"""
The names of connections in the log: those of their real protocols, as without us.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from twisted.internet.interfaces import ILoggingContext
from twisted.internet.protocol import Protocol
from twisted.protocols.policies import ProtocolWrapper

from connlimit._system import sockets


@lru_cache(maxsize=1024)
def class_called(name: str) -> type[ProtocolWrapper]:
    """
    The class of wrappers by another name.
    """
    return type(name, (ProtocolWrapper,), {})


def log_prefix(protocol: Any) -> str:
    """
    The log prefix of a protocol; one that has none is called by its class.
    """
    if isinstance(protocol, Protocol) or ILoggingContext.providedBy(protocol):
        prefix: str = protocol.logPrefix()
        return prefix
    name: str = protocol.__class__.__name__
    return name


def take_names(transport: Any, placeholder: type, protocol: Any) -> None:
    """
    Let a transport log and show itself under the name of the real protocol, as if that had been there
    from the beginning.

    :param placeholder: what was there at first.
    """
    lowest = sockets.lowest(transport)
    was, prefix = placeholder.__name__, log_prefix(protocol)
    # Inside TLS the first is "WaitingProtocol (BufferingTLSTransport),7,127.0.0.1".
    if getattr(lowest, "logstr", "").startswith(was):
        lowest.logstr = prefix + lowest.logstr[len(was) :]
    if getattr(lowest, "repstr", "").startswith(f"<{was} "):
        lowest.repstr = f"<{protocol.__class__.__name__}{lowest.repstr[len(was) + 1 :]}"
