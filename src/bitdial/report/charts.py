"""The charts of a model's report: curve, what was executed, unused bits, value ranges, search, and the map of groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bitdial.report.axis import spread
from bitdial.report.data import LayerInfo, ReportData, SearchGeneration
from bitdial.report.drawing import DASHES, MARKERS, SMALL, Chart, grid, legend, patch, save
from bitdial.report.markup import percent, ratio_name, shorten
from bitdial.report.series import (
    CurveSeries,
    SearchTrace,
    Shares,
    bar_segments,
    curve_series,
    executed_shares,
    group_patterns,
    low_levels,
    mapped_layers,
    range_bars,
    ranged_layers,
    search_traces,
    unused_bits,
)
from bitdial.report.style import EIGHT, FIXED, HIGH, INK, MAIN, MUTED, PALE, PAPER, RAMP_LIGHT, SERIES, ramp

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

COLUMNS = 4
MAX_RANGE_PANELS = 12  # of the picture; a page has them all
MAX_MAP_INCHES = 36.0  # height of the map's rows; a network with very many layers gets thinner rows
METRICS = {"accuracy": "Accuracy", "agreement": "Agreement with the 8-bit model"}
RATIO = "Ratio: eligible multiplies at low precision, %"

# What the colours mean, for legends of pages and pictures alike.
EXECUTED_KEY = (
    (MAIN, "low precision"),
    (EIGHT, "8-bit, may run low at another ratio"),
    (FIXED, "always 8-bit"),
    (SERIES[0], "float"),
)
UNUSED_KEY = ((MAIN, "activations, per group"), (FIXED, "weights, per row and group"))
RANGE_KEY = {
    "unused": (HIGH, "unused by the whole group"),
    "kept": (MAIN, "kept at low precision"),
    "dropped": (PALE, "dropped at low precision"),
    "clipped": (SERIES[0], "clipped at low precision"),
}
SEARCH_KEY = ((MAIN, "best of the generation"), (SERIES[0], "mean of the generation (dashed)"))


def report_charts(data: ReportData) -> dict[str, Chart]:
    """{name: chart} of everything the data have something for; panels of one kind are one chart.

    accuracy, agreement  over the ratio, with the baselines
    executed             multiplies by precision at each ratio
    groups               which groups of which layer are low from which ratio on
    unused               how many high bits the groups leave unused
    ranges               value ranges of the layers that leave most high bits unused, at most MAX_RANGE_PANELS
    search               fitness over the generations of the search
    """
    charts: dict[str, Chart] = {}
    for series in (curve_series(data, "accuracy"), curve_series(data, "agreement")):
        if series is not None:
            charts[series.metric] = curve_chart(series)
    rows = executed_shares(data)
    if rows:
        charts["executed"] = executed_chart(rows)
    if mapped_layers(data):
        charts["groups"] = group_chart(data)
    activations, weights = unused_bits(data, "activations"), unused_bits(data, "weights")
    if activations or weights:
        charts["unused"] = unused_chart(activations, weights)
    panels = sorted(((_unused(layer), layer) for layer in ranged_layers(data)), key=lambda item: -item[0])
    ranges = [layer for unused, layer in panels[:MAX_RANGE_PANELS] if unused > 0]
    if ranges:
        charts["ranges"] = grid(
            "Bits used per channel", [range_chart(x) for x in ranges], COLUMNS, key=range_key(ranges)
        )
    traces = search_traces(data)
    if traces:
        charts["search"] = grid(
            "Fitness of the search", [search_chart(t) for t in traces], COLUMNS, key=search_key(traces)
        )
    return charts


def render_plots(data: ReportData) -> dict[str, bytes]:
    """{file name: PNG image} of `report_charts`. Raises ConfigError where matplotlib is missing."""
    return {f"{name}.png": save(chart) for name, chart in report_charts(data).items()}


# ---------------------------------------------------------------------------------------------- the curve


def curve_chart(series: CurveSeries, own: str = "bitdial") -> Chart:
    """The model's curve, baselines with a ratio as curves and without one as levels; names at the right border.

    The y axis covers what differs; baseline points below it are marked at the bottom edge.
    """
    title = f"{METRICS[series.metric]} over the ratio"
    told = [f"{own}: {_told(series.own)}"]
    told += [f"{shorten(name, 40)}: {value:.2f} %" for name, value in series.levels]
    told += [f"{shorten(name, 40)}: {_told(points)}" for name, points in series.curves]
    return Chart(title, "; ".join(told), lambda figure: _draw_curve(figure.add_subplot(), series, own))


def _told(points: Sequence[tuple[float, float]]) -> str:
    return ", ".join(f"{value:.2f} % at {ratio_name(ratio)}" for ratio, value in points)


def _draw_curve(axes: Axes, series: CurveSeries, own: str) -> None:
    axes.set(xlim=(-0.02, 1.02), ylim=(series.low, series.high), yticks=series.ticks, xlabel=RATIO)
    axes.set_title("Accuracy, %" if series.metric == "accuracy" else "Same top answer as the 8-bit model, %")
    ratios = [r for r, _ in series.own]
    ticks = ratios if len(ratios) <= 9 else [0.0, 0.25, 0.5, 0.75, 1.0]
    axes.set_xticks(ticks, [f"{100 * r:.4g}" for r in ticks])
    axes.grid(axis="y")
    ends: list[tuple[float, str, str]] = []  # value, name, colour of the labels at the right border
    for k, (label, value) in enumerate(series.levels):
        colour = INK if k == 0 else SERIES[(k + 1) % 4]
        if value >= series.low:
            axes.plot((0.0, 1.0), (value, value), color=colour, linestyle=DASHES[k % 4], linewidth=1.2)
        ends.append((value, label, colour))
    for k, (label, points) in enumerate(series.curves):
        colour = SERIES[k % 4]
        style: dict[str, Any] = {"linestyle": DASHES[(k + 1) % 4], "marker": MARKERS[1 + k % 5]}
        axes.plot(*zip(*points, strict=True), color=colour, markersize=5, **style)
        for ratio, value in points:
            if value < series.low:  # off the plot: a triangle at the bottom edge, with the value
                axes.plot((ratio,), (series.low,), color=colour, marker="v", markersize=6, clip_on=False)
                _beside(axes, f"{value:.1f}", (ratio, series.low), 7, color=colour, ha="center")
        ends.append((points[-1][1], label, colour))
    axes.plot(*zip(*series.own, strict=True), color=MAIN, linewidth=2.2, marker="o", markersize=5.5, zorder=3)
    # Values stand on the side of a point that its line leaves free; the last one's is the label at the border.
    values = [v for _, v in series.own]
    span = series.high - series.low
    for k, (ratio, value) in enumerate(series.own[:-1] if len(series.own) <= 9 else ()):
        above = value >= max(values[max(k - 1, 0)], values[k + 1]) and value < series.high - 0.08 * span
        own_style: dict[str, Any] = {"color": MAIN, "weight": "bold", "zorder": 4, "ha": "center" if k else "left"}
        _beside(axes, f"{value:.2f}", (ratio, value), 6 if above else -15, **own_style)
    ends.append((values[-1], own, MAIN))

    places = spread([(max(value, series.low) - series.low) / span for value, _, _ in ends], 0.065, 0.0, 1.0)
    for (value, label, colour), place in zip(ends, places, strict=True):
        below = " ↓" if value < series.low else ""
        axes.annotate(
            f"{shorten(label, 20)} {value:.2f}{below}", (1.02, place), xycoords="axes fraction", va="center",
            fontsize=SMALL, color=colour, weight="bold" if colour == MAIN else "normal", annotation_clip=False,
        )  # fmt: skip


def _beside(axes: Axes, text: str, place: tuple[float, float], above: float, **style: Any) -> None:
    """A short text above a point, or with a negative distance in points below it; lines under it show through faintly."""
    style["bbox"] = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.6, "alpha": 0.75}
    axes.annotate(text, place, (0, above), textcoords="offset points", fontsize=SMALL, **style)


# ---------------------------------------------------------------------------------------------- shares


def executed_chart(rows: Sequence[Shares]) -> Chart:
    """One stacked bar per ratio: multiplies at low precision, at 8 bits by choice, always at 8 bits, in float."""
    parts = [(row.low, row.eligible_high, row.fixed_high, row.in_float) for row in rows]
    told = "; ".join(
        f"ratio {ratio_name(r.ratio)}: {percent(r.low)} low precision, {percent(r.eligible_high + r.fixed_high)} 8-bit, "
        f"{percent(r.in_float)} float"
        for r in rows
    )

    def draw(figure: FigureBase) -> None:
        axes = figure.add_subplot()
        lefts = [0.0] * len(rows)
        for k, (colour, _) in enumerate(EXECUTED_KEY):
            axes.barh(range(len(rows)), [p[k] for p in parts], 0.76, lefts, color=colour)
            lefts = [left + p[k] for left, p in zip(lefts, parts, strict=True)]
        for y, row in enumerate(rows):
            if row.low > 0:
                inside = row.low > 0.14
                axes.annotate(
                    percent(row.low), (0.0 if inside else row.low, y), (5, 0), textcoords="offset points", va="center",
                    fontsize=SMALL, weight="bold", color=PAPER if inside else INK,
                )  # fmt: skip
        axes.set_yticks(range(len(rows)), [ratio_name(row.ratio) for row in rows])
        axes.set(xlim=(0.0, 1.0), ylim=(len(rows) - 0.5, -0.5), xticks=[])
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        there = (True, True, any(r.fixed_high for r in rows), any(r.in_float for r in rows))
        legend(figure, [patch(*entry) for entry, shown in zip(EXECUTED_KEY, there, strict=True) if shown], 2)

    return Chart("Multiply-accumulates by precision", told, draw, (5.2, 0.6 + 0.24 * len(rows)))


def unused_chart(activations: Mapping[int, float], weights: Mapping[int, float]) -> Chart:
    """Two bars per number of unused high bits: activation groups and weight blocks."""
    counts = range(max([*activations, *weights]) + 1)
    told = "; ".join(
        f"{bits} unused: activations {percent(activations.get(bits, 0.0))}, weights {percent(weights.get(bits, 0.0))}"
        for bits in counts
    )

    def draw(figure: FigureBase) -> None:
        axes = figure.add_subplot()
        for shares, shift, (colour, _) in ((activations, -0.2, UNUSED_KEY[0]), (weights, 0.2, UNUSED_KEY[1])):
            axes.bar([b + shift for b in counts], [100 * shares.get(b, 0.0) for b in counts], 0.37, color=colour)
        axes.set(xlabel="Unused high bits", xticks=list(counts), ylim=(0, None))
        axes.set_title("Share, weighted by multiplies, %")
        axes.grid(axis="y")
        shown = zip(UNUSED_KEY, (activations, weights), strict=True)
        legend(figure, [patch(*entry) for entry, shares in shown if shares])

    return Chart("Unused high bits of groups", told, draw, (5.2, 2.7))


# ---------------------------------------------------------------------------------------------- panels


def range_chart(layer: LayerInfo) -> Chart:
    """After FlexiQ's figure 1 (Kim, Um, Kim, Park, Seo, EuroSys 2026, arXiv 2510.02822): bits each channel uses and what
    low precision keeps of them. Many groups of feature channels leave the high bits of the 8-bit range unused."""
    full = 7 if layer.signed else 8
    bars = range_bars(layer)
    channels = len(layer.channel_ranges)
    told = f"{channels} channels in {layer.n_groups} groups; on average {_unused(layer):.1f} of {full} bits are unused."

    def draw(figure: FigureBase) -> None:
        axes = figure.add_subplot()
        edges = [0.0]
        for bar in bars:
            edges.append(edges[-1] + bar.width)
        segments = [bar_segments(bar, float(full)) for bar in bars]
        for k, kind in enumerate(segment[0] for segment in segments[0]):
            lows, highs = [s[k][1] for s in segments], [max(s[k][1], s[k][2]) for s in segments]
            if (
                lows != highs
            ):  # one shape per kind: an artist per channel would take seconds. Smoothing would show seams
                axes.fill_between(
                    edges, [*lows, lows[-1]], [*highs, highs[-1]], step="post", color=RANGE_KEY[kind][0], linewidth=0,
                    antialiased=False,
                )  # fmt: skip
        axes.set(xlim=(0.0, edges[-1]), ylim=(0, full), xticks=[], yticks=[*range(0, full, 2), full])
        axes.set_xlabel(f"{channels} channels by group and range", fontsize=SMALL)

    return Chart(shorten(layer.source or layer.name, 24), told, draw, (2.7, 1.6))


def _unused(layer: LayerInfo) -> float:
    """High bits that no channel of the group uses, averaged over the channels."""
    full = 7 if layer.signed else 8
    return sum(bar.width * max(0.0, full - bar.used) for bar in range_bars(layer))


def range_key(layers: Sequence[LayerInfo]) -> list[tuple[str, str]]:
    """What of RANGE_KEY is there."""
    clips = any(bar.height > bar.top for layer in layers for bar in range_bars(layer))
    return [entry for kind, entry in RANGE_KEY.items() if kind != "clipped" or clips]


def search_chart(trace: SearchTrace) -> Chart:
    """Best and mean fitness over the generations of one target. Lines break where the number of images changes, because
    the fitness is another quantity from there on."""
    first, last = trace.generations[0], trace.generations[-1]
    told = f"best fitness {first.best:.4g} at generation {first.generation}, {last.best:.4g} at generation {last.generation}"

    def draw(figure: FigureBase) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot()
        for k, part in enumerate(trace.parts):
            if k:
                border = (trace.parts[k - 1][-1].generation + part[0].generation) / 2
                axes.axvline(border, color=MUTED, linestyle=":", linewidth=0.8)
            _draw_search(axes, part)
            if part[0].n_images:
                axes.annotate(
                    f"{part[0].n_images} images", (part[0].generation, 1.0), xycoords=("data", "axes fraction"),
                    va="bottom", fontsize=7, color=MUTED,
                )  # fmt: skip
        if first.generation == last.generation:
            axes.set_xticks([first.generation])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("generation", fontsize=SMALL)
        axes.grid(axis="y")

    return Chart(f"Ratio {ratio_name(trace.target)}", told, draw, (2.7, 1.9))


def _draw_search(axes: Axes, part: Sequence[SearchGeneration]) -> None:
    generations = [g.generation for g in part]
    ends = [0, len(part) - 1]
    axes.plot(generations, [g.best for g in part], color=MAIN, linewidth=2, marker="o", markersize=3.5, markevery=ends)
    means = [(g.generation, g.mean) for g in part if g.mean is not None]
    if means:
        axes.plot(*zip(*means, strict=True), color=SERIES[0], linestyle="--", linewidth=1.2)


def search_key(traces: Sequence[SearchTrace]) -> list[tuple[str, str]]:
    """What of SEARCH_KEY is there."""
    return list(SEARCH_KEY if any(g.mean is not None for t in traces for g in t.generations) else SEARCH_KEY[:1])


# ---------------------------------------------------------------------------------------------- the map


def map_colours(data: ReportData) -> dict[float, str]:
    """{ratio: colour of the groups that are low from it on}, in ascending order of ratio."""
    levels = low_levels(data)
    return dict(zip(levels, ramp(RAMP_LIGHT, len(levels)), strict=True))


def group_chart(data: ReportData) -> Chart:
    """One row per layer, one cell per group as wide as its channels, coloured by the ratio from which it is low. For files
    only: in a page the map is a table that follows the slider."""
    layers = mapped_layers(data)
    colours = map_colours(data)
    row = min(0.24, MAX_MAP_INCHES / len(layers))

    def draw(figure: FigureBase) -> None:
        axes = figure.add_subplot()
        never = False
        for k, layer in enumerate(layers):
            cells: dict[str, list[tuple[float, float]]] = {}
            position = 0.0
            for pattern, weight in zip(group_patterns(layer), layer.group_weights(), strict=True):
                colour = colours[data.ratios[pattern.index("1")]] if "1" in pattern else HIGH
                never = never or "1" not in pattern
                cells.setdefault(colour, []).append((position, weight))
                position += weight
            gap = 0.8 if layer.n_groups <= 64 else 0.0
            for colour, spans in cells.items():
                axes.broken_barh(spans, (k - 0.4, 0.8), facecolors=colour, edgecolors=PAPER, linewidth=gap)
        step = math.ceil(0.12 / row)  # names need 0.12 inches each
        shown = range(0, len(layers), step)
        axes.set_yticks(list(shown), [shorten(layers[k].source or layers[k].name, 34) for k in shown])
        axes.set(xlim=(0.0, 1.0), ylim=(len(layers) - 0.5, -0.5), xticks=[])
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        key = [(colour, f"low from {ratio_name(ratio)}") for ratio, colour in colours.items()]
        key += [(HIGH, "never low")] if never else []
        legend(figure, [patch(*entry) for entry in key])

    told = f"{len(layers)} layers, low from {', '.join(map(ratio_name, colours)) or 'no ratio'}"
    return Chart("Which groups are low from which ratio on", told, draw, (6.4, 0.9 + row * max(len(layers), 2)))
