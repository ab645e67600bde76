"""The numbers behind the charts and tables of a report, free of any drawing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from bitdial.report.axis import nice_ticks
from bitdial.report.data import Baseline, LayerInfo, ReportData, SearchGeneration

Metric = Literal["accuracy", "agreement"]
Points = tuple[tuple[float, float], ...]

# A baseline that lies this far below the curve (in points, or in spans of the curve itself) leaves the plot at the
# bottom and is marked there: a collapsed baseline must not flatten the differences the plot is for.
REACH_POINTS = 5.0
REACH_SPANS = 5.0
MAX_BARS = 160  # columns of one range panel; more channels are binned by their largest value


@dataclass(frozen=True)
class CurveSeries:
    """One metric over the ratio, in percent: the model's own curve, baselines with and without a ratio, the y range."""

    metric: Metric
    own: Points
    curves: tuple[tuple[str, Points], ...]
    levels: tuple[tuple[str, float], ...]
    low: float
    high: float
    ticks: tuple[float, ...]


def curve_series(data: ReportData, metric: Metric) -> CurveSeries | None:
    """The series of a metric, or None if the curve has no value of it."""
    own = tuple((p.ratio, 100 * v) for p in data.curve if (v := getattr(p, metric)) is not None)
    if not own:
        return None
    levels: list[tuple[str, float]] = []
    curves: dict[str, list[tuple[float, float]]] = {}
    for baseline in data.baselines:
        value: float | None = getattr(baseline, metric)
        if value is None:
            continue
        if baseline.ratio is None:
            levels.append((baseline.label, 100 * value))
        else:
            curves.setdefault(baseline.label, []).append((baseline.ratio, 100 * value))
    own_values = [v for _, v in own]
    reach = max(REACH_POINTS, REACH_SPANS * (max(own_values) - min(own_values)))
    others = [v for _, v in levels] + [v for curve in curves.values() for _, v in curve]
    shown = own_values + [v for v in others if v >= min(own_values) - reach]
    margin = max(0.08 * (max(shown) - min(shown)), 0.25)
    low, high = max(0.0, min(shown) - margin), min(100.0, max(shown) + margin)
    ticks = nice_ticks(low, high, 6)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    ordered = tuple((label, tuple(sorted(points))) for label, points in curves.items())
    return CurveSeries(metric, own, ordered, tuple(levels), low, high, ticks)


def is_float_baseline(baseline: Baseline) -> bool:
    """A float model's result: no ratio, and a label that starts like "float32" or "fp32"."""
    return baseline.ratio is None and baseline.label.lower().startswith(("float", "fp"))


def reference_accuracy(data: ReportData) -> tuple[str, float] | None:
    """What losses are stated against: the float baseline, else the 8-bit setting of the curve."""
    for baseline in data.baselines:
        if is_float_baseline(baseline) and baseline.accuracy is not None:
            return baseline.label, baseline.accuracy
    for point in data.curve:
        if point.ratio == 0.0 and point.accuracy is not None:
            return "8-bit", point.accuracy
    return None


@dataclass(frozen=True)
class Shares:
    """Shares of all multiply-accumulates at one ratio; they add up to 1."""

    ratio: float
    low: float
    eligible_high: float
    fixed_high: float
    in_float: float


def executed_shares(data: ReportData) -> tuple[Shares, ...]:
    """What runs at which precision per ratio, counted from the layers' own group maps (not from the curve's claims)."""
    total = sum(layer.macs for layer in data.layers)
    if not total:
        return ()
    floating = sum(layer.macs for layer in data.layers if layer.float_reason)
    eligible = sum(layer.macs for layer in data.layers if layer.eligible and not layer.float_reason)
    rows = []
    for i, ratio in enumerate(data.ratios):
        low = sum(layer.macs * layer.low_fraction(i) for layer in data.layers if layer.eligible)
        rest = total - floating - eligible
        rows.append(Shares(ratio, low / total, max(0.0, eligible - low) / total, rest / total, floating / total))
    return tuple(rows)


def largest_disagreement(data: ReportData) -> float | None:
    """Largest difference between the curve's low_share and the one counted from the group maps, if comparable."""
    counted = {row.ratio: row.low for row in executed_shares(data)}
    gaps = [abs(p.low_share - counted[p.ratio]) for p in data.curve if p.ratio in counted]
    has_map = any(layer.low for layer in data.layers)
    return max(gaps) if gaps and has_map else None


def mapped_layers(data: ReportData) -> tuple[LayerInfo, ...]:
    """Layers that have a row in the map of low groups."""
    return tuple(layer for layer in data.layers if layer.eligible and layer.n_groups and layer.low)


def ranged_layers(data: ReportData) -> tuple[LayerInfo, ...]:
    """Layers whose value ranges are shown."""
    return tuple(layer for layer in data.layers if layer.eligible and layer.channel_ranges)


def group_patterns(layer: LayerInfo) -> list[str]:
    """Per group one character per ratio: "1" where the group is low."""
    return ["".join("1" if row[g] else "0" for row in layer.low) for g in range(layer.n_groups)]


def low_levels(data: ReportData) -> tuple[float, ...]:
    """The ratios that name a colour of the map: those at which some group is low for the first time."""
    first = {p.index("1") for layer in mapped_layers(data) for p in group_patterns(layer) if "1" in p}
    return tuple(data.ratios[i] for i in sorted(first))


def is_nested(data: ReportData) -> bool:
    """Every group that is low at one ratio is low at all higher ones."""
    return not any("10" in p for layer in mapped_layers(data) for p in group_patterns(layer))


@dataclass(frozen=True)
class RangeBar:
    """Feature channels of one column of a range panel; heights are in bits, log2(1 + magnitude in 8-bit steps).

    used: bit length of the group's largest magnitude. shift: bits dropped below the low window. top: end of the window.
    """

    width: float
    height: float
    used: float
    shift: float
    top: float


def range_bars(layer: LayerInfo) -> tuple[RangeBar, ...]:
    """Channels by group (largest group first) and by range inside each; widths add up to 1."""
    ranges = layer.channel_ranges
    if not ranges:
        return ()
    bounds = layer.group_bounds or tuple(range(len(ranges) + 1))
    bits = max(1, (layer.amax or 15).bit_length())
    groups = []
    for g, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        values = sorted(ranges[start:stop], reverse=True)
        used = float(round(values[0]).bit_length())
        known = layer.activation_shift and layer.group_bounds
        shift = float(layer.activation_shift[g]) if known else max(0.0, used - bits)
        groups.append((values, used, shift, shift + bits))
    groups.sort(key=lambda item: item[0], reverse=True)
    columns = [(v, used, shift, top) for values, used, shift, top in groups for v in values]
    step = math.ceil(len(columns) / MAX_BARS)
    bars = []
    for start in range(0, len(columns), step):
        chunk = columns[start : start + step]
        value, used, shift, top = max(chunk)
        bars.append(RangeBar(len(chunk) / len(columns), math.log2(1 + value), used, shift, top))
    return tuple(bars)


def bar_segments(bar: RangeBar, full: float) -> tuple[tuple[str, float, float], ...]:
    """What becomes of the bits of a bar at low precision, as (kind, from, to): parts may be empty."""
    return (
        ("dropped", 0.0, min(bar.height, bar.shift)),
        ("kept", min(bar.height, bar.shift), min(bar.height, bar.top)),
        ("clipped", min(bar.height, bar.top), bar.height),
        ("unused", max(bar.used, bar.height), full),
    )


def unused_bits(data: ReportData, which: Literal["activations", "weights"]) -> dict[int, float]:
    """{unused high bits: share of the eligible layers' groups or weight blocks}, weighted by multiplies."""
    total: dict[int, float] = {}
    weight_sum = 0.0
    for layer in data.layers:
        histogram = layer.unused_bits_activations if which == "activations" else layer.unused_bits_weights
        if not layer.eligible or not histogram:
            continue
        weight = float(layer.macs or 1)
        weight_sum += weight
        for bits, part in histogram.items():
            total[bits] = total.get(bits, 0.0) + weight * part
    return {bits: total[bits] / weight_sum for bits in sorted(total)} if weight_sum else {}


@dataclass(frozen=True)
class SearchTrace:
    """The search for one target ratio, cut where the number of images changes: fitness values differ in scale there."""

    target: float
    parts: tuple[tuple[SearchGeneration, ...], ...]

    @property
    def generations(self) -> tuple[SearchGeneration, ...]:
        return tuple(g for part in self.parts for g in part)


def search_traces(data: ReportData) -> tuple[SearchTrace, ...]:
    """One trace per target, in ascending order of target."""
    by_target: dict[float, list[SearchGeneration]] = {}
    for generation in data.search.history:
        by_target.setdefault(generation.target, []).append(generation)
    traces = []
    for target in sorted(by_target):
        parts: list[list[SearchGeneration]] = []
        for generation in sorted(by_target[target], key=lambda g: g.generation):
            if not parts or parts[-1][-1].n_images != generation.n_images:
                parts.append([])
            parts[-1].append(generation)
        traces.append(SearchTrace(target, tuple(tuple(part) for part in parts)))
    return tuple(traces)
