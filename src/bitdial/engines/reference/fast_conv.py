"""An executor for the search that uses torch's own 8-bit products where this build and processor have them.

It is never used for published accuracies. Where the 8-bit operator is missing, or gives other sums than float32 on a
probe, plain float32 convolutions take over.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from bitdial.engines.reference import arithmetic
from bitdial.engines.reference.executor import Executor, Setting
from bitdial.quantization.instructions import Contract, Window


def _int8_conv(x: Tensor, weight: Tensor, window: Window, signed: bool) -> Tensor:
    """float32 accumulators of an 8-bit input with int8 weights. x: float32 or bytes."""
    rows, zero = weight.shape[0], 128 if signed else 0
    if signed:  # as unsigned around 128, a byte whose sign bit is the other
        x = x.to(torch.int8).view(torch.uint8) ^ 128
    arguments = (window.stride, window.padding, window.dilation, 1)
    packed = torch.ops.onednn.qconv_prepack(weight.to(torch.int8), torch.ones(rows), 1.0, zero, *arguments, list(x.shape))
    result: Tensor = torch.ops.onednn.qconv2d_pointwise(
        x.to(torch.uint8), 1.0, zero, packed, torch.ones(rows), torch.zeros(rows, dtype=torch.int64), None, *arguments,
        1.0, 0, torch.float32, "none", [], "",
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
    for operand, signed in ((x, False), (x - 128.0, True)):
        try:
            got = _int8_conv(operand, weight, window, signed)
        except (RuntimeError, AttributeError, TypeError):
            return False
        if not torch.equal(got, torch.nn.functional.conv2d(operand.double(), weight.double(), padding=1).float()):
            return False
    return True


class FastExecutor(Executor):
    """As Executor, with faster and possibly inexact accumulators; inputs of layers may be bytes."""

    exact = False

    def products(self, step: Contract, x: Tensor, setting: Setting) -> Tensor:
        w = step.window
        eligible = w is not None and len(w.kernel) == 2 and step.layer.conv_groups == 1
        if w is not None and eligible and int8_convolutions():
            return _int8_conv(x, setting.weight, w, self.program.qparams[step.inputs[0]].signed)
        x = x.float()
        if w is None and arithmetic.int8_products():
            return arithmetic.int8_product(x, setting.weight).float()
        return arithmetic.accumulate(x, setting.weight, 0, w)
