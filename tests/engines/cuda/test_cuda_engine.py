"""Whole networks on the emulated device: bit for bit the reference engine's outputs at every ratio."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from cpu_networks import (
    NETWORKS,
    outputs_of,
    quantized,
    reference_outputs,
    same_bits,
    samples,
    with_low_plane,
)

from bitdial.engines.cuda.emulated import EmulatedDevice
from bitdial.engines.cuda.engine import CudaEngine
from bitdial.quantization.program import Program


def check(program: Program, device: EmulatedDevice, n: int = 2) -> CudaEngine:
    x = samples(program.graph, n)
    engine = CudaEngine(program, device=device)
    for ratio, expected in zip(program.ratios, reference_outputs(program, x), strict=True):
        got = outputs_of(engine.run(x, ratio))
        for name, own, want in zip(program.outputs, got, expected, strict=True):
            assert same_bits(own, want), (ratio, name, int((own != want).sum()), own.size)
    return engine


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return {}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_networks_are_bit_identical_to_the_reference(programs: dict[str, Program], name: str, device: EmulatedDevice) -> None:
    if name not in programs:
        programs[name] = quantized(NETWORKS[name]())
    check(programs[name], device)
