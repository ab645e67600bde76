"""Load tests as one self-contained HTML page: what was held, the chart over time, all figures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from bitdial.report.axis import Axis, tick_name
from bitdial.report.document import Section, facts, figure, folded, page, tile, warning
from bitdial.report.drawing import Chart, fit, legend, line
from bitdial.report.html_tables import header, plain_table, table
from bitdial.report.loadtest import Line, LoadReport, Panel, Run, figure_rows, panels, pieces, run_facts, time_ticks
from bitdial.report.markup import Markup, element, percent, shorten
from bitdial.report.style import FAILED, FIXED, HIGH, INK, LINES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase


def render_load_html(report: LoadReport) -> str:
    """The page as HTML text (well-formed XML after the doctype); no request leaves it. Equal data give equal text."""
    several = len(report.runs) > 1
    sections = []
    if report.warnings:
        told = [f"{name}: {text}" if several else _capital(text) for name, text in report.warnings]
        sections.append(Section("Read with care", [warning(text) for text in told]))
    drawn = figure(load_chart(report), "chart-load", css="wide")
    sections += [
        Section("Over time", [drawn, folded("Values of each window", _window_table(report))], _explain(report)),
        Section("Figures", [_table(report)]),
        Section("How it was measured", [_facts(run, several) for run in report.runs]),
    ]
    lead = (_common(report, "arrivals"), report.runs[0].result.created)
    return page(report.title, "load test", sections, lead=lead, tiles=_tiles(report))


def _common(report: LoadReport, key: str) -> str:
    values = {str(run.result.settings.get(key, "")) for run in report.runs}
    return values.pop() if len(values) == 1 else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _explain(report: LoadReport) -> str:
    text = (
        f"Windows of {report.width:g} s. Latency is counted from the time at which a request was due, not from when it was sent, "
        "so that a stall shows in all requests that fell due meanwhile."
    )
    if len(report.runs) > 1:
        text += " Latency: solid lines are the 99th percentile, dashed ones the median. "
        text += "Accuracy: solid lines are expected, dashed ones measured."
    return text


def _tiles(report: LoadReport) -> list[Markup]:
    if len(report.runs) > 1:
        return [_run_tile(k, run) for k, run in enumerate(report.runs)]
    s = report.runs[0].summary
    times = s["latency_ms"]
    shown = [
        ("Answered within the SLO", percent(s["attainment"], 2), f"{s['slo_ms']:g} ms, of all requests")
        if s["attainment"] is not None
        else None,
        ("99th percentile", _milliseconds(times["p99"]), f"median {_milliseconds(times['p50'])}"),
        ("Load", f"{s['offered_rate']:.4g}/s", f"answered {s['achieved_rate']:.4g}/s, {s['requests']:,} requests"),
        ("Mean ratio", percent(s["mean_ratio"]), _changes(s["ratio_changes_per_minute"]))
        if s["mean_ratio"] is not None
        else None,
        ("Expected accuracy", percent(s["expected_accuracy"], 2), "request-weighted")
        if s["expected_accuracy"] is not None
        else None,
        ("Measured accuracy", percent(s["measured_accuracy"], 2), "on labelled samples")
        if s["measured_accuracy"] is not None
        else None,
    ]
    return [tile(*item, "own" if k == 0 else "") for k, item in enumerate(i for i in shown if i is not None)]


def _run_tile(k: int, run: Run) -> Markup:
    s = run.summary
    value = percent(s["attainment"], 2) if s["attainment"] is not None else _milliseconds(s["latency_ms"]["p99"])
    told = [f"within {s['slo_ms']:g} ms" if s["attainment"] is not None else "99th percentile"]
    if s["attainment"] is not None:
        told.append(f"p99 {_milliseconds(s['latency_ms']['p99'])}")
    if s["expected_accuracy"] is not None:
        told.append(f"accuracy {percent(s['expected_accuracy'], 2)}")
    return tile(run.name, value, ", ".join(told), colour=_colour(k))


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}\u00a0ms" if value < 1000 else f"{value / 1000:.3g}\u00a0s"


def _changes(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} changes a minute"


def _table(report: LoadReport) -> Markup:
    several = len(report.runs) > 1
    names = ["", *(run.name for run in report.runs)] if several else ["What", "Value"]
    rows = [
        element(
            "tr", {}, element("th", {"scope": "row"}, name), *(element("td", {"class": "num"}, text) for text in cells)
        )
        for name, cells in figure_rows(report)
    ]
    caption = "Latencies are those of answered requests; shares within the SLO are of all requests"
    return table(header(names, [False] + [True] * len(report.runs)), rows, caption, sortable=False)


def _facts(run: Run, several: bool) -> Markup:
    title = element("h3", {}, run.name) if several else None
    return element("div", {}, title, facts(run_facts(run)))


def _window_table(report: LoadReport) -> Markup:
    """What every line says in every window; a measured accuracy stands in the first of the windows that it is of."""
    lines = [(panel, drawn) for panel in panels(report) for drawn in panel.lines]
    edges = max((run.windows.edges for run in report.runs), key=len).tolist()
    rows = []
    for left, right in zip(edges, edges[1:], strict=False):
        cells = []
        for _, drawn in lines:
            at = int(np.searchsorted(drawn.edges, left, side="right")) - 1  # a line's windows may be wider
            known = at < len(drawn.values) and math.isfinite(drawn.values[at]) and drawn.edges[at] >= left
            cells.append(f"{drawn.values[at]:.4g}" if known else "–")
        rows.append((f"{left:g}–{right:g}", *cells))
    names = ["Seconds", *(f"{panel.key}: {drawn.name}" for panel, drawn in lines)]
    return plain_table(names, rows, "Times in ms, shares in %, the rest in requests/s")


def load_chart(report: LoadReport) -> Chart:
    """All panels over one time axis."""
    shown = panels(report)
    heights = [1.25 if p.key == "latency" else 1.0 if p.key == "load" else 0.75 for p in shown]
    several = len(report.runs) > 1
    remark = "" if several else f"{shorten(report.title, 60)}  ·  {_run_label('', report.runs[0].summary)}"
    told = "; ".join(f"{panel.title}: {_describe(panel)}" for panel in shown)
    size = (7.6, 1.5 * sum(heights) + 0.5 + 0.18 * len(report.runs) * several)

    def draw(figure: FigureBase) -> None:
        places = figure.add_gridspec(len(shown), 1, height_ratios=heights)
        ticks, unit, name = time_ticks(report.seconds)
        for k, panel in enumerate(shown):
            axes = figure.add_subplot(places[k, 0])
            fit(axes, Axis(0.0, report.seconds, ticks), panel.axis)
            axes.set_xticks(ticks, [tick_name(t / unit) for t in ticks] if k == len(shown) - 1 else [""] * len(ticks))
            _draw(axes, panel, several)
        axes.set_xlabel(f"Time, {name} (windows of {report.width:g} s)")
        if several:
            runs = enumerate(report.runs)
            legend(
                figure, [line(_run_label(run.name, run.summary), color=_colour(k), linewidth=2.2) for k, run in runs], 1
            )

    return Chart("Load, latency and the dial over time", told, draw, size, remark)


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
    axes.grid(axis="y")
    note = f"  ({panel.note})" if panel.note else ""
    axes.set_title(panel.title + note)
    for drawn in panel.lines:
        _draw_line(axes, drawn)
    if panel.level is not None:
        name, value = panel.level
        axes.axhline(value, color=INK, linewidth=1.0, linestyle=(0, (6, 3)))
        above = panel.axis.place(value) < 0.88  # at the top the name would lie over the legend
        axes.annotate(
            name, (1.0, value), (0, 3 if above else -10), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", fontsize=8, color=INK,
        )  # fmt: skip
    if several and panel.key in ("latency", "accuracy"):
        words = (
            "solid: 99th percentile, dashed: median" if panel.key == "latency" else "solid: expected, dashed: measured"
        )
        axes.set_title(words, fontsize=7.5, loc="right")
    elif not several and len(panel.lines) > 1:
        axes.legend(
            loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=3, fontsize=7.5, handlelength=1.6, borderpad=0
        )  # fmt: skip


def _draw_line(axes: Axes, drawn: Line) -> None:
    colour = _colour(drawn.colour)
    for k, piece in enumerate(pieces(drawn)):
        xs, ys = zip(*piece, strict=True)
        label = "_" if k else drawn.name  # one entry of the legend for all pieces
        if drawn.style == "area":
            axes.fill_between(xs, ys, color=HIGH, linewidth=0, label=label)
            axes.plot(xs, ys, color=colour, linewidth=0.9)
        else:
            dashed = drawn.style == "dashed"
            style: dict[str, Any] = {
                "linestyle": (0, (3, 1.6)) if dashed else "solid",
                "linewidth": 1.2 if dashed else 1.7,
            }
            axes.plot(xs, ys, color=colour, marker="." if len(piece) == 1 else "", label=label, **style)


def _colour(index: int) -> str:
    return FIXED if index == -1 else FAILED if index == -2 else LINES[index % len(LINES)]


def _describe(panel: Panel) -> str:
    told = []
    for drawn in panel.lines:
        known = [v for v in drawn.values.tolist() if math.isfinite(v)]
        if known:
            told.append(f"{drawn.name}: {min(known):.4g} to {max(known):.4g}, mean {sum(known) / len(known):.4g}")
    return "; ".join(told)
