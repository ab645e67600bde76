"""The kernels of four folders of csrc/cpu, called from Python: the ctypes mirror of their arguments, guarded memory."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from ctypes import CFUNCTYPE, Structure, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np

FOLDERS = ("elementwise", "pool", "copy", "depthwise")


class View(Structure):
    _fields_ = [("data", c_void_p), *((k, c_int32) for k in "nhwc"), *((f"pitch_{k}", c_int64) for k in "nyx")]


def _fields(text: str) -> list[tuple[str, Any]]:
    kinds = {"p": c_void_p, "v": View, "i": c_int32, "l": c_int64, "f": c_float, "I": c_int32 * 6, "L": c_int64 * 6}
    return [
        (name, kinds[kind]) for kind, names in (part.split(":") for part in text.split()) for name in names.split(",")
    ]


WINDOW = "i:kernel_h,kernel_w,stride_h,stride_w,pad_h,pad_w"
FIELDS = {  # as in the headers of csrc/cpu
    "quantize": "p:src l:src_n,src_y,src_x,src_c v:dst f:inverse,lo,hi i:zero",
    "dequantize": "v:src i:zero f:scale p:dst l:dst_n,dst_y,dst_x,dst_c",
    "table": "v:src,dst p:table",
    "add": "v:a,b i:b_channel,zero_a,zero_b,zero_out f:ra,rb,lo,hi v:dst",
    "mul": "v:a,b i:b_channel,zero_a,zero_b,zero_out f:m,lo,hi v:dst",
    "rescale": "v:src i:zero_src,zero_dst f:factor,lo,hi v:dst",
    "max_pool": f"v:src,dst {WINDOW},dilation_h,dilation_w",
    "sum_pool": f"v:src,dst {WINDOW},zero_src,zero_dst f:factor,lo,hi",
    "copy": "p:src,dst I:extent L:src_stride,dst_stride l:src_offset,dst_offset p:gather i:gather_axis",
    "depthwise": (
        f"v:src,dst {WINDOW},dilation_h,dilation_w,multiplicity p:weight,bias,m i:zero_src,zero_dst f:lo,hi "
        "p:residual v:residual_view i:zero_residual f:residual_factor p:dst_acc i:margin_h,margin_w"
    ),
}
ARGS = {op: type(op, (Structure,), {"_fields_": _fields(fields)}) for op, fields in FIELDS.items()}


class Kernels:
    """`prepare(isa, kernel, **fields)` makes a function of rows that calls a kernel of the extension where it lies."""

    def __init__(self, native: Any) -> None:
        self.isas = list(native.supported_isas())
        self.functions = {}
        for isa in self.isas:
            listed = [(name, *rest) for folder, name, *rest in native.kernels(isa) if folder in FOLDERS]
            assert {name for name, *_ in listed} == set(ARGS), "FIELDS lacks a kernel that csrc/cpu/kernels.h lists"
            for name, address, size in listed:
                assert size == ctypes.sizeof(ARGS[name]), f"{name}: FIELDS differs from its header in csrc/cpu"
                result = c_int64 if name == "quantize" else None
                self.functions[isa, name] = CFUNCTYPE(result, c_void_p, c_int32, c_int32)(address)

    def prepare(self, isa: str, op: str, **fields: Any) -> Any:
        """A function (row0, row1) -> result, 0 where there is none. Arrays stand for pointers to their data, None for null."""
        values = {}
        for name, kind in ARGS[op]._fields_:  # type: ignore[attr-defined]
            value = fields.pop(name)
            if kind is c_void_p:
                value = None if value is None else value.ctypes.data if isinstance(value, np.ndarray) else value
            elif kind is View:
                value = value.view if isinstance(value, Tensor) else value
            elif isinstance(value, (list, tuple)):
                value = kind(*value)
            elif kind is c_float:
                value = float(value)
            values[name] = value
        assert not fields, f"{op} has no {sorted(fields)}"
        args, function = ARGS[op](**values), self.functions[isa, op]
        return lambda row0, row1: function(ctypes.byref(args), row0, row1) or 0


_libc = ctypes.CDLL(None, use_errno=True)


def guarded(n_bytes: int, low: bool = False) -> np.ndarray:
    """Bytes between two pages that may not be touched, against the upper one (or the lower, if `low`)."""
    page = mmap.PAGESIZE
    inner = -(-n_bytes // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (address, address + page + inner):
        assert _libc.mprotect(c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    return np.frombuffer(memory, np.uint8, n_bytes, page if low else page + inner - n_bytes)


@dataclass
class Tensor:
    """Bytes in NHWC order inside guarded memory. `array` is the elements as a strided array, `memory` all bytes."""

    array: np.ndarray
    memory: np.ndarray
    view: View


def spread(
    rng: np.random.Generator, shape: Sequence[int], margin: int = 0, gap: int = 0, low: bool = False
) -> tuple[np.ndarray, list[int]]:
    """Random bytes that hold a tensor of `shape` (NHWC) with up to `margin` unused bytes around rows and images and up to
    `gap` between pixels, and nothing beyond its last byte. Returns memory and [offset, pitch_n, pitch_y, pitch_x]."""
    n, h, w, c = shape
    pitch_x = c + int(rng.integers(0, gap + 1))
    pitch_y = w * pitch_x + int(rng.integers(0, margin + 1))
    pitch_n = h * pitch_y + int(rng.integers(0, margin + 1))
    offset = 0 if low else int(rng.integers(0, margin + 1))
    size = offset + (n - 1) * pitch_n + (h - 1) * pitch_y + (w - 1) * pitch_x + c
    memory = guarded(size, low)
    memory[:] = rng.integers(0, 256, size)
    return memory, [offset, pitch_n, pitch_y, pitch_x]


def tensor(rng: np.random.Generator, shape: Sequence[int], margin: int = 0, gap: int = 0, low: bool = False) -> Tensor:
    """A random tensor of bytes, with extreme values among them."""
    memory, (offset, *pitches) = spread(rng, shape, margin, gap, low)
    array = np.lib.stride_tricks.as_strided(memory[offset:], shape, (*pitches, 1))
    kind = rng.integers(0, 4)
    if kind == 0:
        array[:] = rng.choice(np.array([0, 1, 127, 128, 129, 255], np.uint8), shape)
    elif kind == 1:
        array[:] = rng.choice(np.array([0, 255], np.uint8))
    view = View(memory.ctypes.data + offset, *shape, *pitches)
    return Tensor(array, memory, view)


def framed(rng: np.random.Generator, shape: Sequence[int], frame: tuple[int, int], zero: int, gap: int, low: bool) -> Tensor:
    """A random tensor with frame = (rows, columns) of bytes `zero` around every image."""
    n, h, w, c = shape
    rows, columns = frame
    whole = tensor(rng, (n, h + 2 * rows, w + 2 * columns, c), 7, gap, low)
    inner = whole.array[:, rows : rows + h, columns : columns + w]
    values = inner.copy()
    whole.array[:] = zero
    inner[:] = values
    pitches = inner.strides[:3]
    start = whole.view.data + rows * pitches[1] + columns * pitches[2]
    return Tensor(inner, whole.memory, View(start, *shape, *pitches))


def floats(
    rng: np.random.Generator, shape: Sequence[int], order: Sequence[int], margin: int = 0
) -> tuple[np.ndarray, list[int], np.ndarray]:
    """A float32 array [N, H, W, C] whose axes lie in memory in `order` (outermost first) with up to `margin` unused
    floats after each axis; memory ends with its last element. Returns it, its strides in floats and the whole memory."""
    strides, step = [0] * 4, 1
    for axis in reversed(order):
        strides[axis] = step
        step = step * shape[axis] + int(rng.integers(0, margin + 1))
    size = 1 + sum((d - 1) * s for d, s in zip(shape, strides, strict=True))
    memory = guarded(4 * size).view(np.float32)
    return np.lib.stride_tricks.as_strided(memory, shape, [4 * s for s in strides]), strides, memory


def zero_of(rng: np.random.Generator) -> int:
    """0 (unsigned) or 128 (signed)."""
    return int(rng.choice([0, 128]))


def run_split(run: Any, rows: int, rng: np.random.Generator) -> int:
    """Calls run over rows [0, rows) in up to three pieces, as threads would; returns the sum of results."""
    cuts = sorted({0, rows, *(int(v) for v in rng.integers(0, rows + 1, 2))})
    return sum(run(begin, end) for begin, end in zip(cuts, cuts[1:], strict=False))


def check_bytes(dst: Tensor, expected: np.ndarray, zero: int, run: Any, rng: np.random.Generator) -> int:
    """Runs in pieces: elements of `dst` must be `expected` (values), all other bytes as before. Returns summed results."""
    before = dst.memory.copy()
    total = run_split(run, dst.view.n * dst.view.h, rng)
    np.testing.assert_array_equal(dst.array, (expected + zero).astype(np.uint8))
    dst.array[:] = 0
    after = dst.memory.copy()
    dst.memory[:] = before
    dst.array[:] = 0
    np.testing.assert_array_equal(after, dst.memory, err_msg="bytes outside the tensor were written")
    return total
