"""Manifest and tensors back to a program. Everything read is hostile until checked."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from bitdial.artifact.checks import EXTRACTIONS, check_program, check_ratios
from bitdial.artifact.encode import stored_constants
from bitdial.artifact.instruction_json import LayerHead, instruction_from_json, types_from_json
from bitdial.artifact.jsontext import Fields, from_plain
from bitdial.artifact.tables import KINDS, Outline, decode_tables, expanded_bytes
from bitdial.artifact.tensors import Tensors
from bitdial.artifact.weights import check_weight_size, read_weights
from bitdial.errors import ArtifactError
from bitdial.quantization.instructions import Instruction, Lookup
from bitdial.quantization.program import Extraction, Program, QParams, Shorter

Array = npt.NDArray[Any]
_TABLE_FLOOR = 32 * 2**20
_TABLE_FACTOR = 16  # decoded tables may take this many times the file's size, plus the floor


def decode_program(manifest: dict[str, Any], tensors: dict[str, Array], file_size: int, where: str) -> Program:
    """The program of a file of the current version. Raises ArtifactError.

    manifest: without "tensors" (shapes and hashes have been compared). file_size: bytes, bounds what may be allocated.
    """
    fields = Fields(manifest, f"{where}: manifest")
    stock = Tensors(tensors, where)
    ratios = fields.rows("ratios")
    check_ratios(ratios, where)
    nested = fields.flag("nested")
    instructions, heads = _decode_instructions(fields.rows("instructions"), stock, where)
    _fill_layers(heads, stock, len(ratios), nested, file_size, where)
    constants: dict[str, Array] = {}
    for name in fields.strings("constants"):
        if name in constants:
            raise ArtifactError.damaged(where, f"constant '{name:.80}' is named twice")
        constants[name] = stock.take(f"constants/{name}", None, None)
    encodings = _pairs(fields, "qparams", bool)
    scales = stock.take("scalars/qparam_scale", np.float64, (len(encodings),))
    provenance = from_plain(fields.mapping("provenance"), f"{where}: provenance")
    curve = from_plain(fields.rows("curve"), f"{where}: curve")
    if not isinstance(provenance, dict) or not all(isinstance(row, dict) for row in curve):
        raise fields.fail("curve", "holds something other than rows, or the provenance is no object")
    program = Program(
        inputs=fields.strings("inputs"),
        outputs=fields.strings("outputs"),
        instructions=instructions,
        types=types_from_json(fields.mapping("types"), where),
        constants=constants,
        qparams={v: QParams(float(s), signed) for (v, signed), s in zip(encodings.items(), scales, strict=True)},
        ratios=ratios,
        structure=fields.optional_rows("structure"),
        extraction=cast(Extraction, fields.choice("extraction", EXTRACTIONS)),
        nested=nested,
        provenance=provenance,
        curve=curve,
    )
    for item in fields.optional_rows("lengths") or []:
        length, shorter = _decode_length(item, program, stock, where)
        if length in program.lengths:
            raise ArtifactError.damaged(where, f"length {length} is there twice")
        program.lengths[length] = shorter
    fields.done()
    stock.done()
    check_program(program, where)
    if stored_constants(program) != sorted(constants):
        raise ArtifactError.damaged(where, "constants that no instruction uses")
    return program


def _decode_length(item: Any, program: Program, stock: Tensors, where: str) -> tuple[int, Shorter]:
    """A shorter length and what differs there; its tables and layers are the program's."""
    fields = Fields(item, f"{where}: lengths")
    length = fields.integer("length", 1, 2**31)
    fields.where = here = f"{where}: length {length}"
    tables = iter([step.table for step in program.instructions if isinstance(step, Lookup)])

    def table(dtype: str) -> Array:
        found = next(tables, None)
        if found is None or found.dtype.name != dtype:
            raise ArtifactError.damaged(here, "its tables are not those of the full length")
        return found

    rows = fields.rows("instructions")
    if len(rows) != len(program.instructions):
        raise ArtifactError.damaged(here, "its instructions are not those of the full length")
    instructions = []
    for index, (row, own) in enumerate(zip(rows, program.instructions, strict=True)):
        step, head = instruction_from_json(row, f"{here}: instruction {index}", table)
        same = type(step) is type(own) and (step.name, step.operation, step.inputs) == (own.name, own.operation, own.inputs)
        if not same or (head is not None and head.layer.macs > program.layers[step.name].macs):
            raise ArtifactError.damaged(here, f"instruction {index} is not that of the full length")
        instructions.append(step)
    constants = {name: stock.take(f"lengths/{length}/{name}", None, None) for name in fields.strings("constants")}
    shorter = Shorter(instructions, types_from_json(fields.mapping("types"), here), constants)
    fields.done()
    return length, shorter


def _decode_instructions(items: list[Any], stock: Tensors, where: str) -> tuple[list[Instruction], list[LayerHead]]:
    """The instructions, whose layers have no arrays yet, and what is known of these layers, in the same order."""
    luts = stock.take("scalars/luts", np.uint8, None).reshape(-1)
    used = 0

    def table(dtype: str) -> Array:
        nonlocal used
        used += 256
        return luts[used - 256 : used].view(dtype).copy()

    instructions, heads = [], []
    for index, item in enumerate(items):
        step, head = instruction_from_json(item, f"{where}: instruction {index}", table)
        instructions.append(step)
        if head is not None:
            heads.append(head)
    if used != luts.size:
        raise ArtifactError.damaged(where, f"'scalars/luts' is not {used} bytes, 256 per table")
    return instructions, heads


def _pairs(fields: Fields, key: str, kind: type) -> dict[str, Any]:
    """A list of [name, value] with distinct names and values of exactly type `kind`."""
    rows = fields.rows(key)
    if not all(isinstance(r, list) and len(r) == 2 and isinstance(r[0], str) and type(r[1]) is kind for r in rows):
        raise fields.fail(key, "is no list of pairs of the right types")
    result = {r[0]: r[1] for r in rows}
    if len(result) != len(rows):
        raise fields.fail(key, "names something twice")
    return result


def _fill_layers(
    heads: list[LayerHead], stock: Tensors, n_ratios: int, nested: bool, file_size: int, where: str
) -> None:
    """Give every layer its arrays."""
    outlines: list[Outline] = []
    for head in heads:
        layer, shape, n_groups = head.layer, head.shape, head.n_groups
        here = f"{where}: layer '{layer.name:.80}'"
        check_weight_size(head, stock, here)
        outputs, channels = (1, 0) if shape is None else (shape[0], shape[1] * layer.conv_groups)
        if shape is not None and (
            outputs % layer.conv_groups or not 1 <= n_groups <= channels or head.columns != outputs
        ):
            raise ArtifactError.damaged(here, "groups or bias do not fit the weight shape")
        if n_groups % layer.conv_groups or (shape is None and (n_groups or head.columns > 1 or layer.conv_groups != 1)):
            raise ArtifactError.damaged(here, "groups do not fit the layer")
        outlines.append(
            Outline(
                outputs=head.columns,
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
        raise ArtifactError.damaged(where, "tables out of all proportion to the file's size")
    ratios = stock.take("scalars/multiplier_ratio", np.float64, (len(heads),))
    packed_tables = {f"tables/{kind}": stock.take(f"tables/{kind}", np.uint8, None) for kind in KINDS}
    if any(table.ndim != 1 for table in packed_tables.values()):
        raise ArtifactError.damaged(where, "a packed table is no vector")
    decoded = decode_tables(packed_tables | {"scalars/multiplier_ratio": ratios}, outlines, n_ratios, nested, where)
    residuals = stock.take("scalars/residual_factor", np.float64, (len(heads),))
    for head, arrays, residual in zip(heads, decoded, residuals, strict=True):
        layer = head.layer
        for field, array in arrays.items():
            setattr(layer, field, array)
        layer.residual_factor = float(residual)
        if head.shape is not None:
            read_weights(head, stock, f"{where}: layer '{layer.name:.80}'")
