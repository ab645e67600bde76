"""Latency rows of an engine: which settings, in which order, with which accuracy; inputs; what the engine counted."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import bitdial
from bitdial.benchmarking import latency
from bitdial.benchmarking.latency import executed_low_share, measure_latency, random_inputs
from bitdial.benchmarking.timing import Plan
from bitdial.engines.base import ratio_index
from bitdial.errors import ConfigError, EngineError, RatioError
from bitdial.quantization.program import Program

QUICK = Plan(repeats=2, warmup_calls=1, repetition=0.0)


@pytest.fixture(scope="module")
def program(conv_net: Any, helpers: Any) -> Program:
    config = bitdial.QuantizeConfig(
        target="paper", selector="greedy", ratios=(0.5, 1.0), calibration_images=8, search_images=4, low_weights="derived"
    )
    made = bitdial.quantize(conv_net, helpers.images(8, 8, seed=1), config).program
    made.curve = [
        {"ratio": 0.0, "accuracy": 0.9, "standard_error": 0.01, "agreement": 1.0, "distance": 0.0},
        {"ratio": 1.0, "accuracy": 0.8, "standard_error": 0.01, "agreement": 0.9, "distance": 0.1},
    ]
    return made


class CountingEngine:
    """Runs nothing; notes every run, and counts `ratio` of its multiplies as low."""

    def __init__(self, program: Program, **options: Any) -> None:
        self.ratios, self.options = program.ratios, options
        self.runs: list[tuple[tuple[int, ...], float]] = []
        self.low = self.high = 0

    def run(self, batch: Any, ratio: float) -> Any:
        self.runs.append((batch.shape, ratio))
        self.low += int(100 * ratio)
        self.high += 100 - int(100 * ratio)
        return batch

    def reset_counters(self) -> None:
        self.low = self.high = 0

    def counters(self) -> list[dict[str, Any]]:
        return [{"layer": "a", "kernel": "direct", "low_macs": self.low, "high_macs": self.high}]

    def describe(self) -> dict[str, Any]:
        return {"engine": {"isa": self.options["isa"] or "own"}}


def test_rows_of_the_reference_engine(program: Program) -> None:
    seen: list[str] = []
    rows = measure_latency(
        program, "reference", batches=(2, 1), plan=QUICK, progress=lambda stage, share: seen.append(stage)
    )
    assert [(r.batch, r.ratio) for r in rows] == [(2, 0.0), (2, 0.5), (2, 1.0), (1, 0.0), (1, 0.5), (1, 1.0)]
    for row in rows:
        assert row.milliseconds > 0 and row.samples.repeats == 2
        assert row.images_per_second == pytest.approx(1e3 * row.batch / row.milliseconds)
        assert row.low_share == program.low_share(ratio_index(program.ratios, row.ratio))
        assert row.executed_low is None  # this engine does not count
        assert row.vs_base is not None and (row.ratio > 0.0 or row.vs_base == 1.0)
        content = row.as_json()
        assert content["speedup"] == pytest.approx(1 / row.vs_base)
        json.dumps(content, allow_nan=False)
    assert [r.quality.get("accuracy") for r in rows[:3]] == [0.9, None, 0.8]  # as far as the curve has them
    assert {"preparing", "measuring"} <= set(seen)


def test_every_combination_gets_its_engine_and_inputs(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[CountingEngine] = []

    def create(program: Program, engine: str, **options: Any) -> CountingEngine:
        assert engine == "cpu"
        made.append(CountingEngine(program, **options))
        return made[-1]

    monkeypatch.setattr(latency, "create_engine", create)
    rows = measure_latency(
        program, "cpu", batches=(1, 3), threads=(1, 2), isas=("avx2", "portable"), ratios=(0.6, 1.0, 0.5), plan=QUICK,
        options={"memory": "small"},
    )  # fmt: skip
    assert len(made) == 8 and len(rows) == 16
    assert {(e.options["batch_hint"], e.options["threads"], e.options["isa"]) for e in made} == {
        (b, t, i) for b in (1, 3) for t in (1, 2) for i in ("avx2", "portable")
    }
    assert all(e.options["memory"] == "small" for e in made)
    for engine in made:
        assert {shape for shape, _ in engine.runs} == {(engine.options["batch_hint"], 3, 8, 8)}
        assert {ratio for _, ratio in engine.runs} == {0.5, 1.0}
    for row in rows:
        assert row.executed_low == row.ratio  # counted by the engine, not the plan's share
        assert row.vs_base is None  # the smallest ratio was not among those asked for
        assert row.isa in ("avx2", "portable")


def test_random_inputs_fit_the_graph(program: Program) -> None:
    (a,), (b,) = random_inputs(program, 4, seed=1), random_inputs(program, 4, seed=1)
    assert a.shape == (4, 3, 8, 8) and a.dtype == np.float32 and np.isfinite(a).all()
    assert (a == b).all() and (a != random_inputs(program, 4, seed=2)[0]).any()


def test_an_engine_without_multiplies_counts_nothing(program: Program) -> None:
    engine = CountingEngine(program)
    assert executed_low_share(engine, lambda: None) is None  # type: ignore[arg-type]
    assert executed_low_share(engine, lambda: engine.run(np.zeros(1), 0.25)) == 0.25  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong, error",
    [
        ({"batches": ()}, ConfigError),
        ({"batches": (0,)}, ConfigError),
        ({"threads": (True,)}, ConfigError),
        ({"isas": ("avx2",)}, ConfigError),
        ({"isas": ()}, ConfigError),
        ({"ratios": (1.5,)}, RatioError),
        ({"engine": "psychic"}, EngineError),
        ({"options": {"no_such": 1}}, EngineError),
    ],
)
def test_wrong_settings_are_typed_errors(program: Program, wrong: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        measure_latency(program, **{"engine": "reference", "plan": QUICK, **wrong})


def test_needs_no_torch() -> None:
    code = "import sys, bitdial.benchmarking.latency, bitdial.report.latency_page; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
