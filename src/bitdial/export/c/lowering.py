"""From a program to steps of the exported function; every instruction without a C form is collected and named in one error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bitdial.engines import memory
from bitdial.engines.memory import Buffer, Unsupported
from bitdial.engines.views import check_samples_stay, unit_index
from bitdial.errors import ExportError
from bitdial.export.c import weights
from bitdial.export.c.literals import float_literal
from bitdial.export.c.steps import Constant, Lowered, Step
from bitdial.graph.ir import BatchDim
from bitdial.quantization.instructions import (
    Add,
    Concat,
    Contract,
    Dequantize,
    Float,
    Instruction,
    Lookup,
    MatMul,
    MaxPool,
    Move,
    Mul,
    Quantize,
    SumPool,
    Window,
)
from bitdial.quantization.program import Program

SHOWN = 12  # operators named in an error
WINDOW_LIMIT = 2**15  # sizes of windows, strides and pads; keeps products of them within int32


def lower_program(program: Program, ratios: Sequence[int]) -> Lowered:
    """Steps for the ratio indices `ratios`. Raises ExportError naming every operator that C export lacks."""
    return Lowering(program, list(ratios)).run()


def _ints(*values: int) -> str:
    return ", ".join(str(int(v)) for v in values)


class Lowering:
    """One use: `Lowering(program, ratios).run()`."""

    def __init__(self, program: Program, ratios: list[int]) -> None:
        self.program, self.ratios = program, ratios
        self.buffers: dict[str, Buffer] = {}
        self.alias: dict[str, str] = {}
        self.steps: list[Step] = []
        self.tables: dict[tuple[int, int, bool], str] = {}
        self.rows: set[int] = set()  # limits of low weights that have a table
        lowered = [v for v in program.layers.values() if v.weight_shift.size and v.low.any()]
        self.top_shift = max((int(v.weight_shift.max()) for v in lowered if v.low_weight is None), default=0)
        stored = [v for v in lowered if v.low_weight is not None and v.low[ratios].any()]
        self.stores = len(ratios) > 1 and bool(stored)  # some layer stores low weights beside its rows

    def run(self) -> Lowered:
        for name in self.program.inputs:
            self._input(name)
        problems: list[str] = []
        broken: set[str] = set()
        for instruction in self.program.instructions:
            if any(v in broken for v in instruction.operands()):
                broken.add(instruction.name)  # only what is missing itself is named
            try:
                step = HANDLERS[type(instruction)](self, instruction)
            except Unsupported as reason:
                if not (instruction.name in broken and str(reason).startswith("it reads")):
                    where = f", module '{instruction.source}'" if instruction.source else ""
                    problems.append(f"'{instruction.name}' ({_word(instruction)}{where}): {reason}")
                broken.add(instruction.name)
                continue
            if step is not None:
                self.steps.append(step)
        if problems:
            more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise ExportError(
                f"C export lacks {len(problems)} operator(s) of this model: {'; '.join(problems[:SHOWN])}{more}. It covers "
                "8-bit convolutional networks; run this one with the cpu or reference engine, or export it to ONNX"
            )
        for output in self.program.outputs:
            buffer = self.buffers.get(output)
            if buffer is None or not buffer.is_float:
                raise ExportError(f"output '{output}' is not a float value that C export computes")
        return Lowered(
            self.steps, self.buffers, self.alias, list(self.program.inputs), list(self.program.outputs),
            [self.program.ratios[r] for r in self.ratios], self._quantized_input(),
        )  # fmt: skip

    # ---- values ------------------------------------------------------------------------------------------------------

    def _input(self, name: str) -> None:
        type_ = self.program.types[name]
        if type_.dtype != "float32":
            raise ExportError(f"input '{name}' is {type_.dtype}; C export takes float32 inputs")
        try:
            self.buffer(name)
        except Unsupported as reason:
            raise ExportError(f"input '{name}' of type {type_} cannot be exported: {reason}") from None

    def buffer(self, name: str) -> Buffer:
        buffer = self.buffers.get(name)
        if buffer is not None:
            return buffer
        if name in self.program.constants:
            raise Unsupported("it reads a constant")
        type_ = self.program.types[name]
        q = self.program.qparams.get(name)
        if q is None and type_.dtype != "float32":
            raise Unsupported(f"it computes {type_.dtype}")
        factor, h, w, c, first = memory.physical(type_)
        if factor != 1:
            raise Unsupported("it folds other axes into the batch")
        buffer = Buffer(h, w, c, first, q is not None and q.signed, q is None)
        if buffer.size >= 2**31 or not buffer.size:
            raise Unsupported("its result is empty or has 2 GiB or more")
        self.buffers[name] = buffer
        return buffer

    def read(self, name: str) -> Buffer:
        if name not in self.buffers:
            raise Unsupported(f"it reads '{name}', which C export does not compute")
        return self.buffers[name]

    def eight(self, name: str) -> Buffer:
        buffer = self.read(name)
        if buffer.is_float:
            raise Unsupported(f"it reads '{name}' in float")
        return buffer

    def _quantized_input(self) -> str | None:
        """The first step, if it quantizes the only input and nothing else reads that."""
        if len(self.program.inputs) != 1 or not self.steps or self.steps[0].op != "quantize":
            return None
        name = self.program.inputs[0]
        readers = [s for s in self.steps if name in s.reads]
        return self.steps[0].name if len(readers) == 1 and name not in self.program.outputs else None

    def extract_table(self, shift: int, limit: int, signed: bool, constants: list[Constant]) -> str:
        """Name of the table that takes an 8-bit activation to its low value; made at first use, shared by layers."""
        key = (shift, limit, signed)
        if key not in self.tables:
            self.tables[key] = f"fq_lower_{'s' if signed else 'u'}{limit}_{shift}"
            constants.append(Constant("=" + self.tables[key], weights.extract_table(shift, limit, signed)))
        return self.tables[key]


def _word(step: Instruction) -> str:
    """An instruction in errors: the network's own word for it."""
    return step.function if isinstance(step, Lookup) else step.operation


def _step(step: Instruction, call: str, roles: dict[str, str], *kernels: str, **more: Any) -> Step:
    return Step(step.name, step.operation, step.source, call, roles, step.name, list(kernels), **more)


def _one(step: Instruction) -> dict[str, str]:
    return {"x": step.inputs[0], "y": step.name}


# ---- instructions ----------------------------------------------------------------------------------------------------


def _quantize(c: Lowering, step: Quantize) -> Step:
    x = c.read(step.inputs[0])
    if not x.is_float:
        raise Unsupported("its input is not float")
    y = c.buffer(step.name)
    limits = f"{float_literal(step.factor)}, {float_literal(step.lo)}, {float_literal(step.hi)}"
    return _step(step, f"fq_quantize({{x}}, {{y}}, {_ints(*y.planes)}, {limits});", _one(step), "quantize")


def _dequantize(c: Lowering, step: Dequantize) -> Step:
    x = c.eight(step.inputs[0])
    c.buffer(step.name)
    call = f"fq_dequantize({{x}}, {{y}}, {_ints(*x.planes)}, {float_literal(step.factor)}, {int(x.signed)});"
    return _step(step, call, _one(step), "dequantize")


def _float(c: Lowering, step: Float) -> Step:
    if step.operation != "reshape":
        raise Unsupported(f"it runs in float{f' ({step.reason})' if step.reason else ''}")
    x = c.read(step.inputs[0])
    y = c.buffer(step.name)
    if not x.is_float or x.count != y.count:
        raise Unsupported("it moves values between samples")
    return _step(step, f"fq_copy_float({{x}}, {{y}}, {x.count});", _one(step), "copy_float")


def _matmul(c: Lowering, step: MatMul) -> Step:
    raise Unsupported("product of two activations")


def _contract(c: Lowering, step: Contract) -> Step:
    layer = step.layer
    assert layer.weight is not None
    x = c.eight(step.inputs[0])
    memory.check_contract(step, x, c.program)
    low = layer.low[c.ratios]
    if c.program.extraction == "dynamic" and low.any():
        raise Unsupported("dynamic extraction; quantize with extraction='static', or export ratio 0 alone")
    roles = {"x": step.inputs[0], "y": step.name}
    residual = None
    if step.residual is not None:
        residual = c.read(step.residual)
        roles["r"] = step.residual
    y = c.buffer(step.name)
    if residual is not None and not y.is_float and residual.is_float:
        raise Unsupported("its residual is float and its result is not")
    if residual is not None and y.is_float and not residual.is_float:
        raise Unsupported("its residual is 8-bit and its result is not")
    packed = weights.pack_layer(layer, c.program.qparams[step.inputs[0]], c.ratios)
    lo, hi = (0.0 if math.isinf(v) else v for v in step.limits)
    limits = 0 if step.clamp is not None else sum(b for b, v in zip((1, 2), step.limits, strict=True) if not math.isinf(v))
    kernel, stride, padding, dilation = _small(step.window or memory.UNIT).pairs
    constants: list[Constant] = [
        Constant("weight", packed.weight),
        *([] if packed.low_weight is None else [Constant("low_weight", packed.low_weight)]),
        Constant("bias", packed.bias),
        Constant("multiplier", layer.multiplier.astype(np.float32)),
    ]
    makes = packed.kind != weights.DIRECT
    kernels = ["targets", "layer", *(["depthwise"] if packed.depthwise else ["columns", "products", "conv"])]
    groups_name, shift_name, low_name, rows_name = "0", "0", "0", "0"
    if not packed.depthwise:
        groups_name = "{groups}"
        rows = []
        for g, shift in enumerate(packed.group_shift):
            table = "0"
            if packed.low is not None and packed.low[:, g].any():
                table = c.extract_table(shift, layer.amax, x.signed, constants)
            numbers = (packed.group_first[g], packed.group_width[g], packed.group_offset[g], packed.group_length[g])
            place = f", {packed.group_low_offset[g] if packed.group_low_offset else 0}" if c.stores else ""
            rows.append(f"{{{_ints(*numbers)}, {table}, {shift}{place}}}")
        constants.append(Constant("groups", struct=f"fq_group:{len(rows)}", text=",\n    ".join(rows)))
    if packed.low is not None:
        constants.append(Constant("low", packed.low))
        low_name = "{low}"
    if packed.kind == weights.LOWERS and packed.low_weight is None:
        rows_name = f"fq_lower_w{layer.wmax}"
        if layer.wmax not in c.rows:
            c.rows.add(layer.wmax)
            constants.append(Constant("=" + rows_name, weights.weight_tables(c.top_shift, layer.wmax)))
    if packed.fours:
        kernels.insert(2, "fours")
    if packed.weight_shift is not None:
        constants.append(Constant("shift", packed.weight_shift))
        shift_name = "{shift}"
    groups_per = max(1, len(packed.group_width) // layer.conv_groups)
    outputs = layer.weight.shape[0]
    fields = [
        ".weight = {weight}, .bias = {bias}, .multiplier = {multiplier}",
        f".groups = {groups_name}, .weight_shift = {shift_name}, .lower_weight = {rows_name}, .low = {low_name}",
        f".row = {packed.row}, .stored_row = {packed.stored_row}, .makes = {int(makes)}, .block = {{block}}, "
        f".fours = {int(packed.fours)}, .shift_rows = {packed.shift_rows}",
        *([] if packed.low_weight is None else
          [f".low_weight = {{low_weight}}, .low_row = {packed.low_row}, .low_nibbles = {int(packed.low_nibbles)}"]),
        f".in_h = {x.h}, .in_w = {x.w}, .channels = {x.c}, .out_h = {y.h}, .out_w = {y.w}, .outputs = {outputs}",
        f".kernel_h = {kernel[0]}, .kernel_w = {kernel[1]}, .stride_h = {stride[0]}, .stride_w = {stride[1]}, "
        f".pad_h = {padding[0]}, .pad_w = {padding[1]}, "
        f".dilation_h = {dilation[0]}, .dilation_w = {dilation[1]}",
        f".conv_groups = {layer.conv_groups}, .groups_per = {groups_per}",
        f".in_signed = {int(x.signed)}, .residual_signed = {int(residual is not None and residual.signed)}, "
        f".limits = {limits}",
        f".residual_factor = {float_literal(layer.residual_factor)}, .lo = {float_literal(lo)}, .hi = {float_literal(hi)}",
    ]  # fmt: skip
    constants.append(Constant("layer", struct="fq_layer", text=",\n    ".join(fields)))
    pixels, step_p, step_c = y.h * y.w, outputs, 1
    if y.channels_first:
        step_p, step_c = 1, pixels
    targets = ["0", "0", "0", "0"]  # y, y_float, residual, residual_float
    targets[1 if y.is_float else 0] = "{y}"
    if residual is not None:
        targets[3 if y.is_float else 2] = "{r}"
    function = "fq_depthwise" if packed.depthwise else "fq_conv"
    scratch = "0" if packed.depthwise else "{scratch}"
    call = (
        f"{{{{ const fq_places p = {{{{{{x}}, {', '.join(targets)}, {step_p}, {step_c}, {scratch}}}}}; "
        f"{function}(&{{layer}}, &p, ratio); }}}}"
    )
    overlays = []
    if residual is not None and residual.size == y.size and step.residual != step.inputs[0]:
        overlays.append(step.residual or "")
    return _step(
        step, call, roles, *kernels, constants=constants, overlays=overlays, layer=packed, macs=int(layer.macs)
    )


def _lookup(c: Lowering, step: Lookup) -> Step:
    x = c.eight(step.inputs[0])
    c.buffer(step.name)
    values = step.table.astype(np.int16)
    if x.signed:
        values = np.roll(values, -128)  # indexed by the stored byte
    constant = Constant("table", (values & 255).astype(np.uint8))
    call = f"fq_table({{x}}, {{y}}, {x.count}, {{table}});"
    return _step(step, call, _one(step), "table", constants=[constant], overlays=[step.inputs[0]])


def _two(c: Lowering, step: Add | Mul) -> Step:
    places = [c.eight(v) for v in step.inputs]
    y = c.buffer(step.name)
    if any(p.channels_first != y.channels_first for p in places):
        raise Unsupported("its operands differ in rank")
    sizes, steps = _broadcast(c, step)
    first, second = step.factors if isinstance(step, Add) else (step.factor, 0.0)
    text = (
        f"{{{_ints(*sizes)}}}, {{{_ints(*steps[0])}}}, {{{_ints(*steps[1])}}}, {int(places[0].signed)}, "
        f"{int(places[1].signed)}, {float_literal(first)}, {float_literal(second)}, {float_literal(step.lo)}, "
        f"{float_literal(step.hi)}"
    )
    roles = {"a": step.inputs[0], "b": step.inputs[1], "y": step.name}
    full = [v for v, p in zip(step.inputs, places, strict=True) if p.count == y.count]
    if len(full) == 2 and step.inputs[0] == step.inputs[1]:
        full = full[:1]
    return _step(
        step, f"fq_{step.operation}({{a}}, {{b}}, {{y}}, &{{pair}});", roles, "binary", step.operation,
        constants=[Constant("pair", struct="fq_pair", text=text)], overlays=full,
    )  # fmt: skip


def _broadcast(c: Lowering, step: Instruction) -> tuple[list[int], list[list[int]]]:
    """Four sizes and the steps of both operands, in the order of memory; axes that go together are joined."""

    def stored(value: str, rank: int) -> list[int]:
        shape = memory.sample_shape(c.program.types[value])
        shape = [1] * (rank - len(shape)) + shape
        return [*shape[1:], shape[0]] if rank == 3 else shape

    out_shape = c.program.types[step.name].shape
    for value in step.inputs:
        shape = c.program.types[value].shape
        if len(shape) != len(out_shape) or not isinstance(shape[0], BatchDim):
            raise Unsupported("its operands differ in rank")
    out = stored(step.name, len(out_shape) - 1)
    operands = [stored(v, len(out_shape) - 1) for v in step.inputs]
    axes: list[tuple[int, tuple[bool, bool]]] = []
    for size, a, b in zip(out, *operands, strict=True):
        moves = (a != 1 or size == 1, b != 1 or size == 1)
        if size == 1 and axes:
            continue
        if axes and axes[-1][1] == moves:
            axes[-1] = (axes[-1][0] * size, moves)
        else:
            axes.append((size, moves))
    if len(axes) > 4:
        raise Unsupported("it broadcasts over too many axes")
    axes = [(1, (True, True))] * (4 - len(axes)) + axes
    steps: list[list[int]] = []
    for which in (0, 1):
        pitch, own = 1, []
        for size, moves in reversed(axes):
            own.append(pitch if moves[which] else 0)
            pitch *= size if moves[which] else 1
        steps.append(own[::-1])
    return [size for size, _ in axes], steps


def _concat(c: Lowering, step: Concat) -> Step:
    y = c.buffer(step.name)
    shape = c.program.types[step.name].shape
    axis = step.axis % len(shape)
    if axis == 0:
        raise Unsupported("concatenation of batches")
    sizes, first = memory.sample_shape(c.program.types[step.name]), axis - 1
    if y.channels_first:
        sizes, first = [*sizes[1:], sizes[0]], (axis - 2) % 3
    outer, pitch = math.prod(sizes[:first]), math.prod(sizes[first:])
    calls, roles, offset = [], {"y": step.name}, 0
    for i, (value, f) in enumerate(zip(step.inputs, step.factors, strict=True)):
        x = c.eight(value)
        roles[f"x{i}"] = value
        inner = x.count // outer
        target = f"{{y}} + {offset}" if offset else "{y}"
        calls.append(
            f"fq_rescale({{x{i}}}, {target}, {_ints(outer, inner, pitch)}, {float_literal(f)}, {int(x.signed)}, "
            f"{float_literal(step.lo)}, {float_literal(step.hi)});"
        )
        offset += inner
    return _step(step, "\n    ".join(calls), roles, "rescale")


def _small(window: Window) -> Window:
    if max(*window.kernel, *window.stride, *window.padding, *window.dilation) > WINDOW_LIMIT:
        raise Unsupported("its window is too large")
    return window


def _pool(
    step: SumPool | MaxPool, x: Buffer, y: Buffer, window: Window, factor: float, lo: float, hi: float, inside: bool
) -> Step:
    """inside: no window reaches over the border, so that the result may lie where the input did."""
    sizes = [v for pair in _small(window).pairs for v in pair]
    text = f"{_ints(x.h, x.w, x.c, y.h, y.w)}, {_ints(*sizes)}, {int(x.signed)}, "
    text += f"{float_literal(factor)}, {float_literal(lo)}, {float_literal(hi)}"
    name = "max_pool" if isinstance(step, MaxPool) else "sum_pool"
    return _step(
        step, f"fq_{name}({{x}}, {{y}}, &{{window}});", _one(step), "window", name,
        constants=[Constant("window", struct="fq_window", text=text)],
        overlays=[step.inputs[0]] if inside and not any(window.padding) and y.size <= x.size else [],
    )  # fmt: skip


def _sum_pool(c: Lowering, step: SumPool) -> Step:
    x = c.eight(step.inputs[0])
    window = memory.sum_window(step, x, len(c.program.types[step.inputs[0]].shape))
    y = c.buffer(step.name)
    if step.axes is not None:
        if x.h * x.w > 2**23:
            raise Unsupported("mean of more than 2^23 values")
        y = Buffer(1, 1, x.c, y.channels_first, y.signed, False)
    return _pool(step, x, y, window, step.factor, step.lo, step.hi, not step.ceil_mode)


def _max_pool(c: Lowering, step: MaxPool) -> Step:
    x = c.eight(step.inputs[0])
    window = memory.plane_window(step.window)
    y = c.buffer(step.name)
    if x.signed != y.signed:
        raise Unsupported("its result is encoded otherwise than its input")
    return _pool(step, x, y, window, 0.0, 0.0, 0.0, not step.ceil_mode)


def _move(c: Lowering, step: Move) -> Step | None:
    x, y = c.eight(step.inputs[0]), c.buffer(step.name)
    if x.signed != y.signed:
        raise Unsupported("its result is encoded otherwise than its input")
    types = c.program.types[step.inputs[0]], c.program.types[step.name]
    check_samples_stay(step.node, *types)
    in_shape, out_shape = (memory.sample_shape(type_) for type_ in types)
    flat, _ = unit_index([1, *in_shape], [step.node], whole=False)
    start, end = memory.offsets_of(x), memory.offsets_of(y)
    origin = np.full(y.count, -1, np.int64)
    keep = flat >= 0
    origin[end[keep]] = start[flat[keep]]
    roles = _one(step)
    if x.count == y.count and np.array_equal(origin, np.arange(x.count)):
        c.alias[step.name] = step.inputs[0]
        return None
    loops = None
    filled = not keep.all()
    if not filled:
        loops = memory.copy_loops(flat, start, end, in_shape, out_shape)
    elif np.array_equal(np.sort(flat[keep]), np.arange(x.count)):  # a pad: every input once, zeros around
        where = end[keep][np.argsort(flat[keep], kind="stable")]
        loops = memory.copy_loops(np.arange(x.count), start, where, in_shape, in_shape)
    if loops is None:
        call = f"fq_move({{x}}, {{y}}, {y.count}, {{from}});"
        return _step(step, call, roles, "move", constants=[Constant("from", origin.astype(np.int32))])
    sizes, step_x, step_y, from_x, to_y = loops
    pad = [1] * (5 - len(sizes)), [0] * (5 - len(sizes))
    text = f"{{{_ints(*pad[0], *sizes)}}}, {{{_ints(*pad[1], *step_x)}}}, {{{_ints(*pad[1], *step_y)}}}"
    call = f"fq_copy({{x}} + {from_x}, {{y}} + {to_y}, &{{loops}});"
    kernels = ["copy"]
    if filled:
        call, kernels = f"fq_zero({{y}}, {y.count});\n    {call}", ["zero", "copy"]
    return _step(step, call, roles, *kernels, constants=[Constant("loops", struct="fq_loops", text=text)])


HANDLERS: dict[type[Instruction], Callable[[Lowering, Any], Step | None]] = {
    Quantize: _quantize, Dequantize: _dequantize, Contract: _contract, MatMul: _matmul, Lookup: _lookup, Add: _two, Mul: _two,
    Concat: _concat, SumPool: _sum_pool, MaxPool: _max_pool, Move: _move, Float: _float,
}  # fmt: skip
