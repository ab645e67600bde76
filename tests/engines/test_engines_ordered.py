"""Sums in a fixed order: exactly the order that is promised, and close to the exact sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitdial.engines.reference import ordered


def by_hand(values: np.ndarray) -> np.float32:
    """The sum of float32 numbers as the module's text says it."""
    lanes = [np.float32(0)] * 16
    for i, value in enumerate(values):
        lanes[i % 16] = np.float32(lanes[i % 16] + value)
    for half in (8, 4, 2, 1):
        lanes = [np.float32(lanes[i] + lanes[i + half]) for i in range(half)]
    return lanes[0]


@given(st.integers(1, 70), st.integers(1, 3), st.integers(0, 2), st.integers(0, 999))
def test_the_order_of_additions(count: int, other: int, axis: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = [other] * 3
    shape[axis] = count
    x = (rng.normal(0, 1, shape) * np.exp2(rng.integers(-20, 20, shape))).astype(np.float32)
    got = ordered.ordered_sum(torch.from_numpy(x), axis).numpy()
    want = np.apply_along_axis(lambda v: by_hand(v), axis, x)
    assert np.array_equal(got.squeeze(axis), want)


def test_nothing_is_negative_zero_and_nothing_is_lost() -> None:
    assert ordered.ordered_sum(torch.tensor([-0.0])).item() == 0.0
    assert not torch.signbit(ordered.ordered_sum(torch.full((40,), -0.0))).any()
    assert torch.isnan(ordered.ordered_sum(torch.tensor([1.0] * 20 + [float("nan")]))).all()


def test_the_square_root_is_rounded_once() -> None:
    x = np.random.default_rng(0).integers(1, 2**31 - 2**23, 200_000, dtype=np.int64).astype(np.int32).view(np.float32)
    x = x[np.isfinite(x)]
    assert np.array_equal(ordered.square_root(torch.from_numpy(x)).numpy(), np.sqrt(x))


@pytest.mark.parametrize("axes", [[1], [2], [1, 2], [1, 3], [-1], [1, 2, 3]])
def test_means_over_axes(axes: list[int]) -> None:
    x = torch.randn(2, 5, 33, 7, generator=torch.Generator().manual_seed(0))
    for keepdim in (False, True):
        got = ordered.over_axes(x, axes, keepdim, mean=True)
        assert got.shape == x.mean(axes, keepdim).shape
        assert torch.allclose(got.double(), x.double().mean(axes, keepdim), atol=1e-6)
