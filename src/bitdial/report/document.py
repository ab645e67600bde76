"""What every page has: one head and frame, and the blocks its sections are made of.

A page is one file: no request leaves it, and its content policy forbids any.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitdial.report.drawing import Chart, can_draw, embed
from bitdial.report.markup import Attributes, Markup, big_number, element, join, percent, shorten
from bitdial.report.style import style_sheet, variable

UNDRAWN = (
    "This page was written without its charts, which need matplotlib: pip install 'bitdial[report]' and write it again. "
    "The tables are complete."
)


@dataclass(frozen=True)
class Section:
    """identifier, short: the target and the name of its link; a section without them has none."""

    heading: str
    content: Sequence[Markup | None]
    lead: str = ""
    identifier: str = ""
    short: str = ""


def page(
    title: str,
    kind: str,
    sections: Sequence[Section],
    *,
    lead: Sequence[str] = (),
    tiles: Sequence[Markup] = (),
    levels: int = 1,
    script: str = "",
) -> str:
    """HTML text, also well-formed XML after the doctype. Equal arguments give equal text.

    kind: follows the title in the window's name. lead: parts of the line below the title. levels: colours of the map.
    script: the only one that the page's policy lets run.
    """
    links = [element("li", {}, element("a", {"href": f"#{s.identifier}"}, s.short)) for s in sections if s.short]
    body = element(
        "body",
        {},
        element(
            "header",
            {},
            element("h1", {}, title),
            element("p", {"class": "lead"}, " · ".join(part for part in lead if part)),
            element("dl", {"class": "tiles"}, *tiles) if tiles else None,
        ),
        element("nav", {"aria-label": "Sections"}, element("ul", {}, *links)) if links else None,
        element("main", {}, None if can_draw() else element("p", {"class": "warn"}, UNDRAWN), *map(_section, sections)),
        element(
            "footer",
            {},
            "Written by bitdial. This file is complete in itself: it loads nothing from the network, and its content "
            "policy forbids it to.",
        ),
        element("script", {}, Markup(_guarded(script))) if script else None,
    )
    return f"<!DOCTYPE html>\n{element('html', {'lang': 'en'}, _head(f'{title} – {kind}', levels, script), body)}\n"


def _head(title: str, levels: int, script: str) -> Markup:
    digest = base64.b64encode(hashlib.sha256(_guarded(script).encode()).digest()).decode()
    scripts = f"script-src 'sha256-{digest}'; " if script else ""
    policy = (
        f"default-src 'none'; {scripts}style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    return element(
        "head",
        {},
        element("meta", {"charset": "utf-8"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "referrer", "content": "no-referrer"}),
        element("link", {"rel": "icon", "href": "data:,"}),
        element("title", {}, title),
        element("style", {}, Markup(style_sheet(levels))),
    )


def _guarded(script: str) -> str:
    """The script in a CDATA section that HTML reads as comments, so that the page parses as XML too."""
    return f"//<![CDATA[{script}//]]>"


def _section(section: Section) -> Markup:
    heading = f"{section.identifier}-heading" if section.identifier else None
    return element(
        "section",
        {"id": section.identifier or None, "aria-labelledby": heading},
        element("h2", {"id": heading}, section.heading),
        element("p", {"class": "lead"}, section.lead) if section.lead else None,
        *section.content,
    )


def figure(
    chart: Chart, identifier: str, *caption: str, hint: str | None = None, css: str | None = None
) -> Markup | None:
    """A chart with its caption above it; None without matplotlib. hint: the whole name where the caption is shortened."""
    drawn = embed(chart, identifier)
    if drawn is None:
        return None
    told = element("figcaption", {"title": hint}, *caption) if caption else None
    return element("figure", {"class": css}, told, drawn)


def tile(name: str, value: str, remark: str, css: str = "", colour: str = "") -> Markup:
    """One number of the headline. colour: of its edge, one of `style`'s."""
    return element(
        "div",
        {"class": f"tile {css}".strip(), "style": f"border-left-color:{variable(colour)}" if colour else None},
        element("dt", {}, shorten(name, 40)),
        element("dd", {"class": "value"}, value),
        element("dd", {"class": "sub"}, remark),
    )


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Boxes with names; each entry is (one of `style`'s colours or the CSS class of a colour of the map, text)."""
    items = []
    for colour, name in entries:
        plain: Attributes = {"style": f"background:{variable(colour)}"} if colour.startswith("#") else {"class": colour}
        items.append(element("li", {}, element("span", plain, ""), name))
    return element("ul", {"class": "legend"}, *items)


def note(*content: str) -> Markup:
    return element("p", {"class": "note"}, *content)


def warning(content: str) -> Markup:
    return element("p", {"class": "warn"}, content)


def folded(summary: str, content: Markup) -> Markup:
    """What is shown when asked for; without matplotlib at once, since no chart shows it."""
    return element("details", {"open": not can_draw()}, element("summary", {}, summary), content)


def facts(content: Mapping[str, object]) -> Markup:
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


def without_unit(key: str) -> str:
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
