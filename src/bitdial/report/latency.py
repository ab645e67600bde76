"""Accuracy against latency: the picture, its page, and the plain data of both.

One point per ratio, one line per batch size (and number of threads). Without a measured accuracy the line shows
agreement with the 8-bit model; without either, latency over the ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdial.errors import ConfigError, DataError
from bitdial.files import write_atomically
from bitdial.report.markup import percent, ratio_name, shorten
from bitdial.report.style import MAIN_LIGHT, MUTED_LIGHT, SERIES_LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = {".png": "png", ".svg": "svg"}
COLOURS = (MAIN_LIGHT, *SERIES_LIGHT)
MARKERS = ("o", "s", "D", "^", "P", "v")


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


@dataclass(frozen=True)
class Axis:
    """A range with ticks. logarithmic: equal factors are equal distances, so that a speedup looks alike everywhere."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """0..1 along the axis."""
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return (at - low) / (high - low)


def linear_axis(values: Sequence[float], margin: float = 0.08) -> Axis:
    """Around all values, ticks at multiples of 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    span = high - low
    if span <= 1e-9 * max(abs(low), abs(high), 1e-9):  # all alike
        span = 0.1 * max(abs(high), 1e-9)
    low, high = low - margin * span, high + margin * span
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    around = range(math.floor(low / step), math.ceil(high / step) + 1)
    # Written and read back: 3 * 0.1 is a tick at 0.3.
    ticks = tuple(t for t in (float(f"{k * step:.12g}") for k in around) if low <= t <= high)
    return Axis(low, high, ticks)


def time_axis(values: Sequence[float]) -> Axis:
    """Linear where the values lie within a factor of 4, logarithmic otherwise; from positive values."""
    low, high = min(values), max(values)
    if high <= 4 * low:
        return linear_axis(values)
    margin = (high / low) ** 0.06
    low, high = low / margin, high * margin
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = tuple(
            step * 10.0**power
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for step in steps
            if low <= step * 10.0**power <= high
        )
        if len(ticks) <= 9:
            break
    return Axis(low, high, ticks, logarithmic=True)


def tick_name(value: float) -> str:
    """A number without needless digits."""
    return f"{value:.6g}"


def check_plot_path(path: Path, option: str = "--plot") -> None:
    """Raise ConfigError for another ending than .png or .svg, or where matplotlib is missing."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{option}: {path.name} ends neither in .png nor in .svg; give a name that does")
    from bitdial.report.plots import check_plotting

    check_plotting()


def render_latency_plot(data: LatencyReport, kind: str = "png") -> bytes:
    """The picture as "png" or "svg". Equal data give equal bytes with the same matplotlib. Raises ConfigError where it is
    missing."""
    from bitdial.report.plots import render_figure

    return render_figure(lambda: _figure(data), kind)


def _figure(data: LatencyReport) -> Figure:
    from bitdial.report.plots import _figure as empty_figure

    figure = empty_figure(7.2, 4.4)
    axes = figure.add_subplot()
    times = [p.milliseconds for p in data.points]
    across = time_axis(times)
    lines = data.lines()
    quality = data.quality
    if quality:
        up = linear_axis([100 * getattr(p, quality) for p in data.points], 0.15)
        axes.set_xlabel("Latency of one batch, ms (median)")
        axes.set_ylabel("Accuracy, %" if quality == "accuracy" else "Same top answer as the 8-bit model, %")
        x_axis, y_axis = across, up
    else:
        ratios = sorted({100 * p.ratio for p in data.points})
        x_axis, y_axis = Axis(-4.0, 104.0, tuple(ratios)), across
        axes.set_xlabel("Ratio: eligible multiplies at low precision, %")
        axes.set_ylabel("Latency of one batch, ms (median)")
    for setting, axis in ((axes.xaxis, x_axis), (axes.yaxis, y_axis)):
        if axis.logarithmic:
            (axes.set_xscale if setting is axes.xaxis else axes.set_yscale)("log")
            setting.set_minor_locator(_no_ticks())
    axes.set(xlim=(x_axis.low, x_axis.high), ylim=(y_axis.low, y_axis.high))
    axes.set_xticks(x_axis.ticks, [tick_name(t) for t in x_axis.ticks])
    axes.set_yticks(y_axis.ticks, [tick_name(t) for t in y_axis.ticks])
    axes.grid(True)
    for k, (name, points) in enumerate(lines.items()):
        colour = COLOURS[k % len(COLOURS)]
        places = [_xy(p, quality) for p in points]
        axes.plot(
            [x for x, _ in places], [y for _, y in places], color=colour, marker=MARKERS[k % len(MARKERS)],
            markersize=5.5, linewidth=1.8, label=name, clip_on=False, zorder=3,
        )  # fmt: skip
        for point, place in zip(points, places, strict=True):
            axes.annotate(
                ratio_name(point.ratio), place, (5, 5), textcoords="offset points", fontsize=7.5, color=colour
            )
    if len(lines) > 1:
        figure.legend(loc="outside upper left", ncols=4, frameon=False, handlelength=2.0)
    axes.set_title(
        f"{shorten(data.title, 40)}  ·  {shorten(data.machine, 90)}", fontsize=7.5, color=MUTED_LIGHT, loc="left"
    )
    return figure


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


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


def write_latency_plot(data: LatencyReport, path: Path) -> None:
    """Write the picture (by the path's ending), whole or not at all. Raises ConfigError, OutputError."""
    check_plot_path(path)
    write_atomically(path, render_latency_plot(data, FORMATS[path.suffix.lower()]))
