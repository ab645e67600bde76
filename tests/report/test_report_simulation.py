"""The chart of a simulation. Figures here are made up."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from bitdial.errors import DataError
from bitdial.report.drawing import save
from bitdial.report.simulation import SimulationReport, simulation_chart
from bitdial.simulation.outcome import Second


def report(policies: int, accuracy: float | None = 0.9) -> SimulationReport:
    rows = [
        Second(
            begin=float(t),
            arrived=50 + t,
            met=50,
            late=t,
            shed=0,
            expired=0,
            p50=0.01,
            p99=0.02 if t else None,
            ratio=0.25 * t,
            accuracy=accuracy,
            waiting=0,
        )
        for t in range(4)
    ]
    series = {f"$policy_{k}$ <b>": rows for k in range(policies)}
    return SimulationReport("a table  ·  a load", 1.0, 0.05, series, {"capacity at 0 %": 60.0})


@pytest.mark.parametrize("accuracy", [0.9, None])
def test_every_policy_has_a_line_in_every_panel(accuracy: float | None) -> None:
    pytest.importorskip("matplotlib")
    svg = save(simulation_chart(report(7, accuracy)), "svg")
    texts = ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {f"$policy_{k}$ <b>" for k in range(7)} <= set(texts)
    assert {"requests/s", "p99 latency, ms", "mean ratio, %", "capacity at 0 %", "a table  ·  a load"} <= set(texts)
    assert ("accuracy, %" in texts) == (accuracy is not None)
    assert svg == save(simulation_chart(report(7, accuracy)), "svg")


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(DataError, match="at least one"):
        SimulationReport("", 1.0, 0.05, {}, {})
