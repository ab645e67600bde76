"""The quantized model as plain data: what selection fills in, the artifact stores and every engine runs. NumPy only.

A `Program` is a list of instructions (`bitdial.quantization.instructions`) with what they need beside them: the types of values,
constants, and the encodings of 8-bit values (float32 or the like elsewhere). Layers, factors and tables live in the instructions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from bitdial.graph.ir import Array, Graph, TensorType
from bitdial.quantization.instructions import Contract, Float, Instruction, MatMul
from bitdial.quantization.layer import BLOCK_ROWS, QParams, QuantizedLayer, WeightGranularity

Extraction = Literal["static", "dynamic", "naive"]


@dataclass
class Shorter:
    """What differs in a program for shorter sequences (`bitdial.quantization.lengths`): instructions, whose layers lend only
    their work and the bound of products of activations; types; constants that are others or that the full length has not."""

    instructions: list[Instruction]
    types: dict[str, TensorType]
    constants: dict[str, Array]


@dataclass
class Program:
    """A quantized network with its dial.

    inputs, outputs, structure, types, constants   as those of a `Graph`; the types of 8-bit values are "uint8" and "int8"
    instructions   in topological order; each lends its name to its result
    qparams        value name -> encoding, for every 8-bit value (inputs of the network are float32)
    ratios         ascending, ratios[0] == 0.0; the last is normally 1.0
    extraction     "static" | "dynamic" | "naive" (static with the top bits always)
    nested         low[r] is a subset of low[r+1] for every layer
    provenance     JSON-able: bitdial version, config, calibration summary, search statistics, seed
    curve          JSON-able rows measured on data: {"ratio", "accuracy", "agreement", ...}
    lengths        shorter sequences that the program serves too: length -> what differs
    """

    inputs: list[str]
    outputs: list[str]
    instructions: list[Instruction]
    types: dict[str, TensorType]
    constants: dict[str, Array]
    qparams: dict[str, QParams]
    ratios: list[float]
    structure: Any = None
    extraction: Extraction = "static"
    nested: bool = True
    provenance: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    lengths: dict[int, Shorter] = field(default_factory=dict)

    @property
    def layers(self) -> Mapping[str, QuantizedLayer]:
        """Name -> layer of every `Contract` and `MatMul`, in order; the instructions' own objects, so that writing into one
        changes the program."""
        return MappingProxyType({s.name: s.layer for s in self.instructions if isinstance(s, (Contract, MatMul))})

    def with_layers(self, layers: Mapping[str, QuantizedLayer]) -> Program:
        """A program whose instructions hold these layers instead of those of the same names; all else is shared."""
        steps = [
            replace(s, layer=layers[s.name]) if isinstance(s, (Contract, MatMul)) and s.name in layers else s
            for s in self.instructions
        ]
        return replace(self, instructions=steps)

    @property
    def float_reasons(self) -> dict[str, str]:
        """Name -> why it runs in float, of every instruction for which there is something to say."""
        return {s.name: s.reason for s in self.instructions if isinstance(s, Float) and s.reason}

    def instruction(self, name: str) -> Instruction:
        """The instruction that makes a value. Raises KeyError."""
        for step in self.instructions:
            if step.name == name:
                return step
        raise KeyError(name)

    @property
    def graph(self) -> Graph:
        """A graph of nodes for what works on graphs (shapes, batch axes, printing), made anew at each call: changed nodes
        change nothing here, while inputs, outputs, constants and types are the program's own objects. Quantized layers name
        no weights; `quantize`, `dequantize` and `table` appear only here."""
        nodes = [step.as_node() for step in self.instructions]
        return Graph(self.inputs, self.outputs, nodes, self.constants, self.types, self.structure)

    def low_share(self, ratio_index: int) -> float:
        """Share of all multiply-accumulates (eligible or not) that run low at a ratio."""
        total = sum(layer.macs for layer in self.layers.values())
        low = sum(
            int(layer.group_macs[layer.low[ratio_index]].sum()) for layer in self.layers.values() if layer.n_groups
        )
        return low / total if total else 0.0

    def eligible_share(self, ratio_index: int) -> float:
        """Share of the low-eligible multiply-accumulates that run low at a ratio (what the dial counts)."""
        eligible = [layer for layer in self.layers.values() if layer.eligible]
        total = sum(int(layer.group_macs.sum()) for layer in eligible)
        low = sum(int(layer.group_macs[layer.low[ratio_index]].sum()) for layer in eligible)
        return low / total if total else 0.0


__all__ = ["BLOCK_ROWS", "Extraction", "Program", "QParams", "QuantizedLayer", "Shorter", "WeightGranularity"]
