"""The report's numbers as text: CSV for other programs, a Markdown table of the curve for a README."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from bitdial.report.data import LayerInfo, ReportData
from bitdial.report.markup import percent, points, ratio_name, visible
from bitdial.report.series import reference_accuracy

Cell = str | int | float | bool | None


def csv_tables(data: ReportData) -> dict[str, str]:
    """{file name: CSV text} of every table that has rows: curve, baselines, layers, saturation, ablation, search.

    One header row, commas, line ends as in RFC 4180. Numbers are written so that they read back exactly; shares and
    accuracies are 0..1; what was not measured is empty. Control characters in names are written as \\uXXXX, and text
    that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    tables: dict[str, tuple[Sequence[str], list[Sequence[Cell]]]] = {
        "curve.csv": (
            ("ratio", "accuracy", "agreement", "low_share", "eligible_share", "distance"),
            [(p.ratio, p.accuracy, p.agreement, p.low_share, p.eligible_share, p.distance) for p in data.curve],
        ),
        "baselines.csv": (
            ("label", "ratio", "accuracy", "agreement"),
            [(b.label, b.ratio, b.accuracy, b.agreement) for b in data.baselines],
        ),
        "layers.csv": (
            (
                *("name", "source", "kind", "shape", "macs", "eligible", "reason", "float_reason", "engine", "signed"),
                *("amax", "wmax", "groups", "activation_shifts", *(f"low_share_at_{r!r}" for r in data.ratios)),
            ),
            [_layer(layer, len(data.ratios)) for layer in data.layers],
        ),
        "saturation.csv": (
            ("layer", "ratio", "saturated", "total"),
            [(s.layer, s.ratio, s.saturated, s.total) for s in data.saturation],
        ),
        "ablation.csv": (
            ("factor", "setting", "ratio", "accuracy", "standard_error", "images"),
            [
                (row.factor, row.setting, ratio, accuracy, row.standard_error, row.n_images)
                for row in data.ablation
                for ratio, accuracy in row.accuracy.items()
            ],
        ),
        "search.csv": (
            ("target", "generation", "best", "mean", "images"),
            [(g.target, g.generation, g.best, g.mean, g.n_images) for g in data.search.history],
        ),
    }
    return {name: _csv(header, rows) for name, (header, rows) in tables.items() if rows}


def _layer(layer: LayerInfo, n_ratios: int) -> tuple[Cell, ...]:
    """One row of layers.csv; the last `n_ratios` cells are shares of the layer's multiplies that run low."""
    return (
        *(layer.name, layer.source, layer.kind, layer.shape, layer.macs, layer.eligible, layer.reason),
        *(layer.float_reason, layer.engine, layer.signed, layer.amax or None, layer.wmax or None, layer.n_groups),
        " ".join(str(shift) for shift in layer.activation_shift),
        *(layer.low_fraction(i) for i in range(n_ratios)),
    )


def _csv(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(header)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return stream.getvalue()


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, str):
        return repr(value)
    # Names come from model files: a spreadsheet that opens the table must not run them.
    shown = visible(value).replace("\r", "")
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@", "\t", "\n")) else shown


def curve_markdown(data: ReportData) -> str:
    """The curve and its baselines as a Markdown table, one row per setting; "" without any of them.

    Differences are in points against the float baseline, else against the 8-bit setting.
    """
    if not data.curve and not data.baselines:
        return ""
    reference = reference_accuracy(data)

    def row(name: str, accuracy: float | None, agreement: float | None, low: float | None) -> str:
        gap = "–" if accuracy is None or reference is None else points(accuracy - reference[1])
        return f"| {name} | {percent(accuracy, 2)} | {gap} | {percent(agreement, 2)} | {percent(low)} |"

    lines = ["| setting | accuracy | difference | agreement with 8-bit | low multiplies |", "|---|--:|--:|--:|--:|"]
    for baseline in data.baselines:
        at = "" if baseline.ratio is None else f", {ratio_name(baseline.ratio)}"
        lines.append(row(_markdown_text(baseline.label) + at, baseline.accuracy, baseline.agreement, None))
    for p in data.curve:
        lines.append(row(f"ratio {ratio_name(p.ratio)}", p.accuracy, p.agreement, p.low_share))
    return "\n".join(lines) + "\n"


def _markdown_text(value: str) -> str:
    """`value` as it is read, in one table cell: no markup and no line ends of its own."""
    line = " ".join(visible(value).split())
    return "".join(f"\\{c}" if c in "\\`*_{}[]()<>#|!~&$" else c for c in line)
