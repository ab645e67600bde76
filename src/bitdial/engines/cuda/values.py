"""Where values lie on the device while a program is compiled, and the steps made so far.

What belongs to one sample of the batch is an item; items follow each other in memory, whichever axis of a value carries the
batch, and that axis has here the size that it has for a batch of one. 8-bit values lie in positions of `pitch` bytes, channels
last: images by height and width, all others row by row. Float values lie in the network's own order. A movement operator makes no
step by itself: its result is a view, the offset of every element, until something reads it that takes no views. A step names the
values that it reads and writes; addresses are known per batch (`plan`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitdial.engines import memory
from bitdial.engines.cuda.arguments import (
    TYPE_BOOL,
    TYPE_F32,
    TYPE_I32,
    TYPE_I64,
    TYPE_S8,
    TYPE_U8,
    Launch,
    Operand,
    Span,
)
from bitdial.engines.cuda.device import Pool
from bitdial.engines.cuda.packing import pitch
from bitdial.engines.layouts import image_values, margins
from bitdial.engines.memory import Unsupported
from bitdial.engines.views import sizes_of
from bitdial.graph.batch_axis import batch_axes
from bitdial.graph.ir import TensorType
from bitdial.quantization.instructions import Instruction
from bitdial.quantization.program import Program

Offsets = npt.NDArray[np.int64]
TYPES = {"float32": TYPE_F32, "int64": TYPE_I64, "int32": TYPE_I32, "bool": TYPE_BOOL}  # of values in the network's own order
FIELDS = {TYPE_F32: "floats", TYPE_I64: "wholes", TYPE_I32: "words"}  # of an Operand; `bytes` for all others


@dataclass
class Buffer(memory.Buffer):
    """A value on the device: factor * h * w positions of c channels, `pitch` elements apart. shape: for a batch of one. dtype:
    one of TYPES, "" for 8-bit values."""

    pitch: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = ""

    @property
    def type(self) -> int:
        return TYPES[self.dtype] if self.dtype else TYPE_S8 if self.signed else TYPE_U8

    @property
    def bytes(self) -> int:
        """Of an element."""
        return np.dtype(self.dtype or "uint8").itemsize

    @property
    def places(self) -> int:
        return self.h * self.w

    @property
    def sample(self) -> int:
        """Elements from one sample to the next; an item has `factor` of them."""
        return self.places * self.pitch

    @property
    def item(self) -> int:
        return self.sample * self.factor

    def strides(self, image: bool) -> tuple[int, int]:
        """(per position, per channel), in elements, as an image or as rows. Raises Unsupported where it does not lie so."""
        if not self.dtype:
            if image != self.channels_first:
                raise Unsupported("its operands lie in memory in two ways")
            return self.pitch, 1
        if not image:
            return self.pitch, 1
        if len(self.shape) != 4:
            raise Unsupported("it writes an image whose batch is not its first axis")
        return 1, self.shape[2] * self.shape[3]

    def offsets(self) -> Offsets:
        """Offset within its item of every element, in the network's order and shape, in elements."""
        at = np.arange(self.factor * self.places, dtype=np.int64)[:, None] * self.pitch + np.arange(self.c)
        if self.channels_first and not self.dtype:
            return at.reshape(self.factor, self.h, self.w, self.c).transpose(0, 3, 1, 2)
        return at.reshape(self.shape)


class Frame(Protocol):
    """What a launch is made for: a ratio, a batch, a device with so many multiprocessors, and the addresses of values and
    constants for it."""

    batch: int
    ratio: int
    multiprocessors: int
    pool: Pool

    def span(self, value: str) -> Span: ...


@dataclass(frozen=True)
class Step:
    """One launch, or none at some ratios. value: what it writes; several steps may write parts of one. elsewhere: what the
    reference engine is to compute on the host instead."""

    name: str
    reads: tuple[str, ...]
    value: str
    launch: Callable[[Frame], Launch | None]
    elsewhere: Instruction | None = None


@dataclass(frozen=True)
class LookUp:
    """Of rows of a table, which a step does by numbers that lie in a value, at offsets within an item. What lies outside of the
    table is refused on the host: kernels only do not read there."""

    name: str
    value: str
    offsets: Offsets
    rows: int


class Values:
    """The part of the compiler that knows where values are. dry: nothing is packed; only whether it can be is found out."""

    def __init__(self, program: Program, native_int4: bool, dry: bool = False) -> None:
        self.program, self.native_int4, self.dry = program, native_int4, dry
        self.pool = Pool()
        self.steps: list[Step] = []
        self.buffers: dict[str, Buffer] = {}
        self.views: dict[str, tuple[str, Offsets]] = {}  # value -> (the value or constant that it is seen in, offsets)
        self.same: dict[str, str] = {}  # value -> the one whose memory it is
        self.constants: dict[str, int] = {}  # name and type -> number in the pool
        self.look_ups: list[LookUp] = []
        self.types: dict[str, TensorType] = {**program.types, **{
            name: TensorType(tuple(np.shape(array)), np.asarray(array).dtype.name)
            for name, array in program.constants.items()
        }}  # fmt: skip
        self.readers: dict[str, list[Instruction]] = {}
        for step in program.instructions:
            for value in dict.fromkeys(step.operands()):
                self.readers.setdefault(value, []).append(step)
        self.batch_axes = batch_axes(program.graph) if program.extraction == "dynamic" else {}
        self.pads = margins(program, self.readers)
        self.images = image_values(program, [value for value, _ in self.pads.values()])

    def buffer(self, name: str) -> Buffer:
        """Where a value lies, made of its view if it was one. Raises Unsupported where the engine cannot hold it."""
        if name in self.views:
            self._make(name)
        if name not in self.buffers:
            if name in self.program.constants:
                raise Unsupported("it reads a constant")
            q = self.program.qparams.get(name)
            self.buffers[name] = self.new_buffer(self.types[name], None if q is None else q.signed, name in self.images)
        return self.buffers[name]

    def new_buffer(self, type_: TensorType, signed: bool | None, image: bool = False) -> Buffer:
        """signed: of 8-bit values; None: all others."""
        sizes, place = sizes_of(type_)
        if place is None:
            raise Unsupported("it does not depend on the batch")
        if signed is None and type_.dtype not in TYPES:
            raise Unsupported(f"it reads or gives {type_.dtype}")
        if 0 in sizes:
            raise Unsupported("its result is empty")
        factor, rest = (sizes[0], sizes[1:]) if place == 0 else (1, sizes)
        image = image and place == 0 and len(rest) == 3 and signed is not None
        h, w, c = 1, math.prod(rest[:-1]), rest[-1] if rest else 1
        if image:
            c, h, w = rest
        dtype = type_.dtype if signed is None else ""
        return Buffer(h, w, c, image, bool(signed), dtype == "float32", factor, pitch=c if dtype else pitch(c),
                      shape=tuple(sizes), dtype=dtype)  # fmt: skip

    def _make(self, name: str) -> None:
        """A value of its view: nothing where it is the same memory, else a copy."""
        source, offsets = self.views.pop(name)
        y = self.buffer(name)
        if source not in self.program.constants:
            x = self.buffer(source)
            if x.item == y.item and x.type == y.type and np.array_equal(offsets, y.offsets()):
                self.same[name] = source
                return
        self.copy(name, seen(self, source, grid(offsets, y.channels_first), y.dtype or "float32"))

    def copy(self, name: str, source: Seen, value: str | None = None, target: Offsets | None = None) -> None:
        """A step that writes a value, or the part of it at `target`, as it is elsewhere."""
        raise NotImplementedError

    def view(self, name: str) -> tuple[str, Offsets]:
        """(the value or constant that it is seen in, the offset of every element there)."""
        if name in self.views:
            return self.views[name]
        if name in self.program.constants:
            shape = np.shape(self.program.constants[name])
            return name, np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
        return name, self.buffer(name).offsets()

    def constant(self, name: str, array: npt.NDArray[Any] | None = None, dtype: str = "float32") -> int:
        """The number of a constant in the pool, converted to a type; array: of one that is not the program's."""
        values = np.asarray(self.program.constants[name] if array is None else array)
        if values.dtype.name not in TYPES:
            raise Unsupported(f"it reads a constant of {values.dtype.name}")
        key = f"{name} {dtype}"
        if key not in self.constants:
            self.constants[key] = -1 if self.dry else self.pool.add(values.astype(dtype))
        return self.constants[key]

    def floats(self, name: str) -> Buffer:
        """A float value in its own order."""
        buffer = self.buffer(name)
        if not buffer.is_float:
            raise Unsupported(f"it reads '{name}' as {buffer.dtype or '8 bits'}")
        return buffer

    def eight(self, name: str) -> Buffer:
        buffer = self.buffer(name)
        if buffer.dtype:
            raise Unsupported(f"it reads '{name}' in float")
        return buffer

    def root(self, name: str) -> str:
        """The value whose memory it is."""
        while name in self.same:
            name = self.same[name]
        return name

    def add(
        self, name: str, reads: tuple[str, ...], launch: Callable[[Frame], Launch | None], value: str | None = None
    ) -> None:
        self.steps.append(Step(name, reads, value or name, launch))


# ---- operands of element-wise steps ----------------------------------------------------------------------------------------


def grid(offsets: Offsets, image: bool) -> Offsets:
    """Offsets of an item, in the network's order, as [positions, channels]."""
    if image:
        return offsets.transpose(0, 2, 3, 1).reshape(-1, offsets.shape[1])
    return offsets.reshape(-1, offsets.shape[-1]) if offsets.ndim else offsets.reshape(1, 1)


def affine(table: Offsets) -> tuple[int, int, int] | None:
    """(offset, per position, per channel) if the table [positions, channels] is nothing else."""
    first = int(table[0, 0])
    place = int(table[1, 0]) - first if table.shape[0] > 1 else 0
    channel = int(table[0, 1]) - first if table.shape[1] > 1 else 0
    plain = first + np.arange(table.shape[0])[:, None] * place + np.arange(table.shape[1]) * channel
    return (first, place, channel) if first >= 0 and np.array_equal(plain, table) else None


@dataclass(frozen=True)
class Seen:
    """A value or constant read element by element: by strides, or by a table of offsets. item: elements from one item to the
    next; 0 for constants, which have their number in the pool."""

    name: str
    type: int
    item: int
    offset: int
    place: int
    channel: int
    table: int | None
    constant: int | None

    @property
    def reads(self) -> tuple[str, ...]:
        return () if self.constant is not None else (self.name,)

    def operand(self, frame: Frame) -> Operand:
        span = frame.span(self.name) if self.constant is None else frame.pool.at(self.constant)
        values: dict[str, Any] = {FIELDS.get(self.type, "bytes"): span}
        if self.table is not None:
            values["table"] = frame.pool.at(self.table)
        return Operand(sample=self.item, place=self.place, channel=self.channel, type=self.type, offset=self.offset, **values)


def seen(c: Values, name: str, table: Offsets, dtype: str = "float32") -> Seen:
    """name: of a value in memory, or of a constant. table: [positions, channels] of the result, -1 for 0. dtype: that
    constants are converted to."""
    plain = affine(table)
    number = None
    if plain is None:
        number = -1 if c.dry else c.pool.add(np.ascontiguousarray(table, dtype=np.int32))
    where = (0, 0, 0) if plain is None else plain
    if name in c.program.constants:
        return Seen(name, TYPES[dtype], 0, *where, number, c.constant(name, dtype=dtype))
    buffer = c.buffer(name)
    return Seen(name, buffer.type, buffer.item, *where, number, None)


def broadcast(c: Values, value: str | float, y: Buffer, place: int | None, dtype: str = "float32") -> Seen:
    """An operand, a value, a constant or a number, spread over the shape of a result whose batch is on an axis. dtype: that
    constants and numbers are converted to."""
    if not isinstance(value, str):
        number = c.constant(f"number {value!r}", np.array([value]).astype(dtype), dtype)
        return Seen("", TYPES[dtype], 0, 0, 0, 0, None, number)
    source, offsets = c.view(value)
    sizes, own = sizes_of(c.types[value])
    missing = len(y.shape) - len(sizes)
    if missing < 0 or place is None or (own is not None and (own + missing != place or sizes[own] != y.shape[place])):
        raise Unsupported("it broadcasts along the batch")
    if own is None and place >= missing and sizes[place - missing] != 1:
        raise Unsupported("it reads a constant for a fixed batch")
    try:
        spread = np.broadcast_to(offsets, y.shape)
    except ValueError:
        raise Unsupported("its operands do not broadcast") from None
    return seen(c, source, grid(spread, y.channels_first), dtype)
