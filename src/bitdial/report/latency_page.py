"""The latency of a model as one self-contained HTML page: the chart and the table."""

from __future__ import annotations

from bitdial.report.document import Section, facts, figure, page
from bitdial.report.html_tables import cell, header, table
from bitdial.report.latency import LatencyReport, latency_chart, point_cells
from bitdial.report.markup import Markup, element


def render_latency_html(data: LatencyReport) -> str:
    """The page as HTML text (well-formed XML after the doctype); no request leaves it. Equal data give equal text."""
    heading = "Accuracy against latency" if data.quality == "accuracy" else "Latency"
    drawn = figure(latency_chart(data), "chart-latency")
    sections = [Section(heading, [drawn])] if drawn else []
    sections.append(Section("Figures", [latency_table(data)]))
    if data.facts:
        sections.append(Section("How it was measured", [facts(data.facts)]))
    return page(data.title, "latency", sections, lead=(data.machine, data.created))


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
