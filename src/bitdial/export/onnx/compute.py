"""Conv, linear and matmul in integers, as float32 products that are exact, and the epilogue of the design notes, section 1.

    acc   sum over parts of Conv or MatMul on integers held in float32; below 2^24 every partial sum is exact, in any order
    Cast  to int32; add the ratio's bias row
    Cast  to float32: one rounding; times M; plus residual times R; clamp; QuantizeLinear with scale 1: rne

Where the weights at hand do not keep a sum below 2^24, its activations are cut into digits of 4, 2 or 1 bits, whose sums do,
and the sums are put together in int32. So the order in which a runtime adds never matters. The Cast to int32 also keeps
optimizers from multiplying M into the weights, which would round.

Low weights are INT4 with a scale 2^shift per (output, group). Blocks run along an axis of a two- or three-dimensional
array that holds a group's weights together; a Reshape makes the shape that the product needs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitdial.export.onnx.builder import FLOAT, INT32
from bitdial.export.onnx.extraction import FIRST_INT4_OPSET, dynamic_power, extract_dynamic, extract_static
from bitdial.export.onnx.floats import fused_activation
from bitdial.export.onnx.parts import Part, split_layer
from bitdial.export.onnx.writer import Writer
from bitdial.graph.batch_axis import batch_axes
from bitdial.quantization.instructions import Contract, MatMul

EXACT_FLOAT32 = 1 << 24  # integers up to here are float32 numbers


def contract(w: Writer, step: Contract) -> str:
    return _epilogue(w, step, _weighted(w, step))


def matmul(w: Writer, step: MatMul) -> str:
    return _epilogue(w, step, _products(w, step))


def _weighted(w: Writer, step: Contract) -> str:
    """int32 accumulators of conv or linear, before the bias."""
    b, layer = w.b, step.layer
    value = step.inputs[0]
    encoding = w.encoding(value)
    assert encoding is not None and layer.weight is not None
    rank = w.rank(value)
    axis = step.axis % rank
    dynamic = w.program.extraction == "dynamic"
    parts = split_layer(layer, w.index, encoding, w.low == "int4" and b.opset >= FIRST_INT4_OPSET)
    sums: list[tuple[str, int, int]] = []  # float32 value, its bound, the power of two it is multiplied with
    for part in parts:
        channels = part.channels(layer)
        x = _channels(w, step, None if len(parts) == 1 else channels, axis)
        if part.extracted and dynamic:
            place = batch_axes(w.program.graph).get(value)
            power = dynamic_power(w, step, layer, part, w.integers(value), axis, place)
            x = extract_dynamic(w, step, x, part, encoding, axis, power, rank)
        elif part.extracted:
            x = extract_static(w, step, x, part, encoding, axis, rank)
        weight = _weight(w, step, part)
        # dynamic shifts: an extracted value never leaves the 8-bit range by more than the last rounding
        bound = part.row_sum() * 256 if dynamic else part.bound(layer.conv_groups)
        for digit, digit_bound, power_of_two in _digits(w, step, x, part.row_sum(), bound):
            sums.append((_product(w, step, digit, weight), digit_bound, power_of_two))
    return _collect(w, step, sums)


def _channels(w: Writer, step: Contract, channels: npt.NDArray[np.int64] | None, axis: int) -> str:
    """Some channels of the layer's input, or all, as float32 integers.

    Taken from the 8-bit value: ONNX Runtime moves a DequantizeLinear past a Slice, and can mistake the type there.
    """
    value, matrix = step.inputs[0], step.window is None
    if channels is None:
        return w.integers(value) if matrix else w.dequantized(value)
    taken = w.b.gather(w.value(value), channels, axis, f"{step.name}/part")
    if matrix:
        return w.b.cast(taken, FLOAT, f"{step.name}/part")
    inputs = [taken, w.b.scalar(1.0), w.zero(w.signed(value))]
    return w.b.emit("DequantizeLinear", inputs, f"{step.name}/part")


def _digits(w: Writer, step: Contract | MatMul, x: str, row_sum: int, bound: int) -> list[tuple[str, int, int]]:
    """x, or its digits, so that each one's sums stay below 2^24: (float32 value, bound of its sums, exponent)."""
    b = w.b
    if bound < EXACT_FLOAT32:
        return [(x, bound, 0)]
    w.notes["float32_layers_split"].append(step.name)
    bits = next(p for p in (4, 2, 1) if p == 1 or ((1 << p) - 1) * row_sum < EXACT_FLOAT32)
    result, rest = [], x
    for exponent in range(8 - bits, 0, -bits):  # the highest digit carries the sign
        unit = b.scalar(float(1 << exponent))
        digit = b.emit("Floor", [b.emit("Div", [rest, unit], f"{step.name}/digit")], f"{step.name}/digit")
        rest = b.emit("Sub", [rest, b.emit("Mul", [digit, unit], f"{step.name}/digit")], f"{step.name}/rest")
        result.append((digit, ((1 << bits) - 1) * row_sum, exponent))
    return [*result, (rest, ((1 << bits) - 1) * row_sum, 0)]


def _collect(w: Writer, step: Contract | MatMul, sums: list[tuple[str, int, int]]) -> str:
    """The int32 sum: in float32 as long as that is exact."""
    b = w.b
    total = ""
    if sum(bound << exponent for _, bound, exponent in sums) < EXACT_FLOAT32:
        for value, _, _ in sums:
            total = b.emit("Add", [total, value], f"{step.name}/sum") if total else value
        return b.cast(total, INT32, f"{step.name}/acc")
    for value, _, exponent in sums:
        term = b.cast(value, INT32, f"{step.name}/acc")
        if exponent:
            term = b.emit("Mul", [term, b.constant(np.int32(1 << exponent))], f"{step.name}/acc")
        total = b.emit("Add", [total, term], f"{step.name}/acc") if total else term
    return total


def _product(w: Writer, step: Contract, x: str, weight: str) -> str:
    a = step.window
    if a is None:
        return w.b.emit("MatMul", [x, weight], f"{step.name}/product")
    return w.b.emit(
        "Conv", [x, weight], f"{step.name}/product", strides=a.stride, pads=[*a.padding, *a.padding],
        dilations=a.dilation, group=step.layer.conv_groups,
    )  # fmt: skip


def _weight(w: Writer, step: Contract, part: Part) -> str:
    """float32 integers, [O, c, *kernel] for conv and [c, O] for linear, out of INT4 or INT8."""
    b = w.b
    conv = step.window is not None
    if part.low_weight is None:
        w.notes["int8_weights"] += part.weight.size
        one = b.scalar(1.0)
        weight = b.emit(
            "DequantizeLinear", [b.constant(part.weight, f"{step.name}/w8"), one, w.zero(True)], f"{step.name}/w"
        )
        return weight if conv else b.emit("Transpose", [weight], f"{step.name}/w", perm=[1, 0])
    assert part.weight_shift is not None
    w.notes["int4_weights"] += part.weight.size
    low, power = part.low_weight, np.left_shift(np.uint8(1), part.weight_shift)  # [O, c, ...], [O, groups]
    outputs, groups = power.shape
    if conv and bool((power == power[:, :1]).all()):  # one scale per output
        scale = b.constant(power[:, 0].astype(np.float32))
        stored = b.int4(low, f"{step.name}/w4")
        return b.emit("DequantizeLinear", [stored, scale], f"{step.name}/w", axis=0)
    if conv:
        block = low.size // (outputs * groups)
        stored = b.int4(low.reshape(outputs, groups * block), f"{step.name}/w4")
    else:  # [groups, channels of a group, O]
        block = part.group
        stored = b.int4(np.ascontiguousarray(low.T).reshape(groups, block, outputs), f"{step.name}/w4")
        power = np.ascontiguousarray(power.T).reshape(groups, 1, outputs)
    scale = b.cast(b.constant(power, f"{step.name}/scale"), FLOAT, f"{step.name}/scale")  # a byte each in the file
    wide = b.emit("DequantizeLinear", [stored, scale], f"{step.name}/w", axis=1, block_size=block)
    return b.reshape(wide, low.shape if conv else [groups * block, outputs], f"{step.name}/w")


def _products(w: Writer, step: MatMul) -> str:
    """int32 accumulators of a product of two activations."""
    b, layer = w.b, step.layer
    left, right = (w.integers(v) for v in step.inputs)
    if step.transpose_b:
        rank = w.rank(step.inputs[1])
        right = b.emit("Transpose", [right], f"{step.name}/t", perm=[*range(rank - 2), rank - 1, rank - 2])
    encoding = w.encoding(step.inputs[0])
    assert encoding is not None
    row_sum = -(-layer.accumulator_bound // encoding.qmax)
    digits = _digits(w, step, left, row_sum, layer.accumulator_bound)
    products = [(b.emit("MatMul", [digit, right], f"{step.name}/product"), m, e) for digit, m, e in digits]
    return _collect(w, step, products)


def _epilogue(w: Writer, step: Contract | MatMul, acc: str) -> str:
    b, layer = w.b, step.layer
    conv = isinstance(step, Contract) and step.window is not None
    spatial = [1] * (w.rank(step.name) - 2) if conv else []
    eight, activation = step.clamp is not None, step.activation
    given = step.residual if isinstance(step, Contract) else None
    if isinstance(step, Contract) and bool(layer.bias[w.index].any()):
        bias = b.constant(layer.bias[w.index].astype(np.int32).reshape(-1, *spatial), f"{step.name}/bias")
        acc = b.emit("Add", [acc, bias], f"{step.name}/acc")
    multiplier = layer.multiplier.astype(np.float32).reshape(-1, *spatial)
    real = b.cast(acc, FLOAT, f"{step.name}/acc")
    last = not eight and given is None and activation is None
    t = b.emit(
        "Mul", [real, b.constant(multiplier, f"{step.name}/m")], f"{step.name}/t", output=step.name if last else None
    )
    if given is not None:
        residual = w.dequantized(given, layer.residual_factor) if eight else w.value(given)
        last = not eight and activation is None
        t = b.emit("Add", [t, residual], f"{step.name}/t", output=step.name if last else None)
    if step.clamp is not None:
        return w.store(t, step.name, *step.clamp)
    return t if activation is None else fused_activation(w, t, activation, step.name)
