"""Low weights of their own: what is solved, against plain sums; what must not change does not."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdial.quantization import low_plane
from bitdial.quantization.byte_products import int8_products, squared_sums
from bitdial.quantization.low_plane import (
    layer_outputs,
    present_weights,
    provisional_plane,
    ridge,
    round_in_order,
    solve_groups,
)
from bitdial.quantization.output_error import LayerSamples
from bitdial.quantization.program import BLOCK_ROWS, QuantizedLayer
from bitdial.quantization.weights import low_integers, read_back_weights

SEEDS = st.integers(0, 2**32 - 1)
ROWS = 300


def make_layer(rng: np.random.Generator, conv_groups: int = 1, granularity: str = "group", wmax: int = 7) -> QuantizedLayer:
    local, taps, size, rows = int(rng.integers(2, 9)), int(rng.integers(1, 4)), int(rng.integers(1, 5)), 20 * conv_groups
    bounds = np.array([g * local + s for g in range(conv_groups) for s in range(0, local, size)] + [local * conv_groups])
    n = len(bounds) - 1
    weight = np.clip(np.rint(rng.normal(size=(rows, local, taps)) * 40), -127, 127).astype(np.int8)
    return QuantizedLayer(
        "l", "conv", weight, rng.uniform(0.5, 2, rows).astype(np.float32), np.ones(rows, np.float32), 0.0, True, "",
        15, wmax, bounds.astype(np.int32), rng.integers(0, 4, n).astype(np.uint8),
        np.full((rows, n // conv_groups), 4, np.uint8), granularity, np.ones(n, np.int64), np.zeros((2, n), np.bool_),
        np.zeros((2, rows), np.int32), conv_groups,
    )  # fmt: skip


def correlated(rng: np.random.Generator, columns: int) -> torch.Tensor:
    """float32 [ROWS, columns]: integers that a few sources have in common, without their means."""
    x = np.abs(rng.normal(size=(ROWS, 3)) @ rng.normal(size=(3, columns)) * 30 + rng.normal(size=(ROWS, columns)) * 10)
    x = np.clip(np.rint(x), 0, 255)
    return torch.from_numpy((x - x.mean(axis=0)).astype(np.float32))


def columns_of(layer: QuantizedLayer) -> int:
    assert layer.weight is not None
    return layer.weight.shape[1] * layer.conv_groups * layer.weight.shape[2]


@pytest.fixture(params=[2048, 5])
def runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """How many columns are solved at once: all of a layer, or runs of few groups."""
    monkeypatch.setattr(low_plane, "MOST_COLUMNS", request.param)
    yield request.param


@pytest.mark.parametrize("conv_groups", [1, 2])
@pytest.mark.parametrize("granularity", ["output", "block", "group"])
def test_solved_groups(runs: int, conv_groups: int, granularity: str) -> None:
    """Only the low weights and shifts of the groups in question change; the errors that are left are those of the plane."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        layer = make_layer(rng, conv_groups, granularity)
        layer.low_weight = low_integers(layer).copy()
        before, shifts, high = layer.low_weight.copy(), layer.weight_shift.copy(), layer.weight.copy()  # type: ignore[union-attr]
        groups = rng.random(layer.n_groups) < 0.6
        groups[0] = True
        x = correlated(rng, columns_of(layer))
        wanted = layer_outputs(layer, present_weights(layer, np.zeros_like(groups)), x) + 40 * torch.randn(ROWS, len(high))
        errors = wanted - layer_outputs(layer, present_weights(layer, np.zeros_like(groups)), x)
        solve_groups(layer, groups, x, errors, centred=False)
        assert np.abs(layer.low_weight).max() <= 7 and np.abs(read_back_weights(layer)).max() <= 127
        assert (layer.weight == high).all()
        left = wanted - layer_outputs(layer, present_weights(layer, groups), x)
        torch.testing.assert_close(errors, left, rtol=1e-3, atol=0.5)
        n_local = layer.weight_shift.shape[1]
        kept = np.repeat(~groups.reshape(conv_groups, n_local), len(high) // conv_groups, axis=0)  # [O, n_local]
        assert (layer.weight_shift[kept] == shifts[kept]).all()
        per_weight = np.repeat(kept, np.diff(layer.group_bounds[: n_local + 1]), axis=1)
        assert (layer.low_weight[per_weight] == before[per_weight]).all()
        size = {"output": 1, "block": BLOCK_ROWS, "group": len(high)}[granularity]
        for own in range(conv_groups):
            rows = layer.weight_shift.reshape(conv_groups, -1, n_local)[own]
            assert all((rows[a : a + size] == rows[a]).all() for a in range(0, len(rows), size))


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_solving_beats_rounding(seed: int) -> None:
    """On inputs that have something in common the errors of a whole low layer shrink, against each weight by itself."""
    rng = np.random.default_rng(seed)
    layer = make_layer(rng)
    none, all_groups = np.zeros(layer.n_groups, np.bool_), np.ones(layer.n_groups, np.bool_)
    x = correlated(rng, columns_of(layer))
    wanted = layer_outputs(layer, present_weights(layer, none), x)
    derived = wanted - layer_outputs(layer, present_weights(layer, all_groups), x)
    errors = torch.zeros_like(wanted)
    layer.low_weight = low_integers(layer).copy()
    solve_groups(layer, all_groups, x, errors, centred=False)
    if columns_of(layer) >= 10:  # with few weights there is little to pass errors on to
        assert float(errors.square().sum()) <= float(derived.square().sum())


@pytest.mark.parametrize("columns", [1, 2, 37])
@pytest.mark.parametrize("kind", [torch.uint8, torch.int8])
@pytest.mark.parametrize("centred", [False, True])
def test_moments_of_bytes(kind: torch.dtype, centred: bool, columns: int) -> None:
    """Integers in bytes give what the same in float64 give, at the ends of their range too."""
    rng = np.random.default_rng(0)
    low, high = (0, 256) if kind == torch.uint8 else (-127, 128)
    x = torch.from_numpy(rng.integers(low, high, (ROWS, columns)))
    x[:, -1], x[:, columns // 2], x[:5, 0] = high - 1, low, 0
    wanted = torch.from_numpy(rng.normal(0, 100, (ROWS, 5))).float()
    mean = x.double().mean(dim=0) if centred else None
    rows = x.double() if mean is None else x.double() - mean
    for values in (x.to(kind), x.float()):
        squares, cross = low_plane._moments(values, wanted, mean)
        torch.testing.assert_close(squares, rows.T @ rows, rtol=1e-5, atol=ROWS * 0.05)
        torch.testing.assert_close(cross, wanted.double().T @ rows, rtol=1e-3, atol=ROWS * 0.5)
    if int8_products():
        torch.testing.assert_close(squared_sums(x.to(kind), mean), rows.T @ rows, rtol=1e-12, atol=1e-6)


def test_ridge_changes_nothing_where_that_would_do_harm() -> None:
    """What the inputs explain is found; noise is not fitted, since it does not help on the rows held out."""
    rng = np.random.default_rng(0)
    x = correlated(rng, 12)
    unit = torch.ones(5, dtype=torch.float64)
    weight = torch.from_numpy(rng.normal(size=(5, 12)) * 20).float()
    change, covariance = ridge(x, x @ weight.T, unit)
    torch.testing.assert_close(covariance, (x.T @ x).double() / ROWS, rtol=1e-4, atol=1e-2)
    left = x @ (weight - change.float()).T
    assert float(left.square().sum()) < 0.02 * float((x @ weight.T).square().sum())
    noise = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1))
    many = torch.randn(ROWS, 200, generator=torch.Generator().manual_seed(2))
    change, _ = ridge(many, noise, unit)
    fitted = (many @ change.float().T).square().sum()
    assert float(fitted) < 0.1 * float(noise.square().sum())


@pytest.mark.parametrize(
    ("counting", "strengths"), [(1.0, low_plane.RIDGES), (0.6, low_plane.RIDGES), (0.4, low_plane.RIDGES[-1:]), (0.001, ())]
)
def test_rows_that_do_not_count_are_not_judged_by(
    monkeypatch: pytest.MonkeyPatch, counting: float, strengths: tuple[float, ...]
) -> None:
    """Mostly padding: the strongest ridge alone. So few rows that count that weights would be fitted to them: none."""
    rng = np.random.default_rng(0)
    layer = make_layer(rng)
    layer.low_weight = low_integers(layer).copy()
    asked: list[tuple[float, ...]] = []

    def recorded(x: torch.Tensor, wanted: torch.Tensor, unit: torch.Tensor, of: tuple[float, ...], mean: object = None) -> object:
        asked.append(of)
        return ridge(x, wanted, unit, of)

    monkeypatch.setattr(low_plane, "ridge", recorded)
    x, errors = correlated(rng, columns_of(layer)), torch.randn(ROWS, len(layer.weight))  # type: ignore[arg-type]
    solve_groups(layer, np.ones(layer.n_groups, np.bool_), x, errors, centred=False, counting=counting)
    assert asked == [strengths]


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.sampled_from([1, 7, 20]))
def test_rounding_in_order(seed: int, limit: int) -> None:
    """Independent inputs: every weight goes to the nearest step. Dependent ones: the error of the sums is no larger."""
    rng = np.random.default_rng(seed)
    m = int(rng.integers(1, 300))  # more than one block
    target = torch.from_numpy(rng.normal(size=(4, m)) * 3 * limit)
    step = torch.from_numpy(np.exp2(rng.integers(0, 3, (4, m)).astype(float)))
    nearest = (target / step).round().clamp(-limit, limit)
    scale = torch.from_numpy(rng.uniform(0.1, 2, m))
    alone = round_in_order(target, torch.diag(scale), torch.diag(1 / scale), step, limit)
    assert torch.equal(alone, nearest)
    x = torch.from_numpy(rng.normal(size=(2 * m, 2)) @ rng.normal(size=(2, m)) + 0.3 * rng.normal(size=(2 * m, m)))
    covariance = x.T @ x / len(x)
    target = target.clamp(-limit, limit) * 0.9  # nothing saturates
    step = torch.ones_like(target)
    found = round_in_order(target, covariance, torch.linalg.inv(covariance), step, limit)
    assert float(found.abs().max()) <= limit and torch.equal(found, found.round())

    def cost(z: torch.Tensor) -> float:
        return float((((z * step - target) @ x.T) ** 2).sum())

    if m >= 20:  # with few weights there is little to pass errors on to
        assert cost(found) <= cost(target.round().clamp(-limit, limit))


@settings(max_examples=12, deadline=None)
@given(SEEDS, st.booleans(), st.booleans(), st.sampled_from([1, 2]), st.sampled_from([3, 7, 31]))
def test_provisional_plane(seed: int, signed: bool, centred: bool, conv_groups: int, wmax: int) -> None:
    """All groups get weights within range; 8-bit weights stay; the first quarter knows nothing of the others."""
    rng = np.random.default_rng(seed)
    layer = make_layer(rng, conv_groups, wmax=wmax)
    high = layer.weight.copy()  # type: ignore[union-attr]
    channels, taps = high.shape[1] * conv_groups, high.shape[2]
    patches = np.clip(np.abs(rng.normal(size=(60, channels, taps))) * 60, 0, 127).astype(np.int16)
    if signed:
        patches *= rng.choice([-1, 1], patches.shape).astype(np.int16)
    scores = rng.random(layer.n_groups)
    provisional_plane(LayerSamples(layer, patches, signed, centred), scores)
    assert layer.low_weight is not None and np.abs(layer.low_weight).max() <= wmax
    assert (layer.weight == high).all()
    other = make_layer(np.random.default_rng(seed), conv_groups, wmax=wmax)
    last = np.argsort(scores.reshape(conv_groups, -1), axis=1)[:, -1]  # changed inputs of the groups that come last
    n_local = layer.weight_shift.shape[1]
    if n_local < 4:
        return
    changed = patches.copy()
    for own, j in enumerate(last):
        a, b = other.group_bounds[own * n_local + j : own * n_local + j + 2]
        changed[:, a:b] = 0
    provisional_plane(LayerSamples(other, changed, signed, centred), scores)
    first = np.argsort(scores.reshape(conv_groups, -1), axis=1)[:, 0]
    rows = len(high) // conv_groups
    for own, j in enumerate(first):
        a, b = (int(v) for v in layer.group_bounds[j : j + 2])
        mine = slice(own * rows, (own + 1) * rows)
        assert (layer.low_weight[mine, a:b] == other.low_weight[mine, a:b]).all()  # type: ignore[index]


def test_what_is_left_is_told_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are the same either way; groups in runs of their own see what the runs before have left."""
    monkeypatch.setattr(low_plane, "MOST_COLUMNS", 4)
    found = []
    for left in (True, False):
        rng = np.random.default_rng(3)
        layer = make_layer(rng)
        layer.low_weight = low_integers(layer)
        x = correlated(rng, layer.weight[0].size)  # type: ignore[index]
        errors = torch.from_numpy(rng.normal(size=(ROWS, len(layer.weight))) * 50).float()  # type: ignore[arg-type]
        solve_groups(layer, np.ones(layer.n_groups, np.bool_), x, errors, centred=False, left=left)
        found.append((layer.low_weight, layer.weight_shift, errors))
    assert all((a == b).all() for a, b in zip(found[0][:2], found[1][:2], strict=True))
    assert not torch.equal(found[0][2], found[1][2])
