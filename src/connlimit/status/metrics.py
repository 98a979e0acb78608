"""
The metrics of limiters, for Prometheus.

They are read from the limiters when they are asked for, so that nothing is counted twice, and nothing per
connection but the histogram of waiting times. Needs prometheus-client (``connlimit[metrics]``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from connlimit._limiter.settings import FIELDS
from connlimit._system import descriptors
from connlimit._system.version import __version__
from connlimit.interfaces import COUNTER, FIGURES, Figure
from connlimit.status.watch import BUCKETS, Watch


def metric_name(name: str, figure: Figure) -> str:
    """
    The name of the metric that tells a figure.
    """
    name = f"connlimit_{figure.metric or name}"
    return f"{name}_seconds" if figure.unit == "seconds" and not name.endswith("_seconds") else name


class LimiterCollector(Collector):
    """
    Collects the metrics of watched limiters.
    """

    def __init__(self, watches: Iterable[Watch], reactor_lag: float | None = None) -> None:
        """
        :param watches: one for each limiter; it counts the waits from when it is made.
        :param reactor_lag: how late the reactor is, in seconds, if that is known.
        """
        self._watches = list(watches)
        self._reactor_lag = reactor_lag

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("connlimit_build", "What serves these metrics.", {"version": __version__})
        yield from self._settings()
        yield from self._figures()
        yield self._waits()
        yield from self._process()

    def _settings(self) -> Iterator[Metric]:
        """
        The settings by which figures are limited.
        """
        for name in (figure.setting for figure in FIGURES.values() if figure.setting):
            help = FIELDS[name].metadata["help"].capitalize()
            gauge = GaugeMetricFamily(
                f"connlimit_{name}", f"{help}; infinite without a limit.", labels=["limiter"]
            )
            for watch in self._watches:
                maximum = getattr(watch.limiter.settings, name)
                gauge.add_metric([watch.name], math.inf if maximum is None else maximum)
            yield gauge

    def _figures(self) -> Iterator[Metric]:
        shared: dict[str, list[str]] = {}
        for name, figure in FIGURES.items():
            shared.setdefault(metric_name(name, figure), []).append(name)
        snapshots = [(watch.name, watch.limiter.snapshot().figures()) for watch in self._watches]
        for metric, names in shared.items():
            yield _family(metric, names, snapshots)

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
            "Connections that are being told that they are refused.",
            value=descriptors.REFUSALS.taken,
        )
        if self._reactor_lag is not None:
            yield GaugeMetricFamily(
                "connlimit_reactor_lag_seconds",
                "How late the reactor was with what was due once a second.",
                value=self._reactor_lag,
            )


def _family(metric: str, names: list[str], snapshots: list[tuple[str, dict[str, Any]]]) -> Metric:
    """
    A metric, and what it shows of each limiter: a figure, or several by their names.
    """
    figures = [FIGURES[name] for name in names]
    labels = ["limiter"] + [figure.label for figure in figures if figure.label]
    if len(names) > 1:
        labels.append("state")
        help = "; ".join(f"{name}: {FIGURES[name].help}" for name in names) + "."
    else:
        help = f"{figures[0].help[0].upper()}{figures[0].help[1:]}."
    make = CounterMetricFamily if figures[0].kind == COUNTER else GaugeMetricFamily
    family = make(metric, help, labels=labels)
    for limiter, values in snapshots:
        for name in names:
            value = values[name]
            told = value.items() if FIGURES[name].label else [(name, value)]
            for label, number in told:
                if number is not None:
                    family.add_metric([limiter, label][: len(labels)], number)
    return family


def exposition(watches: Iterable[Watch], reactor_lag: float | None = None) -> bytes:
    """
    The metrics in Prometheus's text format.
    """
    registry = CollectorRegistry()
    registry.register(LimiterCollector(watches, reactor_lag))
    return generate_latest(registry)
