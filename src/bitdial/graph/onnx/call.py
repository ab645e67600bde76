"""One ONNX node under conversion: what converters ask it, and the graph nodes that they emit through it.

A value is a `Ref`, the name of a graph value that depends on the inputs, or a NumPy array, a constant (of sizes: see
`bitdial.graph.onnx.sizes`). An operation on constants only is computed at once and its result is a constant again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bitdial.errors import CaptureError
from bitdial.graph.ir import Array, BatchDim, Dim, Shape
from bitdial.graph.shapes import shape_to_attr
from bitdial.graph.symbolic import Ref

if TYPE_CHECKING:
    from bitdial.graph.onnx.importer import Importer
    from bitdial.graph.onnx.reading import OnnxNode

Value = Ref | Array


class Call:
    """inputs: values, None where left out. fixed_batch: the batch size that the file was written for, 1 where it is open."""

    def __init__(self, importer: Importer, node: OnnxNode, inputs: list[Any]) -> None:
        self.importer, self.node = importer, node
        self.inputs: list[Any] = inputs
        self.op, self.opset, self.fixed_batch = node.op, importer.model.opset, importer.fixed_batch

    # -- questions -----------------------------------------------------------------------------------------------------

    def refuse(self, why: str) -> CaptureError:
        return CaptureError(
            f"{self.importer.model.path}: {self.node} cannot be read: {why}. Export the model without it, or cut it there "
            "(onnx.utils.extract_model)"
        )

    def attribute(self, name: str, default: Any = None) -> Any:
        value = self.node.attributes.get(name)
        return default if value is None else value

    def given(self, index: int) -> bool:
        return len(self.inputs) > index and self.inputs[index] is not None

    def input(self, index: int) -> Any:
        """Input, None where left out."""
        return self.inputs[index] if len(self.inputs) > index else None

    def constant(self, index: int) -> Array:
        """An input that must be a constant of plain numbers. Raises CaptureError."""
        value = self.input(index)
        if not isinstance(value, np.ndarray):
            raise self.refuse(f"its input {index} is computed from the model's inputs, bitdial takes a constant there")
        if value.dtype == object:
            raise self.refuse(f"its input {index} depends on the batch size")
        return value

    def ints(self, index: int) -> list[int]:
        """A constant input as a list of integers."""
        return [int(v) for v in self.constant(index).ravel()]

    def entries(self, index: int) -> list[Any]:
        """A constant input as a list of integers and, where they are so many times the batch size, `BatchDim`s."""
        value = self.input(index)
        entries = list(value.ravel()) if isinstance(value, np.ndarray) and value.dtype == object else self.ints(index)
        return [d if isinstance(d, BatchDim) else int(d) for d in entries]

    def number(self, index: int, default: float) -> float:
        """A constant input of one element; default where left out."""
        if not self.given(index):
            return default
        array = self.constant(index)
        if array.size != 1:
            raise self.refuse(f"its input {index} has {array.size} elements, not one")
        return float(array.reshape(()))

    def axes(self, index: int = 1) -> list[int] | None:
        """Axes from an attribute or, in newer files, an input; None where not given."""
        if "axes" in self.node.attributes:
            return [int(a) for a in self.attribute("axes")]
        return self.ints(index) if self.given(index) else None

    def shape(self, value: Any) -> Shape:
        if isinstance(value, np.ndarray):
            return tuple(value.shape)
        return self.importer.graph.types[value].shape

    def rank(self, value: Any) -> int:
        return len(self.shape(value))

    def dtype(self, value: Any) -> str:
        return value.dtype.name if isinstance(value, np.ndarray) else self.importer.graph.types[value].dtype

    def float32(self, *values: Any) -> bool:
        return all(self.dtype(v) == "float32" for v in values if v is not None)

    def axis(self, axis: int, value: Any, extra: int = 0) -> int:
        """An axis counted from the front. Raises CaptureError where there is none."""
        rank = self.rank(value) + extra
        if not -rank <= axis < rank:
            raise self.refuse(f"axis {axis} of a value with {rank} axes")
        return axis % rank

    def own_axis(self, axis: int, value: Any) -> int:
        """`axis`, refused where it holds the batch: an answer may not depend on the other samples."""
        axis = self.axis(axis, value)
        self.size(self.shape(value)[axis])
        return axis

    def size(self, dim: Dim) -> int:
        if isinstance(dim, BatchDim):
            raise self.refuse("it works along the batch, whose size is open; an answer may not depend on the other samples")
        return int(dim)

    def sizes(self, value: Any) -> list[int]:
        """The shape behind the batch axis."""
        return [self.size(d) for d in self.shape(value)[1:]]

    # -- emitting ------------------------------------------------------------------------------------------------------

    def emit(
        self, op: str, inputs: Sequence[Any], attrs: dict[str, Any] | None = None, *, weight: Any = None, bias: Any = None
    ) -> Any:
        """The value of an operation of the graph: a new node, or a constant where all operands are."""
        return self.importer.emit(self, op, list(inputs), attrs or {}, weight, bias)

    def aten(self, name: str, *args: Any, output: int | None = None, **kwargs: Any) -> Any:
        """The value of a torch operator that runs in float. name: with its overload; args: values, and plain data."""
        inputs: list[Any] = []
        attrs: dict[str, Any] = {
            "args": [self._template(a, inputs) for a in args],
            "kwargs": {k: self._template(v, inputs) for k, v in kwargs.items()},
        }
        if output is not None:
            attrs["output"] = output
        return self.importer.emit(self, f"aten.{name}", inputs, attrs, None, None)

    def _template(self, value: Any, inputs: list[Any]) -> Any:
        if isinstance(value, (Ref, np.ndarray)):
            for i, known in enumerate(inputs):
                if known is value or (isinstance(value, Ref) and isinstance(known, Ref) and known == value):
                    return {"value": i}
            inputs.append(value)
            return {"value": len(inputs) - 1}
        if isinstance(value, (list, tuple)):
            return [self._template(v, inputs) for v in value]
        if isinstance(value, BatchDim):
            return {"batch": value.factor}
        if isinstance(value, float) and not np.isfinite(value):
            return {"float": str(value)}
        return value

    def reshape(self, value: Any, shape: Sequence[Dim]) -> Any:
        if tuple(shape) == self.shape(value):
            return value
        return self.emit("reshape", [value], {"shape": shape_to_attr(tuple(shape))})

    def permute(self, value: Any, axes: Sequence[int]) -> Any:
        return value if list(axes) == list(range(len(axes))) else self.emit("permute", [value], {"axes": list(axes)})

    def expand(self, value: Any, shape: Sequence[Dim]) -> Any:
        if tuple(shape) == self.shape(value):
            return value
        return self.emit("expand", [value], {"shape": shape_to_attr(tuple(shape))})

    def slice(self, value: Any, axis: int, start: int, stop: int, step: int = 1) -> Any:
        if (start, step) == (0, 1) and stop == self.shape(value)[axis]:
            return value
        return self.emit("slice", [value], {"axis": axis, "start": start, "stop": stop, "step": step})

    def pad(self, value: Any, pads: Sequence[Sequence[int]], fill: float = 0.0) -> Any:
        """pads: [before, after] per axis."""
        if not any(n for pair in pads for n in pair):
            return value
        return self.emit("pad", [value], {"pads": [list(pair) for pair in pads], "value": fill})

    def transposed(self, weight: Array) -> Array:
        """A two-dimensional constant with its axes swapped; the same array for the same array, so that tied weights stay so."""
        return self.importer.transposed(weight)
