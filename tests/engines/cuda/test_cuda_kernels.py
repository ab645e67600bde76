"""The kernels' own sources under the emulator: every accumulator is the oracle's, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cpu_layers import KINDS, LayerCase, layer_cases, make_case, mixed_product
from cuda_layers import accumulators, layer_of, placed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitdial.engines.cuda.arguments import Epilogue
from bitdial.engines.cuda.device import Pool
from bitdial.engines.cuda.emulated import EmulatedDevice
from bitdial.engines.cuda.packing import Packer, pack_bytes, pitch, unpack_bytes
from bitdial.engines.cuda.products import Plane, Product
from bitdial.engines.memory import UNIT
from bitdial.quantization.instructions import Window

EVERY = [0, 1, 2, 3, 4]
MANY = 10**6  # multiprocessors: so many that no layer has blocks for them all, and blocks stay small


def check(case: LayerCase, device: EmulatedDevice, indices: list[int], multiprocessors: int = MANY) -> None:
    for index, found in zip(indices, accumulators(case, device, indices, multiprocessors), strict=True):
        assert np.array_equal(found, mixed_product(case, index)), (case, index)


@pytest.mark.parametrize("limits", [(15, 7, False), (7, 7, True), (31, 14, False), (15, 10, False), (31, 7, True)])
def test_mixed_layers(device: EmulatedDevice, limits: tuple[int, int, bool]) -> None:
    """4-bit nibbles, low bytes, and nibbles of weights only, beside 8-bit groups."""
    rng = np.random.default_rng(1)
    check(make_case(rng, per=48, rows=40, size=(5, 6), group=16, limits=limits, pad=(1, 1), by_output=True), device, EVERY)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"any"}))
def test_extremes(device: EmulatedDevice, kind: str) -> None:
    """Whole blocks and more of equal, extreme and zero values; several blocks of rows, columns and steps."""
    rng = np.random.default_rng(2)
    for limits, low in (((15, 7, False), None), ((7, 7, True), "ends")):
        case = make_case(rng, per=70, rows=66, size=(9, 9), kernel=(1, 1), group=32, limits=limits, x_kind=kind, w_kind=kind,
                         low_kind=low)  # fmt: skip
        check(case, device, [0, 2, 4])


GEOMETRIES = [
    {"stride": (2, 1), "pad": (2, 0), "dilation": (1, 2)}, {"stride": (3, 2), "pad": (0, 3), "dilation": (2, 1)},
    {"conv_groups": 3, "per": 5, "rows": 7, "pad": (1, 1)}, {"conv_groups": 2, "per": 32, "rows": 65, "kernel": (1, 1)},
    {"per": 3, "kernel": (7, 7), "pad": (3, 3), "stride": (2, 2)}, {"per": 3, "kernel": (5, 5), "group": 2},
]  # fmt: skip


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_geometries(device: EmulatedDevice, geometry: dict[str, Any]) -> None:
    rng = np.random.default_rng(3)
    check(make_case(rng, **({"per": 40, "batch": 2, "size": (8, 7), "group": 8} | geometry)), device, [0, 1, 4])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=layer_cases(300_000))
def test_ragged_layers(device: EmulatedDevice, case: LayerCase) -> None:
    check(case, device, [0, 1, 3, 4])


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), per=st.integers(1, 90), rows=st.integers(65, 128), conv_groups=st.integers(1, 2),
       size=st.tuples(st.integers(1, 9), st.integers(1, 9)), group=st.sampled_from([16, 32]),
       limits=st.sampled_from([(15, 7, False), (7, 7, True), (31, 14, False)]))  # fmt: skip
def test_wide_blocks(
    device: EmulatedDevice, seed: int, per: int, rows: int, conv_groups: int, size: tuple[int, int], group: int, limits: Any
) -> None:
    """128 outputs a block where there are blocks enough, of ragged layers too; the same sums as from blocks of 64."""
    rng = np.random.default_rng(seed)
    case = make_case(rng, batch=2, per=per, rows=rows, size=size, group=group, conv_groups=conv_groups, kernel=(1, 1),
                     limits=limits, by_output=True)  # fmt: skip
    device.launches.clear()
    check(case, device, [0, 2, 4], 0)
    name = f"{'un' if not case.signed else ''}signed"
    assert set(device.launches) <= {f"conv_wide_{name}", f"conv_elements_{name}"}


@pytest.mark.parametrize("limits", [(15, 7, False), (7, 7, True), (31, 14, False), (12, 5, False)])
def test_dynamic_extraction(device: EmulatedDevice, limits: tuple[int, int, bool]) -> None:
    """Samples of differing size, of one value, of nothing but zeros: each by its own shifts."""
    rng = np.random.default_rng(6)
    case = make_case(rng, batch=4, per=70, rows=66, size=(5, 4), group=16, limits=limits, pad=(1, 1), by_output=True,
                     dynamic=True)  # fmt: skip
    x = case.x.copy()
    x[1] //= 9
    x[2] = 0
    x[3, 5, 2, 2] = case.x.max()
    check(replace(case, x=x), device, EVERY)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("residual", "sms"), [(False, 99), (True, 99), (True, 0)])
def test_results_in_words_are_those_one_by_one(device: EmulatedDevice, signed: bool, residual: bool, sms: int) -> None:
    """Four channels at a time: two convolution groups, a block's last rows and columns missing, samples that end in a block."""
    rng = np.random.default_rng(8)
    case = make_case(rng, batch=3, per=16, rows=68, size=(5, 5), group=16, conv_groups=2, kernel=(1, 1))
    layer, window = layer_of(case), Window((1, 1), (1, 1), (0, 0), (1, 1))
    outputs, pool = 136, Pool()
    product = Product(Packer(layer, window, case.signed, device.native_int4).run(), window, pool)
    bias, multiplier = pool.add(rng.integers(-999, 999, outputs).astype(np.int32)), pool.add(
        rng.uniform(1e-3, 3e-3, outputs).astype(np.float32))  # fmt: skip
    pool.upload(device)
    width = pitch(outputs)
    x = np.zeros((3, 25, pitch(32)), np.uint8)
    x[..., :32] = (case.x & 255).astype(np.uint8).reshape(3, 32, 25).swapaxes(1, 2)
    given_, r = placed(device, x), placed(device, rng.integers(0, 256, (3, 25, width)).astype(np.uint8))
    found = []
    for fours in (0, 1):
        y = placed(device, np.zeros((3, 25, width), np.uint8))
        lo, hi = (-127.0, 127.0) if signed else (0.0, 255.0)
        out = Epilogue(
            y8=y, r8=r if residual else None, bias=pool.at(bias), multipliers=pool.at(multiplier), y_sample=25 * width,
            y_place=width, y_channel=1, r_sample=25 * width, r_place=width, r_channel=1, residual_factor=0.37, lo=lo, hi=hi,
            r_signed=int(signed), fours=fours,
        )  # fmt: skip
        device.launch(product.launch(2, 3, given_, Plane(5, 5, pitch(32), 25 * pitch(32)), (5, 5), out, sms))
        found.append(np.empty((3, 25, width), np.uint8))
        device.download(y, found[-1])
    assert np.array_equal(*found) and len(np.unique(found[0][..., :outputs])) > 100
    assert not found[0][..., outputs:].any()


@pytest.mark.parametrize(
    ("multiprocessors", "wide"),
    [(1, (1, 1)), (3, (0, 1)), (4, (1, 1)), (6, (0, 1)), (7, (1, 1)), (12, (1, 1)), (14, (0, 0))],
)
def test_blocks_are_wide_where_they_are_done_sooner(multiprocessors: int, wide: tuple[int, int]) -> None:
    """Seven wide blocks or fourteen others, of 8-bit steps and of low ones: by rounds of the multiprocessors."""
    case = make_case(np.random.default_rng(4), per=128, rows=128, kernel=(1, 1), group=64)
    case.low[:] = [[False, False]] * 4 + [[True, True]]
    product = Product(Packer(layer_of(case), UNIT, False, True).run(), UNIT, Pool())
    assert tuple(product.columns(ratio, 7 * 64, multiprocessors) == 128 for ratio in (0, 4)) == wide


def test_packed_steps_are_shared_by_ratios(device: EmulatedDevice) -> None:
    """Every step lies once in memory, whatever the number of ratios: low weights take half a byte beside the 8-bit ones."""
    case = make_case(np.random.default_rng(4), per=128, rows=64, kernel=(1, 1), group=64)
    case.low[:] = [[False, False], [True, False], [True, False], [True, True], [True, True]]
    packed = Packer(layer_of(case), Window((1, 1), (1, 1), (0, 0), (1, 1)), False, device.native_int4).run()
    assert len(packed.weights) == 128 * 64 * 3 // 2
    assert [set(steps[:, 0]) for steps in packed.steps] == [{0}, {0, 1}, {0, 1}, {1}, {1}]
    assert all(len(steps) == 2 for steps in packed.steps)


@given(st.integers(0, 2**32 - 1))
def test_packing_of_bytes_has_an_inverse(seed: int) -> None:
    weight = np.random.default_rng(seed).integers(-127, 128, (64, 64)).astype(np.int8)
    assert np.array_equal(unpack_bytes(pack_bytes(weight)), weight)
