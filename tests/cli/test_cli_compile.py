from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bitdial.artifact import load_program
from bitdial.cli.reading import parse_amount
from bitdial.errors import ConfigError


@pytest.fixture(scope="module")
def compiled(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bitdial.cli import main

    path = tmp_path_factory.mktemp("compiled") / "plan.bitdial"
    extra = ["--budget-size", "75%", "--eval-images", "60", "--report", str(path.with_suffix(".html")), "--quiet"]
    assert main(["compile", *settings, *extra, "-o", str(path)]) == 0
    return path


def test_the_file_is_an_ordinary_one_and_keeps_its_plan(bitdial: Any, compiled: Path) -> None:
    program = load_program(compiled)
    plan = program.provenance["layerwise"]
    assert compiled.stat().st_size <= plan["budgets"]["size"]
    assert {row["precision"] for row in plan["layers"]} == {"low", "int8"}
    assert plan["inferences"] == {"float": 1, "quantized": 1, "finishing": 0}
    assert program.provenance["source"]["model"] == "zoo:digits" and program.provenance["evaluation"]["images"] == 60
    assert compiled.with_suffix(".html").stat().st_size > 1000
    shown = bitdial("inspect", compiled)
    assert shown.code == 0 and "layer-wise plan by propagated" in shown.out
    assert "quantize/dequantize pairs" in shown.out
    for row in plan["layers"]:
        assert row["source"] in shown.out
    measured = bitdial("evaluate", compiled, "--data", "digits", "--images", "20", "--json")
    assert measured.code == 0 and [row["ratio"] for row in measured.json["curve"]] == [1.0]


def test_options_reach_the_plan(bitdial: Any, settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "a.bitdial"
    extra = ["--precisions", "int8,bfloat16,float32", "--metric", "sqnr+mse", "--budget-size", "150%", "--no-evaluate"]
    result = bitdial("compile", *settings, *extra, "--order", "score", "--fusion", "default", "-o", out, "--json")
    assert result.code == 0, result.err
    plan = result.json["plan"]
    assert plan["metric"] == "sqnr+mse" and plan["order"] == "score" and plan["fusion"] == "default"
    floats = [row for row in plan["layers"] if row["precision"] != "int8"]
    assert floats and result.json["sizes"]["total"] == out.stat().st_size
    operators = bitdial("inspect", out, "--json").json["description"]["float_operators"]
    shown = {op["source"]: op["precision"] for op in operators}
    assert all(shown[row["source"]] == row["precision"] for row in floats)


def test_an_accuracy_floor_is_measured_on_train_images(bitdial: Any, settings: list[str], tmp_path: Path) -> None:
    arguments = ["compile", *settings, "--no-evaluate", "--validation-images", "20"]
    met = bitdial(*arguments, "--accuracy-floor", "20%", "-o", tmp_path / "a.bitdial", "--json")
    assert met.code == 0 and met.json["plan"]["reached"]["accuracy"] >= 0.2


@pytest.mark.parametrize(
    ("extra", "kind", "told"),
    [
        ([], "ConfigError", "needs a budget"),
        (["--plan", "blockwise", "--budget-size", "80%"], "ConfigError", "layerwise"),
        (["--budget-size", "80 parsecs"], "ConfigError", "--budget-size"),
        (["--budget-latency", "soon"], "ConfigError", "--budget-latency"),
        (["--budget-size", "80%", "--precisions", "int5"], "ConfigError", "precisions"),
        (["--budget-size", "80%", "--metric", "entropy"], "ConfigError", "metric"),
        (["--budget-latency", "5ms", "--latency", "macs"], "ConfigError", "share"),
        (["--budget-size", "1k"], "BudgetError", "smallest file"),
    ],
)
def test_bad_input(bitdial: Any, settings: list[str], tmp_path: Path, extra: list[str], kind: str, told: str) -> None:
    out = tmp_path / "a.bitdial"
    result = bitdial("compile", *settings, *extra, "--no-evaluate", "-o", out, "--json")
    assert result.code == 2 and result.json["type"] == kind and told in result.json["error"]
    assert not out.exists() and not list(tmp_path.iterdir())


def test_existing_files_are_kept(bitdial: Any, settings: list[str], compiled: Path) -> None:
    before = compiled.read_bytes()
    result = bitdial("compile", *settings, "--budget-size", "80%", "-o", compiled)
    assert result.code == 2 and "--force" in result.err and compiled.read_bytes() == before


def test_amounts() -> None:
    units = {"k": 1e3, "mb": 1e6}
    assert parse_amount("300k", units, "-", "") == 3e5 and parse_amount(" 1.5 MB ", units, "-", "") == 1.5e6
    assert parse_amount("80%", units, "-", "") == "80%"
    assert parse_amount("1e3", units, "-", "") == 1000.0
    for text in ("", "k", "3 parsecs", "1.2.3"):
        with pytest.raises(ConfigError):
            parse_amount(text, units, "--budget-size", "300k")
