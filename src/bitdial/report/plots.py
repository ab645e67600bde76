"""The report's plots as PNG images, drawn by matplotlib from the same series as the page.

matplotlib is imported when a plot is drawn, and drawn on directly: no window system, no global state, and the settings
of the user's matplotlibrc do not change the result.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bitdial.errors import ConfigError
from bitdial.report.data import ReportData, SearchGeneration
from bitdial.report.markup import ratio_name, shorten
from bitdial.report.series import (
    CurveSeries,
    RangeBar,
    bar_segments,
    curve_series,
    group_patterns,
    low_levels,
    mapped_layers,
    range_bars,
    search_traces,
    spread,
)
from bitdial.report.style import (
    HIGH_LIGHT,
    INK_LIGHT,
    MAIN_LIGHT,
    MUTED_LIGHT,
    PALE_LIGHT,
    RAMP_LIGHT,
    RULE_LIGHT,
    SERIES_LIGHT,
    ramp,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 144
DASHES: tuple[tuple[float, tuple[float, ...]], ...] = (
    (0, (5, 3)),
    (0, (1.5, 2.5)),
    (0, (6, 2, 2, 2)),
    (0, (3, 1.5)),
)
MARKERS = ("s", "D", "^", "P")
MAX_RANGE_PANELS = 12
MAX_MAP_INCHES = 40.0  # height of the map's rows; a network with very many layers gets thinner rows
COLUMNS = 4

# Names come from models and may hold "$": nothing in them is mathematics.
SETTINGS = {
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK_LIGHT,
    "axes.labelcolor": MUTED_LIGHT,
    "axes.edgecolor": MUTED_LIGHT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED_LIGHT,
    "ytick.color": MUTED_LIGHT,
    "grid.color": RULE_LIGHT,
}


def check_plotting() -> None:
    """Raise ConfigError, naming the remedy, if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError("PNG plots need matplotlib: pip install 'bitdial[report]'") from error


def render_plots(data: ReportData) -> dict[str, bytes]:
    """{file name: PNG image} of every plot the data have something for.

    accuracy.png   accuracy over the ratio with the baselines (agreement.png where no accuracy was measured)
    groups.png     which groups of which layer are low from which ratio on
    ranges.png     value ranges of the layers that leave most high bits unused, at most MAX_RANGE_PANELS
    search.png     fitness over the generations of the search

    Equal data give equal images with the same matplotlib. Raises ConfigError where matplotlib is missing.
    """
    check_plotting()
    import matplotlib.style

    plots: dict[str, bytes] = {}
    with matplotlib.style.context(["default", SETTINGS]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the font lacks a letter of some name
        series = curve_series(data, "accuracy") or curve_series(data, "agreement")
        if series is not None:
            plots[f"{series.metric}.png"] = _image(_curve(series))
        if mapped_layers(data):
            plots["groups.png"] = _image(_group_map(data))
        ranges = _most_unused(data)
        if ranges:
            plots["ranges.png"] = _image(_ranges(ranges))
        if data.search.history:
            plots["search.png"] = _image(_search(data))
    return plots


def _figure(width: float, height: float) -> Figure:
    """An empty figure; width and height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def render_figure(draw: Callable[[], Figure], kind: str = "png") -> bytes:
    """What `draw` draws, as "png" or "svg". Equal figures give equal bytes with the same matplotlib. Raises ConfigError for any
    other kind, or where matplotlib is missing."""
    if kind not in ("png", "svg"):
        raise ConfigError(f"plot format '{kind}' is neither png nor svg")
    check_plotting()
    import matplotlib.style

    # Text stays text in the SVG, and its identifiers do not change from run to run.
    settings = {**SETTINGS, "svg.fonttype": "none", "svg.hashsalt": "bitdial"}
    with matplotlib.style.context(["default", settings]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = draw()
        stream = io.BytesIO()
        metadata: dict[str, Any] = {"Software": None} if kind == "png" else {"Date": None, "Creator": "bitdial"}
        figure.savefig(stream, format=kind, dpi=DPI, facecolor="white", metadata=metadata)
    return stream.getvalue()


def _image(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return stream.getvalue()


def _curve(series: CurveSeries) -> Figure:
    """The model's curve, baselines with a ratio as curves and without one as levels; names at the right border."""
    figure = _figure(7.2, 4.0)
    axes = figure.add_subplot()
    name = "Accuracy, %" if series.metric == "accuracy" else "Same top answer as the 8-bit model, %"
    axes.set(xlim=(-0.02, 1.02), ylim=(series.low, series.high), yticks=series.ticks, ylabel=name)
    axes.set_xlabel("Ratio: eligible multiplies at low precision, %")
    ratios = [r for r, _ in series.own]
    ticks = ratios if len(ratios) <= 9 else [0.0, 0.25, 0.5, 0.75, 1.0]
    axes.set_xticks(ticks, [f"{100 * r:.4g}" for r in ticks])
    axes.grid(axis="y")

    ends: list[tuple[float, str, str]] = []  # value, name, colour of the labels at the right border
    for k, (label, value) in enumerate(series.levels):
        colour = INK_LIGHT if k == 0 else SERIES_LIGHT[(k + 1) % 4]
        if value >= series.low:
            axes.plot((0.0, 1.0), (value, value), color=colour, linestyle=DASHES[k % 4], linewidth=1.2)
        ends.append((value, label, colour))
    for k, (label, points) in enumerate(series.curves):
        colour = SERIES_LIGHT[k % 4]
        dashes = DASHES[(k + 1) % 4]
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=dashes, marker=MARKERS[k % 4], markersize=5)
        for ratio, value in points:
            if value < series.low:  # off the plot: a triangle at the bottom edge, with the value
                axes.plot((ratio,), (series.low,), color=colour, marker="v", markersize=6, clip_on=False)
                axes.annotate(
                    f"{value:.1f}", (ratio, series.low), (0, 6), textcoords="offset points", ha="center", color=colour
                )
        ends.append((points[-1][1], label, colour))
    axes.plot(*zip(*series.own, strict=True), color=MAIN_LIGHT, linewidth=2.2, marker="o", markersize=5.5, zorder=3)
    ends.append((series.own[-1][1], "bitdial", MAIN_LIGHT))

    span = series.high - series.low
    places = spread([(max(value, series.low) - series.low) / span for value, _, _ in ends], 0.055, 0.0, 1.0)
    for (value, label, colour), place in zip(ends, places, strict=True):
        below = " ↓" if value < series.low else ""
        axes.annotate(
            f"{shorten(label, 24)}  {value:.2f}{below}",
            (1.02, place),
            xycoords="axes fraction",
            va="center",
            color=colour,
            weight="bold" if colour == MAIN_LIGHT else "normal",
            annotation_clip=False,
        )
    return figure


def map_colours(data: ReportData) -> dict[float, str]:
    """{ratio: colour of the groups that are low from it on}, in ascending order of ratio."""
    levels = low_levels(data)
    return dict(zip(levels, ramp(RAMP_LIGHT, len(levels)), strict=True))


def _group_map(data: ReportData) -> Figure:
    """One row per layer, one cell per group as wide as its channels, coloured by the ratio from which it is low."""
    from matplotlib.patches import Patch

    layers = mapped_layers(data)
    colours = map_colours(data)
    row = min(0.24, MAX_MAP_INCHES / len(layers))
    figure = _figure(8.0, 0.9 + row * max(len(layers), 2))
    axes = figure.add_subplot()
    never = False
    for k, layer in enumerate(layers):
        cells: dict[str, list[tuple[float, float]]] = {}
        position = 0.0
        for pattern, weight in zip(group_patterns(layer), layer.group_weights(), strict=True):
            colour = colours[data.ratios[pattern.index("1")]] if "1" in pattern else HIGH_LIGHT
            never = never or "1" not in pattern
            cells.setdefault(colour, []).append((position, weight))
            position += weight
        gap = 0.8 if layer.n_groups <= 64 else 0.0
        for colour, spans in cells.items():
            axes.broken_barh(spans, (k - 0.4, 0.8), facecolors=colour, edgecolors="white", linewidth=gap)
    step = math.ceil(0.12 / row)  # names need 0.12 inches each
    shown = range(0, len(layers), step)
    axes.set_yticks(list(shown), [shorten(layers[k].source or layers[k].name, 34) for k in shown])
    axes.set(xlim=(0.0, 1.0), ylim=(len(layers) - 0.5, -0.5), xticks=[])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    patches = [Patch(facecolor=colour, label=f"low from {ratio_name(ratio)}") for ratio, colour in colours.items()]
    patches += [Patch(facecolor=HIGH_LIGHT, label="never low")] if never else []
    figure.legend(handles=patches, loc="outside upper left", ncols=6, frameon=False, handlelength=1.2)
    return figure


RangePanel = tuple[str, int, tuple[RangeBar, ...]]  # name, magnitude bits, bars


def _most_unused(data: ReportData) -> list[RangePanel]:
    """Range bars of the layers whose channels leave most high bits unused, most first; none that uses all."""
    found: list[tuple[float, RangePanel]] = []
    for layer in data.layers:
        full = 7 if layer.signed else 8
        bars = range_bars(layer) if layer.eligible else ()
        unused = sum(bar.width * max(0.0, full - bar.used) for bar in bars)
        if unused > 0:
            found.append((unused, (shorten(layer.source or layer.name, 24), full, bars)))
    found.sort(key=lambda item: -item[0])
    return [panel for _, panel in found[:MAX_RANGE_PANELS]]


def _grid(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """`count` panels in rows of up to COLUMNS, each `height` inches tall."""
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = _figure(max(4.0, 2.4 * columns), height * rows + 0.5)
    return figure, [figure.add_subplot(rows, columns, k + 1) for k in range(count)]


def _ranges(panels: Sequence[RangePanel]) -> Figure:
    """After FlexiQ's figure 1 (Kim, Um, Kim, Park, Seo, EuroSys 2026): bits each channel uses and what is kept."""
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    styles: dict[str, dict[str, Any]] = {
        "unused": {"facecolor": "white", "edgecolor": "#aab4c0", "hatch": "////", "linewidth": 0.0},
        "kept": {"facecolor": MAIN_LIGHT, "linewidth": 0.0},
        "dropped": {"facecolor": PALE_LIGHT, "linewidth": 0.0},
        "clipped": {"facecolor": SERIES_LIGHT[0], "linewidth": 0.0},
    }
    figure, all_axes = _grid(len(panels), 1.5)
    drawn = set()
    for axes, (name, full, bars) in zip(all_axes, panels, strict=True):
        boxes: dict[str, list[list[tuple[float, float]]]] = {kind: [] for kind in styles}
        position = 0.0
        for bar in bars:
            for kind, low, high in bar_segments(bar, float(full)):
                if high > low:
                    right = position + bar.width
                    boxes[kind].append([(position, low), (position, high), (right, high), (right, low)])
            position += bar.width
        for kind, corners in boxes.items():
            if corners:
                drawn.add(kind)
                # One collection per kind: an artist per channel would take seconds. Smoothing would show the seams.
                axes.add_collection(PolyCollection(corners, antialiaseds=False, **styles[kind]))
        axes.set(xlim=(0.0, 1.0), ylim=(0.0, full), xticks=[], yticks=[*range(0, full, 2), full])
        axes.set_title(name, fontsize=9, loc="left")
    names = {
        "unused": "unused by the whole group",
        "kept": "kept at low precision",
        "dropped": "dropped at low precision",
        "clipped": "clipped at low precision",
    }
    patches = [Patch(label=label, **styles[kind]) for kind, label in names.items() if kind in drawn]
    columns = 4 if len(panels) >= COLUMNS else 2 if len(panels) > 1 else 1
    figure.legend(handles=patches, loc="outside upper left", ncols=columns, frameon=False, handlelength=1.2)
    figure.supxlabel("feature channels, sorted by group and range", fontsize=9, color=MUTED_LIGHT)
    figure.supylabel("bits: log2(1 + largest magnitude)", fontsize=9, color=MUTED_LIGHT)
    return figure


def _search(data: ReportData) -> Figure:
    """Best and mean fitness over the generations, a panel per target; lines break where the images change."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    traces = search_traces(data)
    figure, all_axes = _grid(len(traces), 2.2)
    means = False
    for axes, trace in zip(all_axes, traces, strict=True):
        for k, part in enumerate(trace.parts):
            if k:
                border = (trace.parts[k - 1][-1].generation + part[0].generation) / 2
                axes.axvline(border, color=MUTED_LIGHT, linestyle=":", linewidth=0.8)
            means = _search_lines(axes, part) or means
        axes.set_title(f"Ratio {ratio_name(trace.target)}", fontsize=9, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if len({g.generation for g in trace.generations}) == 1:
            axes.set_xticks([trace.generations[0].generation])
        axes.grid(axis="y")
    handles = [Line2D([], [], color=MAIN_LIGHT, linewidth=2, label="best of the generation")]
    if means:
        handles.append(Line2D([], [], color=SERIES_LIGHT[0], linestyle="--", label="mean of the generation"))
    columns = 2 if len(traces) > 1 else 1
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False)
    figure.supxlabel("generation", fontsize=9, color=MUTED_LIGHT)
    figure.supylabel("distance to the 8-bit model", fontsize=9, color=MUTED_LIGHT)
    return figure


def _search_lines(axes: Axes, part: Sequence[SearchGeneration]) -> bool:
    """Draw one part of a trace; says whether it has means."""
    generations = [g.generation for g in part]
    mark = "o" if len(part) == 1 else ""
    axes.plot(generations, [g.best for g in part], color=MAIN_LIGHT, linewidth=2, marker=mark, markersize=4)
    means = [(g.generation, g.mean) for g in part if g.mean is not None]
    if means:
        axes.plot(*zip(*means, strict=True), color=SERIES_LIGHT[0], linestyle="--", linewidth=1.2)
    return bool(means)
