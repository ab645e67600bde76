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

from bitdial.benchmarking.latency import LatencyRow
from bitdial.benchmarking.timing import Samples
from bitdial.cli.terminal import Terminal
from bitdial.engines.cpu import native
from walk import Demo, verdict

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"
LABELS = ["float32", "naive 4-bit", "naive 4-bit"]
RATIOS = [0.0, 0.25, 0.5, 0.75, 1.0]
needs_cpu_engine = pytest.mark.skipif(bool(native.missing()), reason=f"NO CPU ENGINE: {native.missing()}")
# The demo as it runs where the extension was not compiled.
WITHOUT_EXTENSION = """
import sys
from bitdial.engines.cpu import native
native._extension, native._problem = None, "no such module"
sys.path.insert(0, sys.argv.pop(1))
from walk import main
sys.exit(main(sys.argv[1:]))
"""

# Shows what it does and keeps, beside it, the object that --json would print.
BOTH = """
import json, pathlib, sys
sys.path.insert(0, sys.argv.pop(1))
from walk import main
from bitdial.cli.terminal import Terminal, plain
Terminal.emit = lambda self, content: pathlib.Path("content.json").write_text(json.dumps(plain(content), allow_nan=False))
sys.exit(main(sys.argv[1:]))
"""


def run_demo(folder: Path, *arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    what = ["-c", code, str(DEMO)] if code else [str(DEMO)]
    return subprocess.run(
        [sys.executable, *what, *arguments],
        cwd=folder,
        env={**os.environ, "BITDIAL_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[str, dict[str, Any]]:
    """What one run shows, and what it would print with --json."""
    done = run_demo(folder, "--quick", "--threads", "1", code=BOTH)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "content.json").read_text())


@pytest.fixture(scope="module")
def shown(both: tuple[str, dict[str, Any]]) -> str:
    return both[0]


@pytest.fixture(scope="module")
def content(both: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return both[1]


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
    assert [row["ratio"] for row in content["curve"]] == RATIOS
    assert [row["label"] for row in content["baselines"]] == LABELS
    assert all(row["samples"] == 360 for row in [*content["curve"], *content["baselines"]])
    for row in content["curve"]:
        assert f"{100 * row['accuracy']:.2f} %" in shown and f"{100 * row['low_share']:.1f} %" in shown
    assert content["curve"][0]["agreement"] == 1.0
    assert content["curve"][-1]["low_share"] > 0.99


def test_the_dial_is_real(folder: Path, content: dict[str, Any]) -> None:
    from bitdial.artifact import load_program

    program = load_program(folder / content["model"])
    eligible = [layer for layer in program.layers.values() if layer.eligible]
    assert len(eligible) == 7 and all(layer.n_groups >= 4 for layer in eligible)
    assert program.nested and content["loaded_model_is_bit_identical"] is True


@needs_cpu_engine
def test_kernels_executed_what_the_plan_says(folder: Path, content: dict[str, Any], shown: str) -> None:
    from bitdial.artifact import load_program

    program = load_program(folder / content["model"])
    assert content["engine"] == {"name": "cpu", "cpu_engine_missing": ""}
    assert content["bit_identical_to_reference"] is True
    assert "bit-identical to the reference engine's: 360 images at 5 ratios" in shown
    everything = sum(layer.macs for layer in program.layers.values())
    assert [row["ratio"] for row in content["executed"]] == RATIOS
    for index, row in enumerate(content["executed"]):
        assert row["low_macs"] + row["high_macs"] == everything
        assert row["low_macs"] / everything == pytest.approx(program.low_share(index))
    first, last = content["executed"][0], content["executed"][-1]
    assert first["low_macs"] == 0 and first["kernels"] == [] and first["multiplications"] == everything
    assert last["low_macs"] > 0.99 * everything and last["kernels"]


@needs_cpu_engine
def test_it_ends_with_accuracy_against_latency(folder: Path, content: dict[str, Any], shown: str) -> None:
    latency = content["latency"]
    assert [(row["batch"], row["ratio"]) for row in latency["rows"]] == [(b, r) for b in (1, 16) for r in RATIOS]
    accuracy = {row["ratio"]: row["accuracy"] for row in content["curve"]}
    for row in latency["rows"]:
        assert row["median_ms"] > 0 and row["threads"] == 1 and row["accuracy"] == accuracy[row["ratio"]]
    assert [row["speedup"] for row in latency["rows"] if row["ratio"] == 0.0] == [1.0, 1.0]
    assert f"{latency['rows'][4]['speedup']:.2f} times at batch 1 " in latency["verdict"]
    if latency["picture"] is None:
        assert "matplotlib" in shown
    else:
        assert (folder / latency["picture"]).read_bytes().startswith(b"\x89PNG") and latency["picture"] in shown


def test_without_the_extension_the_reference_engine_steps_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "_extension", None)
    monkeypatch.setattr(native, "_problem", "no such module", raising=False)
    demo = Demo(Terminal(), tmp_path, 0, True, None)
    demo.say_engine()
    told = capsys.readouterr().out
    assert demo.engine == "reference" and "cannot run" in told and "install a C++ compiler" in told
    assert not any("cpu" in command or "benchmark" in command for command in demo.commands())


@pytest.mark.slow
def test_without_the_extension_it_measures_accuracy_alone(folder: Path, content: dict[str, Any]) -> None:
    done = run_demo(folder, "--quick", "--threads", "1", code=WITHOUT_EXTENSION)
    assert done.returncode == 0, done.stderr
    assert "the CPU engine cannot run" in done.stdout and "install a C++ compiler" in done.stdout
    assert "reference engine (" in done.stdout and "no such module" in done.stdout
    assert "batch 16" not in done.stdout and "--engine cpu" not in done.stdout
    # The engines agree bit for bit, so the table is the same.
    for row in content["curve"]:
        assert f"{100 * row['accuracy']:.2f} %" in done.stdout and f"{row['distance']:.4f}" in done.stdout


def test_verdict_is_what_was_measured() -> None:
    def rows(gains: dict[int, float], accuracy: float | None = 0.97) -> list[LatencyRow]:
        made = []
        for batch, gain in gains.items():
            for ratio, speed, quality in ((0.0, 1.0, 0.98), (0.5, 1.0, 0.98), (1.0, gain, accuracy)):
                samples = Samples("", {0: [0.001 / speed]})
                made.append(
                    LatencyRow(ratio, batch, 1, "portable", samples, 1 / speed, ratio, ratio, {"accuracy": quality})
                )
        return made

    good = verdict(rows({1: 1.2, 16: 2.0}))
    assert "1.20 times at batch 1 and 2.00 times at batch 16" in good and "-1.00 points" in good and "small" not in good
    assert "points" not in verdict(rows({1: 1.2}, None))
    for gains in ({1: 1.01, 16: 0.9}, {1: 0.5}):
        bad = verdict(rows(gains))
        assert f"{gains[1]:.2f} times at batch 1" in bad and "too small" in bad and "README" in bad


@needs_cpu_engine
def test_a_burst_is_served_without_and_with_the_dial(folder: Path, content: dict[str, Any], shown: str) -> None:
    burst = content["burst"]
    assert set(burst["runs"]) == {"8 bits only", "with the dial"} and burst["burst_rate"] > burst["calm_rate"] > 0
    for name, run in burst["runs"].items():
        assert name in shown and run["requests"] > 0 and run["counts"]["failed"] == 0
        assert sum(run["counts"].values()) == run["requests"]
    assert burst["runs"]["8 bits only"]["mean_ratio"] == 0.0
    page = (folder / "demo-output" / "burst.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "with the dial" in page


def test_the_report_is_complete_in_itself(folder: Path, content: dict[str, Any]) -> None:
    page = (folder / content["report"]).read_text()
    assert page.startswith("<!DOCTYPE html>") and "http://" not in page.replace("http://www.w3.org/", "")
    for section in ("curve", "executed", "map", "ranges", "saturation", "search", "layers", "provenance"):
        assert f'id="{section}"' in page


@pytest.mark.slow
def test_commands_it_suggests_work(folder: Path, content: dict[str, Any], shown: str) -> None:
    assert len(content["next"]) == (5 if native.missing() else 8)
    for command in content["next"]:
        assert command in shown
        if " serve " in command:
            continue  # it would serve for ever; the step before has served this file
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "BITDIAL_CACHE_DIR": str(folder / "cache")}
        done = subprocess.run(
            shlex.split(command), cwd=folder, capture_output=True, text=True, timeout=300, check=False, env=environment
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_a_place_that_cannot_be_written_is_one_line(folder: Path) -> None:
    (folder / "file").write_text("")
    done = run_demo(folder, "--quick", "--out", "file/below", "--json")
    assert done.returncode == 2 and set(json.loads(done.stdout)) == {"error", "type"}
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_second_run_prints_one_object_and_does_not_train_again(folder: Path, content: dict[str, Any]) -> None:
    before = (folder / "demo-output" / "digits-quick.safetensors").stat().st_mtime_ns
    done = run_demo(folder, "--quick", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == set(content)
    assert (folder / "demo-output" / "digits-quick.safetensors").stat().st_mtime_ns == before


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
    assert content["network"] == "digits_wide"
    assert all(f <= g + 1e-12 for f, g in zip(fitness, greedy, strict=True)) and any(
        f < g for f, g in zip(fitness, greedy, strict=True)
    )
