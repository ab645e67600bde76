"""The tests marked "sanitize" once more, against a build with the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]
NOTHING_TESTED = 77


@pytest.mark.usefixtures("needs_compiler")
def test_marked_tests_pass_under_the_sanitizers(run: Run) -> None:
    """The build is kept in build/sanitize; without changes of csrc only the tests take time."""
    done = run("bash", ROOT / "scripts" / "sanitize.sh", cwd=ROOT, PYTHON=sys.executable)
    if done.returncode == NOTHING_TESTED:
        pytest.skip(f"NO SANITIZERS: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert "passed" in done.stdout


@pytest.mark.usefixtures("needs_compiler")
def test_a_finding_ends_the_run_with_an_error(tmp_path: Path, run: Run) -> None:
    """The control: the sanitizer runtime is at work in that very process, and its verdict reaches the exit code."""
    control = tmp_path / "test_control.py"
    # memmove is watched by the runtime: 64 bytes are written behind a block of 16
    control.write_text(
        "import ctypes\n"
        "def test_control():\n"
        "    libc = ctypes.CDLL(None)\n"
        "    libc.malloc.restype = ctypes.c_void_p\n"
        "    block = ctypes.c_void_p(libc.malloc(16))\n"
        "    libc.memmove(block, ctypes.create_string_buffer(64), ctypes.c_size_t(64))\n"
    )
    done = run("bash", ROOT / "scripts" / "sanitize.sh", control, cwd=ROOT, PYTHON=sys.executable)
    if done.returncode == NOTHING_TESTED:
        pytest.skip(f"NO SANITIZERS: {done.stderr.strip()}")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
