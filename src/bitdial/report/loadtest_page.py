"""Load tests as one self-contained HTML page: what was held, the pictures over time as inline SVG, all figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bitdial.files import write_atomically
from bitdial.report.curve_chart import label, line, svg
from bitdial.report.html_tables import header, table
from bitdial.report.latency import tick_name
from bitdial.report.latency_page import page_head
from bitdial.report.loadtest import Line, LoadReport, Panel, Run, facts, figure_rows, panels, pieces, time_ticks
from bitdial.report.markup import Markup, element, join, percent

Place = Callable[[float], float]
WIDTH = 1000.0
LEFT, RIGHT, TOP = 52.0, 990.0, 30.0
_STYLE = """
.plots figure{margin:0 0 .35rem}
.area{fill:var(--high)}.hover{fill:transparent}.hover:hover{fill:var(--main);fill-opacity:.09}
.level{stroke:var(--ink);stroke-width:1.2;stroke-dasharray:7 4}
"""


def render_load_html(report: LoadReport) -> str:
    """The page as HTML text (well-formed XML after the doctype); no request leaves it. Equal data give equal text."""
    head = page_head(f"{report.title} – load test", _STYLE)
    several = len(report.runs) > 1
    lead = " · ".join(p for p in (_common(report, "arrivals"), report.runs[0].result.created) if p)
    shown = panels(report)
    figures = [element("figure", {}, panel_chart(report, panel, k == len(shown) - 1)) for k, panel in enumerate(shown)]
    warnings = [
        element("p", {"class": "warn"}, f"{name}: {text}" if several else _capital(text))
        for name, text in report.warnings
    ]
    body = element(
        "body",
        {},
        element("header", {}, element("h1", {}, report.title), element("p", {"class": "lead"}, lead), _tiles(report)),
        element(
            "main",
            {},
            element("section", {}, element("h2", {}, "Read with care"), *warnings) if warnings else None,
            element(
                "section",
                {"class": "plots"},
                element("h2", {}, "Over time"),
                element("p", {"class": "lead"}, _explain(report)),
                _run_legend(report) if several else None,
                *figures,
            ),
            element("section", {}, element("h2", {}, "Figures"), _table(report)),
            element(
                "section", {}, element("h2", {}, "How it was measured"), *(_facts(run, several) for run in report.runs)
            ),
        ),
        element("footer", {}, "Written by bitdial. This file is complete in itself: it loads nothing from the network."),
    )
    return f"<!DOCTYPE html>\n{element('html', {'lang': 'en'}, head, body)}\n"


def write_load_html(report: LoadReport, path: Path) -> None:
    """Write the page, whole or not at all. Raises OutputError."""
    write_atomically(path, render_load_html(report).encode())


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


def _colour(index: int) -> str:
    if index < 0:
        return "var(--fixed)" if index == -1 else "var(--bad)"
    return ("var(--main)", *(f"var(--s{i})" for i in range(4)))[index % 5]


def _tiles(report: LoadReport) -> Markup:
    if len(report.runs) > 1:
        tiles = [_run_tile(k, run) for k, run in enumerate(report.runs)]
    else:
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
            ("Measured accuracy", percent(s["measured_accuracy"], 2), "on labelled images")
            if s["measured_accuracy"] is not None
            else None,
        ]
        tiles = [_tile(*item, "own" if k == 0 else None) for k, item in enumerate(i for i in shown if i is not None)]
    return element("dl", {"class": "tiles"}, *tiles)


def _tile(name: str, value: str, sub: str, css: str | None = None, style: str | None = None) -> Markup:
    return element(
        "div",
        {"class": f"tile {css}" if css else "tile", "style": style},
        element("dt", {}, name),
        element("dd", {"class": "value"}, value),
        element("dd", {"class": "sub"}, sub),
    )


def _run_tile(k: int, run: Run) -> Markup:
    s = run.summary
    value = percent(s["attainment"], 2) if s["attainment"] is not None else _milliseconds(s["latency_ms"]["p99"])
    told = [f"within {s['slo_ms']:g} ms" if s["attainment"] is not None else "99th percentile"]
    if s["attainment"] is not None:
        told.append(f"p99 {_milliseconds(s['latency_ms']['p99'])}")
    if s["expected_accuracy"] is not None:
        told.append(f"accuracy {percent(s['expected_accuracy'], 2)}")
    return _tile(run.name, value, ", ".join(told), style=f"border-left-color:{_colour(k)}")


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}\u00a0ms" if value < 1000 else f"{value / 1000:.3g}\u00a0s"


def _changes(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} changes a minute"


def _run_legend(report: LoadReport) -> Markup:
    items = []
    for k, run in enumerate(report.runs):
        box = element("rect", {"width": 18, "height": 14, "rx": 2, "style": f"fill:{_colour(k)}"})
        items.append(element("li", {}, element("svg", {"viewBox": "0 0 18 14", "aria-hidden": "true"}, box), run.name))
    return element("ul", {"class": "legend"}, join(items))


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
    items = [i for name, value in facts(run).items() for i in (element("dt", {}, name), element("dd", {}, value))]
    title = element("h3", {}, run.name) if several else None
    return element("div", {}, title, element("dl", {"class": "facts"}, *items))


def panel_chart(report: LoadReport, panel: Panel, last: bool) -> Markup:
    """One picture as inline SVG; the last carries the names of the time axis."""
    height = {"latency": 250.0, "load": 205.0}.get(panel.key, 165.0)
    bottom = height - (42.0 if last else 10.0)
    seconds = report.seconds

    def x(time: float) -> float:
        return LEFT + (RIGHT - LEFT) * time / seconds

    def y(value: float) -> float:
        return bottom - (bottom - TOP) * min(max(panel.axis.place(max(value, 1e-9)), -0.02), 1.02)

    parts: list[Markup] = []
    for tick in panel.axis.ticks:
        parts += [
            line(LEFT, y(tick), RIGHT, y(tick), "grid"),
            label(LEFT - 8, y(tick) + 4, tick_name(tick), "end", "tick"),
        ]
    ticks, unit, name = time_ticks(seconds)
    for tick in ticks:
        parts.append(line(x(tick), bottom, x(tick), bottom + 4, "axis"))
        if last:
            parts.append(label(x(tick), bottom + 18, tick_name(tick / unit), "middle", "tick"))
    if last:
        parts.append(label((LEFT + RIGHT) / 2, height - 6, f"Time, {name}", "middle", "tick"))
    parts.append(line(LEFT, bottom, RIGHT, bottom, "axis"))
    parts.append(label(0, 14, panel.title, style="font-weight:600"))
    for drawn in panel.lines:
        parts += _line(drawn, x, y, bottom)
    if panel.level is not None:
        told, value = panel.level
        parts.append(line(LEFT, y(value), RIGHT, y(value), "level"))
        below = y(value) < TOP + 14  # at the top the name would lie over the legend
        parts.append(label(RIGHT - 4, y(value) + (15 if below else -5), told, "end", "halo"))
    if len(report.runs) == 1 and len(panel.lines) > 1:
        parts += _line_legend(panel)
    elif panel.note:
        parts.append(label(RIGHT, 14, panel.note, "end", "tick"))
    parts += _hover(report, panel, x, bottom)
    return svg(f"chart-{panel.key}", WIDTH, height, panel.title, _describe(panel), *parts)


def _line(drawn: Line, x: Place, y: Place, bottom: float) -> list[Markup]:
    parts = []
    colour = _colour(drawn.colour)
    dash = ";stroke-dasharray:5 3" if drawn.style == "dashed" else ""
    width = 1.0 if drawn.style == "area" else 1.5 if drawn.style == "dashed" else 2.0
    for piece in pieces(drawn):
        places = [(x(t), y(v)) for t, v in piece]
        if len(places) == 1:
            places = places * 2  # a round cap makes a dot of a line of no length
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
        if drawn.style == "area":
            closed = f"{path}L{places[-1][0]:.1f} {bottom:.1f}L{places[0][0]:.1f} {bottom:.1f}Z"
            parts.append(element("path", {"d": closed, "class": "area"}))
        stroke = f"fill:none;stroke:{colour};stroke-width:{width:g};stroke-linejoin:round;stroke-linecap:round{dash}"
        parts.append(element("path", {"d": path, "style": stroke}))
    return parts


def _line_legend(panel: Panel) -> list[Markup]:
    """Names of the lines, flush right above the picture."""
    parts: list[Markup] = []
    place = RIGHT
    for drawn in reversed(panel.lines):
        place -= 6.4 * len(drawn.name)
        parts.append(label(place, 14, drawn.name, css="tick"))
        dash = ";stroke-dasharray:5 3" if drawn.style == "dashed" else ""
        sample = f"stroke:{_colour(drawn.colour)};stroke-width:{6 if drawn.style == 'area' else 2.2}{dash}"
        parts.append(element("line", {"x1": place - 24, "x2": place - 6, "y1": 10, "y2": 10, "style": sample}))
        place -= 40
    return parts


def _hover(report: LoadReport, panel: Panel, x: Place, bottom: float) -> list[Markup]:
    """A box per window with its values as a tooltip."""
    edges = max((run.windows.edges for run in report.runs), key=len).tolist()
    parts = []
    for left, right in zip(edges, edges[1:], strict=False):
        told = []
        for drawn in panel.lines:
            at = int(np.searchsorted(drawn.edges, left, side="right")) - 1  # a line's windows may be wider
            if at < len(drawn.values) and math.isfinite(drawn.values[at]):
                told.append(f"{drawn.name}: {drawn.values[at]:.4g}")
        hint = element("title", {}, f"{left:g} to {right:g} s; " + ("; ".join(told) or "nothing"))
        box: dict[str, str | float | int | bool | None]
        box = {"x": x(left), "y": TOP, "width": x(right) - x(left), "height": bottom - TOP, "class": "hover"}
        parts.append(element("rect", box, hint))
    return parts


def _describe(panel: Panel) -> str:
    told = []
    for drawn in panel.lines:
        known = [v for v in drawn.values.tolist() if math.isfinite(v)]
        if known:
            told.append(f"{drawn.name}: {min(known):.4g} to {max(known):.4g}, mean {sum(known) / len(known):.4g}")
    return "; ".join(told)
