"""Effective bits against slow plain-Python definitions."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdial.errors import ConfigError
from bitdial.quantization.effective_bits import (
    bit_length,
    extract,
    group_maximum,
    least_squares_shift,
    low_limit,
    naive_shift,
    plain_shift,
    read_back,
)

BITS = st.integers(2, 7)
LIMITS = st.sampled_from([1, 3, 7, 10, 14, 15, 31, 63])


def top(signed: bool) -> int:
    return 127 if signed else 255


@st.composite
def encoded(draw: st.DrawFn) -> tuple[list[int], bool]:
    signed = draw(st.booleans())
    edges = [0, 1, 7, 8, 15, 16, 28, 29, 31, 32, 63, 64, 127] + ([] if signed else [128, 239, 240, 247, 248, 254, 255])
    magnitude = st.one_of(st.sampled_from(edges), st.integers(0, top(signed)))
    values = draw(st.lists(magnitude, min_size=1, max_size=12))
    signs = draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    return [-v if signed and s else v for v, s in zip(values, signs, strict=True)], signed


@given(encoded(), st.integers(0, 7), LIMITS)
def test_lower_is_the_definition(oracle: ModuleType, data: tuple[list[int], bool], shift: int, limit: int) -> None:
    values, signed = data
    got = extract(values, shift, limit, signed)
    assert got.dtype == np.int8
    assert got.tolist() == [oracle.low_value(v, shift, limit, signed) for v in values]


@given(encoded(), st.data(), LIMITS)
def test_lower_takes_one_shift_per_value(
    oracle: ModuleType, data: tuple[list[int], bool], draw: st.DataObject, limit: int
) -> None:
    values, signed = data
    shifts = draw.draw(st.lists(st.integers(0, 7), min_size=len(values), max_size=len(values)))
    expected = [oracle.low_value(v, s, limit, signed) for v, s in zip(values, shifts, strict=True)]
    assert extract(values, shifts, limit, signed).tolist() == expected
    wide = np.array(expected) << np.array(shifts)
    assert read_back(values, shifts, limit, signed).tolist() == wide.tolist()


def test_every_value_shift_and_limit(oracle: ModuleType) -> None:
    for signed in (False, True):
        values = np.arange(-127 if signed else 0, top(signed) + 1)
        for limit in (1, 3, 7, 10, 14, 15, 31, 63, 127):
            for shift in range(7):
                expected = [oracle.low_value(int(v), shift, limit, signed) for v in values]
                assert extract(values, shift, limit, signed).tolist() == expected


@given(encoded(), BITS)
def test_plain_shift_is_the_definition(oracle: ModuleType, data: tuple[list[int], bool], bits: int) -> None:
    values, signed = data
    limit = low_limit(bits, signed)
    assert limit == (2 ** (bits - 1) - 1 if signed else 2**bits - 1)
    magnitudes = [abs(v) for v in values]
    assert int(plain_shift(max(magnitudes), limit)) == oracle.plain_shift(magnitudes, bits, signed)


@given(encoded(), BITS)
def test_plain_variant_keeps_groups_within_one_step(data: tuple[list[int], bool], bits: int) -> None:
    """Rounding errs by half a step; only the topmost half step of the range is clipped, by less than one step."""
    values, signed = data
    limit = low_limit(bits, signed)
    shift = int(plain_shift(max(abs(v) for v in values), limit))
    back = read_back(values, shift, limit, signed).astype(int)
    assert (np.abs(back) <= top(signed)).all()
    for value, read in zip(values, back.tolist(), strict=True):
        assert abs(value - read) < (1 << shift) or value == read
        if abs(value) <= limit << shift:
            assert 2 * abs(value - read) <= 1 << shift
    if shift == 0:
        assert back.tolist() == values


def test_the_check_of_the_design_notes() -> None:
    group = [29, 3, 17, 31]  # all below 32
    limit = low_limit(4, signed=False)
    shift = plain_shift(max(group), limit)
    assert int(shift) == 1 and int(read_back(29, shift, limit, signed=False)) == 28
    assert int(read_back(29, naive_shift(False, limit), limit, signed=False)) == 32


def test_naive_shift_takes_the_top_bits() -> None:
    for bits in range(2, 8):
        assert naive_shift(False, low_limit(bits, False)) == 8 - bits
        assert naive_shift(True, low_limit(bits, True)) == 7 - (bits - 1)
    for limit, unsigned, signed in ((14, 4, 3), (10, 4, 3), (15, 4, 3), (7, 5, 4)):
        assert (naive_shift(False, limit), naive_shift(True, limit)) == (unsigned, signed)


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_bit_length(values: list[int]) -> None:
    assert bit_length(values).tolist() == [v.bit_length() for v in values]


@pytest.mark.parametrize("bits", [-1, 0, 1, 8, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ConfigError, match="choose 2 to 7"):
        low_limit(bits, signed=True)


@given(LIMITS, st.booleans())
def test_nothing_read_back_leaves_the_eight_bit_range(limit: int, signed: bool) -> None:
    if signed and limit > 63:
        return
    for shift in range(naive_shift(signed, limit) + 1):
        values = np.arange(-127 if signed else 0, top(signed) + 1)
        back = read_back(values, shift, limit, signed)
        assert np.abs(back).max() <= top(signed)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), LIMITS)
def test_least_squares_is_the_best_shift_and_never_worse_than_plain(
    oracle: ModuleType, seed: int, signed: bool, centred: bool, limit: int
) -> None:
    """Brute force over every shift, from the values one by one."""
    rng = np.random.default_rng(seed)
    channels, samples = int(rng.integers(1, 7)), 60
    reach = rng.integers(1, top(signed) + 1, (channels, 1))
    values = np.minimum(np.abs(rng.normal(size=(channels, samples)) * reach / 2.5).astype(int), reach)
    if signed:
        values *= rng.choice([-1, 1], values.shape)
    histogram = np.stack([np.bincount(v + (128 if signed else 0), minlength=256) for v in values]).astype(float)
    importance = rng.uniform(0.1, 3.0, channels)
    bounds = np.unique([0, *rng.integers(0, channels + 1, 2), channels]).astype(np.int32)
    chosen = least_squares_shift(histogram, importance, bounds, limit, signed, centred)
    assert chosen.dtype == np.uint8 and len(chosen) == len(bounds) - 1
    for g, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):

        def error(shift: int, own: slice = slice(int(a), int(b))) -> float:
            back = oracle.low_array(values[own], shift, limit, signed) << shift
            errors = back - values[own]
            cost = errors.var(axis=1) if centred else (errors**2).mean(axis=1)
            return float((cost * importance[own]).sum())

        plain = int(plain_shift(int(np.abs(values[a:b]).max()), limit))
        errors = [error(s) for s in range(naive_shift(signed, limit) + 1)]
        assert errors[int(chosen[g])] <= error(plain) + 1e-9
        assert errors[int(chosen[g])] == pytest.approx(min(errors), rel=1e-9, abs=1e-9)


def test_saturating_one_bit_lower_can_win() -> None:
    histogram = np.zeros((1, 256))
    histogram[0, 1:16] = 1000.0  # many odd small values that a shift would round
    histogram[0, 17] = 1.0  # one value above 15
    bounds = np.array([0, 1], np.int32)
    assert int(plain_shift(17, 15)) == 1
    assert least_squares_shift(histogram, np.ones(1), bounds, 15, signed=False, centred=False).tolist() == [0]


def test_ties_go_to_the_smaller_shift() -> None:
    bounds = np.array([0, 2, 3], np.int32)
    assert least_squares_shift(np.zeros((3, 256)), np.ones(3), bounds, 7, True, False).tolist() == [0, 0]


def test_group_maximum() -> None:
    bounds = np.array([0, 2, 3, 6], np.int32)
    assert group_maximum(np.array([3, 9, 1, 4, 4, 5]), bounds).tolist() == [9, 1, 5]
