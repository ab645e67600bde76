"""The differentiable twin of the reference engine: same graph, same steps, gradients through rounding.

A `TrainableNetwork` walks a program's graph as the reference engine does, on integers held in float32 or bfloat16, but its
weights are float parameters that every forward pass quantizes anew. With the weights the program was built from it
computes the program's own outputs (up to rounding ties of float32); that is tested. Integers up to 255 are exact in
bfloat16, so only the accumulators are rounded there.

Source: FlexiQ (EuroSys 2026), finetuning with high and low passes over shared weights; learned scales: LSQ (Esser et al. 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitdial.engines.reference import arithmetic
from bitdial.errors import ConfigError
from bitdial.finetuning.kernels import usable
from bitdial.finetuning.normalization import OutputNorm
from bitdial.finetuning.rounding import function_table, look_up, lower, requantize, round_clamp
from bitdial.finetuning.tables import Lowering, bias_corrections, lowering
from bitdial.graph.batch_axis import BatchAxis, batch_axes
from bitdial.graph.inputs import check_inputs
from bitdial.graph.interpreter import apply_activation, evaluate_node, last_uses, move
from bitdial.graph.ir import MOVEMENT_OPS, Graph, Node
from bitdial.quantization.build import clamp_limits
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
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.source, self.program, self.dtype = graph, program, dtype
        self.device = torch.device(device)
        self.last_use = last_uses(program.graph)
        self.float_nodes = graph.producers()
        self.learn_scales, self.learn_bias, self.normalize = learn_scales, learn_bias, normalize
        self.weights = nn.ParameterDict()
        self.fixed: dict[str, Tensor] = {}
        trained = set(trained_constants(graph))
        for name, array in graph.constants.items():
            tensor = torch.from_numpy(np.array(array)).to(self.device)
            if name in trained:
                self.weights[_key(name)] = nn.Parameter(tensor.float())
            else:
                self.fixed[name] = tensor
        for name, array in program.graph.constants.items():  # those only the program has
            if name not in graph.constants:
                self.fixed[name] = torch.from_numpy(np.array(array)).to(self.device)
        self.scales = nn.ParameterDict()
        self.weight_scales = nn.ParameterDict()
        if learn_scales:
            self._make_scales()
        self.norms = nn.ModuleDict()
        self.corrections = nn.ParameterDict()
        for name, layer in program.layers.items():
            if layer.weight is None:
                continue
            if normalize and layer.kind == "conv" and self._float(name).bias is not None:
                self.norms[_key(name)] = OutputNorm(len(layer.weight), self.device)
            empty = torch.zeros(len(program.ratios), len(layer.weight), device=self.device)
            self.corrections[_key(name)] = nn.Parameter(empty, requires_grad=learn_bias)
        self.observing = False  # True: `OutputNorm`s update their statistics
        self.load_tables(program)

    # -- parameters and tables -----------------------------------------------------------------------------------------

    def _float(self, name: str) -> Node:
        return self.float_nodes[name]

    def _make_scales(self) -> None:
        """One parameter per distinct encoding (values that share a scale keep sharing it), as logarithms."""
        groups: dict[str, str] = {}
        producers = self.program.graph.producers()
        for name in self.program.qparams:
            node = producers.get(name)
            source = node.inputs[0] if node is not None and node.op in MOVEMENT_OPS else name
            groups[name] = groups.get(source, source)
        for node in self.program.graph.nodes:
            if node.op == "concat" and node.name in groups:  # inputs that are copied keep sharing its scale
                scale = self.program.qparams[node.name].scale
                for value in node.inputs:
                    if self.program.qparams[value].scale == scale:
                        groups = {k: groups[node.name] if v == groups[value] else v for k, v in groups.items()}
        self.scale_of = groups
        for name in dict.fromkeys(groups.values()):
            logarithm = torch.tensor(float(np.log(self.program.qparams[name].scale)), device=self.device)
            self.scales[_key(name)] = nn.Parameter(logarithm)
        for name, layer in self.program.layers.items():
            if layer.weight is not None:
                logarithms = torch.from_numpy(np.log(layer.weight_scale)).to(self.device)
                self.weight_scales[_key(name)] = nn.Parameter(logarithms)

    def load_tables(self, program: Program) -> None:
        """Take masks, shifts and bias corrections of `program` (same graph and ratios)."""
        self.program = program
        self.axes: dict[str, BatchAxis | None] = batch_axes(program.graph) if program.extraction == "dynamic" else {}
        self.lowerings: dict[tuple[str, int], Lowering | None] = {}
        self.tables: dict[str, tuple[Tensor, Tensor]] = {}  # of functions of 8-bit values, made when first needed
        for name, layer in program.layers.items():
            if layer.weight is None:
                continue
            node = program.graph.node(name)
            ndim = len(program.graph.types[node.inputs[0]].shape)
            shape = [1] * ndim
            shape[1 if node.op == "conv" else -1] = -1
            signed = program.qparams[node.inputs[0]].signed
            for index in range(len(program.ratios)):
                self.lowerings[name, index] = lowering(layer, index, signed, shape, self.device, self.dtype)
        for name, values in bias_corrections(program).items():
            with torch.no_grad():
                self.corrections[_key(name)].copy_(torch.from_numpy(values))

    def scale(self, value: str) -> Tensor | float:
        """Scale of an 8-bit value."""
        if self.learn_scales:
            learned: Tensor = self.scales[_key(self.scale_of[value])].exp()
            return learned
        return self.program.qparams[value].scale

    def _limits(self, node: Node) -> tuple[int, int]:
        """Smallest and largest integer of an operator's output; they move with its scale."""
        lo, hi = node.attrs["clamp"]
        if self.learn_scales and node.attrs.get("activation") is not None:
            with torch.no_grad():
                scale = float(self.scale(node.name))
            lo, hi = clamp_limits(node, replace(self.program.qparams[node.name], scale=scale))
        return lo, hi

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
        graph = self.program.graph
        batch = check_inputs(graph, inputs)
        values: dict[str, Tensor] = dict(zip(graph.inputs, inputs, strict=True))
        for position, node in enumerate(graph.nodes):
            values[node.name] = self._step(node, values, index, batch)
            for operand in node.operands():
                if self.last_use.get(operand) == position:
                    values.pop(operand, None)
        return [values[v].float() if v in values else self._constant(v) for v in graph.outputs]

    def _value(self, name: str, values: dict[str, Tensor]) -> Tensor:
        return values[name] if name in values else self._constant(name)

    def _step(self, node: Node, values: dict[str, Tensor], index: int, batch: int) -> Tensor:
        program = self.program
        if node.name in program.layers:
            if node.op == "matmul":
                return self._matmul(node, values)
            return self._layer(node, values, index, batch)
        if node.op == "quantize":
            q = program.qparams[node.name]
            inverse = 1.0 / self.scale(node.name)
            integers = requantize(self._value(node.inputs[0], values), inverse, None, q.qmin, q.qmax, self.dtype)
            return arithmetic.channels_last(integers)
        if node.op == "dequantize":
            return self._value(node.inputs[0], values).float() * self.scale(node.inputs[0])
        if node.name in program.qparams:
            return self._integer(node, values, batch)
        operands = [self._value(v, values) for v in node.operands()]
        return evaluate_node(node, operands, batch)

    def _matmul(self, node: Node, values: dict[str, Tensor]) -> Tensor:
        a, b = (self._value(v, values) for v in node.inputs)
        if node.attrs.get("transpose_b"):
            b = b.transpose(-1, -2)
        acc = torch.matmul(a, b)
        factor = self.scale(node.inputs[0]) * self.scale(node.inputs[1]) * node.attrs.get("scale", 1.0)
        if node.name in self.program.qparams:
            return requantize(acc, factor / self.scale(node.name), None, *self._limits(node), self.dtype)
        return apply_activation(acc.float() * factor, node.attrs.get("activation"))

    def quantized_weight(self, name: str, index: int, weight: Tensor, scale: Tensor) -> Tensor:
        """Integers [O, I, *kernel] of a layer at a ratio, low groups read back."""
        integers = round_clamp(weight / scale.reshape(-1, *[1] * (weight.dim() - 1)), -127, 127)
        low = self.lowerings[name, index]
        if low is not None:
            limit = low.weight_limit
            integers = lower(integers, low.weight_inverse, low.weight_power, -limit, limit)
        return integers

    def _lowered(self, node: Node, x: Tensor, low: Lowering, batch: int) -> Tensor:
        if self.program.extraction != "dynamic":
            return lower(x, low.inverse, low.power, low.lo, low.hi)
        place = self.axes.get(node.inputs[0])
        if place is None:
            raise ConfigError(f"layer '{node.name}': dynamic extraction cannot tell samples apart; use 'static'")
        layer = self.program.layers[node.name]
        axis = 1 if node.op == "conv" else -1
        groups = torch.from_numpy(layer.channel_groups()).to(self.device)
        channels = low.low[groups].reshape(low.inverse.shape)
        shift = arithmetic.dynamic_shift(x.detach().float(), axis, place, batch, groups, layer.n_groups, layer.amax)
        shift = torch.where(channels, shift, 0.0)
        return lower(x, torch.exp2(-shift).to(x.dtype), torch.exp2(shift).to(x.dtype), low.lo, low.hi)

    def _layer(self, node: Node, values: dict[str, Tensor], index: int, batch: int) -> Tensor:
        name = node.name
        weight, bias = self.layer_parameters(name)
        x = self._value(node.inputs[0], values)
        low = self.lowerings[name, index]
        if low is not None:
            x = self._lowered(node, x, low, batch)
        step = self.scale(node.inputs[0])
        scale = self.weight_scale(name, weight, bias, step)
        integers = arithmetic.channels_last(self.quantized_weight(name, index, weight, scale).to(self.dtype))
        bare = Node(name, node.op, [node.inputs[0]], {k: v for k, v in node.attrs.items() if k != "activation"}, "w")
        acc = evaluate_node(bare, [x, integers], batch)
        unit = scale * step  # real value of one accumulator step
        real = self.corrections[_key(name)][index]
        real = real + bias if bias is not None else real
        shape = [1, -1, *[1] * (acc.dim() - 2)] if node.op == "conv" else [-1]
        if self.observing and _key(name) in self.norms:
            norm = self.norms[_key(name)]
            assert isinstance(norm, OutputNorm)
            norm.observe(acc.detach(), unit.detach(), real.detach())
        residual = self._value(node.residual, values) if node.residual is not None else None
        if name not in self.program.qparams:
            y = torch.addcmul(real.reshape(shape), acc.float(), unit.reshape(shape))
            return apply_activation(y if residual is None else y + residual, node.attrs.get("activation"))
        out = self.scale(name)
        multiplier, shifted = (unit / out).reshape(shape), (real / out).reshape(shape)
        lo, hi = self._limits(node)
        if node.residual is None:
            return requantize(acc, multiplier, shifted, lo, hi, self.dtype)
        return requantize(acc, multiplier, shifted, lo, hi, self.dtype, residual, self.scale(node.residual) / out)

    def _integer(self, node: Node, values: dict[str, Tensor], batch: int) -> Tensor:
        """The other 8-bit operators."""
        operands = [self._value(v, values) for v in node.operands()]
        x = operands[0]
        if node.op in MOVEMENT_OPS:
            return evaluate_node(node, operands, batch) if node.op == "max_pool" else move(node, x, batch)
        out = self.scale(node.name)
        if node.op == "table":
            return self._table(node, x, batch)
        lo, hi = self._limits(node)
        factors = [self.scale(v) / out for v in node.inputs]
        if node.op == "add":
            return requantize(x, factors[0], None, lo, hi, self.dtype, operands[1], factors[1])
        if node.op == "mul":
            t = x.float() * operands[1].float() * (factors[0] * self.scale(node.inputs[1]))
            return round_clamp(t, lo, hi, self.dtype)
        if node.op == "concat":
            parts = [
                v if self._same_scale(name, node.name) else round_clamp(v.float() * f, lo, hi, self.dtype)
                for name, v, f in zip(node.inputs, operands, factors, strict=True)
            ]
            return torch.cat(parts, dim=node.attrs["axis"])
        y = evaluate_node(Node(node.name, node.op, list(node.inputs), node.attrs), [x.float()], batch)
        return round_clamp(y * factors[0], lo, hi, self.dtype)

    def _table(self, node: Node, x: Tensor, batch: int) -> Tensor:
        """A function of one 8-bit value."""
        q, source = self.program.qparams[node.name], self.program.qparams[node.inputs[0]]
        function = Node(node.name, node.attrs["function"], list(node.inputs), node.attrs)
        step, out = self.scale(node.inputs[0]), self.scale(node.name)

        def apply(integers: Tensor) -> Tensor:
            return round_clamp(evaluate_node(function, [integers * step], batch) / out, q.qmin, q.qmax, self.dtype)

        found = None
        if not self.learn_scales and usable(x, x.dtype):
            if node.name not in self.tables:
                self.tables[node.name] = function_table(apply, source.signed)
            found = look_up(x, self.tables[node.name])
        return apply(x.float()) if found is None else found

    def _same_scale(self, a: str, b: str) -> bool:
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
        return {n: self.corrections[_key(n)].detach().cpu().numpy().copy() for n in self._layer_names()}

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
