"""Products of two activations and kernels over rows, alone: ragged sizes, strides, signs, masked rows, extremes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cuda_layers import placed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitdial.engines.cuda.arguments import Epilogue, Launch, MatMulArgs, RowsArgs
from bitdial.engines.cuda.emulated import EmulatedDevice
from bitdial.engines.reference.ordered import layer_norm, over_axes
from bitdial.engines.reference.ordered_softmax import softmax

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def freed(device: EmulatedDevice, out: npt.NDArray[Any], *spans: Any) -> npt.NDArray[Any]:
    """What the last span holds; all are given back."""
    device.download(spans[-1], out)
    for span in spans:
        device.free(span)
    return out


@QUICK
@given(st.integers(0, 2**32 - 1), st.integers(1, 2), st.integers(1, 3), st.integers(1, 70), st.integers(1, 70),
       st.integers(1, 140), st.sampled_from(["uu", "us", "su", "ss"]), st.booleans(), st.booleans())  # fmt: skip
def test_products_of_two_activations(
    device: EmulatedDevice, seed: int, n: int, heads: int, rows: int, columns: int, depth: int, signs: str, a_turned: bool,
    b_turned: bool,
) -> None:  # fmt: skip
    """Either operand with its depth adjoining (loads of 16 bytes, where they are aligned) or not."""
    rng = np.random.default_rng(seed)
    ends = {"u": (0, 255), "s": (-127, 127)}
    a = rng.integers(*ends[signs[0]], (n, heads, rows, depth), endpoint=True)
    b = rng.integers(*ends[signs[1]], (n, heads, columns, depth), endpoint=True)
    memory = [placed(device, np.ascontiguousarray(v.swapaxes(2, 3) if turned else v).astype(np.int16).astype(np.uint8))
              for v, turned in ((a, a_turned), (b, b_turned))]  # fmt: skip
    table = np.arange(heads)[:, None] * np.array([rows * depth, columns * depth, rows * columns])
    y = device.allocate(n * heads * rows * columns * 4)
    heads_table = placed(device, table.astype(np.int32))
    args = MatMulArgs(
        a=memory[0], b=memory[1], heads=heads_table, a_sample=heads * rows * depth, b_sample=heads * columns * depth, rows=rows,
        columns=columns, depth=depth, n_heads=heads, a_row=1 if a_turned else depth, a_depth=rows if a_turned else 1,
        b_column=1 if b_turned else depth, b_depth=columns if b_turned else 1,
        out=Epilogue(yf=y, y_sample=heads * rows * columns, y_place=columns, y_channel=1, accumulators=1),
    )  # fmt: skip
    device.launch(Launch(f"matmul_{signs}", (-(-rows // 64), -(-columns // 64), n * heads), args))
    found = freed(device, np.empty((n, heads, rows, columns), np.int32), *memory, heads_table, y)
    assert np.array_equal(found, a @ b.swapaxes(2, 3))


def rows_of(seed: int, outer: int, length: int, inner: int) -> npt.NDArray[np.float32]:
    """Normal, large, tiny and equal values; some of them, and whole rows, masked with -inf."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, rng.choice([1e-3, 1.0, 30.0, 1e4]), (outer, length, inner)).astype(np.float32)
    x[rng.random(x.shape) < rng.choice([0.0, 0.4])] = -np.inf
    x[rng.integers(outer)] = rng.choice([-np.inf, 3.0])
    return x


@QUICK
@given(st.integers(0, 2**32 - 1), st.integers(1, 11), st.integers(1, 70), st.integers(1, 3))
def test_softmax(device: EmulatedDevice, seed: int, outer: int, length: int, inner: int) -> None:
    x = rows_of(seed, outer, length, inner)
    given_, y = placed(device, x), device.allocate(x.nbytes)
    args = RowsArgs(x=given_, y=y, rows=outer * inner, length=length, inner=inner)
    device.launch(Launch("softmax_kernel", (-(-outer * inner // 8), 1, 1), args))
    found = freed(device, np.empty_like(x), given_, y)
    assert np.array_equal(found, softmax(torch.from_numpy(x), 1).numpy())


@QUICK
@given(st.integers(0, 2**32 - 1), st.integers(1, 11), st.integers(1, 70), st.integers(1, 3), st.booleans())
def test_sums_and_means(device: EmulatedDevice, seed: int, outer: int, length: int, inner: int, mean: bool) -> None:
    x = np.nan_to_num(rows_of(seed, outer, length, inner), neginf=-1.0)
    given_, y = placed(device, x), device.allocate(outer * inner * 4)
    args = RowsArgs(x=given_, y=y, rows=outer * inner, length=length, inner=inner, mean=float(length) if mean else 0.0)
    device.launch(Launch("sum_kernel", (-(-outer * inner // 8), 1, 1), args))
    found = freed(device, np.empty((outer, inner), np.float32), given_, y)
    assert np.array_equal(found, over_axes(torch.from_numpy(x), [1], False, mean).numpy())


@QUICK
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 70), st.integers(0, 2))
def test_layer_norm(device: EmulatedDevice, seed: int, outer: int, length: int, affine: int) -> None:
    x = np.nan_to_num(rows_of(seed, outer, length, 1)[..., 0], neginf=-1.0)
    weight, bias = np.random.default_rng(seed).normal(0, 1, (2, length)).astype(np.float32)
    spans = [placed(device, v) for v in (x, weight, bias)]
    y = device.allocate(x.nbytes)
    args = RowsArgs(x=spans[0], y=y, rows=outer, length=length, inner=1, eps=1e-5, weight=spans[1] if affine else None,
                    bias=spans[2] if affine > 1 else None)  # fmt: skip
    device.launch(Launch("layer_norm_kernel", (-(-outer // 8), 1, 1), args))
    found = freed(device, np.empty_like(x), *spans, y)
    own = [torch.from_numpy(v) if affine > i else None for i, v in enumerate((weight, bias))]
    assert np.array_equal(found, layer_norm(torch.from_numpy(x), *own, 1, 1e-5).numpy())


@pytest.mark.parametrize("kernel", ["softmax_kernel", "sum_kernel", "layer_norm_kernel"])
def test_rows_stay_within_their_tensors(device: EmulatedDevice, kernel: str) -> None:
    """One row more than there is memory for is found by the emulator."""
    x, y = device.allocate(5 * 7 * 4), device.allocate(5 * 7 * 4)
    device.upload(x, np.zeros(35, np.float32))
    device.launch(Launch(kernel, (1, 1, 1), RowsArgs(x=x, y=y, rows=5, length=7, inner=1, eps=1.0)))
    with pytest.raises(Exception, match="access beyond a tensor"):
        device.launch(Launch(kernel, (1, 1, 1), RowsArgs(x=x, y=y, rows=6, length=7, inner=1, eps=1.0)))
