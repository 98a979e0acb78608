"""
Names connlimit to twistd and to endpoint strings. Any Twisted program may import this, so it imports little.
"""

from __future__ import annotations

from twisted.application.service import ServiceMaker
from twisted.internet.interfaces import IStreamServerEndpoint, IStreamServerEndpointStringParser
from twisted.plugin import IPlugin
from zope.interface import implementer


@implementer(IPlugin, IStreamServerEndpointStringParser)
class _EndpointParser:
    """
    The parser of ``connlimit:`` strings.
    """

    prefix = "connlimit"

    def parseStreamServer(self, reactor: object, *args: object, **kwargs: object) -> IStreamServerEndpoint:
        from connlimit._listening.endpoint_string import from_arguments

        return from_arguments(reactor, args, kwargs, _shown)


def _shown(endpoint: IStreamServerEndpoint, status: str, reactor: object) -> IStreamServerEndpoint:
    """
    An endpoint that has a status page beside it.
    """
    from connlimit.status.in_code import ShownEndpoint

    return ShownEndpoint(endpoint, status, reactor)


connlimit = ServiceMaker(
    "connlimit",
    "connlimit._twistd.command_line",
    "A connection limiter before another server, a factory or any other plugin.",
    "connlimit",
)
connlimit_endpoint_parser = _EndpointParser()
connlimit_semaphores = ServiceMaker(
    "connlimit-semaphores",
    "connlimit._twistd.semaphores.command_line",
    "Named semaphores over HTTP, for clients of Throttle.",
    "connlimit-semaphores",
)
