"""SVG of the search: best and mean fitness over the generations, one panel per target ratio."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bitdial.report.curve_chart import label, line, svg
from bitdial.report.data import SearchGeneration
from bitdial.report.markup import Markup, element, ratio_name
from bitdial.report.series import SearchTrace, nice_ticks


def search_panel(trace: SearchTrace, identifier: str) -> Markup:
    """Lines break where the number of images changes, because the fitness is another quantity from there on."""
    width, height, left, top, bottom = 300.0, 190.0, 50.0, 22.0, 150.0
    generations = trace.generations
    values = [g.best for g in generations] + [g.mean for g in generations if g.mean is not None]
    margin = 0.06 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 1.0
    low, high = min(values) - margin, max(values) + margin
    ticks = nice_ticks(low, high, 4)
    first, last = generations[0].generation, generations[-1].generation
    right = width - 8

    def x(generation: float) -> float:
        return left + (right - left) * ((generation - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    parts = [line(left, y(t), right, y(t), "grid") for t in ticks]
    parts += [label(left - 6, y(t) + 4, f"{t:.4g}", "end", "tick") for t in ticks]
    parts.append(line(left, bottom, right, bottom, "axis"))
    # End labels that would touch each other are merged into one when there is a single generation.
    for generation, anchor in ((first, "start"), (last, "end")) if last > first else ((first, "middle"),):
        parts.append(label(x(generation), bottom + 17, str(generation), anchor, "tick"))
    parts.append(label((left + right) / 2, bottom + 17, "generation" if last > first else "", "middle", "tick"))
    for k, part in enumerate(trace.parts):
        if k:
            border = x((trace.parts[k - 1][-1].generation + part[0].generation) / 2)
            style = "stroke:var(--muted);stroke-dasharray:2 3"
            parts.append(element("line", {"x1": border, "x2": border, "y1": top - 6, "y2": bottom, "style": style}))
        if part[0].n_images:
            at = x(part[0].generation)
            end = x(trace.parts[k + 1][0].generation) if k + 1 < len(trace.parts) else width
            told = f"{part[0].n_images} images"
            told = told if at + 7 * len(told) < end else str(part[0].n_images)  # about 7 units a character
            parts.append(label(at, top - 9, told, css="tick"))
        parts += _lines(part, x, y)
    ends = generations[0].best, generations[-1].best
    told = f"best fitness {ends[0]:.4g} at generation {first}, {ends[1]:.4g} at generation {last}"
    return svg(identifier, width, height, f"Search for {ratio_name(trace.target)}", told, *parts)


def _lines(
    part: Sequence[SearchGeneration], x: Callable[[float], float], y: Callable[[float], float]
) -> list[Markup]:
    means = [(x(g.generation), y(g.mean)) for g in part if g.mean is not None]
    best = [(x(g.generation), y(g.best)) for g in part]
    parts = []
    if len(means) > 1:
        style = "fill:none;stroke:var(--s0);stroke-width:1.6;stroke-dasharray:4 3"
        parts.append(element("polyline", {"points": _path(means), "style": style}))
    if len(best) > 1:
        parts.append(element("polyline", {"points": _path(best), "class": "own-line"}))
    parts += [element("circle", {"cx": a, "cy": b, "r": 2.6, "class": "own-dot"}) for a, b in (best[0], best[-1])]
    return parts


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
