"""Lowers a program to the flat list of compiled steps of the extension.

Every value gets a tensor: rank-4 values lie in NHWC order with the margin that their convolutions need, all others row by
row with the last axis as channels. Nodes without a compiled form become `Elsewhere` items between runs of compiled steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.graph.ir import MOVEMENT_OPS, BatchDim, Node, TensorType
from bitdial.quantization.program import Program, QuantizedLayer

FOLD_BELOW = 16  # input channels; below, a row of a filter is one contiguous run of bytes
COPY_AXES = 5  # loops of a copy step, the samples' not counted
INFINITY = float("inf")
Offsets = npt.NDArray[np.int64]


@dataclass
class Place:
    """Where a value lies: a tensor of the extension."""

    tensor: int
    h: int
    w: int
    c: int
    factor: int
    channels_first: bool  # the value's logical order has the channels on axis 1
    halo: tuple[int, int]
    signed: bool
    is_float: bool


@dataclass
class Elsewhere:
    """A node that runs in the reference engine, and why."""

    node: Node
    reason: str


@dataclass
class Compiled:
    """What the compiler made of a program.

    items: (from, to) ranges of compiled steps and `Elsewhere` nodes, in order. places: value -> tensor. reasons: node -> why
    it runs elsewhere.
    """

    items: list[tuple[int, int] | Elsewhere]
    places: dict[str, Place]
    reasons: dict[str, str] = field(default_factory=dict)


class NotCompiled(Exception):
    """A node has no compiled form; the text says why."""


def physical(type_: TensorType) -> tuple[int, int, int, int, bool]:
    """(factor, h, w, c, channels_first) of a value. Raises NotCompiled if the first axis is not the batch."""
    shape = type_.shape
    if not shape or not isinstance(shape[0], BatchDim) or any(isinstance(d, BatchDim) for d in shape[1:]):
        raise NotCompiled("its first axis is not the batch")
    rest = [int(d) for d in shape[1:]]  # type: ignore[arg-type]
    if len(rest) == 3:
        return shape[0].factor, rest[1], rest[2], rest[0], True
    if not rest:
        return shape[0].factor, 1, 1, 1, False
    return shape[0].factor, 1, math.prod(rest[:-1]), rest[-1], False


class Compiler:
    """One use: `Compiler(program, native).run()`. native: a `_native.Program` without steps."""

    def __init__(self, program: Program, native: Any, accumulators: bool = False) -> None:
        self.program, self.native, self.graph = program, native, program.graph
        self.accumulators = accumulators  # store int32 accumulators in float outputs: for tests of the kernels
        self.places: dict[str, Place] = {}
        self.halos = self._halos()
        self.reasons: dict[str, str] = {}

    def run(self) -> Compiled:
        items: list[tuple[int, int] | Elsewhere] = []
        done = 0
        for name in self.graph.inputs:
            self._try_place(name, external=True)
        for node in self.graph.nodes:
            try:
                self._node(node)
            except NotCompiled as reason:
                now = len(self.native.steps())
                if now > done:
                    items.append((done, now))
                    done = now
                items.append(Elsewhere(node, str(reason)))
                self.reasons[node.name] = str(reason)
                self._try_place(node.name)
        now = len(self.native.steps())
        if now > done:
            items.append((done, now))
        return Compiled(items, self.places, self.reasons)

    # ---- tensors ---------------------------------------------------------------------------------------------------------

    def _halos(self) -> dict[str, tuple[int, int]]:
        """Margin that the convolutions reading a value need."""
        halos: dict[str, tuple[int, int]] = {}
        for node in self.graph.nodes:
            if node.op == "conv" and node.name in self.program.layers and len(node.attrs["padding"]) == 2:
                old = halos.get(node.inputs[0], (0, 0))
                pad = node.attrs["padding"]
                halos[node.inputs[0]] = (max(old[0], int(pad[0])), max(old[1], int(pad[1])))
        return halos

    def _place(self, name: str, external: bool = False) -> Place:
        """The tensor of a value, made at first use."""
        place = self.places.get(name)
        if place is not None:
            return place
        type_ = self.graph.types[name]
        if self.graph.is_constant(name):
            raise NotCompiled("it reads a constant")
        q = self.program.qparams.get(name)
        if q is None and type_.dtype != "float32":
            raise NotCompiled(f"it reads {type_.dtype}")
        factor, h, w, c, first = physical(type_)
        halo = (0, 0) if q is None else self.halos.get(name, (0, 0))
        tensor = self.native.add_tensor(
            h=h, w=w, c=c, is_float=q is None, channels_first=first, external=external,
            zero=128 if q is not None and q.signed else 0, factor=factor, halo=halo,
        )  # fmt: skip
        place = Place(tensor, h, w, c, factor, first, halo, q is not None and q.signed, q is None)
        self.places[name] = place
        return place

    def _try_place(self, name: str, external: bool = False) -> None:
        """A tensor for a value made elsewhere, if the extension can hold it."""
        try:
            self._place(name, external)
        except NotCompiled:
            return

    def _eight(self, name: str) -> Place:
        place = self._place(name)
        if place.is_float:
            raise NotCompiled(f"it reads '{name}' in float")
        return place

    # ---- nodes -----------------------------------------------------------------------------------------------------------

    def _node(self, node: Node) -> None:
        layer = self.program.layers.get(node.name)
        if layer is not None:
            self._layer(node, layer)
            return
        factor = [float(f) for f in self.program.factors.get(node.name, [])]
        eight = node.name in self.program.qparams
        if node.op == "quantize":
            x = self._place(node.inputs[0])
            if not x.is_float:
                raise NotCompiled("its input is not float")
            q = self.program.qparams[node.name]
            y = self._place(node.name)
            self.native.add_quantize(node.name, x.tensor, y.tensor, factor[0], float(q.qmin), float(q.qmax))
        elif node.op == "dequantize":
            x, y = self._eight(node.inputs[0]), self._place(node.name)
            self.native.add_dequantize(node.name, x.tensor, y.tensor, factor[0])
        elif not eight:
            raise NotCompiled(self.program.float_reasons.get(node.name, "") or f"{node.op} runs in float")
        elif node.op == "table":
            self._table(node)
        elif node.op in ("add", "mul"):
            self._two(node, factor)
        elif node.op == "concat":
            self._concat(node, factor)
        elif node.op in ("mean", "avg_pool"):
            self._average(node, factor[0])
        elif node.op == "max_pool":
            self._max_pool(node)
        elif node.op in MOVEMENT_OPS:
            self._move(node)
        else:
            raise NotCompiled(f"{node.op} has no compiled form")

    def _layer(self, node: Node, layer: QuantizedLayer) -> None:
        if layer.weight is None:
            raise NotCompiled("product of two activations")
        if node.op == "conv" and layer.weight.ndim != 4:
            raise NotCompiled(f"convolution over {layer.weight.ndim - 2} axes")
        x = self._eight(node.inputs[0])
        if node.op == "linear" and x.channels_first:
            raise NotCompiled("linear layer over the last of four axes")
        y_type = self.graph.types[node.name]
        residual = -1
        if node.residual is not None:
            residual = self._place(node.residual).tensor
            if self.graph.types[node.residual].shape != y_type.shape:
                raise NotCompiled("its residual is broadcast")
        y = self._place(node.name)
        lo, hi = self._limits(node)
        weight = layer.weight if layer.weight.ndim == 4 else layer.weight[:, :, None, None]
        a = node.attrs if node.op == "conv" else {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
        low = np.ascontiguousarray(layer.low).astype(np.uint8)
        any_low = bool(low.any()) if low.size else False
        groups = layer.conv_groups
        depthwise = groups > 1 and weight.shape[1] == 1 and not any_low and not y.is_float
        if depthwise and (residual < 0 or node.residual in self.program.qparams):
            per = np.ascontiguousarray(weight.reshape(weight.shape[0], -1).T)
            self.native.add_depthwise(
                node.name, src=x.tensor, dst=y.tensor, residual=residual, residual_factor=layer.residual_factor, lo=lo, hi=hi,
                weight=per.reshape(-1), kernel=tuple(weight.shape[2:]), stride=tuple(a["stride"]), pad=tuple(a["padding"]),
                dilation=tuple(a["dilation"]), multiplicity=weight.shape[0] // groups, bias=_own(layer.bias, np.int32),
                multiplier=_own(layer.multiplier, np.float32), macs=int(layer.macs),
            )  # fmt: skip
            return
        if any_low:
            bounds, shifts, weight_shift = layer.group_bounds, layer.activation_shift, layer.weight_shift
        else:  # one group is as good as many
            bounds = np.arange(groups + 1, dtype=np.int32) * weight.shape[1]
            shifts, weight_shift = np.zeros(groups, np.uint8), np.zeros((weight.shape[0], 1), np.uint8)
            low = np.zeros((len(layer.bias), groups), dtype=np.uint8)
        folded = (
            not any_low
            and groups == 1
            and weight.shape[1] < FOLD_BELOW
            and weight.shape[3] > 1
            and a["dilation"][1] == 1
        )
        self.native.add_conv(
            node.name, src=x.tensor, dst=y.tensor, residual=residual, residual_factor=layer.residual_factor, lo=lo, hi=hi,
            accumulators=self.accumulators and y.is_float, folded=folded, weight=_own(weight, np.int8),
            stride=tuple(a["stride"]), pad=tuple(a["padding"]), dilation=tuple(a["dilation"]), conv_groups=groups,
            amax=layer.amax, wmax=layer.wmax, input_signed=x.signed, bounds=_own(bounds, np.int32),
            activation_shift=_own(shifts, np.uint8), weight_shift=_own(weight_shift, np.uint8), low=low,
            bias=_own(layer.bias, np.int32), multiplier=_own(layer.multiplier, np.float32),
        )  # fmt: skip

    def _limits(self, node: Node) -> tuple[float, float]:
        if node.name in self.program.qparams:
            lo, hi = node.attrs["clamp"]
            return float(lo), float(hi)
        activation = node.attrs.get("activation")
        if activation is None:
            return -INFINITY, INFINITY
        if activation["kind"] == "relu":
            return 0.0, INFINITY
        if activation["kind"] == "clamp":
            return float(activation["lo"]), float(activation["hi"])
        raise NotCompiled(f"activation {activation['kind']} on a float output")

    def _table(self, node: Node) -> None:
        x, y = self._eight(node.inputs[0]), self._place(node.name)
        values = self.program.tables[node.name].astype(
            np.int16
        )  # indexed by q, or q + 128: the stored byte in both cases
        stored = (values + (128 if y.signed else 0)).astype(np.uint8)
        self.native.add_table(node.name, x.tensor, y.tensor, np.ascontiguousarray(stored))

    def _two(self, node: Node, factor: list[float]) -> None:
        a, b = (self._eight(v) for v in node.inputs)
        types = [self.graph.types[v].shape for v in node.inputs]
        factors = list(factor)
        out = self.graph.types[node.name].shape
        if types[0] != out:  # broadcasting is written for the second operand
            a, b = b, a
            types.reverse()
            factors = factors[::-1] if node.op == "add" else factors
        if (
            types[0] != out
            or len(types[1]) != len(out)
            or any(d != e and d != 1 for d, e in zip(types[1], out, strict=True))
        ):
            raise NotCompiled("it broadcasts both operands")
        y = self._place(node.name)
        lo, hi = (float(v) for v in node.attrs["clamp"])
        if node.op == "add":
            self.native.add_add(node.name, a.tensor, b.tensor, y.tensor, factors[0], factors[1], lo, hi)
        else:
            self.native.add_mul(node.name, a.tensor, b.tensor, y.tensor, factors[0], lo, hi)

    def _concat(self, node: Node, factor: list[float]) -> None:
        rank = len(self.graph.types[node.name].shape)
        axis = int(node.attrs["axis"]) % rank
        native_axis = {(4, 1): 3, (4, 2): 1, (4, 3): 2, (3, 2): 3, (3, 1): 2, (2, 1): 3}.get((rank, axis))
        if native_axis is None:
            raise NotCompiled(f"concatenation along axis {axis} of {rank}")
        parts = [self._eight(v) for v in node.inputs]
        y = self._place(node.name)
        lo, hi = (float(v) for v in node.attrs["clamp"])
        offset = 0
        for part, f in zip(parts, factor, strict=True):
            self.native.add_rescale(node.name, part.tensor, y.tensor, native_axis, offset, f, lo, hi)
            offset += {1: part.h, 2: part.w, 3: part.c}[native_axis]

    def _average(self, node: Node, factor: float) -> None:
        x = self._eight(node.inputs[0])
        rank = len(self.graph.types[node.inputs[0]].shape)
        lo, hi = (float(v) for v in node.attrs["clamp"])
        if node.op == "mean":
            axes = sorted(int(v) % rank for v in node.attrs["axes"])
            if (rank, axes) not in ((4, [2, 3]), (3, [1])):
                raise NotCompiled(f"mean over axes {axes} of {rank}")
            kernel, stride, pad = (x.h, x.w), (1, 1), (0, 0)
        else:
            if rank != 4:
                raise NotCompiled("pooling over one or three axes")
            kernel, stride, pad = (_pair(node.attrs[k]) for k in ("kernel", "stride", "padding"))
        y = self._place(node.name)
        self.native.add_sum_pool(node.name, x.tensor, y.tensor, kernel, stride, pad, factor, lo, hi)

    def _max_pool(self, node: Node) -> None:
        x = self._eight(node.inputs[0])
        if len(self.graph.types[node.name].shape) != 4:
            raise NotCompiled("pooling over one or three axes")
        y = self._place(node.name)
        a = node.attrs
        self.native.add_max_pool(
            node.name,
            x.tensor,
            y.tensor,
            _pair(a["kernel"]),
            _pair(a["stride"]),
            _pair(a["padding"]),
            _pair(a["dilation"]),
        )

    def _move(self, node: Node) -> None:
        x = self._eight(node.inputs[0])
        y_type = self.graph.types[node.name]
        y = self._place(node.name)
        if x.signed != y.signed or x.factor != y.factor:
            raise NotCompiled("it folds other axes into the batch")
        in_shape = [int(d) for d in self.graph.types[node.inputs[0]].shape[1:]]  # type: ignore[arg-type]
        out_shape = [int(d) for d in y_type.shape[1:]]  # type: ignore[arg-type]
        source = moved(node, np.arange(math.prod(in_shape)).reshape(1, *in_shape))
        if source is None or list(source.shape[1:]) != out_shape:
            raise NotCompiled(f"this {node.op} moves values between samples, or has no compiled form")
        flat = source.reshape(-1)
        start, end = offsets_of(x), offsets_of(y)
        loops = copy_loops(flat, start, end, in_shape, out_shape)
        if loops is not None:
            self.native.add_copy(node.name, x.tensor, y.tensor, *loops, [], -1, False)
            return
        keep = flat >= 0
        start, end = start[flat[keep]], end[keep]
        order = np.argsort(end, kind="stable")  # bytes that stay adjacent next to each other
        self.native.add_move(
            node.name, x.tensor, y.tensor, _own(start[order], np.int32), _own(end[order], np.int32), not keep.all()
        )


def moved(node: Node, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
    """What a movement operator does to an array of indices of one sample ([1, ...]); -1 where it pads. None: not known."""
    a = node.attrs
    if node.op == "reshape":
        return index.reshape(1, -1) if len(a["shape"]) == 0 else _reshaped(index, a["shape"])
    if node.op == "permute":
        return np.transpose(index, a["axes"]) if int(a["axes"][0]) == 0 else None
    if node.op == "slice":
        if int(a["axis"]) % index.ndim == 0:
            return None
        cut = [slice(None)] * index.ndim
        cut[int(a["axis"]) % index.ndim] = slice(int(a["start"]), int(a["stop"]), int(a["step"]))
        return index[tuple(cut)]
    if node.op == "select":
        return np.take(index, int(a["index"]), axis=int(a["axis"])) if int(a["axis"]) % index.ndim else None
    if node.op == "gather":
        return np.take(index, np.asarray(a["indices"]), axis=int(a["axis"])) if int(a["axis"]) % index.ndim else None
    if node.op == "roll":
        axes = [int(v) % index.ndim for v in a["axes"]]
        return np.roll(index, a["shifts"], axis=axes) if 0 not in axes else None
    if node.op == "pad" and float(a["value"]) == 0.0 and list(a["pads"][0]) == [0, 0]:
        return np.pad(index, a["pads"], constant_values=-1)
    return None


def _reshaped(index: npt.NDArray[np.int64], shape: list[Any]) -> npt.NDArray[np.int64] | None:
    first = shape[0]
    if not (isinstance(first, (list, tuple)) and first[0] == "N" and int(first[1]) == 1):
        return None
    if any(isinstance(d, (list, tuple)) for d in shape[1:]):
        return None
    return index.reshape(1, *[int(d) for d in shape[1:]])


def offsets_of(place: Place) -> Offsets:
    """Byte offset from the tensor's origin of every element of one sample, in logical order."""
    pitch_x = place.c
    pitch_y = (place.w + 2 * place.halo[1]) * place.c
    if place.channels_first:
        c, h, w = np.ogrid[: place.c, : place.h, : place.w]
        offsets: Offsets = (h * pitch_y + w * pitch_x + c).reshape(-1).astype(np.int64)
        return offsets
    return np.arange(place.w * place.c, dtype=np.int64)


def copy_loops(
    flat: Offsets, start: Offsets, end: Offsets, in_shape: list[int], out_shape: list[int]
) -> tuple[list[int], list[int], list[int], int, int] | None:
    """A move as nested loops with fixed strides: (extents, source strides, target strides, source offset, target offset),
    or None if it has no such form. flat: index of the source element per target element, -1 where it pads."""
    if not flat.size or flat.min() < 0:
        return None
    forms = [(out_shape, start[flat], end)]
    order = np.argsort(flat, kind="stable")
    if np.array_equal(flat[order], np.arange(start.size)):  # nothing dropped or repeated: the input's axes do as well
        forms.append((in_shape, start, end[order]))
    for shape, source, target in forms:
        strides = _strides(source.reshape(shape)), _strides(target.reshape(shape))
        if len(shape) <= COPY_AXES and strides[0] is not None and strides[1] is not None:
            return shape, strides[0], strides[1], int(source[0]), int(target[0])
    return None


def _strides(offsets: Offsets) -> list[int] | None:
    """The step along every axis; None if one is not the same positive number everywhere. 0 along axes of one element."""
    strides = []
    for axis in range(offsets.ndim):
        steps = np.diff(offsets, axis=axis)
        step = int(steps.flat[0]) if steps.size else 0
        if steps.size and (step <= 0 or (steps != step).any()):
            return None
        strides.append(step)
    return strides


def _pair(values: Any) -> tuple[int, int]:
    if isinstance(values, int):
        return values, values
    a, b = values
    return int(a), int(b)


def _own(array: npt.ArrayLike, dtype: Any) -> npt.NDArray[Any]:
    return np.ascontiguousarray(array, dtype=dtype)
