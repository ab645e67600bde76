"""Names of tensor types in the protocol and in NumPy. All are little-endian on the wire."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.errors import ConfigError

# Protocol name -> NumPy dtype. BYTES and BF16, which the protocol has too, occur in no graph.
DATATYPES: dict[str, npt.DTypeLike] = {
    "BOOL": "|b1",
    "UINT8": "|u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "|i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
_NAMES = {np.dtype(dtype): name for name, dtype in DATATYPES.items()}


def datatype_of(dtype: npt.DTypeLike) -> str:
    """The protocol's name of a NumPy dtype. Raises ConfigError for one it lacks."""
    name = _NAMES.get(np.dtype(dtype))
    if name is None:
        raise ConfigError(f"tensors of type {dtype} have no name in the inference protocol")
    return name


def numpy_dtype(datatype: str) -> np.dtype[Any]:
    """The little-endian NumPy dtype of a protocol name that `datatype_of` gave."""
    return np.dtype(DATATYPES[datatype])
