"""The counts of all models as Prometheus metrics: put together when they are asked for, so that counting itself stays cheap."""

from __future__ import annotations

import math
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
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


GAUGES: dict[str, tuple[str, Callable[[ModelMetrics, Recent], float | None]]] = {
    "ratio": ("Share of the work that runs at low precision, as the dial is set now.", lambda m, r: m.ratios[m.index]),
    "mean_ratio": ("Mean ratio of the samples answered in the last minute.", lambda m, r: r.ratio),
    "expected_accuracy": (
        "Accuracy (0 to 1) measured at the ratios at which the samples of the last minute were answered, mean over samples.",
        lambda m, r: r.accuracy,
    ),
    "slo_attainment": (
        "Share of the last minute's requests answered within their SLO; shed, expired and failed ones count as missed.",
        lambda m, r: r.attainment,
    ),
    "slo_seconds": ("The server's latency bound.", lambda m, r: m.slo),
    "queue_depth": ("Requests that wait.", lambda m, r: m.queue_depth),
    "queue_samples": ("Samples that wait.", lambda m, r: m.queue_samples),
    "oldest_wait_seconds": ("How long the oldest waiting request has waited.", lambda m, r: m.oldest_wait),
    "workers": ("Workers that run.", lambda m, r: m.workers),
    "time_dilation": (
        "Seconds of the wall clock in one second of this model's figures: 1, unless its engine's time is modelled.",
        lambda m, r: m.dilation,
    ),
}
COUNTERS: dict[str, tuple[str, Callable[[ModelMetrics], int]]] = {
    "arrivals": ("Well-formed requests that came in.", lambda m: m.arrived_requests),
    "arrived_samples": ("Samples in the requests that came in.", lambda m: m.arrived_samples),
    "slo_met": ("Requests answered within their SLO.", lambda m: m.outcomes["ok"].count),
    "switches": ("Changes of the ratio.", lambda m: m.switches),
    "expired": (
        "Requests dropped because their answer would have come too late.", lambda m: m.outcomes["expired"].count
    ),
    "worker_restarts": ("Workers started anew after a crash or a hang.", lambda m: m.restarts),
    "overruns": (
        "Batches whose arithmetic took longer than the modelled time; raise --dilation if there are many.",
        lambda m: m.overruns,
    ),
}  # fmt: skip
# With a label of their own beside the model's.
LABELLED: dict[str, tuple[str, str, Callable[[ModelMetrics], dict[str, int]]]] = {
    "requests": (
        "outcome",
        "Requests by outcome: ok (in time), late, shed (refused), expired (dropped), failed (server's error), invalid (sender's "
        "error), cancelled (sender left).",
        lambda m: m.counts(m.outcomes),
    ),
    "samples": ("ratio", "Samples answered, by the ratio they ran at.", lambda m: m.counts(m.samples_by_ratio)),
    "batches": ("ratio", "Batches by the ratio they ran at.", lambda m: m.counts(m.batches_by_ratio)),
    "shed": ("reason", "Requests refused for lack of capacity, by reason.", lambda m: m.counts(m.shed_reasons)),
    "failures": ("reason", "Requests that failed by the server's fault, by reason.", lambda m: m.counts(m.failures)),
    "reloads": ("result", "Reloads of the model file, by result.", lambda m: m.counts(m.reloads)),
}
HISTOGRAMS: dict[str, tuple[str, Callable[[ModelMetrics], Distribution]]] = {
    "batch_size_samples": ("Samples in a batch.", lambda m: m.batch_samples),
    "queue_latency_seconds": ("Time that answered requests waited for their batch.", lambda m: m.queue_latency),
    "compute_latency_seconds": ("Time inside the engine of the batch of answered requests.", lambda m: m.compute_latency),
    "total_latency_seconds": ("Time from the arrival of answered requests to their answer.", lambda m: m.total_latency),
}


def _families(models: Sequence[ModelMetrics]) -> Iterator[Metric]:
    build = InfoMetricFamily("bitdial_build", "Version of bitdial and of Python.")
    build.add_metric([], {"version": __version__, "python": platform.python_version()})
    yield build
    recent = [m.history.recent(m.clock(), RECENT) for m in models]
    for name, (text, shown) in GAUGES.items():
        gauge = GaugeMetricFamily(f"bitdial_{name}", text, labels=["model"])
        for metrics, last in zip(models, recent, strict=True):
            value = shown(metrics, last)
            gauge.add_metric([metrics.model], float("nan") if value is None else value)
        yield gauge
    for name, (text, counted) in COUNTERS.items():
        counter = CounterMetricFamily(f"bitdial_{name}", text, labels=["model"])
        for metrics in models:
            counter.add_metric([metrics.model], counted(metrics))
        yield counter
    for name, (label, text, table) in LABELLED.items():
        counter = CounterMetricFamily(f"bitdial_{name}", text, labels=["model", label])
        for metrics in models:
            for key, count in table(metrics).items():
                counter.add_metric([metrics.model, key], count)
        yield counter
    for name, (text, distribution) in HISTOGRAMS.items():
        histogram = HistogramMetricFamily(f"bitdial_{name}", text, labels=["model"])
        for metrics in models:
            histogram.add_metric([metrics.model], *_buckets(distribution(metrics)))
        yield histogram


def _buckets(distribution: Distribution) -> tuple[list[tuple[str, float]], float]:
    """(bound -> how many lie at or below it, sum)."""
    total, below = distribution.total, 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*distribution.bounds, float("inf")), list(distribution.counts), strict=True):
        below += count
        buckets.append((f"{bound}" if math.isfinite(bound) else "+Inf", below))
    return buckets, total
