"""SVG of the value ranges: per layer the bits its channels use and what low precision keeps, after FlexiQ's figure 1.

FlexiQ: Kim, Um, Kim, Park, Seo, EuroSys 2026, arXiv 2510.02822. Many groups of feature channels leave the high bits of
the 8-bit range unused; low precision extracts the highest used bits.
"""

from __future__ import annotations

from collections.abc import Mapping

from bitdial.report.curve_chart import label, line, svg
from bitdial.report.data import LayerInfo
from bitdial.report.markup import Attributes, Markup, element, number, percent
from bitdial.report.series import bar_segments, range_bars

# The pattern of unused bits, defined once per page; the panels refer to it by its id.
HATCH = element(
    "svg",
    {"width": 0, "height": 0, "style": "position:absolute", "aria-hidden": "true"},
    element(
        "defs",
        {},
        element(
            "pattern",
            {
                "id": "hatch",
                "width": 6,
                "height": 6,
                "patternUnits": "userSpaceOnUse",
                "patternTransform": "rotate(45)",
            },
            element("rect", {"width": 6, "height": 6, "class": "hatch-bg"}),
            element("line", {"x1": 0, "y1": 0, "x2": 0, "y2": 6, "class": "hatch-line"}),
        ),
    ),
)


def range_panel(layer: LayerInfo, identifier: str) -> Markup:
    """Bars of log2(1 + range) per channel, sorted by group; hatched above: high bits no channel of the group uses."""
    bars = range_bars(layer)
    full = 7 if layer.signed else 8
    width, height, left, top, bottom = 280.0, 150.0, 20.0, 6.0, 130.0

    def y(bits: float) -> float:
        return bottom - (bottom - top) * min(bits, full) / full

    regions = {"k-unused": "", "k-dropped": "", "k-kept": "", "k-clipped": ""}
    position = left
    scale = width - left
    for bar in bars:
        size = scale * bar.width
        for kind, low, high in bar_segments(bar, float(full)):
            if high > low:
                regions[f"k-{kind}"] += (
                    f"M{number(position)} {number(y(high))}h{number(size)}V{number(y(low))}h{number(-size)}z"
                )
        position += size
    parts = [element("path", {"d": d, "class": css}) for css, d in regions.items() if d]
    for bits in range(0, full + 1, 2 if full == 8 else 1):
        if bits % 2 == 0 or bits == full:
            parts.append(label(left - 6, y(bits) + 4, str(bits), "end", "tick"))
            parts.append(line(left - 3, y(bits), left, y(bits), "axis"))
    parts.append(line(left, top, left, bottom, "axis"))
    parts.append(line(left, bottom, width, bottom, "axis"))
    channels = len(layer.channel_ranges)
    parts.append(label(left, bottom + 16, f"{channels} channels, sorted by group and range", css="tick"))
    unused = sum(bar.width * max(0.0, full - bar.used) for bar in bars)
    told = f"{channels} channels in {layer.n_groups} groups; on average {unused:.1f} of {full} bits are unused."
    return svg(identifier, width, height, "Bits used per channel", told, *parts)


def unused_bits_chart(activations: Mapping[int, float], weights: Mapping[int, float]) -> Markup:
    """Two bars per number of unused high bits: activation groups and weight blocks."""
    width, height, left, top, bottom = 560.0, 220.0, 46.0, 24.0, 176.0
    present = [*activations, *weights]
    counts = range(max(present) + 1)
    highest = max([*activations.values(), *weights.values()])
    limit = next(step for step in (0.1, 0.25, 0.5, 0.75, 1.0) if highest <= step + 1e-9)
    parts: list[Markup] = [label(0, 12, "Share, weighted by multiplies, %", css="tick")]
    for k in range(6):
        value = limit * k / 5
        y = bottom - (bottom - top) * k / 5
        parts.append(line(left, y, width, y, "grid"))
        parts.append(label(left - 8, y + 4, f"{100 * value:.4g}", "end", "tick"))
    slot = (width - left) / len(counts)
    size = min(34.0, slot * 0.36)
    for bits in counts:
        centre = left + slot * (bits + 0.5)
        for shares, x, css in ((activations, centre - size - 1, "k-kept"), (weights, centre + 1, "x-fixed")):
            part = shares.get(bits, 0.0)
            if part > 0:
                tall = (bottom - top) * part / limit
                box: Attributes = {"x": x, "y": bottom - tall, "width": size, "height": tall, "class": css}
                parts.append(element("rect", box, element("title", {}, percent(part))))
        parts.append(label(centre, bottom + 18, str(bits), "middle", "tick"))
    parts.append(line(left, bottom, width, bottom, "axis"))
    parts.append(label((left + width) / 2, bottom + 38, "Unused high bits", "middle", "tick"))
    told = "; ".join(
        f"{bits} unused: activations {percent(activations.get(bits, 0.0))}, weights {percent(weights.get(bits, 0.0))}"
        for bits in counts
    )
    return svg("chart-unused", width, height, "Unused high bits of groups", told, *parts)
