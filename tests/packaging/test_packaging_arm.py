"""scripts/arm.sh, which takes minutes and is run by hand, says so where it cannot test anything."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.skipif(shutil.which("bash") is None, reason="NO BASH")
def test_without_a_cross_compiler_nothing_is_tested_and_that_is_said(tmp_path: Path, run: Run) -> None:
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    done = run("bash", ROOT / "scripts" / "arm.sh", cwd=tmp_path, PATH=str(tmp_path))
    assert done.returncode == 77, done.stderr
    assert "aarch64-linux-gnu-g++ was not found" in done.stderr and "NOTHING WAS TESTED" in done.stderr
