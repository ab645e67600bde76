"""Metrics: counts, Prometheus text, the per-second history under odd clocks, and the Grafana dashboard."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("prometheus_client", reason="metrics need flexiq[serve]")

from prometheus_client.parser import text_string_to_metric_families

from flexiq.serving.metrics import ModelMetrics
from flexiq.serving.metrics.exposition import exposition, make_registry
from flexiq.serving.metrics.history import KEEP, History
from flexiq.serving.page import file_bytes

RATIOS, ACCURACY = (0.0, 0.5, 1.0), (0.9, 0.88, 0.8)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def fed(registry: Any, clock: Clock) -> ModelMetrics:
    """Six answers (one late), a refusal, a dropped and a failed request, two batches."""
    metrics = ModelMetrics(registry, 'a "model"', RATIOS, ACCURACY, 0.05, clock)
    for at, (index, total) in enumerate([(0, 0.01), (0, 0.02), (0, 0.03), (2, 0.04), (2, 0.05), (2, 0.2)]):
        metrics.arrived(clock.now, 4)
        metrics.answered(
            clock.now, index=index, queue=total / 2, compute=0.004, total=total, images=4, met=total <= 0.05
        )
        if at in (2, 5):
            metrics.batch(clock.now, index=index, images=12, requests=3)
    for _ in range(3):
        metrics.arrived(clock.now, 4)
    metrics.shed(clock.now, "overloaded")
    metrics.expired(clock.now)
    metrics.failed(clock.now, "worker crash")
    metrics.gauges(
        clock.now, index=2, queue_depth=5, queue_images=20, oldest_wait=0.01, switches=7, workers=1
    )
    metrics.restarted(clock.now)
    metrics.reloaded(clock.now, False)
    return metrics


def samples(registry: Any) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """name -> labels -> value, as a scraper reads them."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    text = exposition(registry)[0].decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_prometheus_text_says_what_happened() -> None:
    registry, clock = make_registry(), Clock()
    fed(registry, clock)
    found = samples(registry)
    model = ("model", 'a "model"')

    def value(name: str, **labels: str) -> float:
        return found[f"flexiq_{name}"][tuple(sorted([model, *labels.items()]))]

    assert value("ratio") == 1.0 and value("queue_depth") == 5 and value("queue_images") == 20
    assert value("switches_total") == 7 and value("workers") == 1 and value("oldest_wait_seconds") == 0.01
    assert value("requests_total", outcome="ok") == 5 and value("requests_total", outcome="late") == 1
    assert value("shed_total", reason="overloaded") == 1 and value("expired_total") == 1
    assert value("failures_total", reason="worker crash") == 1 and value("worker_restarts_total") == 1
    assert value("slo_met_total") == 5 and value("slo_attainment") == pytest.approx(5 / 9)
    assert value("mean_ratio") == pytest.approx(0.5) and value("expected_accuracy") == pytest.approx(0.85)
    assert value("images_total", ratio="0") == 12 and value("images_total", ratio="1") == 12
    assert value("total_latency_seconds_count") == 6
    assert value("total_latency_seconds_sum") == pytest.approx(0.35)
    assert value("total_latency_seconds_bucket", le="0.05") == 5
    assert value("batch_size_images_count") == 2
    clock.now += 120  # the last minute is over
    assert math.isnan(samples(registry)["flexiq_mean_ratio"][(model,)])


@settings(max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1e12, -1e12]), max_size=60))
def test_history_stands_any_clock(steps: list[float]) -> None:
    history, now = History(), 1000.0
    for step in steps:
        now += step
        second = history.at(now)
        second.arrivals += 1
    rows = history.rows(now)
    assert len(rows) <= KEEP + 1
    times = [row["t"] for row in rows]
    assert times == sorted(set(times))
    json.loads(history.rows_json(now))


def test_every_metric_of_the_dashboard_is_exported() -> None:
    registry = make_registry()
    fed(registry, Clock())
    exported = set(samples(registry))
    dashboard = json.loads(file_bytes("grafana.json"))
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    used = {name for text in expressions for name in re.findall(r"\b(?:flexiq|process)_[a-z0-9_]+", text)}
    assert used - exported == set() and len(used) >= 20
    gauges = {name for name in exported if name.startswith("flexiq_") and not name.endswith(("_total", "_sum", "_created"))}
    assert len(gauges & used) >= 10


def test_dashboard_is_well_formed() -> None:
    dashboard = json.loads(file_bytes("grafana.json"))
    assert dashboard["__inputs"][0]["name"] == "DS_PROMETHEUS" and dashboard["schemaVersion"] >= 36
    assert dashboard["templating"]["list"][0]["name"] == "model"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        assert panel["title"] and panel["description"] and panel["datasource"]["uid"] == "${DS_PROMETHEUS}"
        references = [t["refId"] for t in panel["targets"]]
        assert len(references) == len(set(references))
