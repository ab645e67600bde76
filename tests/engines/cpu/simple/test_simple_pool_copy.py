"""max_pool, sum_pool and copy against their definitions, on every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import simple_definitions as define
from hypothesis import given, settings
from hypothesis import strategies as st
from simple_support import Kernels, check_bytes, guarded, run_split, tensor, zero_of

pytestmark = pytest.mark.sanitize
SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 12), st.integers(1, 14), st.integers(1, 70))
SEEDS = st.integers(0, 2**32 - 1)
EXAMPLES = settings(max_examples=60)


def window(rng: np.random.Generator, dilated: bool) -> dict[str, int]:
    """Any window, often one of the usual ones."""
    usual = {"kernel_h": 3, "kernel_w": 3, "stride_h": 2, "stride_w": 2, "pad_h": 1, "pad_w": 1}
    if rng.integers(0, 3) == 0:
        usual = {"kernel_h": 2, "kernel_w": 2, "stride_h": 2, "stride_w": 2, "pad_h": 0, "pad_w": 0}
    elif rng.integers(0, 2):
        for axis in "hw":
            kernel = int(rng.integers(1, 6))
            usual[f"kernel_{axis}"] = kernel
            usual[f"stride_{axis}"] = int(rng.integers(1, 4))
            usual[f"pad_{axis}"] = int(rng.integers(0, kernel // 2 + 1))
    if dilated:
        usual |= {"dilation_h": int(rng.choice([1, 1, 2])), "dilation_w": int(rng.choice([1, 1, 3]))}
    return usual


def out_size(shape: tuple[int, ...], a: dict[str, int], extra: int = 0) -> tuple[int, int]:
    """Output height and width; `extra` more where ceil_mode would add some. 0 if the window does not fit."""
    sizes = []
    for axis, size in zip("hw", shape[1:3], strict=True):
        reach = (a[f"kernel_{axis}"] - 1) * a.get(f"dilation_{axis}", 1) + 1
        room = size + 2 * a[f"pad_{axis}"] - reach
        count = room // a[f"stride_{axis}"] + 1 if room >= 0 else 0
        if count and extra and count * a[f"stride_{axis}"] < size + a[f"pad_{axis}"]:
            count += 1  # one more window that starts inside the image
        sizes.append(count)
    return sizes[0], sizes[1]


@EXAMPLES
@given(shape=SHAPES, seed=SEEDS)
def test_max_pool(kernels: Kernels, isa: str, shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    arguments = window(rng, True)
    out = out_size(shape, arguments, int(rng.integers(0, 2)))
    if 0 in out:
        return
    src = tensor(rng, shape, 7, int(rng.choice([0, 9])), bool(rng.integers(0, 2)))
    dst = tensor(rng, (shape[0], *out, shape[3]), 7, int(rng.choice([0, 9])))
    expected = define.max_pool(src.array.astype(np.int64), out, arguments, 0)
    check_bytes(dst, expected, 0, kernels.prepare(isa, "max_pool", src=src, dst=dst, **arguments), rng)


@EXAMPLES
@given(shape=SHAPES, seed=SEEDS, whole=st.booleans())
def test_sum_pool(kernels: Kernels, isa: str, shape: tuple[int, ...], seed: int, whole: bool) -> None:
    rng = np.random.default_rng(seed)
    arguments = window(rng, False)
    if whole:
        arguments = dict(zip(arguments, (*shape[1:3], 1, 1, 0, 0), strict=True))
    out = out_size(shape, arguments, int(rng.integers(0, 2)))
    if 0 in out:
        return
    src = tensor(rng, shape, 7, int(rng.choice([0, 9])), bool(rng.integers(0, 2)))
    dst = tensor(rng, (shape[0], *out, shape[3]), 7, int(rng.choice([0, 9])))
    zero_src, zero_dst = zero_of(rng), zero_of(rng)
    taps = arguments["kernel_h"] * arguments["kernel_w"]
    factor = float(rng.choice([0.5, 1.0 / taps, 0.37 / taps, 1.0]))
    lo, hi = (-127.0, 127.0) if zero_dst else (0.0, 255.0)
    expected = define.sum_pool(src.array.astype(np.int64) - zero_src, out, arguments, factor, lo, hi)
    run = kernels.prepare(
        isa, "sum_pool", src=src, dst=dst, zero_src=zero_src, zero_dst=zero_dst, factor=factor, lo=lo, hi=hi,
        **arguments,
    )  # fmt: skip
    check_bytes(dst, expected, zero_dst, run, rng)


def test_sum_pool_rounds_large_sums_once(kernels: Kernels, isa: str) -> None:
    """Sums beyond 2^24, where float32 holds every other integer only. With factor 2^-17 the sum (k + 1/2) 2^17 + 1 rounds
    down to the tie k + 1/2 and so to the even k; kept exact, it would give k + 1."""
    size, channels = 300, 20
    k = 130 + 2 * np.arange(channels)
    sums = (2 * k + 1) * 2**16 + 1
    values = np.repeat(sums[None] // size**2, size**2, axis=0)
    values[np.arange(size**2)[:, None] < (sums % size**2)[None]] += 1
    assert (values.sum(axis=0) == sums).all() and values.max() <= 255 and sums.min() > 2**24
    for zero in (0, 128):
        rng = np.random.default_rng(zero)
        stored = rng.permuted(values, axis=0).reshape(1, size, size, channels)
        src, dst = tensor(rng, stored.shape), tensor(rng, (1, 1, 1, channels))
        src.array[:] = stored
        arguments = {"kernel_h": size, "kernel_w": size, "stride_h": 1, "stride_w": 1, "pad_h": 0, "pad_w": 0}
        factor, offset = 2.0**-17, zero * size**2
        run = kernels.prepare(
            isa, "sum_pool", src=src, dst=dst, zero_src=zero, zero_dst=zero, factor=factor, lo=-127.0, hi=255.0 - zero,
            **arguments,
        )  # fmt: skip
        t = (sums - offset).astype(np.float32) * np.float32(factor)
        expected = define.round_clamped(t, -127.0, 255.0 - zero)
        if zero == 0:
            np.testing.assert_array_equal(expected, k)
        check_bytes(dst, expected[None, None, None], zero, run, rng)


def copy_arguments(rng: np.random.Generator, extent: list[int], order: list[int], gap: int) -> tuple[list[int], int]:
    """Strides of an array of `extent` whose axes lie in `order` (outermost first), and bytes from first to last."""
    strides, step = [0] * len(extent), 1
    for axis in reversed(order):
        strides[axis] = step
        step = step * extent[axis] + int(rng.integers(0, gap + 1))
    return strides, 1 + sum((d - 1) * s for d, s in zip(extent, strides, strict=True))


def check_copy(
    kernels: Kernels, isa: str, rng: np.random.Generator, a: dict[str, Any], src: np.ndarray, dst: np.ndarray
) -> None:
    indices = np.indices(a["extent"]).reshape(6, -1)
    to = a["dst_offset"] + sum(i * s for i, s in zip(indices, a["dst_stride"], strict=True))
    if a["gather"] is not None:
        indices[a["gather_axis"]] = a["gather"][indices[a["gather_axis"]]]
    at = a["src_offset"] + sum(i * s for i, s in zip(indices, a["src_stride"], strict=True))
    expected = dst.copy()
    expected[to] = src[at]
    run_split(kernels.prepare(isa, "copy", src=src, dst=dst, **a), a["extent"][0], rng)
    np.testing.assert_array_equal(dst, expected)


@settings(max_examples=150)
@given(
    extent=st.lists(st.integers(1, 40), min_size=6, max_size=6),
    seed=SEEDS,
    src_order=st.permutations(range(6)),
    dst_order=st.permutations(range(6)),
    gather_axis=st.integers(-1, 5),
)
def test_copy(
    kernels: Kernels, isa: str, extent: list[int], seed: int, src_order: list[int], dst_order: list[int], gather_axis: int
) -> None:
    rng = np.random.default_rng(seed)
    for axis in rng.permutation(6)[int(rng.integers(2, 4)) :]:
        extent[axis] = min(extent[axis], int(rng.integers(1, 4)))
    reach = list(extent)
    gather = None
    if gather_axis >= 0:
        reach[gather_axis] = int(rng.integers(1, 40))  # the gathered axis of the source may be longer or shorter
        gather = rng.integers(0, reach[gather_axis], extent[gather_axis]).astype(np.int32)
    gap = int(rng.choice([0, 0, 3]))
    src_stride, src_size = copy_arguments(rng, reach, src_order, gap)
    dst_stride, dst_size = copy_arguments(rng, extent, dst_order, gap)
    src_offset, dst_offset = int(rng.integers(0, 5)), int(rng.integers(0, 5))
    for axis in range(6):
        kind = rng.integers(0, 8)
        if kind == 0:  # flipped
            src_offset += (reach[axis] - 1) * src_stride[axis]
            src_stride[axis] = -src_stride[axis]
        elif kind == 1:  # repeated
            src_stride[axis] = 0
    src, dst = guarded(src_size + 5, bool(rng.integers(0, 2))), guarded(dst_size + dst_offset)
    src[:], dst[:] = rng.integers(0, 256, len(src)), rng.integers(0, 256, len(dst))
    if not any(s < 0 for s in src_stride):
        tight = guarded(src_size + src_offset)
        tight[:] = src[: len(tight)]
        src = tight
    arguments = {
        "extent": extent, "src_stride": src_stride, "dst_stride": dst_stride, "src_offset": src_offset,
        "dst_offset": dst_offset, "gather": gather, "gather_axis": gather_axis,
    }  # fmt: skip
    check_copy(kernels, isa, rng, arguments, src, dst)


@EXAMPLES
@given(shape=SHAPES, seed=SEEDS)
def test_flatten_and_back(kernels: Kernels, isa: str, shape: tuple[int, ...], seed: int) -> None:
    """[N, H, W, C] with margins -> rows [N, C * H * W], and from planes to pixels."""
    rng = np.random.default_rng(seed)
    n, h, w, c = shape
    src = tensor(rng, shape, 7, int(rng.choice([0, 9])))
    offset = src.view.data - src.memory.ctypes.data
    pitches = [src.view.pitch_n, 1, src.view.pitch_y, src.view.pitch_x, 0, 0]
    flat = guarded(n * c * h * w)
    arguments = {
        "extent": [n, c, h, w, 1, 1], "src_stride": pitches, "dst_stride": [c * h * w, h * w, w, 1, 0, 0],
        "src_offset": offset, "dst_offset": 0, "gather": None, "gather_axis": -1,
    }  # fmt: skip
    check_copy(kernels, isa, rng, arguments, src.memory, flat)
    np.testing.assert_array_equal(flat.reshape(n, c, h, w), src.array.transpose(0, 3, 1, 2))
    back = arguments | {
        "src_stride": arguments["dst_stride"], "dst_stride": pitches, "src_offset": 0, "dst_offset": offset
    }  # fmt: skip
    check_copy(kernels, isa, rng, back, flat, src.memory)
