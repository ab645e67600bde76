"""An executor for the search that uses torch's own 8-bit products where this build and processor have them.

It is never used for published accuracies. Where the 8-bit operator is missing, or gives other sums than float32 on a
probe, plain float32 convolutions take over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from bitdial.engines.reference import arithmetic
from bitdial.engines.reference.eight_bit_values import EightBitValues
from bitdial.engines.reference.executor import Executor, Setting, move_values
from bitdial.graph.inputs import check_inputs
from bitdial.quantization.byte_products import int8_product, int8_products
from bitdial.quantization.instructions import Contract, Instruction, Move, Window

PIECE = 1 << 20  # elements of a layer's outputs that are computed at once


def _packed(shape: Sequence[int], weight: Tensor, window: Window, signed: bool) -> Tensor:
    """int8 weights as `_int8_conv` takes them; shape: of the inputs, which decides what is fastest."""
    arguments = (window.stride, window.padding, window.dilation, shape[1] // weight.shape[1])
    packed: Tensor = torch.ops.onednn.qconv_prepack(
        weight.to(torch.int8), torch.ones(len(weight)), 1.0, 128 if signed else 0, *arguments, list(shape)
    )
    return packed


def _int8_conv(x: Tensor, packed: Tensor, outputs: int, groups: int, window: Window, signed: bool) -> Tensor:
    """float32 accumulators of an 8-bit input. x: float32 or bytes. packed: of `_packed`."""
    if signed:  # as unsigned around 128, a byte whose sign bit is the other
        x = x.to(torch.int8).view(torch.uint8) ^ 128
    result: Tensor = torch.ops.onednn.qconv2d_pointwise(
        x.to(torch.uint8), 1.0, 128 if signed else 0, packed, torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64), None,
        window.stride, window.padding, window.dilation, groups, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return result


@lru_cache(maxsize=1)
def int8_convolutions() -> bool:
    """Whether 8-bit convolutions exist and are exact here (without VNNI some saturate)."""
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2, 64, 8, 8), generator=generator).float().contiguous(memory_format=torch.channels_last)
    x[0] = 255.0
    weight = torch.randint(-127, 128, (32, 64, 3, 3), generator=generator).float()
    weight[0] = 127.0
    alone = weight[:, :1].repeat(4, 1, 1, 1)  # two of every channel
    for operand, signed in ((x, False), (x - 128.0, True)):
        for own in (weight, alone):
            groups = x.shape[1] // own.shape[1]
            exact = torch.nn.functional.conv2d(operand.double(), own.double(), padding=1, groups=groups).float()
            try:
                packed = _packed(operand.shape, own, window, signed)
                got = [_int8_conv(part, packed, len(own), groups, window, signed) for part in (operand, operand[:1])]
            except (RuntimeError, AttributeError, TypeError):
                return False
            if not torch.equal(got[0], exact) or not torch.equal(got[1], exact[:1]):
                return False
    return True


class FastExecutor(Executor):
    """As Executor, with faster and possibly inexact accumulators; inputs of layers may be bytes."""

    exact = False

    def run(
        self,
        inputs: Sequence[Tensor],
        settings: Mapping[str, Setting],
        observe: Callable[[str, Tensor], None] | None = None,
    ) -> list[Tensor]:
        """As Executor's, but 8-bit values are kept in bytes, and `observe` is given them so."""
        batch = check_inputs(self.program, inputs)
        values = EightBitValues(self.program, dict(zip(self.program.inputs, inputs, strict=True)))
        for step in self.schedule.walk(values):
            values[step.name] = self.step(step, values, settings, batch)
            if observe is not None:
                observe(step.name, values.stored(step.name, self.constants))
        return [self._value(v, values) for v in self.program.outputs]

    def step(
        self, step: Instruction, values: Mapping[str, Tensor], settings: Mapping[str, Setting], batch: int
    ) -> Tensor:
        if isinstance(values, EightBitValues):
            if isinstance(step, Contract):
                x = values.stored(step.inputs[0], self.constants)
                return self.outputs(step, self.extracted(step, x, settings[step.name], batch), values, settings[step.name], batch)
            if isinstance(step, Move):  # its operand's bytes as they are
                return move_values(self, step, [values.stored(step.operands()[0], self.constants)], batch)
        return super().step(step, values, settings, batch)

    def outputs(self, step: Contract, x: Tensor, values: EightBitValues, setting: Setting, batch: int) -> Tensor:
        """A layer's outputs from what `extracted` gives, a piece at a time: what is float in between stays within the caches."""
        kind = values.types.get(step.name)
        size = max(1, PIECE * len(x) // (self.program.types[step.name].elements * batch))
        if kind is None or size >= len(x):
            return self.epilogue(step, self.products(step, x, setting), values, setting)
        residual = None if step.residual is None else values.stored(step.residual, self.constants)
        result: Tensor | None = None
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            beside = {} if residual is None or step.residual is None else {step.residual: residual[rows].float()}
            own = self.epilogue(step, self.products(step, x[rows], setting), beside, setting)
            if result is None:
                order = torch.channels_last if own.dim() == 4 else torch.contiguous_format
                result = torch.empty((len(x), *own.shape[1:]), dtype=kind, memory_format=order)
            result[rows] = own
        assert result is not None
        return result

    def extracted(self, step: Contract, x: Tensor, setting: Setting, batch: int) -> Tensor:
        if x.dtype == torch.float32 or setting.inverse is None:
            return super().extracted(step, x, setting, batch)
        if self.program.extraction == "dynamic":
            return super().extracted(step, x.float(), setting, batch).to(x.dtype)
        assert setting.power is not None and setting.low is not None and setting.high is not None
        channel = self.layers[step.name].channel_shape(x.dim())
        low, high, power = (v.reshape(channel) for v in (setting.low, setting.high, setting.power))
        return arithmetic.extract_bytes(x, power, low, high)

    def products(self, step: Contract, x: Tensor, setting: Setting) -> Tensor:
        w = step.window
        signed = self.program.qparams[step.inputs[0]].signed
        groups = step.layer.conv_groups
        if w is not None and len(w.kernel) == 2 and (groups == 1 or setting.weight.shape[1] == 1) and int8_convolutions():
            if setting.packed is None:
                setting.packed = _packed(x.shape, setting.weight, w, signed)
            return _int8_conv(x, setting.packed, len(setting.weight), groups, w, signed)
        if w is None and int8_products():
            return int8_product(x, setting.weight).float()
        return arithmetic.accumulate(x.float(), setting.weight, 0, w)
