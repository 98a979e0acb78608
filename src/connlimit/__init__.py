"""
A connection limiter for any Twisted server: a fixed number are served at once, the others wait in a queue.
"""

from connlimit._connection.factory import LimitingFactory
from connlimit._job.agent import LimitingAgent
from connlimit._job.client_endpoint import LimitingClientEndpoint
from connlimit._job.job import Job, Refused
from connlimit._limiter.limiter import Limiter
from connlimit._listening.endpoint import LimitingEndpoint, limit_reactor
from connlimit._listening.proxy_header import ProxyHeaderEndpoint
from connlimit._listening.service import LimitedService, limit_service
from connlimit._request.factory import RequestLimitingFactory
from connlimit._system.version import __version__
from connlimit.interfaces import Snapshot
from connlimit.observers import ConnectionLog, LimiterLog

__all__ = [
    "ConnectionLog",
    "Job",
    "LimitedService",
    "Limiter",
    "LimiterLog",
    "LimitingAgent",
    "LimitingClientEndpoint",
    "LimitingEndpoint",
    "LimitingFactory",
    "ProxyHeaderEndpoint",
    "Refused",
    "RequestLimitingFactory",
    "Snapshot",
    "__version__",
    "limit_reactor",
    "limit_service",
]
