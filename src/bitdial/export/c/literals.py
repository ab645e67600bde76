"""NumPy arrays and numbers as C text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.errors import ExportError

_TYPES = {"int8": "int8_t", "uint8": "uint8_t", "int32": "int32_t", "float32": "float"}
_WIDTH = 118


def float_literal(value: float) -> str:
    """A float32 exactly: a hexadecimal literal of C99. Raises ExportError for NaN and infinity."""
    number = float(np.float32(value))
    if not math.isfinite(number):
        raise ExportError(
            f"the model holds the number {value}, which C export cannot write; quantize the network again"
        )
    return f"{number:.1f}f" if number == int(number) and abs(number) < 1e6 else f"{number.hex()}f"


def integer_literal(value: int) -> str:
    """An int32; the smallest one has no literal of its own in C."""
    return "(-2147483647 - 1)" if value == -(2**31) else str(value)


def c_array(name: str, values: npt.NDArray[Any]) -> str:
    """`static const T name[n] = {...};` of the flattened array, exact."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.dtype == np.float32:
        words = [float_literal(float(v)) for v in flat]
    elif flat.dtype == np.int32:
        words = [integer_literal(int(v)) for v in flat]
    else:
        words = [str(v) for v in flat.tolist()]
    aligned = "FQ_ALIGNED " if flat.dtype == np.int8 else ""
    head = f"static const {_TYPES[flat.dtype.name]} {aligned}{name}[{max(1, flat.size)}] = {{"
    return f"{head}\n{wrapped(words or ['0'])}\n}};\n"


def wrapped(words: list[str]) -> str:
    """Words with commas, broken into lines."""
    lines: list[str] = []
    line: list[str] = []
    length = 0
    for word in words:
        if length + len(word) + 1 > _WIDTH and line:
            lines.append("    " + ",".join(line) + ",")
            line, length = [], 0
        line.append(word)
        length += len(word) + 1
    if line:
        lines.append("    " + ",".join(line))
    return "\n".join(lines)
