from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bitdial import __version__
from bitdial.engines.cpu import native
from bitdial.engines.cuda import driver as cuda_driver

COMMANDS = (
    *("quantize", "finetune", "compile", "evaluate", "inspect", "compare", "report", "benchmark", "latency-table", "serve"),
    *("loadtest", "deploy", "simulate", "export-c", "export-onnx", "doctor"),
)
# Makes `import torch` and `find_spec("torch")` behave as where torch is not installed.
WITHOUT_TORCH = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
def hidden(name, *rest, **more):
    return None if name.partition(".")[0] in ("torch", "torchvision", "timm") else find(name, *rest, **more)
importlib.machinery.PathFinder.find_spec = hidden
from bitdial.cli import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(code)
"""


def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from bitdial.cli import main; main(['--help']); "
        "heavy = {'torch', 'numpy', 'pydantic', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_and_json(bitdial, command: str) -> None:
    result = bitdial(command, "--help")
    assert result.code == 0
    assert "Examples:" in result.out and f"bitdial {command}" in result.out and "--json" in result.out


def test_version_and_bare_call(bitdial) -> None:
    assert bitdial("--version").out == f"bitdial {__version__}\n"
    bare = bitdial()
    assert bare.code == 0 and "Usage" in bare.out


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["evaluate", "x.bitdial", "--bogus"], "--bogus"),
        (["evaluate"], "MODEL.bitdial"),
        (["nothing"], "nothing"),
        (["quantize", "--model", "zoo:digits"], "output"),
        (["evaluate", "x.bitdial", "--batch-size", "0"], "batch-size"),
    ],
)
def test_wrong_arguments_are_one_line(bitdial, arguments: list[str], told: str) -> None:
    result = bitdial(*arguments)
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1 and told in result.err
    with_json = bitdial(*arguments, "--json")
    assert with_json.code == 2 and with_json.json["type"] == "UsageError" and told in with_json.json["error"]


def test_own_errors_are_one_line_and_debug_shows_where(bitdial, tmp_path: Path) -> None:
    result = bitdial("inspect", tmp_path / "absent.bitdial")
    assert result.code == 2 and result.out == "" and result.err.count("\n") == 1 and "absent.bitdial" in result.err
    as_json = bitdial("inspect", tmp_path / "absent.bitdial", "--json")
    assert as_json.json["type"] == "ArtifactError"
    assert "Traceback" in bitdial("inspect", tmp_path / "absent.bitdial", "--debug").err


def test_bugs_show_their_traceback(bitdial, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("of no use")

    monkeypatch.setattr("bitdial.cli.doctor.examine", broken)
    result = bitdial("doctor")
    assert result.code == 1 and "Traceback" in result.err and "unexpected ZeroDivisionError: of no use" in result.err


def test_doctor(bitdial) -> None:
    found = bitdial("doctor", "--json")
    assert found.code == 0
    content = found.json
    import torch

    assert content["torch"]["version"] == torch.__version__
    assert content["engines"] == {"reference": "", "cpu": native.missing(), "cuda": cuda_driver.missing(), "npu": ""}
    assert "not yet run on a GPU" in content["engine_notes"]["cuda"]
    assert content["missing_required"] == []
    assert content["cpu"]["usable_cores"] >= 1 and content["cpu"]["model"]
    assert isinstance(content["torch"]["int8_convolutions"], bool)
    text = bitdial("doctor").out
    assert "nothing required is missing" in text and content["cpu"]["model"] in text


@pytest.mark.skipif(bool(native.missing()), reason=f"NO CPU ENGINE: {native.missing()}")
def test_doctor_says_what_the_cpu_engine_uses(bitdial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITDIAL_CPU_ISA", raising=False)
    known = native.isas()
    engine = bitdial("doctor", "--json").json["cpu_engine"]
    assert engine["instruction_sets"] == known and engine["chosen"] == known[0] and engine["forced_by"] is None
    assert engine["missing"] == "" and engine["built_from"] == __version__
    text = bitdial("doctor").out
    assert f"uses {known[0]} (the best that runs here)" in text and ", ".join(known) in text
    monkeypatch.setenv("BITDIAL_CPU_ISA", "portable")
    assert bitdial("doctor", "--json").json["cpu_engine"]["chosen"] == "portable"
    assert "uses portable (BITDIAL_CPU_ISA=portable)" in bitdial("doctor").out
    monkeypatch.setattr(native, "isas", lambda: ["dotprod", "neon", "portable"])
    monkeypatch.delenv("BITDIAL_CPU_ISA")
    text = bitdial("doctor").out
    assert "uses dotprod (the best that runs here)" in text and "verified under emulation, speed not measured" in text
    assert native.target() == "portable"
    monkeypatch.setattr(native, "isas", lambda: known)
    monkeypatch.setenv("BITDIAL_CPU_ISA", "mmx")
    wrong = bitdial("doctor", "--json")
    assert wrong.code == 0 and wrong.json["cpu_engine"]["chosen"] is None
    assert "'mmx' (from BITDIAL_CPU_ISA)" in wrong.json["cpu_engine"]["problem"]
    assert "or unset it" in bitdial("doctor").out


def test_doctor_without_the_cpu_engine_says_the_remedy(bitdial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_extension", None)
    monkeypatch.setattr(native, "_problem", "no such module", raising=False)
    found = bitdial("doctor", "--json")
    assert found.code == 0  # it is an engine among several
    engine = found.json["cpu_engine"]
    assert "no such module" in engine["missing"] and found.json["engines"]["cpu"] == engine["missing"]
    assert engine["instruction_sets"] == [] and engine["chosen"] is None and engine["built_from"] is None
    text = bitdial("doctor").out
    assert "install a C++ compiler" in text and "--no-cache-dir" in text


def test_doctor_tells_what_required_is_missing(bitdial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitdial.cli.doctor.REQUIRED", ("numpy", "no_such_package_of_bitdial"))
    result = bitdial("doctor", "--json")
    assert result.code == 1
    assert result.json["missing_required"] == ["no_such_package_of_bitdial: pip install no_such_package_of_bitdial"]


def test_doctor_without_torch() -> None:
    done = without_torch("doctor", "--json")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["torch"] is None and "torch is not installed" in content["engines"]["reference"]
    assert content["optional_packages"]["torch"]["version"] is None
    assert content["engines"]["cpu"] == native.missing()  # it needs no torch
    assert "torch: not installed" in without_torch("doctor").stdout


def test_files_are_inspected_compared_and_reported_without_torch(artifact: Path, tmp_path: Path) -> None:
    shown = without_torch("inspect", artifact, "--layers", "--graph", "--verify")
    assert shown.returncode == 0, shown.stderr
    assert "block1.conv1" in shown.stdout and "graph(" in shown.stdout
    assert without_torch("compare", artifact, artifact).returncode == 0
    page = tmp_path / "page.html"
    assert without_torch("report", artifact, "-o", page).returncode == 0
    assert page.read_text().startswith("<!DOCTYPE html>")
    refused = without_torch("evaluate", artifact, "--data", "digits")
    assert refused.returncode == 2 and "torch is not installed" in refused.stderr and refused.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_traceback(artifact: Path) -> None:
    line = f'"{sys.executable}" -m bitdial.cli inspect "{artifact}" --graph --layers | head -c 10'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=300, check=False)
    assert len(done.stdout) == 10 and "Traceback" not in done.stderr
