"""The counts of all models as Prometheus metrics: put together when they are asked for, so that counting itself stays cheap."""

from __future__ import annotations

import math
import platform
import threading
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from bitdial._version import __version__
from bitdial.serving.metrics.history import Recent
from bitdial.serving.metrics.model import RECENT, Distribution, ModelMetrics


class ModelCollector:
    """Yields the metric families of all models that were added. Registered once per registry, by `collector_of`."""

    def __init__(self) -> None:
        self._models: dict[str, ModelMetrics] = {}

    def add(self, metrics: ModelMetrics) -> None:
        """Show this model; it takes the place of one of the same name."""
        self._models = {**self._models, metrics.model: metrics}

    def remove(self, model: str) -> None:
        """Show this model no longer."""
        self._models = {name: metrics for name, metrics in self._models.items() if name != model}

    def describe(self) -> list[Metric]:
        """Names of all families, for the registry's check that no name is given twice."""
        return list(_families([]))

    def collect(self) -> Iterator[Metric]:
        """All families as they stand."""
        models = list(self._models.values())
        for metrics in models:
            metrics.read()
        yield from _families(models)


_collectors: WeakKeyDictionary[CollectorRegistry, ModelCollector] = WeakKeyDictionary()
_collectors_lock = threading.Lock()


def collector_of(registry: CollectorRegistry) -> ModelCollector:
    """The collector of this registry's models, registered when first asked for."""
    with _collectors_lock:
        collector = _collectors.get(registry)
        if collector is None:
            collector = _collectors[registry] = ModelCollector()
            registry.register(collector)
        return collector


def make_registry() -> CollectorRegistry:
    """A registry of its own for a server, with the process's own figures (memory, CPU seconds, open files)."""
    registry = CollectorRegistry(auto_describe=True)
    ProcessCollector(registry=registry)
    return registry


def exposition(registry: CollectorRegistry, accept: str = "") -> tuple[bytes, str]:
    """Body and content type of an answer to a scrape.

    accept: the request's Accept header; it chooses between Prometheus text and OpenMetrics.
    """
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


def _families(models: Sequence[ModelMetrics]) -> Iterator[Metric]:
    build = InfoMetricFamily("bitdial_build", "Version of bitdial and of Python.")
    build.add_metric([], {"version": __version__, "python": platform.python_version()})
    yield build
    yield from _gauges(models)
    yield from _counters(models)
    yield from _histograms(models)


def _gauges(models: Sequence[ModelMetrics]) -> Iterator[Metric]:
    def gauge(name: str, text: str, values: Sequence[float | None]) -> Metric:
        family = GaugeMetricFamily(f"bitdial_{name}", text, labels=["model"])
        for metrics, value in zip(models, values, strict=True):
            family.add_metric([metrics.model], float("nan") if value is None else value)
        return family

    recent: list[Recent] = [m.history.recent(m.clock(), RECENT) for m in models]
    yield gauge(
        "ratio",
        "Share of the work that runs at low precision, as the dial is set now.",
        [m.ratios[m.index] for m in models],
    )
    yield gauge("mean_ratio", "Mean ratio of the samples answered in the last minute.", [r.ratio for r in recent])
    yield gauge(
        "expected_accuracy",
        "Accuracy (0 to 1) measured at the ratios at which the samples of the last minute were answered, mean over samples.",
        [r.accuracy for r in recent],
    )
    yield gauge(
        "slo_attainment",
        "Share of the last minute's requests answered within their SLO; shed, expired and failed ones count as missed.",
        [r.attainment for r in recent],
    )
    yield gauge("slo_seconds", "The server's latency bound.", [m.slo for m in models])
    yield gauge("queue_depth", "Requests that wait.", [m.queue_depth for m in models])
    yield gauge("queue_samples", "Samples that wait.", [m.queue_samples for m in models])
    yield gauge(
        "oldest_wait_seconds", "How long the oldest waiting request has waited.", [m.oldest_wait for m in models]
    )
    yield gauge("workers", "Workers that run.", [m.workers for m in models])
    yield gauge(
        "time_dilation",
        "Seconds of the wall clock in one second of this model's figures: 1, unless its engine's time is modelled.",
        [m.dilation for m in models],
    )


def _counters(models: Sequence[ModelMetrics]) -> Iterator[Metric]:
    def counter(name: str, text: str, values: Sequence[int]) -> Metric:
        family = CounterMetricFamily(f"bitdial_{name}", text, labels=["model"])
        for metrics, value in zip(models, values, strict=True):
            family.add_metric([metrics.model], value)
        return family

    def counters(name: str, text: str, label: str, tables: Sequence[dict[str, int]]) -> Metric:
        family = CounterMetricFamily(f"bitdial_{name}", text, labels=["model", label])
        for metrics, table in zip(models, tables, strict=True):
            for key, value in table.items():
                family.add_metric([metrics.model, key], value)
        return family

    yield counter("arrivals", "Well-formed requests that came in.", [m.arrived_requests for m in models])
    yield counter("arrived_samples", "Samples in the requests that came in.", [m.arrived_samples for m in models])
    yield counters(
        "requests",
        "Requests by outcome: ok (in time), late, shed (refused), expired (dropped), failed (server's error), invalid (sender's "
        "error), cancelled (sender left).",
        "outcome",
        [m.counts(m.outcomes) for m in models],
    )
    yield counter("slo_met", "Requests answered within their SLO.", [m.outcomes["ok"].count for m in models])
    yield counters(
        "samples", "Samples answered, by the ratio they ran at.", "ratio", [m.counts(m.samples_by_ratio) for m in models]
    )
    yield counters(
        "batches", "Batches by the ratio they ran at.", "ratio", [m.counts(m.batches_by_ratio) for m in models]
    )
    yield counter("switches", "Changes of the ratio.", [m.switches for m in models])
    yield counters(
        "shed",
        "Requests refused for lack of capacity, by reason.",
        "reason",
        [m.counts(m.shed_reasons) for m in models],
    )
    yield counter(
        "expired",
        "Requests dropped because their answer would have come too late.",
        [m.outcomes["expired"].count for m in models],
    )
    yield counters(
        "failures",
        "Requests that failed by the server's fault, by reason.",
        "reason",
        [m.counts(m.failures) for m in models],
    )
    yield counter("worker_restarts", "Workers started anew after a crash or a hang.", [m.restarts for m in models])
    yield counter(
        "overruns",
        "Batches whose arithmetic took longer than the modelled time; raise --dilation if there are many.",
        [m.overruns for m in models],
    )
    yield counters("reloads", "Reloads of the model file, by result.", "result", [m.counts(m.reloads) for m in models])


def _histograms(models: Sequence[ModelMetrics]) -> Iterator[Metric]:
    def histogram(name: str, text: str, distributions: Sequence[Distribution]) -> Metric:
        family = HistogramMetricFamily(f"bitdial_{name}", text, labels=["model"])
        for metrics, distribution in zip(models, distributions, strict=True):
            buckets: list[tuple[str, float]] = []
            total, below = distribution.total, 0
            for bound, count in zip((*distribution.bounds, float("inf")), list(distribution.counts), strict=True):
                below += count
                buckets.append((f"{bound}" if math.isfinite(bound) else "+Inf", below))
            family.add_metric([metrics.model], buckets, total)
        return family

    yield histogram("batch_size_samples", "Samples in a batch.", [m.batch_samples for m in models])
    yield histogram(
        "queue_latency_seconds",
        "Time that answered requests waited for their batch.",
        [m.queue_latency for m in models],
    )
    yield histogram(
        "compute_latency_seconds",
        "Time inside the engine of the batch of answered requests.",
        [m.compute_latency for m in models],
    )
    yield histogram(
        "total_latency_seconds",
        "Time from the arrival of answered requests to their answer.",
        [m.total_latency for m in models],
    )
