"""Where training of a quantized network starts: the float graph that quantizes to it, and its fingerprint."""

from __future__ import annotations

import hashlib

import numpy as np

from bitdial.errors import DataError
from bitdial.finetuning.data import Batches
from bitdial.graph.ir import Graph
from bitdial.graph.passes.edit import drop_unused, fresh_constant
from bitdial.pipeline.preparing import Prepared
from bitdial.quantization.program import Program
from bitdial.quantization.weights import quantize_weight


def start_graph(graph: Graph, program: Program) -> Graph:
    """The float graph whose quantization is the program at ratio index 0, so that training starts from what it computes.

    Every integer layer has the program's corrected bias, and weights that a former version moved for better rounding stand where
    they were moved to.
    """
    graph = graph.copy()
    for name, layer in program.layers.items():
        if layer.weight is None:
            continue
        node = graph.node(name)
        activation = program.qparams[program.instruction(name).inputs[0]]
        real = layer.bias[0].astype(np.float64) * layer.weight_scale.astype(np.float64) * activation.scale
        node.bias = fresh_constant(graph, node.bias or f"{name}_bias", real.astype(np.float32))
        assert node.weight is not None
        weight = graph.constants[node.weight]
        scale = layer.weight_scale.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
        moved = layer.weight.astype(np.int64) - quantize_weight(weight, layer.weight_scale)
        node.weight = fresh_constant(graph, node.weight, (weight + moved * scale).astype(np.float32))
    drop_unused(graph)
    return graph


def fingerprint(program: Program, prepared: Prepared, batches: Batches) -> str:
    """What a run depends on beside its settings."""
    digest = hashlib.sha256()
    for name, layer in program.layers.items():
        digest.update(f"{name} {layer.amax} {layer.wmax}".encode())
        for array in (
            layer.weight,
            layer.low_weight,
            layer.weight_scale,
            layer.activation_shift,
            layer.weight_shift,
            layer.low,
            layer.bias,
        ):
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
    for name in sorted(prepared.graph.constants):
        digest.update(np.ascontiguousarray(prepared.graph.constants[name]).tobytes())
    first = next(iter(batches.epoch(0)), None)
    if first is None:
        raise DataError("the training data are empty: give at least one batch")
    for tensor in (*first[0], first[1]):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update(str(batches.steps).encode())
    return digest.hexdigest()
