"""Engine-independent description of a program: what runs how, and why. Imports no torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitdial.artifact.packing import packed_size, signed_bits
from bitdial.quantization.program import Program, QuantizedLayer


def describe_program(program: Program) -> dict[str, Any]:
    """JSON-able: ratios, totals, one entry per integer layer, and the float operators with their reasons."""
    steps = {step.name: step for step in program.instructions}
    return {
        "ratios": list(program.ratios),
        "extraction": program.extraction,
        "nested": program.nested,
        "low_share": [program.low_share(i) for i in range(len(program.ratios))],
        "eligible_share": [program.eligible_share(i) for i in range(len(program.ratios))],
        "low_weights": describe_low_weights(program),
        "layers": [
            {**_layer(program, layer), "source": steps[name].source, "op": steps[name].operation}
            for name, layer in program.layers.items()
        ],
        "float_operators": [
            {
                "name": name,
                "op": steps[name].operation,
                "source": steps[name].source,
                "reason": reason,
                "precision": steps[name].as_node().attrs.get("precision", "float32"),
            }
            for name, reason in program.float_reasons.items()
        ],
        "reorders": [step.name for step in program.instructions if step.operation == "gather"],
    }


def describe_low_weights(program: Program) -> dict[str, Any]:
    """{"kind": "stored" | "derived" | "none", "layers": stored ones, "bytes": theirs}.

    Stored low weights are integers of their own beside the 8-bit ones; bytes are those of the groups that are low at some ratio,
    packed at their width (4 bits each up to 7).
    """
    low = [v for v in program.layers.values() if v.weight is not None and v.low.any()]
    stored = [v for v in low if v.low_weight is not None]
    size = 0
    for layer in stored:
        assert layer.low_weight is not None
        channels = int(np.diff(layer.group_bounds)[layer.low.any(axis=0)].sum())
        weights = channels * layer.low_weight.size // int(layer.group_bounds[-1])
        size += packed_size(weights, signed_bits(layer.wmax))
    return {"kind": "stored" if stored else "derived" if low else "none", "layers": len(stored), "bytes": size}


def _layer(program: Program, layer: QuantizedLayer) -> dict[str, Any]:
    activation = program.qparams[nodes_input(program, layer.name)]
    output = program.qparams.get(layer.name)
    shifts, counts = np.unique(layer.weight_shift, return_counts=True)
    return {
        "name": layer.name,
        "kind": layer.kind,
        "precision": _precision(layer),
        "reason": layer.reason,
        "input": f"{'signed' if activation.signed else 'unsigned'} 8-bit, scale {activation.scale:.6g}",
        "output": "float32" if output is None else f"{'signed' if output.signed else 'unsigned'} 8-bit",
        "weight_shape": None if layer.weight is None else list(layer.weight.shape),
        "macs": int(layer.macs),
        "groups": layer.n_groups,
        "group_bounds": layer.group_bounds.tolist(),
        "low_range": {"activations": layer.amax, "weights": layer.wmax},
        "low_groups": [int(row.sum()) for row in layer.low],
        "activation_shift": layer.activation_shift.tolist(),
        "weight_shift_histogram": {int(s): int(c) for s, c in zip(shifts, counts, strict=True)},
        "weight_shift_granularity": layer.weight_granularity,
    }


def _precision(layer: QuantizedLayer) -> str:
    if layer.n_groups and bool(layer.low.all()):
        return f"low at every ratio, to {layer.amax} and {layer.wmax}"
    return "8-bit, low channels by ratio" if layer.eligible else "8-bit"


def nodes_input(program: Program, name: str) -> str:
    """The value that a layer reads first."""
    return program.instruction(name).inputs[0]
