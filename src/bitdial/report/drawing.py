"""Charts: each is one matplotlib figure, saved as PNG or SVG, or embedded into a page as that same SVG.

matplotlib is imported when a chart is drawn, and drawn on directly: no window system, no global state, and the settings
of the user's matplotlibrc do not change the result. Equal charts give equal bytes with the same matplotlib.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdial.errors import ConfigError
from bitdial.files import write_atomically
from bitdial.report.axis import Axis, tick_name
from bitdial.report.markup import Markup, element, number, visible
from bitdial.report.style import INK, MUTED, PAPER, RULE, variable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

FORMATS = {".png": "png", ".svg": "svg"}
DPI = 160
SMALL = 8.0  # points; of remarks and names beside lines
DASHES: tuple[tuple[float, tuple[float, ...]], ...] = ((0, (5, 3)), (0, (1.5, 2.5)), (0, (6, 2, 2, 2)), (0, (3, 1.5)))
MARKERS = ("o", "s", "D", "^", "P", "v")

# Names come from models and may hold "$": nothing in them is mathematics. Text stays text in an SVG, and its identifiers
# do not change from run to run.
SETTINGS = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "bitdial",
    "font.size": 9,
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": RULE,
    "legend.frameon": False,
    "legend.fontsize": SMALL,
}


@dataclass(frozen=True)
class Chart:
    """One picture. draw puts it onto an empty figure of `size` inches; where it stands alone, `remark` stands below it.

    title, told: what it shows, in words, for whoever does not see it. Names that are drawn must have gone through
    `markup.visible` or `markup.shorten`.
    """

    title: str
    told: str
    draw: Callable[[FigureBase], None]
    size: tuple[float, float] = (5.2, 3.2)
    remark: str = ""


def can_draw() -> bool:
    """Whether matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def check_plotting() -> None:
    """Raise ConfigError, naming the remedy, if matplotlib is missing."""
    if not can_draw():
        raise ConfigError("plots need matplotlib: pip install 'bitdial[report]'")


def check_plot_path(path: Path, option: str = "--plot") -> None:
    """Raise ConfigError for another ending than .png or .svg, or where matplotlib is missing."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{option}: {path.name} ends neither in .png nor in .svg; give a name that does")
    check_plotting()


def plot_for(chart: Chart, path: Path) -> bytes:
    """The chart in the format of the path's ending. Raises ConfigError."""
    check_plot_path(path)
    return save(chart, FORMATS[path.suffix.lower()])


def write_plot(chart: Chart, path: Path) -> None:
    """Write the chart in the format of the path's ending, whole or not at all. Raises ConfigError, OutputError."""
    write_atomically(path, plot_for(chart, path))


def save(chart: Chart, kind: str = "png") -> bytes:
    """The chart as "png" or "svg". Raises ConfigError for any other kind, or where matplotlib is missing."""
    if kind not in FORMATS.values():
        raise ConfigError(f"plot format '{kind}' is neither png nor svg")
    metadata = (
        {"Software": None} if kind == "png" else {"Date": None, "Creator": "bitdial", "Title": visible(chart.title)}
    )
    return _drawn(chart, chart.remark, format=kind, facecolor=PAPER, metadata=metadata)


def _drawn(chart: Chart, remark: str, **how: Any) -> bytes:
    check_plotting()
    import matplotlib.style
    from matplotlib.figure import Figure

    stream = io.BytesIO()
    with matplotlib.style.context(["default", SETTINGS]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the font lacks a letter of some name
        figure = Figure(figsize=chart.size, dpi=DPI, layout="constrained")
        chart.draw(figure)
        if remark:
            figure.supxlabel(remark, fontsize=SMALL, color=MUTED, x=0.01, ha="left")
        figure.savefig(stream, dpi=DPI, **how)
    return stream.getvalue()


def grid(
    title: str,
    charts: Sequence[Chart],
    columns: int,
    remark: str = "",
    key: Sequence[tuple[str, str]] = (),
    titled: bool = True,
) -> Chart:
    """Charts of one size beside and below each other, `titled` with its title above each. key: (colour, text) for all of them."""
    columns = max(1, min(columns, len(charts)))
    rows = max(1, math.ceil(len(charts) / columns))
    width, height = charts[0].size if charts else Chart.size

    def draw(figure: FigureBase) -> None:
        places = figure.subfigures(rows, columns, squeeze=False).flat
        for place, chart in zip(places, charts, strict=False):
            if titled:
                place.suptitle(chart.title, fontsize=9, color=MUTED, x=0.02, ha="left")
            chart.draw(place)
        if key:
            legend(figure, [patch(*entry) for entry in key], 1 if columns == 1 else 4)

    lines = bool(remark) + bool(key) * (len(key) if columns == 1 else 1)
    told = "; ".join(f"{chart.title}: {chart.told}" for chart in charts)
    return Chart(title, told, draw, (columns * width, rows * (height + 0.2 * titled) + 0.25 * lines), remark)


def legend(figure: FigureBase, handles: Sequence[Patch | Line2D], columns: int = 4) -> None:
    """Names above the picture, flush left."""
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=1.6)


def patch(colour: str, name: str) -> Patch:
    """A filled box for a legend."""
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, label=visible(name))


def line(name: str, **style: Any) -> Line2D:
    """A line for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=visible(name), **style)


def fit(axes: Axes, x: Axis | None = None, y: Axis | None = None) -> None:
    """Give the axes these ranges, scales and ticks."""
    from matplotlib.ticker import NullLocator

    for name, extent in (("x", x), ("y", y)):
        if extent is None:
            continue
        if extent.logarithmic:
            axes.set(**{f"{name}scale": "log"})
            getattr(axes, f"{name}axis").set_minor_locator(NullLocator())
        axes.set(**{f"{name}lim": (extent.low, extent.high)})
        getattr(axes, f"set_{name}ticks")(extent.ticks, [tick_name(t) for t in extent.ticks])


# ---------------------------------------------------------------------------------------------- into a page


def embed(chart: Chart, identifier: str) -> Markup | None:
    """The chart as inline SVG of a page, as wide as its place, in the page's font and colours; None without matplotlib.

    identifier: unique in the page. All the SVG's own identifiers start with it, and every text goes through `element`.
    """
    if not can_draw():
        return None
    root = ElementTree.fromstring(_drawn(chart, "", format="svg", facecolor="none", metadata={"Date": None}))
    used = (name for node in root.iter() for value in node.attrib.values() for name in _REFERENCE.findall(value))
    names = {name: f"{identifier}-{k}" for k, name in enumerate(dict.fromkeys(used))}
    return element(
        "svg",
        {
            "class": "chart",
            "viewBox": root.attrib["viewBox"],
            "role": "img",
            "aria-labelledby": f"{identifier}-title {identifier}-desc",
        },
        element("title", {"id": f"{identifier}-title"}, chart.title),
        element("desc", {"id": f"{identifier}-desc"}, chart.told),
        *(_inline(node, names) for node in root),
    )


_REFERENCE = re.compile(r"(?:(?<=url\(#)[^)]+(?=\)$)|(?<=^#)[a-z]\w+$)")  # url(#name), and a whole attribute "#name"
_NUMBER = re.compile(r"-?\d+\.\d+")
_SPACE = re.compile(r" ?([A-Za-z]) ?")  # around a command of a path
_REPEATED = re.compile(r"L([^A-Za-z]+)(?:L\1(?=[A-Za-z]))+")  # to where it is already


def _inline(node: ElementTree.Element, names: dict[str, str]) -> Markup | None:
    tag = _local(node.tag)
    if tag in ("metadata", "style", "title"):
        return None
    attributes: dict[str, str | float | int | bool | None] = {}
    for key, value in node.attrib.items():
        name = _local(key)
        if name == "id":
            attributes[name] = names.get(value)
        elif name == "style":
            attributes[name] = _style(value)
        elif name == "d":
            attributes[name] = _REPEATED.sub(r"L\1", _SPACE.sub(r"\1", " ".join(_rounded(value).split())))
        elif not value.startswith("rotate(-0 "):
            attributes[name] = _REFERENCE.sub(lambda match: names[match[0]], _rounded(value))
    if attributes.get("style") == "fill:none":
        return None  # the empty background of a figure or of axes
    children = [_inline(child, names) for child in node]
    if tag in ("g", "defs") and not any(value is not None for value in attributes.values()):
        kept = [child for child in children if child]
        return Markup("".join(kept)) if tag == "g" else element(tag, {}, *kept) if kept else None
    text = node.text if tag == "text" else None
    return element(tag, attributes, text, *children)


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _rounded(value: str) -> str:
    return _NUMBER.sub(lambda match: number(float(match[0])), value)


def _style(value: str) -> str:
    """An inline style with the page's colours and without font families."""
    parts = []
    for declaration in value.split("; "):
        name, _, content = declaration.partition(": ")
        if name != "font-family":
            parts.append(f"{name}:{variable(content)}")
    return ";".join(parts)
