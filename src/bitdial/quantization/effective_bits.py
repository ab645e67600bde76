"""Effective bits: which of the eight bits a group uses, and its values at low precision. Pure NumPy functions.

Source: FlexiQ (EuroSys 2026), "effective bit extraction"; design notes, section 1. Values are integers of the 8-bit
encoding: unsigned 0..255 or signed -127..127. `limit` is the largest low magnitude: 2^b - 1 for unsigned and 2^(b-1) - 1
for signed values of b bits (4 bits: 15 and 7); other limits are allowed. Low values are always symmetric when signed
(never -8 at 4 bits: kernels rely on that).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.errors import ConfigError

IntArray = npt.NDArray[np.integer[Any]]


def low_limit(bits: int, signed: bool) -> int:
    """Largest low magnitude of `bits` bits. Raises ConfigError outside 2..7 bits."""
    if not 2 <= bits <= 7:
        raise ConfigError(f"low precision of {bits} bits: choose 2 to 7")
    return (1 << (bits - 1)) - 1 if signed else (1 << bits) - 1


def bit_length(magnitude: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Bits needed for each non-negative integer (0 -> 0, 31 -> 5, 32 -> 6)."""
    _, exponent = np.frexp(np.asarray(magnitude, dtype=np.float64))
    return exponent.astype(np.int64)


def plain_shift(largest: npt.ArrayLike, limit: int) -> npt.NDArray[np.uint8]:
    """Shift of a group from its largest magnitude: the bits above those that fit into `limit`.

    max(0, n - b) for unsigned and max(0, n - (b - 1)) for signed values; `limit` carries b and the sign.
    """
    return np.maximum(0, bit_length(largest) - limit.bit_length()).astype(np.uint8)


def naive_shift(signed: bool, limit: int) -> int:
    """The baseline: always the top bits of the 8-bit range, used or not."""
    return max(0, (7 if signed else 8) - limit.bit_length())


def rounded_shift_right(values: npt.NDArray[np.int32], shift: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """rne(values / 2^shift), half to even, in integers."""
    quotient = values >> shift  # floor
    remainder = values - (quotient << shift)
    twice = remainder * 2
    one = np.left_shift(np.int32(1), shift)
    up = (twice > one) | ((twice == one) & ((quotient & 1) == 1))
    result: npt.NDArray[np.int32] = (quotient + (up & (shift > 0))).astype(np.int32)
    return result


def extract(values: npt.ArrayLike, shift: npt.ArrayLike, limit: int, signed: bool = True) -> npt.NDArray[np.int8]:
    """Low value of each 8-bit value: clamp(rne(v / 2^shift), -limit or 0, limit).

    values, shift: integers, broadcast against each other. Returns int8. The value read back is `result << shift`.
    """
    v, s = np.broadcast_arrays(np.asarray(values, dtype=np.int32), np.asarray(shift, dtype=np.int32))
    return np.clip(rounded_shift_right(v, s), -limit if signed else 0, limit).astype(np.int8)


def read_back(values: npt.ArrayLike, shift: npt.ArrayLike, limit: int, signed: bool = True) -> npt.NDArray[np.int16]:
    """What an 8-bit value becomes at low precision: extract(...) << shift."""
    low = extract(values, shift, limit, signed).astype(np.int16)
    return np.left_shift(low, np.asarray(shift, dtype=np.int16)).astype(np.int16)


def least_squares_shift(
    histogram: npt.NDArray[np.float64],
    importance: npt.NDArray[np.float64],
    bounds: npt.NDArray[np.int32],
    limit: int,
    signed: bool,
    centred: bool,
) -> npt.NDArray[np.uint8]:
    """Shift of least squared error per group.

    histogram: [channels, 256] counts of q (unsigned) or q + 128 (signed). importance: [channels] weight of a squared error.
    bounds: [groups + 1] channel borders. centred: count the variance of the error only, for models whose mean errors
    are corrected by the bias table. Ties go to the smaller shift. Source: design notes, section 1 (saturating one bit
    lower can beat rounding one bit higher); leaving out the mean is ours.
    """
    q = np.arange(-128, 128) if signed else np.arange(256)
    shifts = range(naive_shift(signed, limit) + 1)
    error = np.stack([read_back(q, s, limit, signed) - q for s in shifts]).astype(np.float64)
    total = np.maximum(histogram.sum(axis=1, keepdims=True), 1.0)
    spread = histogram @ (error**2).T / total  # [channels, shifts]
    if centred:
        spread = spread - (histogram @ error.T / total) ** 2
    per_group = np.add.reduceat(spread * importance[:, None], bounds[:-1].astype(np.int64), axis=0)
    result: npt.NDArray[np.uint8] = np.argmin(per_group, axis=1).astype(np.uint8)
    return result


def group_maximum(channel_max: npt.NDArray[Any], bounds: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
    """Largest entry per group along axis 0."""
    return np.maximum.reduceat(channel_max, bounds[:-1].astype(np.int64), axis=0)
