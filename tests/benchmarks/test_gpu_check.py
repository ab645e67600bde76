"""benchmarks/gpu_check.py: skips loudly without a GPU, and finds a difference on the emulated one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import gpu_check
from bitdial.engines.cuda import driver
from bitdial.engines.cuda.emulated import EmulatedDevice, build, find_compiler
from bitdial.engines.cuda.engine import CudaEngine

ROOT = Path(__file__).parents[2]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setenv("BITDIAL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(driver, "missing", lambda: "no NVIDIA GPU is here")
    gpu_check.main(["--results", str(tmp_path)])
    assert "SKIPPED: THE CUDA ENGINE WAS NOT RUN: no NVIDIA GPU is here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_it_compares_and_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_compiler() is None:
        pytest.skip("NO C++ COMPILER: the kernels of the CUDA engine are not emulated")
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests" / "engines" / "cpu"), *sys.path])
    from cpu_networks import Network, quantized, samples

    net = Network(3, 5, 5)
    program = quantized(net.done(net.head(net.conv(net.conv("x", 16), 16))))
    x = samples(program.graph, 3)
    engine = CudaEngine(program, device=EmulatedDevice(build(ROOT / "build" / "emulation", True), True))
    expected = list(gpu_check.exact_outputs(program, x).values())
    assert gpu_check.unequal(engine, x, expected) == []
    rows = gpu_check.measure(engine, x, [1], repeats=1)
    assert [r["ratio"] for r in rows] == [0.0, 0.5, 1.0] and all(r["device_ms"] > 0 for r in rows)
    expected[2] = np.nextafter(expected[2], np.float32(9))
    assert gpu_check.unequal(engine, x, expected) == [program.ratios[2]]
