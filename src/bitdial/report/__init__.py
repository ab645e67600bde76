"""What a quantized model costs at each ratio, as one self-contained HTML page, PNG plots and CSV tables.

`collect_report` makes the data of a report from a program and what was measured on it; `render_html`, `render_plots`,
`csv_tables` and `curve_markdown` show them; `write_report` writes files. Needs NumPy, and matplotlib for plots only.
"""

from __future__ import annotations

from bitdial.report.charts import render_plots
from bitdial.report.collect import collect_report
from bitdial.report.data import (
    Ablation,
    Baseline,
    CurvePoint,
    FloatOp,
    LayerInfo,
    ReportData,
    Saturation,
    Search,
    SearchGeneration,
)
from bitdial.report.drawing import check_plotting
from bitdial.report.page import render_html
from bitdial.report.tables import csv_tables, curve_markdown
from bitdial.report.writing import write_report

__all__ = [
    "Ablation",
    "Baseline",
    "CurvePoint",
    "FloatOp",
    "LayerInfo",
    "ReportData",
    "Saturation",
    "Search",
    "SearchGeneration",
    "check_plotting",
    "collect_report",
    "csv_tables",
    "curve_markdown",
    "render_html",
    "render_plots",
    "write_report",
]
