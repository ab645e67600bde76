"""Softmax of the reference engine: its exponential's error, and the order of its operations."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from bitdial.engines.reference import ordered_softmax
from bitdial.engines.reference.ordered_softmax import FLUSH, exp32, softmax

Floats = npt.NDArray[np.float32]


def test_the_exponential_stays_within_its_bound() -> None:
    """2.28 units in the last place is the most over all float32 numbers (tried once); here about two million of them."""
    first, last = np.array([1e-30, -FLUSH], np.float32).view(np.int32)
    x = -np.concatenate([np.arange(first, last, 619, dtype=np.int32).view(np.float32), np.float32([0.0, -FLUSH])])
    got = exp32(torch.from_numpy(x.copy())).numpy()
    exact = np.exp(x.astype(np.float64))
    unit = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert (np.abs(got - exact) / unit).max() < 2.5
    assert exp32(torch.tensor([0.0, -0.0])).tolist() == [1.0, 1.0]


def test_what_is_small_counts_as_nothing() -> None:
    below = np.nextafter(np.float32(FLUSH), np.float32(-math.inf))
    assert exp32(torch.tensor([below, -1e4, -1e30, -3.4e38, -math.inf])).tolist() == [0.0] * 5
    assert exp32(torch.tensor([FLUSH])).item() > 0


def by_hand(row: Floats) -> Floats:
    """The documented order, one number at a time."""
    e = exp32(torch.from_numpy(row - row.max())).numpy()
    lanes = np.zeros(16, np.float32)
    for i, value in enumerate(e):
        lanes[i % 16] += value
    for width in (8, 4, 2, 1):
        for i in range(width):
            lanes[i] += lanes[i + width]
    return e * (np.float32(1.0) / lanes[0])


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 49, 197])
def test_the_order_of_operations(length: int) -> None:
    x = np.random.default_rng(length).normal(0, 4, (3, length)).astype(np.float32)
    got = softmax(torch.from_numpy(x), 1).numpy()
    assert np.array_equal(got, np.stack([by_hand(row) for row in x]))
    exact = torch.softmax(torch.from_numpy(x).double(), 1).numpy()
    np.testing.assert_allclose(got, exact, rtol=2e-6, atol=1e-30)


def test_any_axis_in_any_layout_and_block(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (2, 3, 5, 7)).astype(np.float32))
    for dim in (0, 1, 2, 3, -1):
        want = np.apply_along_axis(by_hand, dim, x.numpy())
        assert np.array_equal(softmax(x, dim).numpy(), want)
        assert np.array_equal(softmax(x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), dim).numpy(), want)
    whole = softmax(x, -1)
    monkeypatch.setattr(ordered_softmax, "BLOCK", 16)
    assert torch.equal(softmax(x, -1), whole)


def test_masked_values_and_rows() -> None:
    x = torch.tensor([[1.0, -math.inf, 1.0], [-math.inf] * 3, [-1e30, 0.0, -1e30]])
    assert softmax(x, 1).tolist() == [[0.5, 0.0, 0.5], [0.0] * 3, [0.0, 1.0, 0.0]]
