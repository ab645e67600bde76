"""Where values lie on the device while a program is compiled, and the steps made so far.

8-bit values lie in positions of `pitch` bytes, channels last: images by height and width, all others row by row. Float values lie
in the network's own order. A step names the values that it reads and writes; addresses are known per batch (`plan`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitdial.engines import memory
from bitdial.engines.cpu.layouts import image_values, margins
from bitdial.engines.cuda.arguments import TYPE_F32, TYPE_S8, TYPE_U8, Launch, Operand, Span
from bitdial.engines.cuda.device import Pool
from bitdial.engines.cuda.packing import pitch
from bitdial.engines.memory import Unsupported
from bitdial.graph.ir import BatchDim, TensorType
from bitdial.quantization.instructions import Instruction
from bitdial.quantization.program import Program

Offsets = npt.NDArray[np.int64]


@dataclass
class Buffer(memory.Buffer):
    """A value on the device: h * w positions of c channels, `pitch` elements apart where it is 8-bit."""

    pitch: int = 0
    shape: tuple[int, ...] = ()  # of one sample, in the network's order

    @property
    def type(self) -> int:
        return TYPE_F32 if self.is_float else TYPE_S8 if self.signed else TYPE_U8

    @property
    def places(self) -> int:
        return self.h * self.w

    @property
    def sample(self) -> int:
        """Elements from one sample to the next."""
        return self.count if self.is_float else self.places * self.pitch

    def strides(self, image: bool) -> tuple[int, int]:
        """(per position, per channel), in elements, as an image or as rows. Raises Unsupported where it does not lie so."""
        if not self.is_float:
            if image != self.channels_first:
                raise Unsupported("its operands lie in memory in two ways")
            return self.pitch, 1
        if not image:
            return self.shape[-1] if self.shape else 1, 1
        return 1, self.shape[1] * self.shape[2]

    def offsets(self) -> Offsets:
        """Offset within its sample of every element, in the network's order and shape, in elements."""
        if self.is_float:
            return np.arange(self.count, dtype=np.int64).reshape(self.shape)
        at = np.arange(self.places, dtype=np.int64)[:, None] * self.pitch + np.arange(self.c)
        return at.reshape(self.h, self.w, self.c).transpose(2, 0, 1) if self.channels_first else at.reshape(self.shape)


class Frame(Protocol):
    """What a launch is made for: a ratio, a batch, and the addresses of values and constants for it."""

    batch: int
    ratio: int
    pool: Pool

    def span(self, value: str) -> Span: ...


@dataclass(frozen=True)
class Step:
    """One launch. value: what it writes; several steps may write parts of one."""

    name: str
    reads: tuple[str, ...]
    value: str
    launch: Callable[[Frame], Launch]


class Values:
    """The part of the compiler that knows where values are. dry: nothing is packed; only whether it can be is found out."""

    def __init__(self, program: Program, native_int4: bool, dry: bool = False) -> None:
        self.program, self.native_int4, self.dry = program, native_int4, dry
        self.pool = Pool()
        self.steps: list[Step] = []
        self.buffers: dict[str, Buffer] = {}
        self.same: dict[str, str] = {}  # value -> the one whose memory it is
        self.types: dict[str, TensorType] = dict(program.types)
        self.readers: dict[str, list[Instruction]] = {}
        for step in program.instructions:
            for value in dict.fromkeys(step.operands()):
                self.readers.setdefault(value, []).append(step)
        self.pads = margins(program, self.readers)
        self.images = image_values(program, [value for value, _ in self.pads.values()])

    def buffer(self, name: str) -> Buffer:
        """Where a value lies. Raises Unsupported where the engine cannot hold it."""
        if name not in self.buffers:
            if name in self.program.constants:
                raise Unsupported("it reads a constant")
            q = self.program.qparams.get(name)
            self.buffers[name] = self.new_buffer(self.types[name], None if q is None else q.signed, name in self.images)
        return self.buffers[name]

    def new_buffer(self, type_: TensorType, signed: bool | None, image: bool) -> Buffer:
        """signed: of 8-bit values; None: float ones."""
        shape = type_.shape
        if not shape or not isinstance(shape[0], BatchDim) or any(isinstance(d, BatchDim) for d in shape[1:]):
            raise Unsupported("its first axis is not the batch")
        if signed is None and type_.dtype != "float32":
            raise Unsupported(f"it reads or gives {type_.dtype}")
        rest = tuple(memory.sample_shape(type_))
        if 0 in rest:
            raise Unsupported("its result is empty")
        if len(rest) == 3 and image:
            c, h, w = rest
        else:
            h, w, c = 1, math.prod(rest[:-1]), rest[-1] if rest else 1
        is_float = signed is None
        return Buffer(h, w, c, image and len(rest) == 3, bool(signed), is_float, shape[0].factor,
                      pitch=c if is_float else pitch(c), shape=rest)  # fmt: skip

    def eight(self, name: str) -> Buffer:
        buffer = self.buffer(name)
        if buffer.is_float:
            raise Unsupported(f"it reads '{name}' in float")
        return buffer

    def root(self, name: str) -> str:
        """The value whose memory it is."""
        while name in self.same:
            name = self.same[name]
        return name

    def add(self, name: str, reads: tuple[str, ...], launch: Callable[[Frame], Launch], value: str | None = None) -> None:
        self.steps.append(Step(name, reads, value or name, launch))


# ---- operands of element-wise steps ----------------------------------------------------------------------------------------


def grid(offsets: Offsets, image: bool) -> Offsets:
    """Offsets of a sample, in the network's order, as [positions, channels]."""
    if image:
        return offsets.transpose(1, 2, 0).reshape(-1, offsets.shape[0])
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
    """A value read element by element: by strides, or by a table of offsets among the constants."""

    name: str
    buffer: Buffer
    offset: int
    place: int
    channel: int
    table: int | None

    def operand(self, frame: Frame) -> Operand:
        span = frame.span(self.name)
        values: dict[str, Any] = {"floats" if self.buffer.is_float else "bytes": span}
        if self.table is not None:
            values["table"] = frame.pool.at(self.table)
        return Operand(sample=self.buffer.sample, place=self.place, channel=self.channel, type=self.buffer.type,
                       offset=self.offset, **values)  # fmt: skip


def seen(c: Values, name: str, table: Offsets) -> Seen:
    """table: [positions, channels] of the result, offsets of elements of the value, -1 for 0."""
    buffer, plain = c.buffer(name), affine(table)
    if plain is not None:
        return Seen(name, buffer, *plain, None)
    return Seen(name, buffer, 0, 0, 0, -1 if c.dry else c.pool.add(np.ascontiguousarray(table, dtype=np.int32)))


def broadcast(c: Values, name: str, y: Buffer) -> Seen:
    """An operand spread over the shape of a result."""
    x = c.buffer(name)
    if x.factor != y.factor or len(x.shape) > len(y.shape):
        raise Unsupported("it broadcasts along the batch")
    offsets = x.offsets()
    if offsets.ndim < y.offsets().ndim:
        raise Unsupported("its operands differ in their axes")
    try:
        spread = np.broadcast_to(offsets, y.shape)
    except ValueError:
        raise Unsupported("its operands do not broadcast") from None
    return seen(c, name, grid(spread, y.channels_first))
