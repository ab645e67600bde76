"""A finetuning run as PNG or SVG, by matplotlib: curve before and after, loss, validation accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bitdial.files import write_atomically
from bitdial.report.finetuning import FinetuningReport, axes
from bitdial.report.latency import COLOURS, FORMATS, check_plot_path, tick_name
from bitdial.report.markup import ratio_name, shorten
from bitdial.report.series import CurveSeries
from bitdial.report.style import INK_LIGHT, MAIN_LIGHT, MUTED_LIGHT, RULE_LIGHT, SERIES_LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def render_finetuning_plot(report: FinetuningReport, kind: str = "png") -> bytes:
    """The picture as "png" or "svg"; equal data give equal bytes with the same matplotlib. Raises ConfigError where it is
    missing."""
    from bitdial.report.plots import render_figure

    return render_figure(lambda: _figure(report), kind)


def write_finetuning_plot(report: FinetuningReport, path: Path) -> None:
    """Write the picture (by the path's ending), whole or not at all. Raises ConfigError, OutputError."""
    check_plot_path(path)
    write_atomically(path, render_finetuning_plot(report, FORMATS[path.suffix.lower()]))


def _figure(report: FinetuningReport) -> Figure:
    from bitdial.report.plots import _figure as empty_figure

    series = report.curve()
    panels = [series is not None, bool(report.losses), bool(report.accuracies)]
    count = max(1, sum(panels))
    figure = empty_figure(3.9 * count, 3.2)
    told = f"{report.title}, finetuned" + (f"  ·  {report.machine}" if report.machine else "")
    figure.suptitle(shorten(told, 50 * count), fontsize=8.5, color=MUTED_LIGHT, x=0.01, ha="left")
    place = 0
    if series is not None:
        place += 1
        _draw_curve(figure.add_subplot(1, count, place), series)
    if report.losses:
        place += 1
        drawn = figure.add_subplot(1, count, place)
        _draw_lines(drawn, report, "Loss", [("", report.losses)])
    if report.accuracies:
        place += 1
        lines = [
            (ratio_name(r), tuple((u, 100 * v) for u, v in line))
            for r, line in zip(report.ratios, report.accuracies, strict=True)
        ]
        drawn = figure.add_subplot(1, count, place)
        _draw_lines(drawn, report, "Validation accuracy, %", lines)
        drawn.axvline(report.best / report.per_epoch, color=INK_LIGHT, linewidth=1.0, linestyle=(0, (6, 3)))
    return figure


def _draw_curve(axes_: Axes, series: CurveSeries) -> None:
    axes_.set(ylim=(series.low, series.high), yticks=series.ticks, xlabel="Ratio, %")
    axes_.set_title("Accuracy, %", fontsize=8.5, color=MUTED_LIGHT, loc="left")
    axes_.grid(axis="y", color=RULE_LIGHT)
    ratios = [100 * r for r, _ in series.own]
    ticks = ratios if len(ratios) <= 9 else [0.0, 25.0, 50.0, 75.0, 100.0]
    axes_.set_xticks(ticks, [f"{t:.4g}" for t in ticks])
    for name, value in series.levels:
        axes_.axhline(value, color=INK_LIGHT, linewidth=1.2, linestyle=(0, (5, 3)), label=f"{name} {value:.2f}")
    for name, points in series.curves:
        axes_.plot(
            [100 * r for r, _ in points], [v for _, v in points], color=SERIES_LIGHT[0], linestyle=(0, (1.5, 2.5)),
            marker="s", markersize=4.5, label=f"{name} {points[-1][1]:.2f}",
        )  # fmt: skip
    own = [v for _, v in series.own]
    axes_.plot(ratios, own, color=MAIN_LIGHT, linewidth=2.2, marker="o", markersize=5, label=f"finetuned {own[-1]:.2f}")
    axes_.legend(frameon=False, fontsize=7.5, loc="best")


def _draw_lines(
    axes_: Axes, report: FinetuningReport, name: str, lines: list[tuple[str, tuple[tuple[float, float], ...]]]
) -> None:
    along, up = axes([p for _, line in lines for p in line], report.updates, report.per_epoch)
    axes_.set(xlim=(along.low, along.high), ylim=(up.low, up.high), xlabel="Epochs")
    axes_.set_xticks(along.ticks, [tick_name(t) for t in along.ticks])
    axes_.set_yticks(up.ticks, [tick_name(t) for t in up.ticks])
    axes_.set_title(name, fontsize=8.5, color=MUTED_LIGHT, loc="left")
    axes_.grid(axis="y", color=RULE_LIGHT)
    for k, (told, line) in enumerate(lines):
        xs, ys = [u / report.per_epoch for u, _ in line], [v for _, v in line]
        mark = "o" if len(line) <= 40 else ""
        width = 1.7 + 1.0 * (len(lines) - 1 - k)  # where lines coincide, those below show at the edges
        colour = COLOURS[k % len(COLOURS)]
        axes_.plot(xs, ys, color=colour, linewidth=width, marker=mark, markersize=3, label=told or None)
    if len(lines) > 1:
        axes_.legend(frameon=False, fontsize=7.5, loc="best", ncols=2)
