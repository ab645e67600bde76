"""The integer program: a dozen instructions, whatever float graph the network came from. NumPy only.

A value is named after the instruction that makes it. 8-bit values hold integers (uint8 or int8, see `QParams`), all others
what their type says, as a rule float32. Factors are float32 numbers; `fl` is one float32 rounding, `rne` rounds half to even.

  Quantize    float -> 8-bit   rne(clamp(fl(x * factor)))
  Dequantize  8-bit -> float   fl(float(q) * factor)
  Contract    conv or linear   acc = sum of products in int32, low groups read back (design notes, section 1);
                               t = fl(float(acc + bias[ratio]) * multiplier[o]); t = fl(t + fl(float(r) * residual_factor)), or
                               fl(t + r) for a float residual; 8-bit: rne(clamp(t)); float: activation(t)
  MatMul      two activations  as Contract, without weights, bias and residual
  Lookup      unary function   table[q] (unsigned) or table[q + 128] (signed)
  Add         two values       rne(clamp(fl(fl(float(a) * Ra) + fl(float(b) * Rb))))
  Mul         two values       rne(clamp(fl(float(a * b) * factor))), a * b exact
  Concat      along an axis    per input: a factor of exactly 1.0 copies, any other rescales: rne(clamp(fl(float(q) * factor)))
  SumPool     mean, avg_pool   rne(clamp(fl(float(sum) * factor))), sum exact
  MaxPool     8-bit            the scale stays
  Move        8-bit            values change places, the scale stays; may pad with 0
  Float       anything else    the graph's operator in float (`node`), of values as they are

The first eleven are integer arithmetic, equal to the bit in every engine; `Float` is torch's, or an engine's own within a stated
bound. Softmax, LayerNorm, sums and means have an order of float32 operations of their own (`bitdial.engines.reference.ordered`,
`ordered_softmax`), which engines can equal to the bit. An engine or exporter is a table from these classes to handlers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from bitdial.errors import GraphError
from bitdial.graph.ir import Node
from bitdial.graph.operators import MOVEMENT, kind_of
from bitdial.quantization.layer import QuantizedLayer
from bitdial.quantization.weights import check_low_weight

INFINITY = math.inf


@dataclass(frozen=True, eq=False)
class Instruction:
    """name: of the instruction and of its result. inputs: values read, in order. source: module path in the captured network."""

    name: str
    inputs: tuple[str, ...]
    source: str
    arity: ClassVar[int | None] = 1  # how many inputs; None: any number

    @property
    def operation(self) -> str:
        """The word for it in reports and errors."""
        return type(self).__name__.lower()

    def operands(self) -> tuple[str, ...]:
        """All values that it reads."""
        return self.inputs

    def attributes(self) -> dict[str, Any]:
        """What its node in the program's graph says beside inputs and residual."""
        return {}

    def as_node(self) -> Node:
        """Its node in the program's graph (see `Program.graph`)."""
        return Node(self.name, self.operation, list(self.inputs), self.attributes(), source=self.source)

    def check(self) -> None:
        """Raise GraphError where a field cannot be: what a file from elsewhere may hold."""
        if not self.name:
            raise self.broken("it has no name")
        if self.arity is not None and len(self.inputs) != self.arity:
            raise self.broken(f"{len(self.inputs)} inputs instead of {self.arity}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "factor" and not math.isfinite(value):
                raise self.broken(f"its factor is {value}, not finite")
            if field.name == "factors" and (len(value) != len(self.inputs) or not all(map(math.isfinite, value))):
                raise self.broken(f"{len(value)} factors for {len(self.inputs)} inputs, or one is not finite")
            if field.name == "window" and value is not None and not value.sound():
                raise self.broken(f"its window has no size, stride, padding and dilation per axis: {value}")
            if field.name == "activation" and value is not None and not _is_activation(value):
                raise self.broken(f"unknown activation {value!r:.60}")

    def broken(self, problem: str) -> GraphError:
        return GraphError(f"'{self.name:.80}' ({self.operation}): {problem}")


@dataclass(frozen=True, eq=False)
class Rounding(Instruction):
    """Ends in a clamp to the integers lo..hi, within the range of its result's encoding."""

    lo: int
    hi: int

    def attributes(self) -> dict[str, Any]:
        return {"clamp": [self.lo, self.hi]}

    def check(self) -> None:
        super().check()
        if not -127 <= self.lo <= self.hi <= 255:
            raise self.broken(f"it clamps to {self.lo}..{self.hi}")


@dataclass(frozen=True, eq=False)
class Quantize(Rounding):
    factor: float


@dataclass(frozen=True, eq=False)
class Dequantize(Instruction):
    factor: float


@dataclass(frozen=True)
class Window:
    """Of a convolution or pool, one number per spatial axis: sizes, strides, padding at either end, dilation."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, attrs: dict[str, Any], kernel: Sequence[int] | None = None) -> Window:
        """The window in a node's attributes; a convolution's kernel comes from its weight."""
        kernel = attrs["kernel"] if kernel is None else kernel
        rows = (kernel, attrs["stride"], attrs["padding"], attrs.get("dilation", [1] * len(kernel)))
        return cls(*(tuple(int(v) for v in row) for row in rows))

    def attributes(self) -> dict[str, Any]:
        """As in a node's attributes, the kernel left out."""
        return {"stride": list(self.stride), "padding": list(self.padding), "dilation": list(self.dilation)}

    def sound(self) -> bool:
        """Whether there is one number of each kind per axis, sizes, strides and dilations above 0."""
        rows = (self.kernel, self.stride, self.padding, self.dilation)
        least = (1, 1, 0, 1)
        same = len({len(row) for row in rows}) == 1 and len(self.kernel) > 0
        return same and all(v >= low for row, low in zip(rows, least, strict=True) for v in row)

    @property
    def pairs(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]:
        """(kernel, stride, padding, dilation) of a window over two axes."""
        assert len(self.kernel) == 2
        return tuple((v[0], v[1]) for v in (self.kernel, self.stride, self.padding, self.dilation))  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class _Product(Instruction):
    """Accumulators and epilogue. clamp: (lo, hi) of an 8-bit result; None: the result is float and takes `activation`.

    activation: the fused one of the float operator, in real units; within `clamp`, where there is one.
    """

    layer: QuantizedLayer
    clamp: tuple[int, int] | None
    activation: dict[str, Any] | None

    def attributes(self) -> dict[str, Any]:
        activation = {} if self.activation is None else {"activation": dict(self.activation)}
        return activation if self.clamp is None else activation | {"clamp": list(self.clamp)}

    def check(self) -> None:
        super().check()
        if self.layer.name != self.name:
            raise self.broken(f"its layer is called '{self.layer.name:.80}'")
        if self.clamp is not None and not -127 <= self.clamp[0] <= self.clamp[1] <= 255:
            raise self.broken(f"it clamps to {self.clamp[0]}..{self.clamp[1]}")
        self.layer.check()
        check_low_weight(self.layer)

    @property
    def limits(self) -> tuple[float, float]:
        """The clamp, or what `activation` does to a float result; infinite where nothing is cut off."""
        if self.clamp is not None:
            return float(self.clamp[0]), float(self.clamp[1])
        if self.activation is None:
            return -INFINITY, INFINITY
        if self.activation["kind"] == "relu":
            return 0.0, INFINITY
        return float(self.activation["lo"]), float(self.activation["hi"])


@dataclass(frozen=True, eq=False)
class Contract(_Product):
    """A convolution (`window` is set; channels are axis 1) or a linear layer (the last axis is contracted)."""

    residual: str | None
    window: Window | None

    @property
    def operation(self) -> str:
        return self.layer.kind

    @property
    def axis(self) -> int:
        """The axis of the input that holds the feature channels."""
        return -1 if self.window is None else 1

    def operands(self) -> tuple[str, ...]:
        return self.inputs if self.residual is None else (*self.inputs, self.residual)

    def attributes(self) -> dict[str, Any]:
        window = {} if self.window is None else self.window.attributes() | {"groups": self.layer.conv_groups}
        return window | super().attributes()

    def as_node(self) -> Node:
        node = super().as_node()
        node.residual = self.residual
        return node

    def check(self) -> None:
        if self.layer.kind != ("linear" if self.window is None else "conv"):
            raise self.broken(f"its kind does not go with {'no' if self.window is None else 'a'} window")
        super().check()
        if self.window is not None and self.layer.weight is not None and self.window.kernel != self.layer.weight.shape[2:]:
            raise self.broken(f"its window is of {self.window.kernel}, its weight of {self.layer.weight.shape[2:]}")


@dataclass(frozen=True, eq=False)
class MatMul(_Product):
    """Contracts the last axis of the first input with the second last of the second (the last: `transpose_b`).

    scale: a constant factor of the float operator, for engines that compute scales anew; it is part of the multiplier.
    """

    transpose_b: bool
    scale: float
    arity: ClassVar[int | None] = 2

    def attributes(self) -> dict[str, Any]:
        scale = {} if self.scale == 1.0 else {"scale": self.scale}
        return {"transpose_b": self.transpose_b} | scale | super().attributes()

    def check(self) -> None:
        if self.layer.kind != "matmul":
            raise self.broken(f"its layer is a {self.layer.kind:.20}")
        super().check()
        if not math.isfinite(self.scale):
            raise self.broken(f"its scale is {self.scale}")


@dataclass(frozen=True, eq=False)
class Lookup(Rounding):
    """table: uint8 or int8 [256]. offset: added to q for the index, 128 where the input is signed. function, attrs: the unary
    operator of the float graph that the table holds."""

    table: npt.NDArray[Any]
    offset: int
    function: str
    attrs: dict[str, Any]

    @property
    def operation(self) -> str:
        return "table"

    def attributes(self) -> dict[str, Any]:
        return {"function": self.function, **self.attrs} | super().attributes()

    def check(self) -> None:
        super().check()
        if self.offset not in (0, 128):
            raise self.broken(f"its offset is {self.offset}, neither 0 nor 128")
        if self.table.shape != (256,) or self.table.dtype not in (np.uint8, np.int8):
            raise self.broken("its table is not 256 8-bit entries")


@dataclass(frozen=True, eq=False)
class _Fused(Rounding):
    """activation: the fused one of the float operator, in real units; lo..hi keep it."""

    activation: dict[str, Any] | None

    def attributes(self) -> dict[str, Any]:
        return super().attributes() | ({} if self.activation is None else {"activation": dict(self.activation)})


@dataclass(frozen=True, eq=False)
class Add(_Fused):
    factors: tuple[float, ...]
    arity: ClassVar[int | None] = 2


@dataclass(frozen=True, eq=False)
class Mul(Rounding):
    factor: float
    arity: ClassVar[int | None] = 2


@dataclass(frozen=True, eq=False)
class Concat(_Fused):
    factors: tuple[float, ...]
    axis: int
    arity: ClassVar[int | None] = None

    def attributes(self) -> dict[str, Any]:
        return {"axis": self.axis} | super().attributes()


@dataclass(frozen=True, eq=False)
class SumPool(Rounding):
    """Over a window (`axes` is None) or over whole axes (`window` is None). cells: how many values each sum is of."""

    factor: float
    window: Window | None
    ceil_mode: bool
    axes: tuple[int, ...] | None
    keepdim: bool
    cells: int

    @property
    def operation(self) -> str:
        return "mean" if self.window is None else "avg_pool"

    def attributes(self) -> dict[str, Any]:
        if self.window is None:
            own: dict[str, Any] = {"axes": list(self.axes or ()), "keepdim": self.keepdim}
        else:  # every sum is of equally many values, so that padding counts where there is any
            own = _pool(self.window, self.ceil_mode) | {"count_include_pad": True}
        return own | super().attributes()

    def check(self) -> None:
        super().check()
        if (self.window is None) == (self.axes is None) or self.cells < 1:
            raise self.broken("it needs a window or axes, and how many values each sum is of")


@dataclass(frozen=True, eq=False)
class MaxPool(Instruction):
    window: Window
    ceil_mode: bool

    @property
    def operation(self) -> str:
        return "max_pool"

    def attributes(self) -> dict[str, Any]:
        return _pool(self.window, self.ceil_mode) | {"dilation": list(self.window.dilation)}


@dataclass(frozen=True, eq=False)
class Move(Instruction):
    """reshape, permute, expand, slice, select, roll, gather or pad with 0. node: that operator of the graph."""

    node: Node

    @property
    def operation(self) -> str:
        return self.node.op

    def as_node(self) -> Node:
        return self.node

    def check(self) -> None:
        super().check()
        if self.node.op not in MOVEMENT:
            raise self.broken("it does not move values")
        if self.node.op == "pad" and self.node.attrs.get("value", 0.0) != 0:
            raise self.broken("it pads with something other than 0")


@dataclass(frozen=True, eq=False)
class Float(Instruction):
    """node: the operator. reason: why it is not in integers."""

    node: Node
    reason: str
    arity: ClassVar[int | None] = None

    @property
    def operation(self) -> str:
        return self.node.op

    def as_node(self) -> Node:
        return self.node

    def operands(self) -> tuple[str, ...]:
        return tuple(self.node.operands())

    def check(self) -> None:
        super().check()
        if kind_of(self.node.op) == "border":
            raise self.broken("no float operator")


INSTRUCTIONS: tuple[type[Instruction], ...] = (
    Quantize, Dequantize, Contract, MatMul, Lookup, Add, Mul, Concat, SumPool, MaxPool, Move, Float,
)  # fmt: skip


def _pool(window: Window, ceil_mode: bool) -> dict[str, Any]:
    sizes = {"kernel": list(window.kernel), "stride": list(window.stride), "padding": list(window.padding)}
    return {**sizes, "ceil_mode": ceil_mode}


def _is_activation(value: dict[str, Any]) -> bool:
    """Whether it is a fused activation as `bitdial.graph.ir` has them."""
    if value == {"kind": "relu"}:
        return True
    limits = [value.get(key) for key in ("lo", "hi")]
    return value.keys() == {"kind", "lo", "hi"} and value["kind"] == "clamp" and all(
        isinstance(v, (int, float)) and v == v for v in limits
    )  # fmt: skip
