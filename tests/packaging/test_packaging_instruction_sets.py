"""Compiled files keep their instructions to themselves: the processor of the user may lack them.

Where two files define the same inline function or template, the linker keeps one copy, perhaps the one that only a newer
processor can run. So a file of one instruction set must not define a symbol that the linker may merge.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]
SPECIAL = re.compile(r"_(avx512vnni|avxvnni|avx512|avx2)\.cpp\.o$")
OF_A_SET = re.compile(r"_(avx512vnni|avxvnni|avx512|avx2|portable)\.cpp\.o$")
OF_ARM = re.compile(r"_(i8mm|dotprod|neon)\.cpp$")

pytestmark = [
    pytest.mark.usefixtures("needs_compiler"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="ONLY X86-64 has several instruction sets here"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="NO OBJDUMP: install binutils"),
]


@pytest.fixture(scope="module")
def objects(wheel: Path) -> list[Path]:
    """Object files of csrc/cpu as they went into the wheel, nanobind's not among them."""
    _, _, _, tags = parse_wheel_filename(wheel.name)
    (tag,) = tags
    folder = ROOT / "build" / str(tag) / "CMakeFiles"
    sources = [path for path in sorted((ROOT / "csrc" / "cpu").glob("*/*.cpp")) if OF_ARM.search(path.name) is None]
    found = []
    for source in sources:
        target = "_native" if source.parent.name == "bindings" else "bitdial_cpu"
        found.append(folder / f"{target}.dir" / f"{source.relative_to(ROOT)}.o")
    assert all(path.is_file() for path in found)
    return found


def mergeable(path: Path, run: Run) -> list[str]:
    """Symbols that an object file defines and that the linker may replace by another file's of the same name."""
    done = run("nm", "--demangle", "--defined-only", path, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    kinds_and_names = (line.split(maxsplit=2)[-2:] for line in done.stdout.splitlines())
    # DW.ref: a pointer to the exception handler, data and the same everywhere
    return [name for kind, name in kinds_and_names if kind in "WVu" and not name.startswith("DW.ref.")]


def test_files_of_an_instruction_set_define_nothing_that_the_linker_may_merge(objects: list[Path], run: Run) -> None:
    special = [path for path in objects if SPECIAL.search(path.name)]
    assert special, "no file of an instruction set was compiled"
    shared = [f"{path.name}: {name}" for path in special for name in mergeable(path, run)]
    remedy = "put these into an anonymous namespace or make them static:\n"
    assert not shared, remedy + "\n".join(shared)


def test_files_of_an_instruction_set_offer_nothing_outside_its_namespace(objects: list[Path], run: Run) -> None:
    sets = [(path, found[1]) for path in objects if (found := OF_A_SET.search(path.name))]
    assert sets
    for path, isa in sets:
        done = run("nm", "--demangle", "--defined-only", "--extern-only", path, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        names = [line.split(maxsplit=2)[2] for line in done.stdout.splitlines()]
        outside = [name for name in names if not name.startswith(f"bitdial::{isa}::") and not name.startswith("DW.ref.")]
        assert names and not outside, f"{path.name}: {outside}"


def test_a_shared_inline_function_would_be_found(tmp_path: Path, run: Run) -> None:
    (tmp_path / "a.cpp").write_text("inline int f(int x) { return x + 1; }\nint (*g())(int) { return f; }\n")
    compiler = os.environ.get("CXX") or "c++"
    done = run(*compiler.split(), "-O3", "-c", "a.cpp", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert mergeable(tmp_path / "a.o", run) == ["f(int)"]


def test_the_other_files_use_no_wide_registers(objects: list[Path], run: Run) -> None:
    """Nothing outside of the files named for AVX2 or AVX-512 was compiled with either."""
    for path in objects:
        done = run("objdump", "--disassemble", "--no-show-raw-insn", path, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        wide = re.search(r"%[yz]mm\d", done.stdout) is not None
        if SPECIAL.search(path.name) is None:
            assert not wide, f"{path.name} uses AVX registers, but its name does not say so"
