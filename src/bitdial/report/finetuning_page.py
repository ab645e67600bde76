"""A finetuning run as one self-contained HTML page and as one picture: curve before and after, loss, validation accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitdial.report.axis import spread
from bitdial.report.charts import curve_chart
from bitdial.report.document import Section, facts, figure, folded, note, page, tile, warning
from bitdial.report.drawing import SMALL, Chart, fit, grid
from bitdial.report.finetuning import FinetuningReport, axes, tile_rows
from bitdial.report.html_tables import header, plain_table, table
from bitdial.report.markup import Markup, element, percent, points, ratio_name, shorten
from bitdial.report.style import INK, LINES

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

Line = tuple[str, Sequence[tuple[float, float]]]  # name, (update, value)


def render_finetuning_html(report: FinetuningReport) -> str:
    """The page as HTML text (well-formed XML after the doctype); no request leaves it. Equal data give equal text."""
    charts = finetuning_charts(report)
    sections = [Section("Read with care", [warning(_ended(report))])] if report.stopped else []
    if "curve" in charts:
        told = f"Accuracy at each setting of the dial, on {report.measured}."
        drawn = figure(charts["curve"], "chart-curve")
        sections.append(Section("Before and after", [drawn, _change_table(report)], told))
    sections.append(Section("Training", _training(report, charts)))
    how = [element("h3", {}, "Time"), facts(report.times)]
    how += [element("h3", {}, "Data"), facts(report.data)] if report.data else []
    how += [element("h3", {}, "Settings"), facts(report.settings)]
    sections.append(Section("How it was trained", how))
    tiles = [tile(*row, "own" if k == 0 else "") for k, row in enumerate(tile_rows(report))]
    return page(f"{report.title}, finetuned", "bitdial", sections, lead=(report.machine, report.created), tiles=tiles)


def _ended(report: FinetuningReport) -> str:
    return f"Training ended early: {report.stopped}. The state after update {report.best:,} was kept."


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


def _training(report: FinetuningReport, charts: dict[str, Chart]) -> list[Markup | None]:
    parts: list[Markup | None] = []
    if "loss" in charts:
        parts.append(figure(charts["loss"], "chart-loss", "Mean loss of a pass over the last updates"))
    if "validation" in charts:
        caption = f"One line per ratio. The state after update {report.best:,} was kept (dashed)"
        parts.append(figure(charts["validation"], "chart-validation", caption))
        rows = [
            (f"{at[0][0]:,.0f}", *(percent(value, 2) for _, value in at)) for at in zip(*report.accuracies, strict=True)
        ]
        names = ["Update", *map(ratio_name, report.ratios)]
        parts.append(folded("Values", plain_table(names, rows, "Accuracy on the validation images per ratio")))
    else:
        parts.append(note("No validation images were held out: the last state was kept."))
    return parts


def finetuning_chart(report: FinetuningReport) -> Chart:
    """The charts of the page as one picture."""
    told = f"{report.title}, finetuned" + (f"  ·  {report.machine}" if report.machine else "")
    charts = list(finetuning_charts(report).values())
    return grid("Finetuning", charts, 3, shorten(told, 60 * len(charts)), titled=False)


def finetuning_charts(report: FinetuningReport) -> dict[str, Chart]:
    """{"curve", "loss", "validation": chart} of what there is."""
    charts = {}
    series = report.curve()
    if series is not None:
        charts["curve"] = curve_chart(series, "finetuned")
    if report.losses:
        charts["loss"] = _lines_chart(report, "Loss", [("loss", report.losses)])
    if report.accuracies:
        lines: list[Line] = [
            (ratio_name(ratio), [(update, 100 * value) for update, value in line])
            for ratio, line in zip(report.ratios, report.accuracies, strict=True)
        ]
        charts["validation"] = _lines_chart(report, "Validation accuracy, %", lines)
    return charts


def _lines_chart(report: FinetuningReport, name: str, lines: Sequence[Line]) -> Chart:
    """Lines over the epochs, names at the right border; with several the update whose state was kept."""
    told = "; ".join(f"{told}: {line[0][1]:.4g} to {line[-1][1]:.4g}" for told, line in lines)

    def draw(figure: FigureBase) -> None:
        drawn = figure.add_subplot()
        along, up = axes([p for _, line in lines for p in line], report.updates, report.per_epoch)
        fit(drawn, along, up)
        drawn.set_xlabel("Epochs")
        drawn.set_title(name)
        drawn.grid(axis="y")
        for k, (_, line) in enumerate(lines):
            drawn.plot(
                [u / report.per_epoch for u, _ in line], [v for _, v in line], color=LINES[k % len(LINES)],
                linewidth=1.7 + len(lines) - 1 - k,  # where lines coincide, those below show at the edges
                marker="o" if len(line) <= 40 else "", markersize=3.5, clip_on=False,
            )  # fmt: skip
        if len(lines) > 1:
            drawn.axvline(report.best / report.per_epoch, color=INK, linewidth=1.0, linestyle=(0, (6, 3)))
            ends = [line[-1][1] for _, line in lines]
            places = spread([up.place(value) for value in ends], 0.07, 0.0, 1.0)
            for k, ((told, _), value, place) in enumerate(zip(lines, ends, places, strict=True)):
                drawn.annotate(
                    f"{told}  {value:.2f}", (1.03, place), xycoords="axes fraction", va="center", fontsize=SMALL,
                    color=LINES[k % len(LINES)], annotation_clip=False,
                )  # fmt: skip

    return Chart(f"{name.removesuffix(', %')} over the epochs", told, draw)
