"""
Where endpoints and services listen, as far as that is known.
"""

from __future__ import annotations

import os
from typing import Any

import attrs
from twisted.application.internet import SSLServer, StreamServerEndpointService, UNIXServer

from connlimit._listening.checked_endpoints import nested


@attrs.frozen
class Where:
    """
    Where something listens.

    :ivar kind: ``tcp``, ``unix``, or ``fd`` of a descriptor that was handed over.
    :ivar at: the port, the path, or the number of the descriptor.
    :ivar interface: of a port; nothing stands for all of them.
    """

    kind: str
    at: Any
    interface: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.at}" + (f":interface={self.interface}" if self.interface else "")

    def __contains__(self, other: Where | None) -> bool:
        return other == self or (other is not None and attrs.evolve(other, interface="") == self)


def place_of(endpoint: Any) -> Where | None:
    """
    Where an endpoint listens, as far as Twisted's tell.
    """
    for each in nested(endpoint):
        if isinstance(getattr(each, "_port", None), int):
            interface = getattr(each, "_interface", "")
            return Where("tcp", each._port, "" if interface == "::" else interface)
        if isinstance(getattr(each, "_address", None), str):
            return Where("unix", os.path.abspath(each._address))
        if isinstance(getattr(each, "fileno", None), int):
            return Where("fd", each.fileno)
    return None


def place_of_service(service: Any) -> Where | None:
    """
    Where a service listens, as far as that can be told.
    """
    if isinstance(service, StreamServerEndpointService):
        return place_of(service.endpoint)
    # They keep the arguments of listenTCP and its like.
    where, interface = service.args[0], service.kwargs.get("interface")
    if isinstance(service, UNIXServer):
        return Where("unix", os.path.abspath(where))
    at = 4 if isinstance(service, SSLServer) else 3
    return Where("tcp", where, interface or (service.args[at] if len(service.args) > at else ""))
