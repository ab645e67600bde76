"""Activations at low precision: x_low = clamp(rne(x / 2^shift)) * 2^shift, per channel.

`QuantizeLinear` computes saturate(rne(x / scale)). With integers x and scale 2^shift the quotient is exact, so that its
ties are real ties and go to even, as in the reference engine. With real scales they need not be: fl(q * s) / (s * 2^shift)
can fall to either side of a tie, and an activation q of a group with shift n is a tie for one in 2^n values. That is why
the graph keeps 8-bit values in units of their steps. Saturation differs for signed values only (-8 against -7): Clip first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitdial.export.onnx.builder import INT4, INT32, UINT4
from bitdial.export.onnx.parts import Part
from bitdial.export.onnx.writer import Writer
from bitdial.graph.batch_axis import BatchAxis
from bitdial.graph.ir import BatchDim
from bitdial.quantization.instructions import Contract
from bitdial.quantization.program import QParams, QuantizedLayer

FIRST_INT4_OPSET = 21


def _along(vector: npt.NDArray[np.int64], rank: int, axis: int) -> npt.NDArray[np.float32]:
    """A vector over channels as float32 that broadcasts against the value."""
    return vector.astype(np.float32).reshape([-1 if i == axis else 1 for i in range(rank)])


def _needs_limit(part: Part, encoding: QParams, type_limit: int) -> bool:
    """Whether some channel can round beyond its limit where the type would not saturate at it."""
    most = np.rint(encoding.qmax / np.exp2(part.shift))
    return bool(((most > part.limit) & (part.limit != type_limit)).any())


def extract_static(w: Writer, step: Contract, x: str, part: Part, encoding: QParams, axis: int, rank: int) -> str:
    """x: the part's channels as float32 integers. Returns the same, extracted by the shifts stored with the model."""
    b = w.b
    four = part.low_weight is not None and int(part.limit.max()) <= (7 if encoding.signed else 15)
    four = four and b.opset >= FIRST_INT4_OPSET
    saturation = (7 if encoding.signed else 15) if four else encoding.qmax
    # A scale of one entry counts as a scalar, which runtimes merge with the pair before; and a pair of 8-bit
    # DequantizeLinear before a MatMul becomes an integer product that knows one scale only (seen in ONNX Runtime 1.31).
    if len(part.shift) == 1 or (step.window is None and not four):
        return _rounded(w, step, x, part, encoding, b.constant(np.exp2(_along(part.shift, rank, axis))), axis, rank)
    largest = part.limit << part.shift
    if _needs_limit(part, encoding, saturation):
        x = b.emit("Min", [x, b.constant(_along(largest, rank, axis))], f"{step.name}/min")
    if encoding.signed and bool((np.rint(encoding.qmax / np.exp2(part.shift)) > part.limit).any()):
        x = b.emit("Max", [x, b.constant(_along(-largest, rank, axis))], f"{step.name}/max")
    scale = b.constant(np.exp2(part.shift).astype(np.float32))
    if four:
        kind = INT4 if encoding.signed else UINT4
        low = b.emit("QuantizeLinear", [x, scale], f"{step.name}/low", axis=axis, output_dtype=kind)
        return b.emit("DequantizeLinear", [low, scale], f"{step.name}/x", axis=axis)
    zero = b.constant(np.zeros(len(part.shift), np.int8 if encoding.signed else np.uint8))
    low = b.emit("QuantizeLinear", [x, scale, zero], f"{step.name}/low", axis=axis)
    return b.emit("DequantizeLinear", [low, scale, zero], f"{step.name}/x", axis=axis)


def _rounded(w: Writer, step: Contract, x: str, part: Part, encoding: QParams, power: str, axis: int, rank: int) -> str:
    """The same by Round, for scales that are no constant vector. power: 2^shift, broadcastable; quotients are exact."""
    b = w.b
    t = b.emit("Round", [b.emit("Div", [x, power], f"{step.name}/div")], f"{step.name}/round")
    t = b.emit("Min", [t, b.constant(_along(part.limit, rank, axis))], f"{step.name}/min")
    if encoding.signed:
        t = b.emit("Max", [t, b.constant(_along(-part.limit, rank, axis))], f"{step.name}/max")
    return b.emit("Mul", [t, power], f"{step.name}/x")


def extract_dynamic(
    w: Writer, step: Contract, x: str, part: Part, encoding: QParams, axis: int, power: str, rank: int
) -> str:
    """As `extract_static`, with 2^shift per (sample, channel) from `dynamic_power`."""
    return _rounded(w, step, x, part, encoding, power, axis, rank)


def dynamic_power(
    w: Writer, step: Contract, layer: QuantizedLayer, part: Part, x: str, axis: int, place: BatchAxis | None
) -> str:
    """float32, broadcastable against the part's channels of `x`: 2^shift per (sample, channel) of the data at hand.

    x: all channels as float32 integers. The shift is that of the bit length of the group's largest magnitude
    (`bitdial.engines.reference.arithmetic.dynamic_shift`). Raises ExportError where samples cannot be told apart.
    """
    b = w.b
    if place is None:
        raise w.unsupported(step, "dynamic extraction, and it cannot be told which values belong to one sample")
    shape = w.shape(step.inputs[0])
    inner = [d.factor if isinstance(d, BatchDim) else d for d in shape]
    split = [*inner[: place.axis], place.outer, -1, place.inner, *inner[place.axis + 1 :]]
    channel = axis if axis < place.axis else axis + 2
    sample = place.axis + 1
    magnitude = b.reshape(b.emit("Abs", [x], f"{step.name}/abs"), split, f"{step.name}/abs")
    others = [i for i in range(len(split)) if i not in (channel, sample)]
    largest = b.reduce("ReduceMax", magnitude, others, False, f"{step.name}/amax")  # [N, C] or [C, N]
    if channel < sample:
        largest = b.emit("Transpose", [largest], f"{step.name}/amax", perm=[1, 0])
    bounds = layer.group_bounds.astype(np.int64)
    width = int(np.diff(bounds).max())
    table = np.minimum(bounds[:-1, None] + np.arange(width), bounds[1:, None] - 1)  # short groups: last one repeated
    members = b.emit("Gather", [largest, b.constant(table.astype(np.int32))], f"{step.name}/group", axis=1)
    per_group = b.reduce("ReduceMax", members, [2], False, f"{step.name}/group")  # [N, groups]
    magnitudes = np.arange(256)
    bits = np.array([int(m).bit_length() for m in magnitudes])
    powers = np.exp2(np.maximum(bits - int(layer.amax).bit_length(), 0)).astype(np.float32)
    power = b.emit("Gather", [b.constant(powers), b.cast(per_group, INT32, f"{step.name}/group")], f"{step.name}/power")
    channels = part.channels(layer)
    low = part.limit == layer.amax if part.low_weight is None else np.ones(len(channels), np.bool_)
    power = b.gather(power, layer.channel_groups()[channels], 1, f"{step.name}/power")  # [N, part's channels]
    if not low.all():
        mask = b.constant(low[None])
        power = b.emit("Where", [mask, power, b.scalar(1.0)], f"{step.name}/power")
    if place.outer != 1 or place.inner != 1:
        count = len(channels)
        power = b.reshape(power, [1, -1, 1, count], f"{step.name}/power")
        grid = b.emit("Concat", [b.ints([place.outer]), w.batch(1), b.ints([place.inner, count])], "shape", axis=0)
        power = b.reshape(b.emit("Expand", [power, grid], f"{step.name}/power"), [-1, count], f"{step.name}/power")
    if place.axis > axis:
        power = b.emit("Transpose", [power], f"{step.name}/power", perm=[1, 0])
    final = [1] * len(shape)
    final[place.axis], final[axis] = -1, len(channels)
    return b.reshape(power, final, f"{step.name}/power")
