"""From the fused float graph and its statistics to the 8-bit program (ratio 0; nothing is low yet)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bitdial.errors import CalibrationError, ConfigError
from bitdial.graph.interpreter import evaluate_node
from bitdial.graph.ir import BatchDim, Graph, Node, Shape, TensorType
from bitdial.graph.operators import CONTRACTIONS, MOVEMENT, UNARY
from bitdial.graph.verify import verify
from bitdial.quantization.calibration import TensorStatistics, choose_range
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.domains import (
    eight_bit_values,
    ends,
    float_reason,
    integer_layers,
    layer_kinds,
    matches,
    non_negative_values,
    pads_input,
)
from bitdial.quantization.effective_bits import low_limit
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
from bitdial.quantization.latency_table import layer_shape
from bitdial.quantization.program import Program, QParams, QuantizedLayer
from bitdial.quantization.targets import UNKNOWN, TargetWidth, target_width
from bitdial.quantization.weights import (
    accumulator_bound,
    check_accumulators,
    multipliers,
    quantize_bias,
    quantize_weight,
    weight_scales,
)
from bitdial.quantization.width import LayerWidth, choose_width

GroupBounds = Callable[[int, int, int], npt.NDArray[np.int32]]


def statistics_plan(graph: Graph, config: QuantizeConfig) -> dict[str, TensorStatistics]:
    """Empty statistics for every value that calibration must watch."""
    layers = integer_layers(graph, config.ignored)
    # All that can be 8-bit wherever the graph ends: an output that layers read as well stays in float, but layout may put a
    # reorder between it and the graph's end.
    inner = Graph(graph.inputs, [], graph.nodes, graph.constants, graph.types)
    eight = eight_bit_values(inner, layers, config.ignored)
    plan: dict[str, TensorStatistics] = {v: TensorStatistics() for v in eight}
    for node in graph.nodes:
        if node.name in eight and pads_input(node, graph):
            plan.setdefault(node.inputs[0], TensorStatistics())
        if node.name not in layers:
            continue
        for value in node.data_operands():
            plan.setdefault(value, TensorStatistics())
        if node.op != "matmul":
            x = node.inputs[0]
            plan[x] = TensorStatistics(axis=1 if node.op == "conv" else -1)
    return plan


def positions(node: Node, graph: Graph) -> int:
    """Output positions per sample of a conv or linear node (pixels or tokens)."""
    shape = graph.types[node.name].shape
    rest: Shape = (*shape[:1], *shape[2:]) if node.op == "conv" else shape[:-1]
    return math.prod(d.factor if isinstance(d, BatchDim) else d for d in rest)


def depth_bound(graph: Graph, node: Node) -> int:
    """Length of the contracted axis of a matmul."""
    depth = graph.types[node.inputs[0]].shape[-1]
    assert isinstance(depth, int)
    return depth


def eligibility(graph: Graph, config: QuantizeConfig) -> dict[str, str]:
    """Name of every integer layer -> "" if it may run low, else the reason why not."""
    layers = integer_layers(graph, config.ignored)
    first, last = ends(graph, layers)
    result: dict[str, str] = {}
    for node in graph.nodes:
        if node.name not in layers:
            continue
        pattern = matches(node, config.keep_8bit)
        if node.op == "matmul":
            reason = "product of two activations"
        elif pattern is not None:
            reason = f"keep_8bit pattern '{pattern}'"
        elif layer_kinds(node, graph)["depthwise"] and not config.lower_depthwise:
            reason = "depthwise"
        elif node.name in first and not config.lower_first_last:
            reason = "first layer"
        elif node.name in last and not config.lower_first_last:
            reason = "last layer"
        else:
            reason = ""
        result[node.name] = reason
    return result


def check_patterns(graph: Graph, config: QuantizeConfig) -> None:
    """Raise ConfigError for a keep_8bit or ignored pattern that matches no module path and no node name."""
    for setting in ("keep_8bit", "ignored"):
        for pattern in getattr(config, setting):
            if not any(matches(node, (pattern,)) for node in graph.nodes):
                known = sorted({n.source or n.name for n in graph.nodes if n.op in CONTRACTIONS})
                shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
                raise ConfigError(f"{setting} pattern '{pattern}' matches nothing; the layers are: {shown}")


def clamp_limits(activation: Mapping[str, Any] | None, encoding: QParams) -> tuple[int, int]:
    """(lo, hi), 8-bit integers: the range of an operator's result, narrowed by its fused activation."""
    lo, hi = encoding.qmin, encoding.qmax
    if activation is not None:
        lo = max(lo, 0 if activation["kind"] == "relu" else int(np.rint(activation["lo"] / encoding.scale)))
        if activation["kind"] == "clamp":
            hi = min(hi, int(np.rint(activation["hi"] / encoding.scale)))
    hi = max(hi, encoding.qmin)  # limits beyond what calibration saw: all values are then the same end of the range
    return min(lo, hi), hi


class _Builder:
    def __init__(
        self,
        graph: Graph,
        statistics: dict[str, TensorStatistics],
        config: QuantizeConfig,
        bounds: GroupBounds,
        scales: Mapping[str, float],
        weight_scale: Mapping[str, npt.NDArray[np.float32]],
        machine: str,
    ) -> None:
        self.given, self.given_weight = scales, weight_scale
        self.machine = machine if config.target == "cpu" else config.target
        self.graph, self.statistics, self.config, self.bounds = graph, statistics, config, bounds
        self.layers = integer_layers(graph, config.ignored)
        self.eight = eight_bit_values(graph, self.layers, config.ignored)
        self.non_negative = non_negative_values(graph)
        self.reasons = eligibility(graph, config)
        self.producers = graph.producers()
        self.shared: dict[str, QParams] = {}
        self.program = Program(
            list(graph.inputs), [], [], dict(graph.types), dict(graph.constants), {}, list(config.ratios), graph.structure,
            config.extraction, config.nested,
        )  # fmt: skip
        self.qparams, self.types = self.program.qparams, self.program.types

    def run(self) -> Program:
        if self.config.low_bits == "auto":  # otherwise no target decided anything
            self.program.provenance["target"] = {"name": self.config.target, "resolved": self.machine}
        self._share_concat_scales()
        for node in self.graph.nodes:
            self._node(node.name, node)
        self.program.outputs = [self._float(v) for v in self.graph.outputs]
        self._drop_unused()
        return self.program

    def _drop_unused(self) -> None:
        """Instructions, constants, types and encodings that nothing reads; the types of 8-bit values say so."""
        program = self.program
        needed, kept = set(program.outputs), []
        for step in reversed(program.instructions):
            if step.name in needed:
                kept.append(step)
                needed.update(step.operands())
        program.instructions = kept[::-1]
        alive = {step.name for step in kept} | set(program.inputs)
        program.constants = {k: v for k, v in program.constants.items() if k in needed}
        program.qparams = {k: q for k, q in program.qparams.items() if k in alive}
        program.types = {
            k: TensorType(t.shape, ("int8" if self.qparams[k].signed else "uint8") if k in self.qparams else t.dtype)
            for k, t in program.types.items()
            if k in alive
        }

    # -- encodings -----------------------------------------------------------------------------------------------------

    def _encoding(self, value: str, name: str | None = None) -> QParams:
        """Encoding of a value of the float graph; `name`: that of its 8-bit form, if different."""
        signed = value not in self.non_negative
        given = self.given.get(name or value)
        if given is not None:
            return QParams(float(np.float32(given)), signed)
        source = value
        while source not in self.statistics and (node := self.producers.get(source)) is not None and node.op == "gather":
            source = node.inputs[0]  # a reorder of the layout pass, made after calibration
        statistics = self.statistics.get(source)
        if statistics is None:
            raise CalibrationError(f"value '{value}' was not calibrated")
        levels = 127 if signed else 255
        top = choose_range(statistics, levels, self.config.calibration, self.config.percentile)
        return QParams(float(np.float32(top / levels if top > 0.0 else 1.0 / levels)), signed)

    def _share_concat_scales(self) -> None:
        """Inputs read by one concat only take its scale, so that they are copied, not rounded twice."""
        consumers = self.graph.consumers()
        for node in self.graph.nodes:
            if node.op != "concat" or node.name not in self.eight:
                continue
            encoding = self._encoding(node.name)
            self.shared[node.name] = encoding
            for value in node.inputs:
                producer = self.producers.get(value)
                private = len(consumers[value]) == 1 and producer is not None and producer.op not in MOVEMENT
                same_sign = (value in self.non_negative) != encoding.signed
                if private and same_sign and value not in self.shared:
                    self.shared[value] = encoding

    def _encode_output(self, node: Node) -> QParams:
        if node.op in MOVEMENT:
            return self.qparams[self._eight(node.inputs[0])]
        return self.shared.get(node.name) or self._encoding(node.name)

    # -- borders between 8-bit and float -------------------------------------------------------------------------------

    def _insert(self, step: Instruction) -> str:
        self.program.instructions.append(step)
        self.types[step.name] = self.graph.types[step.inputs[0]]
        return step.name

    def _eight(self, value: str) -> str:
        """The 8-bit form of a value."""
        if value in self.eight:
            return value
        name = f"{value}_q8"
        if name not in self.qparams:
            if value in self.graph.constants and value not in self.statistics:
                raise CalibrationError(
                    f"constant '{value}' feeds an integer layer: keep that layer in float with ignored"
                )
            q = self.qparams[name] = self._encoding(value, name)
            factor = float(np.float32(1.0 / np.float64(q.scale)))
            self._insert(Quantize(name, (value,), "", q.qmin, q.qmax, factor))
        return name

    def _float(self, value: str) -> str:
        """The float form of a value."""
        if value not in self.eight:
            return value
        name = f"{value}_float"
        if name not in self.types:
            self._insert(Dequantize(name, (value,), "", float(np.float32(self.qparams[value].scale))))
        return name

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def _node(self, name: str, node: Node) -> None:
        if name in self.eight:
            self.qparams[name] = self._encode_output(node)
        step: Instruction
        if name in self.layers:
            step = self._layer(node)
        elif name in self.eight:
            step = self._integer(node)
        else:
            step = self._in_float(node)
        self.program.instructions.append(step)

    def _in_float(self, node: Node) -> Float:
        inputs = [self._float(v) for v in node.inputs]
        residual = self._float(node.residual) if node.residual is not None else None
        new = Node(node.name, node.op, inputs, dict(node.attrs), node.weight, node.bias, residual, node.source)
        silent = self.graph.types[node.name].dtype != "float32" or node.op in MOVEMENT
        reason = "" if silent else float_reason(node, self.graph, self.config.ignored)
        return Float(node.name, tuple(inputs), node.source, new, reason)

    def _integer(self, node: Node) -> Instruction:
        """An operator other than a layer, between 8-bit tensors."""
        head: dict[str, Any] = {"name": node.name, "inputs": tuple(node.inputs), "source": node.source}
        if node.op == "max_pool":
            return MaxPool(**head, window=Window.of(node.attrs), ceil_mode=bool(node.attrs["ceil_mode"]))
        if node.op in MOVEMENT:
            head["inputs"] = tuple(self._eight(v) for v in node.inputs)
            return Move(**head, node=Node(node.name, node.op, list(head["inputs"]), dict(node.attrs), source=node.source))
        output, activation = self.qparams[node.name], node.attrs.get("activation")
        inputs = [self.qparams[v].scale for v in node.inputs]
        head["lo"], head["hi"] = clamp_limits(activation, output)
        if node.op in UNARY:
            return self._table(node, head)
        if node.op in ("mean", "avg_pool"):
            return self._sum_pool(node, head)
        if node.op == "mul":
            return Mul(**head, factor=float(np.float32(inputs[0] * inputs[1] / output.scale)))
        copies = node.op == "concat"
        factors = tuple(float(np.float32(1.0 if copies and s == output.scale else s / output.scale)) for s in inputs)
        if copies:
            return Concat(**head, activation=activation, factors=factors, axis=int(node.attrs["axis"]))
        return Add(**head, activation=activation, factors=factors)

    def _sum_pool(self, node: Node, head: dict[str, Any]) -> SumPool:
        window, axes, shape = None, None, self.graph.types[node.inputs[0]].shape
        if node.op == "avg_pool":
            window = Window.of(node.attrs)
            cells = math.prod(window.kernel)
        else:
            axes = tuple(sorted(int(v) % len(shape) for v in node.attrs["axes"]))
            cells = math.prod(d for i in axes if isinstance(d := shape[i], int))
        factor = float(np.float32(self.qparams[node.inputs[0]].scale / (cells * self.qparams[node.name].scale)))
        ceil, keepdim = bool(node.attrs.get("ceil_mode")), bool(node.attrs.get("keepdim", True))
        return SumPool(**head, factor=factor, window=window, ceil_mode=ceil, axes=axes, keepdim=keepdim, cells=cells)

    def _table(self, node: Node, head: dict[str, Any]) -> Lookup:
        source, target = self.qparams[node.inputs[0]], self.qparams[node.name]
        q = np.arange(-128, 128) if source.signed else np.arange(256)
        x = torch.from_numpy((q * source.scale).astype(np.float32))
        y = evaluate_node(node, [x], 1).double().numpy()
        entries = np.clip(np.rint(y / target.scale), target.qmin, target.qmax)
        table = entries.astype(np.int8 if target.signed else np.uint8)
        return Lookup(**head, table=table, offset=128 if source.signed else 0, function=node.op, attrs=dict(node.attrs))

    def _low_limits(self, node: Node, signed: bool) -> tuple[int, int]:
        """amax and wmax of a conv or linear layer."""
        config, table = self.config, self.config.latency_table
        if config.four_bits or config.low_bits != "auto" or self.reasons[node.name]:
            return low_limit(config.activation_bits, signed), low_limit(config.weight_bits, True)
        assert node.weight is not None
        shape = layer_shape(node, self.graph.types, self.graph.constants[node.weight].shape)
        width: LayerWidth | TargetWidth
        if table is not None:
            width = choose_width(shape, signed, table, config.auto_tolerance)
        else:
            one_shift = config.weight_granularity == "group"
            width = target_width(shape, signed, self.machine, group_size=config.group_size, one_shift=one_shift)
        self.program.provenance.setdefault("widths", {})[node.name] = width.summary()
        return width.amax, width.wmax

    def _layer(self, node: Node) -> Contract | MatMul:
        output = self.qparams.get(node.name)
        activation = node.attrs.get("activation")
        head: dict[str, Any] = {
            "name": node.name,
            "inputs": tuple(self._eight(v) for v in node.inputs),
            "source": node.source,
            "clamp": None if output is None else clamp_limits(activation, output),
            "activation": activation,
        }
        if node.op == "matmul":
            transpose, scale = bool(node.attrs.get("transpose_b")), float(node.attrs.get("scale", 1.0))
            layer = self._product(node, head["inputs"], scale)
            return MatMul(**head, layer=layer, transpose_b=transpose, scale=scale)
        assert node.weight is not None
        residual, residual_factor = None, 0.0
        if node.residual is not None:
            residual = self._float(node.residual) if output is None else self._eight(node.residual)
            if output is not None:
                residual_factor = float(np.float32(self.qparams[residual].scale / output.scale))
        layer = self._weighted(node, self.qparams[head["inputs"][0]], residual_factor)
        window = Window.of(node.attrs, self.graph.constants[node.weight].shape[2:]) if node.op == "conv" else None
        return Contract(**head, layer=layer, residual=residual, window=window)

    def _product(self, node: Node, inputs: tuple[str, ...], scale: float) -> QuantizedLayer:
        """The layer of a matmul between two activations."""
        output, (a, b) = self.qparams.get(node.name), (self.qparams[v] for v in inputs)
        n_ratios = len(self.program.ratios)
        bound = depth_bound(self.graph, node) * a.qmax * b.qmax
        check_accumulators(node.name, bound, np.zeros(1, np.int32))
        factor = a.scale * b.scale * scale
        macs = depth_bound(self.graph, node) * self.graph.types[node.name].elements
        return QuantizedLayer(
            node.name, "matmul", None, np.zeros(0, np.float32),
            np.array([factor / output.scale if output else factor], np.float32), 0.0, False, self.reasons[node.name], 0, 0,
            np.zeros(1, np.int32), np.zeros(0, np.uint8), np.zeros((0, 0), np.uint8), self.config.weight_granularity,
            np.zeros(0, np.int64), np.zeros((n_ratios, 0), np.bool_), np.zeros((n_ratios, 0), np.int32),
            accumulator_bound=bound, macs=macs,
        )  # fmt: skip

    def _weighted(self, node: Node, activation: QParams, residual_factor: float) -> QuantizedLayer:
        """The layer of a conv or linear node, everything at 8 bits. activation: of its input."""
        output, reason, n_ratios = self.qparams.get(node.name), self.reasons[node.name], len(self.program.ratios)
        assert node.weight is not None
        kinds = layer_kinds(node, self.graph)
        weight = self.graph.constants[node.weight]
        bias = self.graph.constants[node.bias] if node.bias is not None else None
        bounds = self.bounds(kinds["channels"], self.config.group_size, kinds["conv_groups"])
        n_groups, n_local = len(bounds) - 1, (len(bounds) - 1) // kinds["conv_groups"]
        scale = self.given_weight.get(node.name)
        if scale is None:
            pairs = bounds[: n_local + 1] if self.config.weight_pairs else None
            scale = weight_scales(weight, bias, activation.scale, pairs)
        w8 = quantize_weight(weight, scale)
        b = np.zeros(len(w8), np.int32) if bias is None else quantize_bias(bias, scale, activation.scale)
        where = positions(node, self.graph)
        per_channel = where * weight[0, 0].size * (len(weight) // kinds["conv_groups"])
        bound = accumulator_bound(w8, activation)
        check_accumulators(node.name, bound, b)
        amax, wmax = self._low_limits(node, activation.signed)
        return QuantizedLayer(
            name=node.name,
            kind=node.op,
            weight=w8,
            weight_scale=scale,
            multiplier=multipliers(scale, activation.scale, output),
            residual_factor=residual_factor,
            eligible=not reason,
            reason=reason,
            amax=amax,
            wmax=wmax,
            group_bounds=bounds,
            activation_shift=np.zeros(n_groups, np.uint8),
            weight_shift=np.zeros((len(w8), n_local), np.uint8),
            weight_granularity=self.config.weight_granularity,
            group_macs=np.diff(bounds).astype(np.int64) * per_channel,
            low=np.zeros((n_ratios, n_groups), np.bool_),
            bias=np.repeat(b[None], n_ratios, axis=0),
            conv_groups=kinds["conv_groups"],
            accumulator_bound=bound,
            macs=per_channel * kinds["channels"],
        )


def build_program(
    graph: Graph,
    statistics: dict[str, TensorStatistics],
    config: QuantizeConfig,
    bounds: GroupBounds,
    *,
    scales: Mapping[str, float] | None = None,
    weight_scale: Mapping[str, npt.NDArray[np.float32]] | None = None,
    isolate: bool = False,
    machine: str = UNKNOWN,
) -> Program:
    """The 8-bit program of a fused (and folded) float graph; all ratios start as copies of ratio 0.

    statistics: from calibration, for every value of `statistics_plan`. bounds: (channels, group size, convolution
    groups) -> int32 group borders. scales (8-bit value -> scale) and weight_scale (layer -> float32 [O]) replace what would be
    chosen, for finetuning that learns them. isolate: every integer layer between a quantize and a dequantize of its own, no value
    stays in 8 bits between operators (for comparison). machine: what target "cpu" means. Raises CalibrationError, ConfigError.
    """
    builder = _Builder(graph, statistics, config, bounds, scales or {}, weight_scale or {}, machine)
    if isolate:
        builder.eight = set()
    program = builder.run()
    check_types(program)
    return program


def check_types(program: Program) -> None:
    """Every 8-bit value has an 8-bit type and every integer layer 8-bit inputs (the program's own verifier)."""
    for step in program.instructions:
        if isinstance(step, (Contract, MatMul)):
            for value in step.inputs:
                if value not in program.qparams:
                    raise CalibrationError(f"layer '{step.name}' reads '{value}', which is not 8-bit")


__all__ = ["build_program", "eligibility", "positions", "statistics_plan", "verify"]
