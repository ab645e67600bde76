"""The HTML page: nothing escapes, nothing is loaded, empty sections are left out, the map shows the nesting."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
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
        name, name, name, name, 100, True, name, 2, [[False, False], [True, False]], [3, 4], {3: 4},
        [255.0, 9.0], [0, 1, 2], {0: 0.5, 4: 0.5}, {1: 1.0}, name, "", False, 15, 7,
    )  # fmt: skip
    in_float = dataclasses.replace(layer, eligible=False, float_reason=name)
    return ReportData(
        title=name,
        model=name,
        created=name,
        provenance={name: name, "cpu": name, "nested": {name: [name, {name: name}]}},
        ratios=[0.0, 1.0],
        curve=[CurvePoint(0.0, 0.9, 1.0, 0.0, 0.0), CurvePoint(1.0, 0.8, 0.9, 0.25, 0.5, 0.1)],
        baselines=[Baseline(name, 0.95, 0.9), Baseline(name, 0.3, 0.3, 1.0)],
        layers=[layer, in_float],
        float_ops=[FloatOp(name, name, name, name)],
        saturation=[Saturation(name, 1.0, 1, 3)],
        ablation=[Ablation("baseline", name, {1.0: 0.8}, 0.01, 9), Ablation(name, name, {1.0: 0.7}, None, 9)],
        search=Search([SearchGeneration(1.0, 0, 2.0, 3.0, 4)], {name: name, "seconds": 3.0}),
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
    hostile, plain = parse(render_html(hostile_report(name))), parse(render_html(hostile_report("x")))
    if name not in ("", "cpu", "nested", "seconds", "baseline") and not name.lower().startswith(("float", "fp")):
        assert [t.tag for t in hostile.iter()] == [t.tag for t in plain.iter()]


def test_the_data_of_the_script_cannot_end_it() -> None:
    page = render_html(hostile_report("</script><b>&"))
    block = next(s for s in parse(page).iter("script") if s.attrib.get("id") == "map-data")
    assert json.loads(block.text or "")["layers"][0]["name"] == "</script><b>&"
    assert not set("<>&") & set(page.split('id="map-data">')[1].split("</script>")[0])


def test_the_page_is_complete_in_itself(example: ReportData) -> None:
    page = render_html(example)
    root = parse(page)
    assert not re.findall(r"https?:|url\(\s*['\"]?(?!#)|@import|(?:src|action)=", page)
    links = [t.attrib["href"] for t in root.iter() if "href" in t.attrib]
    assert all(link == "data:," or link.startswith("#") for link in links)
    targets = {t.attrib["id"] for t in root.iter() if "id" in t.attrib}
    assert {link[1:] for link in links if link.startswith("#")} <= targets
    assert not {t.tag for t in root.iter()} & {"iframe", "object", "embed", "img", "base", "form"}


def test_identifiers_are_unique(example: ReportData) -> None:
    found = [t.attrib["id"] for t in parse(render_html(example)).iter() if "id" in t.attrib]
    assert len(found) == len(set(found))


def test_the_content_policy_allows_this_script_and_no_other(example: ReportData) -> None:
    page = render_html(example)
    policies = [t for t in parse(page).iter("meta") if t.attrib.get("http-equiv") == "Content-Security-Policy"]
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policies[0].attrib["content"]
    assert policies[0].attrib["content"].startswith("default-src 'none';")


def test_equal_data_give_equal_pages(example: ReportData) -> None:
    assert render_html(example) == render_html(ReportData.from_json(example.to_json()))


def test_sections_without_data_are_left_out(example: ReportData) -> None:
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
        less = dataclasses.replace(example, **{attribute: empty})
        assert section_names(render_html(less)) == everything - {section}
    assert section_names(render_html(dataclasses.replace(example, search=Search()))) == everything - {"search"}
    without_layers = section_names(render_html(dataclasses.replace(example, layers=(), float_ops=())))
    assert without_layers == everything - {"layers", "map", "ranges", "executed"}


def test_an_empty_report_is_a_page() -> None:
    page = render_html(ReportData("only a title", ""))
    assert section_names(page) == set() and "only a title" in page and "<nav" not in page


def test_without_labels_the_page_shows_agreement(example: ReportData) -> None:
    curve = [dataclasses.replace(p, accuracy=None) for p in example.curve]
    page = render_html(dataclasses.replace(example, curve=curve, baselines=[Baseline("float32", None, 0.9)]))
    assert "chart-accuracy" not in page and "chart-agreement" in page
    assert "No accuracies were measured" in page and "98.10\u00a0%" in page


def test_one_missing_accuracy_leaves_the_others(example: ReportData) -> None:
    curve = [dataclasses.replace(p, accuracy=None) if p.ratio == 0.5 else p for p in example.curve]
    page = render_html(dataclasses.replace(example, curve=curve))
    chart = next(s for s in parse(page).iter("svg") if s.attrib.get("aria-labelledby", "").startswith("chart-accuracy"))
    dots = [c for c in chart.iter("circle") if c.attrib.get("class") == "own-dot"]
    assert len(dots) == 4


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_flat_curves_have_a_plot(accuracy: float) -> None:
    curve = [CurvePoint(r, accuracy, None, r, r) for r in (0.0, 1.0)]
    page = render_html(ReportData("t", "m", curve=curve))
    assert "chart-accuracy" in page and "nan" not in page.split("<main>")[1].split("<script>")[0]


def test_colours_of_the_map_follow_the_nesting(example: ReportData) -> None:
    root = parse(render_html(example))
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


def test_map_of_a_selection_that_is_not_nested_says_so(example: ReportData) -> None:
    layer = dataclasses.replace(example.layers[1], low=[[False, False], [True, False], *[[False, False]] * 3])
    page = render_html(dataclasses.replace(example, layers=[layer], curve=()))
    assert "not nested" in page and "never low" in page and "not nested" not in render_html(example)


@given(st.integers(2, 40))
def test_the_scale_runs_from_end_to_end_without_repeats(count: int) -> None:
    colours = ramp(RAMP_LIGHT, count)
    assert colours[0] == RAMP_LIGHT[0] and colours[-1] == RAMP_LIGHT[-1] and len(set(colours)) == count
    light = [0.2126 * int(c[1:3], 16) + 0.7152 * int(c[3:5], 16) + 0.0722 * int(c[5:], 16) for c in colours]
    assert light == sorted(light)  # the order survives greyscale


def test_shares_that_disagree_with_the_maps_are_called_out(example: ReportData) -> None:
    curve = [dataclasses.replace(p, low_share=min(1.0, p.low_share / 2)) for p in example.curve]
    assert "Do not trust" in render_html(dataclasses.replace(example, curve=curve))
    assert "Do not trust" not in render_html(example)
