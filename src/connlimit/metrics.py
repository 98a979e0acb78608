"""
The metrics of limiters, for Prometheus.
"""

from connlimit.status.metrics import LimiterCollector

__all__ = ["LimiterCollector"]
