"""The latency of a model as one self-contained HTML page: the picture as inline SVG, and the table."""

from __future__ import annotations

from pathlib import Path

from bitdial.files import write_atomically
from bitdial.report.curve_chart import label, line, svg
from bitdial.report.html_tables import cell, header, table
from bitdial.report.latency import (
    Axis,
    LatencyPoint,
    LatencyReport,
    linear_axis,
    point_cells,
    tick_name,
    time_axis,
)
from bitdial.report.markup import Markup, element, join, percent, ratio_name
from bitdial.report.style import style_sheet

WIDTH, HEIGHT = 760.0, 420.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 740.0, 30.0, 365.0
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def page_head(title: str, style: str = "") -> Markup:
    """The head of a page without scripts that loads nothing. style: rules of its own beside the common ones."""
    return element(
        "head",
        {},
        element("meta", {"charset": "utf-8"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("link", {"rel": "icon", "href": "data:,"}),
        element("title", {}, title),
        element("style", {}, Markup(style_sheet(1) + style)),
    )


def render_latency_html(data: LatencyReport) -> str:
    """The page as HTML text (well-formed XML after the doctype); no request leaves it. Equal data give equal text."""
    subtitle = " · ".join(part for part in (data.machine, data.created) if part)
    head = page_head(f"{data.title} – latency")
    facts = [item for name, value in data.facts.items() for item in (element("dt", {}, name), element("dd", {}, value))]
    heading = "Accuracy against latency" if data.quality == "accuracy" else "Latency"
    body = element(
        "body",
        {},
        element("header", {}, element("h1", {}, data.title), element("p", {"class": "lead"}, subtitle)),
        element(
            "main",
            {},
            element(
                "section", {}, element("h2", {}, heading), _legend(data), element("figure", {}, latency_chart(data))
            ),
            element("section", {}, element("h2", {}, "Figures"), latency_table(data)),
            element("section", {}, element("h2", {}, "How it was measured"), element("dl", {"class": "facts"}, *facts))
            if facts
            else None,
        ),
        element("footer", {}, "Written by bitdial. This file is complete in itself: it loads nothing from the network."),
    )
    return f"<!DOCTYPE html>\n{element('html', {'lang': 'en'}, head, body)}\n"


def _colour(k: int) -> str:
    return ("var(--main)", *(f"var(--s{i})" for i in range(4)))[k % 5]


def _legend(data: LatencyReport) -> Markup | None:
    lines = data.lines()
    if len(lines) < 2:
        return None
    items = []
    for k, name in enumerate(lines):
        box = element("rect", {"width": 18, "height": 14, "rx": 2, "style": f"fill:{_colour(k)}"})
        items.append(element("li", {}, element("svg", {"viewBox": "0 0 18 14", "aria-hidden": "true"}, box), name))
    return element("ul", {"class": "legend"}, join(items))


def latency_chart(data: LatencyReport) -> Markup:
    """Inline SVG of the same picture as `render_latency_plot`."""
    quality = data.quality
    times = time_axis([p.milliseconds for p in data.points])
    if quality:
        across, up = times, linear_axis([100 * getattr(p, quality) for p in data.points], 0.15)
        names = ("Latency of one batch, ms", "Accuracy, %" if quality == "accuracy" else "Agreement with 8-bit, %")
    else:
        across, up = Axis(-4.0, 104.0, tuple(sorted({100 * p.ratio for p in data.points}))), times
        names = ("Ratio, %", "Latency of one batch, ms")

    def place(point: LatencyPoint) -> tuple[float, float]:
        value = (
            (point.milliseconds, 100 * getattr(point, quality)) if quality else (100 * point.ratio, point.milliseconds)
        )
        return LEFT + (RIGHT - LEFT) * across.place(value[0]), BOTTOM - (BOTTOM - TOP) * up.place(value[1])

    parts: list[Markup] = []
    for tick in up.ticks:
        y = BOTTOM - (BOTTOM - TOP) * up.place(tick)
        parts += [line(LEFT, y, RIGHT, y, "grid"), label(LEFT - 8, y + 4, tick_name(tick), "end", "tick")]
    for tick in across.ticks:
        x = LEFT + (RIGHT - LEFT) * across.place(tick)
        parts += [line(x, TOP, x, BOTTOM, "grid"), label(x, BOTTOM + 18, tick_name(tick), "middle", "tick")]
    parts += [line(LEFT, BOTTOM, RIGHT, BOTTOM, "axis"), line(LEFT, TOP, LEFT, BOTTOM, "axis")]
    parts += [label(0, 14, names[1], css="tick"), label((LEFT + RIGHT) / 2, HEIGHT - 12, names[0], "middle", "tick")]
    told = []
    for k, (name, points) in enumerate(data.lines().items()):
        places = [place(p) for p in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(element("polyline", {"points": path, "style": f"fill:none;stroke:{_colour(k)};stroke-width:2"}))
        for point, (x, y) in zip(points, places, strict=True):
            shown = f"{name}, {ratio_name(point.ratio)}: {point.milliseconds:.3f} ms"
            if quality:
                shown += f", {percent(getattr(point, quality), 2)}"
            hint = element("title", {}, shown)
            parts.append(element("circle", {"cx": x, "cy": y, "r": 4.5, "style": f"fill:{_colour(k)}"}, hint))
            parts.append(label(x + 7, y - 7, ratio_name(point.ratio), css="halo", style=f"fill:{_colour(k)}"))
            told.append(shown)
    return svg(
        "chart-latency", WIDTH, HEIGHT, "Accuracy against latency" if quality else "Latency", "; ".join(told), *parts
    )


def latency_table(data: LatencyReport) -> Markup:
    """Every point with its figures."""
    rows = []
    for name, points in data.lines().items():
        for point in points:
            ratio, *figures = point_cells(point)
            numbers = (
                point.milliseconds,
                point.p90,
                point.images_per_second,
                point.speedup or 0.0,
                point.accuracy or 0.0,
            )
            cells = [cell(text, value) for text, value in zip(figures, numbers, strict=True)]
            rows.append(element("tr", {}, element("th", {"scope": "row"}, name), cell(ratio, point.ratio), *cells))
    names = ["Setting", "Ratio", "Median, ms", "90th percentile, ms", "Images/s", "Speedup", "Accuracy"]
    caption = "Speedup: time of the smallest ratio over this one's, round by round"
    return table(header(names, [False] + [True] * 6), rows, caption, sortable=False)


def write_latency_html(data: LatencyReport, path: Path) -> None:
    """Write the page, whole or not at all. Raises OutputError."""
    write_atomically(path, render_latency_html(data).encode())
