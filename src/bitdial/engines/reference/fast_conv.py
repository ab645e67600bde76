"""An executor for the search that uses torch's own 8-bit convolutions where this build and processor have them.

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
from bitdial.graph.ir import Node


def _int8_conv(x: Tensor, weight: Tensor, node: Node) -> Tensor:
    """float32 accumulators of an unsigned 8-bit input with int8 weights."""
    a = node.attrs
    rows = weight.shape[0]
    arguments = (a["stride"], a["padding"], a["dilation"], a["groups"])
    packed = torch.ops.onednn.qconv_prepack(weight.to(torch.int8), torch.ones(rows), 1.0, 0, *arguments, list(x.shape))
    result: Tensor = torch.ops.onednn.qconv2d_pointwise(
        x.to(torch.uint8), 1.0, 0, packed, torch.ones(rows), torch.zeros(rows, dtype=torch.int64), None, *arguments,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return result


@lru_cache(maxsize=1)
def int8_convolutions() -> bool:
    """Whether 8-bit convolutions exist and are exact here (without VNNI some saturate)."""
    node = Node("probe", "conv", [], {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1})
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2, 64, 8, 8), generator=generator).float().contiguous(memory_format=torch.channels_last)
    x[0] = 255.0
    weight = torch.randint(-127, 128, (32, 64, 3, 3), generator=generator).float()
    weight[0] = 127.0
    try:
        got = _int8_conv(x, weight, node)
    except (RuntimeError, AttributeError, TypeError):
        return False
    return bool(torch.equal(got, torch.nn.functional.conv2d(x.double(), weight.double(), padding=1).float()))


class FastExecutor(Executor):
    """As Executor, with faster and possibly inexact accumulators."""

    def accumulators(self, node: Node, values: Mapping[str, Tensor], setting: Setting | None, batch: int) -> Tensor:
        if node.op == "matmul" or setting is None:
            return super().accumulators(node, values, setting, batch)
        x = self.lowered(node, self._value(node.inputs[0], values), setting, batch)
        unsigned = not self.program.qparams[node.inputs[0]].signed
        eligible = node.op == "conv" and setting.weight.dim() == 4 and node.attrs["groups"] == 1
        if unsigned and eligible and int8_convolutions():
            return _int8_conv(x, setting.weight, node)
        return arithmetic.accumulate(node, x, setting.weight, 0)
