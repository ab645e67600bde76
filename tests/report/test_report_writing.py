"""Files of a report: PNG plots, CSV tables, and that nothing is left behind when one cannot be written."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitdial.cli.report import check_report
from bitdial.cli.report import write_report as write_files
from bitdial.errors import ConfigError, OutputError
from bitdial.report import (
    Baseline,
    CurvePoint,
    LayerInfo,
    ReportData,
    Search,
    check_plotting,
    csv_tables,
    curve_markdown,
    render_html,
    render_plots,
    write_report,
)
from bitdial.report.charts import group_chart, map_colours
from bitdial.report.drawing import save

PLOTS = {f"{name}.png" for name in ("accuracy", "agreement", "executed", "groups", "unused", "ranges", "search")}
TABLES = {"curve.csv", "baselines.csv", "layers.csv", "saturation.csv", "ablation.csv", "search.csv"}


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def number(text: str) -> float | None:
    return float(text) if text else None


@pytest.fixture
def pixels():
    """PNG bytes -> uint8 [height, width, 3]; decoding fails on anything but a whole image."""
    image_module = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")

    def decode(image: bytes) -> np.ndarray:
        return np.asarray(image_module.open(io.BytesIO(image)).convert("RGB"))

    return decode


def test_plots_are_images_of_sane_size(example: ReportData, pixels) -> None:
    plots = render_plots(example)
    assert {*plots} == PLOTS
    for name, image in plots.items():
        shown = pixels(image)
        height, width, _ = shown.shape
        assert 500 <= width <= 2000 and 200 <= height <= 2000, name
        assert len(image) < 500_000 and len(np.unique(shown @ np.array([65536, 256, 1]))) > 10, name
    few = example.updated(layers=example.layers[:3], search=Search())
    assert render_plots(few) == render_plots(few)


def test_plots_without_data_are_left_out(example: ReportData, pixels) -> None:
    assert render_plots(ReportData(title="t", model="m")) == {}
    full = [
        layer.updated(
            channel_ranges=[255.0] * len(layer.channel_ranges), unused_bits_activations={}, unused_bits_weights={}
        )
        for layer in example.layers
    ]
    plots = render_plots(example.updated(layers=full, search=Search(), curve=()))
    assert set(plots) == {"groups.png", "executed.png"}  # no curve, no unused bits, no search


def test_without_accuracy_the_plot_is_of_agreement(example: ReportData, pixels) -> None:
    curve = [p.updated(accuracy=None) for p in example.curve]
    plots = render_plots(example.updated(curve=curve, layers=(), search=Search()))
    assert set(plots) == {"agreement.png"}
    alone = ReportData(
        title="t",
        model="m",
        curve=[CurvePoint(ratio=0.5, accuracy=None, agreement=None, low_share=0.5, eligible_share=0.5)],
    )
    assert render_plots(alone) == {}


def test_the_map_has_the_colours_of_the_nesting(example: ReportData, pixels) -> None:
    """Left to right through one row of the picture: the colour of the ratio from which each group is low."""
    first = [3, 1, 4, 2]  # index of the ratio from which each group is low
    layer = example.layers[1].updated(
        n_groups=4,
        group_bounds=[0, 8, 16, 24, 32],
        channel_ranges=(),
        activation_shift=(),
        low=[[i >= f for f in first] for i in range(5)],
    )
    data = example.updated(layers=[layer], curve=(), search=Search())
    colours = map_colours(data)
    assert list(colours) == [0.25, 0.5, 0.75, 1.0]
    picture = pixels(render_plots(data)["groups.png"])
    written = np.vectorize("#{:02x}{:02x}{:02x}".format)(*np.moveaxis(picture.astype(object), 2, 0))
    wanted = [colours[data.ratios[f]] for f in first]
    middle = next(  # a line of pixels that crosses the row of cells, not the legend
        line for line in written[::-1] if np.isin(line, list(colours.values())).mean() > 0.5
    )
    seen = [str(c) for c in middle if c in colours.values()]
    assert [c for k, c in enumerate(seen) if k == 0 or seen[k - 1] != c] == wanted
    # Nested groups: the earlier a group is low, the darker its cell.
    light = {c: sum(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in colours.values()}
    assert sorted(wanted, key=lambda c: light[c]) == [wanted[first.index(i)] for i in (1, 2, 3, 4)]


def test_names_are_not_read_as_mathematics(example: ReportData, pixels, recwarn: pytest.WarningsRecorder) -> None:
    name = "$\\frac{$ <b> ü 漢 _x"
    layers = [layer.updated(name=name, source=name) for layer in example.layers[:3]]
    plots = render_plots(
        example.updated(layers=layers, baselines=[Baseline(label=name, accuracy=0.2), Baseline(label="", accuracy=0.9)])
    )
    assert all(pixels(image).size for image in plots.values())
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_networks_with_very_many_layers_and_groups_fit(pixels) -> None:
    bounds = list(range(0, 2049, 8))
    low = [[False] * 256, [k % 2 == 0 for k in range(256)], [True] * 256]
    layer = LayerInfo(
        name="l", source="l", kind="conv", macs=1, eligible=True, n_groups=256, low=low, group_bounds=bounds
    )
    data = ReportData(title="t", model="m", ratios=[0.0, 0.5, 1.0], layers=[layer] * 250)
    height, width, _ = pixels(save(group_chart(data))).shape
    assert height <= 6200 and width <= 2000


def test_the_users_plot_settings_change_nothing(example: ReportData) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    small = example.updated(layers=(), search=Search())
    before = render_plots(small)
    with matplotlib.rc_context({"figure.dpi": 30, "font.size": 30, "axes.facecolor": "red"}):
        assert render_plots(small) == before
        assert matplotlib.rcParams["font.size"] == 30


def test_missing_matplotlib_is_named_with_the_remedy(
    example: ReportData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'bitdial\[report\]'"):
        check_plotting()
    with pytest.raises(ConfigError, match=r"bitdial\[report\]"):
        write_report(example, tmp_path / "r.html", png_dir=tmp_path / "png")
    assert list(tmp_path.iterdir()) == []
    assert write_report(example, tmp_path / "r.html", csv_dir=tmp_path)[0] == tmp_path / "r.html"


def test_importing_the_part_does_not_import_matplotlib() -> None:
    code = "import sys, bitdial.report; assert not {'matplotlib', 'torch', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_csv_holds_the_data(example: ReportData) -> None:
    tables = {name: rows(text) for name, text in csv_tables(example).items()}
    assert set(tables) == TABLES
    assert [
        CurvePoint(
            ratio=float(r["ratio"]), accuracy=number(r["accuracy"]), agreement=number(r["agreement"]),
            low_share=float(r["low_share"]), eligible_share=float(r["eligible_share"]), distance=number(r["distance"]),
        )
        for r in tables["curve.csv"]
    ] == list(example.curve)  # fmt: skip
    assert [
        Baseline(
            label=r["label"], accuracy=number(r["accuracy"]), agreement=number(r["agreement"]), ratio=number(r["ratio"])
        )
        for r in tables["baselines.csv"]
    ] == list(example.baselines)
    assert len(tables["layers.csv"]) == len(example.layers)
    for row, layer in zip(tables["layers.csv"], example.layers, strict=True):
        assert (row["name"], row["source"], row["shape"]) == (layer.name, layer.source, layer.shape)
        assert (int(row["macs"]), int(row["groups"])) == (layer.macs, layer.n_groups)
        assert row["eligible"] == ("yes" if layer.eligible else "no") and row["reason"] == layer.reason
        assert tuple(int(s) for s in row["activation_shifts"].split()) == layer.activation_shift
        assert [float(row[f"low_share_at_{r!r}"]) for r in example.ratios] == [
            layer.low_fraction(i) for i in range(len(example.ratios))
        ]
    assert [
        (r["layer"], float(r["ratio"]), int(r["saturated"]), int(r["total"])) for r in tables["saturation.csv"]
    ] == [(s.layer, s.ratio, s.saturated, s.total) for s in example.saturation]
    assert [
        (r["factor"], r["setting"], float(r["ratio"]), float(r["accuracy"]), number(r["standard_error"]))
        for r in tables["ablation.csv"]
    ] == [(a.factor, a.setting, r, v, a.standard_error) for a in example.ablation for r, v in a.accuracy.items()]
    assert [
        (float(r["target"]), int(r["generation"]), float(r["best"]), number(r["mean"]), int(r["images"]))
        for r in tables["search.csv"]
    ] == [tuple(g.model_dump().values()) for g in example.search.history]


def test_csv_leaves_out_what_is_empty_and_unknown() -> None:
    tables = csv_tables(
        ReportData(
            title="t",
            model="m",
            curve=[CurvePoint(ratio=0.5, accuracy=None, agreement=None, low_share=0.25, eligible_share=0.5)],
        )
    )
    assert tables == {"curve.csv": "ratio,accuracy,agreement,low_share,eligible_share,distance\r\n0.5,,,0.25,0.5,\r\n"}


@pytest.mark.parametrize("name", ['a,"b"\n<script>', "ü漢 & 'x'", ""])
def test_csv_quotes_names(name: str) -> None:
    tables = csv_tables(ReportData(title="t", model="m", baselines=[Baseline(label=name, accuracy=0.5)]))
    assert rows(tables["baselines.csv"])[0]["label"] == name


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "+1", "-1", "@x"])
def test_a_spreadsheet_runs_no_name(name: str) -> None:
    tables = csv_tables(ReportData(title="t", model="m", baselines=[Baseline(label=name, accuracy=0.5)]))
    assert rows(tables["baselines.csv"])[0]["label"] == f"'{name}"


def test_markdown_has_a_row_per_setting(example: ReportData) -> None:
    lines = curve_markdown(example).splitlines()
    assert len(lines) == 2 + len(example.curve) + len(example.baselines)
    assert lines[2] == "| float32 | 87.87\u00a0% | ±0.00 | 99.40\u00a0% | – |"
    assert lines[-1].startswith("| ratio 100\u00a0% | 86.55\u00a0% | \u22121.32 | 93.10\u00a0% | 98.9\u00a0% |")
    assert curve_markdown(ReportData(title="t", model="m")) == ""
    hostile = ReportData(title="t", model="m", baselines=[Baseline(label="a|b\n<i>*c*", accuracy=None)])
    assert curve_markdown(hostile).splitlines()[2] == "| a\\|b \\<i\\>\\*c\\* | – | – | – | – |"


def test_everything_is_written(example: ReportData, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page, png, tables = tmp_path / "r.html", tmp_path / "a" / "png", tmp_path / "csv"
    example = example.updated(layers=example.layers[:4])
    written = write_report(example, str(page), png, tables)
    assert written[0] == page and page.read_text(encoding="utf-8") == render_html(example)
    assert {p.name for p in written[1:]} == PLOTS | TABLES
    assert sorted(written) == sorted(p for p in tmp_path.rglob("*") if p.is_file())
    texts = csv_tables(example)
    assert {p.name: p.read_bytes() for p in tables.iterdir()} == {name: t.encode() for name, t in texts.items()}


def test_an_old_report_is_replaced_and_neighbours_stay(example: ReportData, tmp_path: Path, undrawn: None) -> None:
    page, neighbour = tmp_path / "r.html", tmp_path / "mine.csv"
    page.write_text("old")
    neighbour.write_text("mine")
    write_report(example, page, csv_dir=tmp_path)
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>") and neighbour.read_text() == "mine"


@pytest.mark.parametrize("target", ["missing/r.html", "folder", "file/r.html", "r\0.html"])
def test_an_unwritable_page_leaves_nothing(example: ReportData, undrawn: None, tmp_path: Path, target: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match="cannot write"):
        write_report(example, str(tmp_path / target), csv_dir=tmp_path / "new" / "csv")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("folder", ["file", "file/csv"])
def test_an_unwritable_folder_leaves_nothing(example: ReportData, undrawn: None, tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match="folder"):
        write_report(example, tmp_path / "r.html", csv_dir=tmp_path / folder)
    assert [p.name for p in tmp_path.rglob("*")] == ["file"]


def test_a_table_that_cannot_be_written_takes_the_page_back(example: ReportData, tmp_path: Path, undrawn: None) -> None:
    (tmp_path / "layers.csv").mkdir()
    with pytest.raises(OutputError, match=r"layers\.csv"):
        write_report(example, tmp_path / "r.html", csv_dir=tmp_path)
    assert os.listdir(tmp_path) == ["layers.csv"]


def test_the_command_refuses_bad_folders_before_its_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    page = tmp_path / "r.html"
    check_report(page, csv=tmp_path / "new" / "csv")
    assert os.listdir(tmp_path) == ["file"]  # checked, not made
    with pytest.raises(OutputError, match=r"--csv .*file is no folder"):
        check_report(page, csv=tmp_path / "file" / "csv")
    with pytest.raises(OutputError, match="--png"):
        check_report(page, png=tmp_path / "file")


def test_the_command_writes_all_three_forms(example: ReportData, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    small = example.updated(layers=(), search=Search())
    written = write_files(small, tmp_path / "r.html", tmp_path / "png", tmp_path / "csv")
    assert written == write_report(small, tmp_path / "r.html", tmp_path / "png", tmp_path / "csv")
    assert {p.suffix for p in written} == {".html", ".png", ".csv"}
