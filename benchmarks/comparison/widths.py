"""Networks that share one set of weights and differ in width, for methods that train all widths together.

A width's twin (`finetuning.network.TrainableNetwork`) runs the program that `uniform.uniform_program` makes with
weights="top": the low weights are the top bits of the 8-bit ones, so that one stored set serves every width; activations have a
range per width. What a width has of its own are biases and, if asked for, normalization statistics with gain and shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from bitdial.errors import ConfigError
from bitdial.finetuning.network import TrainableNetwork
from bitdial.graph.ir import Graph
from bitdial.layout import group_bounds
from bitdial.pipeline import restore_means
from bitdial.pipeline.finetuning import start_graph
from bitdial.quantization.build import build_program
from bitdial.quantization.program import Program
from comparison.budget import HIGH_BITS
from comparison.ground import Ground
from comparison.uniform import uniform_program


class SharedWidths(nn.Module):
    """networks: one twin per width, in falling order of widths; `weights` of all are those of the first.

    normalize: convolutions get normalization statistics, gain and shift per width. Raises ConfigError for widths that are
    not 2 to 8, or none.
    """

    def __init__(self, ground: Ground, widths: Sequence[int], *, normalize: bool, bfloat16: bool = False) -> None:
        super().__init__()
        self.widths = sorted(set(widths), reverse=True)
        if not self.widths or self.widths[0] > HIGH_BITS or self.widths[-1] < 2:
            raise ConfigError(f"widths {list(widths)}: give some of 2 to 8")
        self.ground = ground
        self.base: Graph = start_graph(ground.prepared.graph, ground.eight)
        networks: list[TrainableNetwork] = []
        for bits in self.widths:
            program = self.program_of(ground.prepared.graph, bits, correct=True)
            network = TrainableNetwork(
                self.base, program, learn_bias=True, normalize=normalize,
                dtype=torch.bfloat16 if bfloat16 else torch.float32,
            )  # fmt: skip
            if networks:
                network.weights = networks[0].weights
            self._start_biases(network, program)
            networks.append(network)
        self.networks = nn.ModuleList(networks)

    def program_of(self, graph: Graph, bits: int, *, correct: bool) -> Program:
        """The program of a float graph at a width, one ratio; correct: the float network's means are restored."""
        prepared = replace(self.ground.prepared, graph=graph)  # with the means of the network as it was
        config = self.ground.config
        if bits < HIGH_BITS:
            masks = self.ground.full_masks()
            return uniform_program(prepared, config, masks, bits, weights="top", correct=correct)
        if graph is self.ground.prepared.graph:
            return self.ground.eight
        program = build_program(graph, prepared.statistics, config.updated(ratios=(0.0,)), group_bounds)
        if correct:
            restore_means(prepared, program, config, [0])
        return program

    def _start_biases(self, network: TrainableNetwork, program: Program) -> None:
        """What this width's corrected biases have beyond those of the shared graph."""
        with torch.no_grad():
            for name, layer in program.layers.items():
                if layer.weight is None:
                    continue
                step = program.qparams[program.instruction(name).inputs[0]].scale
                real = layer.bias[0].astype(np.float64) * layer.weight_scale.astype(np.float64) * step
                shared = self.base.constants[self.base.node(name).bias or ""]
                network.corrections[name.replace(".", "__")].copy_(torch.from_numpy((real - shared)[None]).float())

    def network(self, bits: int) -> TrainableNetwork:
        found = self.networks[self.widths.index(bits)]
        assert isinstance(found, TrainableNetwork)
        return found

    def logits(self, inputs: list[Tensor], bits: int) -> Tensor:
        result: Tensor = self.network(bits)(inputs, 0)[0]
        return result

    def export(self, bits: int, *, correct: bool = False) -> Program:
        """The integer program that computes what the twin of a width computes.

        correct: restore the means of the float network instead of the twin's own biases.
        """
        network = self.network(bits)
        graph = network.trained_graph()
        if correct:
            return self.program_of(graph, bits, correct=True)
        for name, correction in network.learned_corrections().items():
            bias = graph.node(name).bias
            assert bias is not None
            graph.constants[bias] = (graph.constants[bias] + correction[0]).astype(np.float32)
        return self.program_of(graph, bits, correct=False)
