"""An executor for the search that uses torch's own 8-bit products where this build and processor have them.

It is never used for published accuracies. Where the 8-bit operator is missing, or gives other sums than float32 on a
probe, plain float32 convolutions take over.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from bitdial.engines.reference import arithmetic
from bitdial.engines.reference.executor import Executor, Setting
from bitdial.quantization.instructions import Contract, MatMul, Window


def _int8_conv(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """float32 accumulators of an unsigned 8-bit input with int8 weights."""
    rows = weight.shape[0]
    arguments = (window.stride, window.padding, window.dilation, 1)
    packed = torch.ops.onednn.qconv_prepack(weight.to(torch.int8), torch.ones(rows), 1.0, 0, *arguments, list(x.shape))
    result: Tensor = torch.ops.onednn.qconv2d_pointwise(
        x.to(torch.uint8), 1.0, 0, packed, torch.ones(rows), torch.zeros(rows, dtype=torch.int64), None, *arguments,
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
    try:
        got = _int8_conv(x, weight, window)
    except (RuntimeError, AttributeError, TypeError):
        return False
    return bool(torch.equal(got, torch.nn.functional.conv2d(x.double(), weight.double(), padding=1).float()))


class FastExecutor(Executor):
    """As Executor, with faster and possibly inexact accumulators."""

    exact = False

    def accumulators(
        self, step: Contract | MatMul, values: Mapping[str, Tensor], setting: Setting | None, batch: int
    ) -> Tensor:
        if isinstance(step, MatMul) or setting is None:
            return super().accumulators(step, values, setting, batch)
        x = self.extracted(step, self._value(step.inputs[0], values), setting, batch)
        unsigned, w = not self.program.qparams[step.inputs[0]].signed, step.window
        eligible = w is not None and len(w.kernel) == 2 and step.layer.conv_groups == 1
        if w is not None and unsigned and eligible and int8_convolutions():
            return _int8_conv(x, setting.weight, w)
        if w is None and arithmetic.int8_products():
            return arithmetic.int8_product(x, setting.weight).float()
        return arithmetic.accumulate(x, setting.weight, 0, w)
