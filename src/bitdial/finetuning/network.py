"""The differentiable twin of the reference engine: same graph, same steps, gradients through rounding.

A `TrainableNetwork` walks a program's graph as the reference engine does, on integers held in float32 or bfloat16, but its
weights are float parameters that every forward pass quantizes anew. With the weights the program was built from it
computes the program's own outputs (up to rounding ties of float32); that is tested. Integers up to 255 are exact in
bfloat16, so only the accumulators are rounded there.

Low weights that are integers of their own are taken as the program has them, whatever becomes of the 8-bit ones: who trains
weights gives it a program without (`pipeline.finetuning`). With `tune_low` they are all that is trained, with the bias table.

Source: FlexiQ (EuroSys 2026), finetuning with high and low passes over shared weights; learned scales: LSQ (Esser et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitdial.engines.reference import arithmetic
from bitdial.errors import ConfigError
from bitdial.finetuning.instructions import HANDLERS
from bitdial.finetuning.normalization import OutputNorm
from bitdial.finetuning.rounding import extract, keep_some, read_back, requantize, round_clamp
from bitdial.finetuning.tables import LowVectors, bias_corrections, correction_unit, latent_low_weights, low_vectors
from bitdial.graph.batch_axis import BatchAxis, batch_axes
from bitdial.graph.inputs import check_inputs
from bitdial.graph.interpreter import apply_activation
from bitdial.graph.ir import Graph, Node
from bitdial.graph.operators import MOVEMENT
from bitdial.graph.running import Schedule
from bitdial.quantization.build import clamp_limits
from bitdial.quantization.instructions import Add, Concat, Contract, Instruction, MatMul
from bitdial.quantization.program import Program

_NORMS = frozenset({"layer_norm", "batch_norm"})


class TrainableNetwork(nn.Module):
    """A quantized network whose weights can be trained, at every ratio of its dial.

    graph            the float graph the program was built from: its constants are the parameters' first values
    program          masks, shifts, bias table and encodings (`load_tables` takes newer ones)
    learn_scales     scales of activations and weights become parameters (LSQ); else the program's activation scales stay
                     and weight scales follow the largest weight of each output channel
    learn_bias       the bias table's corrections become parameters
    normalize        conv layers keep running statistics of their outputs (see `normalization`)
    tune_low         low weights of their own become parameters (in steps of their shift, rounded when used), and with
                     `learn_bias` the bias table (in steps of `correction_unit`); everything else is frozen
    dtype            type of integer tensors and of convolutions: float32, or bfloat16 where that is faster
    """

    def __init__(
        self,
        graph: Graph,
        program: Program,
        *,
        learn_scales: bool = False,
        learn_bias: bool = False,
        normalize: bool = False,
        tune_low: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.source, self.program, self.dtype = graph, program, dtype
        self.device = torch.device(device)
        self.float_nodes = graph.producers()
        self.learn_scales, self.learn_bias, self.normalize = learn_scales, learn_bias, normalize
        self.tune_low = tune_low
        self.weights = nn.ParameterDict()
        self.fixed: dict[str, Tensor] = {}
        trained = set(trained_constants(graph))
        for name, array in graph.constants.items():
            tensor = torch.from_numpy(np.array(array)).to(self.device)
            if name in trained:
                self.weights[_key(name)] = nn.Parameter(tensor.float(), requires_grad=not tune_low)
            else:
                self.fixed[name] = tensor
        for name, array in program.constants.items():  # those only the program has
            if name not in graph.constants:
                self.fixed[name] = torch.from_numpy(np.array(array)).to(self.device)
        self.scales = nn.ParameterDict()
        self.weight_scales = nn.ParameterDict()
        if learn_scales:
            self._make_scales()
        self.norms = nn.ModuleDict()
        self.corrections = nn.ParameterDict()
        self.low_weights = nn.ParameterDict()
        self.correction_unit: dict[str, Tensor] = {}  # of layers whose corrections are not in real units: [O]
        for name, layer in program.layers.items():
            if layer.weight is None:
                continue
            if normalize and layer.kind == "conv" and self._float(name).bias is not None:
                self.norms[_key(name)] = OutputNorm(len(layer.weight), self.device)
            empty = torch.zeros(len(program.ratios), len(layer.weight), device=self.device)
            self.corrections[_key(name)] = nn.Parameter(empty, requires_grad=learn_bias)
            if layer.low_weight is not None:
                low = torch.from_numpy(layer.low_weight).to(self.device, torch.float32)
                self.low_weights[_key(name)] = nn.Parameter(low, requires_grad=tune_low)
            if tune_low:
                self.correction_unit[name] = torch.from_numpy(correction_unit(program, name)).to(self.device)
        self.observing = False  # True: `OutputNorm`s update their statistics
        self.dropping: torch.Generator | None = None  # in training, decides which activations stay at 8 bits (`keep_some`)
        self.watching: Callable[[str, Tensor], None] | None = None  # told the outputs of convolutions and linear layers
        self.load_tables(program)

    # -- parameters and tables -----------------------------------------------------------------------------------------

    def _float(self, name: str) -> Node:
        return self.float_nodes[name]

    def _make_scales(self) -> None:
        """One parameter per distinct encoding (values that share a scale keep sharing it), as logarithms."""
        groups: dict[str, str] = {}
        producers = {step.name: step for step in self.program.instructions}
        for name in self.program.qparams:
            step = producers.get(name)
            source = step.inputs[0] if step is not None and step.operation in MOVEMENT else name
            groups[name] = groups.get(source, source)
        for step in self.program.instructions:
            if isinstance(step, Concat):  # inputs that are copied keep sharing its scale
                scale = self.program.qparams[step.name].scale
                for value in step.inputs:
                    if self.program.qparams[value].scale == scale:
                        groups = {k: groups[step.name] if v == groups[value] else v for k, v in groups.items()}
        self.scale_of = groups
        for name in dict.fromkeys(groups.values()):
            logarithm = torch.tensor(float(np.log(self.program.qparams[name].scale)), device=self.device)
            self.scales[_key(name)] = nn.Parameter(logarithm)
        for name, layer in self.program.layers.items():
            if layer.weight is not None:
                logarithms = torch.from_numpy(np.log(layer.weight_scale)).to(self.device)
                self.weight_scales[_key(name)] = nn.Parameter(logarithms)

    def load_tables(self, program: Program) -> None:
        """Take masks, shifts, bias corrections and low weights of `program` (same graph, ratios and layers with low weights)."""
        self.program = program
        self.schedule = Schedule(program.instructions, {*program.constants, *program.outputs})
        self.axes: dict[str, BatchAxis | None] = batch_axes(program.graph) if program.extraction == "dynamic" else {}
        self.low_vectors: dict[tuple[str, int], LowVectors | None] = {}
        self.tables: dict[str, tuple[Tensor, Tensor]] = {}  # of functions of 8-bit values, made when first needed
        for name, layer in program.layers.items():
            if layer.weight is None:
                continue
            source = program.instruction(name).inputs[0]
            shape = [1] * len(program.types[source].shape)
            shape[1 if layer.kind == "conv" else -1] = -1
            signed = program.qparams[source].signed
            for index in range(len(program.ratios)):
                self.low_vectors[name, index] = low_vectors(layer, index, signed, shape, self.device, self.dtype)
        for name, values in bias_corrections(program).items():
            with torch.no_grad():
                self.corrections[_key(name)].copy_(torch.from_numpy(values))
                if name in self.correction_unit:
                    self.corrections[_key(name)] /= self.correction_unit[name]
                layer = program.layers[name]
                if layer.low_weight is not None:
                    own = latent_low_weights(layer) if self.tune_low else layer.low_weight
                    self.low_weights[_key(name)].copy_(torch.from_numpy(own))

    def bound_low_weights(self) -> None:
        """Bring low weights that are trained back into their range, so that none gets stuck beyond its end."""
        if self.tune_low:
            with torch.no_grad():
                for key, name in ((_key(n), n) for n in self._layer_names() if _key(n) in self.low_weights):
                    limit = self.program.layers[name].wmax
                    self.low_weights[key].clamp_(-limit, limit)

    def scale(self, value: str) -> Tensor | float:
        """Scale of an 8-bit value."""
        if self.learn_scales:
            learned: Tensor = self.scales[_key(self.scale_of[value])].exp()
            return learned
        return self.program.qparams[value].scale

    def limits(self, name: str, clamp: tuple[int, int]) -> tuple[int, int]:
        """Smallest and largest integer of an 8-bit result, clamp with fixed scales; they move with its scale."""
        if not self.learn_scales:
            return clamp
        step = self.program.instruction(name)
        if not isinstance(step, (Contract, MatMul, Add, Concat)) or step.activation is None:
            return clamp
        with torch.no_grad():
            scale = float(self.scale(name))
        return clamp_limits(step.activation, replace(self.program.qparams[name], scale=scale))

    def layer_parameters(self, name: str) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of a layer in real units, with its output normalization folded in."""
        node = self._float(name)
        assert node.weight is not None
        weight = self._constant(node.weight)
        bias = self._constant(node.bias) if node.bias is not None else None
        if _key(name) in self.norms:
            assert bias is not None
            norm = self.norms[_key(name)]
            assert isinstance(norm, OutputNorm)
            return norm.fold(weight, bias)
        return weight, bias

    def _constant(self, name: str) -> Tensor:
        key = _key(name)
        return self.weights[key] if key in self.weights else self.fixed[name]

    def weight_scale(self, name: str, weight: Tensor, bias: Tensor | None, activation: Tensor | float) -> Tensor:
        """float32 [O]; the rule of `quantization.weights.weight_scales` unless scales are learned."""
        if self.learn_scales:
            learned: Tensor = self.weight_scales[_key(name)].exp()
            return learned
        with torch.no_grad():
            largest = weight.detach().flatten(1).abs().amax(dim=1) / 127.0
            if bias is not None:
                largest = torch.maximum(largest, bias.detach().abs() / (float(activation) * 2.0**30))
            return largest.clamp_min(2.0**-40)

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(self, inputs: Sequence[Tensor], index: int = 0) -> list[Tensor]:
        """Float outputs at ratio index `index` of the program's table. Raises InputError for a wrong shape."""
        program = self.program
        batch = check_inputs(program, inputs)
        values = self.schedule.run(
            dict(zip(program.inputs, inputs, strict=True)), lambda step, values: self.step(step, values, index, batch)
        )
        return [values[v].float() if v in values else self._constant(v) for v in program.outputs]

    def _value(self, name: str, values: dict[str, Tensor]) -> Tensor:
        return values[name] if name in values else self._constant(name)

    def step(self, step: Instruction, values: dict[str, Tensor], index: int, batch: int) -> Tensor:
        if isinstance(step, Contract):
            y = self._layer(step, values, index, batch)
            if self.watching is not None:
                self.watching(step.name, y)
            return y
        return HANDLERS[type(step)](self, step, [self._value(v, values) for v in step.operands()], batch)

    def quantized_weight(self, name: str, index: int, weight: Tensor, scale: Tensor) -> Tensor:
        """Integers [O, I, *kernel] of a layer at a ratio, low groups read back."""
        integers = round_clamp(weight / scale.reshape(-1, *[1] * (weight.dim() - 1)), -127, 127)
        low = self.low_vectors[name, index]
        if low is None:
            return integers
        limit = low.weight_limit
        if _key(name) in self.low_weights:
            return torch.where(low.weight_low, read_back(self.low_weights[_key(name)], low.weight_power, limit), integers)
        return extract(integers, low.weight_inverse, low.weight_power, -limit, limit)

    def _extracted(self, step: Contract, x: Tensor, low: LowVectors, batch: int) -> Tensor:
        """The inputs of a layer, extracted as far as they are low."""
        y = self._read_back(step, x, low, batch)
        if self.dropping is None or not self.training:
            return y
        return torch.where(keep_some(x, self.dropping), x, y)

    def correction(self, name: str, index: int) -> Tensor:
        """float32 [O], real units: what a ratio adds to the bias of ratio index 0."""
        value: Tensor = self.corrections[_key(name)][index]
        return value * self.correction_unit[name] if name in self.correction_unit else value

    def _read_back(self, step: Contract, x: Tensor, low: LowVectors, batch: int) -> Tensor:
        if self.program.extraction != "dynamic":
            return extract(x, low.inverse, low.power, low.lo, low.hi)
        place = self.axes.get(step.inputs[0])
        if place is None:
            raise ConfigError(f"layer '{step.name}': dynamic extraction cannot tell samples apart; use 'static'")
        layer = step.layer
        groups = torch.from_numpy(layer.channel_groups()).to(self.device)
        channels = low.low[groups].reshape(low.inverse.shape)
        shift = arithmetic.dynamic_shift(
            x.detach().float(), step.axis, place, batch, groups, layer.n_groups, layer.amax
        )
        shift = torch.where(channels, shift, 0.0)
        return extract(x, torch.exp2(-shift).to(x.dtype), torch.exp2(shift).to(x.dtype), low.lo, low.hi)

    def _layer(self, step: Contract, values: dict[str, Tensor], index: int, batch: int) -> Tensor:
        name = step.name
        weight, bias = self.layer_parameters(name)
        x = self._value(step.inputs[0], values)
        low = self.low_vectors[name, index]
        if low is not None:
            x = self._extracted(step, x, low, batch)
        unit = self.scale(step.inputs[0])
        scale = self.weight_scale(name, weight, bias, unit)
        integers = arithmetic.channels_last(self.quantized_weight(name, index, weight, scale).to(self.dtype))
        acc = arithmetic.product(x, integers, step.window)
        unit = scale * unit  # real value of one accumulator step
        real = self.correction(name, index)
        real = real + bias if bias is not None else real
        shape = [1, -1, *[1] * (acc.dim() - 2)] if step.window is not None else [-1]
        if self.observing and _key(name) in self.norms:
            norm = self.norms[_key(name)]
            assert isinstance(norm, OutputNorm)
            norm.observe(acc.detach(), unit.detach(), real.detach())
        residual = self._value(step.residual, values) if step.residual is not None else None
        if step.clamp is None:
            y = torch.addcmul(real.reshape(shape), acc.float(), unit.reshape(shape))
            return apply_activation(y if residual is None else y + residual, step.activation)
        out = self.scale(name)
        multiplier, shifted = (unit / out).reshape(shape), (real / out).reshape(shape)
        lo, hi = self.limits(name, step.clamp)
        if step.residual is None:
            return requantize(acc, multiplier, shifted, lo, hi, self.dtype)
        return requantize(acc, multiplier, shifted, lo, hi, self.dtype, residual, self.scale(step.residual) / out)

    def factors(self, step: Instruction) -> list[Any]:
        """Scale of every input over that of the result."""
        out = self.scale(step.name)
        return [self.scale(v) / out for v in step.inputs]

    def same_scale(self, a: str, b: str) -> bool:
        if self.learn_scales:
            return self.scale_of[a] == self.scale_of[b]
        return self.program.qparams[a].scale == self.program.qparams[b].scale

    # -- results -------------------------------------------------------------------------------------------------------

    def trained_graph(self) -> Graph:
        """A copy of the float graph with the parameters as they are now (normalization folded)."""
        graph = self.source.copy()
        with torch.no_grad():
            for name in self.source.constants:
                if _key(name) in self.weights:
                    graph.constants[name] = self.weights[_key(name)].detach().cpu().numpy().copy()
            for node in self.source.nodes:
                if _key(node.name) in self.norms:
                    weight, bias = self.layer_parameters(node.name)
                    assert node.weight is not None and node.bias is not None and bias is not None
                    graph.constants[node.weight] = weight.cpu().numpy().copy()
                    graph.constants[node.bias] = bias.cpu().numpy().copy()
        return graph

    def learned_scales(self) -> tuple[dict[str, float], dict[str, Any]]:
        """(scale of every 8-bit value, scales [O] of every layer's weights) where they are learned, else two empty ones."""
        if not self.learn_scales:
            return {}, {}
        with torch.no_grad():
            values = {v: float(self.scales[_key(s)].exp()) for v, s in self.scale_of.items()}
            weights = {n: self.weight_scales[_key(n)].exp().cpu().numpy() for n in self._layer_names()}
        return values, weights

    def learned_corrections(self) -> dict[str, Any]:
        """float32 [n_ratios, O] per layer, real units: what each ratio adds to the bias of ratio 0."""
        with torch.no_grad():
            ratios = range(len(self.program.ratios))
            return {n: torch.stack([self.correction(n, i) for i in ratios]).cpu().numpy() for n in self._layer_names()}

    def learned_low_weights(self) -> dict[str, Any]:
        """int8 per layer with low weights of its own: what they are rounded to."""
        result = {}
        for name, layer in self.program.layers.items():
            if layer.low_weight is not None:
                low = self.low_weights[_key(name)].detach().round().clamp(-layer.wmax, layer.wmax)
                result[name] = low.to(torch.int8).cpu().numpy()
        return result

    def _layer_names(self) -> list[str]:
        return [n for n, layer in self.program.layers.items() if layer.weight is not None]


def trained_constants(graph: Graph, *, batch_norm: bool = True) -> list[str]:
    """Names of the constants that training moves, in the order of the nodes: weights and biases of convolutions and linear
    layers, vectors of LayerNorm, and, if asked for, those of BatchNorms that no layer before them could take in."""
    names: list[str] = []
    for node in graph.nodes:
        if node.op in ("conv", "linear"):
            names += [v for v in (node.weight, node.bias) if v is not None]
        elif node.op == "layer_norm":
            names += node.inputs[1:]
        elif node.op == "batch_norm" and batch_norm:
            names += node.inputs[1:3]  # gamma and beta; mean and variance are statistics
    return [v for v in dict.fromkeys(names) if v in graph.constants and graph.constants[v].dtype == np.float32]


def _key(name: str) -> str:
    """A name as module and parameter dictionaries take it: without dots."""
    return name.replace(".", "__")
