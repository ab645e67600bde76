"""The command `bitdial export-c`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bitdial.artifact import save_program
from bitdial.cli.export_c import export_c
from bitdial.errors import ArtifactError, ConfigError, ExportError, OutputError, RatioError

sys.path.insert(0, str(Path(__file__).parent.parent / "engines" / "cpu"))
import cpu_networks as nets

app = typer.Typer()
app.command(name="export-c")(export_c)
runner = CliRunner()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "plain.bitdial"
    save_program(nets.quantized(nets.plain_net()), path)
    return path


def test_export_c_command(artifact: Path, tmp_path: Path) -> None:
    done = runner.invoke(app, [str(artifact), "-o", str(tmp_path / "c"), "--name", "plain"])
    assert done.exit_code == 0, done.output
    assert "arena" in done.output and "bytes" in done.output and "100 %" in done.output
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["plain.c", "plain.h", "plain_test.c"]
    assert "Lower bound of the arena" in (tmp_path / "c" / "plain.h").read_text()


def test_export_c_command_json_and_ratios(artifact: Path, tmp_path: Path) -> None:
    done = runner.invoke(app, [str(artifact), "-o", str(tmp_path / "a"), "--ratios", "0,50", "--json"])
    said = json.loads(done.stdout)
    assert said["ratios"] == [0.0, 0.5] and said["arena_bytes"] >= said["arena_lower_bound"] > 0
    done = runner.invoke(app, [str(artifact), "-o", str(tmp_path / "b"), "--ratio", "60", "--json"])
    assert json.loads(done.stdout)["ratios"] == [0.5]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (["--ratio", "0", "--ratios", "0,50"], ConfigError, "exclude each other"),
        (["--ratio", "101"], ConfigError, "outside"),
        (["--ratios", "x"], ConfigError, "no number"),
        (["--name", "while"], ExportError, "--name"),
    ],
)
def test_export_c_command_errors(
    arguments: list[str], error: type[Exception], text: str, artifact: Path, tmp_path: Path
) -> None:
    done = runner.invoke(app, [str(artifact), "-o", str(tmp_path / "c"), *arguments])
    assert isinstance(done.exception, error) and text in str(done.exception)
    assert not (tmp_path / "c").exists()


def test_export_c_command_bad_files(artifact: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.bitdial"
    bad.write_bytes(artifact.read_bytes()[:1000])
    assert isinstance(runner.invoke(app, [str(bad), "-o", str(tmp_path / "c")]).exception, ArtifactError)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    done = runner.invoke(app, [str(artifact), "-o", str(tmp_path / "full")])
    assert isinstance(done.exception, OutputError) and "--force" in str(done.exception)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["x"]
    assert runner.invoke(app, [str(artifact), "-o", str(tmp_path / "full"), "--force"]).exit_code == 0


def test_export_c_command_band(artifact: Path, tmp_path: Path) -> None:
    from bitdial.artifact import load_program

    band = tmp_path / "band.bitdial"
    save_program(load_program(artifact), band, band=(0.5, 1.0))
    done = runner.invoke(app, [str(band), "-o", str(tmp_path / "c"), "--ratio", "0"])
    assert isinstance(done.exception, RatioError)
    assert runner.invoke(app, [str(band), "-o", str(tmp_path / "c")]).exit_code == 0
