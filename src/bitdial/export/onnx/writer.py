"""What the operator translators share: the program, the ratio, and how its values are named and read in ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bitdial.errors import ExportError
from bitdial.export.onnx.builder import FLOAT, Builder
from bitdial.graph.ir import BatchDim, Node, Shape
from bitdial.quantization.instructions import Instruction
from bitdial.quantization.program import Program, QParams


class Writer:
    """Translates values; nodes are translated by the functions of the neighbouring modules.

    index: of the ratio. low: "int4" or "int8", how weights of low groups are stored.
    """

    def __init__(self, program: Program, index: int, builder: Builder, low: str) -> None:
        self.program, self.index, self.b, self.low = program, index, builder, low
        self._floats: dict[str, str] = {}
        self._batch: str | None = None
        self.notes: dict[str, Any] = {"float32_layers_split": [], "int4_weights": 0, "int8_weights": 0}
        for name in (*self.program.inputs, *(step.name for step in program.instructions)):
            builder.reserve(name)

    # -- what a value is -----------------------------------------------------------------------------------------------

    def shape(self, value: str) -> Shape:
        if value in self.program.types:
            return self.program.types[value].shape
        return tuple(int(d) for d in self.program.constants[value].shape)

    def rank(self, value: str) -> int:
        return len(self.shape(value))

    def dtype(self, value: str) -> str:
        if value in self.program.types:
            return self.program.types[value].dtype
        return str(self.program.constants[value].dtype.name)

    def encoding(self, value: str) -> QParams | None:
        """Of an 8-bit value; None for others."""
        return self.program.qparams.get(value)

    # -- reading values ------------------------------------------------------------------------------------------------

    def value(self, name: str) -> str:
        """The ONNX value as it is stored: uint8 or int8 for 8-bit values."""
        if name in self.program.constants:
            return self.b.constant(self.program.constants[name], name)
        return name

    def dequantized(self, name: str, factor: float = 1.0) -> str:
        """An 8-bit value times a float32 factor, rounded once; with factor 1 its integers."""
        key = f"{name}*{factor!r}"
        if key not in self._floats:
            scale = self.b.scalar(factor)
            inputs = [self.value(name), scale, self.zero(self.signed(name))]
            self._floats[key] = self.b.emit("DequantizeLinear", inputs, f"{name}/f")
        return self._floats[key]

    def integers(self, name: str) -> str:
        """The integers of an 8-bit value as float32, by a Cast.

        In front of matrix products, where a runtime would make an integer product of DequantizeLinear and MatMul. Those
        saturate in 16 bits on x86 processors without VNNI, and some quantize the other operand anew.
        """
        key = f"{name}/cast"
        if key not in self._floats:
            self._floats[key] = self.b.cast(self.value(name), FLOAT, f"{name}/i")
        return self._floats[key]

    def signed(self, name: str) -> bool:
        encoding = self.encoding(name)
        assert encoding is not None
        return encoding.signed

    def zero(self, signed: bool) -> str:
        """The zero point, which also says the 8-bit type."""
        return self.b.constant(np.int8(0) if signed else np.uint8(0))

    # -- storing values ------------------------------------------------------------------------------------------------

    def store(self, t: str, name: str, lo: int, hi: int, output: str | None = None) -> str:
        """Clamp, round half to even, and store as the 8-bit value `name` (or `output`, of the same encoding).

        QuantizeLinear with scale 1 rounds so, and saturates to 0..255 or -128..127: only other limits need a Clip.
        """
        signed = self.signed(name)
        least, most = (-128, 127) if signed else (0, 255)
        clipped = self.b.clip(t, lo if lo > least else None, hi if hi < most else None, f"{name}/clip")
        name = name if output is None else output
        return self.b.emit("QuantizeLinear", [clipped, self.b.scalar(1.0), self.zero(signed)], name, output=name)

    # -- the batch -----------------------------------------------------------------------------------------------------

    def batch(self, factor: int) -> str:
        """int64 [1]: factor times the batch size."""
        if self._batch is None:
            for value in self.program.inputs:
                for axis, dim in enumerate(self.shape(value)):
                    if isinstance(dim, BatchDim) and self._batch is None:
                        size = self.b.emit("Shape", [value], "batch", start=axis, end=axis + 1)
                        one = dim.factor == 1
                        self._batch = size if one else self.b.emit("Div", [size, self.b.ints([dim.factor])], "batch")
        if self._batch is None:
            raise ExportError("the model has no batch dimension in its inputs; export a model that takes a batch")
        return self._batch if factor == 1 else self.b.emit("Mul", [self._batch, self.b.ints([factor])], "batch")

    def shape_tensor(self, shape: Sequence[Any], infer: bool) -> str:
        """int64 vector of sizes; entries int, BatchDim or ["N", k]. infer: one batch entry may be written as -1."""
        sizes = [d if isinstance(d, int) else d.factor if isinstance(d, BatchDim) else int(d[1]) for d in shape]
        batched = [i for i, d in enumerate(shape) if not isinstance(d, int)]
        if not batched:
            return self.b.ints(sizes)
        if infer and len(batched) == 1 and 0 not in sizes:
            return self.b.ints([-1 if i in batched else size for i, size in enumerate(sizes)])
        parts = [self.batch(s) if i in batched else self.b.ints([s]) for i, s in enumerate(sizes)]
        return self.b.emit("Concat", parts, "shape", axis=0)

    def onnx_shape(self, value: str) -> list[int | str]:
        """Sizes, with "N" or "kN" for the batch."""
        return [d if isinstance(d, int) else str(d) for d in self.shape(value)]

    # -- errors --------------------------------------------------------------------------------------------------------

    def unsupported(self, node: Node | Instruction, why: str) -> ExportError:
        where = f" (module '{node.source}')" if node.source else ""
        op = node.op if isinstance(node, Node) else node.operation
        return ExportError(f"operator '{op}' of node '{node.name}'{where} cannot be written as ONNX: {why}")
