"""The picture of accuracy against latency and its page. Figures here are made up."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdial.errors import ConfigError, DataError, OutputError
from bitdial.report.axis import linear_axis, time_axis
from bitdial.report.drawing import check_plot_path, save, write_plot
from bitdial.report.latency import LatencyPoint, LatencyReport, latency_chart
from bitdial.report.latency_page import render_latency_html


def report(title: str = "test-net", accuracy: bool = True, agreement: bool = True, **more: int) -> LatencyReport:
    points = [
        LatencyPoint(
            ratio, batch, threads, batch * (10.0 - 5 * ratio) / threads, batch * 11.0, 1e3 / (10.0 - 5 * ratio),
            10.0 / (10.0 - 5 * ratio), 0.9 - 0.02 * ratio if accuracy else None, 1 - 0.1 * ratio if agreement else None,
        )
        for batch in (1, 8)
        for threads in range(1, more.get("threads", 1) + 1)
        for ratio in (1.0, 0.0, 0.5)
    ]  # fmt: skip
    return LatencyReport(title, "Test CPU, engine cpu", tuple(points), {"Processor": "Test CPU"}, "2026-01-01")


def text_of(svg: bytes) -> list[str]:
    return ["".join(e.itertext()).strip() for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_lines_are_one_per_batch_and_name_what_differs() -> None:
    lines = report().lines()
    assert list(lines) == ["batch 1", "batch 8"]
    assert all([p.ratio for p in points] == [0.0, 0.5, 1.0] for points in lines.values())
    assert list(report(threads=2).lines())[:2] == ["batch 1, 1 thread", "batch 1, 2 threads"]


@pytest.mark.parametrize(
    "data, expected",
    [
        (report(), "Accuracy, %"),
        (report(accuracy=False), "Same top answer as the 8-bit model, %"),
        (report(accuracy=False, agreement=False), "Latency of one batch, ms (median)"),
    ],
)
def test_plot(data: LatencyReport, expected: str) -> None:
    png = save(latency_chart(data), "png")
    assert png.startswith(b"\x89PNG") and len(png) > 5000
    svg = save(latency_chart(data), "svg")
    texts = text_of(svg)
    assert expected in texts and "batch 1" in texts and "batch 8" in texts
    labels = [t.replace("\u00a0", " ") for t in texts]
    assert labels.count("100 %") == labels.count("50 %") == 2  # one label per point
    assert svg == save(latency_chart(data), "svg") and png == save(latency_chart(data), "png")


def test_page_is_well_formed_complete_in_itself_and_escapes() -> None:
    hostile = "<script>alert(1)</script>\u202e$x_1$"
    page = render_latency_html(report(hostile))
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert root.find(".//h2").text == "Accuracy against latency"  # type: ignore[union-attr]
    assert len(root.findall(".//tbody/tr")) == 6
    figures = ["".join(c.itertext()) for c in root.findall(".//tbody/tr")[2]]
    assert figures[0] == "batch 1" and "5.000" in figures and "2.00" in figures and "88.00\u00a0%" in figures
    assert render_latency_html(report(hostile)) == page
    save(latency_chart(report(hostile)), "svg")


def test_page_without_accuracy_shows_latency() -> None:
    page = render_latency_html(report(accuracy=False, agreement=False))
    ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    assert "Accuracy against latency" not in page


@given(st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=8))
def test_time_axis_holds_every_value_in_order(values: list[float]) -> None:
    axis = time_axis(values)
    places = [axis.place(v) for v in sorted(values)]
    assert all(0.0 <= p <= 1.0 for p in places) and places == sorted(places)
    assert all(axis.low <= t <= axis.high for t in axis.ticks) and len(axis.ticks) <= 14
    assert axis.logarithmic == (max(values) > 4 * min(values))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_linear_axis_has_ticks(values: list[float]) -> None:
    axis = linear_axis(values)
    assert all(0.0 <= axis.place(v) <= 1.0 for v in values)
    assert 2 <= len(axis.ticks) <= 8 and list(axis.ticks) == sorted(set(axis.ticks))


@pytest.mark.parametrize("wrong", [{"milliseconds": 0.0}, {"p90": float("nan")}, {"ratio": 1.5}, {"batch": 0}])
def test_points_check_themselves(wrong: dict[str, float]) -> None:
    values = {"ratio": 0.0, "batch": 1, "threads": 1, "milliseconds": 1.0, "p90": 1.0, "images_per_second": 1.0}
    LatencyPoint(**values)  # type: ignore[arg-type]
    with pytest.raises(DataError):
        LatencyPoint(**{**values, **wrong})  # type: ignore[arg-type]
    with pytest.raises(DataError):
        LatencyReport("x", "y", ())


def test_writing(tmp_path: Path) -> None:
    for name in ("a.png", "b.SVG"):
        write_plot(latency_chart(report()), tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.SVG"]
    with pytest.raises(ConfigError, match="svg"):
        check_plot_path(Path("x.gif"))
    with pytest.raises(ConfigError, match="pdf"):
        save(latency_chart(report()), "pdf")
    with pytest.raises(OutputError):
        write_plot(latency_chart(report()), tmp_path / "none" / "c.png")
