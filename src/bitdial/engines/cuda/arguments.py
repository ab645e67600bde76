"""What the kernels take, as ctypes structures laid out like those of csrc/cuda (the emulator compares their sizes)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

TYPE_U8, TYPE_S8, TYPE_F32, TYPE_I64, TYPE_I32, TYPE_BOOL = range(6)
OP_SCALE, OP_LOOKUP, OP_ADD, OP_MUL, OP_COPY, OP_FADD, OP_FSUB, OP_FMUL, OP_FDIV, OP_ROOT = range(10)
(ELEMENT_COPY, ELEMENT_ADD, ELEMENT_SUB, ELEMENT_MUL, ELEMENT_MAX, ELEMENT_MIN, ELEMENT_EQ, ELEMENT_NE, ELEMENT_LT, ELEMENT_LE,
 ELEMENT_AND, ELEMENT_OR, ELEMENT_XOR, ELEMENT_WHERE, ELEMENT_LOOK_UP) = range(15)  # fmt: skip


TERM_ADD, TERM_SUB, TERM_MUL, TERM_DIV, TERM_FILL, TERM_KEEP = range(6)


@dataclass(frozen=True)
class Span:
    """Bytes of device memory: where they begin, and how many may be touched."""

    address: int
    size: int

    def at(self, offset: int) -> Span:
        """What begins `offset` bytes later and ends where this does."""
        return Span(self.address + offset, self.size - offset)


class Global(ctypes.Structure):
    """A tensor of the device; all zero: none."""

    _fields_ = [("data", ctypes.c_uint64), ("bytes", ctypes.c_uint64)]


def tensor(span: Span | None) -> Global:
    return Global(0, 0) if span is None else Global(span.address, span.size)


class _Args(ctypes.Structure):
    """Fields by name: spans for tensors, numbers for the rest; what is not named is zero."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**{k: tensor(v) if isinstance(v, Span) else v for k, v in values.items() if v is not None})


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


_I32, _I64, _F32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Epilogue(_Args):
    _fields_ = [
        *_fields(Global, "y8 yf r8 rf bias multipliers"),
        *_fields(_I64, "y_sample y_place y_channel r_sample r_place r_channel"),
        *_fields(_F32, "residual_factor lo hi"),
        *_fields(_I32, "r_signed one_multiplier accumulators fours"),
    ]


class ConvArgs(_Args):
    _fields_ = [
        *_fields(Global, "x weights steps places starts shifts"),
        ("out", Epilogue),
        ("x_sample", _I64),
        *_fields(_I32, "rows height width pitch out_height out_width stride_y stride_x pad_y pad_x outputs padded"),
        *_fields(ctypes.c_uint32, "least most"),
    ]


class MatMulArgs(_Args):
    _fields_ = [
        *_fields(Global, "a b heads"),
        ("out", Epilogue),
        *_fields(_I64, "a_sample b_sample"),
        *_fields(_I32, "rows columns depth n_heads a_row a_depth b_column b_depth"),
    ]


class Term(_Args):
    _fields_ = [
        *_fields(Global, "floats truths heads"),
        ("sample", _I64),
        *_fields(_I32, "row key op"),
        ("number", _F32),
    ]


class AttentionArgs(_Args):
    _fields_ = [
        *_fields(Global, "q k v heads"),
        ("terms", Term * 4),
        ("out", Epilogue),
        *_fields(_I64, "q_sample k_sample v_sample"),
        *_fields(_I32, "rows keys depth width n_heads n_terms q_row q_depth k_key k_depth v_key v_width padded pitch"),
        *_fields(_F32, "factor weight_factor weight_lo weight_hi"),
    ]


class Operand(_Args):
    _fields_ = [
        *_fields(Global, "bytes floats wholes words table"),
        *_fields(_I64, "sample place channel"),
        *_fields(_I32, "type offset"),
    ]


class PointwiseArgs(_Args):
    _fields_ = [
        ("a", Operand), ("b", Operand),
        *_fields(Global, "y8 yf lookup"),
        *_fields(_I64, "y_sample y_place y_channel"),
        *_fields(_I32, "samples places channels op"),
        *_fields(_F32, "factor_a factor_b lo hi"),
    ]  # fmt: skip


class WindowArgs(_Args):
    _fields_ = [
        *_fields(Global, "x y weights"),
        ("out", Epilogue),
        *_fields(_I64, "x_sample x_place y_sample y_place"),
        *_fields(_I32, "samples height width channels out_height out_width kernel_y kernel_x stride_y stride_x pad_y pad_x"),
        *_fields(_I32, "dilation_y dilation_x x_signed multiplicity greatest reserved"),
        *_fields(_F32, "factor lo hi reserved_float"),
    ]


class ElementsArgs(_Args):
    _fields_ = [
        ("a", Operand), ("b", Operand), ("c", Operand),
        *_fields(Global, "rows yf y64 y8"),
        *_fields(_I64, "n_rows y_sample y_place y_channel"),
        *_fields(_I32, "samples places channels op real reserved"),
    ]  # fmt: skip


class RowsArgs(_Args):
    _fields_ = [
        *_fields(Global, "x y weight bias"),
        *_fields(_I64, "rows length inner"),
        *_fields(_F32, "eps mean"),
        *_fields(_I32, "square take_root"),
    ]


class WholeRowsArgs(_Args):
    _fields_ = [*_fields(Global, "x y"), *_fields(_I64, "rows length inner"), *_fields(_I32, "running reserved")]


class LowerArgs(_Args):
    _fields_ = [
        *_fields(Global, "x y shifts bounds groups"),
        ("x_sample", _I64),
        *_fields(_I32, "samples positions pitch channels n_groups x_signed amax bits"),
    ]


# Of a block, by the longest beginning of a kernel's name; else 128, and no shared memory.
THREADS = {"conv_wide": 256, "pointwise": 256, "elements": 256, "pool": 256, "depthwise": 256, "lower": 256}
SHARED_BYTES = {"conv": 2 * 64 * 80 + 2 * 4096, "conv_wide": 64 * 132 * 4, "matmul": 64 * 68 * 4, "shift": 128 * 4}


def _of_kernel(table: dict[str, int], kernel: str, default: int) -> int:
    known = [name for name in table if kernel.startswith(name)]
    return table[max(known, key=len)] if known else default


@dataclass(frozen=True)
class Launch:
    """A kernel by name, its grid of blocks, and its arguments. shared: bytes of shared memory, where they depend on these."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: ctypes.Structure
    shared: int = 0

    @property
    def threads(self) -> int:
        return _of_kernel(THREADS, self.kernel, 128)

    @property
    def shared_bytes(self) -> int:
        return self.shared or _of_kernel(SHARED_BYTES, self.kernel, 0)
