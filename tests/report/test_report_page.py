"""The HTML page: nothing escapes, nothing is loaded, empty sections are left out, the map shows the nesting."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import example as example_of
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdial.report import (
    Ablation,
    Baseline,
    CurvePoint,
    FloatOp,
    LayerInfo,
    ReportData,
    Saturation,
    Search,
    SearchGeneration,
    render_html,
)
from bitdial.report.charts import curve_chart
from bitdial.report.drawing import embed
from bitdial.report.markup import shorten
from bitdial.report.series import curve_series
from bitdial.report.style import RAMP_LIGHT, ramp

HOSTILE = "<script>alert('x')</script>\"&amp; ü漢 ]]> </style> <!-- $x_1$ \u202e \x00 \ud800 onload='y'"


def parse(page: str) -> ElementTree.Element:
    """The page as XML: one tag too many or one unescaped character, and this fails."""
    return ElementTree.fromstring(page.partition("\n")[2])


def section_names(page: str) -> set[str]:
    return {s.attrib["id"] for s in parse(page).iter("section")}


def hostile_report(name: str) -> ReportData:
    """`name` wherever the data can hold text."""
    layer = LayerInfo(
        name=name, source=name, kind=name, shape=name, macs=100, eligible=True, reason=name, n_groups=2,
        low=[[False, False], [True, False]], activation_shift=[3, 4], weight_shift_histogram={3: 4},
        channel_ranges=[255.0, 9.0], group_bounds=[0, 1, 2], unused_bits_activations={0: 0.5, 4: 0.5},
        unused_bits_weights={1: 1.0}, engine=name, amax=15, wmax=7,
    )  # fmt: skip
    in_float = layer.updated(eligible=False, float_reason=name)
    return ReportData(
        title=name,
        model=name,
        created=name,
        provenance={name: name, "cpu": name, "nested": {name: [name, {name: name}]}},
        ratios=[0.0, 1.0],
        curve=[
            CurvePoint(ratio=0.0, accuracy=0.9, agreement=1.0, low_share=0.0, eligible_share=0.0),
            CurvePoint(ratio=1.0, accuracy=0.8, agreement=0.9, low_share=0.25, eligible_share=0.5, distance=0.1),
        ],
        baselines=[
            Baseline(label=name, accuracy=0.95, agreement=0.9),
            Baseline(label=name, accuracy=0.3, agreement=0.3, ratio=1.0),
        ],
        layers=[layer, in_float],
        float_ops=[FloatOp(node=name, op=name, source=name, reason=name)],
        saturation=[Saturation(layer=name, ratio=1.0, saturated=1, total=3)],
        ablation=[
            Ablation(factor="baseline", setting=name, accuracy={1.0: 0.8}, standard_error=0.01, n_images=9),
            Ablation(factor=name, setting=name, accuracy={1.0: 0.7}, standard_error=None, n_images=9),
        ],
        search=Search(
            history=[SearchGeneration(target=1.0, generation=0, best=2.0, mean=3.0, n_images=4)],
            statistics={name: name, "seconds": 3.0},
        ),
        layout={name: [name]},
    )


def test_hostile_names_stay_text() -> None:
    page = render_html(hostile_report(HOSTILE))
    root = parse(page)
    assert len(list(root.iter("script"))) == 2  # the map's data and the page's own script
    assert [s.attrib.get("type") for s in root.iter("script")] == ["application/json", None]
    assert not [key for tag in root.iter() for key in tag.attrib if key.startswith("on")]
    assert "<script>alert" not in page and "\u202e" not in page and "\x00" not in page
    heading = root.find("./body/header/h1")
    assert heading is not None and heading.text is not None
    assert heading.text.startswith("<script>alert('x')</script>\"&amp; ü漢 ]]> </style>")
    assert heading.text.count("\\u") == 3 and page.encode()  # control, override and surrogate are written out


@given(st.text(max_size=30))
def test_any_name_gives_a_well_formed_page_with_the_same_tags(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("matplotlib", "matplotlib.figure"):
            patch.setitem(sys.modules, module, None)
        hostile, plain = parse(render_html(hostile_report(name))), parse(render_html(hostile_report("x")))
    if name not in ("", "cpu", "nested", "seconds", "baseline") and not name.lower().startswith(("float", "fp")):
        assert [t.tag for t in hostile.iter()] == [t.tag for t in plain.iter()]


def test_the_data_of_the_script_cannot_end_it() -> None:
    page = render_html(hostile_report("</script><b>&"))
    block = next(s for s in parse(page).iter("script") if s.attrib.get("id") == "map-data")
    assert json.loads(block.text or "")["layers"][0]["name"] == "</script><b>&"
    assert not set("<>&") & set(page.split('id="map-data">')[1].split("</script>")[0])


def test_the_page_is_complete_in_itself(example_page: str) -> None:
    page = example_page
    root = parse(page)
    assert not re.findall(r"https?:|url\(\s*['\"]?(?!#)|@import|(?:src|action)=", page)
    links = [t.attrib["href"] for t in root.iter() if "href" in t.attrib]
    assert all(link == "data:," or link.startswith("#") for link in links)
    targets = {t.attrib["id"] for t in root.iter() if "id" in t.attrib}
    assert {link[1:] for link in links if link.startswith("#")} <= targets
    assert not {t.tag for t in root.iter()} & {"iframe", "object", "embed", "img", "base", "form"}


def test_identifiers_are_unique(example_page: str) -> None:
    found = [t.attrib["id"] for t in parse(example_page).iter() if "id" in t.attrib]
    assert len(found) == len(set(found))


def test_the_content_policy_allows_this_script_and_no_other(example_page: str) -> None:
    page = example_page
    policies = [t for t in parse(page).iter("meta") if t.attrib.get("http-equiv") == "Content-Security-Policy"]
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policies[0].attrib["content"]
    assert policies[0].attrib["content"].startswith("default-src 'none';")


def test_equal_data_give_equal_pages(example: ReportData, example_page: str) -> None:
    assert example_page == render_html(ReportData.from_json(example.to_json()))


def test_sections_without_data_are_left_out(example: ReportData, undrawn: None) -> None:
    everything = section_names(render_html(example))
    assert everything == {
        *("curve", "executed", "map", "ranges", "saturation", "ablation", "search", "layers", "layout", "provenance")
    }
    for attribute, section in (
        ("saturation", "saturation"),
        ("ablation", "ablation"),
        ("layout", "layout"),
        ("provenance", "provenance"),
        ("curve", "curve"),
    ):
        empty = {} if attribute in ("layout", "provenance") else ()
        less = example.updated(**{attribute: empty})
        assert section_names(render_html(less)) == everything - {section}
    assert section_names(render_html(example.updated(search=Search()))) == everything - {"search"}
    without_layers = section_names(render_html(example.updated(layers=(), float_ops=())))
    assert without_layers == everything - {"layers", "map", "ranges", "executed"}


def test_an_empty_report_is_a_page() -> None:
    page = render_html(ReportData(title="only a title", model=""))
    assert section_names(page) == set() and "only a title" in page and "<nav" not in page


def test_without_labels_the_page_shows_agreement(example: ReportData) -> None:
    curve = [p.updated(accuracy=None) for p in example.curve]
    baselines = [Baseline(label="float32", accuracy=None, agreement=0.9)]
    page = render_html(example.updated(curve=curve, layers=(), search=Search(), baselines=baselines))
    assert "chart-accuracy" not in page and "chart-agreement" in page
    assert "No accuracies were measured" in page and "98.10\u00a0%" in page


def test_one_missing_accuracy_leaves_the_others(example: ReportData) -> None:
    curve = [p.updated(accuracy=None) if p.ratio == 0.5 else p for p in example.curve]
    page = render_html(example.updated(curve=curve, layers=(), search=Search()))
    chart = next(s for s in parse(page).iter("svg") if s.attrib.get("aria-labelledby", "").startswith("chart-accuracy"))
    texts = ["".join(text.itertext()) for text in chart.iter("text")]
    assert {"87.84", "87.79", "86.91", "bitdial 86.55"} <= set(texts) and "87.52" not in texts


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_flat_curves_have_a_plot(accuracy: float) -> None:
    curve = [CurvePoint(ratio=r, accuracy=accuracy, agreement=None, low_share=r, eligible_share=r) for r in (0.0, 1.0)]
    page = render_html(ReportData(title="t", model="m", curve=curve))
    assert "chart-accuracy" in page and "nan" not in page.split("<main>")[1].split("<script>")[0]


def test_colours_of_the_map_follow_the_nesting(example: ReportData, example_page: str) -> None:
    root = parse(example_page)
    rows = [cell for cell in root.iter("td") if cell.attrib.get("class") == "cells"]
    layers = [layer for layer in example.layers if layer.eligible]
    assert len(rows) == len(layers)
    for cell, layer in zip(rows, layers, strict=True):
        drawn: dict[float, str] = {}  # left edge of each cell -> class
        for path in cell.iter("path"):
            for left in re.findall(r"M([\d.]+) 0h", path.attrib["d"]):
                drawn[float(left)] = path.attrib["class"]
        edges = [round(1000 * bound / layer.group_bounds[-1], 2) for bound in layer.group_bounds[:-1]]
        # Levels are the ratios 25, 50, 75 and 100 %: class mK for a group that is low from ratio number K + 1 on.
        first = [next(i for i, row in enumerate(layer.low) if row[g]) for g in range(layer.n_groups)]
        assert [drawn[edge] for edge in edges] == [f"m{i - 1}" for i in first]


def test_map_of_a_selection_that_is_not_nested_says_so(example: ReportData, undrawn: None) -> None:
    layer = example.layers[1].updated(low=[[False, False], [True, False], *[[False, False]] * 3])
    page = render_html(example.updated(layers=[layer], curve=()))
    assert "not nested" in page and "never low" in page and "not nested" not in render_html(example)


@given(st.integers(2, 40))
def test_the_scale_runs_from_end_to_end_without_repeats(count: int) -> None:
    colours = ramp(RAMP_LIGHT, count)
    assert colours[0] == RAMP_LIGHT[0] and colours[-1] == RAMP_LIGHT[-1] and len(set(colours)) == count
    light = [0.2126 * int(c[1:3], 16) + 0.7152 * int(c[3:5], 16) + 0.0722 * int(c[5:], 16) for c in colours]
    assert light == sorted(light)  # the order survives greyscale


def test_shares_that_disagree_with_the_maps_are_called_out(example: ReportData, undrawn: None) -> None:
    curve = [p.updated(low_share=min(1.0, p.low_share / 2)) for p in example.curve]
    assert "Do not trust" in render_html(example.updated(curve=curve))
    assert "Do not trust" not in render_html(example)


def test_without_matplotlib_a_page_has_its_tables_and_says_what_is_missing(example: ReportData, undrawn: None) -> None:
    page = render_html(example)
    root = parse(page)
    assert "pip install 'bitdial[report]'" in "".join(root.itertext())
    assert not [s for s in root.iter("svg") if s.attrib.get("class") == "chart"] and not list(root.iter("figure"))
    assert "axis starts at" not in page  # of no chart
    assert "47.3\u00a0%" in page and "Generation" in page
    opened = [d for d in root.iter("details") if "open" in d.attrib]
    assert len(opened) == 3  # what was executed, unused bits, search: their values are shown at once


def test_charts_follow_the_page_into_the_dark(example_page: str) -> None:
    charts = [s for s in parse(example_page).iter("svg") if s.attrib.get("class") == "chart"]
    assert len(charts) == 2 + 1 + 1 + 18 + 3  # curve and agreement, executed, unused, a layer each, a target each
    for node in (node for chart in charts for node in chart.iter()):
        for declaration in filter(None, node.attrib.get("style", "").split(";")):
            name, _, value = declaration.partition(":")
            assert name not in ("fill", "stroke") or value == "none" or value.startswith("var(--"), declaration
        assert node.tag != "text" or ("font-family" not in node.attrib["style"] and "fill" in node.attrib["style"])
    defined = set(re.findall(r"(--\w+):", example_page))
    assert set(re.findall(r"var\((--\w+)\)", example_page)) <= defined


def test_charts_say_what_they_show_and_take_the_width_they_get(example_page: str) -> None:
    root = parse(example_page)
    targets = {t.attrib["id"]: t for t in root.iter() if "id" in t.attrib}
    for chart in (s for s in root.iter("svg") if s.attrib.get("class") == "chart"):
        assert chart.attrib["role"] == "img" and "width" not in chart.attrib and "height" not in chart.attrib
        assert re.fullmatch(r"0 0 [\d.]+ [\d.]+", chart.attrib["viewBox"])
        assert all(targets[name].text for name in chart.attrib["aria-labelledby"].split())
        assert list(chart.iter("text"))  # not outlines of letters
        used = {v[1:] for n in chart.iter() for k, v in n.attrib.items() if k == "href"}
        used |= set(re.findall(r"url\(#([^)]+)\)", " ".join(v for n in chart.iter() for v in n.attrib.values())))
        assert used <= {n.attrib["id"] for n in chart.iter() if "id" in n.attrib}
    told = targets["chart-accuracy-desc"].text or ""
    assert "bitdial: 87.84 % at 0\u00a0%" in told and "naive 4-bit: 87.02 % at 25\u00a0%" in told


@given(st.text(max_size=20))
@example_of(HOSTILE[:60])
@example_of("$\\frac{$ url(#x) #17202b")
@settings(max_examples=12)
def test_any_name_is_drawn_as_it_is(name: str) -> None:
    points = [
        CurvePoint(ratio=r, accuracy=0.9 - 0.1 * r, agreement=None, low_share=r, eligible_share=r) for r in (0, 1)
    ]
    data = ReportData(title="", model="", curve=points, baselines=[Baseline(label=name, accuracy=0.87)])
    series = curve_series(data, "accuracy")
    assert series is not None
    chart = parse(f"\n{embed(curve_chart(series), 'c')}")
    texts = ["".join(text.itertext()) for text in chart.iter("text")]
    assert f"{shorten(name, 20)} 87.00".split() in [text.split() for text in texts]
    assert {node.tag for node in chart.iter()} <= {
        "svg",
        "title",
        "desc",
        "defs",
        "g",
        "path",
        "use",
        "text",
        "clipPath",
        "rect",
    }
