"""The report's sections. Each returns its content, or None when the data have nothing for it (no empty headings)."""

from __future__ import annotations

from bitdial.report.curve_chart import curve_chart, executed_chart, legend
from bitdial.report.data import ReportData
from bitdial.report.group_map import group_map
from bitdial.report.html_tables import (
    ablation_table,
    curve_html_table,
    float_table,
    kept_table,
    layer_table,
    saturation_table,
)
from bitdial.report.markup import Markup, big_number, element, join, percent, points, ratio_name, shorten
from bitdial.report.range_chart import range_panel, unused_bits_chart
from bitdial.report.search_chart import search_panel
from bitdial.report.series import (
    curve_series,
    executed_shares,
    largest_disagreement,
    mapped_layers,
    range_bars,
    reference_accuracy,
    search_traces,
    unused_bits,
)

OPEN_PANELS = 24  # more range panels than this are folded away
TOLERANCE = 0.005  # of the curve's low share against the one counted from the maps


def note(*content: str) -> Markup:
    return element("p", {"class": "note"}, *content)


def tiles(data: ReportData) -> Markup | None:
    """The headline: float model, then the dial's settings."""
    reference = reference_accuracy(data)
    shown: list[Markup] = []
    if reference and reference[0] != "8-bit":
        shown.append(_tile(reference[0], percent(reference[1], 2), "accuracy", ""))
    curve = data.curve if len(data.curve) <= 6 else [data.curve[i * (len(data.curve) - 1) // 5] for i in range(6)]
    for point in curve:
        name = "8-bit (ratio 0)" if point.ratio == 0 else f"Ratio {ratio_name(point.ratio)}"
        share = f"{percent(point.low_share, 0)} of multiplies low"
        if point.accuracy is not None:
            loss = ""
            if reference and not (reference[0] == "8-bit" and point.ratio == 0):
                loss = f"{points(point.accuracy - reference[1])} points, "
            shown.append(_tile(name, percent(point.accuracy, 2), loss + share, "own"))
        elif point.agreement is not None:
            shown.append(_tile(name, percent(point.agreement, 1), f"agreement with 8-bit, {share}", "own"))
        else:
            shown.append(_tile(name, percent(point.low_share, 0), "of multiplies low", "own"))
    return element("dl", {"class": "tiles"}, *shown) if shown else None


def _tile(name: str, value: str, sub: str, css: str) -> Markup:
    content = [element("dd", {"class": "value"}, value), element("dd", {"class": "sub"}, sub)]
    return element("div", {"class": f"tile {css}".strip()}, element("dt", {}, shorten(name, 40)), *content)


def curve_section(data: ReportData) -> Markup | None:
    if not data.curve:
        return None
    parts: list[Markup | None] = []
    accuracy, agreement = curve_series(data, "accuracy"), curve_series(data, "agreement")
    if accuracy and agreement:
        both = (element("figure", {}, curve_chart(accuracy)), element("figure", {}, curve_chart(agreement, 440, 380)))
        parts.append(element("div", {"class": "pair"}, *both))
    elif accuracy or agreement:
        only = accuracy or agreement
        parts.append(element("figure", {}, curve_chart(only, 900, 380)) if only else None)
    if accuracy is None:
        parts.append(note("No accuracies were measured: the evaluation data had no labels."))
    remarks = []
    for series in (accuracy, agreement):
        if series and series.low > 0:
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
    if remarks:
        parts.append(note(" ".join(remarks)))
    parts.append(curve_html_table(data))
    return join(parts)


def executed_section(data: ReportData) -> Markup | None:
    """Proof of what ran: shares counted from the group maps, and every operator that did not run in integers."""
    rows = executed_shares(data)
    if not rows and not data.float_ops and not data.layers:
        return None
    parts: list[Markup | None] = []
    if rows:
        total = sum(layer.macs for layer in data.layers)
        entries = [("x-low", "low precision"), ("x-eight", "8-bit, may run low at another ratio")]
        if any(r.fixed_high for r in rows):
            entries.append(("x-fixed", "always 8-bit"))
        if any(r.in_float for r in rows):
            entries.append(("x-float", "float"))
        caption = element(
            "figcaption", {}, f"Share of the {big_number(total)} multiply-accumulates of one sample, per ratio"
        )
        chart = element("div", {"style": "max-width:60rem"}, executed_chart(rows, "low precision"))
        parts.append(element("figure", {}, caption, legend(entries), chart))
        gap = largest_disagreement(data)
        if gap is not None and gap <= TOLERANCE:
            told = f"to within {100 * gap:.2f} points" if 100 * gap >= 0.005 else "exactly"
            matches = f"Counted from the group map of every layer, this matches the curve {told}."
            parts.append(element("p", {"class": "check"}, matches))
        elif gap is not None:
            parts.append(
                element(
                    "p",
                    {"class": "warn"},
                    f"The curve's share of low-precision multiplies differs from the one counted from the group maps by "
                    f"up to {100 * gap:.1f} points. Do not trust the shares before this is explained.",
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
    layers = [layer for layer in data.layers if layer.channel_ranges and layer.eligible]
    activations, weights = unused_bits(data, "activations"), unused_bits(data, "weights")
    parts: list[Markup | None] = []
    if activations or weights:
        entries = [("k-kept", "activations, per group")] if activations else []
        entries += [("x-fixed", "weights, per row and group")] if weights else []
        chart = element("div", {"style": "max-width:36rem"}, unused_bits_chart(activations, weights))
        caption = element("figcaption", {}, "Unused high bits over all eligible layers")
        parts.append(element("figure", {}, caption, legend(entries), chart))
    if layers:
        parts.append(element("h3", {}, "Per layer: bits that each feature channel uses on the calibration data"))
        parts.append(
            legend(
                [
                    ("k-unused", "unused by the whole group"),
                    ("k-kept", "kept at low precision"),
                    ("k-dropped", "dropped at low precision"),
                    *([("k-clipped", "clipped at low precision")] if _clips(data) else []),
                ]
            )
        )
        panels = []
        for k, layer in enumerate(layers):
            used = f" {layer.shape}" if layer.shape else ""
            name = element(
                "figcaption", {"title": layer.name}, shorten(layer.source or layer.name, 26), element("span", {}, used)
            )
            panels.append(element("figure", {}, name, range_panel(layer, f"range-{k}")))
        parts.append(element("div", {"class": "panels"}, *panels[:OPEN_PANELS]))
        if len(panels) > OPEN_PANELS:
            rest = element("div", {"class": "panels"}, *panels[OPEN_PANELS:])
            summary = element("summary", {}, f"{len(panels) - OPEN_PANELS} more layers")
            parts.append(element("details", {}, summary, rest))
    return join(parts) if parts else None


def _clips(data: ReportData) -> bool:
    return any(bar.height > bar.top for layer in data.layers for bar in range_bars(layer))


def saturation_section(data: ReportData) -> Markup | None:
    return saturation_table(data) if data.saturation else None


def ablation_section(data: ReportData) -> Markup | None:
    return ablation_table(data) if data.ablation else None


def search_section(data: ReportData) -> Markup | None:
    parts: list[Markup | None] = []
    traces = search_traces(data)
    statistics = data.search.statistics
    if statistics:
        shown = [_tile(_without_unit(key), format_statistic(key, value), "", "") for key, value in statistics.items()]
        parts.append(element("dl", {"class": "tiles small"}, *shown))
    if traces:
        entries = [("x-low", "best of the generation")]
        if any(g.mean is not None for t in traces for g in t.generations):
            entries.append(("k-clipped", "mean of the generation (dashed)"))
        parts.append(legend(entries))
        panels = []
        for k, trace in enumerate(traces):
            ends = trace.parts[-1]
            change = f" {ends[0].best:.4g} → {ends[-1].best:.4g}"
            name = element("figcaption", {}, f"Ratio {ratio_name(trace.target)}", element("span", {}, change))
            panels.append(element("figure", {}, name, search_panel(trace, f"search-{k}")))
        parts.append(element("div", {"class": "panels"}, *panels))
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
    return join([element("p", {"class": "warn"}, text[:1].upper() + text[1:]) for text in texts]) if texts else None


def facts(content: dict[str, object]) -> Markup:
    """A dictionary as a definition list; dictionaries inside become lists inside."""
    rows: list[Markup] = []
    for key, value in content.items():
        rows.append(element("dt", {}, _title(str(key))))
        shown = facts(value) if isinstance(value, dict) and value else _plain(str(key), value)
        rows.append(element("dd", {}, shown))
    return element("dl", {"class": "facts"}, *rows)


def _plain(key: str, value: object) -> str:
    if value is None or value == "" or value == [] or value == {}:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return format_statistic(key, value)
    if isinstance(value, list):
        if all(isinstance(item, dict) for item in value):
            return join([facts(item) for item in value])
        return ", ".join(_plain("", item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(str(k), v)}" for k, v in value.items())
    return str(value)


def _title(key: str) -> str:
    return key.replace("_", " ")


def _without_unit(key: str) -> str:
    """A statistic's name without the unit that `format_statistic` gives to its value."""
    if key == "seconds":
        return "time"
    return _title(key).removesuffix(" bytes").removesuffix(" seconds")


def format_statistic(key: str, value: object) -> str:
    """A number with the unit its key names: seconds, bytes, share; large counts shortened."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _plain("", value)
    if "seconds" in key:
        minutes, seconds = divmod(value, 60)
        return f"{int(minutes)}\u00a0min {seconds:.0f}\u00a0s" if minutes else f"{value:.3g}\u00a0s"
    if "bytes" in key:
        return f"{value / 2**20:.1f}\u00a0MiB" if value < 2**30 else f"{value / 2**30:.2f}\u00a0GiB"
    if "share" in key and 0 <= value <= 1:
        return percent(value)
    if isinstance(value, int) and abs(value) < 10**6:
        return f"{value:,}".replace(",", "\u202f") if abs(value) >= 10**5 else str(value)
    return big_number(value) if abs(value) >= 10**6 else f"{value:.6g}"
