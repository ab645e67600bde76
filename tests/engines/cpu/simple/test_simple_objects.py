"""Files compiled for different instruction sets share no code: the linker would keep one copy, perhaps an illegal one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from simple_support import FOLDERS, ISA_FLAGS


def test_objects_offer_nothing_outside_their_own_namespace(simple_ops_library: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    seen = 0
    for isa in ISA_FLAGS:
        for name in FOLDERS:
            target = simple_ops_library.parent / f"{name}_{isa}.o"
            if not target.exists():
                continue
            text = subprocess.run(
                ["nm", "-C", "--defined-only", "-g", target], capture_output=True, text=True, check=True
            )
            for line in text.stdout.splitlines():
                symbol = line.split(maxsplit=2)[2]
                if "asan" in symbol or symbol.startswith("__odr"):  # a build with sanitizers
                    continue
                assert re.match(rf"(\w+ )*bitdial::{isa}::\w+\(bitdial::\w+Args const&, int, int\)", symbol), (
                    f"{target}: {symbol}"
                )
                seen += 1
    assert seen >= 10
