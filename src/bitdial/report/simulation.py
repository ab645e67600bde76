"""The picture of a simulation: load, latency, ratio and accuracy over time, one line per policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bitdial.errors import DataError
from bitdial.report.latency import COLOURS
from bitdial.report.markup import shorten
from bitdial.report.plots import DASHES, render_figure
from bitdial.report.plots import _figure as empty_figure
from bitdial.report.style import INK_LIGHT, MUTED_LIGHT, PALE_LIGHT
from bitdial.simulation.outcome import Second

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


def render_simulation_plot(data: SimulationReport, kind: str = "png") -> bytes:
    """The picture as "png" or "svg". Equal data give equal bytes with the same matplotlib. Raises ConfigError where it is
    missing."""
    return render_figure(lambda: _draw(data), kind)


def _draw(data: SimulationReport) -> Figure:
    accurate = any(row.accuracy is not None for rows in data.series.values() for row in rows)
    figure = empty_figure(8.4, 7.6 if accurate else 6.0)
    panels: list[Axes] = list(figure.subplots(4 if accurate else 3, 1, sharex=True))
    first = next(iter(data.series.values()))
    times = [row.begin for row in first]
    load = panels[0]
    load.fill_between(times, [row.arrived / data.window for row in first], color=PALE_LIGHT, step="post", linewidth=0)
    for name, capacity in data.capacities.items():
        load.axhline(capacity, color=MUTED_LIGHT, linewidth=1.0, linestyle=(0, (4, 3)))
        load.annotate(name, (times[-1], capacity), (0, 2), textcoords="offset points", ha="right", fontsize=7.5)
    load.set_ylabel("requests/s")
    load.set_ylim(bottom=0)
    panels[1].axhline(1e3 * data.slo, color=INK_LIGHT, linewidth=1.0, linestyle=(0, (4, 3)))
    panels[1].set_ylabel("p99 latency, ms")
    panels[2].set_ylabel("mean ratio, %")
    panels[2].set_ylim(-4, 104)
    if accurate:
        panels[3].set_ylabel("accuracy, %")
    for k, (name, rows) in enumerate(data.series.items()):
        # Colours repeat after a round; then the dashes tell.
        dashes = ("-", *DASHES)[k // len(COLOURS) % (1 + len(DASHES))]
        line: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "linewidth": 1.2, "linestyle": dashes}
        begins = [row.begin for row in rows]
        panels[1].plot(begins, [_scaled(row.p99, 1e3) for row in rows], label=name, **line)
        panels[2].plot(begins, [_scaled(row.ratio, 100) for row in rows], **line)
        if accurate:
            panels[3].plot(begins, [_scaled(row.accuracy, 100) for row in rows], **line)
        lost = [(row.begin, 1e3 * data.slo) for row in rows if row.met < row.arrived]
        if lost:  # windows with requests that were late or not answered
            panels[1].plot(*zip(*lost, strict=True), linestyle="none", marker="|", markersize=5, color=line["color"])
    panels[1].set_ylim(bottom=0)
    for axes in panels:
        axes.grid(axis="y")
    panels[-1].set_xlabel("time, s")
    figure.legend(loc="outside upper left", ncols=4, frameon=False, handlelength=2.0)
    panels[0].set_title(shorten(data.title, 120), fontsize=7.5, color=MUTED_LIGHT, loc="left")
    return figure


def _scaled(value: float | None, factor: float) -> float:
    return float("nan") if value is None else factor * value
