"""One simulated unit a session; elaboration costs more than most runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent)]

from npu_cases import SMALL, build  # noqa: E402


@pytest.fixture(scope="session")
def small() -> Any:
    """4 x 4."""
    return build(SMALL)
