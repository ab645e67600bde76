"""Float operators, integer inputs and masks as steps of the extension, in the arithmetic of the reference engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.engines.cpu.values import ITEMS, Buffer, Lazy, Values, is_move, own
from bitdial.engines.cpu.views import Axis, View, common_axes, dense, size_of, sizes_of
from bitdial.engines.memory import Unsupported
from bitdial.graph.ir import Node, TensorType
from bitdial.quantization.instructions import Float, Instruction, Quantize

MOST_AXES = 7  # of an element-wise step, the samples' not counted
INFINITY = math.inf


def float_operator(c: Values, step: Float) -> None:
    """One `Float` instruction. Raises Unsupported."""
    if is_move(step):
        c.move(step.name, step.node, step.inputs[0])
        return
    handler = OPERATORS.get(step.operation)
    if handler is None:
        raise Unsupported(step.reason or f"{step.operation} runs in float")
    handler(c, step)


# ---- quantization --------------------------------------------------------------------------------------------------------


def quantize(c: Values, step: Quantize) -> None:
    """Moved values are moved as bytes, behind the rounding; dequantized ones become a table."""
    name, value = step.name, step.inputs[0]
    lazy = c.lazy.get(value)
    if lazy is not None and lazy.factor is not None:
        _quantize_by_table(c, step, lazy)
        return
    source = value if lazy is None else lazy.source
    done = c.quantized.get((source, *_rounding(c, step)))
    if done is not None:
        c.lazy[name] = Lazy(done, () if lazy is None else lazy.nodes, None if lazy is None else lazy.view)
        if lazy is None:
            c.lazy[name] = replace(c.lazy[name], view=c.buffers[done].view())
        return
    if lazy is not None and source not in c.program.constants:
        origin = c.source(lazy)
        sizes, _ = sizes_of(c.types[name])
        if origin.own_order and origin.is_float and math.prod(sizes) >= math.prod(origin.shape):
            inner, y = c.temporary(name, TensorType(c.types[source].shape, c.types[name].dtype), _signed(c, step))
            _emit_quantize(c, step, c.laid_out_as(source, y), y, False)
            c.lazy[name] = Lazy(inner, lazy.nodes, lazy.view)
            return
    x = c.buffer(value)
    if not x.is_float:
        raise Unsupported("its input is not float")
    y = c.buffer(name)
    _emit_quantize(c, step, c.laid_out_as(value, y), y, value in c.program.inputs)


def _emit_quantize(c: Values, step: Quantize, tensor: int, y: Buffer, counted: bool) -> None:
    c.native.add_quantize(step.name, tensor, y.tensor, step.factor, float(step.lo), float(step.hi), counted)


def _signed(c: Values, step: Quantize) -> bool:
    return c.program.qparams[step.name].signed


def _rounding(c: Values, step: Quantize) -> tuple[Any, ...]:
    return step.factor, step.lo, step.hi, _signed(c, step)


def _quantize_by_table(c: Values, step: Quantize, lazy: Lazy) -> None:
    """Dequantize, products with numbers and Quantize take a byte to a byte."""
    assert lazy.factor is not None
    x = c.moved_source(step.inputs[0], lazy)
    y = c.buffer(step.name)
    if x.channels_first != y.channels_first:
        raise Unsupported("its operands lie in memory in two ways")
    c.native.add_table(step.name, x.tensor, y.tensor, table_of(lazy, x.signed, step, y.signed))


def table_of(lazy: Lazy, signed: bool, step: Quantize, to_signed: bool) -> npt.NDArray[np.uint8]:
    """uint8 [256]: the stored byte that every stored byte behind a dequantized value becomes."""
    assert lazy.factor is not None
    stored = np.arange(256, dtype=np.float32) - np.float32(128 if signed else 0)
    with np.errstate(all="ignore"):
        t = stored * np.float32(lazy.factor)
        for op, number in lazy.scalars:
            t = _FUNCTIONS[op](t, np.float32(number))
        t = np.rint(np.clip(t * np.float32(step.factor), np.float32(step.lo), np.float32(step.hi)))
    values = np.where(np.isnan(t), np.float32(step.lo), t).astype(np.int16) + (128 if to_signed else 0)
    return own(values, np.uint8)


_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
}  # fmt: skip


# ---- LayerNorm -----------------------------------------------------------------------------------------------------------


def _layer_norm(c: Values, step: Float) -> None:
    value, *affine = step.node.inputs
    x = c.floats(value)
    columns = math.prod(int(d) for d in step.node.attrs["normalized_shape"])
    axes = len(step.node.attrs["normalized_shape"])
    if x.place is None or x.place >= len(x.shape) - axes or math.prod(x.shape[-axes:]) != columns:
        raise Unsupported("it normalizes over the batch")
    weight, bias = [c.constant(v).tensor for v in affine] + [-1] * (2 - len(affine))
    rounding, whole = _quantized_at_once(c, step)
    y, bytes_, limits = -1, -1, {}
    if rounding is not None:
        inner, buffer = c.temporary(step.name, TensorType(c.types[step.name].shape, c.types[rounding.name].dtype),
                                    _signed(c, rounding))  # fmt: skip
        c.quantized[(step.name, *_rounding(c, rounding))] = inner
        bytes_ = buffer.tensor
        limits = {"factor": rounding.factor, "lo": float(rounding.lo), "hi": float(rounding.hi)}
    if rounding is None or not whole:
        y = c.buffer(step.name).tensor
    else:
        c.types.setdefault(step.name, c.program.types[step.name])
        c.lazy[step.name] = Lazy(step.name, (), dense(sizes_of(c.types[step.name])[0]))
    c.native.add_layer_norm(
        step.name, src=x.tensor, weight=weight, bias=bias, columns=columns, dst=y, bytes=bytes_,
        eps=float(step.node.attrs["eps"]), **limits,
    )  # fmt: skip


def _quantized_at_once(c: Values, step: Instruction) -> tuple[Quantize | None, bool]:
    """(a Quantize that reads the result, moved or not; whether nothing reads it otherwise)."""
    found: list[Quantize] = []
    whole = step.name not in c.program.outputs
    open_values = [step.name]
    count = math.prod(sizes_of(c.types[step.name])[0])
    while open_values:
        value = open_values.pop()
        for reader in c.readers.get(value, []):
            if isinstance(reader, Quantize):
                found.append(reader)
            elif is_move(reader) and value not in c.program.outputs and math.prod(
                sizes_of(c.types[reader.name])[0]
            ) >= count and c.stays(reader):
                open_values.append(reader.name)
            else:
                whole = False
        whole = whole and value not in c.program.outputs
    if not found:
        return None, False
    first = _rounding(c, found[0])
    return found[0], whole and all(_rounding(c, q) == first for q in found)


# ---- element by element --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operand:
    """A tensor with a view of it. name: of the value, to be made where its view does not go with others; None for numbers.
    place: the value's axis that carries the batch."""

    buffer: Buffer
    view: View
    name: str | None = None
    place: int | None = None

    @property
    def dtype(self) -> str:
        return self.buffer.dtype


def _operand(c: Values, value: Any, dtype: str | None = None) -> Operand:
    """A value by name, or a number as a constant."""
    if isinstance(value, str):
        buffer, view = c.view_of(value)
        if buffer.dtype == "8-bit":
            raise Unsupported("it reads 8-bit values")
        return Operand(buffer, view, value, None if value in c.program.constants else sizes_of(c.types[value])[1])
    array = np.asarray(value).astype(dtype or "float32")
    buffer = c.constant_array(f"number {value!r}", array)
    return Operand(buffer, dense(()))


def spread(operand: Operand, shape: Sequence[int], place: int) -> View:
    """The operand's view, broadcast to a shape whose batch is on an axis."""
    view, missing = operand.view, len(shape) - len(operand.view.axes)
    if missing < 0:
        raise Unsupported("its operands have more axes than its result")
    axes = [()] * missing + list(view.axes)
    if operand.place is not None and operand.place + missing != place:
        raise Unsupported("it broadcasts along the batch")
    if operand.place is None and size_of(axes[place]) != 1:
        raise Unsupported("it reads a constant for a fixed batch")
    for i, size in enumerate(shape):
        if size_of(axes[i]) != size:
            if size_of(axes[i]) != 1:
                raise Unsupported("its operands do not broadcast")
            axes[i] = ((size, 0),)
    return View(view.offset, tuple(axes))


def _walk(
    c: Values, name: str, operands: Sequence[Operand], y: Buffer
) -> tuple[list[int], list[list[int]], list[int], list[int]]:
    """(extents, strides, offsets, tensors) of operands and result; operands that do not fit are made first."""
    assert y.place is not None
    shape = list(y.shape)
    for attempt in range(2):
        views = [spread(o, shape, y.place) for o in operands] + [y.view()]
        loops = common_axes(views)
        if loops is not None and len(loops[0]) <= MOST_AXES:
            tensors = [o.buffer.tensor for o in operands]
            return loops[0], loops[1], [v.offset for v in views], tensors
        if attempt:
            break
        operands = [_made(c, o) for o in operands]
    raise Unsupported("its operands lie in memory in too many ways")


def _made(c: Values, operand: Operand) -> Operand:
    if operand.name is None or operand.place is None:
        return operand
    buffer = c.buffer(operand.name)
    return replace(operand, buffer=buffer, view=buffer.view())


def _combine(
    c: Values, name: str, op: str, a: Any, b: Any, lo: float = -INFINITY, hi: float = INFINITY
) -> None:
    """float32 result; operands are names or numbers."""
    operands = [_as(c, v, "float32") for v in (a, b)]
    y = c.buffer(name)
    extents, strides, offsets, tensors = _walk(c, name, operands, y)
    if strides[2][-1] != 1:
        raise Unsupported("its result is not dense")
    c.native.add_combine(name, op, *tensors, y.tensor, extents, strides, offsets, lo, hi)


def _whole(c: Values, name: str, op: str, kind: str, values: Sequence[Any]) -> None:
    """Elements of any type: operands of `kind`, and a condition behind them for `where`."""
    operands = [_as(c, v, "bool" if op == "where" and i == 2 else kind) for i, v in enumerate(values)]
    y = c.buffer(name)
    extents, strides, offsets, tensors = _walk(c, name, operands, y)
    c.native.add_elementwise(name, op, kind, y.dtype, tensors, y.tensor, extents, strides, offsets)


def _as(c: Values, value: Any, dtype: str) -> Operand:
    """An operand, converted to a type where it has another."""
    if not isinstance(value, str):
        return _operand(c, value, dtype)
    operand = _operand(c, value)
    if operand.dtype == dtype:
        return operand
    if value in c.program.constants:
        array = np.asarray(c.program.constants[value]).astype(dtype)
        buffer = c.constant_array(value, array)
        return Operand(buffer, dense(array.shape), value)
    if operand.dtype == "float32":
        raise Unsupported("it makes integers of real numbers")
    inner, y = c.temporary(value, TensorType(c.types[value].shape, dtype), None)
    extents, strides, offsets, tensors = _walk(c, inner, [operand], y)
    c.native.add_elementwise(inner, "convert", operand.dtype, dtype, tensors, y.tensor, extents, strides, offsets)
    return Operand(y, y.view(), inner, y.place)


def _dtype(c: Values, value: Any) -> str:
    if not isinstance(value, str):
        return "bool" if isinstance(value, bool) else "int64" if isinstance(value, int) else "float32"
    if value in c.program.constants:
        return np.asarray(c.program.constants[value]).dtype.name
    return c.types[value].dtype


def _common(c: Values, values: Sequence[Any]) -> str:
    """The type that operands are compared or chosen in."""
    found = [_dtype(c, v) for v in values]
    for dtype in ("float32", "int64", "int32", "bool"):
        if dtype in found:
            return "int64" if dtype == "int32" else dtype
    raise Unsupported(f"it reads {found[0]}")


def _activation(step: Float) -> tuple[float, float]:
    activation = step.node.attrs.get("activation")
    if activation is None:
        return -INFINITY, INFINITY
    return (0.0, INFINITY) if activation["kind"] == "relu" else (float(activation["lo"]), float(activation["hi"]))


def _binary(op: str) -> Callable[[Values, Float], None]:
    """add and mul of the graph."""

    def handler(c: Values, step: Float) -> None:
        a, b = step.inputs
        for value, number in ((a, b), (b, a)):
            lazy = c.lazy.get(value)
            scalar = c.program.constants.get(number)
            plain = op == "mul" and "activation" not in step.node.attrs
            number_at_hand = scalar is not None and np.ndim(scalar) == 0 and np.asarray(scalar).dtype == np.float32
            if plain and number_at_hand and lazy is not None and lazy.factor is not None:
                c.lazy[step.name] = replace(lazy, scalars=(*lazy.scalars, (op, float(np.asarray(scalar)))))
                return
        _combine(c, step.name, op, a, b, *_activation(step))

    return handler


def arguments(step: Float) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of an aten operator: names of values, and numbers. Raises Unsupported for others' kinds of template."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(v) for v in value]
        if isinstance(value, dict):
            if "value" in value:
                return step.node.inputs[value["value"]]
            if "dtype" in value:
                return str(value["dtype"])
            if "float" in value:
                return float(value["float"])
            raise Unsupported("its arguments depend on the batch")
        return value

    return [plain(v) for v in step.node.attrs["args"]], {k: plain(v) for k, v in step.node.attrs["kwargs"].items()}


def _arithmetic(op: str, turned: bool = False) -> Callable[[Values, Float], None]:
    """aten add, sub, rsub, mul, div."""

    def handler(c: Values, step: Float) -> None:
        (a, b, *more), kwargs = arguments(step)
        if kwargs.get("alpha", more[0] if more else 1) != 1 or kwargs.get("rounding_mode") is not None:
            raise Unsupported(f"{step.operation} with alpha or a rounding mode")
        a, b = (b, a) if turned else (a, b)
        dtype = c.types[step.name].dtype
        if dtype == "float32":
            _combine(c, step.name, op, a, b)
        elif dtype == "int64" and op != "div":
            _whole(c, step.name, op, "int64", [a, b])
        else:
            raise Unsupported(f"{step.operation} gives {dtype}")

    return handler


def _comparison(op: str, turned: bool = False) -> Callable[[Values, Float], None]:
    def handler(c: Values, step: Float) -> None:
        (a, b), _ = arguments(step)
        a, b = (b, a) if turned else (a, b)
        _whole(c, step.name, op, _common(c, [a, b]), [a, b])

    return handler


def _logic(op: str) -> Callable[[Values, Float], None]:
    def handler(c: Values, step: Float) -> None:
        values, _ = arguments(step)
        if c.types[step.name].dtype != "bool":
            raise Unsupported(f"{step.operation} of {c.types[step.name].dtype}")
        if op == "not":
            kind = _common(c, values)
            _whole(c, step.name, "eq", kind, [values[0], False if kind == "bool" else 0])
        else:
            kinds = _common(c, values)
            _whole(c, step.name, op, kinds, values)

    return handler


def _where(c: Values, step: Float) -> None:
    (condition, a, b), _ = arguments(step)
    dtype = c.types[step.name].dtype
    _whole(c, step.name, "where", dtype, [a, b, condition])


def _masked_fill(c: Values, step: Float) -> None:
    (x, mask, value), _ = arguments(step)
    dtype = c.types[step.name].dtype
    number = value if isinstance(value, str) else {"float32": float, "int64": int, "bool": bool}[dtype](value)
    _whole(c, step.name, "where", dtype, [number, x, mask])


def _convert(c: Values, step: Float) -> None:
    (x, *more), kwargs = arguments(step)
    dtype = c.types[step.name].dtype
    if kwargs.keys() - {"dtype", "memory_format", "non_blocking", "copy", "layout", "device", "pin_memory"}:
        raise Unsupported(f"{step.operation} with {sorted(kwargs)}")
    if c.types.get(x) is None or dtype not in ("float32", "int64", "bool"):
        raise Unsupported(f"it gives {dtype}")
    if c.types[x].dtype == dtype:
        c.move(step.name, _same_shape(c, step.name, x), x)
        return
    operand = _operand(c, x)
    if operand.dtype == "float32":
        raise Unsupported("it makes integers of real numbers")
    y = c.buffer(step.name)
    extents, strides, offsets, tensors = _walk(c, step.name, [operand], y)
    c.native.add_elementwise(step.name, "convert", operand.dtype, dtype, tensors, y.tensor, extents, strides, offsets)


def _same_shape(c: Values, name: str, value: str) -> Node:
    rank = len(c.types[name].shape)
    return Node(name, "permute", [value], {"axes": list(range(rank))})


def _extreme(op: str) -> Callable[[Values, Float], None]:
    def handler(c: Values, step: Float) -> None:
        (a, b), _ = arguments(step)
        dtype = c.types[step.name].dtype
        if dtype not in ("float32", "int64"):
            raise Unsupported(f"{step.operation} gives {dtype}")
        _whole(c, step.name, op, dtype, [a, b])

    return handler


def _limited(limits: Callable[[Float], tuple[float, float]]) -> Callable[[Values, Float], None]:
    """relu, clamp and their like: times one, then bounded."""

    def handler(c: Values, step: Float) -> None:
        if c.types[step.name].dtype != "float32" or c.types[step.inputs[0]].dtype != "float32":
            raise Unsupported(f"{step.operation} of {c.types[step.inputs[0]].dtype}")
        _combine(c, step.name, "mul", step.inputs[0], 1.0, *limits(step))

    return handler


def _clamp_limits(step: Float) -> tuple[float, float]:
    (_, *limits), kwargs = arguments(step)
    lo, hi = [*limits, None, None][:2]
    lo, hi = kwargs.get("min", lo), kwargs.get("max", hi)
    if step.operation == "aten.clamp_max.default":
        lo, hi = None, lo if hi is None else hi
    if isinstance(lo, str) or isinstance(hi, str):
        raise Unsupported("its limits are values")
    return -INFINITY if lo is None else float(lo), INFINITY if hi is None else float(hi)


def _negative(c: Values, step: Float) -> None:
    if c.types[step.name].dtype != "float32":
        raise Unsupported(f"{step.operation} of {c.types[step.name].dtype}")
    _combine(c, step.name, "mul", step.inputs[0], -1.0)


def _square(c: Values, step: Float) -> None:
    args, _ = arguments(step)
    if c.types[step.name].dtype != "float32" or (len(args) > 1 and args[1] != 2):
        raise Unsupported(f"{step.operation} of this power or type")
    _combine(c, step.name, "mul", args[0], args[0])


def _root(c: Values, step: Float) -> None:
    x = c.floats(step.inputs[0])
    y = c.buffer(step.name)
    c.native.add_reduce(step.name, x.tensor, y.tensor, math.prod(y.shape), 1, 1, 0.0, False, True)


# ---- sums ----------------------------------------------------------------------------------------------------------------


def _reduced(
    c: Values, step: Float, axes: Sequence[int] | None, mean: bool, square: bool = False, root: bool = False
) -> None:
    value = step.inputs[0]
    shape, place = sizes_of(c.types[value])
    if axes is None or not len(axes):
        raise Unsupported("it sums over the batch")
    over = sorted(int(a) % len(shape) for a in axes)
    if place in over:
        raise Unsupported("it sums over the batch")
    count = math.prod(shape[a] for a in over)
    if c.types[value].dtype != "float32":
        _sum_whole(c, step, over)
        return
    kept = [a for a in range(len(shape)) if a not in over]
    if over == list(range(over[0], over[-1] + 1)):
        x = c.floats(value)
        outer, inner = math.prod(shape[: over[0]]), math.prod(shape[over[-1] + 1 :])
    else:
        order = [*kept, *over]
        turned = f"{step.name}:order"
        c.types[turned] = TensorType(tuple(c.types[value].shape[a] for a in order), "float32")
        c.move(turned, Node(turned, "permute", [value], {"axes": order}), value)
        x = c.floats(turned)
        outer, inner = math.prod(shape[a] for a in kept), 1
    y = c.buffer(step.name)
    c.native.add_reduce(
        step.name, x.tensor, y.tensor, outer, count, inner, float(count) if mean else 0.0, square, root
    )


def _sum_whole(c: Values, step: Float, over: Sequence[int]) -> None:
    """Integers: added one by one to zeros, in any order."""
    value = step.inputs[0]
    if c.types[step.name].dtype != "int64":
        raise Unsupported("it averages integers")
    x = _as(c, value, "int64")
    y = c.buffer(step.name)
    zero = _operand(c, 0, "int64")
    extents, strides, offsets, tensors = _walk(c, step.name, [zero], y)
    c.native.add_elementwise(step.name, "convert", "int64", "int64", tensors, y.tensor, extents, strides, offsets)
    shape, _ = sizes_of(c.types[value])
    rows = list(y.view().axes)
    if len(rows) != len(shape):
        for a in over:
            rows.insert(a, ())
    still: list[Axis] = [((size, 0),) if size != 1 else () for size in shape]
    target = View(0, tuple(still[i] if i in over else rows[i] for i in range(len(shape))))
    made = _made(c, x)
    loops = common_axes([target, made.view, target])
    if loops is None or len(loops[0]) > MOST_AXES:
        raise Unsupported("its operands lie in memory in too many ways")
    c.native.add_elementwise(
        step.name, "add", "int64", "int64", [y.tensor, made.buffer.tensor], y.tensor, loops[0], loops[1],
        [0, made.view.offset, 0],
    )  # fmt: skip


def _mean(c: Values, step: Float) -> None:
    _reduced(c, step, step.node.attrs["axes"], True)


def _aten_sum(mean: bool) -> Callable[[Values, Float], None]:
    def handler(c: Values, step: Float) -> None:
        (_, axes, *_), _ = arguments(step)
        _reduced(c, step, axes if isinstance(axes, list) or axes is None else [axes], mean)

    return handler


def _norm(c: Values, step: Float) -> None:
    (_, *rest), kwargs = arguments(step)
    order, axes = [*rest, *[2, None][len(rest) :]][:2]
    if order != 2 or kwargs.get("dtype") is not None:
        raise Unsupported("a norm other than the second")
    _reduced(c, step, axes if isinstance(axes, list) or axes is None else [axes], False, True, True)


# ---- concatenation and look-ups ------------------------------------------------------------------------------------------


def _concat(c: Values, step: Float) -> None:
    values, axis = list(step.inputs), step.node.attrs.get("axis")
    if step.operation != "concat":
        args, kwargs = arguments(step)
        values, axis = args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if step.node.attrs.get("activation") is not None:
        raise Unsupported("an activation behind a concatenation in float")
    y = c.buffer(step.name)
    assert axis is not None and y.place is not None
    axis = int(axis) % len(y.shape)
    if axis == y.place:
        raise Unsupported("it concatenates samples")
    whole, start = y.view(), 0
    for value in values:
        dtype = _dtype(c, value)
        if dtype != y.dtype:
            raise Unsupported(f"it concatenates {dtype} with {y.dtype}")
        buffer, view = c.view_of(value)
        size = size_of(view.axes[axis])
        (_, stride), = whole.axes[axis] or ((1, 0),)
        part = View(start * stride, tuple(
            (((size, stride),) if size != 1 else ()) if i == axis else own_axis for i, own_axis in enumerate(whole.axes)
        ))  # fmt: skip
        if view.shape != part.shape:
            raise Unsupported("its operands do not go together")
        if not c.copy(step.name, buffer, view, y, part):
            buffer = c.buffer(value)
            if not c.copy(step.name, buffer, buffer.view(), y, part):
                raise Unsupported("its operands lie in memory in two ways")
        start += size


def _filled(number: int | None) -> Callable[[Values, Float], None]:
    """zeros_like, ones_like, full_like."""

    def handler(c: Values, step: Float) -> None:
        args, _ = arguments(step)
        y = c.buffer(step.name)
        kinds: dict[str, Callable[[Any], Any]] = {"float32": float, "int64": int, "bool": bool}
        if y.dtype not in kinds:
            raise Unsupported(f"it gives {y.dtype}")
        value = _operand(c, kinds[y.dtype](args[1] if number is None else number), y.dtype)
        extents, strides, offsets, tensors = _walk(c, step.name, [value], y)
        if y.dtype == "float32":
            c.native.add_rearrange(step.name, tensors[0], y.tensor, extents, strides, offsets)
        else:
            c.native.add_elementwise(step.name, "convert", y.dtype, y.dtype, tensors, y.tensor, extents, strides, offsets)

    return handler


def _running_sum(c: Values, step: Float) -> None:
    """Of integers: every element is the one before it and its own."""
    (value, axis, *_), _ = arguments(step)
    shape, place = sizes_of(c.types[value])
    axis = int(axis) % len(shape)
    if c.types[step.name].dtype != "int64" or axis == place:
        raise Unsupported("a running sum of real numbers, or over samples")
    x = _as(c, value, "int64")
    y = c.buffer(step.name)
    extents, strides, offsets, tensors = _walk(c, step.name, [x], y)
    c.native.add_elementwise(step.name, "convert", "int64", "int64", tensors, y.tensor, extents, strides, offsets)
    if shape[axis] == 1:
        return
    own = y.view()
    stride = own.axes[axis][0][1]
    cut = own.axes[:axis] + (((shape[axis] - 1, stride),) if shape[axis] > 2 else (),) + own.axes[axis + 1 :]
    loops = common_axes([View(0, cut)], 1 << 62)
    assert loops is not None
    if len(loops[0]) > MOST_AXES:
        raise Unsupported("it has too many axes")
    c.native.add_elementwise(
        step.name, "add", "int64", "int64", [y.tensor, y.tensor], y.tensor, loops[0], loops[1] * 3, [0, stride, stride]
    )


def _embedding(c: Values, step: Float) -> None:
    (table, ids, *_), _ = arguments(step)
    if table not in c.program.constants:
        raise Unsupported("it looks up rows of a value")
    rows = c.constant(table)
    if not rows.is_float or len(rows.shape) != 2:
        raise Unsupported("its table is not one of float32 rows")
    if _dtype(c, ids) not in ("int64", "int32") or ids in c.program.constants:
        raise Unsupported("its numbers are not integers of the batch")
    operand = _as(c, ids, "int64")
    numbers = c.buffer(operand.name) if operand.name is not None else operand.buffer
    c.native.add_embedding(step.name, numbers.tensor, rows.tensor, c.buffer(step.name).tensor)


_COMPARISONS = {"eq": ("eq", False), "ne": ("ne", False), "lt": ("lt", False), "le": ("le", False), "gt": ("lt", True),
                "ge": ("le", True)}  # fmt: skip
OPERATORS: dict[str, Callable[[Values, Float], None]] = {
    "layer_norm": _layer_norm, "add": _binary("add"), "mul": _binary("mul"), "concat": _concat, "mean": _mean,
    "relu": _limited(lambda step: (0.0, INFINITY)), "relu6": _limited(lambda step: (0.0, 6.0)),
    "clamp": _limited(lambda step: (float(step.node.attrs["lo"]), float(step.node.attrs["hi"]))),
    "aten.embedding.default": _embedding, "aten.to.dtype": _convert, "aten._to_copy.default": _convert,
    "aten.where.self": _where, "aten.where.ScalarOther": _where, "aten.where.ScalarSelf": _where,
    "aten.masked_fill.Scalar": _masked_fill, "aten.masked_fill.Tensor": _masked_fill,
    "aten.sum.dim_IntList": _aten_sum(False), "aten.mean.dim": _aten_sum(True), "aten.linalg_vector_norm.default": _norm,
    "aten.maximum.default": _extreme("max"), "aten.minimum.default": _extreme("min"), "aten.neg.default": _negative,
    "aten.square.default": _square, "aten.pow.Tensor_Scalar": _square, "aten.sqrt.default": _root,
    "aten.zeros_like.default": _filled(0), "aten.ones_like.default": _filled(1), "aten.full_like.default": _filled(None),
    "aten.cumsum.default": _running_sum, "aten.cat.default": _concat,
    "aten.logical_not.default": _logic("not"), "aten.bitwise_not.default": _logic("not"),
    "aten.logical_and.default": _logic("and"), "aten.logical_or.default": _logic("or"),
    "aten.logical_xor.default": _logic("xor"), "aten.bitwise_and.Tensor": _logic("and"),
    "aten.bitwise_or.Tensor": _logic("or"), "aten.rsub.Scalar": _arithmetic("sub", True),
    "aten.rsub.Tensor": _arithmetic("sub", True), "aten.relu.default": _limited(lambda step: (0.0, INFINITY)),
    **{f"aten.{name}.default": _limited(_clamp_limits) for name in ("clamp", "clamp_min", "clamp_max")},
    **{f"aten.{op}.{kind}": _arithmetic(op) for op in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")},
    **{f"aten.{name}.{kind}": _comparison(*how) for name, how in _COMPARISONS.items() for kind in ("Tensor", "Scalar")},
}  # fmt: skip

__all__ = ["ITEMS", "float_operator", "quantize"]
