"""The kernels as machine code: they compile for every architecture without a GPU, and hold the instructions that are claimed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest

from bitdial.engines.cuda import compilation
from bitdial.engines.cuda.arguments import ConvArgs, Launch
from bitdial.engines.cuda.cubin import resources
from bitdial.engines.cuda.device import ARCHITECTURES, NATIVE_INT4
from bitdial.errors import EngineError

KERNELS = {
    *(f"conv{kind}_{sign}signed" for kind in ("", "_wide", "_elements") for sign in ("", "un")),
    *(f"matmul_{a}{b}" for a in "us" for b in "us"), "attention_rows16", "attention_rows32",
    *(f"{name}_kernel" for name in ("pointwise", "pool", "depthwise", "softmax", "layer_norm", "sum", "elements", "whole_rows",
                                    "shift", "lower")),
}
QUICK = ("sm_80", "sm_89", "sm_90", "sm_120")  # one of each kind of tensor core; compiling one takes seconds
MOST_REGISTERS = {128: 168, 256: 128}  # of a thread, by threads of a block: twelve warps on a multiprocessor, or sixteen


def disassembler() -> str | None:
    """nvdisasm from its package, or from a toolkit."""
    try:
        files = metadata.files("nvidia-cuda-nvdisasm") or []
    except metadata.PackageNotFoundError:
        files = []
    return next((str(Path(str(f.locate()))) for f in files if Path(str(f)).name == "nvdisasm"), shutil.which("nvdisasm"))


@pytest.mark.parametrize(
    "architecture", [a if a in QUICK else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES]
)
def test_machine_code(architecture: str, tmp_path: Path) -> None:
    if compilation.compiler_missing():
        pytest.skip(f"THE CUDA KERNELS ARE NOT COMPILED: {compilation.compiler_missing()}")
    cubin = compilation.compile_now(architecture)
    taken = resources(cubin)
    assert taken.keys() == KERNELS
    for name, own in taken.items():
        assert own.stack == 0, f"{name} spills registers"
        assert own.registers <= MOST_REGISTERS[Launch(name, (1, 1, 1), ConvArgs()).threads], (name, own)
    program = disassembler()
    if program is None:
        pytest.skip("NO NVDISASM: the instructions are not looked at; pip install nvidia-cuda-nvdisasm")
    (tmp_path / "kernels.cubin").write_bytes(cubin)
    text = subprocess.run([program, "-c", str(tmp_path / "kernels.cubin")], capture_output=True, text=True, check=True).stdout
    cut = re.split(r"\.section\s+\.text\.(\w+),", text)
    parts = dict(zip(cut[1::2], cut[2::2], strict=True))
    assert parts.keys() == KERNELS
    for name, body in parts.items():
        found = Counter(re.findall(r"\b(IMMA\.\d+\.[SU]\d\.[SU]\d|LDL|STL|LDSM|LDGSTS|CALL)\b", body))
        assert not found["LDL"] and not found["STL"], f"{name} spills registers"
        if name.startswith("conv"):
            sign = "U" if name.endswith("unsigned") else "S"
            narrow = found[f"IMMA.16864.{sign}4.S4"], found[f"IMMA.16832.{sign}4.S4"]
            assert narrow == (8, 8) if architecture in NATIVE_INT4 else narrow == (0, 0), narrow
            assert found[f"IMMA.16832.{sign}8.S8"] and found["LDSM"] and found["LDGSTS"], found
        elif name.startswith("matmul"):
            assert found["IMMA.16832.{}8.{}8".format(*name[-2:].upper())], found
        elif name.startswith("attention"):
            assert found["IMMA.16832.S8.S8"] and found["IMMA.16832.U8.S8"] and found["LDSM"], found
        assert not [i for i in found if "4.S4" in i and (architecture not in NATIVE_INT4 or not name.startswith("conv"))]


@pytest.mark.parametrize("code", [b"", b"\x7fELF\x02", b"\x7fELF\x02" + bytes(200), b"no ELF file" * 20])
def test_what_is_no_machine_code_is_said(code: bytes) -> None:
    with pytest.raises(EngineError, match="no machine code of kernels"):
        resources(code)


def test_what_does_not_compile_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if compilation.compiler_missing():
        pytest.skip(f"THE CUDA KERNELS ARE NOT COMPILED: {compilation.compiler_missing()}")
    (tmp_path / "kernels.cu").write_text("no kernel")
    monkeypatch.setattr(compilation, "sources", lambda: tmp_path)
    with pytest.raises(EngineError, match="do not compile for sm_89 .*error"):
        compilation.compile_now("sm_89")


def test_machine_code_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiled once per state of the sources; with it the compiler is not needed."""
    monkeypatch.setenv("BITDIAL_CACHE_DIR", str(tmp_path))
    compiled: list[str] = []
    monkeypatch.setattr(compilation, "compile_now", lambda architecture: compiled.append(architecture) or b"code")
    monkeypatch.setattr(compilation, "compiler_missing", lambda: "no compiler")
    compile_kernels = compilation.compile_kernels.__wrapped__
    assert compilation.missing() == "no compiler"
    assert compile_kernels("sm_90") == compile_kernels("sm_90") == b"code" and compiled == ["sm_90"]
    assert compilation.missing() == "" and compile_kernels("sm_86") == b"code"
    shutil.copytree(compilation.sources(), tmp_path / "changed")
    (tmp_path / "changed" / "extract.h").write_text("// changed")
    monkeypatch.setattr(compilation, "sources", lambda: tmp_path / "changed")
    assert compilation.missing() == "no compiler"
    monkeypatch.setenv("BITDIAL_CACHE_DIR", "/proc/no such folder")
    assert compile_kernels("sm_90") == b"code" and len(compiled) == 3


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    assert compilation.compiler_missing() == "cuda-bindings is not installed: pip install bitdial[cuda]"
    with pytest.raises(EngineError, match="cannot be compiled: cuda-bindings is not installed"):
        compilation.compile_now("sm_90")
