"""Float operators, masks and look-ups compiled: the reference engine's bits on every instruction set, however values lie."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cpu_networks import outputs_of
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdial.engines.cpu import native
from bitdial.engines.cpu.engine import CpuEngine
from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.errors import InputError
from bitdial.graph.dtypes import aten_dtype
from bitdial.graph.ir import BatchDim, Graph, Node, TensorType
from bitdial.graph.verify import infer_shape
from bitdial.quantization.instructions import Dequantize, Float, Instruction, Move, Quantize
from bitdial.quantization.layer import QParams
from bitdial.quantization.program import Program

Array = npt.NDArray[Any]
ISAS = native.isas() if not native.missing() else []
pytestmark = pytest.mark.skipif(not ISAS, reason="the compiled extension is not built")


class Floats:
    """A program of float operators, built value by value."""

    def __init__(self, **inputs: TensorType) -> None:
        self.graph = Graph(list(inputs), [], [], {}, dict(inputs))
        self.steps: list[Instruction] = []
        self.qparams: dict[str, QParams] = {}

    def _add(self, step: Instruction, type_: TensorType) -> str:
        self.steps.append(step)
        self.graph.types[step.name] = type_
        return step.name

    def op(self, op: str, inputs: list[str], **attrs: Any) -> str:
        node = Node(f"v{len(self.steps)}", op, inputs, attrs)
        shape = infer_shape(node, self.graph)
        assert shape is not None
        kind = Move if inputs[0] in self.qparams else Float
        if inputs[0] in self.qparams:
            self.qparams[node.name] = self.qparams[inputs[0]]
        extra = () if kind is Move else ("",)
        return self._add(kind(node.name, tuple(inputs), "", node, *extra), TensorType(shape, self.dtype(inputs[0])))

    def aten(self, name: str, shape: tuple[Any, ...], *args: Any, **kwargs: Any) -> str:
        """Values are strings; a dtype is written as {"dtype": ..}."""
        inputs = [a for a in args if isinstance(a, str)]
        own = [{"value": inputs.index(a)} if isinstance(a, str) else a for a in args]
        node = Node(f"v{len(self.steps)}", f"aten.{name}", inputs, {"args": own, "kwargs": kwargs})
        return self._add(Float(node.name, tuple(inputs), "", node, ""), TensorType(shape, aten_dtype(node, self.graph)))

    def quantize(self, x: str, signed: bool = True) -> str:
        name = f"v{len(self.steps)}"
        self.qparams[name] = QParams(0.05, signed)
        lo, hi = (-127, 127) if signed else (0, 255)
        kind = TensorType(self.shape(x), "int8" if signed else "uint8")
        return self._add(Quantize(name, (x,), "", lo, hi, float(np.float32(20))), kind)

    def dequantize(self, x: str) -> str:
        return self._add(
            Dequantize(f"v{len(self.steps)}", (x,), "", float(np.float32(0.05))), TensorType(self.shape(x), "float32")
        )

    def constant(self, values: Array) -> str:
        name = f"c{len(self.graph.constants)}"
        self.graph.constants[name] = values
        return name

    def dtype(self, value: str) -> str:
        constants = self.graph.constants
        return constants[value].dtype.name if value in constants else self.graph.types[value].dtype

    def shape(self, value: str) -> tuple[Any, ...]:
        return self.graph.types[value].shape

    def done(self, *outputs: str) -> Program:
        g = self.graph
        return Program(g.inputs, list(outputs), self.steps, g.types, g.constants, self.qparams, [0.0])


def of(shape: tuple[int, ...], place: int = 0, dtype: str = "float32") -> TensorType:
    """shape: for a batch of one, whose axis `place` carries it."""
    return TensorType(tuple(BatchDim(s) if i == place else s for i, s in enumerate(shape)), dtype)


def same(got: Array, want: Array) -> bool:
    """Equal to the bit but for the sign of zero; NaN where NaN is."""
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    if got.dtype != np.float32:
        return bool((got == want).all())
    return bool((((got + 0.0).view(np.int32) == (want + 0.0).view(np.int32)) | (np.isnan(got) & np.isnan(want))).all())


def check(program: Program, *inputs: Array, threads: int = 1, elsewhere: int = 0) -> list[Array]:
    """The CPU engine's outputs on every instruction set are the reference engine's, for the batch and its first sample."""
    reference = ReferenceEngine(program, check_finite=False)
    factors = [d.factor if isinstance(d := program.types[v].shape[0], BatchDim) else 0 for v in program.inputs]
    for isa in ISAS:
        engine = CpuEngine(program, isa=isa, threads=threads, check_finite=False)
        assert len(engine.compiled.reasons) == elsewhere, engine.compiled.reasons
        for few in (True, False):
            own = [a[:f] if few and f else a for a, f in zip(inputs, factors, strict=True)]
            if few and not all(factors):
                continue
            batch: Any = own if len(own) > 1 else own[0]
            want = outputs_of(reference.run(batch))
            for got, exact in zip(outputs_of(engine.run(batch)), want, strict=True):
                assert same(got, exact), f"{isa}: {int((got != exact).sum())} of {exact.size} values differ"
    return want


def numbers(seed: int, type_: TensorType, n: int = 3) -> Array:
    """Normal numbers of differing size, with some zeros."""
    rng = np.random.default_rng(seed)
    shape = tuple(d.factor * n if isinstance(d, BatchDim) else int(d) for d in type_.shape)
    if type_.dtype == "bool":
        return rng.random(shape) < 0.5
    if type_.dtype != "float32":
        return rng.integers(-3, 4, shape).astype(type_.dtype)
    values = rng.normal(0, 1, shape) * np.exp2(rng.integers(-6, 7, shape))
    return np.where(rng.random(shape) < 0.1, 0.0, values).astype(np.float32)


SEED = st.integers(0, 10**6)
THREADS = st.sampled_from([1, 1, 3])
few = settings(max_examples=25)


# ---- element by element ----------------------------------------------------------------------------------------------------


@st.composite
def shapes(draw: st.DrawFn, most: int = 5, least: int = 1) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 5, 7, 16, 33]), min_size=least, max_size=most)))


@pytest.mark.sanitize
@few
@given(shapes(4), st.sampled_from(["add", "sub", "mul", "div"]), st.data(), SEED, THREADS)
def test_arithmetic_broadcasts(shape: tuple[int, ...], op: str, data: st.DataObject, seed: int, threads: int) -> None:
    """Two values, a value and a constant, a value and a number; each axis but the batch may have size 1 in one of them."""
    shape = (data.draw(st.sampled_from([1, 1, 2])), *shape[:3])
    own = tuple(s if i == 0 or data.draw(st.integers(0, 3)) else 1 for i, s in enumerate(shape))
    other = tuple(s if i == 0 or data.draw(st.integers(0, 3)) else 1 for i, s in enumerate(shape))
    whole = tuple(max(pair) if i else shape[0] for i, pair in enumerate(zip(own, other, strict=True)))
    b = Floats(x=of(own), y=of(other))
    dims = of(whole).shape
    constant = b.constant(numbers(seed, TensorType((1, *whole[1:]) if shape[0] == 1 else (1, *other[1:]))))
    z = b.aten(f"{op}.Tensor", dims, "x", "y")
    z = b.aten(f"{op}.Tensor", dims, *((z, constant) if data.draw(st.booleans()) else (constant, z)))
    z = b.aten(f"{op}.Scalar", dims, z, 0.3)
    with np.errstate(all="ignore"):
        check(b.done(z), numbers(seed, of(own)), numbers(seed + 1, of(other)), threads=threads)


@few
@given(st.data(), SEED, THREADS)
def test_moved_operands_are_read_where_they_lie(data: st.DataObject, seed: int, threads: int) -> None:
    """A permuted and sliced value beside a dense one; the batch may end up on another axis."""
    shape = data.draw(shapes(4, 2))
    kind = of((1, *shape))
    b = Floats(x=kind, y=kind)
    axes = data.draw(st.permutations(range(len(shape) + 1)))
    moved = [b.op("permute", [v], axes=list(axes)) for v in ("x", "y")]
    at = data.draw(st.sampled_from([i for i, a in enumerate(axes) if a != 0]))
    size = shape[axes[at] - 1]
    start, step = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, 2))
    moved = [b.op("slice", [v], axis=at, start=start, stop=size, step=step) for v in moved]
    z = b.op("add", [moved[0], b.op("mul", [moved[1], moved[1]])])
    back = [0] * len(axes)
    for i, a in enumerate(axes):
        back[a] = i
    program = b.done(b.op("permute", [z], axes=back))
    check(program, numbers(seed, kind), numbers(seed + 1, kind), threads=threads)


def test_limits_keep_nan_and_negative_zero_multiplies() -> None:
    kind = of((1, 40))
    b = Floats(x=kind)
    outs = [
        b.op("relu", ["x"]), b.op("relu6", ["x"]), b.op("clamp", ["x"], lo=-0.5, hi=2.0),
        b.op("add", ["x", "x"], activation={"kind": "relu"}), b.aten("clamp.default", kind.shape, "x", -1.0, None),
        b.aten("clamp_min.default", kind.shape, "x", 0.25), b.aten("neg.default", kind.shape, "x"),
        b.aten("square.default", kind.shape, "x"), b.aten("maximum.default", kind.shape, "x", "x"),
        b.aten("sqrt.default", kind.shape, b.op("relu", ["x"])), b.aten("full_like.default", kind.shape, "x", 0.7),
    ]  # fmt: skip
    x = numbers(3, kind)
    x[0, :4] = [np.nan, np.inf, -np.inf, -0.0]
    with np.errstate(all="ignore"):
        check(b.done(*outs), x)


# ---- moves -----------------------------------------------------------------------------------------------------------------


@st.composite
def chains(draw: st.DrawFn, b: Floats, value: str, place: int) -> str:
    """Some movement operators on a value whose batch axis is `place`."""
    for _ in range(draw(st.integers(1, 4))):
        dims = [d.factor if isinstance(d, BatchDim) else d for d in b.shape(value)]
        place = next(i for i, d in enumerate(b.shape(value)) if isinstance(d, BatchDim))
        others = [i for i in range(len(dims)) if i != place]
        op = draw(st.sampled_from(["permute", "reshape", "windows", "slice", "select", "roll", "gather", "pad", "expand"]))
        if op == "permute":
            value = b.op("permute", [value], axes=list(draw(st.permutations(range(len(dims))))))
        elif op == "reshape" and place == 0:
            value = b.op("reshape", [value], shape=[["N", dims[0]], math.prod(dims[1:])])
        elif op == "windows" and place == 0 and len(dims) > 1:  # an axis joins the batch
            value = b.op("reshape", [value], shape=[["N", dims[0] * dims[1]], *dims[2:]])
        elif op == "expand" and place == 0:
            value = b.op("expand", [value], shape=[["N", dims[0]], *(3 if d == 1 else d for d in dims[1:])])
        elif others:
            at = draw(st.sampled_from(others))
            size = dims[at]
            if op == "slice":
                start = draw(st.integers(0, size - 1))
                value = b.op("slice", [value], axis=at, start=start, stop=size, step=draw(st.integers(1, 2)))
            elif op == "select" and len(dims) > 2:
                value = b.op("select", [value], axis=at, index=draw(st.integers(0, size - 1)))
            elif op == "roll":
                value = b.op("roll", [value], shifts=[draw(st.integers(-3, 3))], axes=[at])
            elif op == "gather":
                indices = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
                value = b.op("gather", [value], axis=at, indices=indices)
            elif op == "pad":
                pads = [[0, 0] for _ in dims]
                pads[at] = [draw(st.integers(0, 2)), draw(st.integers(0, 1))]
                value = b.op("pad", [value], pads=pads, value=0.0)
    return value


@pytest.mark.sanitize
@settings(max_examples=60)
@given(st.data(), shapes(4), st.sampled_from([1, 1, 4]), st.booleans(), SEED, THREADS)
def test_chains_of_moves(
    data: st.DataObject, shape: tuple[int, ...], factor: int, signed: bool, seed: int, threads: int
) -> None:
    """In float and in 8 bits, folding axes into the batch and putting the batch elsewhere."""
    kind = of((factor, *shape))
    b = Floats(x=kind)
    plain = data.draw(chains(b, "x", 0))
    byte = data.draw(chains(b, b.quantize("x", signed), 0))
    late = data.draw(chains(b, b.dequantize(byte), 0))
    again = b.dequantize(b.quantize(b.op("mul", [late, b.constant(np.array(0.3, np.float32))])))
    mixed = b.dequantize(b.quantize(data.draw(chains(b, "x", 0)), signed))
    batch_first = []
    for value in dict.fromkeys((plain, late, again, mixed)):
        place = next(i for i, d in enumerate(b.shape(value)) if isinstance(d, BatchDim))
        order = [place, *(i for i in range(len(b.shape(value))) if i != place)]
        batch_first.append(b.op("permute", [value], axes=order))
    check(b.done(*batch_first), numbers(seed, kind), threads=threads)


def test_a_window_shift_is_one_move_of_rows_and_reshapes_are_no_steps() -> None:
    """Swin: rolled, cut into windows that join the batch, quantized; and back."""
    kind = of((1, 8, 8, 24))
    b = Floats(x=kind)
    y = b.op("roll", ["x"], shifts=[-2, -2], axes=[1, 2])
    y = b.op("reshape", [y], shape=[["N", 1], 2, 4, 2, 4, 24])
    y = b.op("reshape", [b.op("permute", [y], axes=[0, 1, 3, 2, 4, 5])], shape=[["N", 4], 16, 24])
    y = b.dequantize(b.quantize(y))
    y = b.op("permute", [b.op("reshape", [y], shape=[["N", 1], 2, 2, 4, 4, 24])], axes=[0, 1, 3, 2, 4, 5])
    y = b.op("roll", [b.op("reshape", [y], shape=[["N", 1], 8, 8, 24])], shifts=[2, 2], axes=[1, 2])
    flat = b.op("reshape", [b.op("add", [y, "x"])], shape=[["N", 1], 64, 24])
    program = b.done(b.op("add", [flat, flat]))
    check(program, numbers(1, kind))
    steps = [kind for _, kind in CpuEngine(program).native.steps()]
    assert steps == ["quantize", "move", "dequantize", "add_float", "add_float"]


# ---- LayerNorm and sums ----------------------------------------------------------------------------------------------------


@pytest.mark.sanitize
@few
@given(
    st.integers(1, 130), st.integers(1, 9), st.sampled_from(["none", "weight", "both"]), st.booleans(), st.booleans(),
    st.sampled_from([1e-12, 1e-5, 1.0]), SEED, THREADS,
)  # fmt: skip
def test_layer_norm(
    columns: int, rows: int, affine: str, signed: bool, read: bool, eps: float, seed: int, threads: int
) -> None:
    """In float, in 8 bits behind it, and behind a move; and what reads it in float still can."""
    kind = of((1, rows, 2, columns))
    b = Floats(x=kind)
    own = [b.constant(numbers(seed + i, TensorType((columns,)))) for i in range(["none", "weight", "both"].index(affine))]
    y = b.op("layer_norm", ["x", *own], normalized_shape=[columns], eps=eps)
    turned = b.op("permute", [y], axes=[0, 2, 1, 3])
    outs = [b.dequantize(b.quantize(turned, signed)), b.dequantize(b.quantize(y, signed))]
    outs += [y] if read else []
    x = numbers(seed, kind)
    x[0, 0] = 3.0  # no variance
    check(b.done(*outs), x, threads=threads)


def test_layer_norm_is_normal() -> None:
    """Against float64: the order of additions is ours, the function is LayerNorm; over two axes as well."""
    kind = of((1, 5, 12, 32))
    b = Floats(x=kind)
    x = numbers(2, kind)
    got = check(b.done(b.op("layer_norm", ["x"], normalized_shape=[12, 32], eps=1e-5)), x)[0]
    exact = x.astype(np.float64)
    mean = exact.mean((2, 3), keepdims=True)
    exact = (exact - mean) / np.sqrt(((exact - mean) ** 2).mean((2, 3), keepdims=True) + 1e-5)
    assert np.abs(got - exact).max() < 2e-6


@pytest.mark.sanitize
@few
@given(shapes(4), st.data(), st.booleans(), SEED, THREADS)
def test_sums_means_and_norms(
    shape: tuple[int, ...], data: st.DataObject, keepdim: bool, seed: int, threads: int
) -> None:
    kind = of((2, *shape))
    axes = sorted(data.draw(st.sets(st.integers(1, len(shape)), min_size=1)))
    dims: tuple[Any, ...] = tuple(1 if i in axes else d for i, d in enumerate(kind.shape) if keepdim or i not in axes)
    b = Floats(x=kind)
    outs = [
        b.op("mean", ["x"], axes=axes, keepdim=keepdim), b.aten("sum.dim_IntList", dims, "x", axes, keepdim),
        b.aten("mean.dim", dims, "x", axes, keepdim), b.aten("linalg_vector_norm.default", dims, "x", 2, axes, keepdim),
    ]  # fmt: skip
    check(b.done(*outs), numbers(seed, kind), threads=threads)


def test_long_sums_on_every_axis() -> None:
    kind = of((1, 61, 37))
    b = Floats(x=kind)
    x = numbers(5, kind)
    outs = [b.op("mean", ["x"], axes=a, keepdim=False) for a in ([1], [2], [1, 2])]
    got = check(b.done(*outs), x)
    for own, axes in zip(got, ((1,), (2,), (1, 2)), strict=True):
        assert np.allclose(own, x.astype(np.float64).mean(axes), rtol=1e-4, atol=1e-4)


# ---- integers, masks, look-ups ---------------------------------------------------------------------------------------------


@pytest.mark.sanitize
@few
@given(st.integers(1, 9), st.sampled_from(["int64", "int32", "bool"]), SEED, THREADS)
def test_masks(length: int, dtype: str, seed: int, threads: int) -> None:
    """What attention masks and pooling by mask are made of."""
    kind, scores = of((1, length), 0, dtype), of((1, 2, length, length))
    n = kind.shape[0]
    b = Floats(m=kind, x=scores)
    real = b.aten("_to_copy.default", kind.shape, "m", dtype={"dtype": "float32"})
    apart = b.aten("rsub.Scalar", kind.shape, real, 1.0)
    apart = b.aten("mul.Scalar", kind.shape, apart, -3.4028234663852886e38)
    row = b.op("reshape", [apart], shape=[["N", 1], 1, 1, length])
    kept = b.aten("ne.Scalar", kind.shape, "m", 0)
    none = b.aten("logical_not.default", kind.shape, kept)
    causal = b.constant(np.tril(np.ones((length, length), np.bool_)))
    both = b.aten("logical_and.default", (n, 1, length, length), b.op("reshape", [kept], shape=[["N", 1], 1, 1, length]),
                  causal)  # fmt: skip
    chosen = b.aten("where.ScalarOther", scores.shape, both, "x", -1e4)
    filled = b.aten("masked_fill.Scalar", scores.shape, "x", b.op("reshape", [none], shape=[["N", 1], 1, 1, length]),
                    {"float": "-inf"})  # fmt: skip
    whole = b.aten("to.dtype", kind.shape, "m", {"dtype": "int64"})
    long = b.aten("sub.Scalar", kind.shape, b.aten("mul.Tensor", kind.shape, whole, whole), 2)
    outs = [
        b.op("add", ["x", row]), chosen, filled, b.aten("sum.dim_IntList", (n, 1), whole, [1], True), long,
        b.aten("cumsum.default", kind.shape, whole, 1), b.aten("gt.Scalar", kind.shape, "m", 0), none,
        b.aten("le.Tensor", kind.shape, whole, long), b.aten("zeros_like.default", kind.shape, whole),
        b.aten("div.Tensor", kind.shape, whole, real), b.aten("lt.Scalar", kind.shape, real, 0.5),
    ]  # fmt: skip
    with np.errstate(all="ignore"):
        check(b.done(*outs), numbers(seed, kind), numbers(seed, scores), threads=threads)


@pytest.mark.sanitize
@few
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 12), st.sampled_from(["int64", "int32"]), SEED, THREADS)
def test_embedding(rows: int, width: int, length: int, dtype: str, seed: int, threads: int) -> None:
    kind = of((1, length), 0, dtype)
    b = Floats(ids=kind)
    table = b.constant(numbers(seed, TensorType((rows, width))))
    places = b.constant(numbers(seed + 1, TensorType((length, width))))
    y = b.aten("embedding.default", (*kind.shape, width), table, "ids")
    ids = np.random.default_rng(seed).integers(0, rows, (3, length)).astype(dtype)
    program = b.done(b.op("add", [y, places]))
    check(program, ids, threads=threads)
    for wrong in (-1, rows):
        bad = ids.copy()
        bad[-1, -1] = wrong
        for engine in (CpuEngine(program, threads=threads), ReferenceEngine(program)):
            with pytest.raises(InputError, match=f"looks up row {wrong} of {rows}"):
                engine.run(bad)
            assert same(engine.run(ids), ReferenceEngine(program).run(ids))


def test_class_token_and_positions() -> None:
    """A constant expanded to the batch in front of pixels made tokens, and a table of positions added."""
    kind = of((1, 12, 3, 4))
    b = Floats(x=kind)
    tokens = b.op("permute", [b.op("reshape", ["x"], shape=[["N", 1], 12, 12])], axes=[0, 2, 1])
    first = b.op("expand", [b.constant(numbers(1, TensorType((1, 1, 12))))], shape=[["N", 1], 1, 12])
    b.graph.types[first] = of((1, 1, 12))
    whole = b.op("concat", [first, tokens, tokens], axis=1)
    y = b.op("add", [whole, b.constant(numbers(2, TensorType((1, 25, 12))))])
    check(b.done(b.op("select", [y], axis=1, index=0), y), numbers(3, kind))


def test_not_finite_inputs_are_refused_whatever_reads_them() -> None:
    kind = of((1, 3, 8))
    b = Floats(x=kind)
    program = b.done(b.op("layer_norm", ["x"], normalized_shape=[8], eps=1e-5))
    x = numbers(1, kind)
    x[1, 1, 1] = np.inf
    with pytest.raises(InputError, match="NaN or infinite"):
        CpuEngine(program).run(x)


def test_infinite_values_inside_are_no_fault_of_the_input() -> None:
    """Only inputs are looked at: a quantizer behind a float operator clamps what overflowed."""
    kind = of((1, 3, 8))
    b = Floats(x=kind)
    big = b.op("mul", ["x", b.constant(np.array(3e38, np.float32))])
    program = b.done(b.dequantize(b.quantize(b.op("mul", [big, big]))))
    with np.errstate(all="ignore"):
        x = np.abs(numbers(1, kind)) + 1
        assert same(CpuEngine(program).run(x), ReferenceEngine(program).run(x))


def test_values_of_any_type_and_order_cross_the_border() -> None:
    """Operators elsewhere read and make integers, masks, and values whose batch is not in front."""
    kind, ids = of((1, 3, 8)), of((1, 5), 0, "int64")
    b = Floats(x=kind, ids=ids)
    turned = b.op("permute", [b.op("mul", ["x", "x"])], axes=[1, 0, 2])
    odd = b.aten("erf.default", b.shape(turned), turned)
    back = b.op("permute", [b.op("add", [odd, turned])], axes=[1, 0, 2])
    whole = b.aten("mul.Tensor", ids.shape, "ids", "ids")
    left = b.aten("remainder.Scalar", ids.shape, whole, 3)
    mask = b.aten("eq.Tensor", ids.shape, b.aten("add.Tensor", ids.shape, left, whole), whole)
    chosen = b.aten("isfinite.default", ids.shape, b.aten("where.self", ids.shape, mask, whole, left))
    program = b.done(back, left, mask, b.aten("logical_and.default", ids.shape, chosen, mask))
    check(program, numbers(1, kind), numbers(2, ids), elsewhere=3)
