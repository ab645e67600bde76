"""Where values lie while a program is compiled: tensors of the extension, and values that are not made yet.

A movement operator makes no step by itself: its result is remembered as operators on a value that lies in memory, and made when
something reads it that needs it as it is: by nothing at all where it is the same memory, by one copy otherwise, however many
operators there were. Dequantized values, and their products with numbers, are remembered likewise, until they are read in float
or become 8-bit again by a table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.engines import memory
from bitdial.engines.layouts import image_values, margins, planes, turned
from bitdial.engines.memory import COPY_AXES, Unsupported
from bitdial.engines.views import (
    View,
    check_samples_stay,
    common_axes,
    dense,
    element_offsets,
    moved_view,
    size_of,
    sizes_of,
    unit_index,
)  # fmt: skip
from bitdial.graph.ir import Node, TensorType
from bitdial.graph.operators import MOVEMENT
from bitdial.quantization.instructions import Contract, Float, Instruction, Move, Quantize
from bitdial.quantization.program import Program

ITEMS = {"float32": 4, "int64": 8, "int32": 4, "bool": 1}
Scalar = tuple[str, float]  # an operator and the number behind it


@dataclass
class Buffer(memory.Buffer):
    """Where a value lies: a tensor of the extension. shape: for a batch of one. place: the axis that carries the batch, None for
    constants. dtype: of values that are not 8-bit."""

    tensor: int = -1
    shape: tuple[int, ...] = ()
    place: int | None = 0
    dtype: str = "float32"

    @property
    def own_order(self) -> bool:
        """Whether memory has the order of the value's axes, without margins."""
        if self.is_float or self.dtype != "8-bit":
            return not self.turned
        return not self.channels_first

    turned: bool = False  # float, channels last in memory

    def view(self) -> View:
        """Of one sample; strides count elements."""
        if self.own_order:
            return dense(self.shape)
        pitch_y = (self.w + 2 * self.halo[1]) * self.c
        pitch_n = pitch_y * (self.h + 2 * self.halo[0])
        pairs = ((self.factor, pitch_n), (self.c, 1), (self.h, pitch_y), (self.w, self.c))
        return View(0, tuple(((size, stride),) if size != 1 else () for size, stride in pairs))


@dataclass(frozen=True)
class Lazy:
    """source: a value with a tensor. nodes: movement operators on it. view: of the source's memory, if they leave one.
    factor: the source is 8-bit, and the result float, by Dequantize's factor and then the scalars."""

    source: str
    nodes: tuple[Node, ...]
    view: View | None
    factor: float | None = None
    scalars: tuple[Scalar, ...] = ()


class Values:
    """The part of the compiler that knows where values are."""

    def __init__(self, program: Program, native: Any) -> None:
        self.program, self.native = program, native
        self.steps = program.instructions
        self.buffers: dict[str, Buffer] = {}
        self.lazy: dict[str, Lazy] = {}
        # with those of constants, and of values that no instruction makes
        self.types: dict[str, TensorType] = {**program.types, **{
            name: TensorType(tuple(np.shape(array)), np.asarray(array).dtype.name)
            for name, array in program.constants.items()
        }}  # fmt: skip
        self.readers: dict[str, list[Instruction]] = {}
        for step in self.steps:
            for value in dict.fromkeys(step.operands()):
                self.readers.setdefault(value, []).append(step)
        self.pads = margins(program, self.readers)
        self.halos = self._halos()
        self.images, self.planes = image_values(program, [value for value, _ in self.pads.values()]), planes(program)
        self.turned = turned(program, self.readers, self.images)
        self.quantized: dict[tuple[Any, ...], str] = {}  # (float value, rounding) -> 8-bit value in the same order
        self.done: set[str] = set()  # instructions that other steps have taken over
        self._constants: dict[tuple[str, str], Buffer] = {}
        self._aliases: dict[tuple[int, bool], int] = {}

    def _halos(self) -> dict[str, tuple[int, int]]:
        """Margin that the convolutions reading a value need."""
        halos: dict[str, tuple[int, int]] = {}
        for step in self.steps:
            if isinstance(step, Contract) and step.window is not None and len(step.window.kernel) == 2:
                value, (top, bottom, left, right) = self.pads.get(step.inputs[0], (step.inputs[0], (0, 0, 0, 0)))
                old, pad = halos.get(value, (0, 0)), step.window.padding
                halos[value] = max(old[0], pad[0] + max(top, bottom)), max(old[1], pad[1] + max(left, right))
        return halos

    def unchecked_inputs(self) -> list[str]:
        """Float inputs with readers other than Quantize, which looks for NaN itself."""
        return [
            v for v in self.program.inputs
            if self.program.types[v].dtype == "float32"
            and not all(isinstance(step, Quantize) for step in self.readers.get(v, []))
        ]  # fmt: skip

    # ---- tensors ---------------------------------------------------------------------------------------------------------

    def buffer(self, name: str, external: bool = False) -> Buffer:
        """The tensor of a value: made at first use, by the steps that it takes if its operators are not compiled yet."""
        if name in self.buffers:
            return self.buffers[name]
        if name in self.lazy:
            return self._make(name)
        if name in self.program.constants:
            raise Unsupported("it reads a constant")
        q = self.program.qparams.get(name)
        self.buffers[name] = self.new_buffer(
            self.types[name], None if q is None else q.signed, name in self.images or name in self.planes,
            self.halos.get(name, (0, 0)), turned=name in self.turned, external=external,
        )  # fmt: skip
        return self.buffers[name]

    def new_buffer(
        self, type_: TensorType, signed: bool | None, image: bool = False, halo: tuple[int, int] = (0, 0),
        turned: bool = False, external: bool = False, alias: int = -1,
    ) -> Buffer:  # fmt: skip
        """A tensor for a value of a type. signed: of 8-bit values; None: others. Raises Unsupported."""
        sizes, place = sizes_of(type_)
        if place is None:
            raise Unsupported("its result does not depend on the batch")
        if 0 in sizes:
            raise Unsupported("its result is empty")
        if signed is None and type_.dtype not in ITEMS:
            raise Unsupported(f"it reads or gives {type_.dtype}")
        image = image and len(sizes) == 4 and place == 0
        halo = halo if image and signed is not None else (0, 0)
        factor = sizes[0] if place == 0 else 1
        rest = sizes[1:] if place == 0 else sizes
        h, w, c = (rest[1], rest[2], rest[0]) if image else (1, math.prod(rest[:-1]), rest[-1] if rest else 1)
        is_float = signed is None and type_.dtype == "float32"
        whole = 0 if is_float or signed is not None else ITEMS[type_.dtype]
        tensor = self.native.add_tensor(
            h=h, w=w, c=c, is_float=is_float, channels_first=image and not turned, external=external,
            zero=128 if signed else 0, factor=factor, halo=halo, whole=whole, alias=alias,
        )  # fmt: skip
        return Buffer(
            h, w, c, image, bool(signed), is_float, factor, halo, tensor, tuple(sizes), place,
            type_.dtype if signed is None else "8-bit", turned,
        )  # fmt: skip

    def try_buffer(self, name: str, external: bool = False) -> None:
        """A tensor for a value made elsewhere, if the extension can hold it."""
        try:
            self.buffer(name, external)
        except Unsupported:
            return

    def settle(self, name: str) -> None:
        """Make a value that is read from outside the compiled steps."""
        if name in self.lazy:
            self._make(name)

    def eight(self, name: str) -> Buffer:
        buffer = self.buffer(name)
        if buffer.dtype != "8-bit":
            raise Unsupported(f"it reads '{name}' in float")
        return buffer

    def floats(self, name: str) -> Buffer:
        """A float value in its own order, or a constant."""
        buffer = self.constant(name) if name in self.program.constants else self.buffer(name)
        if not buffer.is_float:
            raise Unsupported(f"it reads {buffer.dtype} values")
        return buffer

    def constant(self, name: str) -> Buffer:
        """The tensor of a constant."""
        array = self.program.constants[name]
        return self.constant_array(name, np.asarray(array))

    def constant_array(self, key: str, array: npt.NDArray[Any]) -> Buffer:
        """The tensor of an array, made once per key and type."""
        dtype = array.dtype.name
        if dtype not in ITEMS:
            raise Unsupported(f"it reads a constant of {dtype}")
        if (key, dtype) not in self._constants:
            c = array.shape[-1] if array.ndim else 1
            w = math.prod(array.shape[:-1])
            is_float = dtype == "float32"
            tensor = self.native.add_constant(own(array, array.dtype), w=w, c=c, whole=0 if is_float else ITEMS[dtype])
            self._constants[key, dtype] = Buffer(
                1, w, c, False, False, is_float, 1, (0, 0), tensor, tuple(array.shape), None, dtype
            )
        return self._constants[key, dtype]

    def laid_out_as(self, name: str, other: Buffer) -> int:
        """The tensor of a value that a step walks beside another of its shape: a float one is seen as an image or as rows."""
        buffer = self.buffer(name)
        if not buffer.is_float or buffer.channels_first == other.channels_first:
            if buffer.channels_first != other.channels_first:
                raise Unsupported("its operands lie in memory in two ways")
            return buffer.tensor
        key = (buffer.tensor, other.channels_first)
        if key not in self._aliases:
            alias = self.new_buffer(self.types[name], None, other.channels_first, turned=buffer.turned, alias=buffer.tensor)
            self._aliases[key] = alias.tensor
        return self._aliases[key]

    # ---- values that are not made yet ------------------------------------------------------------------------------------

    def view_of(self, name: str) -> tuple[Buffer, View]:
        """A value as a view of memory, without a step where its operators leave one."""
        lazy = self.lazy.get(name)
        if lazy is not None and lazy.factor is None and lazy.view is not None:
            return self.source(lazy), lazy.view
        buffer = self.constant(name) if name in self.program.constants else self.buffer(name)
        return buffer, dense(buffer.shape) if buffer.place is None else buffer.view()

    def source(self, lazy: Lazy) -> Buffer:
        return self.constant(lazy.source) if lazy.source in self.program.constants else self.buffers[lazy.source]

    def move(self, name: str, node: Node, value: str) -> None:
        """Remember a movement operator. Raises Unsupported where it moves between samples, or nothing can hold its result."""
        constant = value in self.program.constants
        check_samples_stay(node, self.types[value], self.types[name])
        sizes, place = sizes_of(self.types[name])
        base = self.lazy.get(value)
        if base is None:
            buffer = self.constant(value) if constant else self.buffer(value)
            base = Lazy(value, (), dense(buffer.shape) if constant else buffer.view())
        view = None if base.view is None else moved_view(base.view, node)
        if view is not None and view.shape != sizes:
            raise Unsupported(f"this {node.op} gives another shape than recorded")
        if place is None or 0 in sizes:
            raise Unsupported("its result is empty or does not depend on the batch")
        self.lazy[name] = replace(base, nodes=(*base.nodes, node), view=view)

    def stays(self, step: Instruction) -> bool:
        """Whether a movement operator is one that `move` takes."""
        try:
            check_samples_stay(step.as_node(), self.types[step.inputs[0]], self.types[step.name])
        except Unsupported:
            return False
        return True

    def _make(self, name: str) -> Buffer:
        """Emit what makes a remembered value."""
        lazy = self.lazy.pop(name)
        if lazy.factor is not None:
            return self._make_float(name, lazy)
        source = self.source(lazy)
        signed = source.signed if source.dtype == "8-bit" else None
        image, halo = name in self.images or name in self.planes, self.halos.get(name, (0, 0))
        if lazy.view is not None and source.place is not None and name not in self.program.outputs and self._same(
            lazy.view, source, image, halo, self.types[name]
        ):
            self.buffers[name] = self.new_buffer(self.types[name], signed, image, halo, alias=source.tensor)
            return self.buffers[name]
        target = self.buffers[name] = self.new_buffer(self.types[name], signed, image, halo)
        if lazy.view is None or not self.copy(name, source, lazy.view, target, target.view()):
            self._copy_units(name, source, lazy, target)
        return target

    def _same(self, view: View, source: Buffer, image: bool, halo: tuple[int, int], type_: TensorType) -> bool:
        """Whether a view is all of its source's memory, in the order that the result has."""
        sizes, place = sizes_of(type_)
        if source.halo != (0, 0) or halo != (0, 0) or math.prod(sizes) != math.prod(source.shape) or view.offset:
            return False
        target = dense(sizes)
        if image and source.dtype == "8-bit" and len(sizes) == 4 and place == 0:
            k, c, h, w = sizes
            pairs = ((k, h * w * c), (c, 1), (h, w * c), (w, c))
            target = View(0, tuple(((size, stride),) if size != 1 else () for size, stride in pairs))
        loops = common_axes([view, target], 1 << 62)
        return loops is not None and loops[1][0] == loops[1][1]

    def copy(self, name: str, source: Buffer, view: View, target: Buffer, to: View) -> bool:
        """Copy what one view shows to where another is, if loops walk both."""
        loops = common_axes([view, to])
        if loops is None:
            return False
        extents, (s, d) = loops
        if target.dtype == "8-bit" and len(extents) <= COPY_AXES:
            self.native.add_copy(name, source.tensor, target.tensor, extents, s, d, view.offset, to.offset, [], -1, False)
        else:
            self.native.add_rearrange(name, source.tensor, target.tensor, extents, [s, d], [view.offset, to.offset])
        return True

    def _copy_units(self, name: str, source: Buffer, lazy: Lazy, target: Buffer) -> None:
        """Copy what no view shows, or none that goes with the target's: run by run."""
        whole = source.own_order and target.own_order
        index, unit = unit_index(source.shape, lazy.nodes, whole)
        keep = index >= 0
        item = 1 if target.dtype == "8-bit" else ITEMS[target.dtype]
        if max(math.prod(target.shape), math.prod(source.shape)) * item >= 2**30:
            raise Unsupported("a sample of its values has 1 GiB or more")
        if whole:
            start, end = index[keep] * unit, np.flatnonzero(keep) * unit
        else:
            start, end = element_offsets(source.view())[index[keep]], element_offsets(target.view())[keep]
            order = np.argsort(end, kind="stable")  # elements that stay adjacent next to each other
            start, end = start[order], end[order]
        self.native.add_move(
            name, source.tensor, target.tensor, own(start * item, np.int32), own(end * item, np.int32), unit * item,
            not keep.all(),
        )  # fmt: skip

    def temporary(self, name: str, type_: TensorType, signed: bool | None) -> tuple[str, Buffer]:
        """A tensor in its own order for a value that no instruction makes, and a name for it."""
        own_name = f"{name}:{len(self.types)}"
        self.types[own_name] = type_
        self.buffers[own_name] = self.new_buffer(type_, signed)
        return own_name, self.buffers[own_name]

    def moved_source(self, name: str, lazy: Lazy) -> Buffer:
        """The 8-bit value behind a dequantized one, moved to where `name` has it."""
        source = self.source(lazy)
        if not lazy.nodes:
            return source
        type_ = TensorType(self.types[name].shape, "int8" if source.signed else "uint8")
        inner, buffer = f"{name}:8", None
        self.types[inner] = type_
        self.lazy[inner] = replace(lazy, factor=None, scalars=())
        buffer = self.buffer(inner)
        return buffer

    def _make_float(self, name: str, lazy: Lazy) -> Buffer:
        """Dequantize, and multiply by what is to be multiplied by."""
        assert lazy.factor is not None
        eight = self.moved_source(name, lazy)
        made = self.new_buffer(self.types[name], None, eight.channels_first)
        self.native.add_dequantize(name, eight.tensor, made.tensor, lazy.factor)
        for op, number in lazy.scalars:
            rows = dense(made.shape)
            again = self.new_buffer(self.types[name], None, eight.channels_first)
            extents, strides = common_axes([rows, rows]) or ([], [])
            scalar = self.constant_array(f"number {number}", np.array(number, np.float32))
            self.native.add_combine(
                name, op, made.tensor, scalar.tensor, again.tensor, extents, [strides[0], [0] * len(extents), strides[1]],
                [0, 0, 0], -math.inf, math.inf,
            )  # fmt: skip
            made = again
        self.buffers[name] = made
        return made


def is_move(step: Instruction) -> bool:
    """Whether an instruction moves values only, 8-bit or not."""
    return isinstance(step, (Move, Float)) and step.operation in MOVEMENT and step.operation != "max_pool"


def own(array: npt.ArrayLike, dtype: Any) -> npt.NDArray[Any]:
    """An array of a dtype, contiguous, for the extension."""
    return np.ascontiguousarray(array, dtype=dtype)


__all__ = ["ITEMS", "Buffer", "Lazy", "Scalar", "Values", "is_move", "own", "size_of"]
