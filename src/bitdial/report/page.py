"""The whole report as one HTML file: no request leaves it, and its content policy forbids any."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable

from bitdial.report import sections
from bitdial.report.data import ReportData
from bitdial.report.markup import Markup, element, join
from bitdial.report.range_chart import HATCH
from bitdial.report.script import SCRIPT
from bitdial.report.series import low_levels
from bitdial.report.style import style_sheet

# identifier, heading, short name for the navigation, lead, content
SECTIONS: tuple[tuple[str, str, str, str, Callable[[ReportData], Markup | None]], ...] = (
    ("warnings", "Read with care", "Warnings", "", sections.warnings_section),
    ("curve", "What each setting of the dial costs", "Curve", "", sections.curve_section),
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
    shown = []
    for identifier, heading, short, lead, build in SECTIONS:
        content = build(data)
        if content is not None:
            shown.append((identifier, heading, short, lead, content))
    blocks = []
    for identifier, heading, _, lead, content in shown:
        title = element("h2", {"id": f"{identifier}-heading"}, heading)
        intro = element("p", {"class": "lead"}, lead) if lead else None
        attributes = {"id": identifier, "aria-labelledby": f"{identifier}-heading"}
        blocks.append(element("section", attributes, title, intro, content))
    links = [element("li", {}, element("a", {"href": f"#{i}"}, short)) for i, _, short, _, _ in shown]
    navigation = element("nav", {"aria-label": "Sections"}, element("ul", {}, *links)) if links else None
    subtitle = " · ".join(part for part in (data.model, _machine(data), data.created) if part)
    head = element(
        "header", {}, element("h1", {}, data.title), element("p", {"class": "lead"}, subtitle), sections.tiles(data)
    )
    foot = element(
        "footer",
        {},
        "Written by bitdial. This file is complete in itself: it loads nothing from the network, and its content policy "
        "forbids it to.",
    )
    body = element(
        "body", {}, HATCH, head, navigation, element("main", {}, join(blocks)), foot,
        element("script", {}, Markup(_guarded(SCRIPT))),
    )  # fmt: skip
    return f"<!DOCTYPE html>\n{element('html', {'lang': 'en'}, _head(data), body)}\n"


def _machine(data: ReportData) -> str:
    return next((str(data.provenance[k]) for k in ("cpu", "cpu_name") if data.provenance.get(k)), "")


def _guarded(script: str) -> str:
    """The script in a CDATA section that HTML reads as comments, so that the page parses as XML too."""
    return f"//<![CDATA[{script}//]]>"


def _head(data: ReportData) -> Markup:
    digest = base64.b64encode(hashlib.sha256(_guarded(SCRIPT).encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return element(
        "head",
        {},
        element("meta", {"charset": "utf-8"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "referrer", "content": "no-referrer"}),
        element("link", {"rel": "icon", "href": "data:,"}),
        element("title", {}, f"{data.title} – bitdial report"),
        element("style", {}, Markup(style_sheet(max(1, len(low_levels(data)))))),
    )
