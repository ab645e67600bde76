"""The page and the picture of a finetuning run, from an invented record."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bitdial.errors import ConfigError, DataError, OutputError
from bitdial.quantization.program import Program
from bitdial.report.drawing import save, write_plot
from bitdial.report.finetuning import FinetuningReport, axes, finetuning_report
from bitdial.report.finetuning_page import finetuning_chart, render_finetuning_html

RATIOS = [0.0, 0.25, 0.5, 0.75, 1.0]
BEFORE, AFTER = [0.8760, 0.8741, 0.8722, 0.8668, 0.8610], [0.8755, 0.8752, 0.8747, 0.8731, 0.8726]


def record(**changes: Any) -> dict[str, Any]:
    evaluations = [
        {
            "update": 100 * k, "epoch": k / 2, "loss": None if k == 0 else 0.9 / k, "score": 0.5,
            "accuracies": [v + 0.001 * k for v in BEFORE],
        }
        for k in range(5)
    ]  # fmt: skip
    result: dict[str, Any] = {
        "config": {"epochs": 2, "learning_rate": 2e-4, "reselect": False, "passes": "dual"},
        "evaluations": evaluations,
        "losses": [1.0, 0.8, 0.7, 0.65],
        "updates": 400,
        "best_update": 300,
        "stopped": "",
        "seconds": {"seconds": 3725.0, "training_seconds": 3600.0, "derive_seconds": 60.0, "total": 3800.0},
        "before": [{"ratio": r, "accuracy": a} for r, a in zip(RATIOS, BEFORE, strict=True)],
        "differences": [
            {"ratio": r, "difference": b - a, "standard_error": 0.0012}
            for r, a, b in zip(RATIOS, BEFORE, AFTER, strict=True)
        ],
        "cpu": "a processor",
        "device": "cuda",
        "bfloat16": True,
        "threads": 2,
        "data": {"data": "pictures", "training": 48000, "validation": 2000, "augmented": True},
    }
    return {**result, **changes}


def program(finetuning: Any, measured: bool = True) -> Program:
    provenance = {"finetuning": finetuning}
    if measured:
        base = {"label": "float32", "ratio": None, "accuracy": 0.8765}
        provenance["evaluation"] = {"images": 2000, "data": "pictures", "baselines": [base]}
    curve = [{"ratio": r, "accuracy": a} for r, a in zip(RATIOS, AFTER, strict=True)] if measured else []
    return Program(["x"], ["x"], [], {}, {}, {}, RATIOS, provenance=provenance, curve=curve)


@pytest.fixture
def report() -> FinetuningReport:
    return finetuning_report(program(record()), "net", "2025-01-01T00:00:00+00:00")


def test_figures_are_those_of_the_record(report: FinetuningReport) -> None:
    assert report.per_epoch == 200.0 and [u for u, _ in report.losses] == [20, 40, 60, 80]
    assert [c.difference for c in report.changes] == pytest.approx([b - a for a, b in zip(BEFORE, AFTER, strict=True)])
    assert report.mean("after") == pytest.approx(sum(AFTER) / 5) and report.float_accuracy == 0.8765
    assert report.measured == "2000 test images of pictures"
    assert [[v for _, v in line] for line in report.accuracies][4] == pytest.approx(
        [0.861 + 0.001 * k for k in range(5)]
    )
    assert report.machine == "a processor, cuda, bfloat16, 2 threads" and report.times["in all"] == "1 h 2 min"
    curve = report.curve()
    assert curve is not None and curve.curves[0][0] == "before"
    assert curve.levels == (("float32", pytest.approx(87.65)),)
    along, up = axes(report.losses, report.updates, report.per_epoch)
    assert along.high == 2.0 and along.ticks[0] == 0.0 and along.ticks[-1] == 2.0 and up.low < 0.65 < 1.0 < up.high


def test_page_is_whole_and_self_contained(report: FinetuningReport) -> None:
    page = render_finetuning_html(report)
    assert page == render_finetuning_html(report)
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    text = " ".join(" ".join(root.itertext()).split())
    for told in (
        "87.26 %",
        "+1.16",
        "0.12",
        "87.65",
        "48000",
        "learning rate 0.0002",
        "update 300",
        "mean of the ratios",
    ):
        assert told in text, told
    assert "Read with care" not in text and "http" not in page.replace("http-equiv", "")
    charts = [svg.get("aria-labelledby") for svg in root.findall(".//svg")]
    assert charts == [f"chart-{name}-title chart-{name}-desc" for name in ("curve", "loss", "validation")]
    identifiers = [node.get("id") for node in root.iter() if node.get("id")]
    assert len(identifiers) == len(set(identifiers))


def test_names_cannot_break_out_of_the_page() -> None:
    hostile = "</title><script>alert(1)</script>"
    content = record(stopped=hostile, cpu=hostile, config={hostile: hostile}, data={"data": hostile})
    page = render_finetuning_html(finetuning_report(program(content), hostile))
    assert "<script" not in page
    ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def test_an_early_end_is_said_first() -> None:
    page = render_finetuning_html(finetuning_report(program(record(stopped="the loss rose to 12")), "net"))
    assert page.index("Training ended early: the loss rose to 12") < page.index("Before and after")


def test_without_test_images_the_validation_images_speak() -> None:
    bare = record()
    del bare["before"], bare["differences"]
    report = finetuning_report(program(bare, measured=False), "net")
    assert "validation images" in report.measured and report.float_accuracy is None
    assert [c.after - c.before for c in report.changes] == pytest.approx([0.003] * 5)
    assert "Std. error" not in render_finetuning_html(report)


def test_a_short_run_without_validation_has_a_page_and_a_picture() -> None:
    rows = [{"update": 0, "epoch": 0.0, "loss": None, "accuracies": [], "score": 0.0}]
    rows += [{"update": 4, "epoch": 1.0, "loss": 0.5, "accuracies": [], "score": 4.0}]
    bare = record(evaluations=rows, losses=[], updates=4, best_update=4)
    del bare["before"], bare["differences"]
    report = finetuning_report(program(bare, measured=False), "net")
    assert report.changes == () and report.losses == ((4.0, 0.5),) and report.curve() is None
    assert "No validation images" in render_finetuning_html(report)
    pytest.importorskip("matplotlib")
    assert save(finetuning_chart(report)).startswith(b"\x89PNG")
    nothing = dataclasses.replace(report, losses=())
    assert render_finetuning_html(nothing) and save(finetuning_chart(nothing))


@pytest.mark.parametrize("broken", [None, {}, {"evaluations": 3}, {"config": []}, {"seconds": {}}, {"losses": ["a"]}])
def test_a_model_without_a_sound_record_is_refused(broken: dict[str, Any] | None) -> None:
    content = None if broken is None else record(**broken) if broken else {}
    with pytest.raises(DataError, match="net"):
        finetuning_report(program(content), "net")


def test_pictures(report: FinetuningReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chart = finetuning_chart(report)
    write_plot(chart, tmp_path / "a.png")
    write_plot(chart, tmp_path / "a.svg")
    assert (tmp_path / "a.png").read_bytes() == save(chart)
    drawn = (tmp_path / "a.svg").read_text()
    for told in ("finetuned 87.26", "before 86.10", "float32 87.65", "Epochs", "Validation accuracy"):
        assert told in drawn, told
    with pytest.raises(ConfigError, match=r"\.png"):
        write_plot(chart, tmp_path / "a.gif")
    with pytest.raises(OutputError):
        write_plot(chart, tmp_path / "absent" / "a.png")
