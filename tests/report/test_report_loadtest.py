"""The report of a load test: windows, panels, page and picture. Results here are made up."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdial.errors import ConfigError, DataError, OutputError
from bitdial.loadtest.result import Result, Status
from bitdial.report.drawing import save, write_plot
from bitdial.report.loadtest import (
    MOST_WINDOWS,
    Panel,
    figure_rows,
    load_report,
    panels,
    pieces,
    window_width,
    windows,
)
from bitdial.report.loadtest_page import load_chart, render_load_html


def result(
    title: str = "adaptive", seconds: float = 20.0, rate: float = 50.0, seed: int = 0, plain: bool = False
) -> Result:
    random = np.random.default_rng(seed)
    scheduled = np.sort(random.random(int(rate * seconds)) * seconds)
    n = len(scheduled)
    latency = 0.02 * np.exp(random.normal(0, 0.5, n)) + np.where((scheduled > 8) & (scheduled < 10), 0.4, 0.0)
    status = np.zeros(n, np.uint8)
    if not plain:
        status[(scheduled > 9) & (scheduled < 9.7)] = Status.SHED
        status[(scheduled > 9.7) & (scheduled < 10)] = Status.EXPIRED
        status[n - 1] = Status.FAILED
    ok = status == Status.OK
    ratio = np.where(ok, np.where((scheduled > 8) & (scheduled < 12), 1.0, 0.0), np.nan)
    unknown = np.full(n, np.nan)
    right = np.where(ok, random.binomial(16, 0.9, n), -1)
    model = {"name": title, "ratios": [0.0, 1.0], "accuracy": [0.93, 0.92]}
    if plain:
        ratio, right, model = unknown, np.full(n, -1), {}
    return Result(
        scheduled, scheduled + 1e-4, scheduled + latency, status, ratio, unknown, unknown, right.astype(np.int64), seconds, 16,
        None if plain else 0.1, model, {"url": "http://h:1", "arrivals": "even"}, {"capped": not plain}, {"503: full": 3}, title,
    )  # fmt: skip


def by_key(shown: tuple[Panel, ...]) -> dict[str, Panel]:
    return {panel.key: panel for panel in shown}


@given(st.floats(0.3, 60), st.floats(0.05, 20), st.integers(0, 50))
@settings(max_examples=40)
def test_windows_lose_no_request(seconds: float, width: float, seed: int) -> None:
    made = result(seconds=seconds, rate=max(50.0, 3 / seconds), seed=seed)
    found = windows(made, width)
    spans = np.diff(found.edges)
    assert (spans > 0).all() and spans.sum() == pytest.approx(seconds)
    assert (found.offered * spans).sum() == pytest.approx(len(made.status))
    assert (found.shed * spans).sum() == pytest.approx(np.count_nonzero(made.status == Status.SHED))
    assert (found.expired * spans).sum() == pytest.approx(np.count_nonzero(made.status == Status.EXPIRED))
    assert (found.failed * spans).sum() == pytest.approx(1)
    assert (found.answered * spans).sum() == pytest.approx(np.count_nonzero(made.ok & (made.done <= seconds)))
    known = np.isfinite(found.p99)
    assert (found.p50[known] <= found.p99[known]).all() and np.array_equal(known, np.isfinite(found.p50))


def test_latency_belongs_to_the_window_in_which_a_request_was_due() -> None:
    scheduled = np.array([0.2, 0.4, 1.5, 3.5])
    done = scheduled + np.array([2.0, 0.1, 0.2, 0.3])
    nan = np.full(4, np.nan)
    made = Result(scheduled, scheduled, done, np.zeros(4, np.uint8), nan, nan, nan, np.full(4, -1), 4.0, 1, None)
    found = windows(made, 1.0)
    assert found.p99[0] == pytest.approx(np.percentile([2000, 100], 99)) and found.p99[1] == pytest.approx(200)
    assert np.isnan(found.p99[2]) and found.offered.tolist() == [2, 1, 0, 1]
    assert found.answered.tolist() == [1, 1, 1, 1]  # the first came in the third second


@given(st.floats(0.05, 1e6))
def test_the_number_of_windows_is_bounded(seconds: float) -> None:
    assert 0 < seconds / window_width(seconds) <= MOST_WINDOWS * (1 + 1e-9)


def test_panels_show_what_there_is() -> None:
    full = by_key(panels(load_report([result()])))
    assert list(full) == ["load", "latency", "ratio", "accuracy", "lost"]
    assert full["latency"].level == ("SLO 100 ms", pytest.approx(100.0)) and full["latency"].axis.logarithmic
    assert [line.name for line in full["lost"].lines] == ["refused (503)", "expired", "failed"]
    assert [line.style for line in full["accuracy"].lines] == ["solid", "dashed"]
    measured = full["accuracy"].lines[1].values
    assert np.nanmean(measured) == pytest.approx(90, abs=2)
    bare = by_key(panels(load_report([result(plain=True)])))
    assert list(bare) == ["load", "latency"] and bare["latency"].level is None
    both = by_key(panels(load_report([result(), result("fixed")])))
    assert [line.style for line in both["load"].lines] == ["area", "solid", "solid"]  # the same load is shown once
    other = by_key(panels(load_report([result(), result("fixed", seed=1)])))
    assert [line.style for line in other["load"].lines] == ["dashed", "dashed", "solid", "solid"]


def test_lines_break_where_nothing_is_known() -> None:
    line = panels(load_report([result()]))[1].lines[0]
    broken = replace(line, edges=np.arange(6.0), values=np.array([1.0, np.nan, 2.0, 3.0, np.nan]))
    assert pieces(broken) == [[(0.5, 1.0)], [(2.5, 2.0), (3.5, 3.0)]]
    assert pieces(replace(broken, stepped=True))[1] == [(2.0, 2.0), (3.0, 2.0), (3.0, 3.0), (4.0, 3.0)]


def test_page_is_well_formed_complete_in_itself_and_escapes() -> None:
    hostile = "<script>alert(1)</script>\u202e$x_1$"
    for shown in (load_report([result(hostile)]), load_report([result(hostile), result("b", seed=3)]),
                  load_report([result(plain=True)])):  # fmt: skip
        page = render_load_html(shown)
        root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
        assert "<script" not in page and "https:" not in page
        assert not [e for e in root.iter() if e.tag in ("script", "img", "iframe") or "src" in e.attrib]
        (chart,) = [e for e in root.iter("svg") if e.get("role") == "img"]
        drawn = [" ".join(e.itertext()) for e in chart.iter("text")]
        assert all(any(text.startswith(panel.title) for text in drawn) for panel in panels(shown))
        for element in root.iter("path"):
            assert "nan" not in element.get("d", "") and "inf" not in element.get("d", "")
        assert render_load_html(shown) == page
        of_windows, figures = root.findall(".//tbody")
        assert len(figures) == len(figure_rows(shown)) and len(of_windows) == len(shown.runs[0].windows.offered)
        first = ["".join(cell.itertext()) for cell in of_windows[0]]
        assert first[:2] == ["0–0.5", f"{shown.runs[0].windows.offered[0]:.4g}"]
    page = render_load_html(load_report([result()]))
    assert "--max-connections" in page  # the warning that the cap was hit


def test_figures_of_the_table() -> None:
    made = result()
    rows = dict(figure_rows(load_report([made, result("b", plain=True)])))
    within = np.count_nonzero(made.latency[made.ok] <= 0.1) / len(made.status)
    assert rows["Answered within the SLO, of all"] == [f"{100 * within:.2f}\u00a0%", "–"]
    assert rows["Failed"] == ["1", "0"] and rows["Requests"] == ["1,000", "1,000"]


def test_picture() -> None:
    short = result("$x_1$ <b>", seconds=12.0)
    assert save(load_chart(load_report([short]))).startswith(b"\x89PNG")
    shown = load_report([short, result("b", seconds=12.0, seed=2)])
    svg = save(load_chart(shown), "svg")
    texts = ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "Requests/s" in texts and "SLO 100 ms" in texts and any(t.startswith("$x_1$ <b>, ") for t in texts)
    assert svg == save(load_chart(shown), "svg")
    with pytest.raises(ConfigError):
        save(load_chart(shown), "gif")


def test_files_and_errors(tmp_path: Path) -> None:
    shown = load_report([result()])
    write_plot(load_chart(load_report([result(plain=True)])), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").exists()
    with pytest.raises(OutputError):
        write_plot(load_chart(shown), tmp_path / "none" / "a.png")
    with pytest.raises(ConfigError):
        write_plot(load_chart(shown), tmp_path / "a.gif")
    with pytest.raises(ConfigError, match="at most"):
        load_report([result()] * 6)
    with pytest.raises(ConfigError):
        load_report([])
    none, times = np.empty(0, np.int64), np.empty(0)
    with pytest.raises(DataError):
        load_report([Result(times, times, times, none.astype(np.uint8), times, times, times, none, 1.0, 1, None)])
    names = [run.name for run in load_report([result(), result()]).runs]
    assert names == ["adaptive", "adaptive (2)"]
