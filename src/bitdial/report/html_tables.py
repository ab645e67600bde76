"""The HTML tables of the report: curve, float operators, layers kept at 8 bits, saturation, ablation, all layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from bitdial.report.data import Ablation, Answers, LayerInfo, ReportData
from bitdial.report.markup import Markup, big_number, element, join, percent, points, ratio_name
from bitdial.report.series import Shares, reference_accuracy


def header(names: Sequence[str], numeric: Sequence[bool]) -> Markup:
    cells = [
        element("th", {"scope": "col", "class": "num" if right else None}, name)
        for name, right in zip(names, numeric, strict=True)
    ]
    return element("thead", {}, element("tr", {}, *cells))


def cell(content: str, value: float | None = None, css: str | None = None) -> Markup:
    """A data cell; `value` is what a numeric column sorts by."""
    sort = None if value is None else f"{value:.10g}"
    numeric = "num" if value is not None else None
    return element("td", {"class": css or numeric, "data-value": sort}, content)


def table(head: Markup, rows: Sequence[Markup], caption: str, sortable: bool = True) -> Markup:
    """A table that scrolls by itself when the page is narrower."""
    content = element(
        "table",
        {"class": "sortable" if sortable else None},
        element("caption", {}, caption),
        head,
        element("tbody", {}, join(rows)),
    )
    return element("div", {"class": "scroll"}, content)


def curve_html_table(data: ReportData) -> Markup:
    """The dial's settings with the baselines below; the slider marks the row of the ratio it stands on."""
    reference = reference_accuracy(data)
    distance = any(p.distance is not None for p in data.curve)
    names = ["Setting", "Accuracy", "Difference", "Agreement with 8-bit", "Low, of all multiplies", "Low, of eligible"]
    names += ["Distance to 8-bit"] if distance else []
    rows = []
    for point in data.curve:
        index = data.ratios.index(point.ratio) if point.ratio in data.ratios else None
        cells = [
            _number(percent(point.accuracy, 2)),
            _difference(point.accuracy, reference[1] if reference else None),
            _number(percent(point.agreement, 2)),
            _number(percent(point.low_share)),
            _number(percent(point.eligible_share)),
        ]
        cells += [_number("–" if point.distance is None else f"{point.distance:.4g}")] if distance else []
        heading = element("th", {"scope": "row"}, f"ratio {ratio_name(point.ratio)}")
        rows.append(element("tr", {"data-ratio": index}, heading, *cells))
    for baseline in data.baselines:
        name = baseline.label if baseline.ratio is None else f"{baseline.label}, {ratio_name(baseline.ratio)}"
        cells = [
            _number(percent(baseline.accuracy, 2)),
            _difference(baseline.accuracy, reference[1] if reference else None),
            _number(percent(baseline.agreement, 2)),
            *[_number("–")] * (len(names) - 4),
        ]
        rows.append(element("tr", {"class": "base"}, element("th", {"scope": "row"}, name), *cells))
    caption = "The curve and its baselines"
    if reference:
        caption += f". Differences are in points, against {reference[0]}."
    return table(header(names, [False] + [True] * (len(names) - 1)), rows, caption, sortable=False)


def answers_table(found: Answers) -> Markup:
    """What each ratio keeps of the 8-bit model's answers."""
    rows = [
        element(
            "tr", {}, element("th", {"scope": "row"}, f"ratio {ratio_name(ratio)}"), _number(percent(kept, 2)),
            cell("yes" if ratio <= found.ceiling else "no"),
        )
        for ratio, kept in zip(found.ratios, found.kept, strict=True)
    ]  # fmt: skip
    names = ["Setting", "Kept", "Of use"]
    return table(header(names, [False, True, False]), rows, f"Kept {found.what}", sortable=False)


def _number(content: str) -> Markup:
    return element("td", {"class": "num"}, content)


def _difference(value: float | None, reference: float | None) -> Markup:
    return _number("–" if value is None or reference is None else points(value - reference))


def float_table(data: ReportData) -> Markup:
    """What ran in float and why: whole layers first, because they are the ones that cost."""
    total = sum(layer.macs for layer in data.layers) or 1
    rows = []
    named = {op.node for op in data.float_ops}
    for layer in data.layers:
        if layer.float_reason and layer.name not in named:
            rows.append(_float_row(layer.name, layer.kind, layer.source, layer.float_reason, layer.macs / total))
    macs = {layer.name: layer.macs for layer in data.layers}
    for op in data.float_ops:
        rows.append(_float_row(op.node, op.op, op.source, op.reason, macs.get(op.node, 0) / total))
    names = ["Node", "Operator", "Module", "Why", "Multiplies"]
    return table(header(names, [False] * 4 + [True]), rows, f"{_count(len(rows), 'operator')} ran in float")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _float_row(node: str, op: str, source: str, reason: str, part: float) -> Markup:
    cells = (cell(op, css="mono"), cell(source or "–", css="mono"), cell(reason or "no reason was given"))
    name = element("th", {"scope": "row", "class": "mono"}, node)
    return element("tr", {}, name, *cells, cell(percent(part) if part else "–", part))


def kept_table(data: ReportData) -> Markup | None:
    """Layers that run in integers and never low, with the reason."""
    layers = [layer for layer in data.layers if not layer.eligible and not layer.float_reason]
    if not layers:
        return None
    total = sum(layer.macs for layer in data.layers) or 1
    rows = [
        element(
            "tr",
            {},
            element("th", {"scope": "row", "class": "mono"}, layer.source or layer.name),
            cell(layer.kind),
            cell(layer.reason or "no reason was given"),
            cell(percent(layer.macs / total), layer.macs / total),
        )
        for layer in layers
    ]
    names = ["Layer", "Kind", "Why", "Multiplies"]
    return table(header(names, [False] * 3 + [True]), rows, f"{_count(len(rows), 'layer')} always at 8 bits")


def executed_table(rows: Sequence[Shares]) -> Markup:
    """The figures behind the bars of what was executed."""
    names = ["Ratio", "Low precision", "8-bit by choice", "Always 8-bit", "Float"]
    cells = [(ratio_name(r.ratio), *map(percent, (r.low, r.eligible_high, r.fixed_high, r.in_float))) for r in rows]
    return plain_table(names, cells, "Shares of all multiply-accumulates")


def unused_table(activations: Mapping[int, float], weights: Mapping[int, float]) -> Markup:
    """The figures behind the bars of unused bits."""
    counts = range(max([*activations, *weights]) + 1)
    cells = [(str(b), percent(activations.get(b, 0.0)), percent(weights.get(b, 0.0))) for b in counts]
    return plain_table(["Unused high bits", "Activations", "Weights"], cells, "Shares, weighted by multiplies")


def search_table(data: ReportData) -> Markup:
    """Every generation of the search."""
    cells = [
        (ratio_name(g.target), str(g.generation), f"{g.best:.4g}", "–" if g.mean is None else f"{g.mean:.4g}",
         str(g.n_images or "–"))
        for g in data.search.history
    ]  # fmt: skip
    return plain_table(["Ratio", "Generation", "Best", "Mean", "Images"], cells, "Fitness")


def plain_table(names: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> Markup:
    """A table of numbers as text; the first cell of a row names it."""
    drawn = [
        element("tr", {}, element("th", {"scope": "row"}, first), *(element("td", {"class": "num"}, c) for c in cells))
        for first, *cells in rows
    ]
    return table(header(names, [False] + [True] * (len(names) - 1)), drawn, caption, sortable=False)


def saturation_table(data: ReportData) -> Markup:
    """Share of saturated low values per layer and ratio, and over all layers."""
    ratios = sorted({s.ratio for s in data.saturation})
    counts: dict[tuple[str, float], tuple[int, int]] = {}
    for entry in data.saturation:
        for key in ((entry.layer, entry.ratio), ("", entry.ratio)):
            saturated, total = counts.get(key, (0, 0))
            counts[key] = (saturated + entry.saturated, total + entry.total)
    largest = max((s / t for (layer, _), (s, t) in counts.items() if layer and t), default=0.0) or 1.0
    rows = []
    for layer in dict.fromkeys(s.layer for s in data.saturation):
        heading = element("th", {"scope": "row", "class": "mono"}, layer)
        rows.append(element("tr", {}, heading, *(_saturated(counts.get((layer, r)), largest) for r in ratios)))
    overall = element("th", {"scope": "row"}, "all layers")
    foot = element("tr", {}, overall, *(_saturated(counts.get(("", r)), largest) for r in ratios))
    head = header(["Layer", *(f"at {ratio_name(r)}" for r in ratios)], [False] + [True] * len(ratios))
    caption = "Low values that hit the end of their range, of all low values (counts on pointing)"
    content = element(
        "table",
        {"class": "sortable"},
        element("caption", {}, caption),
        head,
        element("tbody", {}, join(rows)),
        element("tfoot", {}, foot),
    )
    return element("div", {"class": "scroll"}, content)


def _saturated(count: tuple[int, int] | None, largest: float) -> Markup:
    if count is None or not count[1]:
        return element("td", {"class": "num", "data-value": "-1"}, "–")
    part = count[0] / count[1]
    width = f"width:{3.5 * min(1.0, part / largest):.2f}rem"
    bar = element("span", {"class": "bar", "style": width}, "") if part else None
    hint = f"{count[0]} of {count[1]}"
    shown = percent(part, 3) if 0 < part < 0.001 else percent(part, 2)
    figure = element("span", {"class": "figure"}, shown)  # of one width, so that the bars end at one place
    return element("td", {"class": "num", "data-value": f"{part:.8g}", "title": hint}, bar, figure)


def ablation_table(data: ReportData) -> Markup:
    """Accuracy per setting and ratio; differences against the baseline row, muted where within two standard errors."""
    ratios = sorted({r for row in data.ablation for r in row.accuracy})
    base = next((row for row in data.ablation if row.factor.lower() == "baseline"), None)
    rows = []
    for row in data.ablation:
        first = element("th", {"scope": "row"}, row.factor)
        error = "–" if row.standard_error is None else f"{100 * row.standard_error:.2f}"
        tail = [cell(error, row.standard_error or 0.0), cell(str(row.n_images) if row.n_images else "–", row.n_images)]
        cells = [_ablated(row, base, ratio) for ratio in ratios]
        rows.append(element("tr", {}, first, cell(row.setting), *cells, *tail))
    names = ["Factor", "Setting", *(ratio_name(r) for r in ratios), "Std. error", "Images"]
    caption = "Accuracy in % per ratio, one factor changed at a time"
    if base:
        caption += "; small figures: points against the baseline, grey where within two standard errors of both"
    return table(header(names, [False, False] + [True] * (len(ratios) + 2)), rows, caption)


def _ablated(row: Ablation, base: Ablation | None, ratio: float) -> Markup:
    value = row.accuracy.get(ratio)
    if value is None:
        return element("td", {"class": "num", "data-value": "-1"}, "–")
    parts: list[str] = [f"{100 * value:.2f}"]
    reference = base.accuracy.get(ratio) if base and row is not base else None
    if reference is not None and base is not None:
        gap = value - reference
        noise = 2 * ((row.standard_error or 0.0) ** 2 + (base.standard_error or 0.0) ** 2) ** 0.5
        css = "noise" if abs(gap) <= noise or round(gap, 4) == 0 else "better" if gap > 0 else "worse"
        parts += [" ", element("span", {"class": f"diff {css}"}, points(gap))]
    return element("td", {"class": "num", "data-value": f"{value:.8g}"}, *parts)


def layer_table(data: ReportData) -> Markup:
    """Every layer: what it is, how it ran, its groups and shifts."""
    names = ["Layer", "Kind", "Shape", "Multiplies", "Runs as", "Low limits", "Groups"]
    names += ["Activation shifts", "Weight shifts", "Engine"]
    rows = [
        element(
            "tr",
            {},
            element("th", {"scope": "row", "class": "mono", "title": layer.name}, layer.source or layer.name),
            cell(layer.kind),
            cell(layer.shape or "–", css="mono whole"),
            cell(big_number(layer.macs), layer.macs),
            cell(_runs_as(layer), css="wide"),
            cell(f"{layer.amax}, {layer.wmax}" if layer.eligible and layer.amax and layer.wmax else "–", css="whole"),
            cell(str(layer.n_groups) if layer.n_groups else "–", layer.n_groups),
            cell(_histogram(dict(sorted(Counter(layer.activation_shift).items()))), css="medium"),
            cell(_histogram(dict(layer.weight_shift_histogram)), css="medium"),
            cell(layer.engine or "–"),
        )
        for layer in data.layers
    ]
    numeric = [False, False, False, True, False, False, True, False, False, False]
    caption = (
        "All layers in graph order. Low limits: largest magnitude of a low activation and of a low weight. "
        "Shifts: value and how often; the larger, the more low bits are dropped"
    )
    return table(header(names, numeric), rows, caption)


def _runs_as(layer: LayerInfo) -> str:
    if layer.float_reason:
        return f"float: {layer.float_reason}"
    sign = "signed" if layer.signed else "unsigned"
    if not layer.eligible:
        return f"8-bit {sign}: {layer.reason or 'not eligible'}"
    return f"8-bit {sign} or low"


def _histogram(counts: dict[int, int]) -> Markup | str:
    if not counts:
        return "–"
    if len(counts) == 1:
        return str(next(iter(counts)))
    total = sum(counts.values()) or 1
    if total <= 64:
        return ", ".join(f"{shift}\u00a0×{count}" for shift, count in counts.items())
    return ", ".join(f"{shift}:\u00a0{percent(count / total, 0)}" for shift, count in counts.items() if count)
