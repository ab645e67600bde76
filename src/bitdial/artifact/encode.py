"""A checked program as manifest and tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.artifact.band import is_banded
from bitdial.artifact.container import digest, dtype_code, tensor_bytes
from bitdial.artifact.instruction_json import instruction_to_json, layer_to_json, types_to_json
from bitdial.artifact.jsontext import to_plain
from bitdial.artifact.tables import encode_tables
from bitdial.artifact.weights import weight_tensors
from bitdial.quantization.instructions import Lookup
from bitdial.quantization.lengths import at_length
from bitdial.quantization.program import Program

Array = npt.NDArray[Any]


def encode_program(program: Program) -> tuple[dict[str, Any], dict[str, Array]]:
    """Manifest (plain JSON) and tensors by name of a program that `check_program` accepts. Raises ArtifactError."""
    layers = list(program.layers.values())
    tensors = encode_tables(layers, program.nested)
    rows = {}
    for layer in layers:
        weights = weight_tensors(layer, is_banded(program))
        tensors |= {f"layers/{layer.name}/{key}": value for key, value in weights.items()}
        rows[layer.name] = layer_to_json(layer, packed="weight_high" in weights, plane="low_plane" in weights)
    constants = stored_constants(program)
    tensors |= {f"constants/{name}": program.constants[name] for name in constants}
    encodings = sorted(program.qparams)
    tables = [step.table for step in program.instructions if isinstance(step, Lookup)]
    tensors["scalars/qparam_scale"] = np.array([program.qparams[v].scale for v in encodings], np.float64)
    tensors["scalars/residual_factor"] = np.array([layer.residual_factor for layer in layers], np.float64)
    tensors["scalars/luts"] = np.concatenate([np.zeros(0, np.uint8), *(table.view(np.uint8) for table in tables)])
    kept = {*program.inputs, *(step.name for step in program.instructions), *constants}
    manifest = {
        "inputs": list(program.inputs),
        "outputs": list(program.outputs),
        "types": types_to_json({name: kind for name, kind in program.types.items() if name in kept}),
        "instructions": [instruction_to_json(step, rows.get(step.name)) for step in program.instructions],
        "ratios": [float(r) for r in program.ratios],
        "extraction": program.extraction,
        "nested": bool(program.nested),
        "qparams": [[name, bool(program.qparams[name].signed)] for name in encodings],
        "constants": constants,
        "provenance": to_plain(program.provenance, "provenance"),
        "curve": to_plain(program.curve, "curve"),
    }
    if program.lengths:
        manifest["lengths"] = [_length_to_json(program, n, rows, tensors) for n in sorted(program.lengths)]
    if program.structure is not None:
        manifest["structure"] = to_plain(program.structure, "output structure")
    manifest["tensors"] = {
        name: [dtype_code(t, f"tensor '{name}'"), list(t.shape), digest(tensor_bytes(t, name))]
        for name, t in tensors.items()
    }
    return manifest, tensors


def _length_to_json(
    program: Program, length: int, rows: dict[str, dict[str, Any]], tensors: dict[str, Array]
) -> dict[str, Any]:
    """What differs for shorter sequences. rows: of the layers at full length. Adds constants of its own to the tensors."""
    own = at_length(program, length)
    there = set(stored_constants(program)) - program.lengths[length].constants.keys()
    constants = [name for name in stored_constants(own) if name not in there]
    tensors |= {f"lengths/{length}/{name}": own.constants[name] for name in constants}
    kept = {*own.inputs, *(step.name for step in own.instructions), *stored_constants(own)}
    layers = {
        name: {**rows[name], "macs": int(layer.macs), "accumulator_bound": int(layer.accumulator_bound)}
        for name, layer in own.layers.items()
    }
    return {
        "length": length,
        "types": types_to_json({name: kind for name, kind in own.types.items() if name in kept}),
        "instructions": [instruction_to_json(step, layers.get(step.name)) for step in own.instructions],
        "constants": constants,
    }


def stored_constants(program: Program) -> list[str]:
    """Names of the constants that a file needs, sorted: those that an instruction reads or the network returns."""
    used = {*program.outputs, *(v for step in program.instructions for v in step.operands())}
    return sorted(used & program.constants.keys())
