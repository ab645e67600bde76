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
from bitdial.graph.passes.edit import drop_unused
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
)
from bitdial.quantization.effective_bits import low_limit
from bitdial.quantization.latency_table import layer_shape
from bitdial.quantization.program import Program, QParams, QuantizedLayer
from bitdial.quantization.weights import (
    accumulator_bound,
    check_accumulators,
    multipliers,
    quantize_bias,
    quantize_weight,
    weight_scales,
)
from bitdial.quantization.width import choose_width

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


def clamp_limits(node: Node, encoding: QParams) -> list[int]:
    """[lo, hi], 8-bit integers: the range of an operator's output, narrowed by its fused activation."""
    lo, hi = encoding.qmin, encoding.qmax
    activation = node.attrs.get("activation")
    if activation is not None:
        lo = max(lo, 0 if activation["kind"] == "relu" else int(np.rint(activation["lo"] / encoding.scale)))
        if activation["kind"] == "clamp":
            hi = min(hi, int(np.rint(activation["hi"] / encoding.scale)))
    return [lo, hi]


class _Builder:
    def __init__(
        self,
        graph: Graph,
        statistics: dict[str, TensorStatistics],
        config: QuantizeConfig,
        bounds: GroupBounds,
        scales: Mapping[str, float],
        weight_scale: Mapping[str, npt.NDArray[np.float32]],
    ) -> None:
        self.given, self.given_weight = scales, weight_scale
        self.graph, self.statistics, self.config, self.bounds = graph, statistics, config, bounds
        self.layers = integer_layers(graph, config.ignored)
        self.eight = eight_bit_values(graph, self.layers, config.ignored)
        self.non_negative = non_negative_values(graph)
        self.reasons = eligibility(graph, config)
        self.producers = graph.producers()
        self.qparams: dict[str, QParams] = {}
        self.shared: dict[str, QParams] = {}
        self.done: dict[str, str] = {}  # values already converted: "value->8" or "value->f"
        ratios = list(config.ratios)
        self.out = Graph(list(graph.inputs), [], [], dict(graph.constants), dict(graph.types), graph.structure)
        self.program = Program(self.out, ratios, {}, {}, extraction=config.extraction, nested=config.nested)

    def run(self) -> Program:
        self._share_concat_scales()
        for node in self.graph.nodes:
            self._node(node.name, node)
        self.out.outputs = [self._float(v) for v in self.graph.outputs]
        self.program.qparams = dict(self.qparams)
        drop_unused(self.out)
        self.out.types = {
            k: TensorType(t.shape, ("int8" if self.qparams[k].signed else "uint8") if k in self.qparams else t.dtype)
            for k, t in self.out.types.items()
        }
        for layer in self.program.layers:  # the program keeps these as integers
            node = self.out.node(layer)
            if node.weight is not None:
                node.weight = node.bias = None
        needed = {v for n in self.out.nodes for v in n.operands()} | set(self.out.outputs)
        self.out.constants = {k: v for k, v in self.out.constants.items() if k in needed}
        return self.program

    # -- encodings -----------------------------------------------------------------------------------------------------

    def _encoding(self, value: str, name: str | None = None) -> QParams:
        """Encoding of a value of the float graph; `name`: that of its 8-bit form, if different."""
        signed = value not in self.non_negative
        given = self.given.get(name or value)
        if given is not None:
            return QParams(float(np.float32(given)), signed)
        statistics = self.statistics.get(value)
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
            return self.qparams[node.inputs[0]]
        return self.shared.get(node.name) or self._encoding(node.name)

    # -- borders between 8-bit and float -------------------------------------------------------------------------------

    def _insert(self, name: str, op: str, value: str, factor: float) -> str:
        self.out.nodes.append(Node(name, op, [value]))
        self.out.types[name] = self.graph.types[value]
        self.program.factors[name] = np.array([factor], np.float32)
        return name

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
            self.qparams[name] = self._encoding(value, name)
            self._insert(name, "quantize", value, float(1.0 / np.float64(self.qparams[name].scale)))
        return name

    def _float(self, value: str) -> str:
        """The float form of a value."""
        if value not in self.eight:
            return value
        name = f"{value}_float"
        if name not in self.out.types:
            self._insert(name, "dequantize", value, self.qparams[value].scale)
        return name

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def _node(self, name: str, node: Node) -> None:
        new = Node(
            name, node.op, list(node.inputs), dict(node.attrs), node.weight, node.bias, node.residual, node.source
        )
        integer = name in self.layers
        if name in self.eight:
            self.qparams[name] = self._encode_output(node)
            new.attrs["clamp"] = clamp_limits(node, self.qparams[name])
        if integer:
            new.inputs = [self._eight(v) for v in node.inputs]
            if node.residual is not None:
                new.residual = self._eight(node.residual) if name in self.eight else self._float(node.residual)
            self._layer(node, new)
        elif name in self.eight:
            self._factors(node, new)
        else:
            new.inputs = [self._float(v) for v in node.inputs]
            if node.residual is not None:
                new.residual = self._float(node.residual)
            if self.graph.types[name].dtype == "float32" and node.op not in MOVEMENT:
                self.program.float_reasons[name] = float_reason(node, self.graph, self.config.ignored)
        self.out.nodes.append(new)

    def _factors(self, node: Node, new: Node) -> None:
        scale = self.qparams[node.name].scale
        inputs = [self.qparams[v].scale for v in node.inputs]
        if node.op in UNARY:
            self._table(node, new)
        elif node.op in ("add", "concat"):
            factors = [1.0 if node.op == "concat" and s == scale else s / scale for s in inputs]
            self.program.factors[node.name] = np.array(factors, np.float32)
        elif node.op == "mul":
            self.program.factors[node.name] = np.array([inputs[0] * inputs[1] / scale], np.float32)
        elif node.op in ("mean", "avg_pool"):
            if node.op == "mean":
                shape = self.graph.types[node.inputs[0]].shape
                cells = math.prod(d for i in node.attrs["axes"] if isinstance(d := shape[i], int))
            else:
                cells = math.prod(node.attrs["kernel"])
            self.program.factors[node.name] = np.array([inputs[0] / (cells * scale)], np.float32)

    def _table(self, node: Node, new: Node) -> None:
        source, target = self.qparams[node.inputs[0]], self.qparams[node.name]
        q = np.arange(-128, 128) if source.signed else np.arange(256)
        x = torch.from_numpy((q * source.scale).astype(np.float32))
        y = evaluate_node(node, [x], 1).double().numpy()
        entries = np.clip(np.rint(y / target.scale), target.qmin, target.qmax)
        self.program.tables[node.name] = entries.astype(np.int8 if target.signed else np.uint8)
        new.attrs = {"function": node.op, **node.attrs}
        new.op = "table"

    def _low_limits(self, node: Node, signed: bool) -> tuple[int, int]:
        """amax and wmax of a conv or linear layer."""
        table = self.config.latency_table
        if self.config.low_bits != "auto" or table is None or self.reasons[node.name]:
            return low_limit(self.config.activation_bits, signed), low_limit(self.config.weight_bits, True)
        assert node.weight is not None
        shape = layer_shape(node, self.graph.types, self.graph.constants[node.weight].shape)
        width = choose_width(shape, signed, table, self.config.auto_tolerance)
        self.program.provenance.setdefault("widths", {})[node.name] = width.summary()
        return width.amax, width.wmax

    def _layer(self, node: Node, new: Node) -> None:
        output = self.qparams.get(node.name)
        activation = self.qparams[new.inputs[0]]
        n_ratios = len(self.program.ratios)
        reason = self.reasons[node.name]
        if node.op == "matmul":
            other = self.qparams[new.inputs[1]]
            bound = depth_bound(self.graph, node) * activation.qmax * other.qmax
            check_accumulators(node.name, bound, np.zeros(1, np.int32))
            factor = activation.scale * other.scale * node.attrs.get("scale", 1.0)
            out_shape = self.graph.types[node.name].shape
            macs = depth_bound(self.graph, node) * math.prod(d.factor if isinstance(d, BatchDim) else d for d in out_shape)
            self.program.layers[node.name] = QuantizedLayer(
                node.name, "matmul", None, np.zeros(0, np.float32),
                np.array([factor / output.scale if output else factor], np.float32), 0.0, False, reason, 0, 0,
                np.zeros(1, np.int32), np.zeros(0, np.uint8), np.zeros((0, 0), np.uint8), self.config.weight_granularity,
                np.zeros(0, np.int64), np.zeros((n_ratios, 0), np.bool_), np.zeros((n_ratios, 0), np.int32),
                accumulator_bound=bound, macs=macs,
            )  # fmt: skip
            return
        assert node.weight is not None
        kinds = layer_kinds(node, self.graph)
        weight = self.graph.constants[node.weight]
        bias = self.graph.constants[node.bias] if node.bias is not None else None
        scale = self.given_weight.get(node.name, weight_scales(weight, bias, activation.scale))
        w8 = quantize_weight(weight, scale)
        b = np.zeros(len(w8), np.int32) if bias is None else quantize_bias(bias, scale, activation.scale)
        bounds = self.bounds(kinds["channels"], self.config.group_size, kinds["conv_groups"])
        n_groups, n_local = len(bounds) - 1, (len(bounds) - 1) // kinds["conv_groups"]
        where = positions(node, self.graph)
        per_channel = where * weight[0, 0].size * (len(weight) // kinds["conv_groups"])
        bound = accumulator_bound(w8, activation)
        check_accumulators(node.name, bound, b)
        amax, wmax = self._low_limits(node, activation.signed)
        residual = 0.0
        if node.residual is not None and output is not None:
            assert new.residual is not None
            residual = float(np.float32(self.qparams[new.residual].scale / output.scale))
        self.program.layers[node.name] = QuantizedLayer(
            name=node.name,
            kind=node.op,
            weight=w8,
            weight_scale=scale,
            multiplier=multipliers(scale, activation.scale, output),
            residual_factor=residual,
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
) -> Program:
    """The 8-bit program of a fused (and folded) float graph; all ratios start as copies of ratio 0.

    statistics: from calibration, for every value of `statistics_plan`. bounds: (channels, group size, convolution
    groups) -> int32 group borders. scales (8-bit value -> scale) and weight_scale (layer -> float32 [O]) replace what would be
    chosen, for finetuning that learns them. isolate: every integer layer between a quantize and a dequantize of its own, no value
    stays in 8 bits between operators (for comparison). Raises CalibrationError and ConfigError.
    """
    builder = _Builder(graph, statistics, config, bounds, scales or {}, weight_scale or {})
    if isolate:
        builder.eight = set()
    program = builder.run()
    check_types(program)
    return program


def check_types(program: Program) -> None:
    """Every 8-bit value has an 8-bit type and every integer layer 8-bit inputs (the program's own verifier)."""
    for name, layer in program.layers.items():
        node = program.graph.node(name)
        assert node.op in CONTRACTIONS and layer.kind == node.op
        for value in node.inputs:
            if value not in program.qparams:
                raise CalibrationError(f"layer '{name}' reads '{value}', which is not 8-bit")


def describe_precision(program: Program) -> dict[str, Any]:
    """Counts for reports: integer layers, eligible ones, float operators, quantize/dequantize nodes."""
    ops = [n.op for n in program.graph.nodes]
    return {
        "integer_layers": len(program.layers),
        "eligible_layers": sum(layer.eligible for layer in program.layers.values()),
        "float_operators": len(program.float_reasons),
        "quantize": ops.count("quantize"),
        "dequantize": ops.count("dequantize"),
        "reorders": ops.count("gather"),
    }


__all__ = ["build_program", "describe_precision", "eligibility", "positions", "statistics_plan", "verify"]
