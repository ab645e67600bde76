"""The report's sections. Each returns its content, or None when the data have nothing for it (no empty headings)."""

from __future__ import annotations

from bitdial.quantization.curve import rise_remark
from bitdial.report.charts import (
    curve_chart,
    executed_chart,
    range_chart,
    range_key,
    search_chart,
    search_key,
    unused_chart,
)
from bitdial.report.data import ReportData
from bitdial.report.document import facts, figure, folded, format_statistic, legend, note, tile, warning, without_unit
from bitdial.report.group_map import group_map
from bitdial.report.html_tables import (
    ablation_table,
    answers_table,
    curve_html_table,
    executed_table,
    float_table,
    kept_table,
    layer_table,
    saturation_table,
    search_table,
    unused_table,
)
from bitdial.report.markup import Markup, big_number, element, join, percent, points, ratio_name
from bitdial.report.series import (
    curve_series,
    executed_shares,
    largest_disagreement,
    mapped_layers,
    ranged_layers,
    reference_accuracy,
    search_traces,
    unused_bits,
)

OPEN_PANELS = 24  # more range panels than this are folded away
TOLERANCE = 0.005  # of the curve's low share against the one counted from the maps


def tiles(data: ReportData) -> list[Markup]:
    """The headline: float model, then the dial's settings."""
    reference = reference_accuracy(data)
    shown: list[Markup] = []
    if reference and reference[0] != "8-bit":
        shown.append(tile(reference[0], percent(reference[1], 2), "accuracy", ""))
    curve = data.curve if len(data.curve) <= 6 else [data.curve[i * (len(data.curve) - 1) // 5] for i in range(6)]
    for point in curve:
        name = "8-bit (ratio 0)" if point.ratio == 0 else f"Ratio {ratio_name(point.ratio)}"
        share = f"{percent(point.low_share, 0)} of multiplies low"
        if point.accuracy is not None:
            loss = ""
            if reference and not (reference[0] == "8-bit" and point.ratio == 0):
                loss = f"{points(point.accuracy - reference[1])} points, "
            shown.append(tile(name, percent(point.accuracy, 2), loss + share, "own"))
        elif point.agreement is not None:
            shown.append(tile(name, percent(point.agreement, 1), f"agreement with 8-bit, {share}", "own"))
        else:
            shown.append(tile(name, percent(point.low_share, 0), "of multiplies low", "own"))
    return shown


def curve_section(data: ReportData) -> Markup | None:
    if not data.curve:
        return None
    parts: list[Markup | None] = []
    accuracy, agreement = curve_series(data, "accuracy"), curve_series(data, "agreement")
    measured = [series for series in (accuracy, agreement) if series]
    drawn = [figure(curve_chart(series), f"chart-{series.metric}") for series in measured]
    if any(drawn):
        parts.append(element("div", {"class": "pair"}, *drawn))
    if accuracy is None:
        parts.append(note("No accuracies were measured: the evaluation data had no labels."))
    remarks = []
    for series, chart in zip(measured, drawn, strict=True):
        if chart and series.low > 0:
            axis = "accuracy" if series.metric == "accuracy" else "agreement"
            remarks.append(f"The {axis} axis starts at {series.low:.4g}\u00a0%, not at 0.")
    if data.n_images:
        remarks.append(f"Measured on {data.n_images:,} images.".replace(",", "\u202f"))
        reference = reference_accuracy(data)
        if reference:
            error = (reference[1] * (1 - reference[1]) / data.n_images) ** 0.5
            remarks.append(
                f"Standard error of one accuracy: {100 * error:.2f} points; differences between settings, taken on the "
                "same images, are more certain than that."
            )
    if remark := rise_remark([point.accuracy for point in data.curve]):
        remarks.append(remark)
    if remarks:
        parts.append(note(" ".join(remarks)))
    parts.append(curve_html_table(data))
    return join(parts)


def answers_section(data: ReportData) -> Markup | None:
    """How far the dial is of use, by the calibration samples."""
    found = data.answers
    if found is None:
        return None
    told = (
        f"Useful up to {ratio_name(found.ceiling)}: {percent(found.wanted)} {found.what} are asked for, within the chance of so "
        "few samples."
    )
    beyond = "" if found.ceiling == found.ratios[-1] else " bitdial serve stops there by default."
    return join([note(told + beyond), answers_table(found)])


def executed_section(data: ReportData) -> Markup | None:
    """Proof of what ran: shares counted from the group maps, and every operator that did not run in integers."""
    rows = executed_shares(data)
    if not rows and not data.float_ops and not data.layers:
        return None
    parts: list[Markup | None] = []
    if rows:
        total = sum(layer.macs for layer in data.layers)
        caption = f"Share of the {big_number(total)} multiply-accumulates of one sample, per ratio"
        parts.append(figure(executed_chart(rows), "chart-executed", caption))
        parts.append(folded("Values", executed_table(rows)))
        gap = largest_disagreement(data)
        if gap is not None and gap <= TOLERANCE:
            told = f"to within {100 * gap:.2f} points" if 100 * gap >= 0.005 else "exactly"
            matches = f"Counted from the group map of every layer, this matches the curve {told}."
            parts.append(element("p", {"class": "check"}, matches))
        elif gap is not None:
            parts.append(
                warning(
                    "The curve's share of low-precision multiplies differs from the one counted from the group maps by "
                    f"up to {100 * gap:.1f} points. Do not trust the shares before this is explained."
                )
            )
    parts.append(element("h3", {}, "In float"))
    if data.float_ops or any(layer.float_reason for layer in data.layers):
        parts.append(float_table(data))
    else:
        parts.append(element("p", {}, "No operator was reported as running in float."))
    kept = kept_table(data)
    if kept:
        parts += [element("h3", {}, "In integers, always at 8 bits"), kept]
    return join(parts)


def map_section(data: ReportData) -> Markup | None:
    return group_map(data) if mapped_layers(data) else None


def range_section(data: ReportData) -> Markup | None:
    layers = ranged_layers(data)
    activations, weights = unused_bits(data, "activations"), unused_bits(data, "weights")
    parts: list[Markup | None] = []
    if activations or weights:
        caption = "Unused high bits over all eligible layers"
        parts.append(figure(unused_chart(activations, weights), "chart-unused", caption))
        parts.append(folded("Values", unused_table(activations, weights)))
    panels: list[Markup] = []
    for k, layer in enumerate(layers):
        shape = element("span", {}, f" {layer.shape}") if layer.shape else ""
        chart = range_chart(layer)
        panel = figure(chart, f"range-{k}", chart.title, shape, hint=layer.name)
        panels += [panel] if panel is not None else []
    if panels:
        parts.append(element("h3", {}, "Per layer: bits that each feature channel uses on the calibration data"))
        parts.append(legend(range_key(layers)))
        parts.append(element("div", {"class": "panels"}, *panels[:OPEN_PANELS]))
        if len(panels) > OPEN_PANELS:
            rest = element("div", {"class": "panels"}, *panels[OPEN_PANELS:])
            parts.append(folded(f"{len(panels) - OPEN_PANELS} more layers", rest))
    return join(parts) if any(parts) else None


def saturation_section(data: ReportData) -> Markup | None:
    return saturation_table(data) if data.saturation else None


def ablation_section(data: ReportData) -> Markup | None:
    return ablation_table(data) if data.ablation else None


def search_section(data: ReportData) -> Markup | None:
    parts: list[Markup | None] = []
    traces = search_traces(data)
    statistics = data.search.statistics
    if statistics:
        shown = [tile(without_unit(key), format_statistic(key, value), "") for key, value in statistics.items()]
        parts.append(element("dl", {"class": "tiles small"}, *shown))
    if traces:
        panels = []
        for k, trace in enumerate(traces):
            ends = trace.parts[-1]
            change = element("span", {}, f" {ends[0].best:.4g} → {ends[-1].best:.4g}")
            panels.append(figure(search_chart(trace), f"search-{k}", f"Ratio {ratio_name(trace.target)}", change))
        if any(panels):
            parts += [legend(search_key(traces)), element("div", {"class": "panels"}, *panels)]
        parts.append(folded("Values", search_table(data)))
        if any(len(t.parts) > 1 for t in traces):
            parts.append(note("Lines break where the number of images changes; values across a break do not compare."))
    return join(parts) if parts else None


def layer_section(data: ReportData) -> Markup | None:
    return layer_table(data) if data.layers else None


def layout_section(data: ReportData) -> Markup | None:
    return facts(dict(data.layout)) if data.layout else None


def provenance_section(data: ReportData) -> Markup | None:
    return facts({k: v for k, v in data.provenance.items() if k != "warnings"}) if data.provenance else None


def warnings_section(data: ReportData) -> Markup | None:
    """What the model's maker was warned of (a file may say anything there)."""
    told = data.provenance.get("warnings")
    texts = [text for text in told if isinstance(text, str) and text] if isinstance(told, list) else []
    return join([warning(text[:1].upper() + text[1:]) for text in texts]) if texts else None
