"""A layer case of the CPU engine's tests as a launch of the CUDA kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from cpu_layers import RATIOS, LayerCase

from bitdial.engines.cuda.arguments import Epilogue, Span
from bitdial.engines.cuda.device import Pool
from bitdial.engines.cuda.dynamic import Lowering
from bitdial.engines.cuda.emulated import EmulatedDevice
from bitdial.engines.cuda.packing import Packer, pitch
from bitdial.engines.cuda.products import Plane, Product
from bitdial.quantization.instructions import Window
from bitdial.quantization.layer import QuantizedLayer


def layer_of(case: LayerCase) -> QuantizedLayer:
    outputs = len(case.weight)
    return QuantizedLayer(
        name="layer", kind="conv", weight=case.weight, weight_scale=np.ones(outputs, np.float32),
        multiplier=np.ones(outputs, np.float32), residual_factor=0.0, eligible=True, reason="", amax=case.amax, wmax=case.wmax,
        group_bounds=case.bounds, activation_shift=case.activation_shift, weight_shift=case.weight_shift,
        weight_granularity="output", group_macs=np.diff(case.bounds).astype(np.int64), low=case.low, bias=case.bias,
        conv_groups=case.conv_groups, low_weight=case.low_weight,
    )  # fmt: skip


def placed(device: EmulatedDevice, array: npt.NDArray[Any]) -> Span:
    span = device.allocate(array.nbytes)
    device.upload(span, np.ascontiguousarray(array))
    return span


def accumulators(
    case: LayerCase, device: EmulatedDevice, indices: list[int], multiprocessors: int = 0
) -> list[npt.NDArray[np.int64]]:
    """int64 [N, OH, OW, O] at each ratio of RATIOS asked for. multiprocessors: 0 for the widest blocks that the layer fits."""
    n, c, h, w = case.x.shape
    size, outputs = case.out_size, len(case.weight)
    window = Window(case.weight.shape[2:], case.stride, case.pad, case.dilation)
    pool = Pool()
    product = Product(Packer(layer_of(case), window, case.signed, device.native_int4, case.dynamic).run(), window, pool)
    lowering = Lowering(layer_of(case), case.signed, h * w, pitch(c), pool)
    assert len(product.steps) == len(RATIOS)
    pool.upload(device)
    x = np.full((n, h, w, pitch(c)), 0xA5, np.uint8)  # what lies behind the channels must not matter
    x[..., :c] = (case.x & 255).astype(np.uint8).transpose(0, 2, 3, 1)
    given = placed(device, x)
    shifts, lower = device.allocate(n * (len(case.bounds) - 1)), device.allocate(x.nbytes)
    out = device.allocate(n * size[0] * size[1] * outputs * 4)
    places = size[0] * size[1]
    epilogue = Epilogue(yf=out, y_sample=places * outputs, y_place=outputs, y_channel=1, accumulators=1)
    found = []
    for index in indices:
        plane = Plane(h, w, pitch(c), h * w * pitch(c))
        dynamic = case.dynamic and lowering.low_at(index)
        for launch in lowering.launches(index, n, given, shifts, lower) if dynamic else ():
            device.launch(launch)
        device.launch(product.launch(index, n, lower if dynamic else given, plane, size, epilogue, multiprocessors))
        y = np.empty((n, *size, outputs), np.int32)
        device.download(out, y)
        found.append(y.astype(np.int64))
    for span in (given, shifts, lower, out, pool.span):
        assert span is not None
        device.free(span)
    return found
