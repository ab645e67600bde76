"""A program at one ratio -> an ONNX model, in memory or as a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from bitdial._version import __version__
from bitdial.engines.base import ratio_index
from bitdial.errors import ConfigError
from bitdial.export.onnx import compute, integers
from bitdial.export.onnx.aten import write_aten
from bitdial.export.onnx.builder import FLOAT, Builder, data_type
from bitdial.export.onnx.extraction import FIRST_INT4_OPSET
from bitdial.export.onnx.floats import FLOAT_OPS, max_pool
from bitdial.export.onnx.movement import MOVEMENT
from bitdial.export.onnx.writer import Writer
from bitdial.files import write_atomically
from bitdial.quantization.instructions import (
    Add,
    Concat,
    Contract,
    Dequantize,
    Float,
    Instruction,
    Lookup,
    MatMul,
    MaxPool,
    Move,
    Mul,
    Quantize,
    SumPool,
)
from bitdial.quantization.program import Program

DEFAULT_OPSET = 21  # the first with 4-bit types
SMALLEST_OPSET = 18  # reductions take their axes as an input, Resize and Mish exist
LARGEST_OPSET = 24
Low = Literal["int4", "int8"]


@dataclass(frozen=True)
class OnnxModel:
    """A written model.

    proto: the onnx.ModelProto. data: its bytes. ratio: of the program's table. low: "int4" or "int8".
    int4_weights, int8_weights: how many weights of integer layers are stored in 4 and in 8 bits.
    split_layers: nodes whose activations are cut into digits so that float32 sums stay exact.
    """

    proto: Any
    data: bytes
    ratio: float
    opset: int
    low: Low
    int4_weights: int
    int8_weights: int
    split_layers: list[str]


def to_onnx(
    program: Program,
    ratio: float,
    *,
    opset: int = DEFAULT_OPSET,
    low: Low | None = None,
    digest: str | None = None,
) -> OnnxModel:
    """The model at the table's ratio at or below `ratio`, batch size free.

    opset: 18 to 24; 4-bit types exist from 21. low: how weights of low groups are stored; None is "int4" where the opset
    has it. digest: sha256 of the source file's manifest, put into the metadata. Raises RatioError, ConfigError, and
    ExportError naming an operator that has no ONNX form here, or where the package onnx is missing.
    """
    index = ratio_index(program.ratios, ratio)
    chosen = _check_options(opset, low)
    builder = Builder(opset)
    largest = builder.onnx.defs.onnx_opset_version()
    if opset > largest:
        raise ConfigError(f"opset {opset}: the installed onnx package knows opsets up to {largest}; upgrade it")
    w = Writer(program, index, builder, chosen)
    for step in program.instructions:
        written = HANDLERS[type(step)](w, step)
        assert written == step.name
    outputs = [_output(w, value, position) for position, value in enumerate(program.outputs)]
    inputs = [builder.value_info(v, data_type(program.types[v].dtype), w.onnx_shape(v)) for v in program.inputs]
    metadata = {
        "bitdial_version": __version__,
        "bitdial_ratio": repr(float(program.ratios[index])),
        "bitdial_low": chosen,
        "bitdial_extraction": program.extraction,
    }
    if digest is not None:
        metadata["bitdial_digest"] = digest
    proto = builder.model(inputs, outputs, metadata, __version__)
    return OnnxModel(
        proto=proto,
        data=proto.SerializeToString(deterministic=True),
        ratio=float(program.ratios[index]),
        opset=opset,
        low=chosen,
        int4_weights=w.notes["int4_weights"],
        int8_weights=w.notes["int8_weights"],
        split_layers=list(dict.fromkeys(w.notes["float32_layers_split"])),
    )


def export_onnx(
    program: Program,
    path: str | os.PathLike[str],
    ratio: float,
    *,
    opset: int = DEFAULT_OPSET,
    low: Low | None = None,
    digest: str | None = None,
) -> OnnxModel:
    """`to_onnx`, written to `path` whole or not at all (a file there is replaced). Also raises OutputError."""
    model = to_onnx(program, ratio, opset=opset, low=low, digest=digest)
    write_atomically(path, model.data, "the ONNX model")
    return model


def _check_options(opset: int, low: str | None) -> Low:
    if not SMALLEST_OPSET <= opset <= LARGEST_OPSET:
        raise ConfigError(f"opset {opset}: choose {SMALLEST_OPSET} to {LARGEST_OPSET}; 4-bit types need 21 or more")
    if low is None:
        return "int4" if opset >= FIRST_INT4_OPSET else "int8"
    if low not in ("int4", "int8"):
        raise ConfigError(f"low weights as '{low}': choose int4 or int8")
    if low == "int4" and opset < FIRST_INT4_OPSET:
        raise ConfigError(f"int4 needs opset {FIRST_INT4_OPSET} or more, and {opset} was asked for; choose int8")
    return "int4" if low == "int4" else "int8"


def _float(w: Writer, step: Float) -> str:
    node = step.node
    if node.op in MOVEMENT:
        return MOVEMENT[node.op](w, node)
    if node.op in FLOAT_OPS:
        return FLOAT_OPS[node.op](w, node)
    if node.op.startswith("aten."):
        return write_aten(w, node)
    raise w.unsupported(node, "it has no ONNX form in bitdial")


HANDLERS: dict[type[Instruction], Callable[[Writer, Any], str]] = {
    Quantize: integers.quantize, Dequantize: integers.dequantize, Contract: compute.contract, MatMul: compute.matmul,
    Lookup: integers.lookup, Add: integers.add, Mul: integers.mul, Concat: integers.concat, SumPool: integers.sum_pool,
    MaxPool: lambda w, step: max_pool(w, step.name, step.inputs[0], step.window, step.ceil_mode),
    Move: lambda w, step: MOVEMENT[step.node.op](w, step.node), Float: _float,
}  # fmt: skip


def _output(w: Writer, value: str, position: int) -> Any:
    """A graph output under its own name; integers of an 8-bit output become float32, as engines return them."""
    b = w.b
    eight = w.encoding(value) is not None
    produced = any(value == step.name for step in w.program.instructions)
    again = value in w.program.outputs[:position]
    if eight:
        name = b.cast(w.value(value), FLOAT, f"{value}/out")
    elif again or not produced:
        name = b.emit("Identity", [w.value(value)], f"{value}/out")
    else:
        name = value
    dtype = "float32" if eight else w.dtype(value)
    return b.value_info(name, data_type(dtype), w.onnx_shape(value))
