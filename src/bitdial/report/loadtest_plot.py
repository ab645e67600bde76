"""A load test over time as PNG or SVG, by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdial.files import write_atomically
from bitdial.report.latency import COLOURS, FORMATS, check_plot_path, tick_name
from bitdial.report.loadtest import LoadReport, Panel, panels, pieces, time_ticks
from bitdial.report.markup import percent, shorten
from bitdial.report.style import INK_LIGHT, MUTED_LIGHT, RULE_LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEUTRAL, WARNING = "#9aa5b1", "#b3261e"
AREA = "#e3e7ec"


def render_load_plot(report: LoadReport, kind: str = "png") -> bytes:
    """The picture as "png" or "svg"; equal data give equal bytes with the same matplotlib. Raises ConfigError where it is
    missing."""
    from bitdial.report.plots import render_figure

    return render_figure(lambda: _figure(report), kind)


def write_load_plot(report: LoadReport, path: Path) -> None:
    """Write the picture (by the path's ending), whole or not at all. Raises ConfigError, OutputError."""
    check_plot_path(path, "--png")
    write_atomically(path, render_load_plot(report, FORMATS[path.suffix.lower()]))


def _figure(report: LoadReport) -> Figure:
    from bitdial.report.plots import _figure as empty_figure

    shown = panels(report)
    heights = [1.25 if p.key == "latency" else 1.0 if p.key == "load" else 0.75 for p in shown]
    figure = empty_figure(8.4, 1.65 * sum(heights) + 0.7)
    grid = figure.add_gridspec(len(shown), 1, height_ratios=heights)
    ticks, unit, name = time_ticks(report.seconds)
    several = len(report.runs) > 1
    for k, panel in enumerate(shown):
        axes = figure.add_subplot(grid[k, 0])
        _draw(axes, panel, several)
        axes.set_xlim(0.0, report.seconds)
        axes.set_xticks(ticks, [tick_name(t / unit) for t in ticks] if k == len(shown) - 1 else [""] * len(ticks))
    axes.set_xlabel(f"Time, {name} (windows of {report.width:g} s)")
    if several:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=COLOURS[k % len(COLOURS)], linewidth=2.2) for k in range(len(report.runs))]
        figure.legend(
            handles, [_run_label(run.name, run.summary) for run in report.runs], loc="outside upper left",
            ncols=1, frameon=False, handlelength=1.8,
        )  # fmt: skip
    else:
        figure.suptitle(
            f"{shorten(report.title, 60)}  ·  {_run_label('', report.runs[0].summary)}",
            fontsize=8.5, color=MUTED_LIGHT, x=0.01, ha="left",
        )  # fmt: skip
    return figure


def _run_label(name: str, summary: dict[str, Any]) -> str:
    parts = [shorten(name, 40)] if name else []
    if summary["attainment"] is not None:
        parts.append(f"{percent(summary['attainment'])} within {summary['slo_ms']:g} ms")
    if summary["latency_ms"]["p99"] is not None:
        parts.append(f"p99 {summary['latency_ms']['p99']:.3g} ms")
    if summary["expected_accuracy"] is not None:
        parts.append(f"accuracy {percent(summary['expected_accuracy'], 2)}")
    return ", ".join(parts)


def _draw(axes: Axes, panel: Panel, several: bool) -> None:
    from matplotlib.ticker import NullLocator

    if panel.axis.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(panel.axis.low, panel.axis.high)
    axes.set_yticks(panel.axis.ticks, [tick_name(t) for t in panel.axis.ticks])
    axes.grid(True, axis="y", color=RULE_LIGHT)
    axes.set_title(
        panel.title + (f"  ({panel.note})" if panel.note else ""), fontsize=8.5, color=MUTED_LIGHT, loc="left"
    )
    for line in panel.lines:
        colour = _colour(line.colour)
        drawn = False
        for piece in pieces(line):
            xs, ys = [x for x, _ in piece], [y for _, y in piece]
            label = None if drawn else line.name
            if line.style == "area":
                axes.fill_between(xs, ys, color=AREA, linewidth=0, label=label)
                axes.plot(xs, ys, color=NEUTRAL, linewidth=0.9)
            else:
                dash = (0, (3, 1.6)) if line.style == "dashed" else "solid"
                mark = "." if len(piece) == 1 else ""
                width = 1.2 if line.style == "dashed" else 1.7
                axes.plot(xs, ys, color=colour, linestyle=dash, linewidth=width, marker=mark, label=label)
            drawn = True
    if panel.level is not None:
        name, value = panel.level
        axes.axhline(value, color=INK_LIGHT, linewidth=1.0, linestyle=(0, (6, 3)))
        above = panel.axis.place(value) < 0.88  # at the top the name would lie over the legend
        axes.annotate(
            name, (1.0, value), (0, 3 if above else -10), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", fontsize=8, color=INK_LIGHT,
        )  # fmt: skip
    if several and panel.key in ("latency", "accuracy"):
        words = (
            "solid: 99th percentile, dashed: median" if panel.key == "latency" else "solid: expected, dashed: measured"
        )
        axes.set_title(words, fontsize=7.5, color=MUTED_LIGHT, loc="right")
    elif not several and len(panel.lines) > 1:
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1.0, 0.98),
            ncols=3,
            frameon=False,
            fontsize=7.5,
            handlelength=1.6,
            borderpad=0,
        )


def _colour(index: int) -> str:
    return NEUTRAL if index == -1 else WARNING if index == -2 else COLOURS[index % len(COLOURS)]
