"""SVG of the curve over the ratio with its baselines, and of what runs at which precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bitdial.report.markup import Markup, element, join, percent, ratio_name, shorten
from bitdial.report.series import CurveSeries, Points, Shares, spread, tick_digits

DASHES = ("7 4", "2 4", "9 3 2 3", "4 2")


def svg(identifier: str, width: float, height: float, title: str, description: str, *content: Markup) -> Markup:
    """An image with an accessible name and description."""
    return element(
        "svg",
        {
            "viewBox": f"0 0 {width:g} {height:g}",
            "role": "img",
            "aria-labelledby": f"{identifier}-title {identifier}-desc",
            "font-size": 12.5,
        },
        element("title", {"id": f"{identifier}-title"}, title),
        element("desc", {"id": f"{identifier}-desc"}, description),
        *content,
    )


def label(x: float, y: float, content: str, anchor: str = "start", css: str | None = None, **more: str) -> Markup:
    """One line of text."""
    return element("text", {"x": x, "y": y, "text-anchor": anchor, "class": css, **more}, content)


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    """A straight line."""
    return element("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": css})


def marker(shape: int, x: float, y: float, style: str, size: float = 4.5) -> Markup:
    """A baseline's mark: square, diamond, triangle or cross, so that colour is not the only difference."""
    s = size
    paths = (
        f"M{x - s:.1f} {y - s:.1f}h{2 * s}v{2 * s}h{-2 * s}z",
        f"M{x:.1f} {y - 1.4 * s:.1f}l{1.4 * s} {1.4 * s}l{-1.4 * s} {1.4 * s}l{-1.4 * s} {-1.4 * s}z",
        f"M{x:.1f} {y - 1.2 * s:.1f}l{1.2 * s} {2.2 * s}h{-2.4 * s}z",
        f"M{x - s:.1f} {y:.1f}h{2 * s}M{x:.1f} {y - s:.1f}v{2 * s}",
    )
    return element("path", {"d": paths[shape % 4], "style": style})


def curve_chart(series: CurveSeries, width: float = 720, height: float = 380) -> Markup:
    """The model's own curve, baselines with a ratio as curves and without one as horizontal lines.

    The y axis covers what differs and says where it starts; baseline points below it are marked at the bottom edge.
    """
    left, top, bottom = 52.0, 30.0, height - 50.0
    right = width - (168.0 if width > 500 else 138.0)
    digits = tick_digits(series.ticks)

    def x(ratio: float) -> float:
        return left + (right - left) * ratio

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - series.low) / (series.high - series.low)

    parts = [line(left, y(t), right, y(t), "grid") for t in series.ticks]
    parts += [label(left - 8, y(t) + 4, f"{t:.{digits}f}", "end", "tick") for t in series.ticks]
    parts += _x_axis(x, [r for r, _ in series.own], bottom)
    if series.low > 0:  # the broken axis: a small zigzag where the axis leaves zero out
        zigzag = f"M{left} {bottom - 14:.1f}l5 3l-10 4l10 4l-5 3"
        parts.append(element("path", {"d": zigzag, "class": "axis", "fill": "none"}))
    parts.append(line(left, top, left, bottom - (14 if series.low > 0 else 0), "axis"))
    name = "Accuracy, %" if series.metric == "accuracy" else "Same top answer as the 8-bit model, %"
    parts.append(label(0, 14, name, css="tick"))

    ends: list[tuple[float, str, str]] = []  # y, text, style of the labels at the right border
    for k, (name, value) in enumerate(series.levels):
        colour = "var(--ink)" if k == 0 else f"var(--s{(k + 1) % 4})"
        dash = f"stroke:{colour};stroke-width:1.5;stroke-dasharray:{DASHES[k % 4]}"
        if value >= series.low:
            parts.append(
                element("line", {"x1": left, "x2": right, "y1": y(value), "y2": y(value), "style": dash})
            )
        ends.append((y(max(value, series.low)), _end_text(name, value, series.low, width), f"fill:{colour}"))
    for k, (name, points) in enumerate(series.curves):
        colour = f"var(--s{k % 4})"
        parts += _baseline(k, points, series.low, x, y, bottom, f"{series.metric}-clip", colour)
        ends.append(
            (y(max(points[-1][1], series.low)), _end_text(name, points[-1][1], series.low, width), f"fill:{colour}")
        )
    own = [(x(r), y(v)) for r, v in series.own]
    parts.append(element("polyline", {"points": " ".join(f"{a:.1f},{b:.1f}" for a, b in own), "class": "own-line"}))
    for (a, b), (ratio, value) in zip(own, series.own, strict=True):
        hint = element("title", {}, f"{ratio_name(ratio)}: {value:.2f}\u00a0%")
        parts.append(element("circle", {"cx": a, "cy": b, "r": 5, "class": "own-dot"}, hint))
    # Labels stand on the side of a point that its line leaves free; the last one's is the label at the border.
    for k, (a, b) in enumerate(own[:-1] if len(own) <= 9 and width > 500 else ()):
        above = b <= min(own[max(k - 1, 0)][1], own[k + 1][1])
        place = b - 11 if above else b + 20
        parts.append(label(max(a, left + 24), place, f"{series.own[k][1]:.2f}", "middle", "halo own-text"))
    ends.append((own[-1][1], f"bitdial  {series.own[-1][1]:.2f}", "own"))
    places = spread([e[0] for e in ends], 17, top, bottom)
    for (natural, content, style), place in zip(ends, places, strict=True):
        own_label = style == "own"
        leader = element(
            "path",
            {"d": f"M{right + 3:.1f} {natural:.1f}L{right + 11:.1f} {place:.1f}", "class": "grid", "fill": "none"},
        )
        parts.append(leader)
        css, more = ("own-text", {}) if own_label else (None, {"style": style})
        parts.append(label(right + 14, place + 4, content, css=css, **more))
    clip = element(
        "clipPath",
        {"id": f"{series.metric}-clip"},
        element("rect", {"x": left - 8, "y": top - 8, "width": right - left + 16, "height": bottom - top + 8}),
    )
    told = "; ".join(f"{ratio_name(r)}: {v:.2f} %" for r, v in series.own)
    baselines = "; ".join(
        [f"{shorten(n, 40)}: {v:.2f} %" for n, v in series.levels]
        + [f"{shorten(n, 40)}: " + ", ".join(f"{v:.2f} % at {ratio_name(r)}" for r, v in p) for n, p in series.curves]
    )
    title = f"{'Accuracy' if series.metric == 'accuracy' else 'Agreement with the 8-bit model'} over the ratio"
    return svg(f"chart-{series.metric}", width, height, title, f"bitdial: {told}. {baselines}", clip, *parts)


def _end_text(name: str, value: float, low: float, width: float) -> str:
    shown = shorten(name, 17 if width > 500 else 12)
    return f"{shown}  {value:.2f}" + (" ↓" if value < low else "")


def _x_axis(x: Callable[[float], float], ratios: Sequence[float], bottom: float) -> list[Markup]:
    ticks = sorted({0.0, 1.0, *ratios}) if len(ratios) <= 9 else [0.0, 0.25, 0.5, 0.75, 1.0]
    parts = [line(x(0.0), bottom, x(1.0), bottom, "axis")]
    for tick in ticks:
        parts.append(line(x(tick), bottom, x(tick), bottom + 5, "axis"))
        parts.append(label(x(tick), bottom + 19, f"{100 * tick:.4g}", "middle", "tick"))
    name = "Ratio: eligible multiplies at low precision, %"
    parts.append(label((x(0.0) + x(1.0)) / 2, bottom + 40, name, "middle", "tick"))
    return parts


def _baseline(
    k: int,
    points: Points,
    low: float,
    x: Callable[[float], float],
    y: Callable[[float], float],
    bottom: float,
    clip: str,
    colour: str,
) -> list[Markup]:
    """One baseline's line and marks. Values below `low` get a triangle at the bottom edge."""
    stroke = f"fill:none;stroke:{colour};stroke-width:1.8;stroke-dasharray:{DASHES[(k + 1) % 4]}"
    path = " ".join(f"{x(r):.1f},{y(v):.1f}" for r, v in points)
    parts = [element("polyline", {"points": path, "style": stroke, "clip-path": f"url(#{clip})"})]
    for ratio, value in points:
        if value >= low:
            parts.append(marker(k, x(ratio), y(value), f"fill:{colour};stroke:{colour};stroke-width:1.5"))
        else:  # off the plot: a triangle at the bottom edge, with the value
            tip = f"M{x(ratio) - 5:.1f} {bottom - 11:.1f}h10l-5 9z"
            parts.append(element("path", {"d": tip, "style": f"fill:{colour}"}))
            parts.append(label(x(ratio), bottom - 16, f"{value:.1f}", "middle", "halo", style=f"fill:{colour}"))
    return parts


def executed_chart(rows: Sequence[Shares], low_name: str) -> Markup:
    """One stacked bar per ratio: multiplies at low precision, at 8 bits by choice, always at 8 bits, in float."""
    width, left, right, step = 720.0, 56.0, 712.0, 26.0
    parts: list[Markup] = []
    kinds = (("low", "x-low"), ("eligible_high", "x-eight"), ("fixed_high", "x-fixed"), ("in_float", "x-float"))
    for i, row in enumerate(rows):
        top = 2 + step * i
        parts.append(label(left - 10, top + 15, ratio_name(row.ratio), "end"))
        position = left
        for attribute, css in kinds:
            part = getattr(row, attribute)
            size = (right - left) * part
            if size > 0:
                hint = element("title", {}, percent(part))
                parts.append(
                    element("rect", {"x": position, "y": top, "width": size, "height": 19.0, "class": css}, hint)
                )
            if attribute == "low" and part > 0:
                inside = size > 60
                style = "fill:var(--bg);font-weight:650" if inside else "font-weight:650"
                place = position + 8 if inside else position + size + 6
                parts.append(label(place, top + 15, percent(part), css=None, style=style))
            position += size
    told = "; ".join(
        f"ratio {ratio_name(r.ratio)}: {percent(r.low)} {low_name}, {percent(r.eligible_high + r.fixed_high)} 8-bit, "
        f"{percent(r.in_float)} float"
        for r in rows
    )
    return svg("chart-executed", width, 2 + step * len(rows), "Multiply-accumulates by precision", told, *parts)


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Swatches with names; each entry is (CSS class of an SVG fill, text)."""
    items = []
    for css, name in entries:
        box = element("rect", {"width": 18, "height": 14, "rx": 2, "class": css})
        items.append(element("li", {}, element("svg", {"viewBox": "0 0 18 14", "aria-hidden": "true"}, box), name))
    return element("ul", {"class": "legend"}, join(items))
