"""Accuracy against latency: the chart and its data.

One point per ratio, one line per batch size (and number of threads). Without a measured accuracy the line shows
agreement with the 8-bit model; without either, latency over the ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bitdial.errors import DataError
from bitdial.report.axis import Axis, linear_axis, time_axis
from bitdial.report.drawing import MARKERS, SMALL, Chart, fit, legend, line
from bitdial.report.markup import percent, ratio_name, shorten
from bitdial.report.style import LINES

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase


@dataclass(frozen=True)
class LatencyPoint:
    """One measured setting. milliseconds: median; p90: 90th percentile of single calls. accuracy, agreement: 0..1 or None.
    speedup: time of the smallest ratio over this one's in the same rounds, None where it was not measured."""

    ratio: float
    batch: int
    threads: int
    milliseconds: float
    p90: float
    images_per_second: float
    speedup: float | None = None
    accuracy: float | None = None
    agreement: float | None = None
    isa: str = ""

    def __post_init__(self) -> None:
        finite = all(math.isfinite(v) and v > 0 for v in (self.milliseconds, self.p90, self.images_per_second))
        if not finite or self.batch < 1 or self.threads < 1 or not 0.0 <= self.ratio <= 1.0:
            raise DataError(f"a latency point is out of range: {self}")


@dataclass(frozen=True)
class LatencyReport:
    """title: of the model. machine: a line that belongs beside every figure. facts: further lines of the page."""

    title: str
    machine: str
    points: tuple[LatencyPoint, ...]
    facts: dict[str, str] = field(default_factory=dict)
    created: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", tuple(self.points))
        if not self.points:
            raise DataError("a latency report needs at least one measured setting")

    def lines(self) -> dict[str, list[LatencyPoint]]:
        """{name of the line: points by rising ratio}; names say only what differs between the lines."""
        isas = {p.isa for p in self.points}
        threads = {p.threads for p in self.points}
        found: dict[str, list[LatencyPoint]] = {}
        for point in self.points:
            name = f"batch {point.batch}"
            if len(threads) > 1:
                name += f", {point.threads} thread{'' if point.threads == 1 else 's'}"
            if len(isas) > 1:
                name += f", {point.isa or 'own choice'}"
            found.setdefault(name, []).append(point)
        return {name: sorted(points, key=lambda p: p.ratio) for name, points in found.items()}

    @property
    def quality(self) -> str:
        """ "accuracy" or "agreement", whichever every point has; "" if neither."""
        for name in ("accuracy", "agreement"):
            if all(getattr(p, name) is not None for p in self.points):
                return name
        return ""


def latency_chart(data: LatencyReport) -> Chart:
    """Accuracy against latency, one line per batch size; without a quality latency over the ratio."""
    told = "; ".join(
        f"{name}, {ratio_name(p.ratio)}: {p.milliseconds:.3f} ms"
        + (f", {percent(getattr(p, data.quality), 2)}" if data.quality else "")
        for name, points in data.lines().items()
        for p in points
    )
    remark = f"{shorten(data.title, 40)}  ·  {shorten(data.machine, 90)}"
    title = "Accuracy against latency" if data.quality else "Latency"
    return Chart(title, told, lambda figure: _draw(figure, data), (5.4, 3.8), remark)


def _draw(figure: FigureBase, data: LatencyReport) -> None:
    axes = figure.add_subplot()
    quality, lines = data.quality, data.lines()
    times = time_axis([p.milliseconds for p in data.points])
    name = "Latency of one batch, ms (median)"
    if quality:
        fit(axes, times, linear_axis([100 * getattr(p, quality) for p in data.points], 0.15))
        axes.set_xlabel(name)
        axes.set_title("Accuracy, %" if quality == "accuracy" else "Same top answer as the 8-bit model, %")
    else:
        fit(axes, Axis(-4.0, 104.0, tuple(sorted({100 * p.ratio for p in data.points}))), times)
        axes.set_xlabel("Ratio: eligible multiplies at low precision, %")
        axes.set_title(name)
    axes.grid(True)
    handles = []
    for k, (name, points) in enumerate(lines.items()):
        style: dict[str, Any] = {
            "color": LINES[k % len(LINES)],
            "marker": MARKERS[k % len(MARKERS)],
            "markersize": 5.5,
            "linewidth": 1.8,
        }
        places = [_xy(p, quality) for p in points]
        axes.plot(*zip(*places, strict=True), clip_on=False, zorder=3, **style)
        handles.append(line(name, **style))
        for point, place in zip(points, places, strict=True):
            axes.annotate(
                ratio_name(point.ratio), place, (6, 5), textcoords="offset points", fontsize=SMALL, color=style["color"]
            )
    if len(lines) > 1:
        legend(figure, handles)


def _xy(point: LatencyPoint, quality: str) -> tuple[float, float]:
    """(ms, %) with a quality, else (ratio in %, ms)."""
    if quality:
        return point.milliseconds, 100 * getattr(point, quality)
    return 100 * point.ratio, point.milliseconds


def point_cells(point: LatencyPoint) -> tuple[str, ...]:
    """A point as text: ratio, median, p90, throughput, speedup, accuracy."""
    return (
        ratio_name(point.ratio),
        f"{point.milliseconds:.3f}",
        f"{point.p90:.3f}",
        f"{point.images_per_second:.1f}",
        "–" if point.speedup is None else f"{point.speedup:.2f}",
        percent(point.accuracy, 2),
    )
