"""A finetuning run as one self-contained HTML page: curve before and after, loss, validation accuracy, settings, times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bitdial.files import write_atomically
from bitdial.report.curve_chart import curve_chart, label, line, svg
from bitdial.report.finetuning import FinetuningReport, axes, tile_rows
from bitdial.report.html_tables import header, table
from bitdial.report.latency import tick_name
from bitdial.report.latency_page import page_head
from bitdial.report.markup import Markup, element, join, percent, points, ratio_name
from bitdial.report.series import spread

WIDTH, HEIGHT = 720.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 600.0, 30.0, 252.0
_STYLE = """
.best{stroke:var(--ink);stroke-width:1.2;stroke-dasharray:7 4}
.facts+h3{margin-top:1.2rem}
"""


def render_finetuning_html(report: FinetuningReport) -> str:
    """The page as HTML text (well-formed XML after the doctype); no request leaves it. Equal data give equal text."""
    lead = " · ".join(part for part in (report.machine, report.created) if part)
    series = report.curve()
    tiles = [_tile(*row, own=k == 0) for k, row in enumerate(tile_rows(report))]
    sections: list[Markup | None] = [
        _section("Read with care", element("p", {"class": "warn"}, _ended(report))) if report.stopped else None,
        _section(
            "Before and after",
            element("p", {"class": "lead"}, f"Accuracy at each setting of the dial, on {report.measured}."),
            element("figure", {}, curve_chart(series)),
            _change_table(report),
        )
        if series is not None
        else None,
        _section("Training", *_training(report)),
        _section(
            "How it was trained",
            element("h3", {}, "Time"),
            _facts(report.times),
            *((element("h3", {}, "Data"), _facts(report.data)) if report.data else ()),
            element("h3", {}, "Settings"),
            _facts(report.settings),
        ),
    ]
    title = f"{report.title}, finetuned"
    body = element(
        "body",
        {},
        element(
            "header", {}, element("h1", {}, title), element("p", {"class": "lead"}, lead),
            element("dl", {"class": "tiles"}, *tiles),
        ),
        element("main", {}, join(sections)),
        element("footer", {}, "Written by bitdial. This file is complete in itself: it loads nothing from the network."),
    )  # fmt: skip
    return f"<!DOCTYPE html>\n{element('html', {'lang': 'en'}, page_head(f'{title} – bitdial', _STYLE), body)}\n"


def write_finetuning_html(report: FinetuningReport, path: Path) -> None:
    """Write the page, whole or not at all. Raises OutputError."""
    write_atomically(path, render_finetuning_html(report).encode())


def _section(heading: str, *content: Markup | None) -> Markup:
    return element("section", {}, element("h2", {}, heading), *content)


def _tile(name: str, value: str, remark: str, own: bool) -> Markup:
    return element(
        "div",
        {"class": "tile own" if own else "tile"},
        element("dt", {}, name),
        element("dd", {"class": "value"}, value),
        element("dd", {"class": "sub"}, remark),
    )


def _ended(report: FinetuningReport) -> str:
    return f"Training ended early: {report.stopped}. The state after update {report.best:,} was kept."


def _facts(content: Mapping[str, str]) -> Markup:
    items = [part for k, v in content.items() for part in (element("dt", {}, k), element("dd", {}, v or "–"))]
    return element("dl", {"class": "facts"}, *items)


def _change_table(report: FinetuningReport) -> Markup:
    errors = any(change.error is not None for change in report.changes)
    names = ["Setting", "Before", "After", "Difference", *(["Std. error of it"] if errors else [])]
    rows = []
    for change in report.changes:
        cells = [percent(change.before, 2), percent(change.after, 2), points(change.difference)]
        if errors:
            cells.append("–" if change.error is None else f"{100 * change.error:.2f}")
        told = [element("td", {"class": "num"}, text) for text in cells]
        rows.append(element("tr", {}, element("th", {"scope": "row"}, f"ratio {ratio_name(change.ratio)}"), *told))
    before, after = report.mean("before"), report.mean("after")
    if before is not None and after is not None:
        cells = [percent(before, 2), percent(after, 2), points(after - before), *(["–"] if errors else [])]
        told = [element("td", {"class": "num"}, text) for text in cells]
        rows.append(element("tr", {"class": "mark"}, element("th", {"scope": "row"}, "mean of the ratios"), *told))
    caption = "Differences are in points"
    if errors:
        caption += ", image by image on the same images, which is why their standard error is small"
    return table(header(names, [False] + [True] * (len(names) - 1)), rows, caption, sortable=False)


def _training(report: FinetuningReport) -> list[Markup | None]:
    parts: list[Markup | None] = []
    if report.losses:
        chart = training_chart(report, "loss", "Loss", [("loss", report.losses)])
        caption = "Mean loss of a pass over the last updates"
        parts.append(element("figure", {}, chart, element("figcaption", {}, caption)))
    if report.accuracies:
        lines = [
            (ratio_name(ratio), tuple((update, 100 * value) for update, value in points_of_ratio))
            for ratio, points_of_ratio in zip(report.ratios, report.accuracies, strict=True)
        ]
        chart = training_chart(report, "validation", "Accuracy on the validation images, %", lines)
        caption = f"One line per ratio. The state after update {report.best:,} was kept (dashed)"
        parts.append(element("figure", {}, chart, element("figcaption", {}, caption)))
    else:
        parts.append(element("p", {"class": "note"}, "No validation images were held out: the last state was kept."))
    return parts


def training_chart(
    report: FinetuningReport, key: str, name: str, lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]
) -> Markup:
    """Lines over the epochs as inline SVG, names at the right border."""
    along, up = axes(
        [point for _, points_of_line in lines for point in points_of_line], report.updates, report.per_epoch
    )

    def x(update: float) -> float:
        return LEFT + (RIGHT - LEFT) * along.place(update / report.per_epoch)

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * up.place(value)

    parts: list[Markup] = []
    for tick in up.ticks:
        parts += [line(LEFT, y(tick), RIGHT, y(tick), "grid")]
        parts += [label(LEFT - 8, y(tick) + 4, tick_name(tick), "end", "tick")]
    for tick in along.ticks:
        at = x(tick * report.per_epoch)
        parts += [line(at, BOTTOM, at, BOTTOM + 5, "axis"), label(at, BOTTOM + 19, tick_name(tick), "middle", "tick")]
    parts += [line(LEFT, BOTTOM, RIGHT, BOTTOM, "axis"), label(0, 14, name, css="tick")]
    parts.append(label((LEFT + RIGHT) / 2, BOTTOM + 38, "Epochs", "middle", "tick"))
    if key == "validation":
        parts.append(line(x(report.best), TOP, x(report.best), BOTTOM, "best"))
    for k, (told, drawn) in enumerate(lines):
        places = [(x(update), y(value)) for update, value in drawn]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        width = 2 + 1.2 * (len(lines) - 1 - k)  # where lines coincide, those below show at the edges
        style = f"fill:none;stroke:{colour(k)};stroke-width:{width:.1f};stroke-linejoin:round"
        parts.append(element("polyline", {"points": path, "style": style}))
        for (a, b), (update, value) in zip(places, drawn, strict=True) if len(drawn) <= 40 else ():
            hint = element("title", {}, f"{told}, update {update:,.0f}: {value:.4g}")
            parts.append(element("circle", {"cx": a, "cy": b, "r": 3.2, "style": f"fill:{colour(k)}"}, hint))
    if len(lines) > 1:
        ends = spread([y(drawn[-1][1]) for _, drawn in lines], 16, TOP, BOTTOM)
        for k, ((told, drawn), place) in enumerate(zip(lines, ends, strict=True)):
            text = f"{told}  {drawn[-1][1]:.2f}"
            parts.append(label(RIGHT + 14, place + 4, text, style=f"fill:{colour(k)}"))
    told_all = "; ".join(f"{told}: {drawn[0][1]:.4g} to {drawn[-1][1]:.4g}" for told, drawn in lines)
    return svg(f"chart-{key}", WIDTH, HEIGHT, f"{name} over the epochs", told_all, *parts)


def colour(k: int) -> str:
    """Colour of a line: the main one, then the four of the other series, again and again."""
    return ("var(--main)", *(f"var(--s{i})" for i in range(4)))[k % 5]
