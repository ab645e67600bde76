"""What the tests of the CUDA engine share: the emulated devices, compiled once per state of the sources."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bitdial.engines.cuda.emulated import EmulatedDevice, build, find_compiler

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "cpu")]  # for cpu_layers and cpu_networks
FOLDER = HERE.parents[2] / "build" / "emulation"

Make = Callable[..., EmulatedDevice]


@pytest.fixture(scope="session")
def make_device() -> Make:
    """(native_int4, memory) -> an emulated device."""
    if find_compiler() is None:
        pytest.skip("NO C++ COMPILER: the kernels of the CUDA engine are not emulated")

    def make(native: bool, **options: int) -> EmulatedDevice:
        return EmulatedDevice(build(FOLDER, native), native, **options)

    return make


@pytest.fixture(scope="session", params=[True, False], ids=["int4", "unpacked"])
def device(make_device: Make, request: pytest.FixtureRequest) -> EmulatedDevice:
    return make_device(request.param)
