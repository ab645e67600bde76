"""Converters from ATen operators of an exported program to graph nodes.

A converter turns one fx node into zero or more graph nodes and returns the value that stands for its result (a value
name, or a list of names for operators with several outputs). What has no converter becomes an `aten.*` node if it is in
`aten.ALLOWED`, else capture fails with its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitdial.errors import CaptureError
from bitdial.graph.aten import ALLOWED
from bitdial.graph.ir import Node, Shape, TensorType
from bitdial.graph.operators import OPERATORS
from bitdial.graph.shapes import broadcast, shape_to_attr, value_shape
from bitdial.graph.symbolic import Ref, dim_of, shape_of, tensor_type

_IDENTITY = frozenset(
    "aten.clone.default aten.contiguous.default aten.alias.default aten.detach.default aten.detach_.default "
    "aten.dropout.default aten.feature_dropout.default aten.lift_fresh_copy.default aten.native_dropout.default".split()
)


# Where and how a tensor is stored; the graph runs wherever its inputs are.
_PLACEMENT = frozenset({"device", "layout", "pin_memory", "memory_format"})


def is_identity(target: str, source_dtype: str, dtype: str) -> bool:
    """Operators that change nothing in evaluation mode, and casts to the dtype that is there already."""
    if target in _IDENTITY:
        return True
    casts = ("aten._to_copy.default", "aten.to.dtype", "aten.to.dtype_layout", "aten.type_as.default")
    return target in casts and source_dtype == dtype


class Converter:
    """One fx node under conversion: its arguments (values are `Ref`, constants are tensors) and the nodes it emits."""

    def __init__(
        self, importer: Any, name: str, target: str, source: str, args: list[Any], kwargs: dict[str, Any], value: Any
    ) -> None:
        self.importer, self.name, self.target, self.source = importer, name, target, source
        self.args, self.kwargs, self.value = args, kwargs, value

    def fill_defaults(self, target: Any) -> None:
        """Append the schema's defaults so that positional access is safe; keyword arguments move to their place."""
        schema = getattr(target, "_schema", None)
        if schema is None:
            return
        self.function = target
        self.given, self.given_kwargs = list(self.args), dict(self.kwargs)
        for argument in schema.arguments[len(self.args) :]:
            if argument.name in self.kwargs:
                self.args.append(self.kwargs[argument.name])
            else:
                self.args.append(argument.default_value if argument.has_default_value() else None)

    # -- emitting ------------------------------------------------------------------------------------------------------

    def emit(
        self,
        op: str,
        inputs: list[Any],
        attrs: dict[str, Any] | None = None,
        *,
        kind: TensorType | None = None,
        **roles: Any,
    ) -> str:
        """Add a node; its type is what torch.export recorded for the fx node, or `kind` for one of several outputs and for
        intermediate nodes."""
        if kind is None:
            kind = tensor_type(self.value, self.name)
            name = self.importer.fresh(self.name)
        else:
            name = self.importer.fresh(f"{self.name}_{op.removeprefix('aten.').removesuffix('.default').strip('_')}")
        node = Node(name, op, [self.ref(v) for v in inputs], attrs or {}, source=self.source)
        for role, value in roles.items():
            setattr(node, role, None if value is None else self.ref(value))
        self.importer.graph.nodes.append(node)
        self.importer.graph.types[name] = kind
        return Ref(name)

    def ref(self, value: Any) -> str:
        """Value name of an argument; constants and numbers enter the graph."""
        if isinstance(value, str):
            return str(value)
        if isinstance(value, Tensor):
            return str(self.importer.constant(value, f"{self.name}_constant"))
        if isinstance(value, (int, float)):
            return str(self.importer.constant(torch.tensor(float(value)), f"{self.name}_scalar"))
        raise self.unsupported(f"the operand {value!r} is no tensor")

    def shape(self, value: Any) -> Shape:
        return value_shape(self.importer.graph, self.ref(value))

    def float32(self, *values: Any) -> bool:
        """Whether all of these, and the result, are float32: what operators other than `aten.*` and movements compute in."""
        return self.value.dtype == torch.float32 and all(self.importer.value_dtype(v) == "float32" for v in values)

    def operands(self, values: list[Any]) -> list[Any] | None:
        """Operands of an elementwise float32 operator: constants and numbers as float32, as torch promotes them. None where
        the result is of another dtype, or a value is."""
        values = [v.float() if isinstance(v, Tensor) and v.dtype != torch.float32 else v for v in values]
        return values if self.float32(*(v for v in values if isinstance(v, (Tensor, Ref)))) else None

    def axis(self, axis: int, value: Any, extra: int = 0) -> int:
        return axis % (len(self.shape(value)) + extra)

    def unsupported(self, why: str) -> CaptureError:
        where = f" in module '{self.source}'" if self.source else ""
        return CaptureError(
            f"operator '{self.target}'{where} cannot be captured: {why}. Replace it in the model, or ask for the operator "
            "to be added to bitdial/graph/aten.py"
        )

    # -- fallback ------------------------------------------------------------------------------------------------------

    def generic(self) -> Any:
        """Any other pure operator: an `aten.*` node that runs in float."""
        if self.target not in ALLOWED:
            raise self.unsupported("it is not in bitdial's list of pure float operators")
        if isinstance(self.value, (list, tuple)):
            return [self._generic_output(i, v) if isinstance(v, Tensor) else None for i, v in enumerate(self.value)]
        return self._generic_output(None, self.value)

    def _generic_output(self, index: int | None, value: Tensor) -> str:
        inputs: list[str] = []
        attrs = {
            "args": [self._template(a, inputs) for a in self.given],
            "kwargs": {k: self._template(v, inputs) for k, v in self.given_kwargs.items() if k not in _PLACEMENT},
        }
        if index is not None:
            attrs["output"] = index  # type: ignore[assignment]
        name = self.importer.fresh(self.name if index is None else f"{self.name}_{index}")
        self.importer.graph.nodes.append(Node(name, self.target, inputs, attrs, source=self.source))
        self.importer.graph.types[name] = tensor_type(value, self.name)
        return Ref(name)

    def _template(self, value: Any, inputs: list[str]) -> Any:
        if isinstance(value, (Ref, Tensor)):
            name = self.ref(value)
            if name not in inputs:
                inputs.append(name)
            return {"value": inputs.index(name)}
        if isinstance(value, (list, tuple)):
            return [self._template(v, inputs) for v in value]
        if isinstance(value, torch.SymInt):
            dim = dim_of(value, self.name)
            return dim if isinstance(dim, int) else {"batch": dim.factor}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise self.unsupported(f"its argument {value!r} cannot be stored")

    # -- the operators -------------------------------------------------------------------------------------------------

    def check_float(self, value: Any) -> None:
        """Raise where a layer with float32 weights would read another dtype."""
        dtype = self.importer.value_dtype(value)
        if dtype != "float32":
            raise self.unsupported(
                f"its input is torch.{dtype}, its weights are float32; convert the input with .float()"
            )

    def filled(self) -> str:
        """zeros, ones, full, ... of a size that contains the batch: one cell, expanded."""
        if not isinstance(self.value, Tensor):
            return str(self.generic())
        size_at = next(i for i, a in enumerate(self.args) if isinstance(a, (list, tuple)))
        rank = len(self.args[size_at])
        if any(isinstance(a, (torch.SymInt, torch.SymFloat)) for a in self.args[size_at + 1 :]):
            raise self.unsupported("what it fills in depends on the batch size")
        cell = [*self.given[:size_at], [1] * rank, *self.given[size_at + 1 :]]
        with torch.no_grad():
            constant = self.function(*cell, **{k: v for k, v in self.given_kwargs.items() if k not in _PLACEMENT})
        self.args = [constant]
        return self.expand()

    def conv(self) -> str:
        x, w, b, stride, padding, dilation, groups = self.args[:7]
        rank = len(self.shape(w)) - 2
        stride, dilation = _per_axis(stride, rank), _per_axis(dilation, rank)
        if not isinstance(w, Tensor) or not (b is None or isinstance(b, Tensor)):
            return str(self.generic())
        self.check_float(x)
        if isinstance(padding, str):
            kernel = [int(k) for k in w.shape[2:]]  # "same" pads dilation*(k-1), the odd one at the end
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
            padding = [t // 2 for t in total]
            if any(t % 2 for t in total):
                pads = [[0, 0], [0, 0], *[[0, t % 2] for t in total]]
                shape = tuple(
                    d if a == 0 else int(d) + a  # type: ignore[arg-type]
                    for d, (_, a) in zip(self.shape(x), pads, strict=True)
                )
                x = self.emit("pad", [x], {"pads": pads, "value": 0.0}, kind=TensorType(shape, "float32"))
        attrs = {"stride": stride, "padding": _per_axis(padding, rank), "dilation": dilation, "groups": groups}
        return self.emit("conv", [x], attrs, weight=w, bias=b)

    def convolution(self) -> str:
        if self.args[6]:  # transposed
            return str(self.generic())
        self.args = [*self.args[:6], self.args[8]]
        return self.conv()

    def linear(self) -> str:
        x, w, b = self.args[:3]
        if not isinstance(w, Tensor) or not (b is None or isinstance(b, Tensor)):
            return self._matmul(x, w, transpose_b=True) if b is None else str(self.generic())
        self.check_float(x)
        return self.emit("linear", [x], weight=w, bias=b)

    def matmul(self) -> str:
        return self._matmul(self.args[0], self.args[1], transpose_b=False)

    def _matmul(self, a: Any, b: Any, transpose_b: bool) -> str:
        if not self.float32(a, b):
            return str(self.generic())
        if isinstance(b, Tensor) and b.dim() == 2:
            return self.emit("linear", [a], weight=b if transpose_b else b.t().contiguous())
        if isinstance(a, Tensor) or isinstance(b, Tensor) or len(self.shape(a)) < 2 or len(self.shape(b)) < 2:
            return str(self.generic())
        return self.emit("matmul", [a, b], {"transpose_b": transpose_b})

    def addmm(self) -> str:
        bias, x, w = self.args[:3]
        constants = isinstance(w, Tensor) and isinstance(bias, Tensor) and bias.dim() == 1
        if constants and not self.given_kwargs and self.float32(bias, x, w):
            return self.emit("linear", [x], weight=w.t().contiguous(), bias=bias)
        return str(self.generic())

    def add(self) -> str:
        operands = self.operands(self.args[:2])
        if (self.args[2] if len(self.args) > 2 else 1) != 1 or operands is None:
            return str(self.generic())
        return self.emit("add", operands)

    def mul(self) -> str:
        operands = self.operands(self.args[:2])
        return str(self.generic()) if operands is None else self.emit("mul", operands)

    def div_by_number(self) -> str:
        x, divisor = self.args[:2]
        if isinstance(divisor, Tensor) and divisor.numel() == 1 and divisor.dim() <= len(self.shape(x)):
            divisor = float(divisor)
        if not self.float32(x):
            return str(self.generic())
        if isinstance(divisor, (int, float)) and math.frexp(abs(divisor))[0] == 0.5:  # exact: a power of two
            return self.emit("mul", [x, 1.0 / divisor])
        return str(self.generic())

    def batch_norm(self) -> Any:
        x, w, b, mean, var = self.args[:5]
        eps = self.args[-1] if self.target.endswith("no_training.default") else self.args[7]
        if mean is None or var is None:
            raise self.unsupported("batch normalisation without running statistics depends on the other samples")
        self.check_float(x)
        channels = int(mean.shape[0])
        w = torch.ones(channels) if w is None else w
        b = torch.zeros(channels) if b is None else b
        many = isinstance(self.value, (list, tuple))
        if many:
            self.value = self.value[0]
        result = self.emit("batch_norm", [x, w, b, mean, var], {"eps": eps})
        return [result, None, None] if many else result

    def layer_norm(self) -> Any:
        x, shape, w, b, eps = self.args[:5]
        parameters = [p for p in (w, b) if p is not None]
        many = isinstance(self.value, (list, tuple))
        if any(self.importer.value_dtype(v) != "float32" for v in (x, *parameters)):
            return self.generic()
        if many:
            self.value = self.value[0]
        if w is None and b is not None:
            parameters = [torch.ones(list(shape)), b]
        result = self.emit("layer_norm", [x, *parameters], {"normalized_shape": [int(d) for d in shape], "eps": eps})
        return [result, None, None] if many else result

    def attention(self) -> str:
        """scaled_dot_product_attention as matmul, mask, softmax, matmul. Queries that may attend to nothing (a row of the mask
        that is False or -inf throughout) get 0, as from torch."""
        q, k, v, mask, dropout, causal, scale = self.args[:7]
        if dropout:
            raise self.unsupported(f"it drops {dropout} of its weights at random")
        plain = self.float32(q, k, v) and all(isinstance(t, str) for t in (q, k, v)) and len(self.shape(q)) >= 3
        at_run_time = isinstance(mask, str)
        if not plain or self.args[7] or (at_run_time and not self.float32(mask)):
            return str(self.generic())
        qs, ks = self.shape(q), self.shape(k)
        scale = float(scale) if scale is not None else 1.0 / math.sqrt(int(qs[-1]))  # type: ignore[arg-type]
        shape = (*broadcast(qs[:-2], ks[:-2]), qs[-2], ks[-2])
        kind = TensorType(shape, "float32")
        scores = self.emit("matmul", [q, k], {"transpose_b": True, "scale": scale}, kind=kind)
        if causal:
            mask = torch.ones(int(qs[-2]), int(ks[-2]), dtype=torch.bool).tril()  # type: ignore[arg-type]
        empty_rows = at_run_time
        if isinstance(mask, Tensor):
            barred = ~mask if mask.dtype == torch.bool else mask == -math.inf
            empty = barred.all(dim=-1, keepdim=True)
            empty_rows = bool(empty.any())
            if mask.dtype == torch.bool:
                # a large finite number instead of -inf: softmax gives exactly 0 for it, and stored values stay finite
                mask = torch.zeros(mask.shape).masked_fill(barred, -1e30).masked_fill(empty, -math.inf)
        if mask is not None:
            kind = TensorType(broadcast(shape, self.shape(mask)), "float32")
            scores = self.emit("add", [scores, mask], kind=kind)
        if empty_rows:
            template: dict[str, Any] = {"args": [{"value": 0}, -1], "kwargs": {}}
            weights = self.emit("aten._safe_softmax.default", [scores], template, kind=kind)
        else:
            weights = self.emit("softmax", [scores], {"axis": len(kind.shape) - 1}, kind=kind)
        return self.emit("matmul", [weights, v], {"transpose_b": False})

    def softmax(self) -> str:
        x, axis = self.args[:2]
        return self.emit("softmax", [x], {"axis": self.axis(axis, x)}) if self.float32(x) else str(self.generic())

    def unary(self) -> str:
        op = self.target.split(".")[1].rstrip("_")
        attrs: dict[str, Any] = {}
        if not self.float32(self.args[0]):
            return str(self.generic())
        if op == "hardtanh":
            lo, hi = float(self.args[1]), float(self.args[2])
            op, attrs = ("relu6", {}) if (lo, hi) == (0.0, 6.0) else ("clamp", {"lo": lo, "hi": hi})
        elif op in ("clamp", "clamp_min") and self.args[1] == 0 and (op == "clamp_min" or self.args[2] is None):
            op = "relu"
        elif op in ("clamp", "clamp_min"):
            if op == "clamp_min" or not all(isinstance(v, (int, float)) for v in self.args[1:3]):
                return str(self.generic())
            attrs = {"lo": float(self.args[1]), "hi": float(self.args[2])}
        elif op == "gelu":
            attrs = {"approximate": self.kwargs.get("approximate", "none")}
        elif op == "leaky_relu":
            attrs = {"slope": float(self.args[1])}
        elif op == "elu":
            if self.args[2] != 1 or self.args[3] != 1:
                return str(self.generic())
            attrs = {"alpha": float(self.args[1])}
        elif op == "softplus" and (self.args[1] != 1 or self.args[2] != 20):
            return str(self.generic())
        return self.emit(op, [self.args[0]], attrs)

    def max_pool(self) -> Any:
        x, kernel, stride, padding, dilation, ceil_mode = self.args[:6]
        many = isinstance(self.value, (list, tuple))
        if many:
            self.value = self.value[0]
        rank = int(self.target.split("max_pool")[1][0])
        kernel = _per_axis(kernel, rank)
        attrs = {
            "kernel": kernel,
            "stride": _per_axis(stride, rank) if stride else kernel,
            "padding": _per_axis(padding, rank),
            "dilation": _per_axis(dilation, rank),
            "ceil_mode": bool(ceil_mode),
        }
        result = self.emit("max_pool", [x], attrs)
        return [result, None] if many else result

    def avg_pool(self) -> str:
        x, kernel, stride, padding, ceil_mode, count_include_pad, divisor = self.args[:7]
        if divisor is not None or len(self.shape(x)) != 4 or not self.float32(x):
            return str(self.generic())
        kernel = _per_axis(kernel, 2)
        stride = _per_axis(stride, 2) if stride else kernel
        attrs = {
            "kernel": kernel,
            "stride": stride,
            "padding": _per_axis(padding, 2),
            "ceil_mode": bool(ceil_mode),
            "count_include_pad": bool(count_include_pad),
        }
        return self.emit("avg_pool", [x], attrs)

    def adaptive_avg_pool(self) -> str:
        x, size = self.args[:2]
        if not self.float32(x):
            return str(self.generic())
        shape = self.shape(x)
        rank = len(size)
        spatial = [int(d) for d in shape[len(shape) - rank :]]  # type: ignore[arg-type]
        if all(int(s) == 1 for s in size):
            return self.emit("mean", [x], {"axes": list(range(len(shape) - rank, len(shape))), "keepdim": True})
        if rank == 2 and len(shape) == 4 and all(d % int(s) == 0 for d, s in zip(spatial, size, strict=True)):
            kernel = [d // int(s) for d, s in zip(spatial, size, strict=True)]
            if kernel == [1, 1]:
                return str(x)
            attrs = {
                "kernel": kernel,
                "stride": kernel,
                "padding": [0, 0],
                "ceil_mode": False,
                "count_include_pad": True,
            }
            return self.emit("avg_pool", [x], attrs)
        return str(self.generic())

    def mean(self) -> str:
        x, axes, keepdim = self.args[:3] if self.target == "aten.mean.dim" else (self.args[0], None, False)
        rank = len(self.shape(x))
        axes = list(range(rank)) if not axes else sorted(int(i) % rank for i in axes)
        if not all(isinstance(self.shape(x)[i], int) for i in axes):
            raise self.unsupported("it averages over the batch, so that an answer would depend on the other samples")
        if not self.float32(x):
            return str(self.generic())
        return self.emit("mean", [x], {"axes": axes, "keepdim": bool(keepdim)})

    def reshape(self) -> str:
        return self.emit("reshape", [self.args[0]], {"shape": shape_to_attr(shape_of(self.value.shape, self.name))})

    def expand(self) -> str:
        shape = shape_of(self.value.shape, self.name)
        if shape == self.shape(self.args[0]):
            return str(self.args[0]) if isinstance(self.args[0], str) else self.ref(self.args[0])
        return self.emit("expand", [self.args[0]], {"shape": shape_to_attr(shape)})

    def permute(self) -> str:
        x = self.args[0]
        rank = len(self.shape(x))
        if self.target == "aten.permute.default":
            axes = [int(i) % rank for i in self.args[1]]
        else:
            i, j = (0, 1) if self.target == "aten.t.default" else (self.args[1] % rank, self.args[2] % rank)
            axes = list(range(rank))
            if rank > 1:
                axes[i], axes[j] = axes[j], axes[i]
        return self.emit("permute", [x], {"axes": axes})

    def slice(self) -> str:
        x, axis, start, stop, step = self.args[:5]
        axis = self.axis(axis, x)
        size = self.shape(x)[axis]
        whole = step == 1 and (start is None or start == 0)
        if not isinstance(size, int):
            if whole and (not isinstance(stop, int) or stop >= 2**31):
                return str(x)
            raise self.unsupported("it slices the batch dimension")
        start = 0 if start is None else min(max(start + size if start < 0 else start, 0), size)
        stop = size if stop is None else min(max(stop + size if stop < 0 else stop, start), size)
        if (start, stop, step) == (0, size, 1):
            return str(x) if isinstance(x, str) else self.ref(x)
        return self.emit("slice", [x], {"axis": axis, "start": int(start), "stop": int(stop), "step": int(step)})

    def select(self) -> str:
        x, axis, index = self.args[:3]
        axis = self.axis(axis, x)
        size = self.shape(x)[axis]
        if not isinstance(size, int):
            raise self.unsupported("it picks one sample of the batch")
        return self.emit("select", [x], {"axis": axis, "index": int(index) % size})

    def unbind(self) -> list[str]:
        x, axis = self.args[:2]
        axis = self.axis(axis, x)
        shape = self.shape(x)
        if not isinstance(shape[axis], int):
            raise self.unsupported("it takes the batch apart")
        return [
            self.emit("select", [x], {"axis": axis, "index": i}, kind=tensor_type(part, self.name))
            for i, part in enumerate(self.value)
        ]

    def split(self) -> list[str]:
        x, axis = self.args[0], self.args[2]
        axis = self.axis(axis, x)
        if not isinstance(self.shape(x)[axis], int):
            raise self.unsupported("it takes the batch apart")
        start, result = 0, []
        for part in self.value:
            stop = start + int(part.shape[axis])
            attrs = {"axis": axis, "start": start, "stop": stop, "step": 1}
            result.append(self.emit("slice", [x], attrs, kind=tensor_type(part, self.name)))
            start = stop
        return result

    def pad(self) -> str:
        x, flat = self.args[:2]
        constant = self.target == "aten.constant_pad_nd.default"
        value = self.args[2] if constant else self.args[3]
        if not constant and self.args[2] != "constant":
            return str(self.generic())
        rank = len(self.shape(x))
        flat = [int(p) for p in flat]
        pads = [[0, 0] for _ in range(rank)]
        for i in range(len(flat) // 2):
            pads[rank - 1 - i] = [flat[2 * i], flat[2 * i + 1]]
        if min(flat, default=0) < 0 or pads[0] != [0, 0] or not self.float32(x):  # the value to pad with is a float
            return str(self.generic())
        if not any(flat):
            return str(x)
        return self.emit("pad", [x], {"pads": pads, "value": float(value or 0.0)})

    def concat(self) -> str:
        tensors, axis = self.args[0], self.args[1] or 0
        tensors = [t for t in tensors if self.shape(t) != (0,)]
        operands = self.operands(tensors)
        if operands is None:
            return str(self.generic())
        axis = self.axis(axis, tensors[0])
        if not all(isinstance(self.shape(t)[axis], int) for t in tensors):
            raise self.unsupported("it concatenates along the batch")
        return self.emit("concat", operands, {"axis": axis})

    def stack(self) -> str:
        tensors, axis = self.operands(self.args[0]), self.args[1] or 0
        if tensors is None:
            return str(self.generic())
        axis = self.axis(axis, tensors[0], extra=1)
        shape = self.shape(tensors[0])
        one = (*shape[:axis], 1, *shape[axis:])
        kind = TensorType(one, "float32")
        parts = [self.emit("reshape", [t], {"shape": shape_to_attr(one)}, kind=kind) for t in tensors]
        return self.emit("concat", parts, {"axis": axis})

    def roll(self) -> str:
        x, shifts, axes = self.args[:3]
        rank = len(self.shape(x))
        if not axes:
            return str(self.generic())
        if not all(isinstance(self.shape(x)[i], int) for i in axes):
            raise self.unsupported("it rolls along the batch")
        return self.emit("roll", [x], {"shifts": [int(s) for s in shifts], "axes": [int(i) % rank for i in axes]})


def _per_axis(value: Any, rank: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return [int(v) for v in (values * rank if len(values) == 1 else values)]


def _table() -> dict[str, Callable[[Converter], Any]]:
    groups: dict[Callable[[Converter], Any], str] = {
        Converter.conv: "conv1d.default conv2d.default conv3d.default conv1d.padding conv2d.padding conv3d.padding",
        Converter.convolution: "convolution.default",
        Converter.filled: "zeros.default ones.default full.default new_zeros.default new_ones.default new_full.default",
        Converter.linear: "linear.default",
        Converter.matmul: "matmul.default mm.default bmm.default",
        Converter.addmm: "addmm.default",
        Converter.add: "add.Tensor add.Scalar",
        Converter.mul: "mul.Tensor mul.Scalar",
        Converter.div_by_number: "div.Tensor div.Scalar",
        Converter.batch_norm: "batch_norm.default _native_batch_norm_legit_no_training.default",
        Converter.layer_norm: "layer_norm.default native_layer_norm.default",
        Converter.attention: "scaled_dot_product_attention.default",
        Converter.softmax: "softmax.int _softmax.default",
        Converter.max_pool: "max_pool1d.default max_pool2d.default max_pool3d.default max_pool2d_with_indices.default",
        Converter.avg_pool: "avg_pool2d.default",
        Converter.adaptive_avg_pool: "adaptive_avg_pool1d.default adaptive_avg_pool2d.default",
        Converter.mean: "mean.dim mean.default",
        Converter.reshape: "view.default reshape.default _unsafe_view.default flatten.using_ints unsqueeze.default "
        "squeeze.default squeeze.dim squeeze.dims unflatten.int",
        Converter.expand: "expand.default",
        Converter.permute: "permute.default transpose.int t.default",
        Converter.slice: "slice.Tensor",
        Converter.select: "select.int",
        Converter.unbind: "unbind.int",
        Converter.split: "split.Tensor split_with_sizes.default chunk.default",
        Converter.pad: "constant_pad_nd.default pad.default",
        Converter.concat: "cat.default",
        Converter.stack: "stack.default",
        Converter.roll: "roll.default",
    }
    table = {f"aten.{name}": function for function, names in groups.items() for name in names.split()}
    return table | {name: Converter.unary for op in OPERATORS.values() for name in op.aten}


CONVERTERS = _table()
