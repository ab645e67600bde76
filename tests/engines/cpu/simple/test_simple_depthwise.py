"""Depthwise convolution against its definition, on every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import simple_definitions as define
from hypothesis import given, settings
from hypothesis import strategies as st
from simple_support import Kernels, View, check_bytes, framed, guarded, run_split, tensor, zero_of

pytestmark = pytest.mark.sanitize
F = np.float32
SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 11), st.integers(1, 70))


def case(
    kernels: Kernels, isa: str, shape: tuple[int, ...], a: dict[str, int], rng: np.random.Generator, sums: bool,
    frame: tuple[int, int] = (0, 0),
) -> None:  # fmt: skip
    multiplicity = a["multiplicity"]
    out = []
    for axis, size in zip("hw", shape[1:3], strict=True):
        reach = (a[f"kernel_{axis}"] - 1) * a[f"dilation_{axis}"] + 1
        out.append((size + 2 * a[f"pad_{axis}"] - reach) // a[f"stride_{axis}"] + 1)
    if min(out) < 1:
        return
    zeros = {f"zero_{k}": zero_of(rng) for k in ("src", "dst", "residual")}
    src = framed(rng, shape, frame, zeros["zero_src"], int(rng.choice([0, 9])), bool(rng.integers(0, 2)))
    channels, taps = shape[3] * multiplicity, a["kernel_h"] * a["kernel_w"]
    dst = tensor(rng, (shape[0], *out, channels), 7, int(rng.choice([0, 9])))
    weight = guarded(taps * channels, bool(rng.integers(0, 2))).view(np.int8).reshape(taps, channels)
    weight[:] = rng.integers(-127, 128, weight.shape)
    if rng.integers(0, 3) == 0:
        weight[:] = rng.choice([-127, 127], weight.shape)
    bias = guarded(4 * channels).view(np.int32)
    bias[:] = rng.integers(-(2**20), 2**20, channels)
    m = guarded(4 * channels).view(F)
    m[:] = rng.uniform(0.1, 3.0, channels) * 127 / (127 * 255 * taps)
    if rng.integers(0, 2):
        m[:] = 2.0 ** -int(rng.integers(6, 14))  # ties
    lo, hi = (-127.0, 127.0) if zeros["zero_dst"] else (0.0, 255.0)
    total = define.depthwise_sums(src.array.astype(np.int64) - zeros["zero_src"], (out[0], out[1]), a, weight, bias)
    assert np.abs(total).max() < 2**31
    t = total.astype(F) * m
    residual: dict[str, Any] = {"residual": None, "residual_view": View(), "residual_factor": 0.0}
    in_place = False
    if rng.integers(0, 2):
        in_place = bool(rng.integers(0, 2))
        r = dst if in_place else tensor(rng, dst.array.shape, 7, int(rng.choice([0, 9])), bool(rng.integers(0, 2)))
        factor = float(rng.choice([0.5, 0.9, 1.3]))
        t = t + (r.array.astype(np.int64) - zeros["zero_residual"]).astype(F) * F(factor)
        start = np.lib.array_utils.byte_bounds(r.array)[0]
        residual = {"residual": start, "residual_view": r, "residual_factor": factor}
    acc = guarded(4 * total.size).view(np.int32) if sums else None
    run = kernels.prepare(
        isa, "depthwise", src=src, dst=dst, weight=weight, bias=bias, m=m, lo=lo, hi=hi, dst_acc=acc,
        margin_h=frame[0], margin_w=frame[1], **a, **zeros, **residual,
    )  # fmt: skip
    if acc is None:
        check_bytes(dst, define.round_clamped(t, lo, hi), zeros["zero_dst"], run, rng)
    else:
        before = dst.memory.copy()
        run_split(run, shape[0] * out[0], rng)
        np.testing.assert_array_equal(acc.reshape(total.shape), total)
        np.testing.assert_array_equal(dst.memory, before)


@settings(max_examples=100)
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1), usual=st.booleans(), sums=st.booleans())
def test_depthwise(kernels: Kernels, isa: str, shape: tuple[int, ...], seed: int, usual: bool, sums: bool) -> None:
    rng = np.random.default_rng(seed)
    arguments = {"multiplicity": 1 if usual else int(rng.choice([1, 1, 2, 3]))}
    for axis in "hw":
        kernel = 3 if usual else int(rng.integers(1, 6))
        arguments |= {
            f"kernel_{axis}": kernel, f"stride_{axis}": int(rng.integers(1, 3 if usual else 4)),
            f"pad_{axis}": 1 if usual else int(rng.integers(0, kernel + 1)),
            f"dilation_{axis}": 1 if usual else int(rng.choice([1, 1, 2])),
        }  # fmt: skip
    if arguments["multiplicity"] > 1:
        shape = (*shape[:3], min(shape[3], 40))
    case(kernels, isa, shape, arguments, rng, sums)


@settings(max_examples=100)
@given(
    shape=SHAPES, seed=st.integers(0, 2**32 - 1), kernel=st.sampled_from([3, 5]), stride=st.integers(1, 2),
    pad=st.integers(0, 3), frame=st.tuples(st.integers(0, 3), st.integers(0, 3)), sums=st.booleans(),
)  # fmt: skip
def test_padding_that_lies_in_memory(
    kernels: Kernels, isa: str, shape: tuple[int, ...], seed: int, kernel: int, stride: int, pad: int, frame: tuple[int, int],
    sums: bool,
) -> None:  # fmt: skip
    """Windows of 3 x 3 and 5 x 5 with rows and columns of zeros around the images: enough of them, or too few."""
    a = {f"{name}_{axis}": value for axis in "hw" for name, value in (("kernel", kernel), ("stride", stride), ("pad", pad))}
    a |= {"dilation_h": 1, "dilation_w": 1, "multiplicity": 1}
    case(kernels, isa, shape, a, np.random.default_rng(seed), sums, frame)


def test_sums_times_factors_beyond_int32(kernels: Kernels, isa: str) -> None:
    """Factors so large that sums leave what rounds to int32: limited before they are rounded."""
    rng = np.random.default_rng(0)
    for factor in (1e3, 1e4, 1e30):
        src = framed(rng, (1, 5, 9, 70), (1, 1), 0, 0, False)
        dst = tensor(rng, (1, 5, 9, 70))
        weight, bias = rng.integers(-127, 128, (9, 70)).astype(np.int8), rng.integers(-9, 9, 70).astype(np.int32)
        a = {f"{name}_{axis}": v for axis in "hw" for name, v in (("kernel", 3), ("stride", 1), ("pad", 1), ("dilation", 1))}
        total = define.depthwise_sums(src.array.astype(np.int64), (5, 9), a | {"multiplicity": 1}, weight, bias)
        m = np.where(np.arange(70) % 3, 1e-3, factor).astype(F)
        run = kernels.prepare(
            isa, "depthwise", src=src, dst=dst, weight=weight, bias=bias, m=m, lo=0.0, hi=255.0, dst_acc=None, zero_src=0,
            zero_dst=0, zero_residual=0, residual=None, residual_view=View(), residual_factor=0.0, multiplicity=1,
            margin_h=1, margin_w=1, **a,
        )  # fmt: skip
        check_bytes(dst, define.round_clamped(total.astype(F) * m, 0.0, 255.0), 0, run, rng)


def test_windows_at_and_beyond_the_packed_size(kernels: Kernels, isa: str) -> None:
    rng = np.random.default_rng(0)
    for kernel_h, kernel_w in ((8, 16), (7, 7), (3, 43)):  # 128 taps are packed, 129 are not
        a = {"kernel_h": kernel_h, "kernel_w": kernel_w, "stride_h": 1, "stride_w": 2, "pad_h": 3, "pad_w": 7}
        a |= {"dilation_h": 1, "dilation_w": 1, "multiplicity": 1}
        for sums in (False, True):
            case(kernels, isa, (1, 9, 41, 67), a, rng, sums)
