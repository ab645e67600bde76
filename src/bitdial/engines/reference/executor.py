"""Runs a program node by node in exact integers. The engine, calibration of the bias table and the search build on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitdial.engines.reference import arithmetic
from bitdial.errors import EngineError
from bitdial.graph.batch_axis import BatchAxis, batch_axes
from bitdial.graph.inputs import check_inputs
from bitdial.graph.interpreter import (
    apply_activation,
    constant_tensors,
    evaluate_node,
    last_uses,
    move,
)
from bitdial.graph.ir import MOVEMENT_OPS, Node
from bitdial.quantization.program import Program, QuantizedLayer
from bitdial.quantization.weights import low_weights


@dataclass
class Setting:
    """How one layer runs in one call: its weights with low groups read back, its lowering vectors, its bias row.

    weight: float32 integers. inverse, power, low, high: float32 [C], or None if no group is low. bias: float64 [O].
    bound: largest |accumulator| with these weights.
    """

    weight: Tensor
    inverse: Tensor | None
    power: Tensor | None
    low: Tensor | None
    high: Tensor | None
    bias: Tensor
    bound: int
    low_channels: Tensor | None = None
    small: bool = False  # |acc| + |bias| < 2^24


class LayerState:
    """A layer's tensors on the device; makes `Setting`s for any set of low groups."""

    def __init__(self, layer: QuantizedLayer, axis: int, device: torch.device, signed: bool, qmax: int) -> None:
        assert layer.weight is not None
        self.layer, self.axis, self.device, self.signed, self.qmax = layer, axis, device, signed, qmax
        n_local = layer.weight_shift.shape[1]
        local = layer.group_bounds[: n_local + 1] if n_local else layer.group_bounds[:1]
        read_back = low_weights(layer.weight, local, layer.weight_shift, layer.wmax) if n_local else layer.weight
        self.weight8 = torch.from_numpy(layer.weight).to(device)
        self.weight_low = torch.from_numpy(read_back).to(device)
        self.groups = torch.from_numpy(layer.channel_groups()).to(device)
        self.shift = torch.from_numpy(layer.activation_shift.astype(np.float32)).to(device)

    def channel_shape(self, ndim: int) -> list[int]:
        shape = [1] * ndim
        shape[self.axis % ndim] = -1
        return shape

    def setting(self, low_groups: Tensor, bias: Tensor) -> Setting:
        """low_groups: bool [n_groups]; bias: float64 [O]."""
        if not bool(low_groups.any()):
            weight = self.weight8.float()
            return self._finish(Setting(weight, None, None, None, None, bias, 0))
        channels = low_groups[self.groups]  # bool [C]
        groups = self.layer.conv_groups
        outputs, per_group = self.weight8.shape[:2]
        mask = channels.reshape(groups, 1, per_group).expand(groups, outputs // groups, per_group)
        mask = mask.reshape(outputs, per_group, *[1] * (self.weight8.dim() - 2))
        weight = torch.where(mask, self.weight_low, self.weight8).float()
        shift = torch.where(channels, self.shift[self.groups], 0.0)
        limit = torch.where(channels, float(self.layer.amax), float(self.qmax))
        floor = -limit if self.signed else torch.zeros_like(limit)
        return self._finish(
            Setting(weight, torch.exp2(-shift), torch.exp2(shift), floor, limit, bias, 0, low_channels=channels)
        )

    def _finish(self, setting: Setting) -> Setting:
        rows = setting.weight.abs().flatten(1).sum(dim=1)
        setting.bound = int(rows.max()) * self.qmax if rows.numel() else 0
        top = setting.bound + int(setting.bias.abs().max()) if setting.bias.numel() else setting.bound
        setting.small = top < arithmetic.EXACT_FLOAT32
        setting.weight = arithmetic.channels_last(setting.weight)
        return setting


class Executor:
    """Evaluates the nodes of a program. Thread-safe: all state is written at construction or per call."""

    def __init__(self, program: Program, device: torch.device | str = "cpu") -> None:
        self.program, self.device = program, torch.device(device)
        self.graph = program.graph
        self.constants = constant_tensors(self.graph, self.device)
        self.last_use = last_uses(self.graph)
        dynamic = program.extraction == "dynamic"
        self.batch_axes: dict[str, BatchAxis | None] = batch_axes(self.graph) if dynamic else {}
        self.layers: dict[str, LayerState] = {}
        self.factors = {k: [float(f) for f in v] for k, v in program.factors.items()}
        self.tables = {k: torch.from_numpy(v.astype(np.float32)).to(self.device) for k, v in program.tables.items()}
        self.multipliers: dict[str, Tensor] = {}
        for name, layer in program.layers.items():
            node = self.graph.node(name)
            rank = len(self.graph.types[name].shape)
            shape = [1, -1, *[1] * (rank - 2)] if node.op == "conv" else [-1]
            self.multipliers[name] = torch.from_numpy(layer.multiplier).to(self.device).reshape(shape)
            if layer.weight is not None:
                q = program.qparams[node.inputs[0]]
                axis = 1 if node.op == "conv" else -1
                self.layers[name] = LayerState(layer, axis, self.device, q.signed, q.qmax)

    def settings(self, ratio_index: int) -> dict[str, Setting]:
        """The settings of every layer at a ratio of the program's table."""
        result = {}
        for name, state in self.layers.items():
            layer = state.layer
            low = torch.from_numpy(layer.low[ratio_index]).to(self.device)
            bias = torch.from_numpy(layer.bias[ratio_index].astype(np.float64)).to(self.device)
            result[name] = state.setting(low, bias)
        return result

    def run(
        self,
        inputs: Sequence[Tensor],
        settings: Mapping[str, Setting],
        observe: Callable[[str, Tensor], None] | None = None,
    ) -> list[Tensor]:
        """Outputs for a batch. observe: called with every node's value (8-bit values as float32 integers)."""
        batch = check_inputs(self.graph, inputs)
        values: dict[str, Tensor] = dict(zip(self.graph.inputs, inputs, strict=True))
        for index, node in enumerate(self.graph.nodes):
            values[node.name] = self.step(node, values, settings, batch)
            if observe is not None:
                observe(node.name, values[node.name])
            for operand in node.operands():
                if self.last_use.get(operand) == index:
                    values.pop(operand, None)  # a node may read a value twice
        return [values[v] if v in values else self.constants[v] for v in self.graph.outputs]

    def _value(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        return values[name] if name in values else self.constants[name]

    def lowered(self, node: Node, x: Tensor, setting: Setting, batch: int) -> Tensor:
        """The layer's input with its low channels read back from low precision."""
        if setting.inverse is None:
            return x
        assert setting.low is not None and setting.high is not None
        inverse, power = self.scales(node, x, setting, batch)
        channel = self.layers[node.name].channel_shape(x.dim())
        return arithmetic.lower(x, inverse, setting.low.reshape(channel), setting.high.reshape(channel), power)

    def scales(self, node: Node, x: Tensor, setting: Setting, batch: int) -> tuple[Tensor, Tensor]:
        """(2^-shift, 2^shift) of a layer's input, broadcastable against it; 1 where a channel stays at 8 bits."""
        assert setting.inverse is not None and setting.power is not None and setting.low_channels is not None
        state = self.layers[node.name]
        channel = state.channel_shape(x.dim())
        if self.program.extraction != "dynamic":
            return setting.inverse.reshape(channel), setting.power.reshape(channel)
        layer, place = state.layer, self.batch_axes.get(node.inputs[0])
        if place is None:
            raise EngineError(
                f"layer '{node.name}': it cannot be told which values of its input belong to one sample, so dynamic "
                "extraction is not possible; use extraction='static', or keep the layer at 8 bits with keep_8bit"
            )
        shift = arithmetic.dynamic_shift(x, state.axis, place, batch, state.groups, layer.n_groups, layer.amax)
        shift = torch.where(setting.low_channels.reshape(channel), shift, 0.0)
        return torch.exp2(-shift), torch.exp2(shift)

    def accumulators(self, node: Node, values: Mapping[str, Tensor], setting: Setting | None, batch: int) -> Tensor:
        """Exact accumulators of a layer, before the bias."""
        if node.op == "matmul":
            bound = self.program.layers[node.name].accumulator_bound
            a, b = (self._value(v, values) for v in node.inputs)
            return arithmetic.accumulate_matmul(node, a, b, bound)
        assert setting is not None
        x = self.lowered(node, self._value(node.inputs[0], values), setting, batch)
        return arithmetic.accumulate(node, x, setting.weight, setting.bound)

    def epilogue(self, node: Node, acc: Tensor, values: Mapping[str, Tensor], setting: Setting | None) -> Tensor:
        """Bias, multiplier, residual, activation, rounding."""
        multiplier = self.multipliers[node.name]
        if setting is None:
            t = arithmetic.scaled(acc, None, multiplier)
        else:
            bias = setting.bias.reshape([1, -1, *[1] * (acc.dim() - 2)] if node.op == "conv" else [-1])
            if setting.small and acc.dtype == torch.float32:
                t = arithmetic.scaled_small(acc, bias.float(), multiplier)
            else:
                t = arithmetic.scaled(acc, bias, multiplier)
        eight = node.name in self.program.qparams
        if node.residual is not None:
            residual = self._value(node.residual, values)
            t = t + residual * self.program.layers[node.name].residual_factor if eight else t + residual
        if eight:
            return arithmetic.to_eight_bit(t, *node.attrs["clamp"])
        return apply_activation(t, node.attrs.get("activation"))

    def step(self, node: Node, values: Mapping[str, Tensor], settings: Mapping[str, Setting], batch: int) -> Tensor:
        """The value of one node."""
        if node.name in self.program.layers:
            setting = settings.get(node.name)
            return self.epilogue(node, self.accumulators(node, values, setting, batch), values, setting)
        operands = [self._value(v, values) for v in node.operands()]
        x = operands[0] if operands else None
        if x is None:
            return _in_float(node, operands, batch)
        factor = self.factors.get(node.name, [])
        if node.op == "quantize":
            q = self.program.qparams[node.name]
            return arithmetic.channels_last(arithmetic.to_eight_bit(x * factor[0], q.qmin, q.qmax))
        if node.op == "dequantize":
            return x * factor[0]
        if node.op == "table":
            offset = 128.0 if self.program.qparams[node.inputs[0]].signed else 0.0
            return self.tables[node.name][(x + offset).long()]
        if node.name in self.program.qparams:
            return self._integer(node, operands, factor, batch)
        return _in_float(node, operands, batch)

    def _integer(self, node: Node, operands: list[Tensor], factor: list[float], batch: int) -> Tensor:
        x = operands[0]
        if node.op in MOVEMENT_OPS:
            if node.op == "max_pool":
                return evaluate_node(node, operands, batch)
            return move(node, x, batch)
        lo, hi = node.attrs["clamp"]
        if node.op == "add":
            t = x * factor[0]
            return arithmetic.to_eight_bit(t.add_(operands[1] * factor[1]), lo, hi)
        if node.op == "mul":
            return arithmetic.to_eight_bit(x * operands[1] * factor[0], lo, hi)
        if node.op == "concat":
            parts = [
                arithmetic.to_eight_bit(v * f if f != 1.0 else v.clone(), lo, hi)
                for v, f in zip(operands, factor, strict=True)
            ]
            return torch.cat(parts, dim=node.attrs["axis"])
        if node.op == "mean":
            total = x.double().sum(dim=node.attrs["axes"], keepdim=node.attrs["keepdim"]).float()
        else:  # avg_pool: the sum over the window
            a = node.attrs
            ones = torch.ones(x.shape[1], 1, *a["kernel"], dtype=x.dtype, device=x.device)
            total = torch.nn.functional.conv2d(x, ones, None, a["stride"], a["padding"], 1, x.shape[1])
        return arithmetic.to_eight_bit(total * factor[0], lo, hi)


def _in_float(node: Node, operands: Sequence[Tensor], batch: int) -> Tensor:
    """A node in float. Its result depends on the operands' values alone, not on which engine or kernel made them."""
    if node.op not in MOVEMENT_OPS:
        operands = [arithmetic.in_order(v) for v in operands]
    return evaluate_node(node, operands, batch)
