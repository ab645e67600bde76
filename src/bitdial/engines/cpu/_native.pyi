"""Compiled kernels of the CPU engine, built from csrc/cpu; absent where no compiler was there at installation."""

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

_Array = npt.NDArray[Any]
_Pair = tuple[int, ...]

METHODS: tuple[str, ...]

def version() -> str:
    """Version of bitdial that this extension was built from."""

def supported_isas() -> list[str]: ...
def cpu_name() -> str: ...
def kernels(isa: str) -> list[tuple[str, str, int, int]]:
    """Every kernel of an instruction set that runs here: folder, name, address, bytes of its arguments' structure."""

def facts(isa: str) -> dict[str, bool]:
    """has_fip: the fast inner product is built for the set; narrow_is_faster: it sums narrow operands up in 16 bits."""

def burn(isa: str, rounds: int) -> tuple[int, float]: ...

class Training:
    """Element-wise steps of training; tensors are given by their addresses (0: none)."""

    def __init__(self, isa: str, threads: int) -> None: ...
    def requantize(
        self,
        types: int,
        acc: int,
        multiplier: int,
        bias: int,
        residual: int,
        factor: float,
        lo: float,
        hi: float,
        out: int,
        inside: int,
        rows: int,
        channels: int,
        /,
    ) -> None: ...
    def requantize_grad(
        self,
        types: int,
        grad: int,
        inside: int,
        multiplier: int,
        factor: float,
        grad_acc: int,
        grad_residual: int,
        grad_bias: int,
        rows: int,
        channels: int,
        /,
    ) -> None: ...
    def extract_floats(
        self,
        types: int,
        x: int,
        inverse: int,
        power: int,
        lo: int,
        hi: int,
        out: int,
        inside: int,
        rows: int,
        channels: int,
        /,
    ) -> None: ...
    def look_up(
        self, types: int, x: int, values: int, slopes: int, out: int, slope: int, rows: int, channels: int, /
    ) -> None: ...
    def pass_through(self, types: int, grad: int, inside: int, out: int, rows: int, channels: int, /) -> None: ...

class Context:
    samples: int

class Program:
    def __init__(self, isa: str, threads: int, ratios: Sequence[float], small: bool = ...) -> None: ...
    def add_tensor(
        self,
        *,
        h: int,
        w: int,
        c: int,
        is_float: bool = ...,
        channels_first: bool = ...,
        external: bool = ...,
        zero: int = ...,
        factor: int = ...,
        halo: _Pair = ...,
        whole: int = ...,
        alias: int = ...,
    ) -> int: ...
    def add_constant(self, values: _Array, *, w: int, c: int, whole: int = ...) -> int: ...
    def set_external(self, tensor: int, on: bool) -> None: ...
    def touch(self, tensor: int, step: int) -> None: ...
    def add_conv(self, name: str, **fields: Any) -> None: ...
    def add_depthwise(self, name: str, **fields: Any) -> None: ...
    def add_quantize(
        self, name: str, src: int, dst: int, inverse: float, lo: float, hi: float, counted: bool = ...
    ) -> None: ...
    def add_dequantize(self, name: str, src: int, dst: int, scale: float) -> None: ...
    def add_table(self, name: str, src: int, dst: int, table: _Array) -> None: ...
    def add_add(self, name: str, a: int, b: int, dst: int, ra: float, rb: float, lo: float, hi: float) -> None: ...
    def add_mul(self, name: str, a: int, b: int, dst: int, factor: float, lo: float, hi: float) -> None: ...
    def add_rescale(
        self, name: str, src: int, dst: int, axis: int, offset: int, factor: float, lo: float, hi: float
    ) -> None: ...
    def add_max_pool(
        self, name: str, src: int, dst: int, kernel: _Pair, stride: _Pair, pad: _Pair, dilation: _Pair
    ) -> None: ...
    def add_sum_pool(
        self,
        name: str,
        src: int,
        dst: int,
        kernel: _Pair,
        stride: _Pair,
        pad: _Pair,
        factor: float,
        lo: float,
        hi: float,
    ) -> None: ...
    def add_copy(
        self,
        name: str,
        src: int,
        dst: int,
        extent: Sequence[int],
        src_stride: Sequence[int],
        dst_stride: Sequence[int],
        src_offset: int,
        dst_offset: int,
        gather: Sequence[int],
        gather_axis: int,
        fill: bool,
    ) -> None: ...
    def add_move(
        self, name: str, src: int, dst: int, from_: _Array, to: _Array, unit: int, fill: bool, /
    ) -> None: ...
    def add_layer_norm(
        self,
        name: str,
        *,
        src: int,
        weight: int,
        bias: int,
        columns: int,
        dst: int,
        bytes: int,
        eps: float,
        factor: float = ...,
        lo: float = ...,
        hi: float = ...,
        order: Sequence[int] = ...,
    ) -> None: ...
    def add_combine(
        self,
        name: str,
        op: str,
        a: int,
        b: int,
        dst: int,
        extent: Sequence[int],
        stride: Sequence[Sequence[int]],
        offset: Sequence[int],
        lo: float,
        hi: float,
        /,
    ) -> None: ...
    def add_reduce(
        self,
        name: str,
        src: int,
        dst: int,
        outer: int,
        count: int,
        inner: int,
        divisor: float,
        square: bool,
        root: bool,
        /,
    ) -> None: ...
    def add_matmul(
        self,
        name: str,
        left: tuple[Any, ...],
        right: tuple[Any, ...],
        out: tuple[Any, ...],
        sizes: Sequence[int],
        factor: float,
        lo: float,
        hi: float,
    ) -> None: ...
    def add_attention(
        self,
        *,
        name: str,
        scores: str,
        q: tuple[Any, ...],
        k: tuple[Any, ...],
        v: tuple[Any, ...],
        out: tuple[Any, ...],
        sizes: Sequence[int],
        factor: float,
        terms: Sequence[tuple[Any, ...]],
        p: Sequence[float],
        out_factor: float,
        lo: float,
        hi: float,
    ) -> None: ...
    def add_softmax(
        self,
        name: str,
        src: int,
        dst: int,
        length: int,
        inner: int,
        rows: _Array,
        column: int,
        factor: float,
        lo: float,
        hi: float,
    ) -> None: ...
    def add_embedding(self, name: str, ids: int, table: int, dst: int, /) -> None: ...
    def add_elementwise(
        self,
        name: str,
        op: str,
        kind: str,
        to: str,
        operands: Sequence[int],
        dst: int,
        extent: Sequence[int],
        stride: Sequence[Sequence[int]],
        offset: Sequence[int],
        /,
    ) -> None: ...
    def add_rearrange(
        self,
        name: str,
        src: int,
        dst: int,
        extent: Sequence[int],
        stride: Sequence[Sequence[int]],
        offset: Sequence[int],
        /,
    ) -> None: ...
    def finish(self, all: bool = ...) -> None: ...
    def seal(self) -> None: ...
    def steps(self) -> list[tuple[str, str]]: ...
    def set_ratio(self, ratio: float) -> float: ...
    def dial(self) -> int: ...
    def run(self, arrays: Sequence[tuple[int, _Array]], n: int, ratio: int) -> int: ...
    def profile(self, arrays: Sequence[tuple[int, _Array]], n: int, ratio: int, repeats: int) -> list[float]: ...
    def acquire(self, n: int) -> Context: ...
    def release(self, context: Context) -> None: ...
    def renew(self, step: int, bias: _Array, weight_shift: _Array, low_weight: _Array | None = ...) -> None: ...
    def view(self, context: Context, tensor: int, /) -> _Array: ...
    def bind(self, context: Context, tensor: int, array: _Array) -> None: ...
    def run_in(self, context: Context, ratio: int, first: int, last: int, /) -> int: ...
    def read(self, context: Context, tensor: int, out: _Array, channels_first: bool) -> None: ...
    def write(self, context: Context, tensor: int, array: _Array, channels_first: bool) -> None: ...
    def read_whole(self, context: Context, tensor: int, out: _Array) -> None: ...
    def write_whole(self, context: Context, tensor: int, array: _Array) -> None: ...
    def methods(self, name: str) -> list[str]: ...
    def choose(self, name: str, ratio: int, method: int, chunk: int) -> None: ...
    def choice(self, name: str, ratio: int) -> tuple[int, int]: ...
    def usual(self, name: str, ratio: int) -> tuple[int, int]: ...
    def counters(self) -> list[tuple[str, str, int, int, int, int]]: ...
    def reset_counters(self) -> None: ...
    def weight_bytes(self, name: str) -> list[int]: ...
    def arena_bytes(self, n: int) -> int: ...
    def context_bytes(self) -> int: ...
