"""
The metrics of limiters, for Prometheus.

They are read from the limiters when they are asked for, so that nothing is counted twice, and nothing per
connection but the histogram of waiting times. Needs prometheus-client (``connlimit[metrics]``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from connlimit._system import descriptors
from connlimit._system.version import __version__
from connlimit.status.watch import BUCKETS

if TYPE_CHECKING:
    from connlimit.status.watch import Watch

#: The counters: the name of the metric, its help, and that of the snapshot's field.
COUNTERS = (
    ("connlimit_accepted", "Connections that were accepted.", "accepted"),
    ("connlimit_served", "Connections that got a slot.", "served"),
    ("connlimit_finished", "Connections that were served and are over.", "finished"),
    ("connlimit_departed", "Clients that went away while they waited.", "departed"),
    ("connlimit_reclaimed", "Slots whose protocols were not told of the end.", "reclaimed"),
    ("connlimit_idle_closed", "Connections that were closed because they were idle.", "idle_closed"),
    ("connlimit_exempted", "Exempt connections.", "exempted"),
)


class LimiterCollector(Collector):
    """
    Collects the metrics of watched limiters.
    """

    def __init__(self, watches: Iterable[Watch], reactor_lag: float | None = None) -> None:
        self._watches = list(watches)
        self._reactor_lag = reactor_lag

    def collect(self) -> Iterator[Metric]:
        """
        See `prometheus_client.registry.Collector.collect`.
        """
        snapshots = [(watch.name, watch.limiter.snapshot()) for watch in self._watches]
        yield InfoMetricFamily("connlimit_build", "What serves these metrics.", {"version": __version__})
        gauge = GaugeMetricFamily("connlimit_connections", "Connections now.", labels=["limiter", "state"])
        for name, now in snapshots:
            for state, value in (("active", now.active), ("waiting", now.waiting), ("exempt", now.exempt)):
                gauge.add_metric([name, state], value)
        yield gauge
        gauge = GaugeMetricFamily(
            "connlimit_max_connections",
            "How many are served at once at most; infinite without a limit.",
            labels=["limiter"],
        )
        for name, now in snapshots:
            most = now.settings.max_connections
            gauge.add_metric([name], float("inf") if most is None else most)
        yield gauge
        gauge = GaugeMetricFamily(
            "connlimit_longest_wait_seconds", "How long the first of the line has waited.", labels=["limiter"]
        )
        for name, now in snapshots:
            gauge.add_metric([name], now.longest_wait)
        yield gauge
        gauge = GaugeMetricFamily(
            "connlimit_backlog",
            "Connections that the kernel holds until they are accepted.",
            labels=["limiter"],
        )
        for name, now in snapshots:
            if now.backlog is not None:
                gauge.add_metric([name], now.backlog)
        yield gauge
        for metric, help, field in COUNTERS:
            counter = CounterMetricFamily(metric, help, labels=["limiter"])
            for name, now in snapshots:
                counter.add_metric([name], getattr(now, field))
            yield counter
        counter = CounterMetricFamily(
            "connlimit_refused", "Connections that were turned away.", labels=["limiter", "reason"]
        )
        for name, now in snapshots:
            for reason, count in now.refused.items():
                counter.add_metric([name, reason], count)
        yield counter
        yield self._waits()
        yield from self._process()

    def _waits(self) -> Metric:
        histogram = HistogramMetricFamily(
            "connlimit_wait_seconds", "How long those waited that were served.", labels=["limiter"]
        )
        for watch in self._watches:
            bounds = [*(str(float(bound)) for bound in BUCKETS), "+Inf"]
            buckets = list(zip(bounds, accumulate(watch.counts), strict=True))
            histogram.add_metric([watch.name], buckets, watch.total)
        return histogram

    def _process(self) -> Iterator[Metric]:
        gauge = GaugeMetricFamily(
            "connlimit_descriptors", "File descriptors of the process.", labels=["state"]
        )
        for state, value in (("open", descriptors.count()), ("limit", descriptors.limit())):
            if value is not None:
                gauge.add_metric([state], value)
        yield gauge
        yield GaugeMetricFamily(
            "connlimit_headers",
            "Connections whose PROXY header is being read, and which no limiter counts yet.",
            value=descriptors.HEADERS.taken,
        )
        yield GaugeMetricFamily(
            "connlimit_refusals",
            "Connections that are being told of their refusal.",
            value=descriptors.REFUSALS.taken,
        )
        if self._reactor_lag is not None:
            yield GaugeMetricFamily(
                "connlimit_reactor_lag_seconds",
                "How late the reactor was with what was due once a second.",
                value=self._reactor_lag,
            )


def exposition(watches: Iterable[Watch], reactor_lag: float | None = None) -> bytes:
    """
    The metrics in Prometheus's text format.
    """
    registry = CollectorRegistry()
    registry.register(LimiterCollector(watches, reactor_lag))
    return generate_latest(registry)
