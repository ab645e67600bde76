"""A checked program as manifest and tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.artifact.band import always_low, is_banded, weight_mask, weight_shifts
from bitdial.artifact.container import digest, dtype_code, tensor_bytes
from bitdial.artifact.graph_json import graph_to_json, stored_constants
from bitdial.artifact.jsontext import to_plain
from bitdial.artifact.packing import extract_weights, pack_signed, read_back, signed_bits
from bitdial.artifact.tables import encode_tables
from bitdial.quantization.program import Program, QuantizedLayer

Array = npt.NDArray[Any]


def encode_program(program: Program) -> tuple[dict[str, Any], dict[str, Array]]:
    """Manifest (plain JSON) and tensors by name of a program that `check_program` accepts. Raises ArtifactError."""
    layers = list(program.layers.values())
    tensors = encode_tables(layers, program.nested)
    items = []
    for layer in layers:
        weights = _weight_tensors(layer, is_banded(program))
        tensors |= {f"layers/{layer.name}/{key}": value for key, value in weights.items()}
        items.append(_layer_to_json(layer, packed="weight_low" in weights))
    constants = stored_constants(program.graph, program.layers)
    tensors |= {f"constants/{name}": program.graph.constants[name] for name in constants}
    encodings = sorted(program.qparams)
    tables = sorted(program.tables)
    factors = sorted(program.factors)
    tensors["scalars/qparam_scale"] = np.array([program.qparams[v].scale for v in encodings], np.float64)
    tensors["scalars/residual_factor"] = np.array([layer.residual_factor for layer in layers], np.float64)
    tensors["scalars/factors"] = _join([program.factors[name] for name in factors], np.dtype(np.float32))
    tensors["scalars/luts"] = _join([program.tables[name].view(np.uint8) for name in tables], np.dtype(np.uint8))
    manifest = {
        "graph": graph_to_json(program.graph, constants),
        "ratios": [float(r) for r in program.ratios],
        "extraction": program.extraction,
        "nested": bool(program.nested),
        "layers": items,
        "qparams": [[name, bool(program.qparams[name].signed)] for name in encodings],
        "tables": [[name, program.tables[name].dtype.name] for name in tables],
        "factors": [[name, len(program.factors[name])] for name in factors],
        "constants": constants,
        "float_reasons": to_plain(program.float_reasons, "float_reasons"),
        "provenance": to_plain(program.provenance, "provenance"),
        "curve": to_plain(program.curve, "curve"),
    }
    manifest["tensors"] = {
        name: [dtype_code(t, f"tensor '{name}'"), list(t.shape), digest(tensor_bytes(t, name))]
        for name, t in tensors.items()
    }
    return manifest, tensors


def _layer_to_json(layer: QuantizedLayer, packed: bool) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "shape": None if layer.weight is None else list(layer.weight.shape),
        "bias_columns": layer.bias.shape[1],
        "packed": packed,
        "eligible": bool(layer.eligible),
        "reason": layer.reason,
        "amax": int(layer.amax),
        "wmax": int(layer.wmax),
        "granularity": layer.weight_granularity,
        "conv_groups": int(layer.conv_groups),
        "n_groups": layer.n_groups,
        "accumulator_bound": int(layer.accumulator_bound),
        "macs": int(layer.macs),
    }


def _weight_tensors(layer: QuantizedLayer, banded: bool) -> dict[str, Array]:
    """{"weight": int8} or, where a band leaves groups that are always low, those packed apart:
    {"weight_low": packed, "weight_high": int8 [rest]}."""
    if layer.weight is None:
        return {}
    if not banded or not always_low(layer).any():
        return {"weight": layer.weight}
    shape = layer.weight.shape
    mask = weight_mask(always_low(layer), layer.group_bounds, shape, layer.conv_groups)
    shift = weight_shifts(layer.weight_shift, layer.group_bounds, shape, layer.conv_groups)[mask]
    low = extract_weights(layer.weight[mask], shift, layer.wmax)
    if not (read_back(low, shift) == layer.weight[mask]).all():
        return {"weight": layer.weight}  # changed since it was banded: nothing may be lost here
    return {"weight_low": pack_signed(low, signed_bits(layer.wmax)), "weight_high": layer.weight[~mask]}


def _join(parts: list[Array], dtype: np.dtype[Any]) -> Array:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)
