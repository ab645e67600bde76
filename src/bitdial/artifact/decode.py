"""Manifest and tensors back to a program. Everything read is hostile until checked."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from bitdial.artifact.band import always_low, weight_mask, weight_shifts
from bitdial.artifact.checks import EXTRACTIONS, GRANULARITIES, LAYER_KINDS, MAX_MACS, check_program, check_ratios
from bitdial.artifact.graph_json import graph_from_json, stored_constants
from bitdial.artifact.jsontext import Fields, from_plain
from bitdial.artifact.packing import extract_weights, packed_size, read_back, signed_bits, unpack_signed
from bitdial.artifact.tables import KINDS, Outline, decode_tables, expanded_bytes
from bitdial.errors import ArtifactError
from bitdial.quantization.program import Extraction, Program, QParams, QuantizedLayer

Array = npt.NDArray[Any]
_TABLE_FLOOR = 32 * 2**20
_TABLE_FACTOR = 16  # decoded tables may take this many times the file's size, plus the floor


class _Tensors:
    """The tensors of the file, each to be taken once with the dtype and shape that the manifest leads to expect."""

    def __init__(self, tensors: dict[str, Array], where: str) -> None:
        self._rest = dict(tensors)
        self.where = where

    def take(self, name: str, dtype: type[np.generic] | None, shape: tuple[int, ...] | None) -> Array:
        """`None`: any. Floats must be numbers, and finite but for -inf in constants (attention masks)."""
        if name not in self._rest:
            raise ArtifactError(f"{self.where}: tensor '{name:.100}' is missing; get a sound copy of the file")
        array = self._rest.pop(name)
        if (dtype is not None and array.dtype != dtype) or (shape is not None and array.shape != shape):
            raise ArtifactError(
                f"{self.where}: tensor '{name:.100}' is {array.dtype}{list(array.shape)}, not what the manifest says "
                f"({'any' if dtype is None else np.dtype(dtype).name}{'' if shape is None else list(shape)}); "
                "get a sound copy of the file"
            )
        if array.dtype.kind == "f":
            fine = np.isfinite(array)
            if name.startswith("constants/"):
                fine |= np.isneginf(array)
            if not fine.all():
                raise ArtifactError(
                    f"{self.where}: tensor '{name:.100}' holds NaN or infinity; quantize and save again"
                )
        return array

    def size(self, name: str) -> int:
        """Elements of a tensor, 0 if it is missing."""
        return self._rest[name].size if name in self._rest else 0

    def done(self) -> None:
        if self._rest:
            raise ArtifactError(
                f"{self.where}: unknown tensor '{sorted(self._rest)[0]:.100}'; get a sound copy of the file"
            )


def decode_program(manifest: dict[str, Any], tensors: dict[str, Array], file_size: int, where: str) -> Program:
    """The program of a file of the current version. Raises ArtifactError.

    manifest: without "tensors" (shapes and hashes have been compared). file_size: bytes, bounds what may be allocated.
    """
    fields = Fields(manifest, f"{where}: manifest")
    stock = _Tensors(tensors, where)
    graph = graph_from_json(fields.any("graph"), where)
    ratios = fields.rows("ratios")
    check_ratios(ratios, where)
    nested = fields.flag("nested")
    layers = _decode_layers(fields.rows("layers"), stock, len(ratios), nested, file_size, where)
    for name in fields.strings("constants"):
        if name in graph.constants:
            raise ArtifactError(f"{where}: constant '{name:.80}' is named twice; get a sound copy of the file")
        graph.constants[name] = stock.take(f"constants/{name}", None, None)
    encodings = _pairs(fields, "qparams", bool)
    scales = stock.take("scalars/qparam_scale", np.float64, (len(encodings),))
    tables = _pairs(fields, "tables", str)
    luts = stock.take("scalars/luts", np.uint8, (256 * len(tables),)).reshape(-1, 256)
    if not all(dtype in ("int8", "uint8") for dtype in tables.values()):
        raise fields.fail("tables", "holds an unknown dtype")
    lengths = _pairs(fields, "factors", int)
    if not all(0 <= n < 2**32 for n in lengths.values()):
        raise fields.fail("factors", "holds a length out of range")
    factors = stock.take("scalars/factors", np.float32, (sum(lengths.values()),))
    ends = np.cumsum(list(lengths.values()), dtype=np.int64)
    reasons = fields.mapping("float_reasons")
    if not all(isinstance(v, str) for v in reasons.values()):
        raise fields.fail("float_reasons", "holds something other than strings")
    provenance = from_plain(fields.mapping("provenance"), f"{where}: provenance")
    curve = from_plain(fields.rows("curve"), f"{where}: curve")
    if not isinstance(provenance, dict) or not all(isinstance(row, dict) for row in curve):
        raise fields.fail("curve", "holds something other than rows, or the provenance is no object")
    program = Program(
        graph=graph,
        ratios=ratios,
        qparams={v: QParams(float(s), signed) for (v, signed), s in zip(encodings.items(), scales, strict=True)},
        layers=layers,
        tables={name: lut.view(dtype).copy() for (name, dtype), lut in zip(tables.items(), luts, strict=True)},
        factors={
            name: factors[end - length : end].copy() for (name, length), end in zip(lengths.items(), ends, strict=True)
        },
        extraction=cast(Extraction, fields.choice("extraction", EXTRACTIONS)),
        nested=nested,
        float_reasons=reasons,
        provenance=provenance,
        curve=curve,
    )
    fields.done()
    stock.done()
    check_program(program, where)
    for node in graph.nodes:
        if not {node.weight, node.bias} <= {None, *graph.constants}:
            raise ArtifactError(f"{where}: node '{node.name:.80}' names weights that are not there; get a sound copy")
    if stored_constants(graph, layers) != sorted(graph.constants):
        raise ArtifactError(f"{where}: constants that no node uses; get a sound copy of the file")
    return program


def _pairs(fields: Fields, key: str, kind: type) -> dict[str, Any]:
    """A list of [name, value] with distinct names and values of exactly type `kind`."""
    rows = fields.rows(key)
    if not all(isinstance(r, list) and len(r) == 2 and isinstance(r[0], str) and type(r[1]) is kind for r in rows):
        raise fields.fail(key, "is no list of pairs of the right types")
    result = {r[0]: r[1] for r in rows}
    if len(result) != len(rows):
        raise fields.fail(key, "names something twice")
    return result


def _decode_layers(
    items: list[Any], stock: _Tensors, n_ratios: int, nested: bool, file_size: int, where: str
) -> dict[str, QuantizedLayer]:
    layers: dict[str, QuantizedLayer] = {}
    shapes: list[tuple[int, ...] | None] = []
    packed: list[bool] = []
    outlines: list[Outline] = []
    for index, item in enumerate(items):
        layer, shape, is_packed, n_groups, columns = _layer_head(item, f"{where}: layer {index}")
        here = f"{where}: layer '{layer.name:.80}'"
        if layer.name in layers:
            raise ArtifactError(f"{here} appears twice; get a sound copy of the file")
        _check_weight_size(layer, shape, is_packed, stock, here)
        outputs, channels = (1, 0) if shape is None else (shape[0], shape[1] * layer.conv_groups)
        if shape is not None and (outputs % layer.conv_groups or not 1 <= n_groups <= channels or columns != outputs):
            raise ArtifactError(f"{here}: groups or bias do not fit the weight shape; get a sound copy of the file")
        if n_groups % layer.conv_groups or (shape is None and (n_groups or columns > 1 or layer.conv_groups != 1)):
            raise ArtifactError(f"{here}: groups do not fit the layer; get a sound copy of the file")
        layers[layer.name] = layer
        shapes.append(shape)
        packed.append(is_packed)
        outlines.append(
            Outline(
                outputs=columns,
                scales=0 if shape is None else outputs,
                multipliers=outputs,
                rows=0 if shape is None else outputs,
                channels=channels,
                n_groups=n_groups,
                conv_groups=layer.conv_groups,
                tied=layer.weight_granularity != "output",
                macs=layer.macs,
            )
        )
    if expanded_bytes(outlines, n_ratios) > _TABLE_FLOOR + _TABLE_FACTOR * file_size:
        raise ArtifactError(f"{where}: tables out of all proportion to the file's size; get a sound copy of the file")
    ratios = stock.take("scalars/multiplier_ratio", np.float64, (len(layers),))
    packed_tables = {f"tables/{kind}": stock.take(f"tables/{kind}", np.uint8, None) for kind in KINDS}
    if any(table.ndim != 1 for table in packed_tables.values()):
        raise ArtifactError(f"{where}: a packed table is no vector; get a sound copy of the file")
    decoded = decode_tables(packed_tables | {"scalars/multiplier_ratio": ratios}, outlines, n_ratios, nested, where)
    residuals = stock.take("scalars/residual_factor", np.float64, (len(layers),))
    for layer, shape, is_packed, arrays, residual in zip(
        layers.values(), shapes, packed, decoded, residuals, strict=True
    ):
        for field, array in arrays.items():
            setattr(layer, field, array)
        layer.residual_factor = float(residual)
        if shape is not None:
            take = _packed_weight if is_packed else _plain_weight
            layer.weight = take(layer, shape, stock, f"{where}: layer '{layer.name:.80}'")
    return layers


def _layer_head(item: Any, where: str) -> tuple[QuantizedLayer, tuple[int, ...] | None, bool, int, int]:
    """The layer without its arrays, weight shape, packed, n_groups, columns of the bias table."""
    fields = Fields(item, where)
    kind = fields.choice("kind", LAYER_KINDS)
    shape = fields.any("shape")
    if (shape is None) != (kind == "matmul"):
        raise fields.fail("shape", "does not go with the kind of layer")
    if shape is not None:
        good = isinstance(shape, list) and 2 <= len(shape) <= 5
        if not good or not all(isinstance(d, int) and not isinstance(d, bool) and 1 <= d < 2**40 for d in shape):
            raise fields.fail("shape", "is no list of two to five positive integers")
    empty = np.zeros(0)
    layer = QuantizedLayer(
        name=fields.text("name"),
        kind=kind,
        weight=None,
        weight_scale=empty.astype(np.float32),
        multiplier=empty.astype(np.float32),
        residual_factor=0.0,
        eligible=fields.flag("eligible"),
        reason=fields.text("reason"),
        amax=fields.integer("amax", 0, 255),
        wmax=fields.integer("wmax", 0, 127),
        group_bounds=empty.astype(np.int32),
        activation_shift=empty.astype(np.uint8),
        weight_shift=empty.astype(np.uint8),
        weight_granularity=fields.choice("granularity", GRANULARITIES),
        group_macs=empty.astype(np.int64),
        low=empty.astype(np.bool_),
        bias=empty.astype(np.int32),
        conv_groups=fields.integer("conv_groups", 1, 2**31),
        accumulator_bound=fields.integer("accumulator_bound", 0, 2**31 - 1),
        macs=fields.integer("macs", 0, MAX_MACS),
    )
    packed = fields.flag("packed")
    n_groups = fields.integer("n_groups", 0, 2**31)
    columns = fields.integer("bias_columns", 0, 2**40)
    fields.done()
    return layer, None if shape is None else tuple(shape), packed, n_groups, columns


def _check_weight_size(
    layer: QuantizedLayer, shape: tuple[int, ...] | None, packed: bool, stock: _Tensors, where: str
) -> None:
    """The weights in the file must be as many as the shape says, before anything is sized by that shape."""
    if shape is None:
        return
    if layer.wmax < 1:
        raise ArtifactError(f"{where}: wmax is not positive; get a sound copy of the file")
    count = math.prod(shape)
    prefix = f"layers/{layer.name}/"
    if packed:
        low = count - stock.size(prefix + "weight_high")
        fits = low > 0 and packed_size(low, signed_bits(layer.wmax)) == stock.size(prefix + "weight_low")
    else:
        fits = stock.size(prefix + "weight") == count
    if not fits:
        raise ArtifactError(
            f"{where}: the stored weights do not fill the shape {list(shape)}; get a sound copy of the file"
        )


def _plain_weight(layer: QuantizedLayer, shape: tuple[int, ...], stock: _Tensors, where: str) -> npt.NDArray[np.int8]:
    return stock.take(f"layers/{layer.name}/weight", np.int8, shape)


def _packed_weight(layer: QuantizedLayer, shape: tuple[int, ...], stock: _Tensors, where: str) -> npt.NDArray[np.int8]:
    """8-bit weights from the packed low values of the always-low groups and the 8-bit values of the others."""
    broken = ArtifactError(f"{where}: the packed weights do not fit the groups or limits; get a sound copy of the file")
    bounds = layer.group_bounds
    mask = weight_mask(always_low(layer), bounds, shape, layer.conv_groups)
    count = int(np.count_nonzero(mask))
    bits = signed_bits(layer.wmax)
    packed = stock.take(f"layers/{layer.name}/weight_low", np.uint8, (packed_size(count, bits),))
    high = stock.take(f"layers/{layer.name}/weight_high", np.int8, (mask.size - count,))
    low = unpack_signed(packed, count, bits)
    if layer.weight_shift.max() > 7:
        raise broken
    shift = weight_shifts(layer.weight_shift, bounds, shape, layer.conv_groups)[mask]
    weight = np.empty(shape, np.int8)
    weight[mask] = read_back(low, shift)
    weight[~mask] = high
    if not (extract_weights(weight[mask], shift, layer.wmax) == low).all():
        raise broken
    return weight
