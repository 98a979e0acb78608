"""
A connection limiter for any Twisted server: so many are served at once, the others wait in line.
"""

from connlimit._factory import LimitingFactory
from connlimit._limiter import Limiter, Snapshot
from connlimit._log import ConnectionLog, LimiterLog
from connlimit._place import limit_reactor
from connlimit._proxied import AfterHeader
from connlimit._service import LimitedService, LimitingEndpoint, limit_service
from connlimit._version import __version__

__all__ = [
    "AfterHeader",
    "ConnectionLog",
    "LimitedService",
    "Limiter",
    "LimiterLog",
    "LimitingEndpoint",
    "LimitingFactory",
    "Snapshot",
    "__version__",
    "limit_reactor",
    "limit_service",
]
