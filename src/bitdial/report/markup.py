"""Elements of HTML and inline SVG, escaped by default.

Names in a report come from the user's model and may be hostile. Text reaches the page only through `element`, which
escapes every string that is not `Markup` already; nothing else builds tags.
"""

from __future__ import annotations

import html
import json
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

VOID = frozenset({"meta", "link", "input", "br", "hr", "col", "rect", "line", "path", "circle", "polyline", "use"})


class Markup(str):
    """Text that is markup already and is not escaped again."""

    __slots__ = ()


Child = str | Markup | None
Attributes = Mapping[str, str | float | int | bool | None]


def visible(value: str) -> str:
    """`value` with control, surrogate and bidirectional-override characters written out as \\uXXXX.

    They are invalid in XML, cannot be encoded, or would reorder the text around them.
    """
    return "".join(
        f"\\u{ord(c):04x}"
        if unicodedata.category(c) in ("Cc", "Cs", "Cf") and c not in "\n\t" or ord(c) & 0xFFFE == 0xFFFE
        else c
        for c in value
    )


def escape(value: str) -> str:
    """`value` safe as element content and as a quoted attribute."""
    return value if isinstance(value, Markup) else html.escape(visible(value), quote=True)


def number(value: float) -> str:
    """A coordinate with at most two decimals and no trailing zeros."""
    written = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return "0" if written in ("-0", "") else written


def element(tag: str, attributes: Attributes | None = None, *children: Child) -> Markup:
    """One element; None attributes and children are left out, True attributes repeat their name."""
    parts = [f"<{tag}"]
    for name, value in (attributes or {}).items():
        if value is None or value is False:
            continue
        shown = name if value is True else value if isinstance(value, str) else number(value)
        parts.append(f' {name}="{html.escape(visible(shown), quote=True)}"')
    if tag in VOID and not children:
        parts.append(" />")
    else:
        parts.append(">")
        parts.extend(escape(child) for child in children if child is not None)
        parts.append(f"</{tag}>")
    return Markup("".join(parts))


def join(children: Iterable[Child], separator: str = "") -> Markup:
    """Several children as one piece of markup."""
    return Markup(separator.join(escape(child) for child in children if child is not None))


def json_script(identifier: str, content: Any) -> Markup:
    """A data block for the page's script. Only ASCII and no <, > or &, so that nothing can end the block early."""
    body = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        body = body.replace(character, f"\\u{ord(character):04x}")
    return element("script", {"type": "application/json", "id": identifier}, Markup(body))


def shorten(value: str, length: int) -> str:
    """At most `length` characters; the middle gives way, because names differ at both ends."""
    value = visible(value).replace("\n", " ")
    if len(value) <= length:
        return value
    head = (length - 1) // 2
    return f"{value[:head]}…{value[len(value) - (length - 1 - head) :]}"


def percent(value: float | None, digits: int = 1) -> str:
    """0.8787 -> "87.87 %" with a no-break space; None -> an en dash."""
    return "–" if value is None else f"{100 * value:.{digits}f}\u00a0%"


def ratio_name(ratio: float) -> str:
    """0.5 -> "50 %", 0.125 -> "12.5 %"."""
    return f"{100 * ratio:.4g}\u00a0%"


def points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign."""
    shown = f"{100 * difference:+.2f}"
    return "±0.00" if shown in ("+0.00", "-0.00") else shown.replace("-", "\u2212")


def big_number(value: float) -> str:
    """1234567 -> "1.23 M"."""
    size = abs(value)
    for limit, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}\u00a0{suffix}"
    return f"{value:.4g}"
