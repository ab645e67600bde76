"""Products of two activations, attention, softmax, LayerNorm, sums, and the float operators between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bitdial.engines.attention import Attention, Joined
from bitdial.engines.cuda import arguments as kernels
from bitdial.engines.cuda import elements
from bitdial.engines.cuda.arguments import AttentionArgs, Epilogue, Launch, MatMulArgs, RowsArgs
from bitdial.engines.cuda.elementwise import INFINITY, combine, concatenate, move
from bitdial.engines.cuda.values import Frame, Offsets, Values
from bitdial.engines.memory import Unsupported, arguments, clamp_limits
from bitdial.engines.views import sizes_of, strided
from bitdial.graph.ir import Node, TensorType
from bitdial.graph.operators import MOVEMENT, softmax_axis
from bitdial.quantization.instructions import Float, MatMul

TILE = 64  # rows and columns of a block of a product; keys and features of a tile of attention
MOST_SHARED = 48 << 10  # bytes that every architecture gives a block
TERMS = {"add": kernels.TERM_ADD, "sub": kernels.TERM_SUB, "mul": kernels.TERM_MUL, "div": kernels.TERM_DIV,
         "fill": kernels.TERM_FILL, "keep": kernels.TERM_KEEP}  # fmt: skip
ROWS = 8  # of a block of the kernels of rows


# ---- products of two activations -------------------------------------------------------------------------------------------


def matmul(c: Values, step: MatMul) -> None:
    """All heads of all samples in one launch; operands are read where the moves in front of them lead."""
    y = c.buffer(step.name)
    if len(y.shape) < 3 or sizes_of(c.types[step.name])[1] != 0:
        raise Unsupported("a product of two activations without a batch")
    a_name, a = _operand(c, step.inputs[0], y.shape, False)
    b_name, b = _operand(c, step.inputs[1], y.shape, not step.transpose_b)
    a_row, a_depth, a_heads = strided(a)
    b_column, b_depth, b_heads = strided(b)
    y_place, y_channel, y_heads = strided(y.offsets().reshape(-1, *y.shape[-2:]))
    heads = -1 if c.dry else c.pool.add(np.stack([a_heads, b_heads, y_heads], axis=1).astype(np.int32))
    multiplier = -1 if c.dry else c.pool.add(step.layer.multiplier)
    lo, hi = step.limits
    signs = "".join("s" if c.buffer(v).signed else "u" for v in (a_name, b_name))
    rows, columns = y.shape[-2:]
    a_item, b_item = c.buffer(a_name).item, c.buffer(b_name).item

    def launch(frame: Frame) -> Launch:
        span = frame.span(step.name)
        out = Epilogue(
            y8=None if y.is_float else span, yf=span if y.is_float else None, multipliers=frame.pool.at(multiplier), lo=lo, hi=hi,
            y_sample=y.item, y_place=y_place, y_channel=y_channel, one_multiplier=1,
        )  # fmt: skip
        args = MatMulArgs(
            a=frame.span(a_name), b=frame.span(b_name), heads=frame.pool.at(heads), out=out, a_sample=a_item, b_sample=b_item,
            rows=rows, columns=columns, depth=a.shape[2], n_heads=len(a_heads), a_row=a_row, a_depth=a_depth, b_column=b_column,
            b_depth=b_depth,
        )  # fmt: skip
        return Launch(f"matmul_{signs}", (-(-rows // TILE), -(-columns // TILE), frame.batch * len(a_heads)), args)

    c.add(step.name, (a_name, b_name), launch)


def attention(c: Values, found: Attention) -> None:
    """Scores, what they meet, softmax and the second product in one launch. Raises Unsupported where it takes several."""
    scores, values = found.scores, found.values
    y = c.buffer(values.name)
    sizes, place = sizes_of(c.types[scores.name])
    if len(sizes) < 3 or place != 0 or y.shape[:-1] != tuple(sizes[:-1]) or sizes_of(c.types[found.weights.name])[0] != sizes:
        raise Unsupported("attention whose products broadcast")
    q_name, q = _operand(c, scores.inputs[0], sizes, False)
    k_name, k = _operand(c, scores.inputs[1], sizes, not scores.transpose_b)
    v_name, v = _operand(c, values.inputs[1], y.shape, not values.transpose_b)
    names = (q_name, k_name, v_name)
    if not all(c.buffer(name).signed for name in names):
        raise Unsupported("attention of unsigned values")
    (rows, keys), depth, width = sizes[-2:], q.shape[2], y.shape[-1]
    padded, pitch = -(-keys // TILE) * TILE, -(-max(keys, depth) // TILE) * TILE + 16
    fits = [r for r in (32, 16) if attention_bytes(r, padded, pitch) <= MOST_SHARED]
    if not fits:
        raise Unsupported("attention over so many keys")
    q_row, q_depth, q_heads = strided(q)
    k_key, k_depth, k_heads = strided(k)
    v_width, v_key, v_heads = strided(v)
    y_place, y_channel, y_heads = strided(y.offsets().reshape(-1, *y.shape[-2:]))
    terms = [_term(c, joined) for joined in found.joined]
    heads = multiplier = -1
    if not c.dry:
        heads = c.pool.add(np.stack([q_heads, k_heads, v_heads, y_heads], axis=1).astype(np.int32))
        multiplier = c.pool.add(values.layer.multiplier)
    block = 16 if rows <= 16 else fits[0]
    samples = [c.buffer(name).item for name in names]
    lo, hi = values.limits

    def launch(frame: Frame) -> Launch:
        span = frame.span(values.name)
        out = Epilogue(
            y8=None if y.is_float else span, yf=span if y.is_float else None, multipliers=frame.pool.at(multiplier), lo=lo, hi=hi,
            y_sample=y.item, y_place=y_place, y_channel=y_channel, one_multiplier=1,
        )  # fmt: skip
        spans = {short: frame.span(name) for short, name in zip("qkv", names, strict=True)}
        args = AttentionArgs(
            **spans, heads=frame.pool.at(heads), out=out, rows=rows, keys=keys, depth=depth, width=width, n_heads=len(q_heads),
            n_terms=len(terms), q_sample=samples[0], k_sample=samples[1], v_sample=samples[2], q_row=q_row, q_depth=q_depth,
            k_key=k_key, k_depth=k_depth, v_key=v_key, v_width=v_width, padded=padded, pitch=pitch,
            factor=float(scores.layer.multiplier[0]), weight_factor=found.weights.factor, weight_lo=float(found.weights.lo),
            weight_hi=float(found.weights.hi),
        )  # fmt: skip
        for i, term in enumerate(terms):
            args.terms[i] = term(frame)
        grid = (-(-rows // block), 1, frame.batch * len(q_heads))
        return Launch(f"attention_rows{block}", grid, args, attention_bytes(block, padded, pitch))

    met = [c.view(joined.operand)[0] for joined in found.joined if isinstance(joined.operand, str)]
    c.add(values.name, (*names, *(v for v in met if v not in c.program.constants)), launch)


def attention_bytes(rows: int, padded: int, pitch: int) -> int:
    """Of shared memory: scores, queries or weights, and a tile of keys or values (csrc/cuda/attention.h)."""
    return rows * ((padded + 16) * 4 + pitch) + TILE * 80


def _term(c: Values, joined: Joined) -> Callable[[Frame], kernels.Term]:
    """What scores meet, where it lies."""
    dtype = "bool" if joined.op in ("fill", "keep") else "float32"
    value, shape = joined.operand, joined.shape
    item, number = 0, -1
    if not isinstance(value, str):
        source, offsets = "", np.zeros((), np.int64)
        number = c.constant(f"number {value!r}", np.array([value]).astype(dtype), dtype)
    else:
        source, offsets = c.view(value)
        own, place = sizes_of(c.types[value])
        whole = len(own) == len(shape)
        if not (place == 0 and whole and own[0] == shape[0] if place is not None else not whole or own[0] == 1):
            raise Unsupported("scores meet a value whose batch is elsewhere")
        if c.types[source].dtype != dtype or source in c.program.qparams:
            raise Unsupported(f"scores meet {c.types[source].dtype} values")
        if source in c.program.constants:
            number = c.constant(source, dtype=dtype)
        else:
            item = c.buffer(source).item
    spread = np.broadcast_to(offsets, shape).reshape(-1, *shape[-2:])
    if spread.min() < 0:
        raise Unsupported("scores meet a padded value")
    row, key, heads = strided(spread)
    table = -1 if c.dry else c.pool.add(heads.astype(np.int32))

    def term(frame: Frame) -> kernels.Term:
        span = frame.pool.at(number) if item == 0 else frame.span(source)
        return kernels.Term(**{"truths" if dtype == "bool" else "floats": span}, heads=frame.pool.at(table), sample=item, row=row,
                            key=key, op=TERMS[joined.op], number=joined.number)  # fmt: skip

    return term


def _operand(c: Values, value: str, result: Sequence[int], transposed: bool) -> tuple[str, Offsets]:
    """(the value in memory, offsets [heads, rows or columns, depth]); transposed: it is [.., depth, columns]."""
    if value not in c.program.qparams:
        raise Unsupported(f"it reads '{value}' in float")
    sizes, place = sizes_of(c.types[value])
    source, offsets = c.view(value)
    if place != 0 or len(sizes) != len(result) or source in c.program.constants or sizes[0] != result[0]:
        raise Unsupported("an operand of a product of two activations has other axes than its result")
    spread = np.broadcast_to(offsets, (*result[:-2], *sizes[-2:])).reshape(-1, *sizes[-2:])
    spread = spread.transpose(0, 2, 1) if transposed else spread
    if spread.min() < 0:
        raise Unsupported("an operand of a product of two activations is padded")
    return source, spread


# ---- rows ------------------------------------------------------------------------------------------------------------------


def _rows(
    c: Values, name: str, value: str, kernel: str, length: int, inner: int, eps: float = 0.0, mean: float = 0.0,
    affine: Sequence[int] = (), square: bool = False, take_root: bool = False,
) -> None:  # fmt: skip
    """affine: numbers of LayerNorm's weight and bias among the constants."""
    per = math.prod(c.floats(value).shape) // length

    def launch(frame: Frame) -> Launch:
        given = dict(zip(("weight", "bias"), (frame.pool.at(i) for i in affine), strict=False))
        args = RowsArgs(x=frame.span(value), y=frame.span(name), rows=frame.batch * per, length=length, inner=inner, eps=eps,
                        mean=mean, square=int(square), take_root=int(take_root), **given)  # fmt: skip
        return Launch(kernel, (-(-frame.batch * per // ROWS), 1, 1), args)

    if not c.buffer(name).is_float:
        raise Unsupported("its result is not float32")
    c.add(name, (value,), launch)


def softmax(c: Values, step: Float) -> None:
    value, axis = step.operands()[0], softmax_axis(step.node)
    sizes, place = sizes_of(c.types[value])
    if axis is None or axis % len(sizes) == place:
        raise Unsupported("softmax over samples")
    axis %= len(sizes)
    _rows(c, step.name, value, "softmax_kernel", sizes[axis], math.prod(sizes[axis + 1 :]))


def layer_norm(c: Values, step: Float) -> None:
    value, *affine = step.node.inputs
    normal = [int(d) for d in step.node.attrs["normalized_shape"]]
    sizes, place = sizes_of(c.types[value])
    if place is None or place >= len(sizes) - len(normal) or sizes[len(sizes) - len(normal) :] != normal:
        raise Unsupported("it normalizes over the batch")
    given = [c.constant(v) for v in affine]
    _rows(c, step.name, value, "layer_norm_kernel", math.prod(normal), 1, float(step.node.attrs["eps"]), affine=given)


def _reduced(c: Values, step: Float, axes: Any, mean: bool, norm: bool = False) -> None:
    value = step.node.inputs[0]
    sizes, place = sizes_of(c.types[value])
    over = sorted(int(a) % len(sizes) for a in axes) if isinstance(axes, list) and axes else []
    if not over or place in over:
        raise Unsupported("it sums over the batch")
    if over != list(range(over[0], over[-1] + 1)):  # bring the axes together, behind all others
        order = [*(a for a in range(len(sizes)) if a not in over), *over]
        turned = f"{step.name}:order"
        c.types[turned] = TensorType(tuple(c.types[value].shape[a] for a in order), c.types[value].dtype)
        source, offsets = c.view(value)
        c.views[turned] = source, offsets.transpose(order)
        value, inner = turned, 1
    else:
        inner = math.prod(sizes[over[-1] + 1 :])
    count = math.prod(sizes[a] for a in over)
    if c.types[value].dtype != "float32":
        if mean or norm:
            raise Unsupported("it averages integers")
        elements.sum_integers(c, step.name, value, count, inner)
        return
    _rows(c, step.name, value, "sum_kernel", count, inner, mean=float(count) if mean else 0.0, square=norm, take_root=norm)


# ---- float operators -------------------------------------------------------------------------------------------------------


def _activation(node: Node) -> tuple[float, float]:
    activation = node.attrs.get("activation")
    if activation is None:
        return -INFINITY, INFINITY
    return (0.0, INFINITY) if activation["kind"] == "relu" else (float(activation["lo"]), float(activation["hi"]))


def _limited(c: Values, step: Float, lo: float, hi: float) -> None:
    combine(c, step.name, kernels.OP_SCALE, [step.node.inputs[0]], lo, hi)


def _arithmetic(op: int, turned: bool = False) -> Callable[[Values, Float], None]:
    """aten add, sub, rsub, mul, div."""

    def handler(c: Values, step: Float) -> None:
        (a, b, *more), kwargs = arguments(step)
        if kwargs.get("alpha", more[0] if more else 1) != 1 or kwargs.get("rounding_mode") is not None:
            raise Unsupported(f"{step.operation} with alpha or a rounding mode")
        values, dtype = [b, a] if turned else [a, b], c.types[step.name].dtype
        if dtype == "int64" and op in _WHOLE:
            elements.step_of(c, step.name, _WHOLE[op], "int64", values)
        else:
            combine(c, step.name, op, values)

    return handler


def _clamp(c: Values, step: Float) -> None:
    """aten clamp, clamp_min and clamp_max."""
    combine(c, step.name, kernels.OP_SCALE, [arguments(step)[0][0]], *clamp_limits(step))


def _square(c: Values, step: Float) -> None:
    (x, *power), _ = arguments(step)
    if power not in ([], [2]):
        raise Unsupported(f"{step.operation} of this power")
    combine(c, step.name, kernels.OP_FMUL, [x, x])


def _norm(c: Values, step: Float) -> None:
    (_, *rest), kwargs = arguments(step)
    order, axes = [*rest, *[2, None][len(rest) :]][:2]
    if order != 2 or kwargs.get("dtype") is not None:
        raise Unsupported("a norm other than the second")
    _reduced(c, step, axes if isinstance(axes, list) or axes is None else [axes], False, True)


def _concat(c: Values, step: Float) -> None:
    values, axis = list(step.node.inputs), step.node.attrs.get("axis")
    if step.operation != "concat":
        args, kwargs = arguments(step)
        values, axis = args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if step.node.attrs.get("activation") is not None or axis is None:
        raise Unsupported("an activation behind a concatenation in float")
    dtype = c.buffer(step.name).dtype
    if not dtype or any(c.types[v].dtype != dtype for v in values):
        raise Unsupported("it concatenates values of several types, or of 8 bits")
    concatenate(c, step.name, values, int(axis))


def _aten_sum(mean: bool) -> Callable[[Values, Float], None]:
    def handler(c: Values, step: Float) -> None:
        (_, axes, *_), _ = arguments(step)
        _reduced(c, step, axes if isinstance(axes, list) or axes is None else [axes], mean)

    return handler


def float_operator(c: Values, step: Float) -> None:
    """One `Float` instruction. Raises Unsupported."""
    if step.node.op in MOVEMENT:
        move(c, step)
    elif softmax_axis(step.node) is not None:
        softmax(c, step)
    elif step.node.op in OPERATORS:
        OPERATORS[step.node.op](c, step)
    else:
        raise Unsupported(step.reason or f"{step.operation} runs in float")


_WHOLE = {kernels.OP_FADD: kernels.ELEMENT_ADD, kernels.OP_FSUB: kernels.ELEMENT_SUB, kernels.OP_FMUL: kernels.ELEMENT_MUL}
_OPS = {"add": kernels.OP_FADD, "sub": kernels.OP_FSUB, "mul": kernels.OP_FMUL, "div": kernels.OP_FDIV}
OPERATORS: dict[str, Callable[[Values, Float], None]] = {
    **elements.OPERATORS,
    "layer_norm": layer_norm,
    "add": lambda c, s: combine(c, s.name, kernels.OP_FADD, s.node.inputs, *_activation(s.node)),
    "mul": lambda c, s: combine(c, s.name, kernels.OP_FMUL, s.node.inputs, *_activation(s.node)),
    "concat": _concat, "aten.cat.default": _concat,
    "mean": lambda c, s: _reduced(c, s, list(s.node.attrs["axes"]), True),
    "aten.sum.dim_IntList": _aten_sum(False), "aten.mean.dim": _aten_sum(True),
    "relu": lambda c, s: _limited(c, s, 0.0, INFINITY), "aten.relu.default": lambda c, s: _limited(c, s, 0.0, INFINITY),
    "relu6": lambda c, s: _limited(c, s, 0.0, 6.0),
    "clamp": lambda c, s: _limited(c, s, float(s.node.attrs["lo"]), float(s.node.attrs["hi"])),
    "aten.neg.default": lambda c, s: combine(c, s.name, kernels.OP_FMUL, [s.node.inputs[0], -1.0]),
    "aten.linalg_vector_norm.default": _norm, "aten.square.default": _square, "aten.pow.Tensor_Scalar": _square,
    "aten.sqrt.default": lambda c, s: combine(c, s.name, kernels.OP_ROOT, [s.node.inputs[0]]),
    **{f"aten.{name}.default": _clamp for name in ("clamp", "clamp_min", "clamp_max")},
    "aten.rsub.Scalar": _arithmetic(kernels.OP_FSUB, True), "aten.rsub.Tensor": _arithmetic(kernels.OP_FSUB, True),
    **{f"aten.{op}.{kind}": _arithmetic(code) for op, code in _OPS.items() for kind in ("Tensor", "Scalar")},
}  # fmt: skip
