"""Compiles a program to launches: a table from instructions to handlers. What has no compiled form is the reference engine's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitdial.engines import memory
from bitdial.engines.attention import Attention, find_attention
from bitdial.engines.cuda import dynamic as dynamic_extraction
from bitdial.engines.cuda import elements, elementwise, transformer
from bitdial.engines.cuda.arguments import Epilogue, Launch
from bitdial.engines.cuda.packing import Packer
from bitdial.engines.cuda.products import Plane, Product, depthwise_weights
from bitdial.engines.cuda.values import Buffer, Frame, Offsets, Seen, Step, Values
from bitdial.engines.memory import Unsupported
from bitdial.errors import EngineError
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


class Compiler(Values):
    """One use: `Compiler(program, native_int4).run()`."""

    def __init__(self, program: Program, native_int4: bool, dry: bool = False) -> None:
        super().__init__(program, native_int4, dry)
        self.products: dict[str, str] = {}  # layer -> kernel
        self.reasons: dict[str, str] = {}  # instructions without a compiled form

    def run(self) -> Compiler:
        """Fill `steps`, `buffers` and `pool`. Raises EngineError that names the first value that the device cannot hold."""
        for name in self.program.inputs:
            self._named(name, "input", self.buffer, name)
        attention = {name: found.without_rounding() for name, found in find_attention(self.program, self.readers).items()}
        parts = {part.name for found in attention.values() for part in found.parts}
        for step in self.program.instructions:
            if step.name in attention:
                self._attention(attention[step.name])
            elif step.name not in parts:
                self._compile(step)
        for name in self.program.outputs:
            if not self._named(name, "output", self.buffer, name).dtype:
                raise EngineError(f"the cuda engine cannot give output '{name}': it is of 8 bits")
        return self

    def _compile(self, step: Instruction) -> None:
        before = len(self.steps), len(self.look_ups)
        try:
            HANDLERS[type(step)](self, step)
        except Unsupported as reason:
            del self.steps[before[0] :], self.look_ups[before[1] :]
            self._named(step.name, f"{step.operation}: {reason}", self._elsewhere, step, str(reason))

    def _elsewhere(self, step: Instruction, reason: str) -> None:
        """Raises Unsupported where values that it reads or makes have no place on the device."""
        reads = tuple(dict.fromkeys(v for v in step.operands() if v not in self.program.constants))
        if any(v in self.pads for v in reads):
            raise Unsupported("it reads what is padded where it is read")
        for value in (*reads, step.name):
            self.buffer(value)
        self.reasons[step.name] = reason
        self.steps.append(Step(step.name, reads, step.name, lambda frame: None, step))

    def _attention(self, found: Attention) -> None:
        """One step, or its instructions one by one."""
        try:
            transformer.attention(self, found)
        except Unsupported:
            for part in found.parts:
                self._compile(part)

    def copy(self, name: str, source: Seen, value: str | None = None, target: Offsets | None = None) -> None:
        elements.copied(self, name, source, value, target)

    @staticmethod
    def _named(name: str, operation: str, work: Callable[..., Any], *args: Any) -> Any:
        try:
            return work(*args)
        except Unsupported as reason:
            raise EngineError(f"the cuda engine has no compiled form of '{name}' ({operation}): {reason}") from None


def can_run(program: Program) -> str:
    """ "" if the engine runs all of a program, else why not."""
    try:
        Compiler(program, False, dry=True).run()
    except EngineError as reason:
        return str(reason)
    return ""


def _epilogue(
    c: Compiler, step: Contract, y: Buffer, image: bool, residual: str | None, bias: int, multipliers: int
) -> Callable[[Frame], Epilogue]:
    """bias: constant of [ratios, outputs], -1: none."""
    place, channel = y.strides(image)
    lo, hi = step.limits
    values: dict[str, Any] = {"y_sample": y.sample, "y_place": place, "y_channel": channel, "lo": lo, "hi": hi}
    r = None if residual is None else c.buffer(residual)
    if r is not None:
        r_place, r_channel = r.strides(image)
        values |= {"r_sample": r.sample, "r_place": r_place, "r_channel": r_channel, "r_signed": int(r.signed),
                   "residual_factor": step.layer.residual_factor}  # fmt: skip
    # Positions begin at multiples of 16 bytes; the channels of convolution groups must not share a word.
    fours = not y.is_float and channel == 1 and (r is None or (not r.is_float and r.strides(image)[1] == 1))
    values["fours"] = int(fours and step.layer.bias.shape[1] // step.layer.conv_groups % 4 == 0)
    width = step.layer.bias.shape[1] * 4

    def make(frame: Frame) -> Epilogue:
        span = frame.span(step.name)
        own = {"yf" if y.is_float else "y8": span, "multipliers": frame.pool.at(multipliers)}
        if bias >= 0:
            own["bias"] = frame.pool.at(bias).at(frame.ratio * width)
        if r is not None and residual is not None:
            own["rf" if r.is_float else "r8"] = frame.span(residual)
        return Epilogue(**values, **own)

    return make


def _contract(c: Compiler, step: Contract) -> None:
    layer = step.layer
    assert layer.weight is not None
    source, (top, _, left, _) = c.pads.get(step.inputs[0], (step.inputs[0], (0, 0, 0, 0)))
    x, y = c.eight(source), c.buffer(step.name)
    memory.check_contract(step, x, c.program)
    any_low = bool(layer.n_groups and layer.low.any())
    image = step.window is not None
    if image != x.channels_first:
        raise Unsupported("its input does not lie in memory as it reads it")
    window = step.window or memory.UNIT
    kernel, stride, pad, dilation = window.pairs
    window = type(window)(kernel, stride, (pad[0] + top, pad[1] + left), dilation)
    out_size = (y.shape[2], y.shape[3]) if image else (1, x.places)
    y.strides(image)
    dynamic = any_low and c.program.extraction == "dynamic"
    lower, low_at = dynamic_extraction.lowered(c, step, source, x) if dynamic else (source, lambda ratio: False)
    if c.dry:
        _epilogue(c, step, y, image, step.residual, -1, -1)
        return
    bias, multipliers = c.pool.add(layer.bias), c.pool.add(layer.multiplier)
    epilogue = _epilogue(c, step, y, image, step.residual, bias, multipliers)
    reads = (source, *(() if step.residual is None else (step.residual,)))
    outputs, per = layer.weight.shape[:2]
    if layer.conv_groups > 1 and per == 1 and not any_low:
        weights = c.pool.add(depthwise_weights(layer.weight))
        elementwise.depthwise(
            c, step.name, source, reads, window, weights, outputs // layer.conv_groups, outputs, epilogue, out_size
        )
        c.products[step.name] = "depthwise_kernel"
        return
    product = Product(Packer(layer, window, x.signed, c.native_int4, dynamic).run(), window, c.pool)
    c.products[step.name] = product.packed.kernel
    plane = Plane(x.h, x.w, x.pitch, x.sample)

    def launch(frame: Frame) -> Launch:
        given = frame.span(lower if low_at(frame.ratio) else source)
        return product.launch(frame.ratio, frame.batch * x.factor, given, plane, out_size, epilogue(frame),
                              frame.multiprocessors)  # fmt: skip

    c.add(step.name, (*reads, lower), launch)


HANDLERS: dict[type[Instruction], Callable[[Compiler, Any], None]] = {
    Quantize: elementwise.quantize, Dequantize: elementwise.dequantize, Contract: _contract, MatMul: transformer.matmul,
    Lookup: elementwise.lookup, Add: elementwise.add, Mul: elementwise.mul, Concat: elementwise.concat,
    SumPool: elementwise.sum_pool, MaxPool: elementwise.max_pool, Move: elementwise.move, Float: transformer.float_operator,
}  # fmt: skip
