"""quantize, dequantize, table, add, mul and rescale against their definitions, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import simple_definitions as define
from hypothesis import given, settings
from hypothesis import strategies as st
from simple_support import Kernels, Tensor, View, check_bytes, floats, run_split, tensor, zero_of

pytestmark = pytest.mark.sanitize
F = np.float32
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(1, 70))
SEEDS = st.integers(0, 2**32 - 1)
# Powers of two make ties of rounding; the others do not.
FACTORS = st.sampled_from([0.5, 0.25, 1.5, 1.0, 0.0078125, 0.3, 0.7071, 1.9, 0.01, 30.0])
EXAMPLES = settings(max_examples=60)


def limits(rng: np.random.Generator, zero: int) -> tuple[float, float]:
    """Clamp limits of an 8-bit value, sometimes those of a fused activation."""
    lo, hi = (-127.0, 127.0) if zero == 128 else (0.0, 255.0)
    kind = rng.integers(0, 3)
    return (max(lo, 0.0), hi) if kind == 1 else (max(lo, -3.0), float(rng.integers(1, 100))) if kind == 2 else (lo, hi)


@EXAMPLES
@given(shape=SHAPES, seed=SEEDS, order=st.permutations(range(4)), three=st.booleans(), bad=st.booleans())
def test_quantize(
    kernels: Kernels, isa: str, shape: tuple[int, ...], seed: int, order: list[int], three: bool, bad: bool
) -> None:
    rng = np.random.default_rng(seed)
    if three:
        shape, order = (*shape[:3], 3), [0, 3, 1, 2]  # an image in planes
    elif rng.integers(0, 2):
        order = [[0, 1, 2, 3], [0, 3, 1, 2]][rng.integers(0, 2)]  # the usual ones: channels last, channels first
    src, strides, _ = floats(rng, shape, order, margin=int(rng.integers(0, 2)) * 5)
    zero, inverse = zero_of(rng), float(rng.choice([0.5, 1.0, 8.0, 40.0, 1e30]))
    src[:] = rng.normal(size=shape).astype(F) * F(100 / min(inverse, 40))
    if rng.integers(0, 2):
        src[:] = np.rint(src * 2) / 2  # ties
    if bad:
        special = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, -0.0], F)
        src[rng.random(shape) < 0.05] = rng.choice(special)
    lo, hi = limits(rng, zero)
    dst = tensor(rng, shape, 7, int(rng.choice([0, 0, 1, 9])))
    run = kernels.prepare(
        isa, "quantize", src=src, dst=dst, inverse=inverse, lo=lo, hi=hi, zero=zero,
        **dict(zip(("src_n", "src_y", "src_x", "src_c"), strides, strict=True)),
    )  # fmt: skip
    found = check_bytes(dst, define.quantize(np.array(src), inverse, lo, hi), zero, run, rng)
    assert found == np.count_nonzero(~np.isfinite(src))


@EXAMPLES
@given(shape=SHAPES, seed=SEEDS, order=st.permutations(range(4)))
def test_dequantize(kernels: Kernels, isa: str, shape: tuple[int, ...], seed: int, order: list[int]) -> None:
    rng = np.random.default_rng(seed)
    if rng.integers(0, 2):
        order = [[0, 1, 2, 3], [0, 3, 1, 2]][rng.integers(0, 2)]
    src = tensor(rng, shape, 7, int(rng.choice([0, 0, 1, 9])))
    dst, strides, memory = floats(rng, shape, order, margin=int(rng.integers(0, 2)) * 5)
    zero, scale = zero_of(rng), float(rng.choice([1.0, 0.1, 3.7e-5]))
    memory[:] = np.nan
    run = kernels.prepare(
        isa, "dequantize", src=src, zero=zero, scale=scale, dst=dst,
        **dict(zip(("dst_n", "dst_y", "dst_x", "dst_c"), strides, strict=True)),
    )  # fmt: skip
    run_split(run, shape[0] * shape[1], rng)
    np.testing.assert_array_equal(dst, define.dequantize(src.array.astype(np.int64) - zero, scale))
    dst[:] = np.nan
    assert np.isnan(memory).all(), "floats outside the tensor were written"


@EXAMPLES
@given(shape=SHAPES, seed=SEEDS, in_place=st.booleans())
def test_table(kernels: Kernels, isa: str, shape: tuple[int, ...], seed: int, in_place: bool) -> None:
    rng = np.random.default_rng(seed)
    src = tensor(rng, shape, 7, int(rng.choice([0, 9])))
    dst = src if in_place else tensor(rng, shape, 7, int(rng.choice([0, 9])))
    entries = rng.integers(0, 256, 256).astype(np.uint8)
    expected = entries[src.array].astype(np.int64)
    check_bytes(dst, expected, 0, kernels.prepare(isa, "table", src=src, dst=dst, table=entries), rng)


def broadcast(rng: np.random.Generator, shape: tuple[int, ...], low: bool) -> tuple[Tensor, np.ndarray, int]:
    """An operand that may stand still along some axes: tensor, values broadcast to `shape`, b_channel."""
    kept = [int(rng.random() < 0.6) for _ in shape] if rng.integers(0, 2) else [1, 1, 1, 1]
    b = tensor(rng, [d if k else 1 for d, k in zip(shape, kept, strict=True)], 7, int(rng.choice([0, 5])), low)
    for axis, name in enumerate(("pitch_n", "pitch_y", "pitch_x")):
        if not kept[axis]:
            setattr(b.view, name, 0)
    return b, np.broadcast_to(b.array, shape).astype(np.int64), kept[3] if shape[3] > 1 else int(rng.integers(0, 2))


@EXAMPLES
@given(shape=SHAPES, seed=SEEDS, ra=FACTORS, rb=FACTORS, in_place=st.booleans())
@pytest.mark.parametrize("op", ["add", "mul"])
def test_add_and_mul(
    kernels: Kernels, isa: str, op: str, shape: tuple[int, ...], seed: int, ra: float, rb: float, in_place: bool
) -> None:
    rng = np.random.default_rng(seed)
    a = tensor(rng, shape, 7, int(rng.choice([0, 9])), low=bool(rng.integers(0, 2)))
    b, b_values, b_channel = broadcast(rng, shape, bool(rng.integers(0, 2)))
    dst = a if in_place else tensor(rng, shape, 7, int(rng.choice([0, 9])))
    zeros = [zero_of(rng) for _ in range(3)]
    lo, hi = limits(rng, zeros[2])
    va, vb = a.array.astype(np.int64) - zeros[0], b_values - zeros[1]
    m = ra / 64 if rng.integers(0, 2) else ra
    expected = define.add(va, vb, ra, rb, lo, hi) if op == "add" else define.mul(va, vb, m, lo, hi)
    factors = {"ra": ra, "rb": rb} if op == "add" else {"m": m}
    run = kernels.prepare(
        isa, op, a=a, b=b, b_channel=b_channel, zero_a=zeros[0], zero_b=zeros[1], zero_out=zeros[2], lo=lo, hi=hi,
        dst=dst, **factors,
    )  # fmt: skip
    check_bytes(dst, expected, zeros[2], run, rng)


@EXAMPLES
@given(shape=SHAPES, seed=SEEDS, factor=FACTORS, in_place=st.booleans())
def test_rescale(kernels: Kernels, isa: str, shape: tuple[int, ...], seed: int, factor: float, in_place: bool) -> None:
    rng = np.random.default_rng(seed)
    src = tensor(rng, shape, 7, int(rng.choice([0, 9])))
    dst = src if in_place else tensor(rng, shape, 7, int(rng.choice([0, 9])))
    zero_src, zero_dst = zero_of(rng), zero_of(rng)
    lo, hi = limits(rng, zero_dst)
    expected = define.rescale(src.array.astype(np.int64) - zero_src, factor, lo, hi)
    run = kernels.prepare(
        isa, "rescale", src=src, dst=dst, zero_src=zero_src, zero_dst=zero_dst, factor=factor, lo=lo, hi=hi
    )
    check_bytes(dst, expected, zero_dst, run, rng)


def test_every_tie_and_every_pair(kernels: Kernels, isa: str) -> None:
    """All 65,536 pairs of bytes through add and mul with factors that make ties of rounding in both directions."""
    a = np.repeat(np.arange(256, dtype=np.uint8), 256)
    b = np.tile(np.arange(256, dtype=np.uint8), 256)
    for zero in (0, 128):
        lo, hi = (0.0, 255.0) if zero == 0 else (-127.0, 127.0)
        va, vb = a.astype(np.int64) - 128, b.astype(np.int64) - zero
        for op, factors, expected in (
            ("add", {"ra": 0.5, "rb": 0.25}, define.add(va, vb, 0.5, 0.25, lo, hi)),
            ("mul", {"m": 1 / 128}, define.mul(va, vb, 1 / 128, lo, hi)),
        ):
            out = np.zeros(65536, np.uint8)
            views = [View(x.ctypes.data, 1, 1, 65536, 1, 65536, 65536, 1) for x in (a, b, out)]
            kernels.prepare(
                isa, op, a=views[0], b=views[1], b_channel=1, zero_a=128, zero_b=zero, zero_out=zero, lo=lo, hi=hi,
                dst=views[2], **factors,
            )(0, 1)  # fmt: skip
            np.testing.assert_array_equal(out, (expected + zero).astype(np.uint8))


def test_one_bad_float_among_many_is_counted(kernels: Kernels, isa: str) -> None:
    for value in (np.nan, np.inf, -np.inf):
        for place in range(0, 3 * 130, 17):
            x = np.zeros((1, 3, 1, 130), F)
            x.reshape(-1)[place] = value
            out = np.zeros((1, 1, 130, 3), np.uint8)
            dst = View(out.ctypes.data, 1, 1, 130, 3, 390, 390, 3)
            run = kernels.prepare(
                isa, "quantize", src=x, src_n=390, src_y=130, src_x=1, src_c=130, dst=dst, inverse=1.0, lo=-127.0,
                hi=127.0, zero=128,
            )  # fmt: skip
            assert run(0, 1) == 1
            expected = {0: -127, 1: 127, 2: -127}[(np.nan, np.inf, -np.inf).index(value)] + 128
            assert out[0, 0, place % 130, place // 130] == expected
