"""Compilers and emulators that the tests of C export use."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import pytest

from bitdial.export.c import CExport, write_folder

WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wconversion"]
BOARD = Path(str(resources.files("bitdial.export.c") / "cortex_m"))
CORTEX = [
    "-mthumb",
    "-mfloat-abi=hard",
    "-ffreestanding",
    "-nostartfiles",
    "-T",
    str(BOARD / "link.ld"),
    str(BOARD / "startup.c"),
]
QEMU_ARM = ["qemu-system-arm", "-nographic", "-semihosting-config", "enable=on,target=native"]


def need(*tools: str) -> None:
    """Skip, loudly, where a tool is absent."""
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"TOOL MISSING: {tool} is not installed; this target of C export was NOT tested")


def need_cortex_m(*tools: str) -> None:
    """Skip, loudly, where there is no compiler for Cortex-M, no C library with it (memcpy comes from there), or no `tools`."""
    need("arm-none-eabi-gcc", *tools)
    found = subprocess.run(["arm-none-eabi-gcc", "-print-file-name=libc.a"], capture_output=True, text=True, check=True)
    if not os.path.isabs(found.stdout.strip()):
        pytest.skip("TOOL MISSING: arm-none-eabi-gcc has no libc.a (newlib); this target of C export was NOT tested")


def self_tester(tmp_path: Path) -> Callable[..., str]:
    """A function that compiles an export's self-test and runs it; it returns what that printed, and fails on warnings and on
    wrong results."""
    count = 0

    def run(
        exported: CExport,
        compiler: str = os.environ.get("CC", "cc"),
        flags: Sequence[str] = ("-O1",),
        emulator: Sequence[str] = (),
    ) -> str:
        nonlocal count
        count += 1
        folder = tmp_path / f"c{count}"
        write_folder(exported, folder)
        name = exported.name
        program = folder / "self_test"
        sources = [str(folder / f"{name}.c"), str(folder / f"{name}_test.c")]
        standard = [] if any(f.startswith("-std=") for f in flags) else ["-std=c99", "-pedantic"]
        command = [compiler, *standard, *WARNINGS, *flags, *sources, "-o", str(program)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr[:4000]
        done = subprocess.run([*emulator, str(program)], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{done.returncode}: {done.stdout[:2000]}{done.stderr[:2000]}"
        return done.stdout

    return run
