"""Slow definitions of the operators in NumPy: float32, one rounding per product and sum; nothing shared with the kernels.

All take and return VALUES (int64, stored byte minus zero) in NHWC order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

F = np.float32


def round_clamped(t: np.ndarray, lo: float, hi: float) -> np.ndarray:
    """rne(clamp(t, lo, hi)); t float32."""
    assert t.dtype == np.float32
    clamped = np.minimum(np.maximum(t, F(lo)), F(hi))
    return np.rint(clamped).astype(np.int64)


def quantize(x: np.ndarray, inverse: float, lo: float, hi: float) -> np.ndarray:
    """NaN becomes lo."""
    with np.errstate(all="ignore"):
        t = x * F(inverse)
    return round_clamped(np.where(np.isnan(t), F(lo), t), lo, hi)


def dequantize(q: np.ndarray, scale: float) -> np.ndarray:
    return q.astype(F) * F(scale)


def add(a: np.ndarray, b: np.ndarray, ra: float, rb: float, lo: float, hi: float) -> np.ndarray:
    return round_clamped(a.astype(F) * F(ra) + b.astype(F) * F(rb), lo, hi)


def mul(a: np.ndarray, b: np.ndarray, m: float, lo: float, hi: float) -> np.ndarray:
    return round_clamped((a * b).astype(F) * F(m), lo, hi)


def rescale(x: np.ndarray, factor: float, lo: float, hi: float) -> np.ndarray:
    return round_clamped(x.astype(F) * F(factor), lo, hi)


def _windows(x: np.ndarray, out_hw: tuple[int, int], a: dict[str, Any], outside: int) -> list[np.ndarray]:
    """Per tap the array [N, out_h, out_w, C] that it reads; positions outside the image read `outside`."""
    n, h, w, c = x.shape
    taps = []
    for i in range(a["kernel_h"]):
        for j in range(a["kernel_w"]):
            y = np.arange(out_hw[0]) * a["stride_h"] - a["pad_h"] + i * a.get("dilation_h", 1)
            z = np.arange(out_hw[1]) * a["stride_w"] - a["pad_w"] + j * a.get("dilation_w", 1)
            inside = ((y >= 0) & (y < h))[:, None] & ((z >= 0) & (z < w))[None, :]
            values = x[:, np.clip(y, 0, h - 1)][:, :, np.clip(z, 0, w - 1)]
            taps.append(np.where(inside[None, :, :, None], values, outside))
    return taps


def max_pool(x: np.ndarray, out_hw: tuple[int, int], window: dict[str, Any], least: int) -> np.ndarray:
    return np.max(_windows(x, out_hw, window, least), axis=0)


def sum_pool(
    x: np.ndarray, out_hw: tuple[int, int], window: dict[str, Any], factor: float, lo: float, hi: float
) -> np.ndarray:
    return round_clamped(np.sum(_windows(x, out_hw, window, 0), axis=0).astype(F) * F(factor), lo, hi)


def depthwise_sums(
    x: np.ndarray, out_hw: tuple[int, int], window: dict[str, Any], weight: np.ndarray, bias: np.ndarray
) -> np.ndarray:
    """x [N, H, W, C], weight int [taps, O] with O a multiple of C -> acc + bias [N, out_h, out_w, O]."""
    spread = np.repeat(x, weight.shape[1] // x.shape[3], axis=3)
    taps = _windows(spread, out_hw, window, 0)
    return sum((v * w for v, w in zip(taps, weight.astype(np.int64), strict=True)), np.zeros_like(taps[0])) + bias
