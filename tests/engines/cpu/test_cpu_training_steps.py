"""The compiled steps of training against float32 arithmetic in NumPy, bit for bit, on every instruction set of this machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdial.engines.cpu import native

Array = npt.NDArray[Any]
TYPES = {"f32": 0, "bf16": 1, "f32_bf16": 2}
SHAPES = st.tuples(st.sampled_from([1, 2, 3, 7, 64, 1000]), st.sampled_from([1, 3, 16, 17, 64, 65, 300]))
def own_kernels() -> list[str]:
    """Instruction sets that run here and have these kernels themselves, not another set's."""
    addresses = {}
    for isa in [] if native.missing() else reversed(native.isas()):
        addresses.setdefault(next(at for _, name, at, _ in native.extension().kernels(isa) if name == "requantize"), isa)
    return list(addresses.values())


ISAS = own_kernels()


def narrow(values: Array) -> Array:
    """float32 -> bfloat16 as uint16, to nearest, ties to even."""
    raw = values.astype(np.float32).view(np.uint32)
    rounded = ((raw.astype(np.uint64) + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def wide(values: Array) -> Array:
    return values if values.dtype == np.float32 else (values.astype(np.uint32) << 16).view(np.float32)


def encode(values: Array, kind: str) -> Array:
    return values.astype(np.float32) if kind == "f32" else narrow(values)


def kinds(types: str) -> tuple[str, str]:
    """(type of what goes in, of what comes out)."""
    return ("f32", "bf16") if types == "f32_bf16" else (types, types)


def empty(shape: tuple[int, int], kind: str) -> Array:
    return np.zeros(shape, np.float32 if kind == "f32" else np.uint16)


def address(array: Array | None) -> int:
    return 0 if array is None else int(array.ctypes.data)


def numbers(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Of every size that occurs, some that fall between integers, and some that nothing holds."""
    values = (rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 6, shape)).astype(np.float32)
    values[rng.random(shape) < 0.1] = rng.integers(-300, 300) + 0.5
    values[rng.random(shape) < 0.02] = np.float32(rng.choice([np.inf, -np.inf, np.nan, 0.0]))
    return values


@pytest.mark.sanitize
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("types", TYPES)
@settings(max_examples=30)
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1), residual=st.booleans(), threads=st.sampled_from([1, 2]))
def test_requantize_and_its_gradient(
    isa: str, types: str, shape: tuple[int, int], seed: int, residual: bool, threads: int
) -> None:
    rng, (rows, channels) = np.random.default_rng(seed), shape
    source, target = kinds(types)
    steps = native.extension().Training(isa, threads)
    acc = encode(numbers(rng, shape), source)
    multiplier = (10.0 ** rng.uniform(-4, 0, channels)).astype(np.float32)
    bias = (10 * rng.standard_normal(channels)).astype(np.float32)
    other = encode(rng.integers(-128, 256, shape), target) if residual else None
    factor = float(np.float32(rng.uniform(0.1, 2.0)))
    lo, hi = (float(v) for v in rng.choice([[-128, 127], [0, 255], [0, 6], [-8, 7]]))
    out, inside = empty(shape, target), np.full(shape, 9, np.uint8)
    steps.requantize(
        TYPES[types], address(acc), address(multiplier), address(bias), address(other), factor, lo, hi, address(out),
        address(inside), rows, channels,
    )  # fmt: skip
    with np.errstate(all="ignore"):
        t = wide(acc) * multiplier + bias
        if other is not None:
            t = t + wide(other) * np.float32(factor)
        expected = np.rint(np.clip(t, lo, hi))
    np.testing.assert_array_equal(wide(out), expected)
    np.testing.assert_array_equal(inside, (t > lo) & (t < hi))

    grad = encode(numbers(rng, shape), target)
    of_acc = empty(shape, source)
    of_residual = empty(shape, target) if residual else None
    of_bias = np.zeros(channels, np.float32)
    steps.requantize_grad(
        TYPES[types], address(grad), address(inside), address(multiplier), factor, address(of_acc), address(of_residual),
        address(of_bias), rows, channels,
    )  # fmt: skip
    with np.errstate(all="ignore"):
        g = np.where(inside > 0, wide(grad), np.float32(0))
        np.testing.assert_array_equal(wide(of_acc), wide(encode(g * multiplier, source)))
        if of_residual is not None:
            np.testing.assert_array_equal(wide(of_residual), wide(encode(g * np.float32(factor), target)))
        total = g.astype(np.float64).sum(axis=0)
        room = 1e-5 * np.abs(g).astype(np.float64).sum(axis=0)
    finite = np.isfinite(total)
    assert (np.abs(of_bias[finite] - total[finite]) <= room[finite]).all()
    assert not np.isfinite(of_bias[~finite]).any()


@pytest.mark.sanitize
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("types", ["f32", "bf16"])
@settings(max_examples=30)
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1), signed=st.booleans())
def test_extraction_and_what_passes(isa: str, types: str, shape: tuple[int, int], seed: int, signed: bool) -> None:
    rng, (rows, channels) = np.random.default_rng(seed), shape
    steps = native.extension().Training(isa, 2)
    x = encode(rng.integers(-127 if signed else 0, 128 if signed else 256, shape), types)
    shift = rng.integers(0, 6, channels)
    hi = np.where(shift == 0, 127 if signed else 255, rng.integers(1, 9, channels)).astype(np.float32)
    lo = -hi if signed else np.zeros_like(hi)
    inverse, power = np.exp2(-shift).astype(np.float32), np.exp2(shift).astype(np.float32)
    out, inside = empty(shape, types), np.full(shape, 9, np.uint8)
    steps.extract_floats(
        TYPES[types], address(x), address(inverse), address(power), address(lo), address(hi), address(out),
        address(inside), rows, channels,
    )  # fmt: skip
    t = np.rint(wide(x) * inverse)
    np.testing.assert_array_equal(wide(out), np.clip(t, lo, hi) * power)
    np.testing.assert_array_equal(inside, (t >= lo) & (t <= hi))

    grad, passed = encode(numbers(rng, shape), types), empty(shape, types)
    steps.pass_through(TYPES[types], address(grad), address(inside), address(passed), rows * channels, 1)
    np.testing.assert_array_equal(passed, np.where(inside > 0, grad, 0))


@pytest.mark.sanitize
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("types", ["f32", "bf16"])
@settings(max_examples=30)
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1), signed=st.booleans())
def test_functions_of_eight_bits(isa: str, types: str, shape: tuple[int, int], seed: int, signed: bool) -> None:
    rng, (rows, channels) = np.random.default_rng(seed), shape
    values = rng.integers(-128, 256, 256).astype(np.float32)
    slopes = rng.standard_normal(256).astype(np.float32)
    x = rng.integers(-128 if signed else 0, 128 if signed else 256, shape)
    source, out, slope = encode(x, types), empty(shape, types), empty(shape, types)
    native.extension().Training(isa, 1).look_up(
        TYPES[types], address(source), address(values), address(slopes), address(out), address(slope), rows, channels
    )
    np.testing.assert_array_equal(wide(out), values[x & 255])
    np.testing.assert_array_equal(wide(slope), wide(encode(slopes[x & 255], types)))


@pytest.mark.sanitize
@pytest.mark.parametrize("isa", ISAS)
def test_nan_passes_so_that_divergence_is_seen(isa: str) -> None:
    x = np.full((3, 5), np.nan, np.float32)
    ones, zeros = np.ones(5, np.float32), np.zeros(5, np.float32)
    for types in TYPES:
        source, target = kinds(types)
        acc, out, inside = encode(x, source), empty((3, 5), target), np.ones((3, 5), np.uint8)
        native.extension().Training(isa, 1).requantize(
            TYPES[types], address(acc), address(ones), address(zeros), 0, 1.0, -128.0, 127.0, address(out),
            address(inside), 3, 5,
        )  # fmt: skip
        assert np.isnan(wide(out)).all() and not inside.any()


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="'sse9' is not supported here"):
        native.extension().Training("sse9", 1)
