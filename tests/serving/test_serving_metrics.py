"""Metrics: counts, Prometheus text, the per-second history under odd clocks, and the Grafana dashboard."""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("prometheus_client", reason="metrics need bitdial[serve]")

from prometheus_client.parser import text_string_to_metric_families

from bitdial.serving.metrics import ModelMetrics
from bitdial.serving.metrics.exposition import exposition, make_registry
from bitdial.serving.metrics.history import KEEP, LATENCIES, TOLERATED, History, percentiles
from bitdial.serving.page import file_bytes

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
            clock.now, index=index, queue=total / 2, compute=0.004, total=total, samples=4, met=total <= 0.05
        )
        if at in (2, 5):
            metrics.batch(clock.now, index=index, samples=12, requests=3)
    for _ in range(3):
        metrics.arrived(clock.now, 4)
    metrics.shed(clock.now, "overloaded")
    metrics.expired(clock.now)
    metrics.failed(clock.now, "worker crash")
    metrics.gauges(
        clock.now, index=2, queue_depth=5, queue_samples=20, oldest_wait=0.01, switches=7, workers=1
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
        return found[f"bitdial_{name}"][tuple(sorted([model, *labels.items()]))]

    assert value("ratio") == 1.0 and value("queue_depth") == 5 and value("queue_samples") == 20
    assert value("switches_total") == 7 and value("workers") == 1 and value("oldest_wait_seconds") == 0.01
    assert value("requests_total", outcome="ok") == 5 and value("requests_total", outcome="late") == 1
    assert value("shed_total", reason="overloaded") == 1 and value("expired_total") == 1
    assert value("failures_total", reason="worker crash") == 1 and value("worker_restarts_total") == 1
    assert value("slo_met_total") == 5 and value("slo_attainment") == pytest.approx(5 / 9)
    assert value("mean_ratio") == pytest.approx(0.5) and value("expected_accuracy") == pytest.approx(0.85)
    assert value("samples_total", ratio="0") == 12 and value("samples_total", ratio="1") == 12
    assert value("total_latency_seconds_count") == 6
    assert value("total_latency_seconds_sum") == pytest.approx(0.35)
    assert value("total_latency_seconds_bucket", le="0.05") == 5
    assert value("batch_size_samples_count") == 2
    clock.now += 120  # the last minute is over
    assert math.isnan(samples(registry)["bitdial_mean_ratio"][(model,)])


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


@settings(max_examples=50)
@example([0.0, 0.5, -30.0, -1.0, -1.0])  # set back, then twice by what is tolerated
@given(st.lists(st.floats(0.0, 5.0) | st.sampled_from([50.0, 850.0, -1.0, -30.0, -4000.0]), min_size=1, max_size=80))
def test_polling_sees_every_second_once_whatever_the_clock_does(steps: list[float]) -> None:
    """A page that asks for what is new gets each row exactly once, and no event is missing while gaps are shorter than what is
    kept."""
    history, now, seen, since = History(), 5000.0, [], -math.inf
    for step in steps:
        now += step
        history.at(now).arrivals += 1
        seen += history.rows(now, since)
        told = history.clock(now)
        assert told >= since - TOLERATED
        since = max(since, told)  # as the page does
    seen += history.rows(now + 1.0 + TOLERATED, since)
    times = [row["t"] for row in seen]
    assert times == sorted(set(times))
    assert sum(row["arrivals"] for row in seen) == len(steps)


def test_a_clock_set_back_goes_on_and_one_that_leaps_leaves_a_gap() -> None:
    history = History()
    history.at(10_000.5).arrivals += 1
    history.at(500.0).arrivals += 1  # set back by hours: counted in the same second, from there on time goes on
    history.at(501.0).arrivals += 1
    assert [row["arrivals"] for row in history.rows(503.0)] == [2, 1]
    history.at(501.0 + 7 * 86400).arrivals += 1
    assert [row["arrivals"] for row in history.rows(503.0 + 7 * 86400)] == [1]  # all else is outdated
    assert not history.rows(503.0 + 8 * 86400)
    history.at(math.nan).arrivals += 1  # no time at all: counted where the last was
    assert history.recent(503.0 + 7 * 86400).requests == 0


@given(st.lists(st.floats(0, 10), min_size=1, max_size=300))
def test_percentiles_are_nearest_ranks(values: list[float]) -> None:
    for share, found in zip((50, 90, 99), percentiles(values), strict=True):
        assert found in values
        assert sum(v <= found for v in values) * 100 >= share * len(values)
        assert sum(v < found for v in values) * 100 < share * len(values)


def test_a_crowded_second_keeps_a_fair_sample() -> None:
    """20,000 answers in one second, rising from 0 to 1 s: a sample of bounded size has nearly their percentiles."""
    metrics, count = ModelMetrics(None, "m", RATIOS, ACCURACY, 0.05), 20_000
    for k in range(count):
        metrics.answered(7.5, index=1, queue=0.0, compute=0.0, total=k / count, samples=1, met=True)
    assert len(metrics.history.at(7.5).latencies) == LATENCIES
    (row,) = metrics.history.rows(8.0)
    assert row["answered"] == count and row["worst"] == pytest.approx(1.0, abs=1e-3)
    assert row["p50"] == pytest.approx(0.5, abs=0.06) and row["p99"] == pytest.approx(0.99, abs=0.015)


def test_odd_numbers_and_another_model_file_harm_nothing() -> None:
    registry, clock = make_registry(), Clock()
    metrics = fed(registry, clock)
    before = samples(registry)
    for odd in (math.nan, math.inf, -1.0):
        metrics.answered(clock.now, index=2, queue=odd, compute=odd, total=odd, samples=1, met=True)
        metrics.gauges(clock.now, index=1, queue_depth=0, queue_samples=0, oldest_wait=odd, switches=7, workers=1)
    metrics.use_model((0.0, 1.0), (None, None))
    metrics.answered(clock.now, index=2, queue=0.01, compute=0.01, total=0.03, samples=1, met=True)  # of the file before
    metrics.batch(clock.now, index=2, samples=1, requests=1)
    metrics.gauges(clock.now, index=2, queue_depth=0, queue_samples=0, oldest_wait=0.0, switches=2, workers=1)  # counts anew
    after = samples(registry)
    for name, values in before.items():
        if name.startswith("bitdial_") and name.endswith(("_total", "_count", "_sum", "_bucket")):
            for labels, value in values.items():
                assert after[name][labels] >= value, f"{name}{labels} went back"
    model = ("model", 'a "model"')
    assert after["bitdial_switches_total"][(model,)] == 9 and after["bitdial_ratio"][(model,)] == 1.0
    assert math.isnan(after["bitdial_expected_accuracy"][(model,)])  # some were answered at an accuracy that nobody measured
    json.loads(metrics.history.rows_json(clock.now + 1), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_models_share_a_registry() -> None:
    registry, clock = make_registry(), Clock()
    for name in ("one", "two"):
        ModelMetrics(registry, name, RATIOS, ACCURACY, 0.05, clock).arrived(clock.now, 2)
    found = samples(registry)["bitdial_arrived_samples_total"]
    assert found == {(("model", "one"),): 2, (("model", "two"),): 2}
    text = exposition(registry)[0].decode()
    assert text.count("# TYPE bitdial_ratio ") == 1  # one family for all models, as the format demands
    body, kind = exposition(registry, "application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text") and body.endswith(b"# EOF\n")


def test_counting_one_request_takes_a_few_steps() -> None:
    """Lines of Python, the first request or the ten thousandth (measured about 2 microseconds)."""
    metrics, lines = ModelMetrics(None, "m", RATIOS, ACCURACY, 0.05), 0

    def step(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return step

    def steps(now: float, requests: int) -> float:
        nonlocal lines
        lines, before = 0, sys.gettrace()
        sys.settrace(step)
        try:
            for _ in range(requests):
                metrics.arrived(now, 4)
                metrics.answered(now, index=1, queue=0.01, compute=0.004, total=0.015, samples=4, met=True)
        finally:
            sys.settrace(before)
        return lines / requests

    first = steps(10.0, 200)
    for k in range(10_000):
        metrics.arrived(10.0 + k / 1000, 4)
        metrics.answered(10.0 + k / 1000, index=1, queue=0.01, compute=0.004, total=0.015, samples=4, met=True)
    later = steps(20.0, 200)
    print(first, later)
    assert first < 80 and later < 80


def test_every_metric_of_the_dashboard_is_exported() -> None:
    registry = make_registry()
    fed(registry, Clock())
    exported = set(samples(registry))
    dashboard = json.loads(file_bytes("grafana.json"))
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    used = {name for text in expressions for name in re.findall(r"\b(?:bitdial|process)_[a-z0-9_]+", text)}
    assert used - exported == set() and len(used) >= 20
    gauges = {name for name in exported if name.startswith("bitdial_") and not name.endswith(("_total", "_sum", "_created"))}
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
