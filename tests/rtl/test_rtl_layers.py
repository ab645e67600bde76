"""Whole layers through the simulated unit: bit for bit, and cycle for cycle against the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from npu_cases import SMALL, build, random_case, run_case

from bitdial.engines.npu.cycles import job_cycles
from bitdial.engines.npu.plan import Design, Geometry
from bitdial.quantization.instructions import Window


def check(simulated: Any, case: Any, design: Design, ratios: Any) -> None:
    plan = case.plan(design)
    for ratio in ratios:
        sums, cycles = run_case(simulated, case, plan, design, ratio)
        np.testing.assert_array_equal(sums, case.expected(ratio))
        assert cycles == [job_cycles(plan, job, design, plan.low[ratio], True) for job in plan.jobs]


@st.composite
def windows(draw: Any) -> tuple[Window, tuple[int, int]]:
    axes = []
    for _ in range(2):
        kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        reach = (kernel - 1) * dilation + 1
        padding = draw(st.integers(0, reach - 1))
        axes.append((kernel, draw(st.integers(1, 2)), padding, dilation, draw(st.integers(max(1, reach - 2 * padding), 5))))
    kernel, stride, padding, dilation, size = zip(*axes, strict=True)
    return Window(kernel, stride, padding, dilation), size


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(shape=windows(), channels=st.integers(1, 19), outputs=st.integers(1, 9), group=st.integers(1, 16),
       signed=st.booleans(), ratio=st.integers(0, 2), seed=st.integers(0, 1 << 20))  # fmt: skip
def test_convolutions(
    small: Any, shape: Any, channels: int, outputs: int, group: int, signed: bool, ratio: int, seed: int
) -> None:
    """Any window, ragged channels and outputs, groups of one to four chunks, 8-bit, mixed and low."""
    window, size = shape
    case = random_case(np.random.default_rng(seed), Geometry(channels, outputs, size, window), signed, group)
    check(small, case, SMALL, [ratio])


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 11])
def test_linear(small: Any, signed: bool, rows: int) -> None:
    """Passes of fewer pixels than the array has rows, and of more."""
    case = random_case(np.random.default_rng(rows), Geometry.linear(21, 6, rows), signed, 8)
    check(small, case, SMALL, range(3))


def test_depthwise_and_grouped(small: Any) -> None:
    """Block-diagonal tiles; halves that a tile's outputs do not read take no pass."""
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    for channels, outputs, groups in ((9, 9, 9), (12, 6, 3)):
        geometry = Geometry(channels, outputs, (3, 4), window, groups)
        check(small, random_case(np.random.default_rng(3), geometry, False, 1, lowered=False), SMALL, [0])
    assert [j.passes(9, 0) for j in case_plan(9).jobs] == [9, 9, 9]  # one half each, although words hold two


def case_plan(channels: int) -> Any:
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    return random_case(
        np.random.default_rng(3), Geometry(channels, channels, (3, 4), window, channels), False, 1, lowered=False
    ).plan(SMALL)


def test_extremes(small: Any) -> None:
    """The largest products of one sign throughout, at 8 bits and low with the largest shifts."""
    for signed in (False, True):
        case = random_case(np.random.default_rng(0), Geometry.linear(16, 4, 2), signed, 8)
        case.x[:] = 127 if signed else 255
        case.weight[:], case.low_weight[:], case.shift[:], case.weight_shift[:] = -127, -7, 4, 4
        check(small, case, SMALL, range(3))


def test_jobs_of_a_layer_larger_than_the_buffers(small: Any) -> None:
    """Rows of pixels and column tiles are split; every job loads what it reads, halo included."""
    window = Window((3, 3), (2, 1), (1, 1), (1, 1))
    case = random_case(np.random.default_rng(5), Geometry(12, 10, (9, 6), window), True, 8)
    design = Design(4, 4, words=128, activations=72, weights=600, shifts=64, sums=40)
    assert len(case.plan(design).jobs) > 3
    check(small, case, design, [1])


def test_8x8() -> None:
    design = Design(8, 8, words=128, activations=256, weights=2048, shifts=64, sums=512)
    window = Window((3, 1), (1, 1), (1, 0), (1, 1))
    case = random_case(np.random.default_rng(6), Geometry(37, 11, (5, 4), window), False, 16)
    check(build(design), case, design, range(3))
