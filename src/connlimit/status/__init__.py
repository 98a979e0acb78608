"""
What can be seen of limiters while they run: a page, the same as JSON, their metrics, and their health.
"""

from __future__ import annotations

from collections.abc import Iterable

from twisted.application.service import IService
from twisted.internet.interfaces import IStreamServerEndpoint

from connlimit.status.in_code import serve
from connlimit.status.service import Limited, StatusService

__all__ = ["serve", "status_service"]


def status_service(
    endpoint: IStreamServerEndpoint, limited: Limited, show_peers: bool = False, hosts: Iterable[str] = ()
) -> IService:
    """
    A service that shows limiters.

    :param endpoint: where; everybody who can connect can see it, so it should be on loopback.
    :param limited: whose ``limiters`` are shown; they may change.
    :param show_peers: whether others than loopback see the addresses of clients.
    :param hosts: names, besides IP addresses and localhost, by which browsers may ask for it.
    """
    return StatusService(endpoint, limited, show_peers, frozenset(hosts))
