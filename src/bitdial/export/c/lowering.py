"""From a program to steps of the exported function; every operator without a C form is collected and named in one error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitdial.engines.cpu import compiler
from bitdial.errors import ExportError
from bitdial.export.c import weights
from bitdial.export.c.literals import float_literal
from bitdial.export.c.steps import Constant, Lowered, Place, Step
from bitdial.graph.ir import MOVEMENT_OPS, BatchDim, Node
from bitdial.quantization.program import Program

SHOWN = 12  # operators named in an error
WINDOW_LIMIT = 2**15  # sizes of windows, strides and pads; keeps products of them within int32


class _Missing(Exception):
    """A node has no C form; the text says why."""


def lower_program(program: Program, ratios: Sequence[int]) -> Lowered:
    """Steps for the ratio indices `ratios`. Raises ExportError naming every operator that C export lacks."""
    return _Lowering(program, list(ratios)).run()


def _ints(*values: int) -> str:
    return ", ".join(str(int(v)) for v in values)


class _Lowering:
    def __init__(self, program: Program, ratios: list[int]) -> None:
        self.program, self.graph, self.ratios = program, program.graph, ratios
        self.places: dict[str, Place] = {}
        self.alias: dict[str, str] = {}
        self.steps: list[Step] = []
        self.tables: dict[tuple[int, int, bool], str] = {}
        self.rows: set[int] = set()  # limits of low weights that have a table
        shifts = [int(v.weight_shift.max()) for v in program.layers.values() if v.weight_shift.size and v.low.any()]
        self.top_shift = max(shifts, default=0)

    def run(self) -> Lowered:
        for name in self.graph.inputs:
            self._input(name)
        problems: list[str] = []
        broken: set[str] = set()
        for node in self.graph.nodes:
            if any(v in broken for v in node.data_operands()):
                broken.add(node.name)  # only what is missing itself is named
            try:
                step = self._node(node)
            except (_Missing, compiler.NotCompiled) as reason:
                if not (node.name in broken and str(reason).startswith("it reads")):
                    where = f", module '{node.source}'" if node.source else ""
                    function = node.attrs.get("function", node.op)
                    problems.append(f"'{node.name}' ({function}{where}): {reason}")
                broken.add(node.name)
                continue
            if step is not None:
                self.steps.append(step)
        if problems:
            more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise ExportError(
                f"C export lacks {len(problems)} operator(s) of this model: {'; '.join(problems[:SHOWN])}{more}. It covers "
                "8-bit convolutional networks; run this one with the cpu or reference engine, or export it to ONNX"
            )
        for output in self.graph.outputs:
            place = self.places.get(output)
            if place is None or not place.is_float:
                raise ExportError(f"output '{output}' is not a float value that C export computes")
        return Lowered(
            self.steps, self.places, self.alias, list(self.graph.inputs), list(self.graph.outputs),
            [self.program.ratios[r] for r in self.ratios], self._quantized_input(),
        )  # fmt: skip

    # ---- values ------------------------------------------------------------------------------------------------------

    def _input(self, name: str) -> None:
        type_ = self.graph.types[name]
        if type_.dtype != "float32":
            raise ExportError(f"input '{name}' is {type_.dtype}; C export takes float32 inputs")
        try:
            self._place(name)
        except compiler.NotCompiled as reason:
            raise ExportError(f"input '{name}' of type {type_} cannot be exported: {reason}") from None

    def _place(self, name: str) -> Place:
        place = self.places.get(name)
        if place is not None:
            return place
        if self.graph.is_constant(name):
            raise _Missing("it reads a constant")
        type_ = self.graph.types[name]
        q = self.program.qparams.get(name)
        if q is None and type_.dtype != "float32":
            raise _Missing(f"it computes {type_.dtype}")
        factor, h, w, c, first = compiler.physical(type_)
        if factor != 1:
            raise _Missing("it folds other axes into the batch")
        place = Place(h, w, c, first, q is not None and q.signed, q is None)
        if place.size >= 2**31 or not place.size:
            raise _Missing("its result is empty or has 2 GiB or more")
        self.places[name] = place
        return place

    def _read(self, name: str) -> Place:
        if name not in self.places:
            raise _Missing(f"it reads '{name}', which C export does not compute")
        return self.places[name]

    def _eight(self, name: str) -> Place:
        place = self._read(name)
        if place.is_float:
            raise _Missing(f"it reads '{name}' in float")
        return place

    def _quantized_input(self) -> str | None:
        """The first step, if it quantizes the only input and nothing else reads that."""
        if len(self.graph.inputs) != 1 or not self.steps or self.steps[0].op != "quantize":
            return None
        name = self.graph.inputs[0]
        readers = [s for s in self.steps if name in s.reads]
        return self.steps[0].name if len(readers) == 1 and name not in self.graph.outputs else None

    # ---- nodes -------------------------------------------------------------------------------------------------------

    def _step(self, node: Node, call: str, roles: dict[str, str], *kernels: str, **more: Any) -> Step:
        return Step(node.name, node.op, node.source, call, roles, node.name, list(kernels), **more)

    def _node(self, node: Node) -> Step | None:
        if node.name in self.program.layers:
            return self._layer(node)
        factor = [float(f) for f in self.program.factors.get(node.name, [])]
        if node.op == "quantize":
            x = self._read(node.inputs[0])
            if not x.is_float:
                raise _Missing("its input is not float")
            q, y = self.program.qparams[node.name], self._place(node.name)
            limits = f"{float_literal(factor[0])}, {float_literal(q.qmin)}, {float_literal(q.qmax)}"
            call = f"fq_quantize({{x}}, {{y}}, {_ints(*y.planes)}, {limits});"
            return self._step(node, call, {"x": node.inputs[0], "y": node.name}, "quantize")
        if node.op == "dequantize":
            x = self._eight(node.inputs[0])
            self._place(node.name)
            call = f"fq_dequantize({{x}}, {{y}}, {_ints(*x.planes)}, {float_literal(factor[0])}, {int(x.signed)});"
            return self._step(node, call, {"x": node.inputs[0], "y": node.name}, "dequantize")
        if node.name not in self.program.qparams:
            return self._float(node)
        if node.op == "table":
            return self._table(node)
        if node.op in ("add", "mul"):
            return self._two(node, factor)
        if node.op == "concat":
            return self._concat(node, factor)
        if node.op in ("mean", "avg_pool"):
            return self._average(node, factor[0])
        if node.op == "max_pool":
            return self._max_pool(node)
        if node.op in MOVEMENT_OPS:
            return self._move(node)
        raise _Missing("it has no C form")

    def _float(self, node: Node) -> Step:
        if node.op != "reshape":
            reason = self.program.float_reasons.get(node.name, "")
            raise _Missing(f"it runs in float{f' ({reason})' if reason else ''}")
        x = self._read(node.inputs[0])
        y = self._place(node.name)
        if not x.is_float or x.count != y.count:
            raise _Missing("it moves values between samples")
        return self._step(
            node, f"fq_copy_float({{x}}, {{y}}, {x.count});", {"x": node.inputs[0], "y": node.name}, "copy_float"
        )

    def _limits(self, node: Node) -> tuple[float, float]:
        lo, hi = node.attrs["clamp"]
        return float(lo), float(hi)

    def _layer(self, node: Node) -> Step:
        layer = self.program.layers[node.name]
        if layer.weight is None:
            raise _Missing("product of two activations")
        if node.op == "conv" and layer.weight.ndim != 4:
            raise _Missing(f"convolution over {layer.weight.ndim - 2} axes")
        x = self._eight(node.inputs[0])
        if node.op == "linear" and x.channels_first:
            raise _Missing("linear layer over the last of four axes")
        low = layer.low[self.ratios]
        if self.program.extraction == "dynamic" and low.any():
            raise _Missing("dynamic extraction; quantize with extraction='static', or export ratio 0 alone")
        roles = {"x": node.inputs[0], "y": node.name}
        residual = None
        if node.residual is not None:
            residual = self._read(node.residual)
            roles["r"] = node.residual
        y = self._place(node.name)
        if residual is not None and self.graph.types[node.residual or ""].shape != self.graph.types[node.name].shape:
            raise _Missing("its residual is broadcast")
        if residual is not None and not y.is_float and residual.is_float:
            raise _Missing("its residual is float and its result is not")
        if residual is not None and y.is_float and not residual.is_float:
            raise _Missing("its residual is 8-bit and its result is not")
        packed = weights.pack_layer(layer, self.program.qparams[node.inputs[0]], self.ratios, y.is_float)
        limits, lo, hi = self._layer_limits(node)
        weight_shape = layer.weight.shape
        kernel = weight_shape[2:] if node.op == "conv" else (1, 1)
        a = node.attrs if node.op == "conv" else {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
        if max(*kernel, *a["stride"], *a["padding"], *a["dilation"]) > WINDOW_LIMIT:
            raise _Missing("its window is too large")
        constants: list[Constant] = [
            Constant("weight", packed.weight),
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
                    table = self._lower_table(shift, layer.amax, x.signed, constants)
                numbers = (packed.group_first[g], packed.group_width[g], packed.group_offset[g], packed.group_length[g])
                rows.append(f"{{{_ints(*numbers)}, {table}, {shift}}}")
            constants.append(Constant("groups", struct=f"fq_group:{len(rows)}", text=",\n    ".join(rows)))
        if packed.low is not None:
            constants.append(Constant("low", packed.low))
            low_name = "{low}"
        if packed.kind == weights.LOWERS:
            rows_name = f"fq_lower_w{layer.wmax}"
            if layer.wmax not in self.rows:
                self.rows.add(layer.wmax)
                constants.append(Constant("=" + rows_name, weights.weight_tables(self.top_shift, layer.wmax)))
        if packed.fours:
            kernels.insert(2, "fours")
        if packed.weight_shift is not None:
            constants.append(Constant("shift", packed.weight_shift))
            shift_name = "{shift}"
        groups_per = max(1, len(packed.group_width) // layer.conv_groups)
        outputs = weight_shape[0]
        fields = [
            ".weight = {weight}, .bias = {bias}, .multiplier = {multiplier}",
            f".groups = {groups_name}, .weight_shift = {shift_name}, .lower_weight = {rows_name}, .low = {low_name}",
            f".row = {packed.row}, .stored_row = {packed.stored_row}, .makes = {int(makes)}, .block = {{block}}, "
            f".fours = {int(packed.fours)}, .shift_rows = {packed.shift_rows}",
            f".in_h = {x.h}, .in_w = {x.w}, .channels = {x.c}, .out_h = {y.h}, .out_w = {y.w}, .outputs = {outputs}",
            f".kernel_h = {kernel[0]}, .kernel_w = {kernel[1]}, .stride_h = {a['stride'][0]}, .stride_w = {a['stride'][1]}, "
            f".pad_h = {a['padding'][0]}, .pad_w = {a['padding'][1]}, "
            f".dilation_h = {a['dilation'][0]}, .dilation_w = {a['dilation'][1]}",
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
        if residual is not None and residual.size == y.size and node.residual != node.inputs[0]:
            overlays.append(node.residual or "")
        step = self._step(
            node, call, roles, *kernels, constants=constants, overlays=overlays, layer=packed, macs=int(layer.macs)
        )
        return step

    def _lower_table(self, shift: int, limit: int, signed: bool, constants: list[Constant]) -> str:
        key = (shift, limit, signed)
        if key not in self.tables:
            self.tables[key] = f"fq_lower_{'s' if signed else 'u'}{limit}_{shift}"
            constants.append(Constant("=" + self.tables[key], weights.lower_table(shift, limit, signed)))
        return self.tables[key]

    def _layer_limits(self, node: Node) -> tuple[int, float, float]:
        """(which limits a float output has: 1 lo, 2 hi; lo; hi)."""
        if node.name in self.program.qparams:
            return 0, *self._limits(node)
        activation = node.attrs.get("activation")
        if activation is None:
            return 0, 0.0, 0.0
        if activation["kind"] == "relu":
            return 1, 0.0, 0.0
        if activation["kind"] == "clamp":
            return 3, float(activation["lo"]), float(activation["hi"])
        raise _Missing(f"activation {activation['kind']} on a float output")

    def _table(self, node: Node) -> Step:
        x = self._eight(node.inputs[0])
        self._place(node.name)
        values = self.program.tables[node.name].astype(np.int16)
        if x.signed:
            values = np.roll(values, -128)  # indexed by the stored byte
        constant = Constant("table", (values & 255).astype(np.uint8))
        call = f"fq_table({{x}}, {{y}}, {x.count}, {{table}});"
        return self._step(
            node, call, {"x": node.inputs[0], "y": node.name}, "table", constants=[constant], overlays=[node.inputs[0]]
        )

    def _two(self, node: Node, factor: list[float]) -> Step:
        places = [self._eight(v) for v in node.inputs]
        y = self._place(node.name)
        if any(p.channels_first != y.channels_first for p in places):
            raise _Missing("its operands differ in rank")
        sizes, steps = self._broadcast(node)
        lo, hi = self._limits(node)
        second = factor[1] if node.op == "add" else 0.0
        text = (
            f"{{{_ints(*sizes)}}}, {{{_ints(*steps[0])}}}, {{{_ints(*steps[1])}}}, {int(places[0].signed)}, "
            f"{int(places[1].signed)}, {float_literal(factor[0])}, {float_literal(second)}, {float_literal(lo)}, "
            f"{float_literal(hi)}"
        )
        roles = {"a": node.inputs[0], "b": node.inputs[1], "y": node.name}
        full = [v for v, p in zip(node.inputs, places, strict=True) if p.count == y.count]
        if len(full) == 2 and node.inputs[0] == node.inputs[1]:
            full = full[:1]
        return self._step(
            node, f"fq_{node.op}({{a}}, {{b}}, {{y}}, &{{pair}});", roles, "binary", node.op,
            constants=[Constant("pair", struct="fq_pair", text=text)], overlays=full,
        )  # fmt: skip

    def _broadcast(self, node: Node) -> tuple[list[int], list[list[int]]]:
        """Four sizes and the steps of both operands, in the order of memory; axes that go together are joined."""

        def memory(value: str, rank: int) -> list[int]:
            shape = [int(d) for d in self.graph.types[value].shape[1:]]  # type: ignore[arg-type]
            shape = [1] * (rank - len(shape)) + shape
            return [*shape[1:], shape[0]] if rank == 3 else shape

        out_shape = self.graph.types[node.name].shape
        for value in node.inputs:
            shape = self.graph.types[value].shape
            if len(shape) != len(out_shape) or not isinstance(shape[0], BatchDim):
                raise _Missing("its operands differ in rank")
        out = memory(node.name, len(out_shape) - 1)
        operands = [memory(v, len(out_shape) - 1) for v in node.inputs]
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
            raise _Missing("it broadcasts over too many axes")
        axes = [(1, (True, True))] * (4 - len(axes)) + axes
        steps: list[list[int]] = []
        for which in (0, 1):
            pitch, own = 1, []
            for size, moves in reversed(axes):
                own.append(pitch if moves[which] else 0)
                pitch *= size if moves[which] else 1
            steps.append(own[::-1])
        return [size for size, _ in axes], steps

    def _concat(self, node: Node, factor: list[float]) -> Step:
        y = self._place(node.name)
        shape = self.graph.types[node.name].shape
        axis = int(node.attrs["axis"]) % len(shape)
        if axis == 0:
            raise _Missing("concatenation of batches")
        lo, hi = self._limits(node)
        sizes = [int(d) for d in shape[1:]]  # type: ignore[arg-type]
        memory = axis - 1
        if y.channels_first:
            sizes, memory = [*sizes[1:], sizes[0]], (axis - 2) % 3
        outer, pitch = math.prod(sizes[:memory]), math.prod(sizes[memory:])
        calls, roles, offset = [], {"y": node.name}, 0
        for i, (value, f) in enumerate(zip(node.inputs, factor, strict=True)):
            x = self._eight(value)
            roles[f"x{i}"] = value
            inner = x.count // outer
            target = f"{{y}} + {offset}" if offset else "{y}"
            calls.append(
                f"fq_rescale({{x{i}}}, {target}, {_ints(outer, inner, pitch)}, {float_literal(f)}, {int(x.signed)}, "
                f"{float_literal(lo)}, {float_literal(hi)});"
            )
            offset += inner
        return self._step(node, "\n    ".join(calls), roles, "rescale")

    def _window(self, node: Node, x: Place, y: Place, sizes: list[int], factor: float, lo: float, hi: float) -> Step:
        """sizes: kernel, stride, pad, dilation, each (h, w)."""
        if max(sizes) > WINDOW_LIMIT:
            raise _Missing("its window is too large")
        text = f"{_ints(x.h, x.w, x.c, y.h, y.w)}, {_ints(*sizes)}, {int(x.signed)}, "
        text += f"{float_literal(factor)}, {float_literal(lo)}, {float_literal(hi)}"
        name = "fq_max_pool" if node.op == "max_pool" else "fq_sum_pool"
        inside = sizes[4] == sizes[5] == 0 and not node.attrs.get("ceil_mode") and y.size <= x.size
        return self._step(
            node, f"{name}({{x}}, {{y}}, &{{window}});", {"x": node.inputs[0], "y": node.name}, "window", name[3:],
            constants=[Constant("window", struct="fq_window", text=text)], overlays=[node.inputs[0]] if inside else [],
        )  # fmt: skip

    def _average(self, node: Node, factor: float) -> Step:
        x = self._eight(node.inputs[0])
        rank = len(self.graph.types[node.inputs[0]].shape)
        lo, hi = self._limits(node)
        y = self._place(node.name)
        if node.op == "mean":
            axes = sorted(int(v) % rank for v in node.attrs["axes"])
            if (rank, axes) not in ((4, [2, 3]), (3, [1])):
                raise _Missing(f"mean over axes {axes} of {rank}")
            if x.h * x.w > 2**23:
                raise _Missing("mean of more than 2^23 values")
            target = Place(1, 1, x.c, y.channels_first, y.signed, False)
            return self._window(node, x, target, [x.h, x.w, 1, 1, 0, 0, 1, 1], factor, lo, hi)
        if rank != 4:
            raise _Missing("pooling over one or three axes")
        sizes = [v for k in ("kernel", "stride", "padding") for v in _pair(node.attrs[k])]
        return self._window(node, x, y, [*sizes, 1, 1], factor, lo, hi)

    def _max_pool(self, node: Node) -> Step:
        x = self._eight(node.inputs[0])
        if len(self.graph.types[node.name].shape) != 4:
            raise _Missing("pooling over one or three axes")
        y = self._place(node.name)
        if x.signed != y.signed:
            raise _Missing("its result is encoded otherwise than its input")
        sizes = [v for k in ("kernel", "stride", "padding", "dilation") for v in _pair(node.attrs[k])]
        return self._window(node, x, y, sizes, 0.0, 0.0, 0.0)

    def _move(self, node: Node) -> Step | None:
        x, y = self._eight(node.inputs[0]), self._place(node.name)
        if x.signed != y.signed:
            raise _Missing("its result is encoded otherwise than its input")
        in_shape = [int(d) for d in self.graph.types[node.inputs[0]].shape[1:]]  # type: ignore[arg-type]
        out_shape = [int(d) for d in self.graph.types[node.name].shape[1:]]  # type: ignore[arg-type]
        source = compiler.moved(node, np.arange(math.prod(in_shape)).reshape(1, *in_shape))
        if source is None or list(source.shape[1:]) != out_shape:
            raise _Missing(f"this {node.op} moves values between samples, or has no C form")
        flat = source.reshape(-1)
        start, end = _offsets(x), _offsets(y)
        origin = np.full(y.count, -1, np.int64)
        keep = flat >= 0
        origin[end[keep]] = start[flat[keep]]
        roles = {"x": node.inputs[0], "y": node.name}
        if x.count == y.count and np.array_equal(origin, np.arange(x.count)):
            self.alias[node.name] = node.inputs[0]
            return None
        loops = None
        filled = not keep.all()
        if not filled:
            loops = compiler.copy_loops(flat, start, end, in_shape, out_shape)
        elif np.array_equal(np.sort(flat[keep]), np.arange(x.count)):  # a pad: every input once, zeros around
            where = end[keep][np.argsort(flat[keep], kind="stable")]
            loops = compiler.copy_loops(np.arange(x.count), start, where, in_shape, in_shape)
        if loops is None:
            call = f"fq_move({{x}}, {{y}}, {y.count}, {{from}});"
            return self._step(node, call, roles, "move", constants=[Constant("from", origin.astype(np.int32))])
        sizes, step_x, step_y, from_x, to_y = loops
        pad = [1] * (5 - len(sizes)), [0] * (5 - len(sizes))
        text = f"{{{_ints(*pad[0], *sizes)}}}, {{{_ints(*pad[1], *step_x)}}}, {{{_ints(*pad[1], *step_y)}}}"
        call = f"fq_copy({{x}} + {from_x}, {{y}} + {to_y}, &{{loops}});"
        kernels = ["copy"]
        if filled:
            call, kernels = f"fq_zero({{y}}, {y.count});\n    {call}", ["zero", "copy"]
        return self._step(node, call, roles, *kernels, constants=[Constant("loops", struct="fq_loops", text=text)])


def _offsets(place: Place) -> compiler.Offsets:
    shape = compiler.Place(0, place.h, place.w, place.c, 1, place.channels_first, (0, 0), place.signed, place.is_float)
    return compiler.offsets_of(shape)


def _pair(values: Any) -> tuple[int, int]:
    if isinstance(values, int):
        return values, values
    a, b = values
    return int(a), int(b)
