"""Colours of the charts and the pages, and the pages' style sheet.

Categorical colours follow Okabe and Ito (safe for colour blindness). Charts are drawn in the light colours; in a page each
of these becomes its CSS variable, so that a chart follows the page into the dark.
"""

from __future__ import annotations

# Ends and middle of the map's scale, from "low first" to "low last": lightness falls or rises steadily, so that the
# order survives greyscale print and any colour vision.
RAMP_LIGHT = ("#0b3d6b", "#1a7a8f", "#5cb583", "#d6dd7a")
RAMP_DARK = ("#f4e78f", "#74c493", "#2f8d9b", "#3d62a0")
# CSS variable: light, dark. No light colour stands twice, so that each names its variable.
COLOURS = {
    "bg": ("#ffffff", "#11161d"), "panel": ("#f4f6f9", "#19212b"), "ink": ("#17202b", "#e7ecf2"),
    "muted": ("#55606e", "#a3b0bf"), "rule": ("#d7dde5", "#303c49"), "main": ("#0067a5", "#5fb6ef"),
    "pale": ("#9cc6e3", "#2b5878"), "s0": ("#b6500a", "#f09a4e"), "s1": ("#00775a", "#41c9a2"),
    "s2": ("#9a3b79", "#e491c2"), "s3": ("#7a6200", "#d3bb52"), "high": ("#e3e7ec", "#27313d"),
    "fixed": ("#aab4c0", "#5b6877"), "eight": ("#cfd7e0", "#3b4754"), "warnbg": ("#fdf1e6", "#2d2319"),
    "failed": ("#b3261e", "#f2827a"),
}  # fmt: skip
PAPER, INK, MUTED, RULE, MAIN, PALE, HIGH, FIXED, EIGHT, FAILED = (
    COLOURS[name][0] for name in ("bg", "ink", "muted", "rule", "main", "pale", "high", "fixed", "eight", "failed")
)
SERIES = tuple(COLOURS[f"s{k}"][0] for k in range(4))
LINES = (MAIN, *SERIES)  # of lines beside each other, again and again
VARIABLES = {light: f"var(--{name})" for name, (light, _) in COLOURS.items()}


def variable(colour: str) -> str:
    """The CSS value of a colour in a page; what is none of ours stays as it is."""
    return VARIABLES.get(colour.lower(), colour)


def ramp(anchors: tuple[str, ...], count: int) -> list[str]:
    """`count` colours evenly along the anchors (linear in sRGB)."""
    rgb = [tuple(int(a[i : i + 2], 16) for i in (1, 3, 5)) for a in anchors]
    colours = []
    for k in range(count):
        place = k / (count - 1) * (len(rgb) - 1) if count > 1 else 0.0
        left = min(int(place), len(rgb) - 2)
        t = place - left
        mixed = (round(a + (b - a) * t) for a, b in zip(rgb[left], rgb[left + 1], strict=True))
        colours.append("#" + "".join(f"{c:02x}" for c in mixed))
    return colours


def style_sheet(levels: int) -> str:
    """The report's CSS with `levels` colours for the map."""
    light, dark = (
        "".join(f"--{name}:{pair[k]};" for name, pair in COLOURS.items())
        + "".join(f"--m{i}:{c};" for i, c in enumerate(ramp(anchors, levels)))
        for k, anchors in enumerate((RAMP_LIGHT, RAMP_DARK))
    )
    cells = "".join(f".m{i}{{fill:var(--m{i});background:var(--m{i})}}" for i in range(levels))
    return (
        f":root{{color-scheme:light dark;{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{_BASE}{cells}{_AFTER_CELLS}"
    )


_BASE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-padding-top:3.2rem}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,"Liberation Sans",sans-serif;font-variant-numeric:tabular-nums}
main,header,footer{max-width:72rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:0 0 .25rem;line-height:1.3}
h3{font-size:1rem;margin:1.5rem 0 .4rem}
p{margin:.3rem 0 .8rem;max-width:48rem}
.lead,.note,figcaption,caption{color:var(--muted)}
.note{font-size:.87rem}
section{padding:1.6rem 0 1.4rem;border-top:1px solid var(--rule)}
section:first-of-type{border-top:0}
nav{position:sticky;top:0;z-index:2;background:var(--bg);border-bottom:1px solid var(--rule);margin-top:1.2rem}
nav ul{max-width:72rem;margin:0 auto;padding:.55rem 1.25rem;list-style:none;display:flex;gap:.3rem 1.2rem;
flex-wrap:wrap;font-size:.9rem}
a{color:var(--main);text-decoration:none}a:hover{text-decoration:underline}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.6rem,1fr));gap:.7rem;margin:1.2rem 0 0;padding:0}
.tile{background:var(--panel);border-radius:.5rem;padding:.65rem .8rem .6rem;border-left:4px solid var(--rule)}
.tile.own{border-left-color:var(--main)}
.tile dt{color:var(--muted);font-size:.82rem;overflow-wrap:anywhere}.tile dd{margin:0}
.tile .value{font-size:1.45rem;font-weight:650;line-height:1.25;overflow-wrap:anywhere}
.tiles.small .value{font-size:1.05rem}
.tile .sub{color:var(--muted);font-size:.82rem;line-height:1.35}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(22rem,100%),1fr));gap:0 1.2rem;align-items:start}
figure{margin:.6rem 0}figcaption{font-size:.87rem;margin-bottom:.2rem}
svg{display:block;width:100%;height:auto;overflow:visible}
.chart{max-width:38rem}.chart *{stroke-linejoin:round;stroke-linecap:butt}
.chart text{font-family:inherit!important;white-space:pre}
.wide{overflow-x:auto}.wide .chart{max-width:60rem;min-width:34rem;overflow:hidden}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;margin:.5rem 0 .8rem}
caption{text-align:left;padding:0 0 .35rem;font-size:.87rem}
th,td{text-align:left;padding:.3rem .8rem .3rem 0;border-bottom:1px solid var(--rule);vertical-align:baseline}
th:last-child,td:last-child{padding-right:0}
thead th{color:var(--muted);font-weight:600;vertical-align:bottom}
tbody th{font-weight:500;overflow-wrap:anywhere;min-width:8.5rem}
.num{text-align:right;white-space:nowrap}
.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:.9em;
overflow-wrap:anywhere}
.whole{white-space:nowrap}
td.wide{min-width:10.5rem}td.medium{min-width:7rem}tbody th.mono{min-width:9.5rem}
tr.mark td,tr.mark th{background:var(--panel);box-shadow:inset 0 1px 0 var(--main),inset 0 -1px 0 var(--main)}
tr.base td,tr.base th{color:var(--muted)}
th button{all:unset;cursor:pointer;color:inherit;font-weight:600}th button:focus-visible{outline:2px solid var(--main)}
th button::after{content:"\\2195";opacity:.45;margin-left:.25em;font-weight:400}
th[aria-sort=ascending] button::after{content:"\\2191";opacity:1}
th[aria-sort=descending] button::after{content:"\\2193";opacity:1}
.warn{background:var(--warnbg);border-left:4px solid var(--s0);padding:.55rem .8rem;border-radius:.25rem;
max-width:48rem}
.check{border-left:4px solid var(--main);padding:.1rem .8rem;max-width:48rem}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;font-size:.87rem;margin:.4rem 0;padding:0;list-style:none}
.legend li{display:flex;align-items:center;gap:.4rem}
.legend span{width:1.1rem;height:.9rem;border-radius:2px;flex:none}
.dial{display:flex;flex-wrap:wrap;align-items:center;gap:.5rem 1.2rem;background:var(--panel);border-radius:.5rem;
padding:.7rem 1rem;margin:.8rem 0;position:sticky;top:2.6rem;z-index:1}
.dial label{font-weight:600}.dial input{width:14rem;accent-color:var(--main)}
.dial output{font-size:.92rem}.dial b{font-size:1.15rem;display:inline-block;min-width:4rem}
.map{width:100%;table-layout:fixed}.map th:first-child{width:22%}.map .cells{width:auto}
.map .low{width:5.2rem}.map .macs{width:7rem}
.map td,.map tbody th{padding-top:.16rem;padding-bottom:.16rem;border-bottom:0;vertical-align:middle}
.map tbody th{font-size:.86rem;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.map td svg{height:17px}.map td.cells{padding-right:.8rem}
.map path{stroke:var(--bg);stroke-width:1.5px;vector-effect:non-scaling-stroke}
.map path.fine{stroke-width:.4px}
.bar{display:inline-block;height:.6rem;background:var(--fixed);border-radius:1px;vertical-align:middle;min-width:1px}
#cell-info{min-height:1.5em}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(15.5rem,1fr));gap:.9rem 1.3rem;margin-top:.6rem}
.panels figure{margin:0}
.panels figcaption{color:var(--ink);font-weight:600;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.panels figcaption span{color:var(--muted);font-weight:400}
.better{color:var(--main)}.worse{color:var(--s0)}.noise{color:var(--muted)}
.diff{font-size:.82rem;white-space:nowrap}
.figure{display:inline-block;min-width:4.2rem}
dl.facts{display:grid;grid-template-columns:minmax(8rem,max-content) minmax(0,1fr);gap:.15rem 1.2rem;margin:.4rem 0;
font-size:.9rem}
dl.facts dt{color:var(--muted)}dl.facts dd{margin:0;overflow-wrap:anywhere}
dl.facts dl.facts{margin:0}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--main);font-weight:600}
footer{padding-top:1rem;padding-bottom:2.5rem;color:var(--muted);font-size:.87rem;border-top:1px solid var(--rule)}
"""
_AFTER_CELLS = """
.never,.off{fill:var(--high);background:var(--high)}
@media print{body{font-size:10.5pt}nav,.dial,#cell-info{display:none}section{break-inside:auto}
figure,.tile,tr{break-inside:avoid}h2,h3{break-after:avoid}.scroll{overflow:visible}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
@media (prefers-reduced-motion:no-preference){.map path{transition:fill .15s}}
"""
