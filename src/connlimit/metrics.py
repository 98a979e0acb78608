"""
The metrics of limiters, for Prometheus.

The status page has them. For a registry of your own::

    REGISTRY.register(LimiterCollector([Watch(limiter)]))
"""

from connlimit.status.metrics import LimiterCollector
from connlimit.status.watch import Watch

__all__ = ["LimiterCollector", "Watch"]
