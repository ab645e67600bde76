"""The map of low groups: one row per eligible layer, one cell per group, coloured by the ratio from which it is low."""

from __future__ import annotations

from bitdial.report.data import LayerInfo, ReportData
from bitdial.report.document import legend, warning
from bitdial.report.markup import (
    Attributes,
    Markup,
    big_number,
    element,
    join,
    json_script,
    percent,
    ratio_name,
    shorten,
    visible,
)
from bitdial.report.series import group_patterns, is_nested, low_levels, mapped_layers

FINE = 60  # from this many groups on, cells are too narrow for full gaps


def group_map(data: ReportData) -> Markup:
    """The dial, the legend, the table and the data block the page's script reads."""
    layers = mapped_layers(data)
    levels = low_levels(data)
    total = sum(layer.macs for layer in data.layers) or 1
    largest = max(layer.macs for layer in layers) or 1
    rows = [_row(data, k, layer, levels, total, largest) for k, layer in enumerate(layers)]
    head = element(
        "thead",
        {},
        element(
            "tr",
            {},
            element("th", {"scope": "col"}, "Layer"),
            element("th", {"scope": "col", "class": "cells"}, "Groups in stored order, width by channels"),
            element("th", {"scope": "col", "class": "num low"}, "Low now"),
            element("th", {"scope": "col", "class": "macs"}, "Multiplies"),
        ),
    )
    last = ratio_name(data.ratios[-1])
    caption = element(
        "caption", {}, f"Every eligible layer. Without the slider, “low now” is the share at {last} of the dial."
    )
    table = element("table", {"class": "map"}, caption, head, element("tbody", {}, join(rows)))
    entries = [(f"m{i}", f"low from {ratio_name(r)}") for i, r in enumerate(levels)]
    if any("1" not in p for layer in layers for p in group_patterns(layer)):
        entries.append(("never", "never low"))
    notes: list[Markup] = []
    if not is_nested(data):
        notes.append(
            warning(
                "The selection is not nested: some groups are low at one ratio and 8-bit at a higher one. Colours name "
                "the lowest ratio at which a group is low; the slider shows the true state."
            )
        )
    hint = "Point at a cell to see its channels and shift."
    return join(
        [
            _dial(data),
            legend(entries),
            *notes,
            element("p", {"class": "note", "id": "cell-info"}, hint),
            element("div", {"class": "scroll"}, table),
            json_script("map-data", _script_data(data, layers)),
        ]
    )


def _dial(data: ReportData) -> Markup:
    last = len(data.ratios) - 1
    attributes: Attributes = {"type": "range", "id": "ratio", "min": 0, "max": last, "value": last, "step": 1}
    return element(
        "div",
        {"class": "dial", "id": "dial", "hidden": True},
        element("label", {"for": "ratio"}, "Ratio"),
        element("input", attributes),
        element("b", {}, ratio_name(data.ratios[-1])),
        element("output", {"for": "ratio"}, ""),
    )


def _row(data: ReportData, index: int, layer: LayerInfo, levels: tuple[float, ...], total: int, largest: int) -> Markup:
    patterns = group_patterns(layer)
    weights = layer.group_weights()
    paths: dict[str, str] = {}
    position = 0.0
    for pattern, weight in zip(patterns, weights, strict=True):
        size = 1000 * weight
        paths[pattern] = paths.get(pattern, "") + f"M{position:.2f} 0h{size:.2f}v16h-{size:.2f}z"
        position += size
    fine = " fine" if layer.n_groups >= FINE else ""
    drawn = []
    for pattern, path in paths.items():
        colour = f"m{levels.index(data.ratios[pattern.index('1')])}" if "1" in pattern else "never"
        drawn.append(element("path", {"d": path, "class": colour + fine, "data-low": pattern}))
    counts = [sum(row) for row in layer.low]
    told = ", ".join(f"{c} low at {ratio_name(r)}" for r, c in zip(data.ratios, counts, strict=True))
    picture = element(
        "svg",
        {
            "viewBox": "0 0 1000 16",
            "preserveAspectRatio": "none",
            "role": "img",
            "aria-label": f"{layer.n_groups} groups: {told}",
        },
        *drawn,
    )
    name = shorten(layer.source or layer.name, 34)
    shares = [percent(layer.low_fraction(i), 0) for i in range(len(data.ratios))]
    bar = element("span", {"class": "bar", "style": f"width:{2.6 * layer.macs / largest:.2f}rem"}, "")
    part = f"{big_number(layer.macs)}, {percent(layer.macs / total)}"
    return element(
        "tr",
        {},
        element("th", {"scope": "row", "title": f"{layer.name} ({layer.source})"}, name),
        element("td", {"class": "cells", "data-layer": index}, picture),
        element("td", {"class": "num low", "data-shares": "|".join(shares)}, shares[-1]),
        element("td", {"class": "macs", "title": part}, bar, Markup("&#160;"), percent(layer.macs / total)),
    )


def _script_data(data: ReportData, layers: tuple[LayerInfo, ...]) -> dict[str, object]:
    by_ratio = {p.ratio: p for p in data.curve}
    facts = []
    for ratio in data.ratios:
        point = by_ratio.get(ratio)
        told = []
        if point is not None:
            if point.accuracy is not None:
                told.append(f"accuracy {percent(point.accuracy, 2)}")
            if point.agreement is not None:
                told.append(f"agreement with 8-bit {percent(point.agreement)}")
            told.append(f"{percent(point.low_share)} of all multiplies at low precision")
        facts.append(" · ".join(told))
    return {
        "ratios": [ratio_name(r) for r in data.ratios],
        "facts": facts,
        "layers": [
            {
                "name": visible(layer.source or layer.name),
                "bounds": list(layer.group_bounds) or list(range(layer.n_groups + 1)),
                "channels": bool(layer.group_bounds),
                "low": group_patterns(layer),
                "shift": list(layer.activation_shift),
            }
            for layer in layers
        ],
    }
