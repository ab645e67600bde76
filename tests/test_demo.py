"""The demo: a shortened run here, the whole one behind the slow marker."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

LABELS = ["float32", "naive 4-bit", "naive 4-bit"]


def run_demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flexiq.demo", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def shown(folder: Path) -> str:
    done = run_demo(folder, "--quick", "--threads", "1")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def content(folder: Path, shown: str) -> dict[str, Any]:
    """The same again: training is not repeated, results are."""
    done = run_demo(folder, "--quick", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_table_has_every_setting_and_baseline(shown: str, content: dict[str, Any]) -> None:
    for name in (
        "ratio 0 % (8-bit)",
        "ratio 25 %",
        "ratio 50 %",
        "ratio 75 %",
        "ratio 100 %",
        "float32",
        "naive 4-bit",
    ):
        assert name in shown
    assert [row["ratio"] for row in content["curve"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [row["label"] for row in content["baselines"]] == LABELS
    assert all(row["samples"] == 360 for row in [*content["curve"], *content["baselines"]])
    for row in content["curve"]:
        assert f"{100 * row['accuracy']:.2f} %" in shown and f"{100 * row['low_share']:.1f} %" in shown
    assert content["curve"][0]["agreement"] == 1.0
    assert content["curve"][-1]["low_share"] > 0.99


def test_the_dial_is_real(folder: Path, content: dict[str, Any]) -> None:
    from flexiq.artifact import load_program

    program = load_program(folder / content["model"])
    eligible = [layer for layer in program.layers.values() if layer.eligible]
    assert len(eligible) == 7 and all(layer.n_groups >= 4 for layer in eligible)
    assert program.nested and content["loaded_model_is_bit_identical"] is True


def test_the_report_is_complete_in_itself(folder: Path, content: dict[str, Any]) -> None:
    page = (folder / content["report"]).read_text()
    assert page.startswith("<!DOCTYPE html>") and "http://" not in page.replace("http://www.w3.org/", "")
    for section in ("curve", "executed", "map", "ranges", "saturation", "search", "layers", "provenance"):
        assert f'id="{section}"' in page


def test_commands_it_suggests_work(folder: Path, content: dict[str, Any], shown: str) -> None:
    assert len(content["next"]) == 5
    for command in content["next"]:
        assert command in shown
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            shlex.split(command), cwd=folder, capture_output=True, text=True, timeout=300, check=False, env=environment
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_a_place_that_cannot_be_written_is_one_line(folder: Path) -> None:
    (folder / "file").write_text("")
    done = run_demo(folder, "--quick", "--out", "file/below")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    done = run_demo(tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    accuracy = [row["accuracy"] for row in content["curve"]]
    float32 = content["baselines"][0]["accuracy"]
    assert float32 > 0.97
    assert abs(accuracy[0] - float32) <= 1 / 360 + 1e-9  # one image
    assert min(accuracy) > float32 - 0.02
    fitness, greedy = content["search"]["fitness"], content["search"]["greedy_fitness"]
    assert all(f <= g + 1e-12 for f, g in zip(fitness, greedy, strict=True)) and any(
        f < g for f, g in zip(fitness, greedy, strict=True)
    )
