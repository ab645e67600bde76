"""Runs a program by its instructions, in exact integers. The engine, the bias table and the search build on it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitdial.engines.reference import arithmetic, ordered
from bitdial.engines.reference.ordered_softmax import softmax
from bitdial.errors import EngineError
from bitdial.graph.batch_axis import BatchAxis, batch_axes
from bitdial.graph.inputs import check_inputs
from bitdial.graph.interpreter import MAX_POOL, apply_activation, constant_tensors, evaluate_node, move
from bitdial.graph.operators import MOVEMENT, softmax_axis
from bitdial.graph.running import Schedule
from bitdial.quantization.byte_products import EXACT_FLOAT32
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
)
from bitdial.quantization.program import Program, QuantizedLayer
from bitdial.quantization.weights import read_back_weights


@dataclass
class Setting:
    """How one layer runs in one call: its weights with low groups read back, the vectors that extract its input, its bias row.

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
    packed: Tensor | None = None  # the weight as an operator takes it that packs it first


class LayerState:
    """A layer's tensors on the device; makes `Setting`s for any set of low groups."""

    def __init__(self, layer: QuantizedLayer, axis: int, device: torch.device, signed: bool, qmax: int) -> None:
        assert layer.weight is not None
        self.layer, self.axis, self.device, self.signed, self.qmax = layer, axis, device, signed, qmax
        read_back = read_back_weights(layer) if layer.n_groups else layer.weight
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
        setting.small = top < EXACT_FLOAT32
        setting.weight = arithmetic.channels_last(setting.weight)
        return setting


class Executor:
    """Evaluates the instructions of a program. Thread-safe: all state is written at construction or per call."""

    exact = True

    def __init__(self, program: Program, device: torch.device | str = "cpu") -> None:
        self.program, self.device = program, torch.device(device)
        self.constants = constant_tensors(program, self.device)
        self.schedule = Schedule(program.instructions, {*program.constants, *program.outputs})
        self.instructions = {step.name: step for step in self.schedule.steps}
        dynamic = program.extraction == "dynamic"
        self.batch_axes: dict[str, BatchAxis | None] = batch_axes(program.graph) if dynamic else {}
        self.layers: dict[str, LayerState] = {}
        self.tables: dict[str, Tensor] = {}
        self.multipliers: dict[str, Tensor] = {}
        for step in self.schedule.steps:
            if isinstance(step, Lookup):
                self.tables[step.name] = torch.from_numpy(step.table.astype(np.float32)).to(self.device)
            if isinstance(step, (Contract, MatMul)):
                conv = isinstance(step, Contract) and step.window is not None
                shape = [1, -1, *[1] * (len(program.types[step.name].shape) - 2)] if conv else [-1]
                self.multipliers[step.name] = torch.from_numpy(step.layer.multiplier).to(self.device).reshape(shape)
            if isinstance(step, Contract):
                self.renew(step.name)

    def renew(self, name: str) -> LayerState:
        """Take over what has changed in the weights and shifts of a layer."""
        step = self.instructions[name]
        assert isinstance(step, Contract)
        q = self.program.qparams[step.inputs[0]]
        self.layers[name] = LayerState(step.layer, step.axis, self.device, q.signed, q.qmax)
        return self.layers[name]

    def settings(self, ratio_index: int, names: Collection[str] | None = None) -> dict[str, Setting]:
        """The settings of every layer, or of those among `names`, at a ratio of the program's table."""
        result = {}
        for name, state in self.layers.items():
            if names is not None and name not in names:
                continue
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
        batch = check_inputs(self.program, inputs)
        values = self.schedule.run(
            dict(zip(self.program.inputs, inputs, strict=True)),
            lambda step, values: self.step(step, values, settings, batch),
            observe,
        )
        return [self._value(v, values) for v in self.program.outputs]

    def _value(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        return values[name] if name in values else self.constants[name]

    def extracted(self, step: Contract, x: Tensor, setting: Setting, batch: int) -> Tensor:
        """The layer's input with its low channels read back from low precision."""
        if setting.inverse is None:
            return x
        assert setting.low is not None and setting.high is not None
        inverse, power = self.scales(step, x, setting, batch)
        channel = self.layers[step.name].channel_shape(x.dim())
        return arithmetic.extract(x, inverse, setting.low.reshape(channel), setting.high.reshape(channel), power)

    def scales(self, step: Contract, x: Tensor, setting: Setting, batch: int) -> tuple[Tensor, Tensor]:
        """(2^-shift, 2^shift) of a layer's input, broadcastable against it; 1 where a channel stays at 8 bits."""
        assert setting.inverse is not None and setting.power is not None and setting.low_channels is not None
        state = self.layers[step.name]
        channel = state.channel_shape(x.dim())
        if self.program.extraction != "dynamic":
            return setting.inverse.reshape(channel), setting.power.reshape(channel)
        layer, place = state.layer, self.batch_axes.get(step.inputs[0])
        if place is None:
            raise EngineError(
                f"layer '{step.name}': it cannot be told which values of its input belong to one sample, so dynamic "
                "extraction is not possible; use extraction='static', or keep the layer at 8 bits with keep_8bit"
            )
        shift = arithmetic.dynamic_shift(x, state.axis, place, batch, state.groups, layer.n_groups, layer.amax)
        shift = torch.where(setting.low_channels.reshape(channel), shift, 0.0)
        return torch.exp2(-shift), torch.exp2(shift)

    def accumulators(
        self, step: Contract | MatMul, values: Mapping[str, Tensor], setting: Setting | None, batch: int
    ) -> Tensor:
        """Exact accumulators of a layer, before the bias."""
        x = self._value(step.inputs[0], values)
        if isinstance(step, MatMul):
            other = self._value(step.inputs[1], values)
            other = other.transpose(-1, -2) if step.transpose_b else other
            return arithmetic.accumulate_matmul(x, other, step.layer.accumulator_bound)
        assert setting is not None
        return self.products(step, self.extracted(step, x, setting, batch), setting)

    def products(self, step: Contract, x: Tensor, setting: Setting) -> Tensor:
        """Exact accumulators of a layer from what `extracted` gives."""
        return arithmetic.accumulate(x, setting.weight, setting.bound, step.window)

    def epilogue(
        self, step: Contract | MatMul, acc: Tensor, values: Mapping[str, Tensor], setting: Setting | None
    ) -> Tensor:
        """Bias, multiplier, residual, activation, rounding."""
        multiplier = self.multipliers[step.name]
        if setting is None:
            t = arithmetic.scaled(acc, None, multiplier)
        else:
            bias = setting.bias.reshape(multiplier.shape)
            if (setting.small or not self.exact) and acc.dtype == torch.float32:
                t = arithmetic.scaled_small(acc, bias.float(), multiplier)
            else:
                t = arithmetic.scaled(acc, bias, multiplier)
        if isinstance(step, Contract) and step.residual is not None:
            residual = self._value(step.residual, values)
            t = t + (residual if step.clamp is None else residual * step.layer.residual_factor)
        if step.clamp is not None:
            return arithmetic.to_eight_bit(t, *step.clamp)
        return apply_activation(t, step.activation)

    def step(
        self, step: Instruction, values: Mapping[str, Tensor], settings: Mapping[str, Setting], batch: int
    ) -> Tensor:
        """The result of one instruction."""
        if isinstance(step, (Contract, MatMul)):
            setting = settings.get(step.name)
            return self.epilogue(step, self.accumulators(step, values, setting, batch), values, setting)
        operands = [self._value(v, values) for v in step.operands()]
        return HANDLERS[type(step)](self, step, operands, batch)


def _quantize(run: Executor, step: Quantize, x: list[Tensor], batch: int) -> Tensor:
    return arithmetic.channels_last(arithmetic.to_eight_bit(x[0] * step.factor, step.lo, step.hi))


def _dequantize(run: Executor, step: Dequantize, x: list[Tensor], batch: int) -> Tensor:
    return x[0] * step.factor


def _lookup(run: Executor, step: Lookup, x: list[Tensor], batch: int) -> Tensor:
    table, index = run.tables[step.name], x[0] + float(step.offset)
    if index.device.type == "cpu" and index.is_contiguous():  # NumPy takes bytes as they are, five times as fast
        return torch.from_numpy(table.numpy().take(index.to(torch.uint8).numpy()))
    return table[index.long()]


def _add(run: Executor, step: Add, x: list[Tensor], batch: int) -> Tensor:
    t = x[0] * step.factors[0]
    return arithmetic.to_eight_bit(t.add_(x[1] * step.factors[1]), step.lo, step.hi)


def _mul(run: Executor, step: Mul, x: list[Tensor], batch: int) -> Tensor:
    return arithmetic.to_eight_bit(x[0] * x[1] * step.factor, step.lo, step.hi)


def _concat(run: Executor, step: Concat, x: list[Tensor], batch: int) -> Tensor:
    parts = [
        arithmetic.to_eight_bit(v * f if f != 1.0 else v.clone(), step.lo, step.hi)
        for v, f in zip(x, step.factors, strict=True)
    ]
    return torch.cat(parts, dim=step.axis)


def _sum_pool(run: Executor, step: SumPool, x: list[Tensor], batch: int) -> Tensor:
    if step.window is None:
        total = x[0].double().sum(dim=step.axes, keepdim=step.keepdim).float()
    else:
        kernel, stride, padding, _ = step.window.pairs
        channels = x[0].shape[1]
        ones = torch.ones(channels, 1, *kernel, dtype=x[0].dtype, device=x[0].device)
        total = torch.nn.functional.conv2d(x[0], ones, None, stride, padding, 1, channels)
    return arithmetic.to_eight_bit(total * step.factor, step.lo, step.hi)


def max_pool(run: Any, step: MaxPool, x: list[Tensor], batch: int) -> Tensor:
    w = step.window
    return MAX_POOL[len(w.kernel)](x[0], w.kernel, w.stride, w.padding, w.dilation, step.ceil_mode)


def move_values(run: Any, step: Move, x: list[Tensor], batch: int) -> Tensor:
    return move(step.node, x[0], batch)


def _float(run: Executor, step: Float, x: list[Tensor], batch: int) -> Tensor:
    """An operator in float. Its result depends on the operands' values alone, not on which engine or kernel made them."""
    axis = softmax_axis(step.node)
    if axis is not None and x[0].dtype == torch.float32:
        return softmax(x[0], axis)
    exact = ordered.OPERATORS.get(step.operation)
    if exact is not None:
        result = exact(step.node, x)
        if result is not None:
            return result
    if step.operation not in MOVEMENT:
        x = [arithmetic.in_order(v) for v in x]
    return evaluate_node(step.node, x, batch)


HANDLERS: dict[type[Instruction], Callable[[Executor, Any, list[Tensor], int], Tensor]] = {
    Quantize: _quantize, Dequantize: _dequantize, Lookup: _lookup, Add: _add, Mul: _mul, Concat: _concat,
    SumPool: _sum_pool, MaxPool: max_pool, Move: move_values, Float: _float,
}  # fmt: skip
