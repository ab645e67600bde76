"""Colours of the plots and the style sheet of the HTML report.

Categorical colours follow Okabe and Ito (safe for colour blindness).
"""

from __future__ import annotations

# Ends and middle of the map's scale, from "low first" to "low last": lightness falls or rises steadily, so that the
# order survives greyscale print and any colour vision.
RAMP_LIGHT = ("#0b3d6b", "#1a7a8f", "#5cb583", "#d6dd7a")
RAMP_DARK = ("#f4e78f", "#74c493", "#2f8d9b", "#3d62a0")
SERIES_LIGHT = ("#b6500a", "#00775a", "#9a3b79", "#7a6200")
MAIN_LIGHT = "#0067a5"
PALE_LIGHT = "#9cc6e3"
INK_LIGHT = "#17202b"
MUTED_LIGHT = "#55606e"
RULE_LIGHT = "#d7dde5"
HIGH_LIGHT = "#e3e7ec"


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
    light = "".join(f"--m{i}:{c};" for i, c in enumerate(ramp(RAMP_LIGHT, levels)))
    dark = "".join(f"--m{i}:{c};" for i, c in enumerate(ramp(RAMP_DARK, levels)))
    cells = "".join(f".m{i}{{fill:var(--m{i});background:var(--m{i})}}" for i in range(levels))
    root_light = _LIGHT + light
    return (
        f":root{{color-scheme:light dark;{root_light}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}{dark}}}}}{_BASE}{cells}{_AFTER_CELLS}"
    )


_LIGHT = (
    "--bg:#fff;--panel:#f4f6f9;--ink:#17202b;--muted:#55606e;--rule:#d7dde5;--main:#0067a5;--pale:#9cc6e3;"
    "--s0:#b6500a;--s1:#00775a;--s2:#9a3b79;--s3:#7a6200;--high:#e3e7ec;--fixed:#aab4c0;--eight:#cfd7e0;"
    "--warn:#b6500a;--warnbg:#fdf1e6;--good:#0067a5;--bad:#b6500a;"
)
_DARK = (
    "--bg:#11161d;--panel:#19212b;--ink:#e7ecf2;--muted:#a3b0bf;--rule:#303c49;--main:#5fb6ef;--pale:#2b5878;"
    "--s0:#f09a4e;--s1:#41c9a2;--s2:#e491c2;--s3:#d3bb52;--high:#27313d;--fixed:#5b6877;--eight:#3b4754;"
    "--warn:#f09a4e;--warnbg:#2d2319;--good:#5fb6ef;--bad:#f09a4e;"
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
.tile.own{border-left-color:var(--main)}.tile.s0{border-left-color:var(--s0)}
.tile dt{color:var(--muted);font-size:.82rem;overflow-wrap:anywhere}.tile dd{margin:0}
.tile .value{font-size:1.45rem;font-weight:650;line-height:1.25;overflow-wrap:anywhere}
.tiles.small .value{font-size:1.05rem}
.tile .sub{color:var(--muted);font-size:.82rem;line-height:1.35}
.pair{display:grid;grid-template-columns:minmax(0,1.75fr) minmax(0,1fr);gap:1.2rem;align-items:start}
@media (max-width:52rem){.pair{grid-template-columns:minmax(0,1fr)}.pair figure+figure{max-width:28rem}}
figure{margin:.6rem 0}figcaption{font-size:.87rem;margin-bottom:.2rem}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-family:inherit;fill:var(--ink)}
svg .tick{fill:var(--muted)}svg .grid{stroke:var(--rule);stroke-width:1}svg .axis{stroke:var(--muted);stroke-width:1}
.halo{paint-order:stroke;stroke:var(--bg);stroke-width:4px;stroke-linejoin:round}
.own-line{fill:none;stroke:var(--main);stroke-width:2.5}.own-dot{fill:var(--main);stroke:var(--bg);stroke-width:1.5}
.own-text{fill:var(--main)!important;font-weight:650}
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
.warn{background:var(--warnbg);border-left:4px solid var(--warn);padding:.55rem .8rem;border-radius:.25rem;
max-width:48rem}
.check{border-left:4px solid var(--main);padding:.1rem .8rem;max-width:48rem}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;font-size:.87rem;margin:.4rem 0;padding:0;list-style:none}
.legend li{display:flex;align-items:center;gap:.4rem}
.legend svg{width:1.1rem;height:.9rem;flex:none}
.swatch{width:1.1rem;height:.9rem;border-radius:2px;display:inline-block;border:1px solid var(--rule)}
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
.k-kept{fill:var(--main)}.k-dropped{fill:var(--pale)}.k-clipped{fill:var(--s0)}.k-window{fill:none;stroke:var(--s0);stroke-width:1.5}
.k-unused{fill:url(#hatch)}.hatch-line{stroke:var(--fixed);stroke-width:1.2}.hatch-bg{fill:var(--panel)}
.x-low{fill:var(--main)}.x-eight{fill:var(--eight)}.x-fixed{fill:var(--fixed)}.x-float{fill:var(--s0)}
.better{color:var(--good)}.worse{color:var(--bad)}.noise{color:var(--muted)}
.diff{font-size:.82rem;white-space:nowrap}
.figure{display:inline-block;min-width:4.2rem}
dl.facts{display:grid;grid-template-columns:minmax(8rem,max-content) minmax(0,1fr);gap:.15rem 1.2rem;margin:.4rem 0;
font-size:.9rem}
dl.facts dt{color:var(--muted)}dl.facts dd{margin:0;overflow-wrap:anywhere}
dl.facts dl.facts{margin:0}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--main);font-weight:600}
footer{padding-top:1rem;padding-bottom:2.5rem;color:var(--muted);font-size:.87rem;border-top:1px solid var(--rule)}
.visually-hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
"""
_AFTER_CELLS = """
.never,.off{fill:var(--high);background:var(--high)}
@media print{body{font-size:10.5pt}nav,.dial,#cell-info{display:none}section{break-inside:auto}
figure,.tile,tr{break-inside:avoid}h2,h3{break-after:avoid}.scroll{overflow:visible}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
@media (prefers-reduced-motion:no-preference){.map path{transition:fill .15s}}
"""
