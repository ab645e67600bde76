from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitdial.artifact import load_program
from bitdial.cli.terminal import Terminal
from bitdial.errors import OutputError

QUICK = ["--engine", "reference", "--repeats", "2"]


def test_files_join_latency_and_accuracy(bitdial, artifact: Path, tmp_path: Path) -> None:
    out, plot, page = tmp_path / "l.json", tmp_path / "l.svg", tmp_path / "l.html"
    result = bitdial("benchmark", artifact, *QUICK, "--batch", "2,1", "-o", out, "--plot", plot, "--html", page)
    assert result.code == 0, result.err
    content = json.loads(out.read_text())
    program = load_program(artifact)
    assert [(r["batch"], r["ratio"]) for r in content["rows"]] == [(b, r) for b in (1, 2) for r in program.ratios]
    by_ratio = {row["ratio"]: row["accuracy"] for row in program.curve}
    for row in content["rows"]:
        assert row["accuracy"] == by_ratio[row["ratio"]] and row["repeats"] == 2
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert row["low_share"] == pytest.approx(program.low_share(program.ratios.index(row["ratio"])))
    assert content["machine"]["cpu"] and content["machine"]["usable_cores"] >= 1
    assert plot.read_bytes().startswith(b"<?xml") and "Accuracy against latency" in page.read_text()
    assert content["machine"]["cpu"] in result.out and "engine reference, 1 thread" in result.out
    assert all(str(path) in result.out for path in (out, plot, page))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l.html", "l.json", "l.svg"]


def test_json_is_one_object(bitdial, artifact: Path) -> None:
    result = bitdial("benchmark", artifact, *QUICK, "--ratio", "0,60", "--threads", "1", "--json")
    assert result.code == 0
    content = result.json
    assert content["command"] == "benchmark" and content["engine"] == "reference" and content["files"] == []
    assert [row["ratio"] for row in content["rows"]] == [0.0, 0.5]
    assert content["rows"][0]["speedup"] == 1.0


def test_table_shows_every_setting(bitdial, artifact: Path) -> None:
    result = bitdial("benchmark", artifact, *QUICK, "--ratio", "50", "--batch", "3")
    assert result.code == 0
    (line,) = [line for line in result.out.splitlines() if line.split()[:2] == ["3", "1"]]
    accuracy = next(row["accuracy"] for row in load_program(artifact).curve if row["ratio"] == 0.5)
    assert "50 %" in line and f"{100 * accuracy:.2f} %" in line


@pytest.mark.parametrize(
    "extra, kind, told",
    [
        (["--batch", "0"], "ConfigError", "--batch"),
        (["--batch", "1,,2"], "ConfigError", "--batch"),
        (["--threads", "x"], "ConfigError", "--threads"),
        (["--batch", "9" * 5000], "ConfigError", "--batch"),
        (["--ratio", "150"], "ConfigError", "--ratio"),
        (["--budget", "0"], "ConfigError", "budget"),
        (["--isa", "avx2"], "ConfigError", "--isa"),
        (["--engine", "psychic"], "EngineError", "psychic"),
        (["--plot", "x.gif"], "ConfigError", ".svg"),
        (["--plot", "no-such-folder/x.png"], "OutputError", "no-such-folder"),
        (["-o", "no-such-folder/x.json"], "OutputError", "no-such-folder"),
        (["--html", "a.html", "-o", "a.html"], "ConfigError", "same file"),
    ],
)
def test_wrong_settings_are_one_line(
    bitdial, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str], kind: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = bitdial("benchmark", artifact, *QUICK, *extra, "--json")
    assert result.code == 2 and result.json["type"] == kind and told in result.json["error"]
    assert result.err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_absent_and_damaged_models(bitdial, tmp_path: Path) -> None:
    assert bitdial("benchmark", tmp_path / "absent.bitdial", *QUICK, "--json").json["type"] == "ArtifactError"
    (tmp_path / "bad.bitdial").write_bytes(b"no model")
    assert bitdial("benchmark", tmp_path / "bad.bitdial", *QUICK, "--json").json["type"] == "ArtifactError"


def test_a_file_of_another_kind_is_not_replaced(bitdial, artifact: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("x")
    for option in ("-o", "--html"):
        result = bitdial("benchmark", artifact, *QUICK, option, precious, "--json")
        assert result.code == 2 and precious.read_text() == "x"


def test_all_files_or_none(bitdial, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitdial.report import writing

    real = writing.write_atomically

    def failing(path: Path, data: bytes) -> None:
        if str(path).endswith(".html"):
            raise OutputError("the disk is full; choose another")
        real(path, data)

    monkeypatch.setattr(writing, "write_atomically", failing)
    places = ["-o", tmp_path / "a.json", "--plot", tmp_path / "a.png", "--html", tmp_path / "a.html"]
    result = bitdial("benchmark", artifact, *QUICK, *places)
    assert result.code == 2 and "disk is full" in result.err and list(tmp_path.iterdir()) == []


def test_a_stop_leaves_nothing(bitdial, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    @contextlib.contextmanager
    def stopping(self: Terminal):
        def report(stage: str, share: float) -> None:
            if stage == "measuring" and share > 0.3:
                raise KeyboardInterrupt

        yield report

    monkeypatch.setattr(Terminal, "progress", stopping)
    result = bitdial("benchmark", artifact, *QUICK, "-o", tmp_path / "a.json")
    assert result.code == 130 and "nothing was written" in result.err and list(tmp_path.iterdir()) == []


def test_help_has_examples(bitdial) -> None:
    result = bitdial("benchmark", "--help")
    assert result.code == 0 and "Examples:" in result.out and "--plot" in result.out
    assert "benchmark" in bitdial("--help").out


def test_without_a_cpu_engine_the_reference_is_named(bitdial, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitdial.engines.cpu.native.missing", lambda: "no compiler was there")
    result = bitdial("benchmark", artifact, "--repeats", "1", "--ratio", "0")
    assert result.code == 0 and "no compiler was there" in result.err and "engine reference" in result.out
