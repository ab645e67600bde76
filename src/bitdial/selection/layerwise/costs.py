"""Bytes and time of a layer at each precision. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping


def weight_bytes(precision: str, weights: int, outputs: int, wmax: int, dial: bool, stored: bool = False) -> int:
    """Bytes that a layer's weights and per-output tables take in a file, before DEFLATE.

    weights: how many. wmax: limit of low weights; they take 1 + bit_length(wmax) bits each, packed. dial: low layers keep 8-bit
    weights, so that they can run at 8 bits too; stored: low weights, integers of their own, beside them. Integer layers carry a
    scale, a multiplier and a bias per output (12 bytes), float ones a bias (4).
    """
    if precision == "float32":
        return 4 * weights + 4 * outputs
    if precision == "bfloat16":
        return 2 * weights + 4 * outputs
    low = -(-weights * (1 + int(wmax).bit_length()) // 8)
    if precision == "low" and not dial:
        return low + 12 * outputs
    return weights + (low if precision == "low" and stored else 0) + 12 * outputs


def estimated_seconds(precision: str, macs: int, relative_time: Mapping[str, float]) -> float:
    """Time by multiply-accumulates, in those of int8 (no seconds: only shares of one such sum by another mean something)."""
    return macs * relative_time[precision]


def table_seconds(precision: str, eight_bit: float, low: float, relative_time: Mapping[str, float]) -> float:
    """Seconds from measured ones at 8 bits and low; float layers by `relative_time`, since tables have no times for them."""
    if precision == "low":
        return low
    return eight_bit * relative_time[precision] / relative_time["int8"]
