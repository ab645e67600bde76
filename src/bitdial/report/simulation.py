"""The picture of a simulation: load, latency, ratio and accuracy over time, one line per policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bitdial.errors import DataError
from bitdial.report.drawing import DASHES, SMALL, Chart, legend, line
from bitdial.report.markup import shorten, visible
from bitdial.report.style import INK, LINES, MUTED, PALE
from bitdial.simulation.outcome import Second

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase


@dataclass(frozen=True)
class SimulationReport:
    """title: of the table and the load. window: seconds of one point. series: {policy: time series}, all over the same windows.
    slo: seconds. capacities: {name: requests/s} drawn as levels into the load."""

    title: str
    window: float
    slo: float
    series: dict[str, Sequence[Second]]
    capacities: dict[str, float]

    def __post_init__(self) -> None:
        if not self.series or not all(self.series.values()):
            raise DataError("a picture of a simulation needs at least one policy with at least one window")


def simulation_chart(data: SimulationReport) -> Chart:
    """Load, latency, ratio and, where it is known, accuracy over time."""
    accurate = any(row.accuracy is not None for rows in data.series.values() for row in rows)
    told = f"{', '.join(map(visible, data.series))}, in windows of {data.window:g} s"
    draw = partial(_draw, data=data, accurate=accurate)
    return Chart("Policies over time", told, draw, (7.6, 6.6 if accurate else 5.2), shorten(data.title, 120))


def _draw(figure: FigureBase, data: SimulationReport, accurate: bool) -> None:
    panels: list[Axes] = list(figure.subplots(4 if accurate else 3, 1, sharex=True))
    first = next(iter(data.series.values()))
    times = [row.begin for row in first]
    load = panels[0]
    load.fill_between(times, [row.arrived / data.window for row in first], color=PALE, step="post", linewidth=0)
    for name, capacity in data.capacities.items():
        load.axhline(capacity, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
        load.annotate(
            visible(name), (times[-1], capacity), (0, 2), textcoords="offset points", ha="right", fontsize=SMALL
        )
    load.set_title("requests/s")
    load.set_ylim(bottom=0)
    panels[1].axhline(1e3 * data.slo, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    panels[1].set_title("p99 latency, ms")
    panels[2].set_title("mean ratio, %")
    panels[2].set_ylim(-4, 104)
    if accurate:
        panels[3].set_title("accuracy, %")
    handles = []
    for k, (name, rows) in enumerate(data.series.items()):
        # Colours repeat after a round; then the dashes tell.
        dashes = ("-", *DASHES)[k // len(LINES) % (1 + len(DASHES))]
        style: dict[str, Any] = {"color": LINES[k % len(LINES)], "linewidth": 1.2, "linestyle": dashes}
        handles.append(line(name, **style))
        begins = [row.begin for row in rows]
        panels[1].plot(begins, [_scaled(row.p99, 1e3) for row in rows], **style)
        panels[2].plot(begins, [_scaled(row.ratio, 100) for row in rows], **style)
        if accurate:
            panels[3].plot(begins, [_scaled(row.accuracy, 100) for row in rows], **style)
        lost = [(row.begin, 1e3 * data.slo) for row in rows if row.met < row.arrived]
        if lost:  # windows with requests that were late or not answered
            panels[1].plot(*zip(*lost, strict=True), linestyle="none", marker="|", markersize=5, color=style["color"])
    panels[1].set_ylim(bottom=0)
    for axes in panels:
        axes.grid(axis="y")
    panels[-1].set_xlabel("time, s")
    legend(figure, handles)


def _scaled(value: float | None, factor: float) -> float:
    return float("nan") if value is None else factor * value
