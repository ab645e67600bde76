"""bfloat16 in NumPy, which lacks it: bit patterns in uint16, the upper halves of float32 numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

PRECISIONS = ("float32", "bfloat16")  # of float conv and linear layers; see `bitdial.graph.ir`
STORED = np.dtype(np.uint16)


def to_bits(x: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """Bit patterns of float32 numbers rounded to bfloat16, half to even. Finite numbers that round beyond the largest
    become infinity; NaN stays NaN."""
    values = np.asarray(x, dtype=np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(values.shape)


def from_bits(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The float32 numbers of bit patterns; exact."""
    wide = np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32).reshape(bits.shape)


def rounded(x: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """float32 numbers rounded to bfloat16."""
    return from_bits(to_bits(x))


def finite(bits: npt.NDArray[Any]) -> bool:
    """Whether no pattern is NaN or infinity."""
    return not bool(((bits & 0x7F80) == 0x7F80).any())
