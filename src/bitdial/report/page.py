"""The report of a model as one HTML page."""

from __future__ import annotations

from collections.abc import Callable

from bitdial.report import sections
from bitdial.report.data import ReportData
from bitdial.report.document import Section, page
from bitdial.report.markup import Markup
from bitdial.report.script import SCRIPT
from bitdial.report.series import low_levels

# identifier, heading, short name for the navigation, lead, content
SECTIONS: tuple[tuple[str, str, str, str, Callable[[ReportData], Markup | None]], ...] = (
    ("warnings", "Read with care", "Warnings", "", sections.warnings_section),
    ("curve", "What each setting of the dial costs", "Curve", "", sections.curve_section),
    ("answers", "Which ratios are of use", "Answers", "", sections.answers_section),
    (
        "executed",
        "What was executed",
        "Executed",
        "How much of the work ran at low precision, what did not, and why.",
        sections.executed_section,
    ),
    (
        "map",
        "Which groups are low",
        "Map",
        "One row per layer, one cell per group of feature channels. The filled part of a row is the part of the "
        "layer's multiplies that runs at low precision.",
        sections.map_section,
    ),
    (
        "ranges",
        "Value ranges and unused bits",
        "Ranges",
        "Groups whose values stay small leave high bits of the 8-bit range unused; low precision keeps the highest "
        "bits that are used. Heights are bits: log2 of one plus the largest magnitude.",
        sections.range_section,
    ),
    (
        "saturation",
        "Saturation",
        "Saturation",
        "Values larger than calibration saw, or than the chosen shift holds, are clipped.",
        sections.saturation_section,
    ),
    ("ablation", "Ablation", "Ablation", "", sections.ablation_section),
    (
        "search",
        "Search",
        "Search",
        "Fitness is the distance between a candidate's soft labels and the 8-bit model's on calibration data; lower is "
        "better.",
        sections.search_section,
    ),
    ("layers", "Layers", "Layers", "", sections.layer_section),
    ("layout", "Layout", "Layout", "How channels were permuted and grouped in memory.", sections.layout_section),
    ("provenance", "Provenance", "Provenance", "", sections.provenance_section),
)


def render_html(data: ReportData) -> str:
    """The report as HTML text (also well-formed XML after the doctype). Equal data give equal text."""
    built = ((identifier, heading, short, lead, build(data)) for identifier, heading, short, lead, build in SECTIONS)
    return page(
        data.title,
        "bitdial report",
        [
            Section(heading, [content], lead, identifier, short)
            for identifier, heading, short, lead, content in built
            if content
        ],
        lead=(data.model, _machine(data), data.created),
        tiles=sections.tiles(data),
        levels=max(1, len(low_levels(data))),
        script=SCRIPT,
    )


def _machine(data: ReportData) -> str:
    return next((str(data.provenance[k]) for k in ("cpu", "cpu_name") if data.provenance.get(k)), "")
